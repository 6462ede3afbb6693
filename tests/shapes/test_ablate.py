"""The ablations: what is planned, that only what is missing is made, and what becomes of it."""

import json
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import evaluation.runs
import scripts.evaluate
import shapes.table
import train
from evaluation.curves import draw_curves
from evaluation.results import summarise
from shapes import ablate, build
from shapes.ablate import Measurement
from shapes.build import Training
from shapes.meter import METER_VERSION
from shapes.table import COLUMNS, CURVES, MARKS
from shapes.truth import ShapesTruth
from shapes.variants import INITIALISATIONS, START, STUDENTS, VARIANTS
from shapes.world import sample_scene
from tests.tiny_pipeline import random_dit, write_config
from tests.tiny_training import write_training_world
from utils.cli import run_main
from utils.config import ROOT, load_config
from utils.errors import UserError
from utils.video import read_image
from wan.checkpoints import read_state_dict

SHORT = ["--prompts", 1, "--seeds", 1, "--seconds", 1]
LONG = ["--long_prompts", 1, "--long_seeds", 1, "--long_seconds", 1.5]
TRAINED = {"rolling_forcing", "self_forcing", "rolling_levels_3"}  # the others are as one of these


def options(*arguments):
    return ablate.build_parser().parse_args([str(argument) for argument in arguments])


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    """The same plan on every machine; curves, which take a second, only where a test sees them."""
    monkeypatch.setattr(build, "default_processes", lambda: 1)
    for module in (shapes.table, evaluation.runs):
        monkeypatch.setattr(module, "draw_curves", lambda summaries, out, curves: out.touch())


def touch(folder, *keys):
    folder.mkdir(parents=True, exist_ok=True)
    for key in keys:
        (folder / f"shapes_{key}.pt").touch()
    return folder


# --- the plan ------------------------------------------------------------------------------------


def test_each_training_comes_once_and_before_what_needs_it(tmp_path):
    shipped = touch(tmp_path / "shipped", *INITIALISATIONS, "rolling_forcing")
    folder = tmp_path / "out"
    parts = ablate.list_targets(options("--folder", folder, "--checkpoints", shipped))
    trainings = [part for part in parts if isinstance(part, Training)]
    measured = [part for part in parts if isinstance(part, Measurement)]
    assert {part.key for part in trainings} == TRAINED - {"rolling_forcing"}
    assert len(trainings) == len(TRAINED) - 1
    for part in trainings:
        needing = [m for m in measured if m.weights == part.result]
        assert needing
        assert all(parts.index(part) < parts.index(m) for m in needing)
    assert [(m.variant.key, m.seconds) for m in measured] == [
        (variant.key, seconds)
        for variant in VARIANTS
        if "sink_on" not in variant.key  # both are others' videos, with weights of one training
        for seconds in ((60, 300) if variant.long else (60,))
    ]
    assert {m.weights for m in measured if m.weights.parent == shipped} == {
        shipped / "shapes_rolling_forcing.pt",
        *(shipped / f"shapes_{name}.pt" for name in INITIALISATIONS),
    }


def test_retraining_uses_nothing_that_ships_but_the_initialisation(tmp_path):
    shipped = touch(tmp_path / "shipped", *INITIALISATIONS, *TRAINED)
    given = ["--folder", tmp_path / "out", "--checkpoints", shipped]
    assert not [p for p in ablate.list_targets(options(*given)) if isinstance(p, Training)]
    parts = ablate.list_targets(options(*given, "--retrain"))
    assert {part.key for part in parts if isinstance(part, Training)} == TRAINED
    weights = {m.weights for m in parts if isinstance(m, Measurement)}
    assert {path for path in weights if path.parent == shipped} == {
        shipped / f"shapes_{name}.pt" for name in INITIALISATIONS
    }


