"""The chain of stages: resumable, checked, and made of commands that exist."""

import importlib
import itertools
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

import shapes.chain as chain_script
import train
from shapes import build
from shapes.build import Target, Training
from shapes.chain import (
    QUICK,
    STAGES,
    STAND_INS,
    Chain,
    Record,
    check_margin,
    check_moved,
    main,
)
from utils.cli import run_main
from utils.config import ROOT, load_config
from utils.errors import UserError
from utils.processes import split_batch
from wan.checkpoints import publish_student
from wan.folders import TEXT_ENCODER_FILE, VAE_FILE
from wan.weights import read_weights

ANY_CHAIN = Chain(Path("runs/any"), [], quick=False, processes=1)
TRAININGS = {name for name, stage in STAGES.items() if isinstance(stage(ANY_CHAIN), Training)}
SHIPPED = Path("checkpoints/shapes_rolling_forcing.pt")


CONFIGS = [
    path for path in sorted((ROOT / "configs" / "shapes").glob("*.yaml")) if path.stem != "base"
]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_videos_per_update_are_the_same_on_any_number_of_processes(path: Path) -> None:
    config = load_config(path, ())
    for processes in (1, 2, 3, 8, 64):
        ranks, batch = split_batch(config, processes)
        assert 1 <= ranks <= processes
        assert 1 <= batch <= config.batch_size
        assert config.total_batch_size is not None
        assert config.total_batch_size % (ranks * batch) == 0


def parse(script: str, arguments: list[str]) -> None:
    """Let a command read its arguments and its config, without running it."""
    if script == "train.py":
        args = train.build_parser().parse_args(arguments)
    else:
        room = "shapes" if script == "init.py" else "scripts"
        module = importlib.import_module(f"{room}.{Path(script).stem}")
        parser = module.build_parser()
        if script == "precompute.py":
            parser, arguments = module.verb_parsers()[arguments[0]], arguments[1:]
        args = parser.parse_args(arguments)
    if "config_path" in args:
        load_config(args.config_path, args.overrides)


class Rehearsal:
    """Parses every command instead of running it, and leaves what it would have left."""

    def __init__(self, folder: Path, *, quick: bool) -> None:
        self.said: list[tuple[str, list[str]]] = []
        self.shared: set[tuple[str, int, int]] = set()  # script, ranks, runs at once
        self.accuracy = {"ode_init": 0.5, "causal_init": 0.75, "rolling_forcing": 0.625}
        self.chain = Chain(folder, ["seed=7"], quick=quick, processes=2)
        (folder / "models" / "Shapes").mkdir(parents=True)

    def __call__(self, name: str, command: Sequence[str]) -> None:
        number = next(i for i, word in enumerate(command) if word.endswith(".py"))
        script, words = Path(command[number]).name, list(command[number + 1 :])
        parse(script, words)
        self.said.append((script, words))
        flags = dict(itertools.pairwise(words))
        if script == "train.py":
            self.pretend_training(Path(flags["--config_path"]), Path(flags["--logdir"]), words)
        if script == "evaluate.py":
            right = self.accuracy[Path(flags["--json"]).stem.removeprefix("evaluation_")]
            accuracy = {f"accuracy.{a}": {"mean": right} for a in chain_script.ACCURACIES}
            content = {"summary": {"shapes": {"measures": accuracy}}}
            Path(flags["--json"]).write_text(json.dumps(content))

    def together(self, commands: Mapping[str, Sequence[str]], at_most: int) -> None:
        for name, command in commands.items():
            ranks = next((int(w[-1]) for w in command if w.startswith("--nproc_per_node")), 1)
            self(name, command)
            self.shared.add((self.said[-1][0], ranks, at_most))

    def pretend_training(self, config: Path, logdir: Path, words: list[str]) -> None:
        steps = load_config(config, [word for word in words if "=" in word]).max_steps
        exported = logdir / f"checkpoint_model_{steps:06d}"
        exported.mkdir(parents=True)
        (exported / TEXT_ENCODER_FILE).write_text(config.stem)
        torch.save({"conv1.weight": torch.ones(3)}, exported / VAE_FILE)
        weights = {"model.head.bias": torch.ones(3)}
        torch.save({"generator": weights, "generator_ema": weights}, exported / "model.pt")
        rows = [{"step": 0, "heldout/loss": 2.0}, {"step": 1}, {"step": 2, "heldout/loss": 0.5}]
        (logdir / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))


