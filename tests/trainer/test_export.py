"""Exports: in the background, as published, bounded, and never the end of a training."""

import errno
import logging
import shutil
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch

from tests.tiny_training import TrainingWorld, states, train
from trainer import export
from trainer.export import Exports, exported, gathered
from trainer.sharding import open_world
from trainer.trainer import Trainer
from utils.errors import UserError
from utils.files import write_torch
from wan.checkpoints import read_state_dict

GIB = 2**30


def test_an_export_is_written_beside_the_training_one_at_a_time(tmp_path: Path) -> None:
    """All ranks stood still while the main one wrote."""
    go_on, begun = Event(), Event()
    exports = Exports(tmp_path, keep=2)

    def slow(folder: Path) -> None:
        begun.set()
        assert go_on.wait(60)
        (folder / "model.pt").touch()

    exports.start(1, slow)
    assert begun.wait(60)
    assert exports.is_writing(0.01)
    assert not exports.holds(1)
    with pytest.raises(AssertionError, match="an export at a time"):
        exports.start(2, slow)
    go_on.set()
    assert not exports.is_writing(60)
    exports.wait()
    assert exports.holds(1)
    (tmp_path / "checkpoint_model_000001_best").mkdir()
    for step in (2, 1_000_000):
        exports.start(step, slow)
        exports.wait()
    exports.close()
    assert [path.name for path in exported(tmp_path)] == [
        "checkpoint_model_000002",
        "checkpoint_model_1000000",
    ]
    assert (tmp_path / "checkpoint_model_000001_best").is_dir(), "a person's copy stays"


def test_weights_of_a_course_that_was_gone_back_on_keep_no_place(tmp_path: Path) -> None:
    """They counted as the newest ones: each new folder was removed as soon as it was there."""
    for step in (200, 300):
        (tmp_path / f"checkpoint_model_{step:06d}").mkdir()
    exports = Exports(tmp_path, keep=2)
    for step in (100, 150, 160):
        exports.start(step, lambda folder: (folder / "model.pt").touch())
        exports.wait()
    assert [int(path.name[-6:]) for path in exported(tmp_path)] == [150, 160, 200, 300]
    exports.forget(200)
    assert not exports.holds(200)
    exports.close()


def test_who_waits_for_an_export_is_not_taken_for_lost(
    training_world: TrainingWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All ranks look around while the main one waits, or encodes clips for a VAE's statistics."""
    with open_world("cpu") as world:
        config = training_world.config(tmp_path, **training_world.vae())
        trainer = Trainer(config, world, tmp_path / "run", visualise=False)
        busy = iter([True, True, False])
        monkeypatch.setattr(trainer.exports, "is_writing", lambda seconds: next(busy))
        before = trainer.stopping.places
        trainer._export()
        assert trainer.stopping.places == before + 2 + export.STATISTICS_CLIPS
        monkeypatch.setattr(trainer.exports, "close", lambda: watched.append(ended.is_set()))
        ended, watched = trainer.watch._ended, list[bool]()
        trainer.close()
        assert watched == [True], "the main rank's last weights may take as long as they do"


def test_what_is_copied_does_not_follow_the_training() -> None:
    """On one CPU the copy was the weights themselves, which go on while they are written."""
    weights = torch.ones(3)
    copied = gathered({"w": weights}, is_main=True)
    weights.zero_()
    assert torch.equal(copied["w"], torch.ones(3))
    assert gathered({"w": weights}, is_main=False) == {}


@pytest.mark.slow
def test_weights_are_as_published_and_safetensors_on_request(
    training_world: TrainingWorld, tmp_path: Path
) -> None:
    """The same weights were written four times: 681 GB in a published run."""
    train(training_world.config(tmp_path, max_steps=2), tmp_path / "run")
    (folder,) = exported(tmp_path / "run")
    assert [path.name for path in folder.iterdir()] == ["model.pt"]
    # as the published inference reads it
    published = torch.load(folder / "model.pt", map_location="cpu", weights_only=True)
    assert published.keys() == {"generator", "generator_ema"}
    official = {f"model.{name}" for name in read_state_dict(training_world.models / "Student")}
    assert set(published["generator"]) == set(published["generator_ema"]) == official
    shutil.rmtree(folder)
    config = training_world.config(tmp_path, max_steps=2, export_safetensors=True)
    train(config, tmp_path / "run")
    names = {path.name for path in folder.iterdir()}
    assert names == {"model.pt", "generator.safetensors", "generator_ema.safetensors"}


@pytest.mark.slow
def test_a_full_disk_at_an_export_does_not_end_the_training(
    training_world: TrainingWorld,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It ended there, without the state of that step."""
    config = training_world.config(tmp_path, max_steps=3, log_iters=1)
    full = [True, False, True]

    def write(path: Path, value: Any) -> None:
        if full.pop(0):
            raise OSError(errno.ENOSPC, "no space left", str(path))
        write_torch(path, value)

    monkeypatch.setattr("trainer.export.write_torch", write)
    with pytest.raises(UserError, match=r"the last weights were not exported: .*no space left"):
        train(config, tmp_path / "run")
    assert "weights were not exported, the training goes on: cannot write" in caplog.text
    assert [path.name for path in states(tmp_path / "run")] == ["step_000002", "step_000003"]
    assert [path.name for path in exported(tmp_path / "run")] == ["checkpoint_model_000002"]
    full += [False]
    train(config, tmp_path / "run")
    assert exported(tmp_path / "run")[-1].name == "checkpoint_model_000003"


@pytest.mark.slow
@pytest.mark.parametrize("free", [0.01, 2.0])
def test_free_space_is_looked_at_before_the_first_step(
    free: float,
    training_world: TrainingWorld,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A full disk was met after hours. `free`: in units of what a state and its weights take."""
    monkeypatch.setattr("trainer.space._bytes", lambda tensors: GIB)
    need = 7 + 2  # weights of two, two moments of each, an average; weights and their average
    usage = shutil._ntuple_diskusage(0, 0, int(free * need * GIB))  # type: ignore[attr-defined]
    monkeypatch.setattr("shutil.disk_usage", lambda place: usage)
    monkeypatch.setattr(Exports, "start", lambda *given: None)
    config = training_world.config(tmp_path, max_steps=1, log_iters=1)
    if free < 1:
        with pytest.raises(UserError, match=r"7\.00 GiB of state and 2\.00 GiB of weights are wr"):
            train(config, tmp_path / "run")
        return
    caplog.set_level(logging.WARNING)
    long = training_world.config(tmp_path, max_steps=1, log_iters=1)
    train(long, tmp_path / "run", save=True)
    assert "set keep_exports" not in caplog.text
    monkeypatch.setattr("trainer.trainer.Trainer.train", lambda trainer: None)
    train(training_world.config(tmp_path, max_steps=90, log_iters=1), tmp_path / "run")
    assert "89 exports of 2.00 GiB and the states will take 199.00 GiB" in caplog.text
    assert "set keep_exports=" in caplog.text
