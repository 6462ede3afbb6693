"""A training that is stopped anywhere loses nothing: the same weights and log at the end."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny_training import (
    TrainingWorld,
    assert_same_state,
    course,
    final_state,
    states,
    train,
)
from trainer.metrics import Means, Timer
from utils.config import Config


def experiment(world: TrainingWorld, folder: Path) -> Config:
    """All that a step can have: both players, micro-batches, held-out loss, samples, exports."""
    return world.config(
        folder,
        max_steps=3,
        batch_size=1,
        global_batch_size=2,
        log_iters=2,
        metrics_every=2,
        heldout_every=2,
        heldout_videos=1,
        heldout_data_path=str(world.prompts),
        sample_every=2,
        sample_prompts=["grass"],
        sample_latent_frames=2,
    )


@pytest.fixture(scope="module")
def whole(training_world: TrainingWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")
    train(experiment(training_world, folder), folder / "run", visualise=True)
    return folder / "run"


@contextmanager
def signalled(phase: str, time: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """SIGTERM comes when a phase has been entered so many times."""
    entered: list[str] = []
    original = Timer.phase

    @contextmanager
    def watched(self: Timer, name: str, **options: Any) -> Iterator[None]:
        with original(self, name, **options):
            entered.append(name)
            if name == phase and entered.count(phase) == time:
                os.kill(os.getpid(), signal.SIGTERM)
            yield

    with monkeypatch.context() as patch:
        patch.setattr(Timer, "phase", watched)
        yield
    assert entered.count(phase) >= time


SLOW = [("save", 1), ("rollout", 4), ("samples", 1), ("optimiser", 1)]
LONG = [
    *((phase, 1) for phase in ("data", "backward", "export")),
    *(("scores", 6), ("optimiser", 2), ("heldout", 2)),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("phase", "time"),
    [
        ("rollout", 1),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW),
        *(pytest.param(*case, marks=pytest.mark.long) for case in LONG),
    ],
)
def test_a_signal_in_any_phase_loses_nothing(
    phase: str,
    time: int,
    whole: Path,
    training_world: TrainingWorld,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """It was looked at after a whole step, of minutes, with its samples: nothing was saved."""
    config, run = experiment(training_world, tmp_path), tmp_path / "run"
    with signalled(phase, time, monkeypatch):
        stopped = train(config, run, visualise=True)
    assert stopped.stopped_by == signal.SIGTERM
    assert "SIGTERM: stopping before the next pass" in capfd.readouterr().err
    assert bool(states(run)) == bool(stopped.step or stopped.begun)
    train(config, run, visualise=True)
    assert_same_state(final_state(run), final_state(whole))
    assert course(run) == course(whole)
    for folder in (run, whole):
        assert len(list(folder.glob("samples/step_000002/*.mp4"))) == 1
        assert len(list(folder.glob("checkpoint_model_*/model.pt"))) == 2


def test_means_that_were_stored_go_on_exactly() -> None:
    """A line of the log of steps before and after a stop is the one of a run that had none."""
    values = torch.tensor([0.1, 0.7, -3.3, 2e-7]).unbind()
    once, twice = Means(), Means()
    for value in values:
        once.add({"loss": value, "rate": 0.5})
    for value in values[:2]:
        twice.add({"loss": value, "rate": 0.5})
    resumed = Means()
    resumed.load_state_dict(twice.state_dict())
    for value in values[2:]:
        resumed.add({"loss": value, "rate": 0.5})
    resumed.add({"other": 1.0})
    assert resumed.read() == once.read() | {"other": 1.0}
    assert resumed.read() == {}
