"""From measured videos to figures: many results summed up, kept, shown as text."""

import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.intervals import UNKNOWN, Interval
from evaluation.keeping import FORMULA_LABELS, FORMULAS, keeping, spread_of, whole_seconds
from evaluation.meters import Meter, Result
from evaluation.statistics import mean, to_json
from utils.files import make_folder, told, whole_files

logger = logging.getLogger(__name__)


def summarise(results: Sequence[Result], meter: Meter) -> dict[str, Any]:
    """Figures of results of one kind, that of this meter.

    `measures`: see `means`. `per_second`: of every curve, second by second, `mean` over all videos
    and `spread`. Values that a video does not have do not count. `kept`: see `kept_by`, of all but
    `short_videos`, which have no whole second behind their first. What the meter adds: its
    `extra_curves` by name, and under `groups` the `videos` and `measures` of each of its groups.
    """
    seeds = [result["seed"] for result in results]
    judged = [result for result in results if not is_short(result)]
    curves = {}
    for name in results[0]["report"]["per_second"]:
        values = _padded([result["report"]["per_second"][name] for result in results])
        centre, spread = mean_and_spread(values, seeds)
        curves[name] = {"mean": centre, "spread": spread}
    summary = {
        "videos": len(results),
        "prompts": len({result["prompt"] for result in results}),
        "seeds": len(set(seeds)),
        "measures": means(results, meter),
        "per_second": curves,
        "kept": kept_by(judged, meter) if judged else {},
        "short_videos": len(results) - len(judged),
        **meter.extra_curves(results),
    }
    groups = meter.groups(results)
    if groups:
        summary["groups"] = {
            title: {"videos": len(group), "measures": means(group, meter)}
            for title, group in groups.items()
        }
    return to_json(summary)


def means(results: Sequence[Result], meter: Meter) -> dict[str, dict[str, float]]:
    """Of every measure `mean` over the videos, and `spread`, the standard deviation (n - 1) of the
    means of each seed (NaN for a lone seed).
    """
    seeds = [result["seed"] for result in results]
    rows = [measures_of(result, meter) for result in results]
    measures = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        column = np.array([row.get(name, math.nan) for row in rows])
        centre, spread = mean_and_spread(column[:, None], seeds)
        measures[name] = {"mean": float(centre[0]), "spread": float(spread[0])}
    return measures


def kept_by(results: Sequence[Result], meter: Meter) -> dict[str, dict[str, Any]]:
    """Of every property of the meter that all results have: the `spread` that its distances are
    over, `drift` with the ends `low` and `high` of its interval over the prompts, `gain` and
    `variety` second by second (`keeping.Keeping`), and by the name of each published formula the
    mean distance of the ends of a video.
    """
    kept = {}
    reports = [result["report"].get("kept", {}) for result in results]
    for name in (n for n in meter.properties if all(n in report for report in reports)):
        known, videos = meter.properties[name], [report[name] for report in reports]
        spread = spread_of(videos, known)
        ends = {}
        for formula in FORMULAS:
            apart = np.array([trace[formula] for video in videos for trace in video], float)
            ends[formula] = float(mean(apart)) / spread
        prompts = [result["prompt"] for result in results]
        seen = keeping(videos, known, spread, prompts)
        kept[name] = {"spread": spread, **seen._asdict(), **ends}
    return kept


def is_short(result: Result) -> bool:
    """Whether a video has no whole second behind its first, to be held against it."""
    kept = result["report"].get("kept", {}).values()
    return any(whole_seconds(seen) < 2 for traces in kept for seen in traces)


def measures_of(result: Result, meter: Meter) -> dict[str, float]:
    """All numbers of one result: those of its report, those that its meter makes of it, timings."""
    extra = meter.extra_measures(result)
    return {**numbers(result["report"]), **extra, **result.get("timings", {})}


