"""Updates that `scripts/benchmark.py --train` times: their phases, and where what is slow is."""

import json
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts import benchmark
from tests.tiny_training import TrainingWorld, finish, start
from trainer.data import Batches
from trainer.networks import Player
from trainer.sharding import open_world
from trainer.tasks import distillation
from trainer.timing import BESIDE, OTHER, opened, timed_config
from trainer.trainer import Trainer
from utils.cli import run_main
from utils.config import check_training

RUN = ("data", "text", "optimiser", OTHER, "update")
OF_SCORES = ("rollout", "scores", "backward")
TERA = 10**12
AGAIN = "critic, on the rollout before"
CASES: dict[str, tuple[dict[str, Any], dict[str, tuple[str, ...]]]] = {
    "distillation": (
        {"critic_updates_per_rollout": 2, "dfake_gen_update_ratio": 3},
        {"generator": OF_SCORES, "critic": OF_SCORES, AGAIN: ("scores", "backward")},
    ),
    "ode": ({}, {"generator": ("forward", "backward")}),
    "consistency": ({}, {"generator": ("teacher", "forward", "backward")}),
}


@pytest.fixture
def sizes_alone(training_world: TrainingWorld, tmp_path: Path) -> Path:
    """Model folders without weights."""
    for file in training_world.models.glob("*/config.json"):
        folder = tmp_path / "sizes" / file.parent.name
        folder.mkdir(parents=True)
        shutil.copy(file, folder)
    return tmp_path / "sizes"


def test_a_training_with_a_cosine_can_be_timed(
    training_world: TrainingWorld, tmp_path: Path
) -> None:
    """A timed one has no end, and a cosine needs one: the benchmark refused it."""
    config = training_world.config(tmp_path, lr_schedule="cosine")
    check_training(timed_config(config))


def values_of(world: TrainingWorld, name: str) -> dict[str, Any]:
    return {**getattr(world, name, dict)(), **CASES[name][0]}


def measured(config: Path, file: Path, *words: str) -> dict[str, Any]:
    """The figures of one update of each kind."""
    given = ["--train", "--config_path", config, "--updates", "1", "--json", file, *words]
    assert run_main(benchmark.main, list(map(str, given))) == 0
    return json.loads(file.read_text())


