"""Draw the curves of training runs, from their `metrics.jsonl`, into one PNG.

    python scripts/plot_run.py logs/run
    python scripts/plot_run.py logs/run logs/ablation --out compare.png --smooth 20

One run: the main metrics, one line each. Several runs: a colour per run, a line style per metric,
and of the critic's loss by timestep and the seconds per phase the means over their last quarters.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import nan
from pathlib import Path
from typing import Any

import numpy as np

if not __package__:  # run by its path: the tree that it lies in comes first
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trainer.health import Rules
from utils.cli import require_matplotlib, run_main
from utils.errors import UserError
from utils.files import write_figure

COLOURS = ("#3366cc", "#e0662c", "#2a9d6f", "#a0448f", "#c9a227", "#5b5f66", "#8c564b", "#17a2b8")
STYLES = ("-", "--", ":", "-.")
INK = "#22262b"
COLUMNS = 3


@dataclass(frozen=True)
class Run:
    """The curves of one run: step and value of every number, missing ones left out."""

    name: str
    curves: dict[str, tuple[np.ndarray, np.ndarray]]

    @classmethod
    def read(cls, path: Path, name: str) -> Run:
        """From a run's folder or its metrics file; UserError if there is none."""
        from trainer.metrics import flatten, read_metrics

        points: dict[str, list[tuple[int, float]]] = {}
        for line in read_metrics(path):
            for key, value in flatten(line).items():
                if isinstance(value, int | float) and key not in ("step", "time"):
                    points.setdefault(key, []).append((line["step"], value))
        curves = {}
        for key, pairs in points.items():
            steps, values = np.array(pairs, dtype=float).T
            curves[key] = steps, values
        return cls(name, curves)

    def matching(self, patterns: Sequence[str]) -> list[str]:
        """Names of the metrics that fit one of the patterns, in order of the patterns."""
        found = [k for pattern in patterns for k in self.curves if fnmatchcase(k, pattern)]
        return list(dict.fromkeys(found))

    def late_mean(self, key: str) -> float:
        """Mean over the last quarter of the run's steps."""
        if key not in self.curves:
            return nan
        last = max(steps[-1] for steps, _ in self.curves.values())
        steps, values = self.curves[key]
        late = values[steps >= 0.75 * last]
        return float(late.mean()) if len(late) else nan


@dataclass(frozen=True)
class Panel:
    """One picture: which metrics it shows, and how."""

    title: str
    patterns: tuple[str, ...]
    draw: Callable[[Any, list[Run], Panel, int], None]
    log: bool = False
    from_zero: bool = False
    level: float | None = None


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("logdirs", nargs="+", type=Path, metavar="LOGDIR", help="folder of a run")
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/run.png"), help="(default: %(default)s)"
    )
    parser.add_argument("--smooth", type=int, default=1, help="mean over so many points of a line")
    return parser


def main(argv: Sequence[str]) -> int:
    """Read, draw, write."""
    args = build_parser().parse_args(argv)
    if args.smooth < 1:
        raise UserError("--smooth must be at least 1")
    names = run_names(args.logdirs)
    runs = [Run.read(path, name) for path, name in zip(args.logdirs, names, strict=True)]
    draw(runs, args.out, args.smooth)
    print(args.out)
    return 0


def run_names(paths: Sequence[Path]) -> list[str]:
    """The folders' names; with as much of the path as tells them apart."""
    folders = [(path if path.is_dir() else path.parent).resolve() for path in paths]
    depth = 1
    while depth < 8 and len({f.parts[-depth:] for f in folders}) < len(set(folders)):
        depth += 1
    return ["/".join(folder.parts[-depth:]) for folder in folders]


def draw(runs: list[Run], out: Path, smooth: int = 1) -> None:
    """Write the PNG of all panels for which a run has numbers."""
    require_matplotlib()
    import matplotlib as mpl
    from matplotlib.figure import Figure

    panels = [p for p in PANELS if any(run.matching(p.patterns) for run in runs)]
    if not panels:
        raise UserError("the runs hold none of the known metrics; see docs/training_health.md")
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    with mpl.rc_context(LOOK):
        figure = Figure(figsize=(5.2 * columns, 3.1 * rows + 0.5), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).flatten()
        for axis, panel in zip(axes, panels, strict=False):
            axis.set_title(panel.title)
            panel.draw(axis, runs, panel, smooth)
            if panel.log and positive(runs, panel):
                use_log_scale(axis)
            if panel.from_zero:
                axis.set_ylim(0, 1.1 * axis.get_ylim()[1])
        for axis in axes[len(panels) :]:
            axis.set_visible(False)
        title_or_legend(figure, runs)
        write_figure(out, figure)


