"""The ablations: what is planned, at which cost, and that only what is missing is made."""

import json
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import shapes.drift
import train
from shapes import ablate, build
from shapes.build import Training
from shapes.drift import TEST_SEED
from shapes.plan import NEAR_BUDGET, Measurement, Plan, operations
from shapes.stored import read_run, write_run
from shapes.table import MARKS
from shapes.variants import CORE, FURTHER, REFERENCE, ROWS, START, STARTS, comparisons
from tests.tiny_pipeline import random_dit, write_config
from tests.tiny_training import write_training_world
from utils.cli import run_main
from utils.config import ROOT, load_config
from utils.errors import UserError
from wan.checkpoints import read_state_dict

SMALL = ["--scenes", 1, "--times", 2, "--long_times", 3, "--batch", 1]


def options(*arguments):
    return ablate.build_parser().parse_args([str(argument) for argument in arguments])


def targets(*arguments):
    return ablate.list_targets(options(*arguments))


def trainings(*arguments):
    return [part for part in targets(*arguments) if isinstance(part, Training)]


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    """The same plan on every machine; curves, which take a second, only where a test sees them."""
    monkeypatch.setattr(build, "default_processes", lambda: 1)

    def drawn(results, out):
        out.parent.mkdir(exist_ok=True)
        out.touch()

    monkeypatch.setattr(ablate, "draw_drift", drawn)


def touch(folder, *keys):
    folder.mkdir(parents=True, exist_ok=True)
    for key in keys:
        (folder / f"shapes_{key}.pt").touch()
    return folder


# --- the plan ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_each_training_comes_once_and_before_what_needs_it(tmp_path):
    """Without a sink that matters in training, both sinks share theirs."""
    shipped = touch(tmp_path / "shipped", *STARTS)
    parts = targets("--folder", tmp_path / "out", "--checkpoints", shipped)
    made = [part for part in parts if isinstance(part, Training)]
    measured = [part for part in parts if isinstance(part, Measurement)]
    assert len({part.logdir for part in made}) == len(made)
    for part in made:
        needing = [m for m in measured if m.weights == part.result]
        assert needing
        assert all(parts.index(part) < parts.index(m) for m in needing)
    found = {(m.row.key, m.seed, m.beginning): m for m in measured}
    assert len(found) == len(measured) == 2 * (3 * len(CORE) + len(FURTHER))
    for pair in (("rolling_forcing", "rolling_no_sink"), ("self_forcing", "self_forcing_sink")):
        assert len({found[key, 1, "true"].weights for key in pair}) == 1
    assert len({m.weights for m in measured if m.row.key == REFERENCE}) == 3
    for m in measured:
        assert m.protocol.given == (m.beginning == "true")
        assert m.protocol.times == (60 if m.row.core and m.protocol.given else 12)


@pytest.mark.slow
def test_all_distillations_take_as_many_operations(tmp_path):
    """Equal updates are not equal work: three levels make cheaper ones than five."""
    shipped = touch(tmp_path / "shipped", *STARTS)
    parts = targets("--folder", tmp_path, "--checkpoints", shipped, "--seeds", 1)
    made = [part for part in parts if isinstance(part, Training)]
    taken = {part.key: operations(part.config, part.config.max_steps) for part in made}
    budget = taken[f"{REFERENCE}, seed 0"]
    assert len(taken) >= 5
    assert list(taken.values()) == pytest.approx([budget] * len(taken), rel=NEAR_BUDGET)
    steps = {part.key.partition(",")[0]: part.config.max_steps for part in made}
    assert steps["rolling_levels_3"] > steps[REFERENCE] > steps["rollouts_63"]
    assert steps["critic_warmup"] > steps[REFERENCE]
    few = ["--only", "critic_warmup", "--seeds", 1, "--", "max_steps=50"]
    short = targets("--folder", tmp_path, "--checkpoints", shipped, *few)[0]
    assert short.config.max_steps > 100, "the critic's warm-up is longer than the reference"
    text = ablate.cost_text(options("--gflops", 100, "--fps", 50, "--processes", 2), parts)
    total = sum(taken.values())
    assert f"{len(made)} of {len(made)} trainings are left: {total / 1e12:,.1f} TFLOP" in text
    assert f"{total / 200e9 / 3600:.1f} h at 100 GFLOP/s in each of 2 processes" in text