def test_another_config_is_another_training(tmp_path):
    """What ships is used for nothing but the config that it was trained with."""
    shipped = touch(tmp_path / "shipped", *INITIALISATIONS, *TRAINED)
    own = tmp_path / "configs"
    shutil.copytree(ROOT / "configs" / "shapes", own)
    given = ["--checkpoints", shipped, "--folder", tmp_path, "--only", "self_forcing"]

    def logdirs(*arguments):
        parts = ablate.list_targets(options(*given, *arguments))
        return {part.logdir for part in parts if isinstance(part, Training)}

    assert logdirs("--", "device=cpu", "model_root=elsewhere") == set()
    assert logdirs("--", "model_kwargs.sink_size=1") == set(), "its rollouts drop no frame"
    assert logdirs("--configs", own) == set(), "weights and configs of one's own"
    changes = ["max_steps=7", "total_batch_size=16", "num_training_frames=27"]
    found = [*(logdirs("--", change) for change in changes), logdirs("--retrain")]
    (shipped / f"shapes_{START}.pt").write_bytes(b"another start")
    found.append(logdirs("--retrain"))
    assert all(len(made) == 1 for made in found)
    assert len(set.union(*found)) == len(found)


def test_configs_of_ones_own_do_not_use_what_ships(tmp_path, monkeypatch):
    own = tmp_path / "configs"
    shutil.copytree(ROOT / "configs" / "shapes", own)
    monkeypatch.setattr(ablate, "ROOT", tmp_path)
    shutil.copytree(own, tmp_path / "configs" / "shapes")
    touch(tmp_path / "checkpoints", *INITIALISATIONS, *TRAINED)
    given = ["--configs", own, "--only", "self_forcing"]
    assert not any(isinstance(part, Training) for part in ablate.list_targets(options(*given)))
    with (own / "self_forcing.yaml").open("a") as file:
        file.write("lr: 3.0e-04\n")
    for spelled in ([], ["--checkpoints", tmp_path / "checkpoints"]):
        assert isinstance(ablate.list_targets(options(*given, *spelled))[0], Training)


def test_longer_rollouts_are_trained_for_each_sink(tmp_path, monkeypatch):
    shipped = touch(tmp_path / "shipped", *INITIALISATIONS)
    given = ["--checkpoints", shipped, "--folder", tmp_path / "out"]

    def trained(*arguments):
        parts = ablate.list_targets(options(*given, *arguments))
        return [part.key for part in parts if isinstance(part, Training)]

    assert trained() == ["rolling_forcing", "self_forcing", "rolling_levels_3"]
    assert trained("--only", "rolling_no_sink") == ["rolling_forcing"]
    assert trained("--", "num_training_frames=27") == list(STUDENTS)
    assert trained("--", "num_training_frames=27", "max_attention_frames=27") == trained()
    monkeypatch.chdir(tmp_path)
    assert trained("--only", "infinite_forcing") == ["self_forcing"]
    # a sibling that these overrides forbid is no reason to stop
    assert trained("--only", "self_forcing", "--", "max_attention_frames=12") == ["self_forcing"]
    own = touch(shipped, "infinite_forcing") / "shapes_infinite_forcing.pt"
    (measured,) = ablate.list_targets(options(*given, "--only", "infinite_forcing"))
    assert measured.weights == own


def test_commands(tmp_path):
    shipped = touch(tmp_path, START)
    given = ["--checkpoints", shipped, "--folder", "out", "--only", "self_forcing"]
    training, short, long = ablate.list_targets(options(*given, "--", "device=cpu"))
    logdir = training.command[5]
    assert re.fullmatch("out/train/self_forcing-[0-9a-f]{16}", logdir)
    own = f"{logdir}/shapes_self_forcing.pt"
    assert training.command == (
        *(sys.executable, str(ROOT / "train.py"), "--config_path"),
        *("configs/shapes/self_forcing.yaml", "--logdir", logdir),
        *("--disable-wandb", "--no_visualize"),
        *(f"generator_ckpt={shipped / f'shapes_{START}.pt'}", "device=cpu", "batch_size=4"),
        "global_batch_size=8",
    )
    assert short.command == (
        *(sys.executable, str(ROOT / "scripts" / "evaluate.py")),
        *("--config_path", "configs/shapes/self_forcing.yaml", "--checkpoint_path", own),
        *("--prompts", "16", "--seeds", "3", "--seconds", "60"),
        *("--json", "out/60s/self_forcing.json"),
        *("--keep_videos", "out/60s/videos/self_forcing", "--overwrite"),
        *("--meter", "shapes", "device=cpu"),
    )
    assert long.command[6:14] == (
        *("--prompts", "8", "--seeds", "2", "--seconds", "300"),
        *("--json", "out/300s/self_forcing.json"),
    )
    for part in ablate.list_targets(options(*given, "--processes", 2)):
        spread = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
        assert part.command[1:5] == spread


