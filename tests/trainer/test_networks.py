"""In what the networks of a run compute."""

import pytest
import torch

from tests.tiny_training import TrainingWorld
from trainer.networks import compute_dtype

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
