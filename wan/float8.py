"""Eight bits instead of sixteen (e4m3): keys and values that are kept, and linear layers.

A number in e4m3 has three bits behind its first and reaches from 2^-9 to 448. Neither use is exact:
`pipeline/quality.py` measures what it does to a video.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.errors import UserError

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
SCALED = 256.0
"""The largest value of a scaled row. A power of two: scaling back is exact, and nothing overflows
in float16. What it leaves of the range up to 448 is less than one bit of 17."""
NATIVE = (8, 9)  # compute capability of the first GPUs that multiply in e4m3
DIVISOR = 16  # of both sides of a matrix there


# --- bytes ---------------------------------------------------------------------------------------


def to_bytes(x: Tensor) -> Tensor:
    """Values in e4m3 as uint8, which every device can index. Larger ones than 448 become 448."""
    return x.clamp(-LARGEST, LARGEST).to(E4M3).view(torch.uint8)


def from_bytes(kept: Tensor, dtype: torch.dtype) -> Tensor:
    """What `to_bytes` kept, in `dtype`."""
    return kept.view(E4M3).to(dtype)


# --- linear layers -------------------------------------------------------------------------------


class Float8Linear(nn.Module):
    """A linear layer with weights in e4m3, and inputs that are brought to it row by row.

    With a the largest absolute value of a row of x, and b that of a row of the weights,

        y = a b (x / a)(w / b)^T + bias,        both quotients in e4m3.

    A GPU from compute capability 8.9 on multiplies in e4m3; elsewhere the same numbers are
    multiplied in the dtype of x, which saves memory and no time. The scales are applied outside of
    the product: in it, those of rows fail on capability 12.0 (pytorch#192707).
    """

    weight: Tensor
    largest: Tensor
    unit: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        """Takes over the weights of `linear`, on their device and for inputs of their dtype."""
        super().__init__()
        weight = linear.weight.detach()
        scaled, largest = scaled_rows(weight)
        self.register_buffer("weight", scaled)  # [out, in], e4m3
        self.register_buffer("largest", largest.squeeze(-1))  # [out]
        self.register_buffer("unit", torch.tensor(1 / SCALED, device=weight.device))
        self.bias = linear.bias
        self.native = multiplies_in_float8(weight.device) and not any(
            side % DIVISOR for side in weight.shape
        )

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in] -> [..., out]`."""
        scaled, largest = scaled_rows(x.flatten(0, -2))
        y = self._product(scaled, x.dtype).mul_(largest).mul_(self.largest)
        if self.bias is not None:
            y = y.add_(self.bias)
        return y.unflatten(0, x.shape[:-1])

    def _product(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """`[n, in] -> [n, out]` of rows with largest value 1."""
        if self.native:
            return torch._scaled_mm(
                x, self.weight.t(), self.unit, self.unit, out_dtype=dtype, use_fast_accum=True
            )
        return F.linear(x.to(dtype).div_(SCALED), self.weight.to(dtype).div_(SCALED))


def scaled_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of `[n, k]` in e4m3 with largest value 256, and what that was before: `[n, 1]`."""
    largest = x.abs().amax(dim=-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
    return (x / largest).mul_(SCALED).to(E4M3), largest


def multiplies_in_float8(device: torch.device) -> bool:
    """Whether a device has instructions for it."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= NATIVE


def check_compiled_float8(device: torch.device) -> None:
    """UserError for a GPU for which no code with e4m3 can be compiled."""
    if device.type == "cuda" and not multiplies_in_float8(device):
        raise UserError(
            "compile=true with kv_cache_dtype=float8 needs a GPU of compute capability 8.9 or "
            "higher; set compile=false"
        )


def use_float8(blocks: nn.ModuleList) -> None:
    """Put every linear layer of transformer blocks into e4m3, one after the other.

    Queries, keys, values and outputs of both attentions, and the feed-forward layers: 98 % of the
    weights of Wan2.1 1.3B. Embeddings, modulation, norms and the head are not in the blocks.
    """
    for part in list(blocks.modules()):
        for name, layer in list(part.named_children()):
            if isinstance(layer, nn.Linear):
                part.add_module(name, cast(nn.Module, Float8Linear(layer)))
