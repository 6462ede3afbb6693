"""Rotary position embedding of Wan2.1 (RoFormer, arXiv 2104.09864, eq. 34).

A head's channels are split into time, height and width parts. Angles are computed in float64 from
integer positions, so there is no table and no last position; only the cosines and sines reach the
network, in float32.
"""

from functools import lru_cache

import torch
from torch import Tensor

from utils.devices import to_device

THETA = 10_000.0


def axis_dims(head_dim: int) -> tuple[int, int, int]:
    """Channels of a head that carry time, height and width."""
    spatial = 2 * (head_dim // 6)
    return head_dim - 2 * spatial, spatial, spatial


def axis_angles(positions: Tensor, dim: int) -> Tensor:
    """Angles `positions * theta^(-2i/dim)`, float64: `[n] -> [n, dim / 2]`."""
    exponents = torch.arange(0, dim, 2, dtype=torch.float64) / dim
    return positions.to(torch.float64)[:, None] * THETA**-exponents


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def rotation(
    frames: tuple[int, ...], grid: tuple[int, int], head_dim: int, device: torch.device
) -> Tensor:
    """Cosine and sine per token and channel pair, `[tokens, head_dim / 2, 2]` (pure; memoised).

    Tokens are those of frames at the temporal positions `frames`, in the order (frame, row,
    column). In a steady-state window positions never change, so the same tensor serves for ever, in
    training too if it was made for inference.
    """
    rows, columns = grid
    dims = axis_dims(head_dim)
    axes = [torch.tensor(frames, dtype=torch.float64), torch.arange(rows), torch.arange(columns)]
    parts = [axis_angles(positions, dim) for positions, dim in zip(axes, dims, strict=True)]

    def table(values: list[Tensor]) -> Tensor:
        full = (len(frames), rows, columns, -1)
        time, height, width = (to_device(value.to(torch.float32), device) for value in values)
        joined = torch.cat(
            [
                time[:, None, None].expand(full),
                height[None, :, None].expand(full),
                width[None, None, :].expand(full),
            ],
            dim=-1,
        )
        return joined.flatten(0, 2)  # [F*h*w, head_dim/2]

    return torch.stack([table([p.cos() for p in parts]), table([p.sin() for p in parts])], dim=-1)


def apply_rope(x: Tensor, by: Tensor) -> Tensor:
    """Rotate each channel pair of `x` `[B, tokens, heads, head_dim]` by its token's angle.

    `by`: see `rotation`. Pairs are multiplied as complex numbers, in a sixth of the time of the
    real form on a CPU; that one is for compilers, which fuse it and do not fuse complex numbers.
    The two differ at most by the rounding of a fused multiply-add.
    """
    pairs = x.float().unflatten(-1, (-1, 2))  # [B, L, H, D/2, 2]
    by = by[:, None]  # [L, 1, D/2, 2]
    if torch.compiler.is_compiling():
        turned = torch.stack([part.to(x.dtype) for part in _real_product(pairs, by)], dim=-1)
    else:
        turned = _product(pairs, by)
    return turned.flatten(-2).to(x.dtype)


def _product(x: Tensor, y: Tensor) -> Tensor:
    """Complex product of pairs `[..., 2]`."""
    return torch.view_as_real(torch.view_as_complex(x) * torch.view_as_complex(y))


def _real_product(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The same in real arithmetic: its real and imaginary parts `[...]`."""
    (even, odd), (cos, sin) = x.unbind(-1), y.unbind(-1)
    return even * cos - odd * sin, even * sin + odd * cos
