"""Measures of a video without a truth: statistics per frame, drift over time, block flicker.

Holds also what every meter shares: the one formula of drift, per-second curves, the flicker at
block boundaries, and the way to JSON. Grey levels are 0 to 255 throughout.
"""

import dataclasses
import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from utils.errors import UserError
from wan.geometry import WAN_STRIDES

Array = NDArray[np.floating]
Frames = NDArray[np.uint8]

VERSION = 4
"""Raised when a measure is new or its formula another, as is then that of every meter built on it:
results of two versions are never mixed.
"""

DRIFT_SECONDS = 5.0
FIRST_FRAMES, BLOCK_FRAMES = WAN_STRIDES.video_frames(3), 3 * WAN_STRIDES.time
"""Video frames of the first and of every later block of three latent frames, as published."""

_STILL = 0.5  # grey levels, too little to see: the flicker of a still video is 1


@dataclass(frozen=True)
class FrameStatistics:
    """Per frame: colour mean and spread [F, 3]; texture [F, 3]; contrast, sharpness, change,
    brightness [F].

    Contrast is the standard deviation of the luma; sharpness the variance of its Laplacian; texture
    the standard deviation of what is lost when the luma is halved in size (means over 2 x 2), once,
    twice, three times; change the mean absolute difference to the frame before (NaN for the first).
    """

    mean: Array
    std: Array
    contrast: Array
    sharpness: Array
    texture: Array
    change: Array

    @property
    def brightness(self) -> Array:
        """Mean over the channels [F]."""
        return self.mean.mean(1)


@dataclass(frozen=True)
class Flicker:
    """Change per frame at block boundaries and inside blocks, in grey levels.

    `ratio` = (boundary + 0.5) / (inside + 0.5): 1 when boundaries cannot be told from the rest.
    """

    boundary: float
    inside: float
    ratio: float


@dataclass(frozen=True)
class VideoDrift:
    """Last five seconds against the first five (see `drift`).

    `mean` and `std` are distances in grey levels over the three channels; contrast, sharpness and
    motion are relative changes: -0.5 says that half of it is gone; NaN if there was none.
    """

    mean: float
    std: float
    contrast: float
    sharpness: float
    motion: float


@dataclass(frozen=True)
class VideoReport:
    """Everything measured on one video; `per_second` maps a measure to its curve."""

    seconds: float
    drift: VideoDrift
    flicker: Flicker
    brightness_flicker: Flicker
    motion: float
    per_second: dict[str, list[float]]


def report(
    frames: Frames, *, fps: float = 16, first: int = FIRST_FRAMES, block: int = BLOCK_FRAMES
) -> VideoReport:
    """Measure a video uint8 [F, H, W, 3] made of a block of `first` frames, then `block` each.

    `motion` is the mean absolute difference of successive frames, in grey levels.

    Raises:
        UserError: if the frames are not such a video of two frames or more.
    """
    return report_statistics(statistics(frames), fps=fps, first=first, block=block)


def report_statistics(
    seen: FrameStatistics, *, fps: float = 16, first: int = FIRST_FRAMES, block: int = BLOCK_FRAMES
) -> VideoReport:
    """`report` from the statistics of the frames."""
    curves = {
        name: per_second(getattr(seen, name), fps).tolist()
        for name in ("brightness", "contrast", "sharpness", "change")
    }
    return VideoReport(
        seconds=len(seen.change) / fps,
        drift=video_drift(seen, fps),
        flicker=flicker(seen.change[1:], first, block),
        brightness_flicker=flicker(np.abs(np.diff(seen.brightness)), first, block),
        motion=float(seen.change[1:].mean()),
        per_second=curves,
    )


def statistics(frames: Frames) -> FrameStatistics:
    """Statistics of each frame of a video uint8 [F, H, W, 3], one frame in memory at a time.

    Raises:
        UserError: if the frames are not such a video of two frames or more.
    """
    check_frames(frames)
    meter = VideoMeter()
    meter.add(frames)
    return meter.statistics()


class VideoMeter:
    """`statistics` of a video that comes in pieces, of any lengths; one frame is kept."""

    def __init__(self) -> None:
        self._rows: list[tuple] = []
        self._before: Array | None = None

    def add(self, frames: Frames) -> None:
        """The next frames, uint8 [n, H, W, 3]; UserError if they are not such frames."""
        check_frames(frames, 0)
        for frame in frames:
            pixels = frame.astype(np.float32)
            luma = pixels @ np.array([0.299, 0.587, 0.114], np.float32)
            flat = pixels.reshape(-1, 3)
            change = np.nan if self._before is None else np.abs(pixels - self._before).mean()
            detail = _laplacian(luma).var(), _texture(luma)
            row = (flat.mean(0), flat.std(0), luma.std(), *detail, change)
            self._rows.append(row)
            self._before = pixels

    def statistics(self) -> FrameStatistics:
        """Of all frames so far; UserError if they are fewer than two."""
        if len(self._rows) < 2:
            raise UserError(f"A meter needs at least 2 frames, not {len(self._rows)}.")
        columns = zip(*self._rows, strict=True)
        return FrameStatistics(*(np.array(column, np.float64) for column in columns))


