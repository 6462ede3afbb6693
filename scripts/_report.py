"""The report of `scripts/benchmark.py`: figures as plain values, as a table, as a plot."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts._machine import processor
from utils.files import write_figure

if TYPE_CHECKING:
    from pipeline import VideoPipeline
    from pipeline.timing import Measured, Memory, SteadyState

TERA, GIB = 10**12, 2**30
STACKED = {"DiT": "dit_per_block", "VAE": "vae_decode", "copy": "copy_to_host", "other": "other"}


# --- figures -------------------------------------------------------------------------------------


def figures(pipe: VideoPipeline, steady: SteadyState, measured: Measured) -> dict[str, Any]:
    """What was measured, as plain values; times in seconds."""
    from pipeline.timing import p50, p99

    parts, pieces = measured.parts, len(measured.block_in_parts)
    seconds = _seconds(measured)
    windows, cleans = _flops(pipe, steady)
    per_window = windows * pieces / len(parts["window"])
    per_clean = cleans * pieces / len(parts["clean"]) if parts["clean"] else 0
    frames, filed = measured.frames / len(measured.block), measured.filed
    interval = statistics.mean(measured.block)
    rates = {
        "window_pass": per_window / seconds["window_pass"],
        "clean_pass": per_clean / seconds["clean_pass"] if per_clean else None,
        "dit_per_block": (windows + cleans) / seconds["dit_per_block"],
    }
    return {
        "frames_per_block": frames,
        "passes_per_block": {
            "window": len(parts["window"]) / pieces,
            "clean": len(parts["clean"]) / pieces,
        },
        "seconds": {
            **seconds,
            "block_interval": interval,
            "block_interval_p50": p50(measured.block),
            "block_interval_p99": p99(measured.block),
            "first_frame": measured.first_frame,
        },
        "fps": {
            "dit_only": frames / seconds["dit_per_block"],
            "end_to_end": frames / interval,
            "end_to_end_with_file": filed and frames * len(filed.block) / sum(filed.block),
        },
        "flops": {
            "window_pass": per_window,
            "clean_pass": per_clean,
            "dit_per_block": windows + cleans,
        },
        "tflops_per_second": {key: rate and rate / TERA for key, rate in rates.items()},
        "peak_memory_bytes": measured.memory.peak,
        "memory": _memory(measured.memory),
        "long": late(measured),
        "checksum": measured.checksum,
        "raw_seconds": {
            "block_interval": measured.block,
            "block_in_parts": measured.block_in_parts,
            **parts,
            "block_with_file": filed and filed.block,
            "long": measured.late and measured.late.block,
        },
    }


def _seconds(measured: Measured) -> dict[str, Any]:
    """The parts of a block; `other` is what of it lies between them: host, schedule, noise."""
    parts, pieces, filed = measured.parts, len(measured.block_in_parts), measured.filed
    per_block = {name: sum(spans) / pieces for name, spans in parts.items()}
    dit = per_block["window"] + per_block["clean"]
    known = dit + per_block["decode"] + per_block["copy"]
    return {
        "window_pass": statistics.mean(parts["window"]),
        "clean_pass": statistics.mean(parts["clean"]) if parts["clean"] else None,
        "vae_decode": per_block["decode"],
        "copy_to_host": per_block["copy"],
        "dit_per_block": dit,
        "other": statistics.mean(measured.block_in_parts) - known,
        "file": filed and filed.encoding,
        "block_interval_with_file": filed and statistics.mean(filed.block),
        "end_of_file": filed and filed.ending,
    }


def _flops(pipe: VideoPipeline, steady: SteadyState) -> tuple[int, int]:
    """Operations of a block's forwards with a window, and of its clean passes alone."""
    rows = 1 if pipe.setup.distilled else 2  # with guidance, text and no text
    sizes, tokens = pipe.dit.config, pipe.shape.tokens_per_frame
    windows, cleans = (
        rows * steady.flops(sizes, tokens, window=window) for window in (True, False)
    )
    return windows, cleans