def numbers(report: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The single numbers of a report by dotted name (`accuracy.colour`); None becomes NaN."""
    flat: dict[str, float] = {}
    for name, value in report.items():
        if isinstance(value, Mapping):
            if name not in ("per_second", "kept"):
                flat |= numbers(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = math.nan if value is None else float(value)
    return flat


def mean_and_spread(values: np.ndarray, seeds: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Mean over the videos, and standard deviation of the seeds' means: [videos, n] -> 2 x [n]."""
    groups = [values[[s == seed for s in seeds]] for seed in dict.fromkeys(seeds)]
    means = np.stack([mean(group) for group in groups])
    known = ~np.isnan(means)
    count = known.sum(0)
    centre = np.where(known, means, 0).sum(0) / np.maximum(count, 1)
    squares = (np.where(known, means - centre, 0) ** 2).sum(0)
    spread = np.where(count > 1, np.sqrt(squares / np.maximum(count - 1, 1)), np.nan)
    return mean(values), spread


def _padded(curves: Sequence[Sequence[float | None]]) -> np.ndarray:
    values = np.full((len(curves), max(map(len, curves))), np.nan)
    for row, curve in zip(values, curves, strict=True):
        row[: len(curve)] = np.array(curve, float)
    return values


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
        make_folder(own.parent)
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
            for file in whole_files(self._path.absolute().parent, "*.jsonl")
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


KEPT = ("gain", "variety")  # beside the drift, in the same second


def summary_text(summary: Mapping[str, Any], meter: Meter) -> str:
    """The main figures of a summary: mean, and spread over the seeds; of all videos, then of the
    groups.
    """
    measures, groups = summary["measures"], summary.get("groups", {})
    columns = [measures, *(group["measures"] for group in groups.values())]
    lines = [
        f"{meter.name}: {summary['videos']} videos, {summary['prompts']} prompts, "
        f"{summary['seeds']} seeds (mean ± standard deviation of the seeds' means)"
    ]
    if groups:
        heads = ["all", *(f"{title} ({group['videos']})" for title, group in groups.items())]
        lines.append(f"{'':<24}" + "".join(f"{head:>18}" for head in heads))
    for title, names in meter.main_figures.items():
        known = [name for name in names if name in measures]
        if known:
            lines.append(title)
        for name in known:
            shown = "".join(f"{_shown(column.get(name)):>18}" for column in columns)
            label = name.split(".")[-1] if title not in ("flicker",) else name.split(".")[0]
            lines.append(f"  {label.replace('_', ' '):<22}{shown}")
    return "\n".join([*lines, *_kept_lines(summary)])


def _kept_lines(summary: Mapping[str, Any]) -> Iterator[str]:
    kept, short = summary["kept"], summary["short_videos"]
    if short:
        yield f"what is kept is not told of {short}, which have no whole second after their first"
    if not kept:
        return
    second = len(next(iter(kept.values()))["drift"])
    heads = [*KEPT, *(f"{label} apart" for label in FORMULA_LABELS.values())]
    titles = "".join(f"{head:>12}" for head in heads)
    yield f"{f'kept, in second {second}':<24}{'drift [95 %]':>24}{titles}"
    for title, found in kept.items():
        mean, low, high = (np.array(found[name][-1], float) for name in ("drift", "low", "high"))
        drift = Interval(mean, low, high, 1).text(digits=3)
        last = [*(found[name][-1] for name in KEPT), *(found[name] for name in FORMULA_LABELS)]
        cells = "".join(f"{UNKNOWN if value is None else f'{value:.3f}':>12}" for value in last)
        yield f"  {title:<22}{drift:>24}{cells}"
    if any(found["spread"] is None for found in kept.values()):
        yield "  (distances are over those of two videos, and here are no two that differ)"


def _shown(measure: Mapping[str, float | None] | None) -> str:
    if measure is None or measure["mean"] is None:
        return "-"
    spread = measure["spread"]
    return f"{measure['mean']:.3f}" if spread is None else f"{measure['mean']:.3f} ± {spread:.3f}"
