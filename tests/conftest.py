"""Fixtures that several test modules share."""

import gc
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.tiny_models import write_tiny_text_encoder, write_tiny_vae
from tests.tiny_pipeline import TINY_DIT, random_dit, write_config, write_dit_folder

# Rounding depends on the number of threads; one is fastest for tiny networks anyway.
torch.set_num_threads(1)
# Commands that tests start are this checkout's, wherever the environment's installation points.
os.environ["PYTHONPATH"] = str(Path(__file__).resolve().parent.parent)


@dataclass(frozen=True)
class TinyWorld:
    """A synthetic model folder in the official layout, a distilled checkpoint, a config."""

    config: Path
    checkpoint: Path
    folder: Path


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    root = tmp_path_factory.mktemp("world")
    folder = root / "wan_models" / "Tiny"
    write_dit_folder(folder, TINY_DIT, random_dit(seed=1).state_dict())
    write_tiny_vae(folder / "Wan2.1_VAE.pth")
    write_tiny_text_encoder(folder, dim=TINY_DIT["text_dim"])
    distilled = {
        name: {f"model.{key}": value for key, value in random_dit(seed).state_dict().items()}
        for seed, name in enumerate(("generator", "generator_ema", "critic"), start=2)
    }
    torch.save(distilled, root / "distilled.pt")
    config = write_config(
        root / "rolling_forcing_tiny.yaml",
        model_root=str(root / "wan_models"),
        generator_name="Tiny",
        height=32,
        width=48,
        denoising_step_list=[1000, 800, 600, 400, 200],
        warp_denoising_step=True,
    )
    return TinyWorld(config, root / "distilled.pt", folder)


def pytest_collection_finish() -> None:
    """What was imported stays: the collector need not walk it again and again."""
    gc.collect()
    gc.freeze()