def _memory(memory: Memory) -> dict[str, int | None]:
    return {
        "peak_bytes": memory.peak,
        "reserved_bytes": memory.reserved,
        "held_bytes": memory.held,
    }


def late(measured: Measured) -> dict[str, Any] | None:
    """The end of a long run beside the first blocks; None without one."""
    from pipeline.timing import p50, p99

    end = measured.late
    if end is None:
        return None
    return {
        "blocks": end.blocks_before + len(end.block),
        "block_interval_p50": p50(end.block),
        "block_interval_p99": p99(end.block),
        "against_the_first": p50(end.block) / p50(measured.block),
        "memory": _memory(end.memory),
    }


def setting(pipe: VideoPipeline, args: argparse.Namespace, steady: SteadyState) -> dict[str, Any]:
    """What the figures hold for."""
    import torch

    from wan.attention import best_backend

    levels, device = pipe.setup.levels, pipe.device
    on_gpu = device.type == "cuda"
    backend = pipe.dit.attention_backend
    return {
        "config": str(args.config_path),
        "weights": "random" if args.random_weights else str(args.checkpoint_path or "model folder"),
        "model": str(args.preset or args.generator_name),
        "method": args.method,
        "schedule": pipe.setup.kind,
        "resolution": [pipe.shape.width, pipe.shape.height],
        "levels": levels.num,
        "device": torch.cuda.get_device_name(device) if on_gpu else processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": str(pipe.dit.dtype).removeprefix("torch."),
        "attention_backend": best_backend(device, pipe.dit.dtype) if backend == "auto" else backend,
        "compiled": pipe.setup.machine.compile,
        "vae": f"in (Wan2.1, base_dim {pipe.vae.model.config['base_dim']})",
        "vae_device": str(pipe.vae.device),
        "vae_dtype": str(pipe.vae.decoded_dtype).removeprefix("torch."),
        "clean_pass": "in, in one forward with a window" if pipe.setup.merges_clean_pass else "in",
        "text_encoder": "out",
        "memory": "CUDA max_memory_allocated" if on_gpu else "peak resident set",
        "ramp_up_blocks": steady.first + 1,
        "warmup_blocks": args.warmup,
        "measured_blocks": args.blocks,
    }


# --- as text -------------------------------------------------------------------------------------


def table(about: dict[str, Any], result: dict[str, Any]) -> str:
    """The report as text."""
    seconds, fps = result["seconds"], result["fps"]
    lines = [f"{key.replace('_', ' ')}: {value}" for key, value in about.items()]
    lines += ["", *_dit_rows(result)]
    lines += [
        _row("vae_decode", f"{_ms(seconds['vae_decode'])} per block"),
        _row("copy_to_host", f"{_ms(seconds['copy_to_host'])} per block, to uint8"),
        _row("other", f"{_ms(seconds['other'])} per block between these"),
        _row("file", _file(seconds, fps)),
        _row("block_interval", f"{_ms(seconds['block_interval'])} to uint8 frames on the host"),
        _row("p50, p99", _quantiles(seconds)),
        _row("start", _start(seconds["first_frame"], result["start"])),
        _row(
            "first_frame",
            f"{_ms(seconds['first_frame']['cold'])} cold, "
            f"{_ms(seconds['first_frame']['warm'])} in a second stream",
        ),
        _row("FPS", f"{fps['dit_only']:.2f} DiT only, {fps['end_to_end']:.2f} end to end"),
        _row("viewer", viewing(result["viewer"])),
        _row("share of ceiling", _shares(result["share_of_ceiling"])),
        _row("peak_memory", _said_memory(result["memory"])),
    ]
    if result["long"] is not None:
        lines.append(_row("at the end", _long(result["long"])))
    lines += [
        _row("attention ran", ", ".join(result["kernels"]["attention"]) or "written out"),
        _row("checksum", result["checksum"]),
    ]
    return "\n".join(lines)


