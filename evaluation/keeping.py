"""Does a video keep what it began with? One definition, for properties that nothing prescribes.

A property is what should stay as it is for as long as a video goes on: the colour of a background,
say, or its texture. Its **drift** in a second is the distance of its mean over that second from its
mean over the first second (or over the frames that were given), over its **spread**, the mean
distance of two videos: 0 when it is kept, about 1 when it is that of another video, above when it
is like none. Beside it stands, of many videos, the **gain**, the regression of the later value on
the first (1: kept; above 1: amplified; 0: forgotten), and the **variety**, the mean distance of two
videos in this second over the spread. Two published formulas compare the ends of a video instead.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from evaluation.intervals import mean_interval
from evaluation.statistics import Array, ends, mean, per_second

END_SHARE = 0.15
Numbers = NDArray[np.integer]


class Property(NamedTuple):
    """What is known of a property before any video.

    spread: the mean distance of two videos, in the unit of its values; None: that of the first
    seconds of the videos at hand. circular: its values are angles in radians.
    """

    title: str
    spread: float | None = None
    circular: bool = False

    def distance(self, values: Array, others: Array) -> Array:
        """Between values [..., n]: Euclidean; of angles, their mean absolute difference."""
        difference = values - others
        if self.circular:
            return np.abs((difference + np.pi) % (2 * np.pi) - np.pi).mean(-1)
        return np.sqrt((difference**2).sum(-1))


Trace = dict[str, Any]
"""One property of one thing in one video, as plain data: `first` [n], `seconds` [S, n], of which
`whole` are whole ones, and, by the name of each published formula, how far the ends of the video
are apart."""


def trace(values: Array, known: Property, *, fps: float, given: int = 0) -> Trace:
    """Sum values [F, n] of the frames up; NaN where a frame has none.

    `given`: of so many frames, which were not generated, the first value is the mean; none: of the
    first second.
    """
    reference = values[: given or max(1, round(fps))]
    seconds = _per_second(values, known, fps)
    pairs = {"first_last_5s": _ends(values, known, fps)}
    span = max(1, round(END_SHARE * len(values)))
    pairs["first_last_15_percent"] = mean_of(values[:span], known), mean_of(values[-span:], known)
    apart = {name: float(known.distance(*pair)) for name, pair in pairs.items()}
    whole = {"whole": math.floor(len(values) / fps + 1e-6)}
    first = {"first": mean_of(reference, known).tolist()}
    return {**first, "seconds": seconds.tolist(), **whole, **apart}


FORMULAS = {
    "first_last_5s": "first 5 s against last 5 s (Rolling Forcing, arXiv 2509.25161)",
    "first_last_15_percent": "first 15 % against last 15 % (Helios, arXiv 2603.04379)",
}
FORMULA_LABELS = {"first_last_5s": "5 s", "first_last_15_percent": "15 %"}


def drift_curve(traces: Sequence[Trace], known: Property, spread: float) -> Array:
    """Drift [S] of one video, the mean over its things; NaN in seconds without a value."""
    curves = [
        known.distance(values_of(t["seconds"]), values_of(t["first"])) / spread for t in traces
    ]
    return mean(np.array(curves))


def spread_of(videos: Sequence[Sequence[Trace]], known: Property) -> float:
    """What drift is measured in: the spread that is known, or that of the first values; NaN if
    these are of less than two videos, or all alike.
    """
    if known.spread is not None:
        return known.spread
    first = np.stack([values_of(t["first"]) for traces in videos for t in traces])
    spread = variety_of(first, known, owners_of(videos))
    return spread if spread > 0 else math.nan


def owners_of(videos: Sequence[Sequence[Any]]) -> Numbers:
    """Of each thing in all of the videos the number of its video."""
    return np.repeat(np.arange(len(videos)), [len(traces) for traces in videos])


class Keeping(NamedTuple):
    """What many videos kept of a property, in each whole second [S] that all of them have.

    low, high: the ends of the 95 % interval of the drift over the videos, or over their groups.
    """

    drift: Array
    low: Array
    high: Array
    gain: Array
    variety: Array


def keeping(
    videos: Sequence[Sequence[Trace]],
    known: Property,
    spread: float | None = None,
    groups: Sequence[Hashable] | None = None,
) -> Keeping:
    """Of the things [things] in each of the videos; `spread`: see `spread_of`.

    `groups`: of each video what it shares with others, such as its prompt. Videos of one group are
    alike, so the drift is the mean over groups, and its interval is over them.

    The gain is sum (x - mean x)(x0 - mean x0) / sum |x0 - mean x0|^2 over all things; of angles,
    which cannot grow, the mean cosine of the difference. Things without a value do not count.
    """
    spread = spread_of(videos, known) if spread is None else spread
    shortest = min(whole_seconds(t) for traces in videos for t in traces)
    things = [t for traces in videos for t in traces]
    first = np.stack([values_of(t["first"]) for t in things])  # [things, n]
    later = np.stack([values_of(t["seconds"])[:shortest] for t in things], 1)  # [S, things, n]
    owners = owners_of(videos)
    drifts = np.array([drift_curve(traces, known, spread)[:shortest] for traces in videos])
    if groups is not None:
        members = [[g == group for g in groups] for group in dict.fromkeys(groups)]
        drifts = np.stack([mean(drifts[own]) for own in members])
    found = mean_interval(drifts[None]).within(0)
    return Keeping(
        drift=found.mean,
        low=found.low,
        high=found.high,
        gain=np.array([gain_of(now, first, known) for now in later]),
        variety=np.array([variety_of(now, known, owners) / spread for now in later]),
    )


def whole_seconds(seen: Trace) -> int:
    """What is behind them is too short a time for a mean over a second."""
    return seen.get("whole", len(seen["seconds"]))


def gain_of(now: Array, first: Array, known: Property) -> float:
    """Gain of things from their first values to later ones, both [things, n] (see `keeping`)."""
    there = np.isfinite(now).all(1) & np.isfinite(first).all(1)
    now, first = now[there], first[there]
    if known.circular:
        return float(np.cos(now - first).mean()) if len(now) else math.nan
    if len(now) < 2:
        return math.nan
    now, first = now - now.mean(0), first - first.mean(0)
    varied = (first**2).sum()
    return float((now * first).sum() / varied) if varied > 0 else math.nan


def variety_of(values: Array, known: Property, owners: Numbers) -> float:
    """Mean distance of two of the values [things, n] that are of different videos, whose numbers
    are `owners` [things]; NaN where there are no two.
    """
    there = np.isfinite(values).all(1)
    values, owners = values[there], owners[there]
    pairs = owners[:, None] != owners[None]
    if not pairs.any():
        return math.nan
    return float(known.distance(values[:, None], values[None])[pairs].mean())


def mean_of(values: Array, known: Property) -> Array:
    """Mean over the first axis; of angles, the direction of the mean of their unit vectors."""
    if not known.circular:
        return mean(values)
    return np.arctan2(mean(np.sin(values)), mean(np.cos(values)))


def _per_second(values: Array, known: Property, fps: float) -> Array:
    if not known.circular:
        return per_second(values, fps)
    return np.arctan2(per_second(np.sin(values), fps), per_second(np.cos(values), fps))


def _ends(values: Array, known: Property, fps: float) -> tuple[Array, Array]:
    if not known.circular:
        return ends(values, fps)
    (sine, last_sine), (cosine, last_cosine) = ends(np.sin(values), fps), ends(np.cos(values), fps)
    return np.arctan2(sine, cosine), np.arctan2(last_sine, last_cosine)


def values_of(values: Any) -> Array:
    """Plain data as numbers; None is NaN."""
    return np.array(values, float)


Traces = Mapping[str, Sequence[Trace]]
"""Of one video, by the name of the property: a trace of each thing that has it."""