@pytest.fixture
def rehearse(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Rehearsal]:
    def start(folder: Path, *, quick: bool) -> Rehearsal:
        rehearsal = Rehearsal(folder, quick=quick)
        monkeypatch.setattr(build, "run_command", rehearsal)
        monkeypatch.setattr(chain_script, "run_together", rehearsal.together)
        monkeypatch.setattr("shapes.init.CAPTIONS_READ", 50)
        return rehearsal

    return start


@pytest.mark.slow
@pytest.mark.parametrize("quick", [False, True])
def test_every_stage_is_a_command_that_its_script_accepts(
    rehearse: Callable[..., Rehearsal],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    quick: bool,
) -> None:
    monkeypatch.setattr(chain_script, "check_moved", lambda start, trained: None)
    rehearsal = rehearse(tmp_path, quick=quick)
    results = {name: stage(rehearsal.chain).make() for name, stage in STAGES.items()}
    assert results["teacher"] == "held-out loss 2.0000 -> 0.5000"
    first = "" if quick else "0.50 (ODE initialisation) -> "
    assert results["evaluate"] == (
        f"prompt accuracy {first}0.75 (causal initialisation) -> 0.62 (student)"
    )
    trainings = [words for script, words in rehearsal.said if script == "train.py"]
    assert len(trainings) == len(TRAININGS) == 11
    assert all("seed=7" in words for words in trainings)
    assert (tmp_path / "checkpoints" / "shapes_rolling_forcing.pt").is_file()
    teacher = next(words for words in trainings if str(tmp_path / "train" / "teacher") in words)
    root = str(tmp_path / "models") if not quick else str(chain_script.ROOT / "wan_models")
    assert f"model_root={root}" in teacher
    videos = 8 if quick else 16
    assert f"batch_size={videos // 2}" in teacher, "the videos of an update on two ranks"
    ranks, at_once = (1, 2) if quick else (2, 1)
    scripts = ("precompute.py", "evaluate.py")
    assert rehearsal.shared == {(script, ranks, at_once) for script in scripts}


def test_quick_changes_every_training() -> None:
    assert set(QUICK) == TRAININGS
    config = load_config("configs/shapes/rolling_forcing.yaml", QUICK["rolling_forcing"].overrides)
    blocks = config.image_or_video_shape[1] // config.num_frame_per_block
    assert blocks >= len(config.denoising_step_list), "a whole window"


def test_what_would_delete_more_than_it_does_anew_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = ["--folder", str(tmp_path / "out"), "--redo", "teacher", "--until", "latents"]
    assert run_main(main, wrong) == 2
    assert "latents comes before" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_no_processes_are_refused(tmp_path: Path) -> None:
    assert run_main(main, ["--folder", str(tmp_path / "out"), "--processes", "0"]) == 2
    assert not (tmp_path / "out").exists()


def test_a_loss_that_hardly_falls_is_refused() -> None:
    margin = QUICK["teacher"].margin
    check_margin("teacher", 1.0, 1.0 - 1.01 * margin)
    for last in (1.0 - 0.99 * margin, 2.0, float("nan")):
        with pytest.raises(UserError, match="teacher: the held-out loss went from 1"):
            check_margin("teacher", 1.0, last)