def test_every_variant_has_its_files():
    keys = [variant.key for variant in VARIANTS]
    assert len(set(keys)) == len({variant.title for variant in VARIANTS}) == len(keys)
    for variant in VARIANTS:
        assert load_config(f"configs/shapes/{variant.config}.yaml").distilled
    assert set(STUDENTS) > TRAINED
    for key in STUDENTS:
        config = load_config(f"configs/shapes/{key}.yaml")
        assert config.trainer == "score_distillation"
        assert config.max_steps is not None


def test_bad_input_is_one_sentence(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(f"{MARKS[1]} the wrong way round {MARKS[0]}")
    endless = {"method": "rolling_forcing", "denoising_step_list": [1000, 500]}
    write_config(tmp_path / "rolling_forcing.yaml", **endless)
    empty = ["--folder", tmp_path / "out", "--checkpoints", tmp_path]
    for arguments, message in [
        (["--only", "rolling"], "--only rolling is no variant; choose from rolling_forcing, self_"),
        (["--seeds", 0], "must be above 0"),
        (["--long_seconds", "nan"], "must be above 0"),
        (["--seconds", 300], "must differ"),
        (["--write", tmp_path / "none.md"], "Cannot read"),
        (["--write", page], "needs one <!-- ablations -->"),
        ([*empty, "--table_only"], "holds no figures of 60 s or 300 s videos yet"),
        (empty, "shapes_causal_init.pt is missing"),
        ([*empty, "--only", "rolling_forcing", "--configs", tmp_path], "never ends"),
    ]:
        assert run_main(ablate.main, [str(argument) for argument in arguments]) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]


# --- from weights to table -----------------------------------------------------------------------


@dataclass
class Bench:
    """A folder of configs and shipped weights of tiny networks; what was run, by name."""

    root: Path
    ran: list[str]

    @property
    def out(self) -> Path:
        return self.root / "out"

    def __call__(self, *arguments: Any) -> int:
        folders = ["--folder", self.out, "--configs", self.root, "--checkpoints", self.root]
        given = [*folders, *SHORT, *LONG, *arguments]
        return run_main(ablate.main, [str(argument) for argument in given])

    def ship(self, key: str, seed: int) -> None:
        state = {f"model.{k}": value for k, value in random_dit(seed).state_dict().items()}
        weights = {"generator": state, "generator_ema": state}
        torch.save(weights, self.root / f"shapes_{key}.pt")


def in_process(name, command):
    """Run a script of ours without the seconds that starting Python takes."""
    entry = {"train.py": train.main, "evaluate.py": scripts.evaluate.main}[Path(command[1]).name]
    if run_main(entry, command[2:]) != 0:
        raise UserError(f"{name} failed")


@pytest.fixture
def bench(tiny_world, tmp_path, monkeypatch):
    bench = Bench(tmp_path, [])
    values = {"height": 32, "width": 32, "device": "cpu", "max_steps": 2}
    for method in ("rolling_forcing", "self_forcing"):
        base = {"base": str(tiny_world.config), "method": method}
        write_config(tmp_path / f"{method}.yaml", **base, **values)
    bench.ship("rolling_forcing", 1)
    bench.ship("self_forcing", 2)
    for name in INITIALISATIONS:
        bench.ship(name, 3)

    def run(name, command):
        bench.ran.append(name)
        in_process(name, command)

    monkeypatch.setattr(build, "run_command", run)
    return bench


BOTH = ["--only", "rolling_forcing", "self_forcing"]
PARTS = [f"{key}, {s} s" for key in ("rolling_forcing", "self_forcing") for s in ("1", "1.5")]


