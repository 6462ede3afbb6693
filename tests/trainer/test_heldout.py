"""The held-out loss: what is measured, that it is always the same, and that training goes on as
if it were not there.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tiny_training import (
    FRAMES,
    LATENT,
    TrainingWorld,
    assert_heldout_changes_nothing,
    course,
    heldout_against_one_batch,
    train,
)
from trainer.estimate import data_lines, dry_run_report, planned_setup
from trainer.heldout import HeldOut, heldout_draws
from trainer.metrics import mean_over_ranks, read_metrics
from trainer.sharding import open_world
from trainer.tasks import Consistency, FlowMatching
from trainer.trainer import BETWEEN_STEPS, Trainer
from utils.datasets import collate, write_shard
from utils.draws import Draws, Purpose
from utils.errors import UserError

TASKS = ["distillation", "ode", "diffusion", "consistency", "vae"]


def task_values(world: TrainingWorld, task: str) -> dict[str, Any]:
    """An experiment of each objective with four held-out items."""
    objective: dict[str, Any] = {
        "distillation": {"heldout_data_path": str(world.prompts)},
        "ode": world.ode() | {"heldout_data_path": str(world.trajectories)},
        "diffusion": world.flow(prompt_dropout=0.5, heldout_data_path=str(world.latents)),
        "consistency": world.consistency(heldout_data_path=str(world.latents)),
        "vae": world.vae(),
    }[task]
    return objective | {"heldout_every": 2, "heldout_videos": 4}


@contextmanager
def trainer_of(world: TrainingWorld, folder: Path, **changes: Any) -> Iterator[Trainer]:
    config = world.config(folder, **changes)
    with open_world("cpu") as ranks:
        yield Trainer(config, ranks, folder / "run", visualise=False, save=False)


def measured(logdir: Path) -> dict[int, dict[str, float]]:
    """The held-out numbers of a run by step."""
    rows = {
        line["step"]: {k: v for k, v in line.items() if k.startswith("heldout/")}
        for line in read_metrics(logdir)
    }
    return {step: numbers for step, numbers in rows.items() if numbers}


@pytest.mark.parametrize("task", [task for task in TASKS if task != "consistency"])
def test_it_is_the_loss_of_one_batch_of_all_items(
    task: str, training_world: TrainingWorld, tmp_path: Path
) -> None:
    """Of items one at a time, whatever the loss is a mean over: items, noisy frames, tokens."""
    values = task_values(training_world, task)
    player, found, expected = heldout_against_one_batch(training_world, tmp_path, values)
    assert player == {"distillation": "critic", "vae": "vae"}.get(task, "generator")
    assert found == pytest.approx(expected, rel=1e-4)
    assert (len(found) > 1) is (task != "distillation")


def test_of_consistency_it_is_the_distance_from_where_the_teacher_ends(
    training_world: TrainingWorld, tmp_path: Path
) -> None:
    """The loss itself, the distance of neighbours, is smallest before anything is learned."""
    values = task_values(training_world, "consistency") | {"guidance_scale": 0.0}
    with trainer_of(training_world, tmp_path, **values) as trainer, torch.no_grad():
        task = trainer.task
        assert isinstance(task, Consistency)
        batch, draws = collate([trainer.heldout.data[0]]), heldout_draws([0])  # type: ignore[union-attr]
        looks: list[int] = []
        task.look = lambda: looks.append(1)
        found = task.heldout_loss(batch, draws, 1.0).loss
        assert len(looks) == len(task.grid) - 1, "a signal waits for one pass, not for the ODE"
        places, context = task._places(draws, FRAMES)
        x, noise = batch["latents"], draws.normal(Purpose.NOISE, (FRAMES, *LATENT))
        text = task.teacher.encode_text(task.text(batch["prompt"]))

        def flow(state: Tensor, at: Tensor) -> Tensor:
            times = torch.cat([torch.zeros_like(at), at], dim=1)
            return task.teacher(torch.cat([x, state], dim=1), times, text, context)[:, FRAMES:]

        place = int(places[0, 0])
        s = task.grid[place] / 1000
        state = noisy = (1 - s) * x + s * noise
        for here, there in pairwise(task.grid[place:].tolist()):
            state = state + (there - here) / 1000 * flow(state, torch.full((1, FRAMES), here))
        x0 = noisy - s * flow(noisy, task.grid[places])  # the student is still the teacher
    torch.testing.assert_close(found, (x0 - state).square().mean())


def test_it_does_not_depend_on_the_batch_size_or_the_seed(
    training_world: TrainingWorld, tmp_path: Path
) -> None:
    values = task_values(training_world, "ode")
    found = []
    for number, changes in enumerate(({"batch_size": 1}, {"batch_size": 4}, {"seed": 7})):
        with trainer_of(training_world, tmp_path / f"{number}", **values | changes) as trainer:
            assert trainer.heldout is not None
            found.append(mean_over_ranks(trainer.heldout.measure()))
    assert found[0] == found[1] == found[2]


def test_every_item_has_a_rollout_of_its_own(
    training_world: TrainingWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same ones whatever the run's seed, of both schedules and at several levels."""
    forced = training_world.flow(
        **{"schedule": None, "method": "rolling_forcing", "window_forcing": True},
        **{"denoising_step_list": [1000, 600, 300], "heldout_every": 2, "heldout_videos": 7},
        heldout_data_path=str(training_world.latents),
    )
    levels, used = FlowMatching._levels, []

    def noted(task: FlowMatching, draws: Draws, frames: int) -> tuple[Tensor, Any]:
        timesteps, context = levels(task, draws, frames)
        used.append(tuple(timesteps[0].tolist()))
        return timesteps, context

    monkeypatch.setattr(FlowMatching, "_levels", noted)
    losses = []
    for seed in (0, 7):
        with trainer_of(training_world, tmp_path / f"{seed}", **forced, seed=seed) as trainer:
            assert trainer.heldout is not None
            losses.append(mean_over_ranks(trainer.heldout.measure()))
    assert losses[0] == losses[1]
    assert used[:7] == used[7:]
    assert len(set(used)) > 3
    assert {len(set(timesteps)) for timesteps in used} == {1, 3}, "block by block, and rolling"


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_training_is_the_same_with_and_without(
    task: str, training_world: TrainingWorld, tmp_path: Path
) -> None:
    """Bit for bit, and in every number of the log."""
    assert_heldout_changes_nothing(training_world, tmp_path, task_values(training_world, task))
    assert list(measured(tmp_path / "with")) == [0, 2, 3], "the start, every second step, the end"