def test_weights_that_are_not_good_enough_go_nowhere(
    rehearse: Callable[..., Rehearsal], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Later stages would have started from them."""
    rehearsal = rehearse(tmp_path, quick=True)
    monkeypatch.setitem(QUICK, "ode_init", QUICK["ode_init"]._replace(margin=0.9))
    with pytest.raises(UserError, match="has to fall by 90"):
        STAGES["ode_init"](rehearsal.chain).make()
    assert not rehearsal.chain.student("ode_init").exists()


def test_a_student_that_forgot_its_prompts_is_refused(
    rehearse: Callable[..., Rehearsal],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(chain_script, "check_moved", lambda start, trained: None)
    rehearsal = rehearse(tmp_path, quick=True)
    rehearsal.accuracy = {"causal_init": 0.8, "rolling_forcing": 0.7}
    STAGES["evaluate"](rehearsal.chain).make()
    rehearsal.accuracy["causal_init"] = 0.9
    with pytest.raises(UserError, match=r"fell from 0\.90"):
        STAGES["evaluate"](rehearsal.chain).make()


def test_a_student_that_did_not_move_is_refused(tmp_path: Path) -> None:
    """The quick chain's student once moved by less than half precision shows."""
    paths = [tmp_path / "start.pt", tmp_path / "trained.pt"]
    for path, moved in zip(paths, (0, 4), strict=True):
        weights = torch.ones(10)
        weights[:moved] += 1e-3
        torch.save({"generator": {"w": weights}}, path)
    with pytest.raises(UserError, match="changed nothing"):
        check_moved(*paths)
    torch.save({"generator": {"w": torch.full((10,), 1 + 1e-3)}}, paths[1])
    check_moved(*paths)


@pytest.mark.parametrize("override", ["max_steps=null", "heldout_every=0"])
def test_a_stage_without_end_or_measure_is_refused(
    rehearse: Callable[..., Rehearsal], tmp_path: Path, override: str
) -> None:
    rehearsal = rehearse(tmp_path, quick=False)
    chain = replace(rehearsal.chain, overrides=[override])
    with pytest.raises(UserError, match="must be above 0"):
        STAGES["teacher"](chain).make()


def test_a_stopped_chain_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = []

    @dataclass
    class Counted(Target):
        name: str

        def identity(self) -> dict[str, object]:
            return {}

        def make(self) -> str:
            ran.append(self.name)
            if len(ran) == 2:
                raise UserError("stopped")
            return "done"

    stages = {name: lambda chain, name=name: Counted(name) for name in ("first", "second")}
    monkeypatch.setattr(chain_script, "STAGES", stages)
    command = ["--folder", str(tmp_path)]
    assert run_main(main, command) == 2
    assert run_main(main, command) == 0
    assert ran == ["first", "second", "second"]
    assert "second" in capsys.readouterr().out
    assert run_main(main, command) == 0
    assert len(ran) == 3, "nothing is left to do"


@pytest.mark.slow
def test_a_changed_config_is_another_stage(
    rehearse: Callable[..., Rehearsal], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is said, and --redo starts from what the stages before it had made."""
    rehearsal = rehearse(tmp_path, quick=False)
    command = ["--folder", str(tmp_path)]
    assert run_main(main, [*command, "lrr=1"]) == 2
    assert not (tmp_path / "chain.json").exists(), "nothing began"
    assert run_main(main, command) == 0
    rehearsal.said.clear()
    assert run_main(main, [*command, "num_frame_per_block=1"]) == 2
    assert "error: teacher_short was begun with another config; --redo" in capsys.readouterr().err

    def content() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    before = content()
    assert run_main(main, [*command, "--redo", "vae_short", "lr=1e-5"]) == 2
    assert "text_encoder was begun" in capsys.readouterr().err
    assert content() == before, "nothing is lost"
    vae = tmp_path / "models" / "Shapes" / VAE_FILE
    vae.write_text("of a later stage")
    assert run_main(main, [*command, "--redo", "vae_short", "--until", "vae_short"]) == 0
    assert read_weights(vae, "a VAE")["conv1.weight"].dtype == torch.float16, "of the stage before"
    assert [words[1] for _, words in rehearsal.said[-1:]] == [
        str(chain_script.ROOT / "configs" / "shapes" / "vae_short.yaml")
    ]
    assert list(json.loads((tmp_path / "chain.json").read_text())["stages"])[-1] == "vae_short"


@pytest.mark.slow
def test_from_the_models_that_ship(
    rehearse: Callable[..., Rehearsal], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What ships is not made anew, and all that is made goes with it."""
    rehearsal = rehearse(tmp_path, quick=False)
    command = ["--folder", str(tmp_path), "--shipped"]
    assert run_main(main, [*command, "--until", "causal_init"]) == 0
    made = ["latents", "ode_pairs", "ode_init", "causal_init"]
    assert list(json.loads((tmp_path / "chain.json").read_text())["stages"]) == made
    assert all(f"model_root={ROOT / 'wan_models'}" in words for _, words in rehearsal.said)
    rehearsal.said.clear()
    again = [*command, "--redo", "causal_init", "--until", "causal_init"]
    assert run_main(main, again) == 0
    assert [script for script, _ in rehearsal.said] == ["train.py"]
    assert not any((tmp_path / "models" / "Shapes").iterdir())
    assert run_main(main, [*command, "--until", "vae"]) == 2
    assert "--shipped has no stage vae: its result ships" in capsys.readouterr().err


def test_a_quick_chain_starts_from_what_ships() -> None:
    """Of the starts that do not ship, others take the place."""
    quick = replace(ANY_CHAIN, quick=True)
    for name in ("causal_init", *STAND_INS):
        assert quick.start(name).is_file()
        assert ANY_CHAIN.start(name) == ANY_CHAIN.student(name)
    assert quick.start("causal_init").name == "shapes_causal_init.pt"


@pytest.mark.slow
def test_a_chain_of_another_world_is_refused(
    rehearse: Callable[..., Rehearsal],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its VAE has never seen what this one's clips show."""
    rehearse(tmp_path, quick=False)
    command = ["--folder", str(tmp_path), "--until", "vae_images"]
    monkeypatch.setattr(chain_script, "UNSAID", False)
    assert run_main(main, command) == 0
    monkeypatch.undo()
    assert run_main(main, command) == 2
    assert "init was begun with another config; --redo" in capsys.readouterr().err


def test_a_path_to_another_run_names_its_last_update() -> None:
    """A start's length was changed, and what goes on from it looked for the old one."""
    for path in CONFIGS:
        given = load_config(path, ()).generator_ckpt
        if given and "checkpoint_model_" in given:
            folder = Path(given).parent
            run = load_config(path.with_name(f"{folder.parent.name}.yaml"), ())
            assert folder.name == f"checkpoint_model_{run.max_steps:06d}"


def test_a_quick_chain_needs_what_ships(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(chain_script, "ROOT", tmp_path)
    shutil.copytree("configs", tmp_path / "configs")
    assert run_main(main, ["--quick", "--folder", str(tmp_path / "out")]) == 2
    assert "Shapes" in capsys.readouterr().err
    models = tmp_path / "wan_models" / "Shapes"
    for name in (TEXT_ENCODER_FILE, VAE_FILE, "google/umt5-xxl/tokenizer.json"):
        (models / name).parent.mkdir(parents=True, exist_ok=True)
        (models / name).touch()
    assert run_main(main, ["--quick", "--folder", str(tmp_path / "out")]) == 2
    assert "Shapes has no teacher" in capsys.readouterr().err
    (models / "diffusion_pytorch_model.safetensors").touch()
    (models / "config.json").touch()
    assert run_main(main, ["--quick", "--folder", str(tmp_path / "out")]) == 2
    assert "checkpoints/shapes_self_forcing.pt" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "chain.json"
    for content in ("", "[]", '{"stages"'):
        file.write_text(content)
        with pytest.raises(UserError, match="is not a chain's record"):
            Record(file, {})
    assert run_main(main, ["--folder", str(tmp_path)]) == 2
    assert run_main(main, ["--folder", str(file)]) == 2


def test_time_of_all_starts_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, now = iter([0.0, 60.0, 100.0, 130.0]), {"a": "hash"}
    monkeypatch.setattr(chain_script.time, "perf_counter", lambda: next(clock))
    with pytest.raises(KeyboardInterrupt), Record(tmp_path / "chain.json", now).timed("a"):
        raise KeyboardInterrupt
    again = Record(tmp_path / "chain.json", now)
    with again.timed("a"):
        pass
    again.finish("a", "good")
    assert "a                    1.5  good" in again.summary()


def test_a_published_student_holds_its_average_once_under_both_names(tmp_path: Path) -> None:
    weights = {"model.w": torch.zeros(50_000)}
    run = {"generator": weights, "generator_ema": {"model.w": torch.full((50_000,), 0.5)}}
    torch.save(run, tmp_path / "model.pt")
    publish_student(tmp_path / "model.pt", tmp_path / "student.pt")
    content = torch.load(tmp_path / "student.pt", weights_only=True)
    for network in ("generator", "generator_ema"):
        assert content[network]["model.w"].eq(0.5).all()
    assert (tmp_path / "student.pt").stat().st_size < 110_000, "half precision, stored once"


@pytest.mark.parametrize(
    "until",
    [
        pytest.param("vae_images", marks=pytest.mark.slow),
        pytest.param("evaluate", marks=pytest.mark.long),
    ],
)
@pytest.mark.skipif(not SHIPPED.is_file(), reason="the weights are not in this checkout")
def test_quick_chain_passes(tmp_path: Path, until: str) -> None:
    """On one process: the other tests of the slow suite run beside it."""
    flags = ["--quick", "--processes", "1", "--until", until, "--folder", str(tmp_path)]
    assert run_main(main, flags) == 0
    stages = json.loads((tmp_path / "chain.json").read_text())["stages"]
    names = list(STAGES)
    assert list(stages) == names[: names.index(until) + 1]
    assert all("result" in stage for stage in stages.values())
