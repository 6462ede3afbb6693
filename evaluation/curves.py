"""Curves of measured videos, second by second, as a picture."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.meters import Curve
from utils.cli import require_matplotlib
from utils.files import write_figure


def draw_curves(
    summaries: Mapping[str, Mapping[str, Any]],
    out: Path,
    curves: Mapping[str, Curve],
) -> None:
    """Write a PNG of the curves, one line for each named summary, spread as a band; behind them the
    drift of every property that they tell, with its 95 % interval.

    `curves` by their names in the summaries.
    """
    require_matplotlib()
    import matplotlib as mpl
    from matplotlib.figure import Figure

    kept = dict.fromkeys(name for summary in summaries.values() for name in summary["kept"])
    curves = {**curves, **{f"drift of {name}": Curve(f"drift of {name}") for name in kept}}
    columns = min(5, -(-len(curves) // 2))
    rows = -(-len(curves) // columns)
    with mpl.rc_context({"font.size": 9, "axes.grid": True, "grid.color": "#e6e8eb"}):
        figure = Figure(figsize=(3.6 * columns, 2.5 * rows + 0.5), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).flatten()
        for axis, (name, curve) in zip(axes, curves.items(), strict=False):
            axis.set_title(curve.title, loc="left", fontsize=9)
            for label, summary in summaries.items():
                _draw_curve(axis, label, _values(summary, name))
            axis.spines[["top", "right"]].set_visible(False)
            axis.margins(x=0.01)
            axis.set_xlabel("second")
            _zoom_out(axis, share=curve.share)
        for axis in axes[len(curves) :]:
            axis.set_visible(False)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False)
        write_figure(out, figure)


def _values(summary: Mapping[str, Any], name: str) -> Mapping[str, Sequence[float | None]]:
    """`mean`, with a `spread`, or with the ends `low` and `high`."""
    drifts = {f"drift of {n}": {**k, "mean": k["drift"]} for n, k in summary["kept"].items()}
    return drifts.get(name) or summary["per_second"].get(name) or {"mean": summary[name]}


def _draw_curve(axis: Any, label: str, curve: Mapping[str, Sequence[float | None]]) -> None:
    mean = np.array(curve["mean"], float)
    seconds = np.arange(1, len(mean) + 1)
    (line,) = axis.plot(seconds, mean, label=label, lw=1.4, marker="." if len(mean) < 3 else None)
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
