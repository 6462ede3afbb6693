"""From measured videos to figures: one video judged as it comes, many summed up, kept, drawn.

A result is plain data, as it stands in JSON: `prompt`, `seed`, `kind` ("shapes" where the prompt is
a caption of the shapes world, else "video"), `report` (see `shapes.meter` and
`evaluation.statistics`), and what else the maker adds.
"""

import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from evaluation import statistics as video_meter
from evaluation.statistics import Frames, to_json
from shapes import meter as shape_meter
from shapes.world import parse_caption
from utils.cli import require_matplotlib
from utils.errors import UserError
from utils.files import told, write_figure

logger = logging.getLogger(__name__)

Kind = Literal["shapes", "video"]
Result = dict[str, Any]

SURVIVAL_SECONDS = (5, 60, 300)


class Judge:
    """Measures one video while it is made; the frames are not kept.

    It is held against the truth if the prompt is a caption of the shapes world and the frames are
    square, as that world is.
    """

    def __init__(self, prompt: str, *, fps: float, first: int = 9, block: int = 12) -> None:
        """`first` and `block`: frames of its first and later blocks, for the flicker."""
        self.prompt = prompt
        self._fps, self._first, self._block = fps, first, block
        self._meter: shape_meter.ShapeMeter | video_meter.VideoMeter | None = None

    def add(self, frames: Frames) -> None:
        """The next frames, uint8 [n, H, W, 3]."""
        if self._meter is None:
            square = frames.ndim == 4 and frames.shape[1] == frames.shape[2]
            if square and is_caption(self.prompt):
                self._meter = shape_meter.ShapeMeter(self.prompt, fps=self._fps)
            else:
                self._meter = video_meter.VideoMeter()
        self._meter.add(frames)

    @property
    def kind(self) -> Kind:
        """Against what it is measured, once there are frames."""
        return "shapes" if isinstance(self._meter, shape_meter.ShapeMeter) else "video"

    def report(self) -> dict[str, Any]:
        """The video is over: its report as plain data; UserError if it had too few frames."""
        if self._meter is None:
            raise UserError("A video without frames cannot be measured.")
        blocks = {"first": self._first, "block": self._block}
        if isinstance(self._meter, shape_meter.ShapeMeter):
            return to_json(shape_meter.report(self._meter.measures(), **blocks))
        seen = self._meter.statistics()
        return to_json(video_meter.report_statistics(seen, fps=self._fps, **blocks))


def is_caption(prompt: str) -> bool:
    """Whether a prompt is a caption of the shapes world, so that the truth is known."""
    try:
        parse_caption(prompt)
    except UserError:
        return False
    return True


# Many videos


def summarise(results: Sequence[Result]) -> dict[str, Any]:
    """Figures of results of one kind.

    `measures`: of every number of a report, and of those in `extra_measures`, `mean` over all
    videos and `spread`, the standard deviation (n - 1) of the means of each seed (None for a lone
    seed). `per_second`: the same for every curve, second by second. Values that a video does not
    have do not count. `survival`: share of the videos never wrong in 1, 2, ... seconds, as long as
    the shortest video. `by_shapes`: `videos` and `measures` of those of one shape and of two, where
    there are both.
    """
    seeds = [result["seed"] for result in results]
    curves = {}
    for name in results[0]["report"]["per_second"]:
        table = _padded([result["report"]["per_second"][name] for result in results])
        mean, spread = mean_and_spread(table, seeds)
        curves[name] = {"mean": mean, "spread": spread}
    summary = {
        "videos": len(results),
        "prompts": len({result["prompt"] for result in results}),
        "seeds": len(set(seeds)),
        "measures": means(results),
        "per_second": curves,
    }
    if results[0]["kind"] == "shapes":
        summary["survival"] = survival_curve(results)
        groups: dict[int, list[Result]] = {1: [], 2: []}
        for result in results:
            groups[len(parse_caption(result["prompt"]).shapes)].append(result)
        if all(groups.values()):
            summary["by_shapes"] = {
                str(number): {"videos": len(group), "measures": means(group)}
                for number, group in groups.items()
            }
    return to_json(summary)