def test_two_variants_are_measured_once(bench, capsys):
    assert bench(*BOTH) == 0
    assert bench.ran == PARTS
    table = (bench.out / "table.md").read_text()
    assert table in capsys.readouterr().out
    assert [line.split(" | ")[0] for line in table.splitlines() if line.startswith("|")][2:] == [
        "| Rolling Forcing",
        "| Self Forcing",
    ]
    assert "1 prompt × 1 seed × 1 s on cpu" in table
    for name in ("curves.png", "curves_1.5s.png"):
        assert (bench.out / name).is_file()
    sheets = {path.name: path for path in (bench.out / "contact_sheets").iterdir()}
    assert set(sheets) == {
        f"{key}{suffix}.png"
        for key in ("rolling_forcing", "self_forcing")
        for suffix in ("", "_1.5s")
    }
    assert read_image(sheets["self_forcing.png"]).shape == (32, 8 * 34 - 2, 3)
    # again: nothing is left to do
    bench.ran.clear()
    assert bench(*BOTH) == 0
    assert bench.ran == []
    assert capsys.readouterr().out.count("is there") == 4


def test_a_variant_of_the_same_videos_is_left_out(bench, capsys):
    """Weights that are the same with and without a sink, played without one."""
    shutil.copy(bench.root / "rolling_forcing.yaml", bench.root / "rolling_no_sink.yaml")
    assert bench("--only", "rolling_no_sink", "no_sink_on_rolling") == 0
    assert bench.ran == ["rolling_no_sink, 1 s", "rolling_no_sink, 1.5 s"]
    assert "no_sink_on_rolling: left out, it would be the same videos as rolling_no_sink" in (
        capsys.readouterr().out
    )
    assert list(rows((bench.out / "table.md").read_text())) == ["Rolling Forcing, no sink"]
    bench.ran.clear()
    assert bench("--only", "no_sink_on_rolling") == 0
    assert bench.ran == ["no_sink_on_rolling, 1 s"]


def test_other_weights_numbers_and_settings_are_measured_anew(bench):
    assert bench(*BOTH) == 0
    bench.ran.clear()
    bench.ship("self_forcing", 3)
    before = (bench.out / "contact_sheets" / "self_forcing.png").read_bytes()
    assert bench(*BOTH) == 0
    assert bench.ran == PARTS[2:]
    assert (bench.out / "contact_sheets" / "self_forcing.png").read_bytes() != before
    bench.ran.clear()
    assert bench(*BOTH, "--long_seeds", 2) == 0
    assert bench.ran == [PARTS[1], PARTS[3]]
    assert "1 prompt × 2 seeds × 1.5 s" in (bench.out / "table.md").read_text()


def test_a_lost_sheet_or_table_costs_no_video(bench):
    assert bench("--only", "rolling_forcing") == 0
    sheet = bench.out / "contact_sheets" / "rolling_forcing.png"
    drawn, table = sheet.read_bytes(), (bench.out / "table.md").read_text()
    videos = {path: path.stat().st_mtime_ns for path in bench.out.rglob("*.mp4")}
    assert len(videos) == 2
    bench.ran.clear()
    sheet.unlink()
    (bench.out / "table.md").unlink()
    assert bench("--only", "rolling_forcing") == 0
    assert bench.ran == PARTS[:1]
    assert sheet.read_bytes() == drawn
    assert (bench.out / "table.md").read_text() == table
    assert {path: path.stat().st_mtime_ns for path in bench.out.rglob("*.mp4")} == videos


def test_a_stopped_run_goes_on(bench, monkeypatch):
    run = build.run_command

    def dies_at_the_second(name, command):
        if len(bench.ran) == 1:
            raise KeyboardInterrupt
        run(name, command)

    monkeypatch.setattr(build, "run_command", dies_at_the_second)
    assert bench(*BOTH) == 130
    assert (bench.out / "table.md").is_file()  # of what there was
    bench.ran.clear()
    monkeypatch.setattr(build, "run_command", run)
    assert bench(*BOTH) == 0
    assert bench.ran == PARTS[1:]


def test_a_failure_stops_only_what_needs_it(bench, monkeypatch, capsys):
    (bench.root / "shapes_self_forcing.pt").unlink()
    run = build.run_command

    def cannot_train(name, command):
        if Path(command[1]).name == "train.py":
            raise UserError(f"{name} failed with exit code 1")
        run(name, command)

    monkeypatch.setattr(build, "run_command", cannot_train)
    assert bench("--only", "self_forcing", "rolling_on_self_forcing", "rolling_forcing") == 2
    assert bench.ran == PARTS[:2]
    said = capsys.readouterr().err.splitlines()
    assert "training of self_forcing failed with exit code 1" in said
    assert any(
        re.fullmatch("rolling_on_self_forcing, 1 s: its weights .* are missing", x) for x in said
    )
    assert said[-1] == (
        "error: these parts failed, see above: training of self_forcing, self_forcing, 1 s, "
        "self_forcing, 1.5 s, rolling_on_self_forcing, 1 s"
    )
    assert "| Rolling Forcing |" in (bench.out / "table.md").read_text()