@pytest.mark.parametrize("name", CASES)
def test_every_phase_has_its_figures(
    name: str,
    training_world: TrainingWorld,
    sizes_alone: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neither weights nor data are there, and nothing is left."""
    values = values_of(training_world, name) | {"model_root": str(sizes_alone), "max_steps": 50}
    values |= {"text_embeddings": None, "data_path": "nowhere", "recipe_batch_size": 64}
    config = training_world.write(tmp_path / "c.yaml", **values)
    for folder in ("run", "temporary"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "run")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    report = measured(config, tmp_path / "out.json", "--random_weights")
    assert not any((tmp_path / "run").iterdir())
    assert not any((tmp_path / "temporary").iterdir())
    assert report["updates"].keys() == {*CASES[name][1], BESIDE}
    said = capsys.readouterr().out
    for kind, phases in CASES[name][1].items():
        figures = report["updates"][kind]
        assert {phase for phase in figures if figures[phase]["tflop"]} == {*phases, "update"}
        texts = {"text"} if kind == AGAIN else set()  # were encoded for the rollout
        assert figures.keys() >= {*RUN, *phases} - texts
        whole = figures.pop("update")
        assert whole["tflop"] == pytest.approx(sum(f["tflop"] or 0 for f in figures.values()))
        parts = zip(*(figure["raw_seconds"] for figure in figures.values()), strict=True)
        assert whole["raw_seconds"] == pytest.approx(list(map(sum, parts)))
        assert sum(figures[OTHER]["raw_seconds"]) < 0.5 * sum(whole["raw_seconds"])
        rate = whole["tflop"] / statistics.mean(whole["raw_seconds"])
        assert whole["tflops_per_second"] == pytest.approx(rate)
        share = rate / report["peak_tflops_per_second"]
        assert whole["share_of_peak"] == pytest.approx(share)
        assert f"{kind} (each rank's share)" in said
    step = report["step"]
    assert step["videos_per_second_per_rank"] == pytest.approx(4 / step["seconds"])
    assert step["hours"] == pytest.approx(50 * 64 / 4 * step["seconds"] / 3600)


def test_its_own_weights_and_data_are_measured(
    training_world: TrainingWorld, tmp_path: Path
) -> None:
    """Operations are those that the task says, of all videos of an update."""
    config = training_world.config(tmp_path, **training_world.ode())
    with open_world("cpu") as world:
        trainer = opened(timed_config(config), world, tmp_path, drawn=False)
        trainer.run(1)
        trainer.close()
    update, beside = trainer.made
    flops = trainer.task.flops("generator", None)  # type: ignore[arg-type]
    assert flops is not None
    assert sum(update.flops.values()) == 4 * flops == trainer.usual_flops("generator")
    assert beside.kind == BESIDE
    assert beside.seconds.keys() == {"average", OTHER}
    assert trainer.task.players["generator"].ema is not None  # as in the midst of a training


def later(call: Callable[..., Any], seconds: float, room: int = 0) -> Callable[..., Any]:
    def called(*args: Any, **kwargs: Any) -> Any:
        torch.ones(room // 4)
        time.sleep(seconds)
        return call(*args, **kwargs)

    return called


@pytest.mark.slow
def test_what_is_slow_or_large_is_in_its_own_phase(
    training_world: TrainingWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Delays that are longer than what the phase takes by itself; 256 MiB in the optimiser."""
    for owner, name, seconds, room in (
        (Batches, "micro_batch", 0.10, 0),
        (distillation, "self_rollout", 0.15, 0),
        (distillation, "predict_scores", 0.2, 0),
        (Player, "apply", 0.1, 2**28),
        (Player, "update_ema", 0.05, 0),
    ):
        monkeypatch.setattr(owner, name, later(getattr(owner, name), seconds, room))
    config = training_world.config(tmp_path, global_batch_size=2, dfake_gen_update_ratio=1)
    with open_world("cpu") as world:
        trainer = opened(timed_config(config), world, tmp_path, drawn=False)
        trainer.run(1)
        trainer.close()
    found = {update.kind: update for update in trainer.made}
    seconds = found["generator"].seconds
    for phase, least in {"data": 0.1, "rollout": 0.15, "scores": 0.2, "optimiser": 0.1}.items():
        assert seconds.pop(phase) >= least
    assert sum(seconds.values()) < 0.5
    assert found[BESIDE].seconds["average"] >= 0.1  # of two players
    memory = found["critic"].memory
    assert memory["optimiser"] > memory["data"] + 2**27


def test_steps_that_give_nothing_new_are_passed_over(
    training_world: TrainingWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two updates of a generator that is due in every fifth step; a rollout is used five times,
    or the critic is alone for twelve steps.
    """
    steps: list[int] = []

    def skim(trainer: Trainer) -> None:
        steps.append(trainer.step)
        trainer.step += 1

    monkeypatch.setattr(Trainer, "train_step", skim)
    cases = ((1, 0, [0, 5]), (5, 0, [*range(10)]), (1, 12, [12, 17]))
    for uses, alone, expected in cases:
        changes = {"dfake_gen_update_ratio": 5, "critic_updates_per_rollout": uses}
        changes |= {"critic_warmup_steps": alone, "max_steps": 50}
        config = training_world.config(tmp_path, **changes)
        with open_world("cpu") as world:
            trainer = opened(timed_config(config), world, tmp_path, drawn=False)
            trainer.run(2)
            trainer.close()
        assert steps == expected
        steps.clear()


@pytest.mark.slow
@pytest.mark.parametrize("asked", [True, pytest.param(False, marks=pytest.mark.long)])
def test_what_cannot_run_here_is_counted(
    asked: bool,
    training_world: TrainingWorld,
    sizes_alone: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of a rank of two: half of the operations that the task says, on average; it tried to run."""
    changes = {"model_root": str(sizes_alone), "text_embeddings": None, "data_path": "nowhere"}
    config = training_world.write(tmp_path / "c.yaml", **changes)
    words = ["--random_weights", "--world_size", "2", "--tflops", "0.5"]
    if not asked:
        monkeypatch.setattr("scripts._training.MOST_PARAMETERS_ON_CPU", 100)
    report = measured(config, tmp_path / "o.json", *words, *["--fake"] * asked)
    assert report.keys() == {"predicted"}
    said = capsys.readouterr().out
    assert said.startswith("predicted, not measured" if asked else "too large for a CPU")
    with open_world("cpu") as world:
        own = training_world.config(tmp_path)
        usual = opened(timed_config(own), world, tmp_path, drawn=False).usual_flops
    for player, phases in report["predicted"]["updates"].items():
        assert {phase for phase in phases if phases[phase]["tflop"]} == {*OF_SCORES, "update"}
        whole = phases.pop("update")
        assert whole["tflop"] == pytest.approx(usual(player) / 2 / TERA)
        assert whole["tflop"] == pytest.approx(sum(each["tflop"] or 0 for each in phases.values()))
        assert whole["predicted_seconds"] == pytest.approx(whole["tflop"] / 0.5)
        memory = [each["peak_memory_bytes"] for each in phases.values()]
        assert 0 < whole["peak_memory_bytes"] == max(memory)


@pytest.mark.slow
def test_two_ranks_are_measured(
    training_world: TrainingWorld, sizes_alone: Path, tmp_path: Path
) -> None:
    """Each has half of the videos, and the main one tells."""
    changes = {"model_root": str(sizes_alone), "sharding_strategy": "full"}
    config = training_world.write(tmp_path / "c.yaml", **changes)
    out = tmp_path / "out.json"
    words = ["--", "--train", "--config_path", config, "--random_weights", "--json", out]
    code, said = finish(start(["scripts/benchmark.py", *words], 2))
    assert code == 0, said
    assert said.count("generator (each rank's share)") == 1
    two = json.loads(out.read_text())
    assert two["step"]["videos_per_second_per_rank"] == pytest.approx(2 / two["step"]["seconds"])
    one = measured(config, tmp_path / "one.json", "--random_weights", "--updates", "2")
    for kind in ("generator", "critic"):
        ours, theirs = (each["updates"][kind]["update"]["tflop"] for each in (two, one))
        assert ours == pytest.approx(theirs / 2)


def test_what_cannot_be_measured_is_one_sentence(
    training_world: TrainingWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = training_world.write(tmp_path / "c.yaml")
    given = ["--config_path", str(config), "--train"]
    vae = training_world.write(tmp_path / "vae.yaml", **training_world.vae())
    for words, message in (
        ([*given, "--blocks", "3"], "--blocks is of a stream"),
        ([*given, "--file", "a.mp4"], "--file is of a stream"),
        ([*given, "--compare", "", "compile=true"], "--compare is of a stream"),
        ([*given, "--updates", "0"], "--updates and --world_size must be at least 1"),
        ([*given, "--fake", "--tflops", "0"], "--tflops above 0"),
        ([*given, "--json", "nowhere/a.json"], "does not exist"),
        ([*given, "--warmup", "-1"], "--warmup"),
        ([*given, "--device", "cuda:7"], "cuda:7"),
        ([*given, "data_path=nowhere.txt"], "nowhere.txt"),
        ([*given, "generator_name=None", "--random_weights"], "None does not exist"),
        ([*given[:2], "--random_weights", "--updates", "3"], "--updates is of --train"),
        ([*given[:2], "--random_weights", "--fake"], "--fake is of --train"),
        (["--config_path", str(vae), "--train", "--random_weights"], "leave out --random_weights"),
        (["--config_path", str(vae), "--train", "--fake"], "holds no transformer"),
    ):
        assert run_main(benchmark.main, words) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line


def test_an_update_that_is_not_finite_is_no_measurement(
    training_world: TrainingWorld,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("trainer.updates.any_rank", lambda *_: True)
    config = training_world.write(tmp_path / "c.yaml", **training_world.ode())
    assert run_main(benchmark.main, ["--train", "--config_path", str(config)]) == 2
    assert "there is nothing to measure: step 0" in capsys.readouterr().err
