"""Curves of measured videos, second by second, as a picture."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.meters import Curve
from utils.cli import require_matplotlib
from utils.files import write_figure


def draw_curves(summary: Mapping[str, Any], out: Path, curves: Mapping[str, Curve]) -> None:
    """Write a PNG of the curves, by their names in a summary, spread as a band; behind them the
    drift of every property that it tells, with its 95 % interval.
    """
    require_matplotlib()
    import matplotlib as mpl
    from matplotlib.figure import Figure

    drawn = [(curve, _values(summary, name)) for name, curve in curves.items()]
    drawn += [
        (Curve(f"drift of {name}"), {**kept, "mean": kept["drift"]})
        for name, kept in summary["kept"].items()
    ]
    columns = min(5, -(-len(drawn) // 2))
    rows = -(-len(drawn) // columns)
    with mpl.rc_context({"font.size": 9, "axes.grid": True, "grid.color": "#e6e8eb"}):
        figure = Figure(figsize=(3.6 * columns, 2.5 * rows + 0.5), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).flatten()
        for axis, (curve, values) in zip(axes, drawn, strict=False):
            axis.set_title(curve.title, loc="left", fontsize=9)
            _draw_curve(axis, values)
            axis.spines[["top", "right"]].set_visible(False)
            axis.margins(x=0.01)
            axis.set_xlabel("second")
            _zoom_out(axis, share=curve.share)
        for axis in axes[len(drawn) :]:
            axis.set_visible(False)
        write_figure(out, figure)


def _values(summary: Mapping[str, Any], name: str) -> Mapping[str, Sequence[float | None]]:
    """`mean`, with a `spread` where there is one."""
    return summary["per_second"].get(name) or {"mean": summary[name]}


def _draw_curve(axis: Any, curve: Mapping[str, Sequence[float | None]]) -> None:
    """`mean`, and its `spread`, or the ends `low` and `high` of an interval."""
    mean = np.array(curve["mean"], float)
    seconds = np.arange(1, len(mean) + 1)
    (line,) = axis.plot(seconds, mean, lw=1.4, marker="." if len(mean) < 3 else None)
    if "low" in curve:
        low, high = (np.array(curve[end], float) for end in ("low", "high"))
        axis.fill_between(seconds, low, high, color=line.get_color(), alpha=0.2)
    elif "spread" in curve:
        spread = np.nan_to_num(np.array(curve["spread"], float))
        axis.fill_between(seconds, mean - spread, mean + spread, color=line.get_color(), alpha=0.2)


def _zoom_out(axis: Any, *, share: bool) -> None:
    """Shares from 0 to 1, everything else from 0 on."""
    low, high = axis.dataLim.y0, axis.dataLim.y1
    if share:
        axis.set_ylim(-0.03, 1.03)
    elif math.isfinite(low) and math.isfinite(high):
        axis.set_ylim(min(0, 1.05 * low), max(1.05 * high, 1e-3))