def means(results: Sequence[Result]) -> dict[str, dict[str, float]]:
    """`mean` over the videos and `spread` over the seeds of every measure."""
    seeds = [result["seed"] for result in results]
    rows = [numbers(result["report"]) | extra_measures(result) for result in results]
    measures = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        column = np.array([row.get(name, math.nan) for row in rows])
        mean, spread = mean_and_spread(column[:, None], seeds)
        measures[name] = {"mean": float(mean[0]), "spread": float(spread[0])}
    return measures


def numbers(report: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The single numbers of a report by dotted name (`accuracy.colour`); None becomes NaN."""
    flat: dict[str, float] = {}
    for name, value in report.items():
        if isinstance(value, Mapping):
            if name != "per_second":
                flat |= numbers(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = math.nan if value is None else float(value)
    return flat


def extra_measures(result: Result) -> dict[str, float]:
    """What is made of a result besides its report.

    For each N of `SURVIVAL_SECONDS` that the video is long enough for, `survival.Ns`: 1 if it was
    never wrong in N seconds, and `right_at.Ns`: 1 if that is so, or if most of what can be judged
    in the five seconds before is right; NaN if nothing can. `fps` and `first_frame_s`: how it was
    made.
    """
    report = result["report"]
    extra = {}
    if "survived_seconds" in report:
        for seconds in SURVIVAL_SECONDS:
            if report["seconds"] >= seconds:
                survived = report["survived_seconds"] >= seconds
                before = report["per_second"]["right"][seconds - 5 : seconds]
                right = 1.0 if survived else float(video_meter.mean(np.array(before, float)))
                extra[f"survival.{seconds}s"] = float(survived)
                extra[f"right_at.{seconds}s"] = right if math.isnan(right) else float(right > 0.5)
    return extra | result.get("timings", {})


def mean_and_spread(table: np.ndarray, seeds: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Mean over the videos, and standard deviation of the seeds' means: [videos, n] -> 2 x [n]."""
    groups = [table[[s == seed for s in seeds]] for seed in dict.fromkeys(seeds)]
    means = np.stack([video_meter.mean(group) for group in groups])
    known = ~np.isnan(means)
    count = known.sum(0)
    centre = np.where(known, means, 0).sum(0) / np.maximum(count, 1)
    squares = (np.where(known, means - centre, 0) ** 2).sum(0)
    spread = np.where(count > 1, np.sqrt(squares / np.maximum(count - 1, 1)), np.nan)
    return video_meter.mean(table), spread


def survival_curve(results: Sequence[Result]) -> list[float]:
    """Share of the videos never wrong in 1, 2, ... seconds, up to the shortest video."""
    lasted = np.array([result["report"]["survived_seconds"] for result in results])
    shortest = int(min(result["report"]["seconds"] for result in results))
    return (lasted[:, None] >= np.arange(1, shortest + 1)).mean(0).tolist()


def _padded(curves: Sequence[Sequence[float | None]]) -> np.ndarray:
    table = np.full((len(curves), max(map(len, curves))), np.nan)
    for row, curve in zip(table, curves, strict=True):
        row[: len(curve)] = np.array(curve, float)
    return table


# Kept results


class ResultLog:
    """Results in files of one JSON line each, so that a killed run goes on where it was.

    Every rank appends to a file of its own (`<stem>.videos.<rank>.jsonl` beside `path`) and reads
    those of all. Lines of another `settings` hash (another checkpoint, say) are passed over, and
    so is a last line that was cut off.
    """

    def __init__(self, path: Path, settings: str, rank: int) -> None:
        self._path, self._settings, self._rank = path, settings, rank

    def read(self) -> dict[str, Result]:
        """Results with these settings, by key."""
        found, foreign = {}, 0
        for line in self._lines():
            if line["settings"] == self._settings:
                found[line["key"]] = line["result"]
            else:
                foreign += 1
        if foreign:
            logger.info("%d kept results were made with other settings: not used", foreign)
        return found

    def append(self, key: str, result: Result) -> None:
        """Keep one result."""
        line = json.dumps({"settings": self._settings, "key": key, "result": result})
        own = self._own()
        with told(own):
            cut_off = own.exists() and own.read_bytes()[-1:] not in (b"", b"\n")
            with own.open("a", encoding="utf-8") as file:
                file.write(("\n" if cut_off else "") + line + "\n")

    def wrote_last(self) -> bool:
        """Whether the newest file is this rank's: true for one of several that end together."""
        newest = max(self._files(), key=lambda file: (file.stat().st_mtime_ns, file), default=None)
        return newest == self._own()

    def _own(self) -> Path:
        return self._path.absolute().with_name(f"{self._path.stem}.videos.{self._rank}.jsonl")

    def _files(self) -> list[Path]:
        start, end = f"{self._path.stem}.videos.", ".jsonl"
        return [
            file
            for file in sorted(self._path.absolute().parent.iterdir())
            if file.name.startswith(start) and file.name.endswith(end)
        ]

    def _lines(self) -> Iterator[dict[str, Any]]:
        for file in self._files():
            for text in file.read_text(encoding="utf-8").split("\n"):
                try:
                    line = json.loads(text)
                except ValueError:
                    continue
                if isinstance(line, dict) and line.keys() >= {"settings", "key", "result"}:
                    yield line


# For people


TABLES: dict[str, dict[str, tuple[str, ...]]] = {
    "shapes": {
        "right in the first 5 s": (
            "accuracy.background",
            "accuracy.colour",
            "accuracy.kind",
            "accuracy.size",
            "accuracy.direction",
            "accuracy.speed",
        ),
        "right in the last 5 s": tuple(f"late.{name}" for name in shape_meter.LATE),
        "drift, last 5 s - first 5 s": (
            "drift.background_error",
            "drift.colour_error",
            "drift.area_ratio",
            "drift.artefacts",
            "drift.sharpness",
            "drift.right",
            "drift.motion",
            "drift.path",
        ),
        "motion (1: as the truth)": ("motion", "path"),
        "flicker": ("background_flicker.ratio", "brightness_flicker.ratio"),
        "never wrong in": tuple(f"survival.{seconds}s" for seconds in SURVIVAL_SECONDS),
        "right at": tuple(f"right_at.{seconds}s" for seconds in SURVIVAL_SECONDS),
        "speed of making": ("fps", "first_frame_s"),
    },
    "video": {
        "drift, last 5 s - first 5 s": (
            "drift.mean",
            "drift.std",
            "drift.contrast",
            "drift.sharpness",
            "drift.motion",
        ),
        "motion": ("motion",),
        "flicker": ("flicker.ratio", "brightness_flicker.ratio"),
        "speed of making": ("fps", "first_frame_s"),
    },
}

CURVES: dict[str, dict[str, str]] = {
    "shapes": {
        "right": "colour and kind right (share of frames)",
        "background_right": "background right (share of frames)",
        "colour_error": "colour error (grey levels)",
        "background_error": "background error (grey levels)",
        "motion": "motion (speed / prompt's)",
        "path": "path (1: as the world's law)",
        "sharpness": "sharpness (1/unit)",
        "area_ratio": "area / prompt's",
        "artefacts": "artefacts (share of pixels)",
    },
    "video": {
        "brightness": "brightness (grey levels)",
        "contrast": "contrast (grey levels)",
        "sharpness": "sharpness (variance of the Laplacian)",
        "change": "change between frames (grey levels)",
    },
}


def table(kind: str, summary: Mapping[str, Any]) -> str:
    """The main figures of a summary as text: mean, and spread over the seeds.

    Of all videos, then of those of one shape and of two, where there are both.
    """
    measures = summary["measures"]
    parts = summary.get("by_shapes", {})
    columns = [measures, *(part["measures"] for part in parts.values())]
    lines = [
        f"{kind}: {summary['videos']} videos, {summary['prompts']} prompts, "
        f"{summary['seeds']} seeds (mean ± standard deviation of the seeds' means)"
    ]
    if parts:
        words = {"1": "one shape", "2": "two shapes"}
        heads = ["all", *(f"{words[n]} ({part['videos']})" for n, part in parts.items())]
        lines.append(f"{'':<24}" + "".join(f"{head:>18}" for head in heads))
    for title, names in TABLES[kind].items():
        known = [name for name in names if name in measures]
        if known:
            lines.append(title)
        for name in known:
            shown = "".join(f"{_shown(column.get(name)):>18}" for column in columns)
            label = name.split(".")[-1] if title not in ("flicker",) else name.split(".")[0]
            lines.append(f"  {label.replace('_', ' '):<22}{shown}")
    return "\n".join(lines)


def _shown(measure: Mapping[str, float | None] | None) -> str:
    if measure is None or measure["mean"] is None:
        return "-"
    spread = measure["spread"]
    return f"{measure['mean']:.3f}" if spread is None else f"{measure['mean']:.3f} ± {spread:.3f}"


def draw_curves(
    kind: str,
    summaries: Mapping[str, Mapping[str, Any]],
    out: Path,
    curves: Mapping[str, str] | None = None,
) -> None:
    """Write a PNG of the per-second curves, one line for each named summary, spread as a band.

    `curves`: the title of each curve to draw; those of `CURVES` by default.
    """
    require_matplotlib()
    import matplotlib as mpl
    from matplotlib.figure import Figure

    titles = dict(curves or CURVES[kind])
    if kind == "shapes":
        titles["survival"] = "survival (share of videos)"
    columns = min(5, -(-len(titles) // 2))
    rows = -(-len(titles) // columns)
    with mpl.rc_context({"font.size": 9, "axes.grid": True, "grid.color": "#e6e8eb"}):
        figure = Figure(figsize=(3.6 * columns, 2.5 * rows + 0.5), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).flatten()
        for axis, (name, title) in zip(axes, titles.items(), strict=False):
            axis.set_title(title, loc="left", fontsize=9)
            for label, summary in summaries.items():
                curve = summary["survival" if name == "survival" else "per_second"]
                curve = {"mean": curve} if name == "survival" else curve[name]
                _draw_curve(axis, label, curve)
            axis.spines[["top", "right"]].set_visible(False)
            axis.margins(x=0.01)
            axis.set_xlabel("second")
            _zoom_out(axis, name)
        for axis in axes[len(titles) :]:
            axis.set_visible(False)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False)
        write_figure(out, figure)


def _draw_curve(axis: Any, label: str, curve: Mapping[str, Sequence[float | None]]) -> None:
    mean = np.array(curve["mean"], float)
    seconds = np.arange(1, len(mean) + 1)
    (line,) = axis.plot(seconds, mean, label=label, lw=1.4, marker="." if len(mean) < 3 else None)
    if "spread" in curve:
        spread = np.nan_to_num(np.array(curve["spread"], float))
        axis.fill_between(seconds, mean - spread, mean + spread, color=line.get_color(), alpha=0.2)


def _zoom_out(axis: Any, name: str) -> None:
    """Shares from 0 to 1, everything else from 0 on."""
    low, high = axis.dataLim.y0, axis.dataLim.y1
    if name.endswith("right") or name == "survival":
        axis.set_ylim(-0.03, 1.03)
    elif math.isfinite(low) and math.isfinite(high):
        axis.set_ylim(min(0, 1.05 * low), max(1.05 * high, 1e-3))
