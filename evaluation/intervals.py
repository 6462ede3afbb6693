"""How sure a mean is: 95 % intervals over training seeds and videos, and of differences.

Values are `[seeds, videos, ...]`: of each training seed one of each scene, the same scenes for all,
NaN where there is none. A **bootstrap** draws seeds anew, with replacement, and scenes, for all
seeds alike, since a scene that is hard for one is hard for the others; its interval holds the
middle 95 % of the means of many such draws. Draws of few vary less than they should: of n seeds
(scenes) the deviations from the mean are made longer by sqrt(n / (n - 1)) first, and by how much
wider Student's t with n - 1 degrees of freedom is than a normal distribution: 2.7 for three. So an
interval holds the truth at least as often as it says, and more often (99 of 100) where neither
seeds nor scenes are alike in anything. One training seed says nothing of others: then the interval
is over the videos alone.
"""

import math
from functools import cache
from typing import NamedTuple

import numpy as np

from evaluation.statistics import Array, mean

LEVEL = 0.95
DRAWS = 2000
UNKNOWN = "–"
_NORMAL = 1.959964  # 97.5 % of a normal distribution, then of Student's t by degrees of freedom
_STUDENT = (12.706, 4.303, 3.182, 2.776)


class Interval(NamedTuple):
    """A mean, and the ends of its 95 % interval; `seeds`: how many training seeds it is over.

    Each is an array `[...]`, or a number.
    """

    mean: Array
    low: Array
    high: Array
    seeds: int

    def leaves_out_zero(self) -> bool:
        """Of numbers: whether 0 is outside; false where nothing is known."""
        return bool(self.low > 0 or self.high < 0)

    def each(self) -> "list[Interval]":
        """Of arrays `[n]`: those of each number."""
        ends = zip(self.mean, self.low, self.high, strict=True)
        return [Interval(*values, self.seeds) for values in ends]

    def within(self, least: float = -math.inf, most: float = math.inf) -> "Interval":
        """With ends no further out than the values can be."""
        low, high = (np.clip(end, least, most) for end in (self.low, self.high))
        return Interval(self.mean, low, high, self.seeds)

    def text(self, *, sign: bool = False, digits: int = 2) -> str:
        """Of numbers: `mean [low, high]`, without ends that are not known; a dash for no mean."""
        if np.isnan(self.mean):
            return UNKNOWN
        mean, *ends = (f"{float(x):{'+' if sign else ''}.{digits}f}" for x in self[:3])
        return mean if np.isnan(self.low) else f"{mean} [{', '.join(ends)}]"


def mean_interval(values: Array) -> Interval:
    """Of values `[seeds, videos, ...]`; NaN where no value is, and ends of NaN for a lone one."""
    seeds, videos = values.shape[:2]
    centre = mean(values.reshape(seeds * videos, *values.shape[2:]))
    of_seed, of_video = (_known_mean(values, axis) - centre for axis in (1, 0))
    rest = values - centre - of_seed - of_video
    spread = centre + _wider(seeds) * of_seed + _wider(videos) * of_video + rest
    flat = spread.reshape(seeds * videos, *values.shape[2:])
    known, drawn = ~np.isnan(flat), _drawn(seeds, videos)
    total = np.tensordot(drawn, np.where(known, flat, 0.0), 1)
    count = np.tensordot(drawn, known.astype(float), 1)
    means = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    ends = _quantiles(means) if seeds * videos > 1 else (centre * np.nan,) * 2
    return Interval(centre, *ends, seeds)


def difference(one: Array, other: Array) -> Interval:
    """Of two rows, `one` minus `other`, value by value: both of the same scenes and noise.

    Training seeds are paired by number, and so are scenes, up to the fewer of both.
    """
    seeds, videos = (min(pair) for pair in zip(one.shape[:2], other.shape[:2], strict=True))
    return mean_interval(one[:seeds, :videos] - other[:seeds, :videos])


@cache
def _drawn(seeds: int, videos: int) -> Array:
    """How often each draw has each video of each seed, `[DRAWS, seeds * videos]`."""
    draw = np.random.default_rng(0)
    of_seeds, of_videos = (draw.multinomial(n, [1 / n] * n, DRAWS) for n in (seeds, videos))
    both = of_seeds[:, :, None] * of_videos[:, None]
    return both.reshape(DRAWS, seeds * videos).astype(float)


def _known_mean(values: Array, axis: int) -> Array:
    """Mean over an axis, which stays, of the values that are known; NaN where none is."""
    return np.expand_dims(mean(np.moveaxis(values, axis, 0)), axis)


def _wider(number: int) -> float:
    """What makes the deviations of so many as wide as those of all that could have been drawn."""
    return math.sqrt(number / (number - 1)) * student(number - 1) / _NORMAL if number > 1 else 0.0


def student(degrees: int) -> float:
    """97.5 % of Student's t, from five degrees of freedom on by its expansion."""
    if degrees <= len(_STUDENT):
        return _STUDENT[degrees - 1]
    z = _NORMAL
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)


def _quantiles(means: Array) -> tuple[Array, Array]:
    """Both ends `[...]` of the middle of the draws `[draws, ...]`; NaN if any is not known."""
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return low, high