def test_weights_that_do_not_ship_are_trained_to_the_end(bench, tmp_path, monkeypatch, capsys):
    """The weights measured are the averaged ones of the last checkpoint."""
    world = write_training_world(tmp_path / "world")
    values = world.values(
        method="self_forcing",
        image_or_video_shape=[1, 3, 16, 4, 4],
        text_embeddings=None,
        dfake_gen_update_ratio=1,
        lr=1e-2,
        ema_start_step=1,
        max_steps=2,
        log_iters=1,
    )
    write_config(bench.root / "self_forcing.yaml", **values)
    (bench.root / "shapes_self_forcing.pt").unlink()
    start = read_state_dict(world.models / values["generator_name"])
    torch.save({"generator": start}, bench.root / f"shapes_{START}.pt")
    assert bench("--only", "self_forcing") == 0
    assert bench.ran == ["training of self_forcing", *PARTS[2:]]
    (run,) = (bench.out / "train").iterdir()
    trained = torch.load(run / "checkpoint_model_000002" / "model.pt", weights_only=True)
    own = run / "shapes_self_forcing.pt"
    name = "model.blocks.0.ffn.0.weight"
    for network in ("generator", "generator_ema"):
        shipped = torch.load(own, weights_only=True)[network][name]
        assert torch.equal(shipped, trained["generator_ema"][name].to(shipped.dtype))
        assert not torch.equal(shipped, trained["generator"][name].to(shipped.dtype))
    # lost weights are written again without training; a run that is not over goes on
    bench.ran.clear()
    own.unlink()
    assert bench("--only", "self_forcing") == 0
    assert bench.ran == []
    own.unlink()
    shutil.rmtree(run / "checkpoint_model_000002")
    monkeypatch.setattr(build, "run_command", lambda name, command: bench.ran.append(name))
    assert bench("--only", "self_forcing") == 2
    assert bench.ran[:1] == ["training of self_forcing"]
    assert "training of self_forcing was stopped early" in capsys.readouterr().err


@pytest.mark.slow
def test_processes_of_their_own_share_the_videos(bench, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    given = ["--only", "self_forcing", "--prompts", 2, "--processes", 2]
    assert bench(*given) == 0
    content = json.loads((bench.out / "1s" / "self_forcing.json").read_text())
    assert len(content["videos"]) == 2
    kept = sorted((bench.out / "1s").glob("self_forcing.videos.*.jsonl"))
    assert [len(path.read_text().splitlines()) for path in kept] == [1, 1]


def test_a_command_that_fails_is_said(tmp_path):
    build.run_command("nothing", [sys.executable, "-c", "pass"])
    with pytest.raises(UserError, match="counting failed with exit code 3"):
        build.run_command("counting", [sys.executable, "-c", "raise SystemExit(3)"])


# --- the table -----------------------------------------------------------------------------------


SCENES = {name: sample_scene(0, index).caption for index, name in enumerate("ab")}


def result(seed, scene, *, seconds=60, survived=60, colour=1.0, late=0.5, drift=2.0, fps=30.0):
    curve = [1.0] * (seconds - 5) + [late] * 5
    curves = (*CURVES, "background_right", "size_right", "colour_error")
    return {
        "prompt": SCENES[scene],
        "seed": seed,
        "kind": "shapes",
        "frames": 16 * seconds,
        "timings": {"fps": fps, "first_frame_s": 0.1},
        "report": {
            "seconds": float(seconds),
            "accuracy": {"background": 1.0, "colour": colour, "kind": 0.5, "direction": None},
            "drift": {"background_error": drift, "colour_error": None, "right": -0.25},
            "background_flicker": {"boundary": 1.0, "inside": 1.0, "ratio": 1.25},
            "survived_seconds": survived,
            "late": {"right": late, "motion": late},
            "per_second": dict.fromkeys(curves, curve),
        },
    }


def write_figures(path, results, overrides=(), meter=METER_VERSION):
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "settings": {
            "seconds": results[0]["report"]["seconds"],
            "device": "cpu (1 threads)",
            "overrides": list(overrides),
            "meter": meter,
            "config": f"configs/shapes/{path.stem}.yaml",
            "checkpoint": str(ROOT / "checkpoints" / f"shapes_{path.stem}.pt"),
        },
        "summary": {"shapes": summarise(results, ShapesTruth())},
        "videos": results,
    }
    path.write_text(json.dumps(content))


