"""What is not finite ends the run, or is drawn anew; the next start does not end there again."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny_training import (
    TrainingWorld,
    assert_same_state,
    course,
    final_state,
    tensors,
)
from trainer.data import Batches
from trainer.sharding import open_world
from trainer.trainer import Trainer
from trainer.updates import ATTEMPT, NonFiniteError
from utils.config import Config
from utils.draws import Draws

SKIP = {"on_nonfinite": "skip", "batch_size": 2, "global_batch_size": 2, "max_steps": 3}
CRITIC = 3  # the number of its update in the second step


def trained(
    config: Config,
    run: Path,
    broken: tuple[int, ...] = (),
    *,
    update: int = CRITIC,
    watched: tuple[int, ...] = (),
) -> tuple[Trainer, list[tuple[int, list[str]]]]:
    """A training whose tries of an update with these numbers are NaN; the tries of it, or of those
    that are watched.
    """
    tries: list[tuple[int, list[str]]] = []
    with open_world("cpu") as world:
        trainer = Trainer(config, world, run, visualise=False)
        loss = trainer.task.loss

        def poisoned(player: str, batch: dict[str, Any], draws: Draws) -> Any:
            result = loss(player, batch, draws)
            attempt, number = divmod(draws.update, ATTEMPT)
            if number in (watched or (update,)):
                tries.append((attempt, batch["prompt"]))
            scale = float("nan") if number == update and attempt in broken else 1.0
            return type(result)(result.loss * scale, result.metrics)

        trainer.task.loss = poisoned  # type: ignore[method-assign]
        trainer.train()
    return trainer, tries


@pytest.mark.slow
def test_a_broken_update_is_drawn_anew_and_the_state_remembers_it(
    training_world: TrainingWorld, tmp_path: Path
) -> None:
    """A run ended there, and the same command ended there again: every draw was the same."""
    config = training_world.config(tmp_path, **SKIP, log_iters=1)
    trainer, tries = trained(config, tmp_path / "once", broken=(0, 1))
    assert [attempt for attempt, _ in tries] == [0, 1, 2]
    prompts = [tuple(prompt) for _, prompt in tries]
    assert len(set(prompts)) == 3, "other videos, too"
    assert trainer.step == 3
    assert trainer.batches["critic"].position == 2 * (3 + 2)
    assert [line.get("skipped_updates") for line in course(tmp_path / "once")] == [None, 2, 2]
    state = final_state(tmp_path / "once")
    assert json.loads(state["/run"])["broken"] == {str(CRITIC): 2}
    assert all(value.isfinite().all() for value in tensors(state).values())

    # stopped before it, and again behind it
    first = training_world.config(tmp_path, **SKIP | {"max_steps": 1})
    trained(first, tmp_path / "twice")
    second = training_world.config(tmp_path, **SKIP | {"max_steps": 2})
    trained(second, tmp_path / "twice", broken=(0, 1))
    _, tries = trained(config, tmp_path / "twice")
    assert tries == []
    assert_same_state(final_state(tmp_path / "twice"), state)
    assert course(tmp_path / "twice") == course(tmp_path / "once")


@pytest.mark.slow
def test_rollouts_that_are_used_again_are_of_the_batch_that_gave_an_update(
    training_world: TrainingWorld, tmp_path: Path
) -> None:
    """The next use went back to the batch, and the rollouts, that had been broken."""
    used = {"critic_updates_per_rollout": 2, "dfake_gen_update_ratio": 2, "max_steps": 2}
    config = training_world.config(tmp_path, **SKIP | used)
    trainer, tries = trained(config, tmp_path / "run", broken=(0,), update=1, watched=(1, 3))
    assert [attempt for attempt, _ in tries] == [0, 1, 0]
    first, again, used_again = (prompts for _, prompts in tries)
    assert first != again == used_again
    assert trainer.batches["critic"].position == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "broken", "reason"),
    [
        ({"on_nonfinite": "stop"}, (0,), "lower lr"),
        ({"max_skips_in_a_row": 1}, (0, 1), "max_skips_in_a_row is 1"),
        ({"max_skips": 1}, (0, 1), "max_skips is 1"),
    ],
)
def test_the_same_command_goes_on_with_other_draws(
    changes: dict[str, Any],
    broken: tuple[int, ...],
    reason: str,
    training_world: TrainingWorld,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """From the state before, through the same updates, and past the broken tries of that one."""
    caplog.set_level("INFO")
    config = training_world.config(tmp_path, **SKIP | changes)
    run = tmp_path / "run"
    with pytest.raises(NonFiniteError, match=f"step 1: critic loss nan.*{reason}"):
        trained(config, run, broken)
    kept = sorted(run.glob("emergency_*"))
    assert len(kept) == len(broken)
    assert [(folder / "state").is_dir() for folder in kept] == [False] * (len(broken) - 1) + [True]
    trainer, tries = trained(config, run, broken)
    assert f"what {kept[-1]} tells of is drawn anew" in caplog.text
    assert [attempt for attempt, _ in tries] == [len(broken)]
    assert trainer.step == 3

    (run.parent / "other").mkdir()
    (kept[-1]).rename(run.parent / "other" / kept[-1].name)
    damaged = kept[0] / "diagnosis.json"
    damaged.parent.mkdir(exist_ok=True)
    damaged.write_text("[]", encoding="utf-8")
    trained(config, run)
    assert "diagnosis.json is not as it was written" in caplog.text


@pytest.mark.slow
def test_every_batch_but_the_first_of_each_player_is_read_ahead(
    training_world: TrainingWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of micro-batches, of the update after the next one, and of a rollout that serves twice.

    After a broken try that of the next try is not; and behind the last step nothing is read.
    """
    read: list[bool] = []
    real = Batches._read

    def watched(batches: Batches, share: Any) -> Any:
        read.append(threading.current_thread() is threading.main_thread())
        return real(batches, share)

    monkeypatch.setattr(Batches, "_read", watched)
    changes = SKIP | {"batch_size": 1, "critic_updates_per_rollout": 2}
    for broken, first, again in (((), 2, 0), ((0,), 3, 2 + 1)):
        read.clear()
        trained(training_world.config(tmp_path, **changes), tmp_path / f"{broken}", broken)
        assert (read.count(True), len(read)) == (first, 2 * 2 + 3 * 2 + again)


def test_numbers_of_tries_never_meet_those_of_updates() -> None:
    """Of one update, all draws of two tries differ."""
    draws = [Draws(0, CRITIC + attempt * ATTEMPT, (0,)) for attempt in range(2)]
    normal, other = (each.normal(5, (4,)) for each in draws)  # type: ignore[arg-type]
    assert not torch.equal(normal, other)