def title_or_legend(figure: Any, runs: list[Run]) -> None:
    """The name of a lone run, else which colour is which run."""
    from matplotlib.lines import Line2D

    if len(runs) == 1:
        figure.suptitle(runs[0].name, fontweight="bold")
        return
    handles = [Line2D([], [], color=colour(i), lw=3) for i in range(len(runs))]
    names = [run.name for run in runs]
    figure.legend(handles, names, loc="outside upper center", ncols=min(4, len(runs)), fontsize=11)


def use_log_scale(axis: Any) -> None:
    """A logarithmic axis with plain numbers at 1, 2, 3, 5 of every decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def lines(axis: Any, runs: list[Run], panel: Panel, smooth: int) -> None:
    """Curves over steps; of a lone run the smoothed ones over the raw ones."""
    from matplotlib.lines import Line2D

    shown = metric_names(runs, panel)
    alone = len(runs) == 1
    for number, run in enumerate(runs):
        for index, key in enumerate(shown):
            if key not in run.curves:
                continue
            steps, values = run.curves[key]
            look = {"color": colour(index if alone else number), "ls": STYLES[index % len(STYLES)]}
            look |= {"ls": "-"} if alone else {}
            marker = "o" if len(steps) == 1 else None
            if smooth > 1 and alone:
                axis.plot(steps, values, **look, alpha=0.25, lw=0.8)
            axis.plot(steps, moving_mean(values, smooth), **look, marker=marker, ms=4)
    if panel.level is not None:
        axis.axhline(panel.level, color="#c0392b", lw=1, ls=(0, (2, 2)))
    if len(shown) > 1:
        looks: list[dict[str, Any]] = [
            {"color": colour(i)} if alone else {"color": INK, "ls": STYLES[i % len(STYLES)]}
            for i in range(len(shown))
        ]
        handles = [Line2D([], [], **look) for look in looks]
        axis.legend(handles, short_names(shown), ncols=len(shown), **BESIDE_TITLE)
    axis.set_xlabel("step")
    axis.margins(x=0.01)


def buckets(axis: Any, runs: list[Run], panel: Panel, smooth: int) -> None:
    """Loss by timestep: over steps for one run, over timesteps for several."""
    import matplotlib as mpl

    keys = sorted(metric_names(runs, panel), key=bucket_centre)
    centres = [bucket_centre(key) for key in keys]
    if len(runs) > 1:
        for number, run in enumerate(runs):
            means = [run.late_mean(key) for key in keys]
            axis.plot(centres, means, color=colour(number), marker="o", ms=3.5)
        axis.set_xlabel("timestep")
        return
    scale = mpl.colors.Normalize(0, 1000)
    for key, centre in zip(keys, centres, strict=True):
        steps, values = runs[0].curves[key]
        shade = mpl.colormaps["viridis"](scale(centre))
        axis.plot(steps, moving_mean(values, smooth), color=shade, lw=1.1)
    mappable = mpl.cm.ScalarMappable(scale, "viridis")
    bar = axis.figure.colorbar(mappable, ax=axis, pad=0.02, aspect=25)
    bar.outline.set_visible(False)
    bar.set_label("timestep")
    axis.set_xlabel("step")
    axis.margins(x=0.01)


def phases(axis: Any, runs: list[Run], panel: Panel, smooth: int) -> None:
    """Seconds per step: a stack over steps for one run, stacked bars of means for several."""
    total = "seconds/step"
    keys = [key for key in metric_names(runs, panel) if key != total]
    if not keys:
        lines(axis, runs, panel, smooth)
        return
    names = [*short_names(keys), "other"]
    if len(runs) == 1:
        steps, layers = stacked(runs[0], keys, total, smooth)
        axis.stackplot(steps, layers, labels=names, colors=PHASE_COLOURS, lw=0)
        axis.set_xlabel("step")
        axis.margins(x=0)
        axis.set_ylim(bottom=0)
    else:
        for number, run in enumerate(runs):
            steps, layers = stacked(run, keys, total, 1)
            left = 0.0
            for index, layer in enumerate(layers):
                width = float(layer[steps >= 0.75 * steps[-1]].mean())
                label = names[index] if number == 0 else None
                axis.barh(number, width, 0.6, left, color=phase_colour(index), label=label)
                left += width
        axis.set_yticks(range(len(runs)), [run.name for run in runs])
        for number, tick in enumerate(axis.get_yticklabels()):
            tick.set_color(colour(number))
        axis.invert_yaxis()
        axis.grid(axis="y", visible=False)
        axis.set_xlabel("seconds")
    handles, labels = (side[::-1] for side in axis.get_legend_handles_labels())
    axis.legend(handles, labels, loc="upper left", bbox_to_anchor=(1, 1), borderaxespad=0)


def stacked(
    run: Run, keys: list[str], total: str, smooth: int
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Steps, and per phase its seconds at each of them (0 where it did not run), then the rest."""
    present = [key for key in (*keys, total) if key in run.curves]
    if not present:
        return np.zeros(1), [np.zeros(1) for _ in (*keys, total)]
    steps = np.unique(np.concatenate([run.curves[key][0] for key in present]))
    filled = {key: np.zeros(len(steps)) for key in (*keys, total)}
    for key in present:
        filled[key][np.searchsorted(steps, run.curves[key][0])] = run.curves[key][1]
    layers = [filled[key] for key in keys]
    rest = np.maximum(filled[total] - np.sum(layers, axis=0), 0)
    return steps, [moving_mean(layer, smooth) for layer in (*layers, rest)]