def rows(text):
    """The cells of each variant, by the column's title."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return {line[0]: dict(zip(lines[0][1:], line[1:], strict=True)) for line in lines[2:]}


def test_figures_are_means_with_the_spread_of_the_seeds(tmp_path, capsys):
    two_seeds = [
        result(0, "a", survived=60, colour=1.0, drift=1.0),
        result(0, "b", survived=3, colour=1.0, drift=3.0),
        result(1, "a", survived=60, colour=0.0, drift=6.0),
        result(1, "b", survived=59, colour=0.0, drift=2.0),
    ]
    write_figures(tmp_path / "60s" / "rolling_forcing.json", two_seeds)
    write_figures(tmp_path / "60s" / "self_forcing.json", [result(0, "a", late=0.0, fps=41.26)])
    minutes = [result(s, "a", seconds=300, survived=299 + s, late=0.75) for s in (0, 1)]
    write_figures(tmp_path / "300s" / "rolling_forcing.json", minutes)
    assert run_main(ablate.main, ["--folder", str(tmp_path), "--table_only"]) == 0
    text = (tmp_path / "table.md").read_text()
    assert text in capsys.readouterr().out
    assert rows(text) == {
        "Rolling Forcing": {
            # colour, kind and background of 1, 0.5, 1 and of 0, 0.5, 1; no direction is known
            "prompt followed, first 5 s": "0.67 ± 0.24",
            "right, last 5 s": "0.50 ± 0.00",
            "drift of right": "-0.25 ± 0.00",
            "drift of background": "3.0 ± 1.4",
            "drift of colour": "–",
            "motion, last 5 s": "0.50 ± 0.00",
            "drift of motion": "–",
            "path, last 5 s": "–",
            "drift of path": "–",
            "flicker": "1.25 ± 0.00",
            "never wrong in 5 s": "0.75 ± 0.35",
            "never wrong in 60 s": "0.50 ± 0.00",
            "never wrong in 5 min": "0.50 ± 0.71",
            "right at 60 s": "0.50 ± 0.00",
            "right at 5 min": "1.00 ± 0.00",
            "right, last 5 s of long videos": "0.75 ± 0.00",
            "motion, last 5 s of long videos": "0.75 ± 0.00",
            "frames/s": "30.0 ± 0.0",
        },
        "Self Forcing": {
            "prompt followed, first 5 s": "0.83",
            "right, last 5 s": "0.00",
            "drift of right": "-0.25",
            "drift of background": "2.0",
            "drift of colour": "–",
            "motion, last 5 s": "0.00",
            "drift of motion": "–",
            "path, last 5 s": "–",
            "drift of path": "–",
            "flicker": "1.25",
            "never wrong in 5 s": "1.00",
            "never wrong in 60 s": "1.00",
            "never wrong in 5 min": "–",
            "right at 60 s": "1.00",
            "right at 5 min": "–",
            "right, last 5 s of long videos": "–",
            "motion, last 5 s of long videos": "–",
            "frames/s": "41.3",
        },
    }
    for part in ("2 prompts × 2 seeds × 60 s", "1 prompt × 2 seeds × 300 s on cpu (1 threads)"):
        assert part in text.splitlines()[0]
    made_of = "`configs/shapes/self_forcing.yaml` with `checkpoints/shapes_self_forcing.pt`"
    assert f"- **Self Forcing** ({made_of}): " in text


def test_rows_of_other_settings_are_told_apart(tmp_path):
    write_figures(tmp_path / "60s" / "rolling_forcing.json", [result(0, "a")], ["max_steps=9"])
    assert run_main(ablate.main, ["--folder", str(tmp_path), "--table_only"]) == 0
    alone = (tmp_path / "table.md").read_text()
    assert list(rows(alone)) == ["Rolling Forcing"]
    assert ", max_steps=9. Mean over" in alone
    write_figures(tmp_path / "60s" / "self_forcing.json", [result(0, "a")])
    assert run_main(ablate.main, ["--folder", str(tmp_path), "--table_only"]) == 0
    both = (tmp_path / "table.md").read_text()
    assert list(rows(both)) == ["Rolling Forcing, max_steps=9", "Self Forcing"]


def test_figures_of_another_meter_are_left_out(tmp_path, capsys):
    write_figures(tmp_path / "60s" / "rolling_forcing.json", [result(0, "a")], meter=1)
    write_figures(tmp_path / "60s" / "self_forcing.json", [result(0, "a")])
    assert run_main(ablate.main, ["--folder", str(tmp_path), "--table_only"]) == 0
    assert "rolling_forcing.json was measured by another version" in capsys.readouterr().out
    assert list(rows((tmp_path / "table.md").read_text())) == ["Self Forcing"]


def test_long_videos_alone_tell_how_long_they_were_right_and_their_end(tmp_path):
    minutes = [result(0, "a", seconds=300, survived=70, late=0.25)]
    write_figures(tmp_path / "300s" / "self_forcing.json", minutes)
    assert run_main(ablate.main, ["--folder", str(tmp_path), "--table_only"]) == 0
    (cells,) = rows((tmp_path / "table.md").read_text()).values()
    known = {
        "never wrong in 5 s": "1.00",
        "never wrong in 60 s": "1.00",
        "never wrong in 5 min": "0.00",
    }
    known |= {"right at 60 s": "1.00", "right at 5 min": "0.00"}
    known |= {f"{what}, last 5 s of long videos": "0.25" for what in ("right", "motion")}
    assert cells == dict.fromkeys((c.title for c in COLUMNS), "–") | known
    assert not (tmp_path / "curves.png").exists()
    assert (tmp_path / "curves_300s.png").is_file()


def test_every_column_is_a_measure_of_the_meter(bench):
    assert bench("--only", "rolling_forcing") == 0
    content = json.loads((bench.out / "1s" / "rolling_forcing.json").read_text())
    summary = content["summary"]["shapes"]
    names = {name for column in COLUMNS for name in column.measures}
    assert {name for name in names if not name.startswith(("survival", "right_at"))} <= set(
        summary["measures"]
    )
    assert set(CURVES) <= {*summary["per_second"], *summary}


def test_the_plot_shows_every_main_variant(tmp_path, monkeypatch):
    monkeypatch.setattr(shapes.table, "draw_curves", draw_curves)
    pixels = []
    for late, key in ((0.5, "rolling_forcing"), (0.1, "self_forcing"), (0.9, "rolling_levels_3")):
        write_figures(tmp_path / "60s" / f"{key}.json", [result(0, "a", late=late)])
        assert run_main(ablate.main, ["--folder", str(tmp_path), "--table_only"]) == 0
        pixels.append(read_image(tmp_path / "curves.png").numpy())
    assert min(pixels[0].shape[:2]) > 300
    assert not np.array_equal(pixels[0], pixels[1])
    assert np.array_equal(pixels[1], pixels[2])  # that one is in the table only


def test_a_page_gets_the_table_between_its_marks(tmp_path):
    write_figures(tmp_path / "60s" / "self_forcing.json", [result(0, "a")])
    page = tmp_path / "page.md"
    page.write_text(f"# Ablations\n\n{MARKS[0]}\nold\n{MARKS[1]}\n\nThe end.\n")
    given = ["--folder", str(tmp_path), "--table_only", "--write", str(page)]
    for _ in range(2):
        assert run_main(ablate.main, given) == 0
        table = (tmp_path / "table.md").read_text()
        expected = f"# Ablations\n\n{MARKS[0]}\n\n{table}\n{MARKS[1]}\n\nThe end.\n"
        assert page.read_text() == expected


def test_a_broken_file_is_named(tmp_path, capsys):
    (tmp_path / "60s").mkdir()
    (tmp_path / "60s" / "self_forcing.json").write_text("{}")
    assert run_main(ablate.main, ["--folder", str(tmp_path), "--table_only"]) == 2
    assert "self_forcing.json holds no figures" in capsys.readouterr().err
