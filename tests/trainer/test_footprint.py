"""What a step takes in memory, found without memory, against steps that were made."""

from dataclasses import replace
from pathlib import Path

import pytest
from torch.profiler import ProfilerActivity, profile

from trainer.estimate import planned_setup
from trainer.footprint import Footprint, footprint
from trainer.sharding import open_world
from trainer.timing import opened, timed_config
from utils.config import Config, load_config

ROOT = Path(__file__).parents[2]


def shapes(**changes: object) -> Config:
    """The distillation of the shapes world, on videos of more tokens, that activations count."""
    given = [f"{key}={value}" for key, value in changes.items()]
    overrides = ["device=cpu", "height=128", "width=128", "batch_size=1", "total_batch_size=1"]
    path = ROOT / "configs" / "shapes" / "rolling_forcing.yaml"
    config = load_config(path, [*overrides, "mixed_precision=false", *given])
    return timed_config(replace(config, text_embeddings="stored"))


def found(config: Config) -> Footprint:
    return footprint(config, planned_setup(config), 1, 1)


def allocated(run: profile) -> int:
    """The most bytes that were allocated at once, of what was allocated meanwhile."""
    assert run.profiler is not None
    assert run.profiler.kineto_results is not None
    live = peak = 0
    for event in run.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": True}])
def test_a_step_takes_what_was_predicted(changes: dict[str, object], tmp_path: Path) -> None:
    """Activations were not estimated at all; a profiler counts every allocation of a real step."""
    config = shapes(**changes)
    follows = profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True)
    with open_world("cpu") as world, follows as run:
        trainer = opened(config, world, tmp_path, drawn=True)
        for _ in range(config.dfake_gen_update_ratio + 1):
            trainer.train_step()
    assert found(config).peak == pytest.approx(allocated(run), rel=0.1)
