"""The truth meter of the shapes world: what a video shows, and how far that is from its prompt.

`observe` reads a video without knowing its prompt; `measure` compares with the prompt frame by
frame; `report` sums a video up. Lengths are in units of the world (pixels at size 64), colours in
grey levels (0 to 255), distances between colours Euclidean in RGB.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cache
from itertools import combinations, pairwise, permutations
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from evaluation.statistics import (
    BLOCK_FRAMES,
    FIRST_FRAMES,
    Array,
    Flicker,
    Frames,
    check_frames,
    drift,
    ends,
    flicker,
    mean,
    per_second,
)
from shapes.ground import Allowed, allowed, distance, dot, fit_ground, outside
from shapes.world import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    FPS,
    KINDS,
    RUN_UP_SECONDS,
    SIZES,
    SPEEDS,
    UNSAID,
    WORLD,
    Attributes,
    Shape,
    ShapeAttributes,
    coverage,
    parse_caption,
    reflect,
)
from utils.errors import UserError

Bools = NDArray[np.bool_]
Indices = NDArray[np.integer]

ACCURACY_SECONDS = 5.0
PATH_SECONDS = 0.5
# How long true shapes are hidden from `observe` behind another, and less than half visible: in 80
# scenes of two shapes over five minutes at most 1 s and 3.1 s.
HIDDEN_SECONDS = 1.5
UNCLEAR_SECONDS = 4.0
METER_VERSION = 5
"""Raised when a measure is new or its formula another: results of two versions are never mixed."""

_CHUNK = 32  # frames read at a time
_SLOTS = 3  # shapes looked for in a frame: one more than a prompt may ask for
_LEAST_SIZE = 16  # of a frame: below, a small shape is under four pixels wide
LEAST_FPS = 2.0  # below, no frame follows within a path's half second
_LEAST_SPEED = min(SPEEDS.values()) / 4  # what is slower has no direction
_MIN_CORE = 12 / WORLD**2  # a shape has at least this share of the pixels in its flat inside
_SAME = 60.0  # colours closer than this are one colour: under half the gap of the palette
_ARTEFACT = 40.0  # colours further than this from any mix of what is seen are unexplained
_OCCLUDED = 0.95  # below this visible share an area says nothing


@dataclass(frozen=True)
class ShapeTrack:
    """One shape through the frames.

    present [F]; colour and kind [F], indices into `COLOURS` and `KINDS`, -1 when absent; rgb
    [F, 3]; area [F] in square units, NaN while partly hidden; radius [F] of the outline that fits
    best, hidden part included; position [F, 2] of the centroid and velocity [F, 2] per second, NaN
    when absent; visible [F], the share not hidden.
    """

    present: Bools
    colour: Indices
    kind: Indices
    rgb: Array
    area: Array
    radius: Array
    position: Array
    velocity: Array
    visible: Array


@dataclass(frozen=True)
class Observation:
    """What a video shows; all but `fps` and `shapes` are per frame [F].

    background: index into `BACKGROUNDS`; edges [F, 2, 3]: its colours at the top and the bottom;
    grating [F, 3]: height (grey levels), direction and phase of its wave, as in `Ground`, NaN where
    captions leave nothing open; count: number of shapes; artefacts: share of pixels that are
    neither background nor shape nor a mix of two; sharpness: inverse width of the outlines (see
    docs/shapes.md); brightness: mean grey level; change [F - 1]: mean absolute difference of
    background to the frame before.
    """

    fps: float
    background: Indices
    edges: Array
    grating: Array
    count: Indices
    artefacts: Array
    sharpness: Array
    brightness: Array
    change: Array
    shapes: tuple[ShapeTrack, ...]


@dataclass(frozen=True)
class ShapeMeasures:
    """One shape against its prompt, per frame [F] (1 or 0 for right or wrong).

    `motion` is the speed seen, over that of the prompt; `path` tells how well each half second
    follows the world's law. An absent shape has nothing right, and 0 for both. A measure without a
    value is NaN: those of what is hidden behind another shape for at most 1.5 s (but the path,
    which is then taken to be even), kind and size while under half of a shape is visible for at
    most 4 s, the area while part of it is hidden.
    """

    colour_right: Array
    kind_right: Array
    size_right: Array
    colour_error: Array
    area_ratio: Array
    motion: Array
    path: Array


@dataclass(frozen=True)
class Measures:
    """A video against its prompt, per frame; the sums of `report` are made from these."""

    prompt: Attributes
    seen: Observation
    background_right: Array
    background_error: Array
    shapes: tuple[ShapeMeasures, ...]

    @property
    def right(self) -> Array:
        """1 where every shape has its colour and kind [F], 0 where one has not, else NaN."""
        wrong = [(s.colour_right == 0) | (s.kind_right == 0) for s in self.shapes]
        right = np.min([s.colour_right * s.kind_right for s in self.shapes], axis=0)
        return np.where(np.any(wrong, axis=0), 0.0, right)


@dataclass(frozen=True)
class PromptAccuracy:
    """Over the first five seconds, 1 for right and 0 for wrong; the mean over two shapes."""

    background: float
    count: float
    colour: float
    kind: float
    size: float
    direction: float
    speed: float


@dataclass(frozen=True)
class ShapesDrift:
    """Last five seconds minus first five (`statistics.drift`) of the measure of each name."""

    background_error: float
    colour_error: float
    area_ratio: float
    artefacts: float
    sharpness: float
    right: float
    motion: float
    path: float


@dataclass(frozen=True)
class ShapesReport:
    """One video summed up.

    `survived_seconds`: whole seconds from the start with shapes right. `late`: means over the last
    five seconds, of the measures of `LATE`.
    """

    seconds: float
    accuracy: PromptAccuracy
    drift: ShapesDrift
    motion: float
    path: float
    background_flicker: Flicker
    brightness_flicker: Flicker
    survived_seconds: int
    late: dict[str, float]
    per_second: dict[str, list[float]]


def report(
    measures: Measures, *, first: int = FIRST_FRAMES, block: int = BLOCK_FRAMES
) -> ShapesReport:
    """Sum a video up; `first` and `block` are the frames in its first and later blocks."""
    seen = measures.seen
    return ShapesReport(
        seconds=len(seen.count) / seen.fps,
        accuracy=prompt_accuracy(measures),
        drift=shapes_drift(measures),
        motion=float(mean(curve(measures, "motion"))),
        path=float(mean(curve(measures, "path"))),
        background_flicker=flicker(seen.change, first, block),
        brightness_flicker=flicker(np.abs(np.diff(seen.brightness)), first, block),
        survived_seconds=survived_seconds(measures),
        late={name: float(ends(curve(measures, name), seen.fps)[1]) for name in LATE},
        per_second={n: per_second(curve(measures, n), seen.fps).tolist() for n in CURVES},
    )


def prompt_accuracy(measures: Measures) -> PromptAccuracy:
    """Judge what the caption says over the first five seconds.

    Background, count, colour, kind and size are right if they are so in most frames; speed if the
    median speed is within a factor of sqrt(2) of the right one; direction if the straight line
    through the run-up (1.25 s) points within 22.5 degrees of it, at 2.5 units per second at least.
    The direction is NaN below 4 frames in the run-up.
    """
    span = round(ACCURACY_SECONDS * measures.seen.fps)
    pairs = list(zip(measures.prompt.shapes, measures.shapes, strict=True))
    tracks = measures.seen.shapes
    count_right = (measures.seen.count == len(pairs)).astype(float)
    return PromptAccuracy(
        background=_mostly(measures.background_right[:span]),
        count=_mostly(count_right[:span]),
        colour=_average(_mostly(s.colour_right[:span]) for _, s in pairs),
        kind=_average(_mostly(s.kind_right[:span]) for _, s in pairs),
        size=_average(_mostly(s.size_right[:span]) for _, s in pairs),
        direction=_average(
            _direction_right(shape, track, measures.seen.fps)
            for (shape, _), track in zip(pairs, tracks, strict=True)
        ),
        speed=_average(float(_is_near(_median(s.motion[:span]), SPEEDS)) for _, s in pairs),
    )


def shapes_drift(measures: Measures) -> ShapesDrift:
    """Drift of each measure; of a measure of shapes, the mean over the shapes."""
    names = [field.name for field in fields(ShapesDrift)]
    fps = measures.seen.fps
    return ShapesDrift(**{name: float(drift(curve(measures, name), fps)) for name in names})


def survived_seconds(measures: Measures) -> int:
    """Whole seconds before the first one in which a shape is wrong in half of the frames."""
    whole = int(len(measures.right) / measures.seen.fps)
    wrong = per_second((measures.right == 0).astype(float), measures.seen.fps)[:whole] >= 0.5
    return int(np.argmax(wrong)) if wrong.any() else whole


OF_A_SHAPE = tuple(field.name for field in fields(ShapeMeasures))
OF_A_VIDEO = ("background_right", "background_error", "right")
OF_FRAMES = ("artefacts", "sharpness")
CURVES = (*OF_A_SHAPE, *OF_A_VIDEO, *OF_FRAMES)
LATE = (
    *("background_right", "colour_right", "kind_right", "size_right", "right"),
    *("motion", "path"),
)


def curve(measures: Measures, name: str) -> Array:
    """One of `CURVES`, per frame [F]; of a measure of shapes, the mean over the shapes."""
    if name in OF_A_SHAPE:
        return mean(np.array([getattr(shape, name) for shape in measures.shapes], float))
    return getattr(measures if name in OF_A_VIDEO else measures.seen, name)


# Against the prompt


def measure(
    frames: Frames, prompt: Attributes | str, *, fps: float = FPS, unsaid: bool = UNSAID
) -> Measures:
    """Compare a video uint8 [F, S, S, 3] with the attributes, or the caption, that it should show.

    `unsaid`: whether captions leave something open; what they allow is then no error.

    Raises:
        UserError: if the frames are no square video, or the caption is none of this world.
    """
    _check_square(frames, 2)
    meter = ShapeMeter(prompt, unsaid=unsaid)
    meter.add(frames)
    return meter.measures(fps)


class ShapeMeter:
    """`measure` for a video that comes in pieces: the same measures, without keeping the frames."""

    def __init__(self, prompt: Attributes | str, *, unsaid: bool = UNSAID) -> None:
        """Raises UserError if the caption is none of this world."""
        self.prompt = parse_caption(prompt) if isinstance(prompt, str) else prompt
        self.unsaid, self._allowed = unsaid, allowed(unsaid)
        expected = self._allowed.shades[[_index(COLOURS, s.colour) for s in self.prompt.shapes]]
        self._observer = Observer(expected.mean(1), unsaid=unsaid)

    def add(self, frames: Frames) -> None:
        """The next frames, uint8 [n, S, S, 3]; UserError if they are not square."""
        self._observer.add(frames)

    def measures(self, fps: float = FPS) -> Measures:
        """The video is over; UserError if it had fewer than two frames, or than 2 a second."""
        if fps < LEAST_FPS:
            raise UserError(f"Motion is measured from {LEAST_FPS:g} frames/s on, not at {fps:g}.")
        seen = self._observer.observation(fps)
        background = _index(BACKGROUNDS, self.prompt.background)
        hidden = _hidden(seen.shapes, self.prompt.shapes, seen.fps)
        parts = zip(seen.shapes, self.prompt.shapes, hidden, strict=True)
        least, greatest = self._allowed.edges[background].swapaxes(0, 1)
        return Measures(
            prompt=self.prompt,
            seen=seen,
            background_right=(seen.background == background).astype(float),
            background_error=outside(seen.edges, least, greatest).mean(1),
            shapes=tuple(_measure_shape(*part, seen.fps, self._allowed) for part in parts),
        )


def _hidden(
    tracks: Sequence[ShapeTrack], shapes: Sequence[ShapeAttributes], fps: float
) -> list[Bools]:
    """Where each shape [F] is absent for a while between places where another covers it."""
    paths = [_bridge(track.position, round(HIDDEN_SECONDS * fps)) for track in tracks]
    hidden = []
    for one, track in enumerate(tracks):
        covered = np.zeros(len(track.present), bool)
        for other in range(len(tracks)):
            reach = shapes[one].radius + shapes[other].radius
            covered |= (other != one) & (distance(paths[one], paths[other]) < reach)
        hidden.append(~track.present & covered)
    return hidden


def _measure_shape(
    track: ShapeTrack, shape: ShapeAttributes, hidden: Bools, fps: float, known: Allowed
) -> ShapeMeasures:
    colour = _index(COLOURS, shape.colour)
    absent = ~track.present & ~hidden
    clear = track.present & (track.visible >= 0.5)
    unclear = _short_stretches(hidden | track.present & ~clear, round(UNCLEAR_SECONDS * fps))
    kind_right = clear & (track.kind == _index(KINDS, shape.kind))
    size_right = clear & _is_near(track.radius / shape.radius, SIZES)
    return ShapeMeasures(
        colour_right=np.where(hidden, np.nan, track.colour == colour),
        kind_right=np.where(unclear, np.nan, kind_right),
        size_right=np.where(unclear, np.nan, size_right),
        colour_error=_off_shade(track.rgb, known.shades[colour]),
        area_ratio=track.area / (np.pi * shape.radius**2),
        motion=np.where(absent, 0.0, _speed(track.position, fps) / SPEEDS[shape.speed]),
        path=_path(track.position, hidden, _as_large(shape, track.radius, known), fps),
    )


def _as_large(shape: ShapeAttributes, seen: Array, known: Allowed) -> Shape:
    """The shape with the radius that is seen, as far as its caption allows it."""
    ratio = _median(seen) / shape.radius
    scale = 1.0 if math.isnan(ratio) else min(max(ratio, known.scales[0]), known.scales[-1])
    return Shape(**vars(shape), position=(0.0, 0.0), scale=scale)


def _short_stretches(marked: Bools, longest: int) -> Bools:
    """`marked` [F] without its stretches of more than so many frames."""
    edges = np.flatnonzero(np.diff(marked, prepend=False, append=False))
    kept = marked.copy()
    for start, end in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
        kept[start:end] = end - start <= longest
    return kept


def _speed(position: Array, fps: float) -> Array:
    """Distance moved in the quarter second around each frame, per second [F]; NaN at the ends."""
    half = max(1, round(fps / 8))
    speed = np.full(len(position), np.nan)
    if len(position) > 2 * half:
        moved = distance(position[2 * half :], position[: -2 * half])
        speed[half:-half] = moved * fps / (2 * half)
    return speed


def _path(position: Array, hidden: Bools, shape: Shape, fps: float) -> Array:
    """How well each half second follows the law of the world [F], from 0 (as a still shape) to 1.

    From each position the law (the prompt's speed along each axis, reflection at the walls) says
    the next half second, up to the signs of the velocity, where the better is taken. The path
    is 1 - rms(seen - law) / rms(start - law), at least 0; 0 where the shape is absent; NaN for the
    last half second. Where it is hidden, it is taken to move evenly.
    """
    bridged = _bridge(position, round(HIDDEN_SECONDS * fps))
    position = np.where(hidden[:, None], bridged, position)
    steps = round(PATH_SECONDS * fps)
    path = np.full(len(position), np.nan)
    if len(position) <= steps:
        return path
    ahead = np.stack([position[k : len(position) - steps + k] for k in range(1, steps + 1)], 1)
    start = position[: len(ahead), None]  # [F - steps, 1, 2]
    seconds = np.arange(1, steps + 1)[:, None] / fps
    velocity = np.abs(shape.velocity)
    missed, covered = [], []
    for sign in (1, -1):
        law = reflect(start + sign * velocity * seconds, *shape.bounds)
        missed.append(((ahead - law) ** 2).sum(1))
        covered.append(((start - law) ** 2).sum(1))
    better = np.argmin(missed, axis=0)[None]  # [1, F - steps, 2]
    error, still = (np.take_along_axis(np.array(v), better, 0)[0].sum(1) for v in (missed, covered))
    skill = 1 - np.sqrt(error / np.maximum(still, 1e-6))
    path[: len(ahead)] = np.where(np.isnan(skill), 0, np.maximum(skill, 0))
    return path


def _bridge(position: Array, longest: int) -> Array:
    """Positions [F, 2] with gaps (NaN) of at most so many frames filled evenly."""
    seen = np.flatnonzero(~np.isnan(position[:, 0]))
    filled = position.copy()
    for before, after in pairwise(seen.tolist()):
        if 1 < after - before <= longest + 1:
            share = np.arange(1, after - before)[:, None] / (after - before)
            step = position[after] - position[before]
            filled[before + 1 : after] = position[before] + share * step
    return filled


def _direction_right(shape: ShapeAttributes, track: ShapeTrack, fps: float) -> float:
    position = track.position[: round(RUN_UP_SECONDS * fps)]
    if len(position) < 4:
        return float("nan")
    time = np.arange(len(position))[~np.isnan(position[:, 0])]
    if len(time) < 4:
        return 0.0
    time_off = (time - time.mean()) / fps
    velocity = time_off @ position[time] / (time_off @ time_off)
    along = velocity @ np.array(DIRECTIONS[shape.direction])
    speed = np.linalg.norm(velocity)
    return float(speed >= _LEAST_SPEED and along >= speed * np.cos(np.pi / 8))


def _is_near(ratio: Any, values: dict[str, float]) -> Any:
    """Whether seen / expected is within half the step, in ratio, between the two values."""
    step = max(values.values()) / min(values.values())
    return (ratio < step**0.5) & (ratio > step**-0.5)


def _mostly(right: Array) -> float:
    return float(mean(right) > 0.5)


def _average(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def _median(values: Array) -> float:
    known = values[~np.isnan(values)]
    return float(np.median(known)) if len(known) else float("nan")


def _index(values: dict, name: str) -> int:
    return list(values).index(name)


# Reading frames


class _Reading(NamedTuple):
    """What a chunk of frames shows; K slots for the shapes that are followed."""

    edges: Array  # [F, 2, 3]
    grating: Array  # [F, 3]
    num_shapes: Indices  # [F]
    artefacts: Array  # [F]
    sharpness: Array  # [F]
    present: Bools  # [F, K]
    rgb: Array  # [F, K, 3]
    kind: Indices  # [F, K]
    area: Array  # [F, K]
    radius: Array  # [F, K]
    position: Array  # [F, K, 2]
    visible: Array  # [F, K]


def observe(
    frames: Frames, *, fps: float = FPS, colours: Array | None = None, unsaid: bool = UNSAID
) -> Observation:
    """Read a video uint8 [F, S, S, 3].

    Shapes are told apart by colour: each of `colours` [K, 3] follows the shape nearest to it.
    Without them, the shapes of the fullest of the first 16 frames are followed, one at least.

    Raises:
        UserError: if the frames are no square video of two frames or more.
    """
    _check_square(frames, 2)
    followed = _fullest(frames[:16], allowed(unsaid)) if colours is None else colours
    observer = Observer(followed, unsaid=unsaid)
    observer.add(frames)
    return observer.observation(fps)


class Observer:
    """`observe` for a video that comes in pieces, whatever their lengths: at most 32 are kept."""

    def __init__(self, colours: Array, *, unsaid: bool = UNSAID) -> None:
        """`colours` [K, 3] are followed, as in `observe`."""
        self._allowed = allowed(unsaid)
        self._followed = np.asarray(colours, np.float32)
        self._waiting: list[Frames] = []  # fewer than a chunk
        self._last: tuple[Frames, Bools] | None = None  # the frame before, and where it is clear
        self._readings: list[_Reading] = []
        self._brightness: list[float] = []
        self._change: list[float] = []

    def add(self, frames: Frames) -> None:
        """The next frames, uint8 [n, S, S, 3]; UserError if they are not square."""
        _check_square(frames, 0)
        video = np.concatenate([*self._waiting, frames])
        whole = len(video) - len(video) % _CHUNK
        for start in range(0, whole, _CHUNK):
            self._take(video[start : start + _CHUNK])
        self._waiting = [video[whole:].copy()]

    def observation(self, fps: float = FPS) -> Observation:
        """The video is over; UserError if it had fewer than two frames."""
        rest = np.concatenate(self._waiting) if self._waiting else np.empty((0, 1, 1, 3), np.uint8)
        if len(rest):
            self._take(rest)
        self._waiting = []
        if len(self._brightness) < 2:
            raise UserError(f"A meter needs at least 2 frames, not {len(self._brightness)}.")
        seen = _Reading(*(np.concatenate(parts) for parts in zip(*self._readings, strict=True)))
        edges, (least, greatest) = seen.edges[:, None], self._allowed.edges.transpose(2, 0, 1, 3)
        differences = outside(edges, least, greatest).mean(2)  # [F, backgrounds]
        return Observation(
            fps=fps,
            background=differences.argmin(1),
            edges=seen.edges,
            grating=seen.grating,
            count=seen.num_shapes,
            artefacts=seen.artefacts,
            sharpness=seen.sharpness,
            brightness=np.array(self._brightness),
            change=np.array(self._change),
            shapes=tuple(
                _track(seen, slot, fps, self._allowed) for slot in range(len(self._followed))
            ),
        )

    def _take(self, frames: Frames) -> None:
        reading, clear = _read(frames, self._followed, self._allowed)
        self._readings.append(reading)
        self._brightness += [frame.mean() for frame in frames]
        if self._last is not None:
            before, before_clear = self._last
            frames, clear = np.concatenate([before, frames]), np.concatenate([before_clear, clear])
        self._change += _background_change(frames, clear)
        self._last = frames[-1:].copy(), clear[-1:].copy()


def _check_square(frames: Frames, at_least: int) -> None:
    check_frames(frames, at_least)
    if frames.shape[1] != frames.shape[2]:
        raise UserError(f"The shapes world is square, not {frames.shape[2]} x {frames.shape[1]}.")
    if frames.shape[1] < _LEAST_SIZE:
        raise UserError(f"Shapes are measured from {_LEAST_SIZE} pixels on, not {frames.shape[1]}.")


def _track(seen: _Reading, slot: int, fps: float, known: Allowed) -> ShapeTrack:
    present, rgb, position = seen.present[:, slot], seen.rgb[:, slot], seen.position[:, slot]
    nearest = np.stack([_off_shade(rgb, ends) for ends in known.shades], 1).argmin(1)
    return ShapeTrack(
        present=present,
        colour=np.where(present, nearest, -1),
        kind=np.where(present, seen.kind[:, slot], -1),
        rgb=rgb,
        area=seen.area[:, slot],
        radius=seen.radius[:, slot],
        position=position,
        velocity=np.gradient(position, 1 / fps, axis=0),
        visible=seen.visible[:, slot],
    )


def _background_change(frames: Frames, clear: Bools) -> list[float]:
    changes = []
    for before, after, shared in zip(frames, frames[1:], clear[1:] & clear[:-1], strict=False):
        moved = np.abs(after[shared].astype(np.int16) - before[shared])
        changes.append(float(moved.mean()) if moved.size else np.nan)
    return changes


def _fullest(frames: Frames, known: Allowed) -> Array:
    """Colours [1 or 2, 3] of the shapes in the frame with most of them; black if there is none."""
    pixels = frames.astype(np.float32)
    rgb, present = _find_shapes(pixels, fit_ground(pixels, known).colours, known)
    best = present.sum(1).argmax()
    return np.nan_to_num(rgb[best, : max(1, min(2, present[best].sum()))])


def _read(frames: Frames, followed: Array, known: Allowed) -> tuple[_Reading, Bools]:
    """What the frames show, and which pixels [F, S, S] are background alone."""
    pixels = frames.astype(np.float32)
    edges, grating, base = fit_ground(pixels, known)
    rgb, present = _find_shapes(pixels, base, known)
    order = _match(rgb, present, followed)
    rgb = np.take_along_axis(rgb, order[:, :, None], 1)
    present = np.take_along_axis(present, order, 1)
    cover, unexplained = _unmix(pixels, base, rgb, present)
    keep = len(followed)
    firm = np.clip((cover - 0.5) / 0.7 + 0.5, 0, 1)  # below 0.15 is noise, above 0.85 is all
    reading = _Reading(
        edges=edges,
        grating=grating,
        num_shapes=present.sum(1),
        artefacts=unexplained.mean((1, 2)),
        sharpness=_sharpness(cover.sum(1)),
        present=present[:, :keep],
        rgb=rgb[:, :keep],
        **_fit_outlines(firm[:, :keep], present[:, :keep], known.scales)._asdict(),
    )
    return reading, (firm == 0).all(1) & ~unexplained


def _find_shapes(pixels: Array, base: Array, known: Allowed) -> tuple[Array, Bools]:
    """Colours [F, 3, 3] of up to three shapes per frame, largest first, and which are present.

    The core of a shape is where a pixel and its four neighbours are nearest to one colour of the
    palette. The most frequent colour is a shape; what is as near to its mean as `_SAME`, or a mix
    of it and the background, belongs to it; then the next.
    """
    label = np.concatenate(
        [distance(pixels, base)[None], [distance(pixels, colour) for colour in known.palette]]
    ).argmin(0)
    padded = np.pad(label, ((0, 0), (1, 1), (1, 1)), mode="edge")
    core = label > 0
    for near in (
        padded[:, :-2, 1:-1],
        padded[:, 2:, 1:-1],
        padded[:, 1:-1, :-2],
        padded[:, 1:-1, 2:],
    ):
        core &= near == label
    rgb = np.full((len(pixels), _SLOTS, 3), np.nan, np.float32)
    present = np.zeros((len(pixels), _SLOTS), bool)
    for slot in range(_SLOTS):
        counts = np.stack([(core & (label == i)).sum((1, 2)) for i in range(1, len(COLOURS) + 1)])
        commonest = counts.argmax(0)[:, None, None] + 1
        seed = _mean_colour(pixels, core & (label == commonest))
        same = core & (distance(pixels, seed[:, None, None]) < _SAME)
        found = same.mean((1, 2)) >= _MIN_CORE
        colour = _mean_colour(pixels, same)
        rgb[found, slot], present[found, slot] = colour[found], True
        core &= ~same & (_mix(pixels, base, colour[:, None, None])[1] > _ARTEFACT)
        if not found.any():
            break
    return rgb, present


def _mean_colour(pixels: Array, mask: Bools) -> Array:
    total = np.einsum("fhw,fhwc->fc", mask.astype(np.float32), pixels)
    return total / np.maximum(mask.sum((1, 2)), 1)[:, None]


def _mix(pixels: Array, start: Array, end: Array) -> tuple[Array, Array]:
    """The best mix of two colours for each pixel: the share of `end` (0 to 1), and the miss."""
    span = end - start
    share = np.clip(dot(pixels - start, span) / np.maximum(dot(span, span), 1e-6), 0, 1)
    return share, distance(pixels, start + share[..., None] * span)


def _off_shade(pixels: Array, ends: Array) -> Array:
    """How far each pixel is from a colour, whatever its shade between the two `ends`."""
    return _mix(pixels, *ends)[1] if (ends[0] != ends[1]).any() else distance(pixels, ends[0])


def _match(rgb: Array, present: Bools, followed: Array) -> Indices:
    """The order [F, 3] of the shapes of each frame that fits the followed colours [K, 3] best."""
    apart = distance(rgb[:, :, None], followed)  # [F, 3, K]
    apart = np.where(present[:, :, None], apart, 500.0)
    orders = np.array(list(permutations(range(_SLOTS))))
    slots = np.arange(len(followed))
    costs = np.stack([apart[:, order[slots], slots].sum(1) for order in orders])
    return orders[costs.argmin(0)]


def _unmix(pixels: Array, base: Array, rgb: Array, present: Bools) -> tuple[Array, Bools]:
    """How much of each pixel each shape covers [F, 3, S, S], and which are unexplained [F, S, S].

    Every pixel is a mix of the two of (background, shapes) that miss it least. Those that are
    missed by more than `_ARTEFACT` are unexplained, and covered by no shape.
    """
    cover = np.zeros((len(pixels), _SLOTS, *pixels.shape[1:3]), np.float32)
    least = distance(pixels, base)
    seen = [slot for slot in range(_SLOTS) if present[:, slot].any()]
    for back, front in combinations([-1, *seen], 2):
        start = base if back < 0 else rgb[:, None, None, back]
        share, miss = _mix(pixels, start, rgb[:, None, None, front])
        better = miss < least  # never where a shape is absent: its colour is NaN
        least = np.where(better, miss, least)
        cover = np.where(better[:, None], 0, cover)
        cover[:, front] = np.where(better, share, cover[:, front])
        if back >= 0:
            cover[:, back] = np.where(better, 1 - share, cover[:, back])
    unexplained = least > _ARTEFACT
    return np.where(unexplained[:, None], 0, cover), unexplained


def _sharpness(cover: Array) -> Array:
    """Inverse width of the outlines in 1/unit [F]: sum |g|^2 / sum |g| over gradients g > 0.15."""
    down, right = np.gradient(cover, axis=(1, 2))
    slope = np.sqrt(down**2 + right**2)
    slope = np.where(slope > 0.15, slope, 0)
    width = np.maximum(slope.sum((1, 2)), 1e-6)
    return (slope**2).sum((1, 2)) / width * (cover.shape[1] / WORLD)


# Outlines


class _Fit(NamedTuple):
    """The template that fits best, per frame [F]; position [F, 2]; cost: squared error."""

    kind: Indices
    radius: Array
    position: Array
    cost: Array


class _Outlines(NamedTuple):
    """The last fields of `_Reading`."""

    kind: Indices  # [F, K]
    area: Array  # [F, K]
    radius: Array  # [F, K]
    position: Array  # [F, K, 2]
    visible: Array  # [F, K]


_RADII = np.arange(2.0, 20.0, 0.25)


def _fit_outlines(cover: Array, present: Bools, scales: Sequence[float]) -> _Outlines:
    """Kind, area, position, visible share of the shapes that cover [F, K, S, S].

    Each is matched with the world's own drawing of every kind at the measured area. Of two, the
    worse match is taken to be behind, and matched again, at the known sizes also, where the other
    does not cover it.
    """
    unit = WORLD / cover.shape[-1]
    area = cover.sum((2, 3)) * unit**2
    measured = np.sqrt(area / np.pi)[:, :, None]  # [F, K, 1]
    slots = range(cover.shape[1])
    fits = [_best_template(cover[:, k], np.ones_like(cover[:, k]), measured[:, k]) for k in slots]
    if len(fits) == 2:
        behind = np.argmax([fit.cost / np.maximum(area[:, k], 1) for k, fit in enumerate(fits)], 0)
        for k in slots:
            rows = np.flatnonzero((behind == k) & present.all(1))
            if not len(rows):
                continue
            sizes = [radius * scale for radius in SIZES.values() for scale in scales]
            radii = np.insert(np.tile(sizes, (len(rows), 1)), 0, measured[rows, k, 0], 1)
            again = _best_template(cover[rows, k], 1 - cover[rows, 1 - k], radii)
            for old, new in zip(fits[k], again, strict=True):
                old[rows] = new
    kind, radius, position, _ = (np.stack(column, 1) for column in zip(*fits, strict=True))
    visible = np.minimum(area / (np.pi * radius**2), 1)
    return _Outlines(
        kind=kind,
        area=np.where(present & (visible > _OCCLUDED), area, np.nan),
        radius=radius,
        position=np.where(present[..., None], position, np.nan),
        visible=visible,
    )


def _best_template(cover: Array, weight: Array, radii: Array) -> _Fit:
    """Match cover [F, S, S] with each kind at radii [F, R], at every place, pixels weighted.

    The squared error at all places is a correlation, so it is computed by Fourier transforms; the
    minimum is refined below a pixel by parabolas.
    """
    size = cover.shape[-1]
    templates, squares = _templates(size)  # [kinds, radii, S, S/2 + 1]
    nearest = np.abs(radii[..., None] - _RADII).argmin(-1)  # [F, R]
    image, mask = np.fft.rfft2(weight * cover), np.fft.rfft2(weight)
    spectrum = mask[:, None, None] * squares[:, nearest].swapaxes(0, 1)
    spectrum -= 2 * image[:, None, None] * templates[:, nearest].swapaxes(0, 1)
    error = np.fft.irfft2(spectrum, s=(size, size))  # [F, kinds, R, S, S]
    best = np.unravel_index(error.reshape(len(error), -1).argmin(1), error.shape[1:])
    frame = np.arange(len(error))
    kind, radius, row, column = best
    plane = error[frame, kind, radius]  # [F, S, S]
    least = plane[frame, row, column]
    shift = [
        _vertex(plane[frame, row, column - 1], least, plane[frame, row, (column + 1) % size]),
        _vertex(plane[frame, row - 1, column], least, plane[frame, (row + 1) % size, column]),
    ]
    place = (np.stack([column, row], 1) + size // 2) % size + np.stack(shift, 1)
    cost = least + (weight * cover**2).sum((1, 2))
    return _Fit(kind, _RADII[nearest[frame, radius]], place * WORLD / size, cost)


def _vertex(before: Array, least: Array, after: Array) -> Array:
    """Where the parabola through three neighbours is least, relative to the middle one."""
    return (before - after) / np.maximum(2 * (before - 2 * least + after), 1e-6)


@cache
def _templates(size: int) -> tuple[Array, Array]:
    """Conjugate spectra of every kind at `_RADII`, centred in the image, and of their squares."""
    centre = np.full((1, 2), size // 2 * WORLD / size)
    drawn = np.stack(
        [[coverage(kind, radius, centre, size)[0] for radius in _RADII] for kind in KINDS]
    )
    return np.conj(np.fft.rfft2(drawn)), np.conj(np.fft.rfft2(drawn**2))
