"""What is kept of measured videos: little enough to be committed, enough for every table.

Of a video that is drift, prompt, motion and path at `POINTS`, each the mean over the seconds of a
stretch as long as a training clip (5x: the fifth), and the values that gain and variety are made
of at `COLUMNS`. A file holds the videos of one row, one training seed and one beginning, with what
they depend on.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.intervals import Interval, difference, mean_interval
from evaluation.keeping import (
    FORMULAS,
    Numbers,
    Property,
    Trace,
    drift_curve,
    gain_of,
    mean_of,
    owners_of,
    values_of,
    variety_of,
)
from evaluation.meters import Result
from evaluation.statistics import Array, mean, to_json
from shapes.kept import PROPERTIES
from utils.errors import UserError
from utils.files import write_text

POINTS = (1, 2, 3, 5, 7, 10, 12, 15, 20, 30, 45, 60)
COLUMNS = (1, 5, 10, 20, 60)
BESIDE = {
    "right": "colours and kinds right",
    "background_right": "background right",
    "motion": "motion",
    "path": "path",
    "grating": "height of the grating",
}
"""What is told beside what is kept: of the prompt, of motion, of the world's law, and whether there
is a grating at all whose phase could be kept."""
LIMITS = {"right": (0.0, 1.0), "background_right": (0.0, 1.0), "path": (-math.inf, 1.0)}
"""Where the values of these can be; all others, and every drift, are at least 0."""

Video = dict[str, Any]
"""One video summed up: `scene`, `kept` by property, `curves` by name of `BESIDE`, `flicker`."""


def spans(seconds: int, clip_seconds: float, given_seconds: float) -> Iterator[tuple[int, slice]]:
    """Of each of `POINTS` the whole seconds of that clip, without those that are the reference.

    Points that a video of so many seconds does not reach are left out, and all behind them.
    """
    reference = int(np.ceil(max(given_seconds, 1.0)))
    for times in POINTS:
        start = max(reference, round((times - 1) * clip_seconds))
        end = min(seconds, round(times * clip_seconds))
        if times * clip_seconds <= seconds + 1:
            yield times, slice(start, max(start, end))


def sum_up(result: Result, scene: int, clip_seconds: float, given_seconds: float) -> Video:
    """What is kept of the result of scene number `scene`."""
    report = result["report"]
    seconds = len(report["per_second"]["right"])
    at = dict(spans(seconds, clip_seconds, given_seconds))
    curves = {name: values_of(report["per_second"][name]) for name in BESIDE}
    return {
        "scene": scene,
        "kept": {n: _kept(report["kept"][n], known, at) for n, known in PROPERTIES.items()},
        "curves": {n: [mean(curve[span]) for span in at.values()] for n, curve in curves.items()},
        "flicker": report["background_flicker"]["ratio"],
    }


def _kept(traces: Sequence[Trace], known: Property, at: Mapping[int, slice]) -> dict[str, Any]:
    assert known.spread is not None
    curve = drift_curve(traces, known, known.spread)
    told = [span for times, span in at.items() if times in COLUMNS]
    later = [[mean_of(values_of(t["seconds"])[span], known) for t in traces] for span in told]
    apart = {name: values_of([t[name] for t in traces]) / known.spread for name in FORMULAS}
    return {
        "drift": [mean(curve[span]) for span in at.values()],
        "first": [t["first"] for t in traces],
        "later": later,
        **{name: mean(values) for name, values in apart.items()},
    }


@dataclass(frozen=True)
class Measured:
    """The videos of a row, of one beginning: of every training seed the same scenes."""

    seeds: Sequence[Sequence[Video]]

    def curve(self, name: str) -> Array:
        """Drift of a property, or what has a name of `BESIDE`, `[seeds, scenes, POINTS]`.

        NaN where a video does not reach.
        """
        if name in BESIDE:
            return self._values(lambda video: video["curves"].get(name, ()))
        return self._values(lambda video: video["kept"][name]["drift"])

    def interval(self, name: str, at: int | slice = slice(None)) -> Interval:
        """The mean of that curve over seeds and scenes, at each of `POINTS` or at one of them."""
        return mean_interval(self.curve(name)[..., at]).within(*LIMITS.get(name, (0.0,)))

    def formula(self, name: str, formula: str) -> Array:
        """A property by a published formula `[seeds, scenes]`, over the whole video."""
        return self._values(lambda video: [video["kept"][name][formula]], 1)[..., 0]

    def flicker(self) -> Array:
        """At block boundaries over inside blocks `[seeds, scenes]`."""
        return self._values(lambda video: [video["flicker"]], 1)[..., 0]

    def gain(self, name: str, times: int) -> float:
        """Of a property at one of `COLUMNS`, the mean over the training seeds."""
        known = PROPERTIES[name]
        return self._of_seeds(name, times, lambda now, first, owners: gain_of(now, first, known))

    def variety(self, name: str, times: int) -> float:
        """The same of the variety."""
        known = PROPERTIES[name]
        return self._of_seeds(
            name,
            times,
            lambda now, first, owners: variety_of(now, known, owners) / (known.spread or 1.0),
        )

    def first_variety(self, name: str) -> float:
        """Variety of the first values: of true clips, where videos go on from true prefixes."""
        known = PROPERTIES[name]
        return self._of_seeds(
            name,
            COLUMNS[0],
            lambda now, first, owners: variety_of(first, known, owners) / (known.spread or 1.0),
        )

    def common(self, other: "Measured") -> list[int]:
        """Those of `COLUMNS` that the videos of both reach."""
        return [times for times in COLUMNS if self.reaches(times) and other.reaches(times)]

    def minus(self, other: "Measured", times: int) -> dict[str, Interval]:
        """How both differ at a length, of each of `PROPERTIES` and `BESIDE`: of the same scenes."""
        at = POINTS.index(times)
        return {
            name: difference(self.curve(name)[..., at], other.curve(name)[..., at])
            for name in (*PROPERTIES, *BESIDE)
        }

    def reaches(self, times: int) -> bool:
        """Whether its videos are so long."""
        return bool(np.isfinite(self.curve("tint")[..., POINTS.index(times)]).any())

    def _values(
        self, pick: Callable[[Video], Sequence[float | None]], length: int = len(POINTS)
    ) -> Array:
        scenes = 1 + max(video["scene"] for videos in self.seeds for video in videos)
        values = np.full((len(self.seeds), scenes, length), np.nan)
        for seed, videos in enumerate(self.seeds):
            for video in videos:
                row = values_of(pick(video))
                values[seed, video["scene"], : len(row)] = row
        return values

    def _of_seeds(
        self, name: str, times: int, made: Callable[[Array, Array, Numbers], float]
    ) -> float:
        """Mean over the seeds of what is made of things `[things, n]`: their values now, their
        first values, and the number of each one's video.
        """
        found = []
        for videos in self.seeds:
            kept = [video["kept"][name] for video in videos]
            column = COLUMNS.index(times)
            if any(len(each["later"]) <= column for each in kept):
                return float("nan")
            now = [thing for each in kept for thing in each["later"][column]]
            first = [thing for each in kept for thing in each["first"]]
            owners = owners_of([each["first"] for each in kept])
            found.append(made(values_of(now), values_of(first), owners))
        return float(mean(np.array(found)))


# --- files ---------------------------------------------------------------------------------------


def write_run(path: Path, settings: Mapping[str, Any], videos: Sequence[Video]) -> None:
    """One line for each video, three significant digits."""
    lines = [json.dumps(_short(to_json(v)), separators=(",", ":")) for v in videos]
    head = json.dumps(dict(settings), indent=1)
    write_text(path, f'{{"settings": {head},\n"videos": [\n' + ",\n".join(lines) + "\n]}\n")


def read_run(path: Path) -> dict[str, Any]:
    """`settings` and `videos`; UserError for another file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        known = content.keys() >= {"settings", "videos"} and bool(content["videos"])
        known = known and content["settings"].keys() >= {"weights", "trained"}
    except (OSError, ValueError, AttributeError):
        known = False
    if not known:
        raise UserError(f"{path} holds no results of the ablations; delete it")
    return content


def _short(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _short(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_short(item) for item in value]
    return float(f"{value:.3g}") if isinstance(value, float) else value
