"""Eight bits: what is lost, that nothing becomes NaN, that a GPU multiplies as is emulated."""

import pytest
import torch
from torch import Tensor, nn

from tests.tiny_pipeline import random_dit
from utils.errors import UserError
from wan import float8
from wan.float8 import (
    Float8Linear,
    check_compiled_float8,
    from_bytes,
    scaled_rows,
    to_bytes,
    use_float8,
)


def random_layer(
    inside: int = 64, outside: int = 32, dtype: torch.dtype = torch.float32
) -> nn.Linear:
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(inside, outside).requires_grad_(False)
    layer.weight.copy_(torch.randn(outside, inside, generator=generator))
    layer.weight[:4] *= 30  # rows differ in size, as channels do
    return layer.to(dtype)


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(1))
    return (x * torch.tensor([1.0, 1e-2, 30.0])[:, None]).to(dtype)  # tokens differ, too


def error(found: Tensor, exact: Tensor) -> float:
    """Relative error of the row where it is largest."""
    return ((found - exact).norm(dim=-1) / exact.norm(dim=-1)).max().item()


def test_kept_values_are_the_nearest_in_e4m3() -> None:
    x = torch.tensor([0.0, -1.0, 1.0625, 1.07, 2.0**-9, 448.0, 450.0, -1e9])
    kept = to_bytes(x)
    assert kept.dtype == torch.uint8
    assert from_bytes(kept, torch.float32).tolist() == [0, -1, 1, 1.125, 2**-9, 448, 448, -448]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_linear_layer(dtype: torch.dtype) -> None:
    """Large and small rows lose equally much: one scale for all would lose the small ones."""
    layer, x = random_layer(dtype=torch.float32), inputs()
    exact, found = layer(x), Float8Linear(layer.to(dtype))(x.to(dtype))
    assert found.dtype == dtype
    assert found.shape == exact.shape
    assert 0.005 < error(found.float(), exact) < 0.06
    small, large = (
        error(found.float()[..., rows], exact[..., rows]) for rows in (slice(4, 32), slice(4))
    )
    assert max(small, large) < 0.08


def test_a_row_of_zeros_stays_one() -> None:
    """0 / 0 would be NaN in all of a video that begins with padding."""
    scaled, _ = scaled_rows(torch.zeros(2, 16))
    assert not scaled.float().any()
    layer = random_layer()
    assert torch.equal(Float8Linear(layer)(torch.zeros(1, 64)), layer.bias[None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_emulated_product_is_the_native_one(dtype: torch.dtype) -> None:
    """PyTorch has the instruction of the GPU for the CPU as well; sums differ in their order."""
    layer = Float8Linear(random_layer(dtype=dtype))
    x = inputs(dtype)
    assert not layer.native
    emulated = layer(x)
    layer.native = True
    assert error(layer(x).float(), emulated.float()) < (1e-5 if dtype == torch.float32 else 0.02)


def test_all_matrices_of_the_blocks_and_no_others() -> None:
    dit = random_dit(seed=3)
    names = [name for name, part in dit.named_modules() if isinstance(part, nn.Linear)]
    before = {name for name in names if name.startswith("blocks.")}
    weights = sum(dit.get_submodule(name).weight.nbytes for name in before)
    use_float8(dit.blocks)
    assert {name for name, part in dit.named_modules() if isinstance(part, Float8Linear)} == before
    kept = [part.weight for part in dit.modules() if isinstance(part, Float8Linear)]
    assert 4 * sum(weight.nbytes for weight in kept) == weights  # 1 byte of 4
    assert len(before) == 2 * 10
    assert {"time_projection.1", "head.head"} <= set(names) - before


def test_a_gpu_for_which_no_code_can_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """On an RTX 3060, the usual card of 12 GB, Triton fails in the middle of the first video."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 6))
    assert not float8.multiplies_in_float8(torch.device("cuda"))
    with pytest.raises(UserError, match="compile=false"):
        check_compiled_float8(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 9))
    check_compiled_float8(torch.device("cuda"))
