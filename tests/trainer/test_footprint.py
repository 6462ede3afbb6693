"""What a step takes in memory, found without memory, against steps that were made."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.tiny_training import TrainingWorld
from trainer import estimate
from trainer.estimate import GIB, card_lines, planned_setup
from trainer.footprint import (
    Footprint,
    MemoryTimer,
    Phase,
    footprint,
    heaviest_updates,
    measured,
)
from trainer.live_memory import LiveMemory
from trainer.networks import sizes_of
from trainer.planned import planned_config
from trainer.sharding import open_world
from trainer.timing import opened, timed_config
from utils.config import Config, load_config
from wan.checkpoints import empty_dit

ROOT = Path(__file__).parents[2]


def shapes(**changes: object) -> Config:
    """The distillation of the shapes world, an update of each network in every step."""
    given = [f"{key}={value}" for key, value in changes.items()]
    overrides = ["device=cpu", "batch_size=1", "total_batch_size=1", "dfake_gen_update_ratio=1"]
    path = ROOT / "configs" / "shapes" / "rolling_forcing.yaml"
    config = load_config(path, [*overrides, "mixed_precision=false", *given])
    return timed_config(replace(config, text_embeddings="stored"))


def found(config: Config) -> Footprint:
    return footprint(config, planned_setup(config), 1, 1)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": True}])
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


@pytest.mark.slow
def test_layers_in_proportion() -> None:
    """One and two of six layers say what all take."""
    config = planned_config(shapes())
    whole = measured(config, planned_setup(config), 1, 1, 6, 6)
    for phase, all_layers in zip(found(config).phases, whole.phases, strict=True):
        assert phase.peak == pytest.approx(all_layers.peak, rel=0.01), phase.name
        assert phase.flops == pytest.approx(all_layers.flops, rel=1e-3), phase.name


def test_what_a_rank_holds(training_world: TrainingWorld, tmp_path: Path) -> None:
    """Weights, two moments and average, each of two ranks its share of them."""
    config = training_world.config(tmp_path, sharding_strategy="full", ema_start_step=0)
    phases = footprint(config, planned_setup(config), 2, 2).phases
    held = max(phases, key=lambda phase: phase.peak)
    size = {
        name: 4 * sum(p.numel() for p in empty_dit(sizes_of(config, name)).parameters()) / 2
        for name in ("Student", "Teacher", "Critic")
    }
    expected = {
        "student": size["Student"],
        "teacher": size["Teacher"],
        "critic": size["Critic"],
        "average": size["Student"],
        "optimiser": 2 * (size["Student"] + size["Critic"]),
    }
    for part, bytes_of_it in expected.items():  # shards of unequal size are padded
        assert held.parts[part] == pytest.approx(bytes_of_it, rel=0.02), part
    assert any(phase.parts.get("KV cache", 0) > 0 for phase in phases)


def test_what_does_not_fit_says_what_would(monkeypatch: pytest.MonkeyPatch) -> None:
    """The advice was the same sentence for all; now every key is tried."""
    config = load_config(
        ROOT / "configs" / "rolling_forcing_dmd.yaml", ["gradient_checkpointing=false"]
    )

    def predicted(config: Config, *_: object) -> Footprint:
        size = 40 if config.gradient_checkpointing else 100
        saved = 6 if config.text_encoder_device == "cpu" else 0
        return Footprint((Phase("", "", {"all": (size - saved) * GIB}, 1),), {}, {})

    monkeypatch.setattr(estimate, "footprint", predicted)
    setup, plain = planned_setup(config), predicted(config)
    lines = card_lines(config, setup, plain, 80, 8, 8)
    assert lines[0].startswith("does not fit: 106.5 of 74.5 GiB")
    assert [line.split(":")[0].strip() for line in lines[1:]] == [
        "text_encoder_device=cpu",
        "gradient_checkpointing=true",
    ]
    assert lines[-1].endswith("43.5 GiB, fits")
    assert card_lines(config, setup, plain, 40, 8, 8)[-1].startswith("  all of these: 37.2 GiB")
    (line,) = card_lines(config, setup, plain, 141, 8, 8)
    assert line.startswith("fits")


@pytest.mark.parametrize("kind", ["ode", "flow", "consistency"])
def test_every_objective_has_its_phases(
    kind: str, training_world: TrainingWorld, tmp_path: Path
) -> None:
    config = training_world.config(tmp_path, **getattr(training_world, kind)())
    phases = footprint(config, planned_setup(config), 2, 2).phases
    assert {"text", "forward", "backward", "optimiser"} <= {phase.name for phase in phases}
    assert all(phase.peak > 0 for phase in phases)