def _dit_rows(result: dict[str, Any]) -> list[str]:
    seconds, flops, rate = result["seconds"], result["flops"], result["tflops_per_second"]
    rows = []
    for name in ("window_pass", "clean_pass", "dit_per_block"):
        speed = "" if rate[name] is None else f", {rate[name]:.4g} TFLOP/s"
        rows.append(_row(name, f"{_ms(seconds[name])}, {flops[name] / TERA:.4g} TFLOP{speed}"))
    return rows


def _quantiles(seconds: dict[str, Any]) -> str:
    p99 = seconds["block_interval_p99"]
    said = "needs --blocks 100" if p99 is None else _ms(p99)
    return f"{_ms(seconds['block_interval_p50'])}, {said}"


def _file(seconds: dict[str, Any], fps: dict[str, Any]) -> str:
    if seconds["file"] is None:
        return "not written (--file)"
    return (
        f"{_ms(seconds['file'])} per block alone; written meanwhile: "
        f"{_ms(seconds['block_interval_with_file'])} per block, "
        f"{fps['end_to_end_with_file']:.2f} FPS, {_ms(seconds['end_of_file'])} at the end"
    )


def _start(first_frame: dict[str, float], start: dict[str, float]) -> str:
    cold = start["load"] + first_frame["cold"]
    return (
        f"{cold:.2f} s cold (load {start['load']:.2f} s, first frame {first_frame['cold']:.2f} s; "
        f"of both, compiling {start['compile']:.2f} s)"
    )


def viewing(viewer: dict[str, Any]) -> str:
    """How a simulated viewer fared, in words."""
    return (
        f"{viewer['misses']} deadlines missed, {viewer['stall_seconds']:.2f} s of waiting at "
        f"{viewer['fps']:g} FPS behind {viewer['buffer_blocks']} block(s)"
    )


def _shares(shares: dict[str, float]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {share:.0%}" for name, share in shares.items())


def _said_memory(memory: dict[str, int | None]) -> str:
    labels = {"peak_bytes": "", "reserved_bytes": "reserved ", "held_bytes": "held "}
    return ", ".join(
        f"{labels[what]}{size / GIB:.2f} GiB" for what, size in memory.items() if size is not None
    )


def _long(end: dict[str, Any]) -> str:
    return (
        f"block {end['blocks']}: p50 {_ms(end['block_interval_p50'])}, "
        f"{end['against_the_first']:.3f} of the first; {_said_memory(end['memory'])}"
    )


def _row(name: str, value: str) -> str:
    return f"{name.replace('_', ' '):16} {value}"


def _ms(seconds: float | None) -> str:
    return "not run" if seconds is None else f"{1000 * seconds:.2f} ms"


# --- as a picture --------------------------------------------------------------------------------


def plot(result: dict[str, Any], path: Path) -> None:
    """The interval of each block in time, and the parts of a block on top of each other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[3, 1])
    raw = result["raw_seconds"]
    kinds = {"block_interval": "blocks", "block_with_file": "with a file", "long": "at the end"}
    for key, label in kinds.items():
        if raw[key]:
            left.plot([1000 * interval for interval in raw[key]], label=label, linewidth=1)
    due = 1000 * result["frames_per_block"] / result["viewer"]["fps"]
    left.axhline(due, color="grey", linestyle="--", label=f"{result['viewer']['fps']:g} FPS")
    left.set(xlabel="block", ylabel="ms to frames on the host", ylim=(0, None))
    left.legend()
    stack(right, [""], [result["seconds"]])
    figure.suptitle(f"{result['fps']['end_to_end']:.2f} frames per second end to end")
    write_figure(path, figure)


def stack(axes: Any, names: Sequence[str], reports: Sequence[dict[str, Any]]) -> None:
    """A bar for each report's `seconds`, made of the parts of a block."""
    bottoms = [0.0] * len(reports)
    for label, key in STACKED.items():
        heights = [1000 * max(0.0, seconds[key]) for seconds in reports]
        axes.bar(list(names), heights, 0.6, bottom=bottoms, label=label)
        bottoms = [below + height for below, height in zip(bottoms, heights, strict=True)]
    axes.set_ylabel("ms of a block")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
