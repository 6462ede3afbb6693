"""Rotary position embedding of Wan2.1 (RoFormer, arXiv 2104.09864, eq. 34) in real arithmetic.

A head's channels are split into time, height and width parts. Angles are computed in float64 from
integer positions, so there is no table and no last position; only the cosines and sines reach the
network, in float32.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from utils.devices import to_device

THETA = 10_000.0


class Rotation(NamedTuple):
    """Cosines and sines of one angle per token and channel pair: `[tokens, head_dim / 2]` each."""

    cos: Tensor
    sin: Tensor


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
) -> Rotation:
    """Rotation of the tokens of frames at the temporal positions `frames` (pure; memoised).

    Tokens are in the order (frame, row, column). In a steady-state window positions never change,
    so the same two tensors serve for ever, in training too if they were made for inference.
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

    return Rotation(table([p.cos() for p in parts]), table([p.sin() for p in parts]))


def apply_rope(x: Tensor, by: Rotation) -> Tensor:
    """Rotate each channel pair of `x` `[B, tokens, heads, head_dim]` by its token's angle."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # [B, L, H, D/2] each
    cos, sin = by.cos[:, None], by.sin[:, None]  # [L, 1, D/2]
    rotated = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return rotated.flatten(-2).to(x.dtype)