@pytest.mark.slow
def test_another_config_is_another_training(tmp_path):
    """What ships is used for nothing but the config that it was trained with."""
    shipped = touch(tmp_path / "shipped", *STARTS, REFERENCE)
    own = tmp_path / "configs"
    shutil.copytree(ROOT / "configs" / "shapes", own)
    given = ["--checkpoints", shipped, "--folder", tmp_path, "--seeds", 1]
    given += ["--only", "rolling_no_sink"]

    def logdirs(*arguments):
        return {part.logdir for part in trainings(*given, *arguments)}

    assert logdirs("--", "device=cpu", "model_root=wan_models") == set()
    assert logdirs("--", "model_kwargs.sink_size=1") == set(), "its rollouts drop no frame"
    averaged = ["--", "sink_ema=0.9", "model_kwargs.sink_size=1"]
    assert logdirs(*averaged) == set(), "nor is there one to average"
    assert logdirs("--configs", own) == set(), "weights and configs of one's own"
    changes = ["max_steps=8", "total_batch_size=16", "num_training_frames=27"]
    found = [*(logdirs("--", change) for change in changes), logdirs("--retrain")]
    (shipped / f"shapes_{START}.pt").write_bytes(b"another start")
    found.append(logdirs("--retrain"))
    assert all(len(made) == 1 for made in found)
    assert len(set.union(*found)) == len(found)


@pytest.mark.slow
def test_longer_rollouts_are_trained_for_each_sink(tmp_path):
    """A sink that training rollouts can see is another training, for the core's four rows too."""
    shipped = touch(tmp_path / "shipped", *STARTS)
    given = ["--checkpoints", shipped, "--folder", tmp_path, "--seeds", 1]
    given += ["--only", *(row.key for row in CORE), "--"]
    assert len(trainings(*given)) == 2
    assert len(trainings(*given, "num_training_frames=27")) == 4
    assert len(trainings(*given, "num_training_frames=27", "max_attention_frames=27")) == 2


@pytest.mark.slow
def test_starts_that_do_not_ship_are_trained_from_one_another(tmp_path, caplog):
    shipped = touch(tmp_path / "shipped", "ode_init", START)
    given = ["--checkpoints", shipped, "--folder", tmp_path, "--results", tmp_path / "results"]
    first, second = trainings(*given, "--only", "consistency_init_alone")
    assert (first.key, second.key) == ("teacher_forcing", "consistency_init")
    assert second.config.generator_ckpt == str(first.result)
    (shipped / "shapes_ode_init.pt").unlink()
    with pytest.raises(UserError, match=r"shapes_ode_init.pt is missing.*chain.py"):
        targets(*given, "--only", "ode_init_alone")
    rows = {part.row.key for part in targets(*given) if isinstance(part, Measurement)}
    assert set(ROWS) - rows == {"ode_init_alone"}
    assert "ode_init_alone is left out: " in caplog.text
    made = touch(tmp_path / "made", "ode_init")
    alone = [*given, "--only", "ode_init_alone"]
    true, noise = targets(*alone, "--starts", made)
    assert true.weights == made / "shapes_ode_init.pt"
    for part in (true, noise):  # what was measured stays, weights or not
        write_run(part.result, {"weights": "", **part.identity()}, [{}] * part.protocol.scenes)
    assert all(part.is_done() for part in targets(*alone))


