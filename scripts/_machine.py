"""What figures were measured on: device, driver, clocks, versions, commit, kernels that ran."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from pipeline.stream import Stream

ASKED_OF_THE_DRIVER = (
    "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu"
)
ATTENTION = re.compile(r"attention|attn|fmha|flash|sdpa", re.IGNORECASE)
DISPATCHER = "aten::scaled_dot_product_attention"  # which chooses among kernels, and is none
PROFILED_KERNELS = 25


def machine(device: torch.device) -> dict[str, Any]:
    """Versions and device; of a GPU its driver and clocks at this moment, too."""
    import torch

    about: dict[str, Any] = {
        "device": processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "commit": commit(Path(__file__).resolve().parents[1]),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        about |= {
            "device": properties.name,
            "capability": [properties.major, properties.minor],
            "memory_bytes": properties.total_memory,
            "driver": driver(device),
        }
    return about


def processor() -> str:
    """The CPU in words."""
    return f"CPU {platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def driver(device: torch.device) -> dict[str, str] | None:
    """Driver, clocks, power and temperature of a GPU; None where nvidia-smi does not answer."""
    index = str(device.index or 0)
    said = _said(
        "nvidia-smi", f"--query-gpu={ASKED_OF_THE_DRIVER}", "--format=csv,noheader", "-i", index
    )
    if said is None:
        return None
    values = (value.strip() for value in said.split(","))
    return dict(zip(ASKED_OF_THE_DRIVER.split(","), values, strict=False))


def commit(root: Path) -> str | None:
    """The commit of the tree in `root`, with `-dirty` if it was changed; None without git."""
    if _said("git", "-C", str(root), "rev-parse", "--show-toplevel") != str(root):
        return None  # an installed copy may lie in another project
    head = _said("git", "-C", str(root), "rev-parse", "HEAD")
    changed = _said("git", "-C", str(root), "status", "--porcelain")
    return head if head is None or not changed else f"{head}-dirty"


def _said(*command: str) -> str | None:
    """What a command prints; None if it is not there, or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def kernels(stream: Stream, device: torch.device) -> dict[str, Any]:
    """What ran in the stream's next block, by its time; `attention`: the kernels of attention."""
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity

    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with torch.profiler.profile(activities=activities) as profiled:
        next(stream)
    time_of = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    rows = sorted(profiled.key_averages(), key=lambda row: -getattr(row, time_of))
    ran = [row for row in rows if not on_gpu or row.device_type == DeviceType.CUDA]
    return {
        "attention": [
            row.key
            for row in ran
            if ATTENTION.search(row.key) and row.key != DISPATCHER and getattr(row, time_of) > 0
        ][:4],
        "milliseconds": {row.key: getattr(row, time_of) / 1000 for row in rows[:PROFILED_KERNELS]},
        "calls": sum(row.count for row in rows),
    }
