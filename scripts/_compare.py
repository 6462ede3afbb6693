"""Several variants of a benchmark in turns (A B A B): what one gains over the first.

Each run is a process of its own: what a variant compiles, allocates or sets in a library does not
reach the next one. A machine that grows slower meanwhile does so for all.
"""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts._report import stack
from utils.errors import UserError
from utils.files import write_figure

Run = Callable[["Variant"], dict[str, Any]]


@dataclass(frozen=True)
class Variant:
    """What one side changes: overrides, or another config file."""

    name: str
    config: str | None
    overrides: tuple[str, ...]

    @classmethod
    def read(cls, said: str) -> Variant:
        """From `"compile=true dtype=bfloat16"`, or `"configs/other.yaml key=value"`."""
        words = shlex.split(said)
        files = [word for word in words if "=" not in word]
        if len(files) > 1 or any(Path(f).suffix not in (".yaml", ".yml") for f in files):
            raise UserError(
                f'--compare "{said}" must be overrides (key=value …), and at most one config file'
            )
        overrides = tuple(word for word in words if word not in files)
        return cls(said or "as it is", files[0] if files else None, overrides)


def in_turns(
    variants: Sequence[Variant], turns: int, run: Run, keep: Callable[[dict[str, Any]], object]
) -> dict[str, Any]:
    """A B A B …; `keep` is given what is there after each run."""
    reports: dict[str, list[dict[str, Any]]] = {variant.name: [] for variant in variants}
    order: list[str] = []
    for _ in range(turns):
        for variant in variants:
            reports[variant.name].append(run(variant))
            order.append(variant.name)
            keep(compared(reports, order))
    return compared(reports, order)


def compared(reports: dict[str, list[dict[str, Any]]], order: list[str]) -> dict[str, Any]:
    """The reports, and for each variant the spread of its speed and its ratio to the first."""
    first, *_ = reports.values()
    return {
        "order": order,
        "summary": {name: _summary(found, first) for name, found in reports.items() if found},
        "reports": reports,
    }


def _summary(found: list[dict[str, Any]], first: list[dict[str, Any]]) -> dict[str, Any]:
    intervals = [_interval(report) for report in found]
    ratios = [_interval(a) / _interval(b) for a, b in zip(first, found, strict=False)]
    return {
        "block_interval_p50": _spread(intervals),
        "fps_end_to_end": _spread([report["fps"]["end_to_end"] for report in found]),
        "fps_dit_only": _spread([report["fps"]["dit_only"] for report in found]),
        "faster_than_the_first": _spread(ratios),
        "start_seconds": _spread([report["start"]["cold"] for report in found]),
        "compile_seconds": _spread([report["start"]["compile"] for report in found]),
        "peak_memory_bytes": max(report["peak_memory_bytes"] for report in found),
        "same_frames_as_the_first": len({run["checksum"] for run in [*first, *found]}) == 1,
    }


def _interval(report: dict[str, Any]) -> float:
    return report["seconds"]["block_interval_p50"]


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def table(result: dict[str, Any]) -> str:
    """A line for each variant; ratios are of the runs of one turn."""
    return "\n".join(row(name, summary) for name, summary in result["summary"].items())


def row(name: str, summary: dict[str, Any]) -> str:
    """A variant in words."""
    ms = {key: 1000 * value for key, value in summary["block_interval_p50"].items()}
    ratio, fps = summary["faster_than_the_first"], summary["fps_end_to_end"]["median"]
    return (
        f"{name}: {ms['median']:.2f} ms a block ({ms['min']:.2f} to {ms['max']:.2f}), "
        f"{fps:.2f} FPS end to end, {summary['fps_dit_only']['median']:.2f} DiT; "
        f"{ratio['median']:.3f} x ({ratio['min']:.3f} to {ratio['max']:.3f}); "
        f"start {summary['start_seconds']['median']:.1f} s, of it compiling "
        f"{summary['compile_seconds']['median']:.1f} s; "
        f"{summary['peak_memory_bytes'] / 2**30:.2f} GiB; "
        f"{'the same frames' if summary['same_frames_as_the_first'] else 'other frames'}"
    )


def plot(result: dict[str, Any], path: Path) -> None:
    """The interval of each run in the order of time, and the parts of a block of each variant."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    for name, reports in result["reports"].items():
        places = [place for place, ran in enumerate(result["order"]) if ran == name]
        left.plot(places, [1000 * _interval(r) for r in reports], "o-", label=name)
    left.set(xlabel="run", ylabel="ms of a block, p50", ylim=(0, None))
    left.legend()
    stack(right, list(result["reports"]), [r[0]["seconds"] for r in result["reports"].values()])
    right.tick_params(axis="x", labelrotation=20)
    write_figure(path, figure)