@pytest.mark.slow
def test_commands(tmp_path):
    shipped = touch(tmp_path, *STARTS)
    given = ["--checkpoints", shipped, "--folder", "out", "--only", "critic_reuse_2", "--"]
    training, true, noise = targets(*given, "device=cpu")
    logdir = training.command[5]
    assert re.fullmatch("out/train/[0-9a-f]{16}", logdir)
    assert training.command[:4] == (
        *(sys.executable, str(ROOT / "train.py"), "--config_path"),
        "configs/shapes/rolling_forcing.yaml",
    )
    words = training.command[8:]
    assert words[0] == f"generator_ckpt={shipped / f'shapes_{START}.pt'}"
    assert {"critic_updates_per_rollout=2", "device=cpu", "global_batch_size=8"} <= set(words)
    assert true.command == (
        *(sys.executable, str(ROOT / "shapes" / "drift.py")),
        *("--config_path", "configs/shapes/rolling_forcing.yaml"),
        *("--checkpoint_path", f"{logdir}/shapes_rolling_forcing.pt"),
        *("--scenes", "16", "--given", "1", "--times", "12", "--clip", "21", "--batch", "8"),
        *("--scene_seed", str(TEST_SEED), "--json", "out/measured/critic_reuse_2-0-true.json"),
        *("critic_updates_per_rollout=2", "device=cpu"),
    )
    assert noise.command[8:10] == ("--given", "0")
    for part in targets("--processes", 2, *given):
        spread = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
        assert part.command[1:5] == spread


def test_every_row_has_its_files():
    assert len({row.title for row in ROWS.values()}) == len(ROWS) == len(CORE) + len(FURTHER)
    for row in ROWS.values():
        assert load_config(f"configs/shapes/{row.config}.yaml", row.overrides).distilled
        assert row.weights is None or row.weights in {*ROWS, *STARTS}
        assert (row.against in ROWS) is not row.core
    for one, other in ((c.one, c.other) for c in comparisons()):
        assert {one, other} <= set(ROWS)


def test_bad_input_is_one_sentence(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(f"{MARKS[1]} the wrong way round {MARKS[0]}")
    endless = {"method": "rolling_forcing", "denoising_step_list": [1000, 500]}
    write_config(tmp_path / "rolling_forcing.yaml", **endless)
    empty = ["--folder", tmp_path / "out", "--checkpoints", tmp_path, "--results", tmp_path / "no"]
    for arguments, message in [
        (["--only", "rolling"], "--only rolling is no row; choose from rolling_forcing, rolling_n"),
        (["--seeds", 0], "must be at least 1"),
        (["--seeds", 4], "--seeds must be at most 3"),
        (["--gflops", "nan"], "must be above 0"),
        (["--write", tmp_path / "none.md"], "Cannot read"),
        (["--write", page], "needs one <!-- ablations -->"),
        ([*empty, "--table_only"], "holds no results"),
        (empty, "shapes_causal_init.pt is missing"),
        ([*empty, "--only", "rolling_forcing", "--configs", tmp_path], "never ends"),
    ]:
        assert run_main(ablate.main, [str(argument) for argument in arguments]) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]


# --- from weights to results ---------------------------------------------------------------------


@dataclass
class Bench:
    """A folder of configs and shipped weights of tiny networks; what was run, by name."""

    root: Path
    ran: list[str]

    @property
    def out(self) -> Path:
        return self.root / "out"

    @property
    def results(self) -> Path:
        return self.root / "results"

    @property
    def folders(self) -> list[Any]:
        folders = ["--folder", self.out, "--results", self.results, "--seeds", 1]
        return [*folders, "--configs", self.root, "--checkpoints", self.root]

    def __call__(self, *arguments: Any) -> int:
        given = [*self.folders, *SMALL, *arguments]
        return run_main(ablate.main, [str(argument) for argument in given])

    def ship(self, key: str, seed: int) -> None:
        state = {f"model.{k}": value for k, value in random_dit(seed).state_dict().items()}
        weights = {"generator": state, "generator_ema": state}
        torch.save(weights, self.root / f"shapes_{key}.pt")


def in_process(name, command):
    """Run a script of ours without the seconds that starting Python takes."""
    entry = {"train.py": train.main, "drift.py": shapes.drift.main}[Path(command[1]).name]
    if run_main(entry, command[2:]) != 0:
        raise UserError(f"{name} failed")