def video_drift(seen: FrameStatistics, fps: float) -> VideoDrift:
    """Drift of each statistic: distances of the colour ones, relative changes of the others."""
    relative = {}
    for name in ("contrast", "sharpness", "change"):
        values = getattr(seen, name)[1:]
        start, _ = ends(values, fps)
        relative[name] = float(drift(values, fps) / start) if start > 0 else math.nan
    return VideoDrift(
        mean=float(np.linalg.norm(drift(seen.mean, fps))),
        std=float(np.linalg.norm(drift(seen.std, fps))),
        contrast=relative["contrast"],
        sharpness=relative["sharpness"],
        motion=relative["change"],
    )


def drift(values: Array, fps: float) -> Array:
    """Drift of a measure [F, ...]: mean over the last five seconds minus that over the first five.

    Under ten seconds the two spans shrink to half the video. Frames without a value (NaN) do not
    count; the drift is NaN if a span has none.
    """
    first, last = ends(values, fps)
    return last - first


def ends(values: Array, fps: float) -> tuple[Array, Array]:
    """Means of a measure [F, ...] over the first and the last five seconds (as in `drift`)."""
    span = max(1, min(round(DRIFT_SECONDS * fps), len(values) // 2))
    return mean(values[:span]), mean(values[-span:])


def per_second(values: Array, fps: float) -> Array:
    """Mean of a measure [F, ...] in each second; the last one may be short.

    A second in which no frame begins, below one frame per second, is NaN.
    """
    seconds = math.ceil(len(values) / fps)
    starts = [math.ceil(second * fps) for second in range(seconds + 1)]
    return np.stack([mean(values[a:b]) for a, b in pairwise(starts)])


def mean(values: Array) -> Array:
    """Mean over the first axis of the values that are not NaN; NaN where there are none."""
    known = ~np.isnan(values)
    total = np.where(known, values, 0).sum(0)
    return np.where(known.any(0), total / np.maximum(known.sum(0), 1), np.nan)


def flicker(changes: Array, first: int = FIRST_FRAMES, block: int = BLOCK_FRAMES) -> Flicker:
    """Compare changes [F - 1] (of frame i + 1 against frame i) at boundaries with those inside.

    A boundary lies before frame `first` and before every `block`-th frame after it. A video of
    one block has no boundary and the ratio 1.
    """
    frame = np.arange(1, len(changes) + 1)
    boundary = (frame >= first) & ((frame - first) % block == 0)
    inside = float(mean(changes[~boundary])) if not boundary.all() else 0.0
    at = float(mean(changes[boundary])) if boundary.any() else inside
    return Flicker(at, inside, (at + _STILL) / (inside + _STILL))


def check_frames(frames: Frames, at_least: int = 2) -> None:
    """Raise UserError unless frames are uint8 [F, H, W, 3] with F of `at_least` that many."""
    shaped = frames.dtype == np.uint8 and frames.ndim == 4 and frames.shape[-1] == 3
    if not shaped or len(frames) < at_least:
        raise UserError(
            f"A meter needs uint8 frames [2 or more, height, width, 3], "
            f"not {frames.dtype} {list(frames.shape)}."
        )


def to_json(value: Any) -> Any:
    """Dataclasses, arrays and numbers as what `json.dumps` takes; NaN becomes None."""
    if dataclasses.is_dataclass(value):
        fields = dataclasses.fields(value)
        return {field.name: to_json(getattr(value, field.name)) for field in fields}
    if isinstance(value, dict):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return to_json(value.tolist())
    return None if isinstance(value, float) and value != value else value


def _texture(luma: Array) -> list[float]:
    bands = []
    for _ in range(3):
        high, wide = (side // 2 for side in luma.shape)
        even = luma[: 2 * high, : 2 * wide]
        luma = even.reshape(high, 2, wide, 2).mean((1, 3))
        lost = even - luma.repeat(2, 0).repeat(2, 1)
        bands.append(float(lost.std()) if lost.size else 0.0)
    return bands


def _laplacian(luma: Array) -> Array:
    inner = luma[1:-1, 1:-1]
    return luma[:-2, 1:-1] + luma[2:, 1:-1] + luma[1:-1, :-2] + luma[1:-1, 2:] - 4 * inner
