"""Rotary positions: against complex numbers, under shifts, and far out."""

import cmath
import itertools

import pytest
import torch
from torch import Tensor

from wan.rope import THETA, _product, _real_product, apply_rope, axis_dims, rotation

CPU = torch.device("cpu")
GRID = (3, 4)


def complex_reference(x: Tensor, frames: tuple[int, ...], grid: tuple[int, int]) -> Tensor:
    """RoPE by multiplication with unit complex numbers, token by token."""
    dims = axis_dims(x.shape[-1])
    out = torch.zeros(x.shape, dtype=torch.complex128)[..., ::2]
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    for token, places in enumerate(itertools.product(frames, range(grid[0]), range(grid[1]))):
        turns = [
            cmath.exp(1j * place * THETA ** (-2 * i / dim))
            for place, dim in zip(places, dims, strict=True)
            for i in range(dim // 2)
        ]
        out[:, token] = pairs[:, token] * torch.tensor(turns, dtype=torch.complex128)
    return torch.view_as_real(out).flatten(-2)


def some_heads(frames: int, head_dim: int, grid: tuple[int, int] = GRID, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, frames * grid[0] * grid[1], 3, head_dim, generator=generator)


@pytest.mark.parametrize("head_dim", [12, 16, 24, 64, 128])
@pytest.mark.parametrize("frames", [(0, 1, 2), (0, 5, 6, 1000)])
def test_equals_complex_multiplication(head_dim: int, frames: tuple[int, ...]) -> None:
    x = some_heads(len(frames), head_dim)
    ours = apply_rope(x, rotation(frames, GRID, head_dim, CPU))
    expected = complex_reference(x, frames, GRID).float()
    torch.testing.assert_close(ours, expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    ("head_dim", "dims"),
    [(128, (44, 42, 42)), (64, (24, 20, 20)), (24, (8, 8, 8)), (16, (8, 4, 4))],
)
def test_channels_are_split_as_published(head_dim: int, dims: tuple[int, int, int]) -> None:
    assert axis_dims(head_dim) == dims


def scores(q: Tensor, k: Tensor, frames: tuple[int, ...]) -> Tensor:
    turn = rotation(frames, GRID, q.shape[-1], CPU)
    return torch.einsum("bqhd,bkhd->bhqk", apply_rope(q, turn), apply_rope(k, turn))


@pytest.mark.parametrize("shift", [1, 21, 1024, 10**6])
def test_shifting_all_positions_changes_no_score(shift: int) -> None:
    """Also far beyond 1,024 positions, where a table would end."""
    q, k = some_heads(4, 24), some_heads(4, 24, seed=1)
    near = scores(q, k, (0, 1, 2, 7))
    far = scores(q, k, tuple(frame + shift for frame in (0, 1, 2, 7)))
    torch.testing.assert_close(far, near, atol=3e-5, rtol=0)
    assert (scores(q, k, (0, 1, 2, 8)) - near).abs().max() > 1e-2


def test_far_positions_are_exact() -> None:
    """Angles in float32 would be off by 0.03 at position 10**6."""
    frames = (10**6, 10**6 + 1)
    x = some_heads(2, 24)
    ours = apply_rope(x, rotation(frames, GRID, 24, CPU))
    expected = complex_reference(x, frames, GRID).float()
    torch.testing.assert_close(ours, expected, atol=2e-6, rtol=0)


def test_keeps_lengths_and_dtype() -> None:
    x = some_heads(2, 16)
    turn = rotation((3, 9), GRID, 16, CPU)
    torch.testing.assert_close(apply_rope(x, turn).norm(dim=-1), x.norm(dim=-1))
    assert apply_rope(x.bfloat16(), turn).dtype == torch.bfloat16


def test_tables_are_memoised_for_steady_states() -> None:
    first = rotation((0, 1), GRID, 16, CPU)
    assert rotation((0, 1), GRID, 16, CPU) is first
    assert first.shape == (2 * GRID[0] * GRID[1], 8, 2)
    assert first.dtype == torch.float32


@pytest.mark.parametrize("head_dim", [32, 128])
def test_the_form_for_compilers_is_the_same_to_the_last_bit(head_dim: int) -> None:
    """At the sizes of the shapes and Wan2.1 models, whose rows fill whole vectors of a CPU."""
    turn = rotation((0, 7), GRID, head_dim, CPU)[:, None]
    x, again = (some_heads(2, head_dim).unflatten(-1, (-1, 2)).requires_grad_() for _ in range(2))
    ours, real = _product(x, turn), torch.stack(_real_product(again, turn), dim=-1)
    assert torch.equal(ours, real)
    weights = torch.randn_like(real)
    ours.backward(weights)
    real.backward(weights)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, again.grad, atol=1e-6, rtol=0)


def test_compiled_code_is_real() -> None:
    """Inductor runs complex products unfused."""
    x, turn = some_heads(2, 16), rotation((0, 1), GRID, 16, CPU)
    graphs: list[str] = []

    def look(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph.code)
        return graph

    compiled = torch.compile(apply_rope, backend=look)
    torch.testing.assert_close(compiled(x, turn), apply_rope(x, turn), atol=1e-6, rtol=0)
    assert len(graphs) == 1
    assert "complex" not in graphs[0]


def test_tables_made_in_inference_mode_serve_training() -> None:
    """Memoised tables outlive the mode they were made in; autograd refuses inference tensors."""
    with torch.inference_mode():
        rotation((2, 4, 77), GRID, 16, CPU)
    x = some_heads(3, 16).requires_grad_(True)
    apply_rope(x, rotation((2, 4, 77), GRID, 16, CPU)).sum().backward()
    assert x.grad is not None