def metric_names(runs: list[Run], panel: Panel) -> list[str]:
    """Metrics of the panel that some run has."""
    return list(dict.fromkeys(key for run in runs for key in run.matching(panel.patterns)))


def moving_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Centred mean over `width` points, over fewer at the ends; as many points as given."""
    width = min(width, len(values))
    window = np.ones(width)
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def positive(runs: list[Run], panel: Panel) -> bool:
    """Whether all values of a panel can stand on a logarithmic axis."""
    keys = metric_names(runs, panel)
    return all((run.curves[k][1] > 0).all() for run in runs for k in keys if k in run.curves)


def bucket_centre(key: str) -> float:
    """The timestep in the middle of a bucket named `…/0-100`."""
    low, high = key.rsplit("/", 1)[-1].split("-")
    return (float(low) + float(high)) / 2


def short_names(keys: Sequence[str]) -> list[str]:
    """The names without the folder or the last part that all of them share."""
    parts = [key.split("/") for key in keys]
    if len({tuple(p[:-1]) for p in parts}) == 1:
        return [p[-1].replace("_", " ") for p in parts]
    if len({p[-1] for p in parts}) == 1:
        return [" ".join(p[:-1]).replace("_", " ") or p[-1] for p in parts]
    return [key.replace("_", " ") for key in keys]


def colour(index: int) -> str:
    """The colour of run or metric number `index`."""
    return COLOURS[index % len(COLOURS)]


def phase_colour(index: int) -> str:
    """The colour of phase number `index`, as a stack over steps has it."""
    return PHASE_COLOURS[index % len(PHASE_COLOURS)]


PHASE_COLOURS = (
    "#3b6ea5",
    "#7fb2d9",
    "#e8a15c",
    "#c95d4a",
    "#7da87b",
    "#b9a3cc",
    "#8a8f98",
    "#ccc",
    "#d9b64a",
    "#5aa7a0",
    "#444a52",
)

BESIDE_TITLE: dict[str, Any] = {
    "loc": "lower right",
    "bbox_to_anchor": (1, 1),
    "borderaxespad": 0.2,
    "handlelength": 1.6,
    "columnspacing": 1.0,
}

LOOK: dict[Any, Any] = {
    "figure.constrained_layout.w_pad": 0.1,
    "figure.constrained_layout.h_pad": 0.08,
    "font.size": 9.5,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": "#9aa1a9",
    "axes.labelcolor": INK,
    "text.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e8eb",
    "axes.axisbelow": True,
    "lines.linewidth": 1.5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.titlesize": 13,
}

PANELS = (
    Panel("Loss", ("generator/loss", "critic/loss", "*/loss"), lines, log=True),
    Panel(
        "Gradient norm", ("generator/grad_norm", "critic/grad_norm", "*grad_norm"), lines, log=True
    ),
    Panel("DMD gradient", ("*gradient_norm",), lines),
    Panel("Critic's loss by timestep", ("critic/by_timestep/*",), buckets, log=True),
    Panel(
        "Critic's error / teacher's error", ("critic/ratio",), lines, level=Rules().max_critic_ratio
    ),
    Panel(
        "Latents",
        ("generated/std", "generated/mean", "generated/channel_std"),
        lines,
    ),
    Panel("Motion", ("generated/motion",), lines, from_zero=True),
    Panel("Learning rate", ("generator/lr", "critic/lr", "*/lr"), lines, from_zero=True),
    Panel("Seconds per step", ("seconds/*",), phases),
    Panel("TFLOP/s per device", ("*tflop*",), lines, from_zero=True),
    Panel("Peak memory (GiB)", ("*memory*",), lines, from_zero=True),
)


if __name__ == "__main__":
    sys.exit(run_main(main))
