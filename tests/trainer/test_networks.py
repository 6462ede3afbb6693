"""In what the networks of a run compute."""

from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor

import wan.folders
from pipeline.setup import Setup
from tests.tiny_training import TrainingWorld, train
from trainer.networks import build_trained_vae, compute_dtype
from trainer.sharding import open_world
from wan.vae import WanVAE
from wan.vae_layers import put_channels_together

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx512_f": True, "avx512_bf16": True}, torch.bfloat16),
        ({"avx512_bf16": False, "amx_bf16": True}, torch.bfloat16),
        ({"neon": True, "bf16": True}, torch.bfloat16),
        ({"avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, None),
        ({}, None),
    ],
)
def test_precision_that_suits_the_processor(
    capabilities: dict[str, bool],
    expected: torch.dtype | None,
    training_world: TrainingWorld,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`null` goes by what the processor can; true and false do not ask it."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    folder = training_world.prompts.parent
    choices = {None: expected, True: torch.bfloat16, False: None}
    for mixed, dtype in choices.items():
        config = training_world.config(folder, mixed_precision=mixed)
        assert compute_dtype(config, CPU) is dtype


def test_precision_where_the_processor_cannot_be_asked(
    training_world: TrainingWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    config = training_world.config(training_world.prompts.parent, mixed_precision=None)
    assert compute_dtype(config, CPU) is None


def test_a_training_reads_each_model_folder_once(
    training_world: TrainingWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The student's was read up to eight times."""
    read: list[str] = []
    real = wan.folders.load_dit_config
    monkeypatch.setattr(
        wan.folders, "load_dit_config", lambda path: read.append(path.name) or real(path)
    )
    train(training_world.config(tmp_path, max_steps=1), tmp_path / "run", save=False)
    assert sorted(read) == ["Critic", "Student", "Teacher"]


@pytest.mark.slow
def test_a_vae_whose_channels_lie_together_can_be_sharded(
    training_world: TrainingWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where no VAE could be trained by two ranks, or in 16 bits."""
    monkeypatch.setattr(WanVAE, "_lay_out", lambda vae: put_channels_together(vae.model))
    config = training_world.config(tmp_path, **training_world.vae(), mixed_precision=True)
    with open_world("cpu") as world:
        module = build_trained_vae(config, Setup.of(config), world)
    assert any(isinstance(weight, DTensor) for weight in module.parameters())
