"""Steps of the shapes world, and what was predicted of them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from trainer.estimate import planned_setup
from trainer.footprint import Footprint, MemoryTimer, footprint, heaviest_updates, measured
from trainer.live_memory import LiveMemory
from trainer.planned import planned_config
from trainer.sharding import open_world
from trainer.timing import opened, timed_config
from utils.config import Config, load_config

ROOT = Path(__file__).parents[2]
# as many blocks as a window has
SHORT = {"image_or_video_shape": [1, 15, 16, 8, 8], "num_training_frames": 15}


def shapes(**changes: object) -> Config:
    """The distillation of the shapes world, an update of each network in every step."""
    given = [f"{key}={value}" for key, value in changes.items()]
    overrides = ["device=cpu", "batch_size=1", "total_batch_size=1", "dfake_gen_update_ratio=1"]
    path = ROOT / "configs" / "shapes" / "rolling_forcing.yaml"
    config = load_config(path, [*overrides, "mixed_precision=false", *given])
    return timed_config(replace(config, text_embeddings="stored"))


def found(config: Config) -> Footprint:
    return footprint(config, planned_setup(config), 1, 1)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, marks=pytest.mark.long),
        pytest.param(
            {"gradient_checkpointing": True, **SHORT},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_step_takes_what_was_predicted(changes: dict[str, object], tmp_path: Path) -> None:
    """Activations were not estimated at all; here what real operators give is counted."""
    config, memory = shapes(**changes), LiveMemory(torch.device("cpu"), rounded=1)
    with open_world("cpu") as world, memory:
        trainer = opened(config, world, tmp_path, drawn=True)
        trainer.train_step()  # then there are moments and averages
        trainer.task.timer = timer = MemoryTimer(memory)
        for timer.player, player in trainer.task.players.items():
            for number in heaviest_updates(trainer.task, timer.player)[0]:
                trainer.updates.update(player, 1, number)
    taken = {name: peak.size for name, peak in memory.phases.items()}
    phases = found(config).phases
    predicted: dict[tuple[str, ...], int] = {(p.player, p.name): p.peak for p in phases}
    assert {("generator", "backward"), ("critic", "rollout")} <= taken.keys() & predicted.keys()
    for name in taken.keys() & predicted.keys():
        assert predicted[name] == pytest.approx(taken[name], rel=0.1), name


@pytest.mark.long
def test_layers_in_proportion() -> None:
    """One and two of six layers say what all take."""
    config = planned_config(shapes())
    whole = measured(config, planned_setup(config), 1, 1, 6, 6)
    for phase, all_layers in zip(found(config).phases, whole.phases, strict=True):
        assert phase.peak == pytest.approx(all_layers.peak, rel=0.01), phase.name
        assert phase.flops == pytest.approx(all_layers.flops, rel=1e-3), phase.name
