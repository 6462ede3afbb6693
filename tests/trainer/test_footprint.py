"""What a rank holds and what would fit; tests/shapes has steps that were made."""

from pathlib import Path

import pytest

from tests.tiny_training import TrainingWorld
from trainer import estimate
from trainer.estimate import GIB, card_lines, planned_setup
from trainer.footprint import (
    Footprint,
    Phase,
    footprint,
)
from trainer.networks import sizes_of
from utils.config import Config, load_config
from wan.checkpoints import empty_dit

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
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


@pytest.mark.slow
def test_what_a_step_takes_behind_a_long_warm_up(
    training_world: TrainingWorld, tmp_path: Path
) -> None:
    """The generator's updates were looked for in the first steps, where there may be none."""
    changes = {"critic_warmup_steps": 1001, "max_steps": 2000, "dfake_gen_update_ratio": 2}
    config = training_world.config(tmp_path, **changes)
    found = footprint(config, planned_setup(config), 1, 1)
    assert found.updates == {"generator": 0.5, "critic": 1.0}
    assert all(sum(phases.values()) > 0 for phases in found.flops.values())


@pytest.mark.parametrize("kind", ["ode", "flow", "consistency"])
def test_every_objective_has_its_phases(
    kind: str, training_world: TrainingWorld, tmp_path: Path
) -> None:
    config = training_world.config(tmp_path, **getattr(training_world, kind)())
    phases = footprint(config, planned_setup(config), 2, 2).phases
    assert {"text", "forward", "backward", "optimiser"} <= {phase.name for phase in phases}
    assert all(phase.peak > 0 for phase in phases)