@pytest.fixture
def bench(tiny_world, tmp_path, monkeypatch):
    """Two rows that differ in their sink, which their training rollouts see."""
    bench = Bench(tmp_path, [])
    values = {"width": 32, "device": "cpu", "max_steps": 2, "num_training_frames": 27}
    values |= {"base": str(tiny_world.config), "method": "rolling_forcing"}
    values |= {"image_or_video_shape": [1, 6, 16, 4, 4]}
    write_config(tmp_path / "rolling_forcing.yaml", **values)
    write_config(tmp_path / "rolling_no_sink.yaml", **values, model_kwargs={"sink_size": 0})
    for number, key in enumerate(("rolling_forcing", "rolling_no_sink", START)):
        bench.ship(key, number)

    def run(name, command):
        bench.ran.append(name)
        in_process(name, command)

    monkeypatch.setattr(build, "run_command", run)
    monkeypatch.setattr(ablate, "SPEED_ROUNDS", 1)
    return bench


BOTH = ["--only", "rolling_forcing", "rolling_no_sink"]
PARTS = [
    f"{key}, seed 0, {how}"
    for key in ("rolling_forcing", "rolling_no_sink")
    for how in ("from a true prefix", "from noise")
]


@pytest.mark.slow
def test_two_rows_are_measured_once_and_told_from_what_is_stored(bench, capsys):
    assert bench(*BOTH) == 0
    assert bench.ran == PARTS
    said = capsys.readouterr().out
    assert "4 of 4 videos are left: 240 frames" in said, "the cost stands before all work"
    table = (bench.out / "table.md").read_text()
    assert table in said
    assert "| Rolling Forcing¹" in table
    speed = json.loads((bench.results / "speed.json").read_text())
    assert set(speed["frames_per_second"]) == {"rolling_forcing", "rolling_no_sink"}
    run = read_run(bench.results / "rolling_forcing-0-true.json")
    assert run["settings"]["clip_seconds"] == 21 / 16
    assert [video["scene"] for video in run["videos"]] == [0]
    assert sum(path.stat().st_size for path in bench.results.iterdir()) < 2e4
    # again: nothing is left to do, and what is stored tells the same without any weights
    bench.ran.clear()
    assert bench(*BOTH) == 0
    assert bench.ran == []
    for name in ("rolling_forcing", "rolling_no_sink", START):
        (bench.root / f"shapes_{name}.pt").unlink()
    shutil.rmtree(bench.out)
    page = bench.root / "page.md"
    page.write_text(f"# Ablations\n\n{MARKS[0]}\nold\n{MARKS[1]}\n\nThe end.\n")
    assert bench("--table_only", "--write", page) == 0
    assert (bench.out / "table.md").read_text() == table
    text = page.read_text()
    assert text.startswith(f"# Ablations\n\n{MARKS[0]}\n\n{table}")
    assert text.endswith(f"{MARKS[1]}\n\nThe end.\n")
    assert (bench.root / "images" / "drift.png").is_file()


@pytest.mark.slow
def test_other_weights_scenes_and_settings_are_measured_anew(bench, caplog):
    """More scenes are added to what is there; fewer are there already, and shorter videos too."""
    assert bench(*BOTH) == 0
    bench.ran.clear()
    bench.ship("rolling_no_sink", 7)
    assert bench(*BOTH) == 0
    assert bench.ran == PARTS[2:]
    bench.ran.clear()
    assert bench("--only", "rolling_forcing", "--scenes", 2) == 0
    assert bench("--only", "rolling_forcing", "--scenes", 1) == 0
    assert bench("--only", "rolling_forcing", "--scenes", 1, "--long_times", 2) == 0
    assert bench.ran == PARTS[:2]
    assert len(read_run(bench.results / "rolling_forcing-0-noise.json")["videos"]) == 2
    with (bench.root / "rolling_no_sink.yaml").open("a") as file:
        file.write("context_noise: 100\n")
    assert bench("--table_only") == 0
    assert "rolling_no_sink-0-true.json is of other weights, another config" in caplog.text
    assert "Rolling Forcing, no sink¹" not in (bench.out / "table.md").read_text()


