"""Every verdict from a real training in which exactly one thing is wrong."""

import contextlib
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny_pipeline import TINY_DIT, write_dit_folder
from tests.tiny_training import (
    FRAMES,
    LATENT,
    PROMPTS,
    SIZES,
    TrainingWorld,
    course,
    train,
    write_training_world,
)
from trainer.sharding import open_world
from trainer.trainer import Trainer
from trainer.updates import NonFiniteError
from utils.datasets import write_shard
from wan.checkpoints import read_state_dict

pytestmark = pytest.mark.slow

STEPS = 50  # 25 generator updates: beyond the grace period of the critic


@pytest.fixture(scope="module")
def trained_world(tmp_path_factory: pytest.TempPathFactory) -> TrainingWorld:
    """Teacher, critic and student are one network that knows a few smooth moving latents."""
    root = tmp_path_factory.mktemp("trained")
    world = write_training_world(root)
    draw = torch.Generator().manual_seed(11)
    still = torch.randn(len(PROMPTS), 1, *LATENT, generator=draw)
    moving = torch.randn(len(PROMPTS), FRAMES, *LATENT, generator=draw)
    shutil.rmtree(world.latents)
    world.latents.mkdir()
    write_shard(world.latents / "a.safetensors", 0.8 * still + 0.6 * moving, PROMPTS)
    changes = world.flow(max_steps=150, lr=3e-3, ema_weight=0.0, prompt_dropout=0.1)
    train(world.config(root / "pretraining", **changes), root / "pretrained")
    weights = root / "pretrained" / "checkpoint_model_000150" / "model.pt"
    for name in ("Student", "Teacher", "Critic"):
        state = read_state_dict(weights)
        write_dit_folder(world.models / name, TINY_DIT | SIZES, dict(state))
    return world


def verdict(
    world: TrainingWorld,
    folder: Path,
    change: Callable[[Trainer], None] = lambda trainer: None,
    **changes: Any,
) -> str:
    """The last word of a run."""
    config = world.config(folder, max_steps=STEPS, **{"lr": 1e-4, "lr_critic": 3e-3, **changes})
    with open_world("cpu") as ranks:
        trainer = Trainer(config, ranks, folder / "run", visualise=False, save=False)
        change(trainer)
        with contextlib.suppress(NonFiniteError):
            trainer.train()
    return str(course(folder / "run")[-1]["health"]).partition(":")[0]


def freeze(trainer: Trainer) -> None:
    """The student repeats its first frame."""
    rollout = trainer.task._rollout  # type: ignore[attr-defined]

    def still(*arguments: Any, **options: Any) -> Any:
        clip = rollout(*arguments, **options)
        return replace(clip, latents=clip.latents[:, :1].expand_as(clip.latents))

    trainer.task._rollout = still  # type: ignore[attr-defined]


def test_a_sound_run_is_healthy(trained_world: TrainingWorld, tmp_path: Path) -> None:
    assert verdict(trained_world, tmp_path) == "healthy"


@pytest.mark.long
def test_a_critic_that_does_not_learn_lags(trained_world: TrainingWorld, tmp_path: Path) -> None:
    assert verdict(trained_world, tmp_path, lr_critic=0.0) == "critic lags"


def test_a_rate_a_thousand_times_too_high_collapses(
    trained_world: TrainingWorld, tmp_path: Path
) -> None:
    assert verdict(trained_world, tmp_path, lr=1e-1) == "latents collapsing"


@pytest.mark.long
def test_frozen_frames_are_static(trained_world: TrainingWorld, tmp_path: Path) -> None:
    assert verdict(trained_world, tmp_path, freeze) == "static"
