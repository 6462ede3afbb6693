"""Scaled dot-product attention for self- and cross-attention: one function, several kernels.

The kernel is chosen by compute capability, dtype and what is installed, never by a device's name.
"""

import importlib.util
from collections.abc import Callable
from functools import lru_cache
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from utils.errors import UserError

Backend = Literal["auto", "flash3", "cudnn", "flash2", "sdpa"]
MAX_EXPLICIT_SCORES = 2**22  # of one sample: 8 MiB in bf16
FLASH_FIRST = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
CUDNN_FIRST = [SDPBackend.CUDNN_ATTENTION, *FLASH_FIRST]


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, backend: Backend = "auto"
) -> Tensor:
    """Softmax attention: q `[B, Lq, heads, head_dim]`, k and v `[B, Lk, heads, head_dim]` -> q.

    `mask` is boolean, broadcastable to `[B, heads, Lq, Lk]`, True where a query sees a key; it is
    served by SDPA whatever the backend.
    """
    if mask is not None:
        return _sdpa(q, k, v, mask)
    return _KERNELS[chosen_backend(backend, q.device, q.dtype)](q, k, v)


def chosen_backend(backend: Backend, device: torch.device, dtype: torch.dtype) -> Backend:
    """`backend`, with `auto` replaced by what it stands for here."""
    return best_backend(device, dtype) if backend == "auto" else backend


def best_backend(device: torch.device, dtype: torch.dtype) -> Backend:
    """The fastest kernel this device can run for this dtype.

    cuDNN's is the faster one on capability 9 alone; PyTorch's own choice may be it elsewhere, too.
    """
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return "sdpa"
    capability = torch.cuda.get_device_capability(device)
    if capability[0] == 9 and _installed("flash_attn_interface"):
        return "flash3"
    if capability[0] == 9 and torch.backends.cudnn.is_available():
        return "cudnn"
    if capability >= (8, 0) and _installed("flash_attn"):
        return "flash2"
    return "sdpa"


def check_backend(backend: str, device: torch.device, dtype: torch.dtype) -> Backend:
    """Return `backend` if it can run here, else raise UserError saying why."""
    if backend not in get_args(Backend):
        raise UserError(
            f"attention_backend={backend} is unknown; choose one of {', '.join(get_args(Backend))}"
        )
    if backend in ("auto", "sdpa"):
        return backend  # type: ignore[return-value]
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        raise UserError(
            f"attention_backend={backend} needs a CUDA device and bf16 or fp16, not {device.type} "
            f"with {str(dtype).removeprefix('torch.')}; use attention_backend=auto"
        )
    package = {"flash3": "flash_attn_interface", "flash2": "flash_attn"}.get(backend)
    if package and not _installed(package):
        raise UserError(
            f"attention_backend={backend} needs the package {package}; "
            "install it or use attention_backend=auto"
        )
    capability = torch.cuda.get_device_capability(device)
    if backend == "flash3" and capability[0] != 9:
        raise UserError("attention_backend=flash3 needs compute capability 9.x; use auto")
    if capability < (8, 0):
        raise UserError(f"attention_backend={backend} needs compute capability 8.0; use auto")
    return backend  # type: ignore[return-value]


@lru_cache
def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    order: list[SDPBackend] = FLASH_FIRST,
) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, L, D]
    scores = q.shape[1] * q.shape[2] * k.shape[2]
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and scores <= MAX_EXPLICIT_SCORES:
        return _explicit(q, k, v, mask).transpose(1, 2)
    if q.device.type != "cuda":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
    with sdpa_kernel(order, set_priority=True):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def _explicit(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax attention of `[B, H, L, D]` written out, with scores rounded to the dtype of `q`.

    With the bf16 instructions of a CPU (AVX512_BF16) this is 1.7 to 7 times as fast, backward pass
    included, as PyTorch's fused kernel, which multiplies in fp32. On other CPUs bf16 is slow
    whatever is done with it.
    """
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(dim=-1) @ v


def _cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _sdpa(q, k, v, order=CUDNN_FIRST)


def _flash2(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn import flash_attn_func

    return flash_attn_func(q, k, v)


def _flash3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn_interface import flash_attn_func

    out = flash_attn_func(q, k, v)
    return out[0] if isinstance(out, tuple) else out  # early releases return (out, lse)


_KERNELS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "flash3": _flash3,
    "cudnn": _cudnn,
    "flash2": _flash2,
    "sdpa": _sdpa,
}