@pytest.mark.slow
def test_stored_results_need_no_weights_that_were_trained(bench, capsys):
    """A checkout has results of trainings whose weights do not ship: they are not made again."""
    assert bench(*BOTH) == 0
    for key in BOTH[1:]:
        for path in bench.results.glob(f"{key}-*.json"):
            run = read_run(path)
            (bench.root / f"shapes_{key}.pt").unlink(missing_ok=True)
            plan = Plan(options(*bench.folders, *BOTH))
            trained = plan.find(key, 0)[1]
            assert trained["trained"]
            write_run(path, {**run["settings"], **trained}, run["videos"])
    bench.ran.clear()
    assert bench(*BOTH) == 0
    assert bench.ran == []
    assert "0 of 0 trainings are left" in capsys.readouterr().out
    assert bench(*BOTH, "--plan", "--", "lr=1.0e-3") == 0
    assert "2 of 2 trainings are left" in capsys.readouterr().out
    told = bench.out / "table.md"
    assert bench("--table_only") == 0
    assert "Rolling Forcing, no sink¹" in told.read_text()
    with (bench.root / "rolling_no_sink.yaml").open("a") as file:
        file.write("lr: 1.0e-3\n")  # plays the same, and was trained otherwise
    assert bench("--table_only") == 0
    assert "Rolling Forcing, no sink¹" not in told.read_text()
    assert "Rolling Forcing¹" in told.read_text()


@pytest.mark.slow
def test_figures_of_other_models_or_recipes_are_not_todays(bench, capsys, monkeypatch):
    """A teacher could be replaced, or a recipe changed, and students of the old one stayed."""
    assert bench(*BOTH) == 0
    assert bench(*BOTH, "--plan") == 0
    assert "0 of 4 videos are left" in capsys.readouterr().out
    assert bench("--table_only", "--", "lr=1.0e-3") == 2, "weights that ship had another rate"
    monkeypatch.setattr("shapes.plan.models_hash", lambda config: "another teacher")
    assert bench(*BOTH, "--plan") == 0
    assert "4 of 4 videos are left" in capsys.readouterr().out
    assert bench("--table_only") == 2
    assert "holds no results" in capsys.readouterr().err


@pytest.mark.slow
def test_starts_are_trained_on_data_beside_those_of_the_chain(tmp_path, capsys):
    shipped = touch(tmp_path / "shipped", START)
    made = touch(tmp_path / "chain" / "checkpoints", "ode_init")
    given = ["--checkpoints", shipped, "--starts", made, "--folder", tmp_path / "out"]
    given += ["--results", tmp_path / "results", "--only", "teacher_forcing_alone"]
    (before,) = trainings(*given)
    text = ablate.cost_text(options(*given), targets(*given))
    assert "runs/shapes/data/latents is missing: shapes/chain.py --shipped makes it" in text
    assert "and 1 trainings of starts, which are not counted" in text
    data = tmp_path / "chain" / "data"
    for name in ("latents", "latents_heldout"):
        (data / name).mkdir(parents=True)
    (training,) = trainings(*given)
    assert training.config.data_path == str(data / "latents")
    assert training.config.heldout_data_path == str(data / "latents_heldout")
    assert training.logdir == before.logdir, "where they are decides no weight"
    assert "is missing" not in ablate.cost_text(options(*given), targets(*given))


@pytest.mark.slow
def test_the_cost_alone(bench, capsys):
    assert bench(*BOTH, "--plan") == 0
    assert bench.ran == []
    assert not bench.out.exists()
    assert not bench.results.exists()
    said = capsys.readouterr().out
    assert "0 of 0 trainings are left" in said
    assert "4 of 4 videos are left" in said


@pytest.mark.slow
def test_a_stopped_run_goes_on(bench, monkeypatch):
    run = build.run_command

    def dies_at_the_second(name, command):
        if len(bench.ran) == 1:
            raise KeyboardInterrupt
        run(name, command)

    monkeypatch.setattr(build, "run_command", dies_at_the_second)
    assert bench(*BOTH) == 130
    bench.ran.clear()
    monkeypatch.setattr(build, "run_command", run)
    assert bench(*BOTH) == 0
    assert bench.ran == PARTS[1:]


