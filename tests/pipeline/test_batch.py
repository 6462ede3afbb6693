"""What a finished video is recognised by."""

import shutil
from pathlib import Path

import pytest
import torch

from pipeline.records import model_settings
from pipeline.setup import Setup
from tests.conftest import TinyWorld
from tests.tiny_models import write_tiny_vae
from utils.config import load_config


def settings(world: TinyWorld, *overrides: str, checkpoint: Path | None = None) -> dict[str, str]:
    config = load_config(world.config, overrides)
    return model_settings(Setup.of(config), checkpoint or world.checkpoint, use_ema=False)


@pytest.mark.parametrize(
    "override",
    [
        *("lr=1.0", "real_name=Other", "rolling_probability=1", "num_train_timestep=500"),
        *("device=cpu", "compile=true", "dtype=float32", "seed=9", "num_samples=2"),
        "method=rolling_forcing",
    ],
)
def test_what_only_training_reads_changes_no_video(tiny_world: TinyWorld, override: str) -> None:
    assert settings(tiny_world, override) == settings(tiny_world)


@pytest.mark.parametrize(
    "override",
    ["model_kwargs.sink_size=0", "context_noise=5", "height=64", "fps=8", "dtype=bfloat16"],
)
def test_what_sampling_reads_makes_another_video(tiny_world: TinyWorld, override: str) -> None:
    assert settings(tiny_world, override) != settings(tiny_world)


def test_the_dtype_that_is_computed_in_counts(
    tiny_world: TinyWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`dtype: auto` is another one on another machine: its videos were taken for the same."""
    before = settings(tiny_world)
    monkeypatch.setattr("pipeline.setup.computed_dtype", lambda dtype, device: torch.bfloat16)
    assert settings(tiny_world) != before


def test_other_weights_make_another_video(tiny_world: TinyWorld, tmp_path: Path) -> None:
    before = settings(tiny_world)
    other = tmp_path / "other.pt"
    torch.save({"generator": {"a": torch.zeros(1)}}, other)
    assert settings(tiny_world, checkpoint=other) != before
    shutil.copytree(tiny_world.folder, tmp_path / "models" / tiny_world.folder.name)
    moved = f"model_root={tmp_path / 'models'}"
    assert settings(tiny_world, moved) == before, "the same weights in another place"
    write_tiny_vae(tmp_path / "models" / tiny_world.folder.name / "Wan2.1_VAE.pth", seed=5)
    assert settings(tiny_world, moved) != before