def test_it_falls_when_the_training_reads_the_same_data(
    training_world: TrainingWorld, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    (tmp_path / "latents").mkdir()
    video = torch.randn(1, 3, 16, 2, 4, generator=torch.Generator().manual_seed(3))
    write_shard(tmp_path / "latents" / "a.safetensors", video, ["the sea"])
    path = str(tmp_path / "latents")
    values = training_world.flow(data_path=path, heldout_data_path=path, lr=3e-3)
    values |= {"max_steps": 40, "batch_size": 4, "heldout_every": 20, "heldout_videos": 16}
    config = training_world.config(tmp_path, **values)
    trainer = train(config, tmp_path / "run", save=False)
    assert trainer.heldout is not None
    assert trainer.heldout.items == 1, "the data hold no more"
    losses = {step: numbers["heldout/loss"] for step, numbers in measured(tmp_path / "run").items()}
    assert list(losses) == [0, 20, 40]
    assert losses[40] < losses[20] < losses[0]
    for step, loss in losses.items():
        assert f"held-out loss {loss:.4g} (step {step})" in caplog.text


@pytest.mark.slow
def test_a_resumed_run_measures_the_same(training_world: TrainingWorld, tmp_path: Path) -> None:
    values = task_values(training_world, "ode") | {"max_steps": 5}
    train(training_world.config(tmp_path, **values), tmp_path / "once")
    without = {"heldout_every": 0, "heldout_data_path": None, "heldout_videos": 1, "max_steps": 3}
    train(training_world.config(tmp_path, **values | without), tmp_path / "twice")
    train(training_world.config(tmp_path, **values), tmp_path / "twice")
    once = measured(tmp_path / "once")
    assert list(once) == [0, 2, 4, 5]
    assert measured(tmp_path / "twice") == {step: once[step] for step in (4, 5)}


def test_its_seconds_are_no_training(
    training_world: TrainingWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The phases of a measured rollout must not be taken for those of the step."""
    calls: list[str] = []
    measure = HeldOut.measure

    def watched(heldout: HeldOut) -> dict[str, torch.Tensor]:
        before = heldout.task.timer.read()
        result = measure(heldout)
        calls.extend(heldout.task.timer.read())
        assert before["step"] >= 0
        return result

    monkeypatch.setattr(HeldOut, "measure", watched)
    values = task_values(training_world, "distillation") | {"heldout_every": 1}
    with trainer_of(training_world, tmp_path, **values) as trainer:
        trainer.train_step()
    assert calls == ["heldout", "step"]
    assert "heldout" in BETWEEN_STEPS


def test_the_log_of_a_run_without_a_state_is_dropped(
    training_world: TrainingWorld, tmp_path: Path
) -> None:
    """Its step 0 stayed in the log of the next run, which does not measure."""
    values = task_values(training_world, "ode") | {"max_steps": 1}
    train(training_world.config(tmp_path, **values), tmp_path / "run", save=False)
    assert list(measured(tmp_path / "run")) == [0, 1]
    config = training_world.config(tmp_path, **values | {"heldout_every": 0})
    train(config, tmp_path / "run", save=False)
    assert [line["step"] for line in course(tmp_path / "run")] == [1]


@pytest.mark.parametrize(
    ("task", "changes", "said"),
    [
        ("ode", {"heldout_data_path": "{latents}"}, "heldout_data_path: .* holds no trajectories"),
        ("diffusion", {"heldout_data_path": "{prompts}"}, "heldout_data_path: .* no latents"),
        ("distillation", {"heldout_data_path": "{other}"}, "heldout_data_path: .* 'a tree'"),
        ("vae", {"heldout_data_path": "{prompts}"}, "heldout_data_path: .* no videos"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_loaded(
    task: str,
    changes: dict[str, Any],
    said: str,
    training_world: TrainingWorld,
    tmp_path: Path,
) -> None:
    (tmp_path / "other.txt").write_text("a tree\n", encoding="utf-8")
    paths = {
        "latents": training_world.latents,
        "prompts": training_world.prompts,
        "other": tmp_path / "other.txt",
    }
    filled = {k: v.format(**paths) if isinstance(v, str) else v for k, v in changes.items()}
    values = task_values(training_world, task) | filled
    with pytest.raises(UserError, match=said):
        dry_run_report(training_world.config(tmp_path, **values), 1)
    with pytest.raises(UserError, match=said), trainer_of(training_world, tmp_path, **values):
        pass


def test_missing_heldout_data_stops_a_run_and_is_named_by_a_dry_run(
    training_world: TrainingWorld, tmp_path: Path
) -> None:
    values = task_values(training_world, "ode") | {"heldout_data_path": "nowhere"}
    assert "nowhere" in dry_run_report(training_world.config(tmp_path, **values), 1)
    with (
        pytest.raises(UserError, match="heldout_data_path: nowhere does not exist"),
        trainer_of(training_world, tmp_path, **values),
    ):
        pass


def test_a_dry_run_says_what_will_be_measured(
    training_world: TrainingWorld, tmp_path: Path
) -> None:
    values = task_values(training_world, "distillation") | {"heldout_videos": 99}
    config = training_world.config(tmp_path, **values)
    said = data_lines(config, planned_setup(config))
    assert f"held-out data: 7 items of {training_world.prompts}" in said
    config = replace(config, heldout_every=0)
    assert not any("held-out" in line for line in data_lines(config, planned_setup(config)))