@pytest.mark.slow
def test_a_failure_stops_only_what_needs_it(bench, monkeypatch, capsys):
    (bench.root / "shapes_rolling_no_sink.pt").unlink()
    run = build.run_command

    def cannot_train(name, command):
        if Path(command[1]).name == "train.py":
            raise UserError(f"{name} failed with exit code 1")
        run(name, command)

    monkeypatch.setattr(build, "run_command", cannot_train)
    assert bench(*BOTH) == 2
    assert bench.ran == PARTS[:2]
    said = capsys.readouterr().err.splitlines()
    training = "training of rolling_no_sink, seed 0"
    assert f"{training} failed with exit code 1" in said
    assert any(re.fullmatch(f"{PARTS[2]}: its weights .* are missing", line) for line in said)
    failed = ", ".join([training, *PARTS[2:]])
    assert said[-1] == f"error: these parts failed, see above: {failed}"
    assert "| Rolling Forcing¹" in (bench.out / "table.md").read_text()


@pytest.mark.slow
def test_weights_that_do_not_ship_are_trained_to_the_end(bench, tmp_path, monkeypatch, capsys):
    """The weights measured are the averaged ones of the last checkpoint."""
    world = write_training_world(tmp_path / "world")
    values = world.values(
        method="rolling_forcing",
        image_or_video_shape=[1, 3, 16, 4, 4],
        text_embeddings=None,
        dfake_gen_update_ratio=1,
        lr=1e-2,
        ema_start_step=1,
        max_steps=2,
        log_iters=1,
    )
    write_config(bench.root / "rolling_forcing.yaml", **values)
    (bench.root / "shapes_rolling_forcing.pt").unlink()
    start = read_state_dict(world.models / values["generator_name"])
    torch.save({"generator": start}, bench.root / f"shapes_{START}.pt")
    assert bench("--only", "rolling_forcing") == 0
    assert bench.ran == ["training of rolling_forcing, seed 0", *PARTS[:2]]
    (run,) = (bench.out / "train").iterdir()
    trained = torch.load(run / "checkpoint_model_000002" / "model.pt", weights_only=True)
    own = run / "shapes_rolling_forcing.pt"
    name = "model.blocks.0.ffn.0.weight"
    for network in ("generator", "generator_ema"):
        shipped = torch.load(own, weights_only=True)[network][name]
        assert torch.equal(shipped, trained["generator_ema"][name].to(shipped.dtype))
        assert not torch.equal(shipped, trained["generator"][name].to(shipped.dtype))
    # lost weights are written again without training; a run that is not over goes on
    noise = bench.results / "rolling_forcing-0-noise.json"
    bench.ran.clear()
    own.unlink()
    noise.unlink()
    assert bench("--only", "rolling_forcing") == 0
    assert bench.ran == PARTS[1:2]
    bench.ran.clear()
    own.unlink()
    noise.unlink()
    shutil.rmtree(run / "checkpoint_model_000002")
    monkeypatch.setattr(build, "run_command", lambda name, command: bench.ran.append(name))
    assert bench("--only", "rolling_forcing") == 2
    assert bench.ran[:1] == ["training of rolling_forcing, seed 0"]
    assert "seed 0 was stopped early" in capsys.readouterr().err


@pytest.mark.long
def test_processes_of_their_own_share_the_videos(bench, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    given = ["--only", "rolling_forcing", "--scenes", 2, "--processes", 2]
    assert bench(*given) == 0
    assert len(read_run(bench.results / "rolling_forcing-0-true.json")["videos"]) == 2
    kept = sorted((bench.out / "measured").glob("rolling_forcing-0-true.videos.*.jsonl"))
    assert [len(path.read_text().splitlines()) for path in kept] == [1, 1]


def test_a_command_that_fails_is_said(tmp_path):
    build.run_command("nothing", [sys.executable, "-c", "pass"])
    with pytest.raises(UserError, match="counting failed with exit code 3"):
        build.run_command("counting", [sys.executable, "-c", "raise SystemExit(3)"])
