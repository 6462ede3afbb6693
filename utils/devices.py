"""Devices and number types: what was asked for, and what there is; copies to and from them."""

import gc
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.errors import UserError

logger = logging.getLogger(__name__)


def choose_device(name: str) -> torch.device:
    """`auto` is the first GPU if there is one; UserError if the device is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device '{name}' is unknown; use cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device '{name}' is not supported; use cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device {name} was asked for but there is no GPU here; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {name} does not exist: there are {torch.cuda.device_count()} GPUs")
    return device


def device_name(device: str) -> str:
    """A device in words, for what was measured on it."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(torch.device(device))
    return f"cpu ({torch.get_num_threads()} threads)"


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on a GPU and float32 elsewhere; UserError for float16 on a CPU."""
    if name == "float16" and device.type == "cpu":
        raise UserError("dtype float16 needs a GPU; use bfloat16 or float32 on the CPU")
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)


def computed_dtype(dtype: str, device: str) -> torch.dtype:
    """What is computed in on this machine, where these are asked for."""
    return choose_dtype(dtype, choose_device(device))


def choose_decoding_dtype(name: str, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What the VAE decodes in; `auto` is `dtype`, that of the generator.

    It is float32 where convolutions over time in 16 bits are at fault. That is said, as is a choice
    that is slow on the device.
    """
    chosen = dtype if name == "auto" else getattr(torch, name)
    if name == "bfloat16" and not computes_in_bf16(device):
        logger.warning("vae_dtype=bfloat16 is slower than float32 on this machine")
    fault = None
    if device.type == "cuda" and chosen.itemsize == 2:
        fault = convolution_fault(torch.__version__, torch.backends.cudnn.version())
    if fault is None:
        return chosen
    if name == "auto":
        logger.warning("%s: the VAE decodes in float32, which is slower", fault)
        return torch.float32
    logger.warning("%s: vae_dtype=float32 is safe", fault)
    return chosen


def convolution_fault(torch_version: str, cudnn: int | None) -> str | None:
    """What these versions do wrong in 3D convolutions of 16 bits, and which do not; None: nothing.

    `cudnn` as `torch.backends.cudnn.version()` says it (pytorch issues 163539 and 166643).
    """
    if torch_version.partition("+")[0] == "2.9.0":
        return "torch 2.9.0 has no fast bfloat16 convolution over time (2.9.1 has)"
    if cudnn is not None and 90800 <= cudnn < 91500:
        version = f"{cudnn // 10000}.{cudnn // 100 % 100}.{cudnn % 100}"
        return f"cuDNN {version} computes bfloat16 convolutions over time wrongly (9.15 does not)"
    return None


def choose_merging(wish: bool | None, device: torch.device) -> bool:
    """Whether clean passes share a forward with the window behind them; None: on a CPU."""
    return device.type == "cpu" if wish is None else wish


def free_bytes(device: torch.device) -> int:
    """Free memory of a GPU, or of the machine."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    about = Path("/proc/meminfo")
    for line in about.read_text().splitlines() if about.is_file() else ():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 4 * 2**30  # where nobody tells


def release_memory() -> None:
    """Give back what is no longer referred to, and what PyTorch keeps of it for later."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ended: of a GPU, or of the machine."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def to_device(values: Tensor, device: torch.device | str) -> Tensor:
    """`values` on `device`; of a GPU the host does not wait for it."""
    if torch.device(device).type != "cuda" or values.device.type != "cpu":
        return values.to(device)
    return values.contiguous().pin_memory().to(device, non_blocking=True)


def to_host(*tensors: Tensor) -> tuple[Tensor, ...]:
    """All of them on the CPU, where the host waits for a GPU once."""
    if tensors[0].device.type != "cuda":
        return tuple(x.cpu() for x in tensors)
    copies = tuple(x.to("cpu", non_blocking=True) for x in tensors)  # into pinned memory
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(tensors[0].device))
    copied.synchronize()
    return copies


def computes_in_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for bfloat16: without them it is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    capabilities: Callable[[], Mapping[str, Any]] = getattr(torch.cpu, "get_capabilities", dict)
    known = capabilities()  # empty before torch 2.12, which cannot tell
    return any(known.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
