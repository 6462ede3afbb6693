"""The shapes world: captioned clips of one or two moving shapes, drawn on demand.

A clip is a pure function of (seed, index, split), so the data set needs no files and has no end.
The world is a square of 64 units; at the default size a unit is a pixel. A shape keeps its
velocity for ever and is reflected by the walls, so its position at any time is known in closed
form: that is the truth which `shapes.meter` holds generated videos against.

With `unsaid`, a clip also has properties that stay the same through it and that no caption mentions
(`Ground`, and `Shape.shade` and `Shape.scale`): what only the clip itself can tell.
"""

import math
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from itertools import combinations, count
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from utils.errors import UserError

Array = NDArray[np.floating]
Split = Literal["train", "heldout"]
RGB = tuple[int, int, int]
Colour = tuple[float, float, float]

UNSAID = True
"""Whether clips have properties that captions leave open, where nothing else is said."""

WORLD = 64.0
"""Side of the world, in units."""

FPS = 16

RUN_UP_SECONDS = 1.25
"""No shape meets a wall before this time, so the direction in a caption can be seen."""

START_SPREAD = 6.0
"""A shape comes from the wall or corner behind it: its start is uniform in a square of twice this
size, in units, beside that wall and halfway along it."""

PAIRS: dict[Split, float] = {"train": 3 / 4, "heldout": 1 / 4}
"""Share of the scenes that have two shapes. They are harder to learn, so training has more."""

LANE = 14.0
"""Of two shapes the front one starts this far to the left of the middle of its way, in units, the
other to the left or right of its own, whichever is farther away."""

TOGETHER_SECONDS = 3.5
"""Two shapes are over each other for less than this, every time within five minutes."""

_LOOKS = 4.0  # per second, to find that out

COLOURS: dict[str, RGB] = {
    "red": (220, 30, 40),
    "orange": (250, 135, 15),
    "yellow": (255, 235, 60),
    "green": (35, 165, 65),
    "cyan": (50, 210, 225),
    "blue": (35, 85, 240),
    "purple": (140, 45, 215),
    "pink": (255, 105, 190),
}

BACKGROUNDS: dict[str, tuple[RGB, RGB]] = {
    "black": ((16, 16, 20), (16, 16, 20)),
    "gray": ((128, 128, 128), (128, 128, 128)),
    "navy": ((14, 22, 84), (14, 22, 84)),
    "maroon": ((88, 14, 32), (88, 14, 32)),
    "black to gray": ((16, 16, 20), (128, 128, 128)),
    "navy to maroon": ((14, 22, 84), (88, 14, 32)),
}
"""Colour at the top and at the bottom edge; linear in between."""

SHADES: dict[str, tuple[RGB, RGB]] = {
    "red": ((222, 24, 36), (250, 66, 70)),
    "orange": ((226, 112, 8), (255, 148, 36)),
    "yellow": ((236, 222, 40), (255, 248, 108)),
    "green": ((12, 140, 30), (18, 190, 54)),
    "cyan": ((34, 184, 198), (80, 230, 244)),
    "blue": ((30, 84, 236), (84, 134, 255)),
    "purple": ((128, 32, 200), (160, 66, 242)),
    "pink": ((238, 86, 170), (255, 130, 212)),
}
"""The darkest and the lightest shade of each colour, where captions leave it open."""

TINTS: dict[str, tuple[RGB, RGB]] = {
    "black": ((12, 12, 12), (36, 36, 36)),
    "gray": ((100, 100, 100), (156, 156, 156)),
    "navy": ((12, 12, 98), (44, 44, 142)),
    "maroon": ((98, 12, 12), (142, 44, 44)),
}
"""The least and the greatest of each channel of a background, where captions leave it open."""

SCALES = (0.87, 1.13)
"""The range of a radius over that of its size, where captions leave it open."""

WAVE = 40.0
"""Units from one crest of a grating to the next."""

WAVE_HEIGHT = 10.0
"""Grey levels of a crest of a grating above its middle."""

_HELD_OUT = {
    "black": 0,
    "gray": 1,
    "navy": 3,
    "maroon": 4,
    "black to gray": 5,
    "navy to maroon": 7,
}
"""Which colour of each kind a background misses in training (`is_held_out`); all different."""

SIZES = {"small": 7.0, "large": 11.0}
"""Radius in units. Shapes of one size have one area, pi * radius^2, whatever their kind."""

SPEEDS = {"slow": 10.0, "fast": 20.0}
"""Units per second. In a latent frame of Wan (4 frames, cells of 8 pixels) a slow shape moves 2.5
pixels and a fast one 5, well under a cell."""

_HALF = math.sqrt(0.5)
DIRECTIONS: dict[str, tuple[float, float]] = {
    "right": (1.0, 0.0),
    "lower right": (_HALF, _HALF),
    "down": (0.0, 1.0),
    "lower left": (-_HALF, _HALF),
    "left": (-1.0, 0.0),
    "upper left": (-_HALF, -_HALF),
    "up": (0.0, -1.0),
    "upper right": (_HALF, -_HALF),
}
"""Unit vectors (x to the right, y downwards), clockwise in steps of 45 degrees."""


@dataclass(frozen=True)
class ShapeAttributes:
    """What a caption says of a shape; every field is a key of the values of its name."""

    kind: str
    colour: str
    size: str
    speed: str
    direction: str

    @property
    def radius(self) -> float:
        """Radius of the disc of equal area, in units."""
        return SIZES[self.size]

    @property
    def velocity(self) -> tuple[float, float]:
        """Initial velocity (x, y) in units per second."""
        x, y = DIRECTIONS[self.direction]
        return x * SPEEDS[self.speed], y * SPEEDS[self.speed]

    @property
    def bounds(self) -> tuple[Array, Array]:
        """Least and greatest centre (x, y), in units, with the whole shape inside the world."""
        side, up, down = (self.radius * extent for extent in KINDS[self.kind].extents)
        return np.array([side, up]), np.array([WORLD - side, WORLD - down])


@dataclass(frozen=True)
class Shape(ShapeAttributes):
    """A shape, where its centroid (x, y) is at time 0, in units, and what no caption says of it.

    `shade`: from the darkest (0) to the lightest (1) of its colour, or None for the colour itself;
    `scale`: its radius over that of its size.
    """

    position: tuple[float, float]
    shade: float | None = None
    scale: float = 1.0

    @property
    def radius(self) -> float:
        """Radius of the disc of equal area, in units."""
        return SIZES[self.size] * self.scale

    @property
    def rgb(self) -> Colour:
        """Its colour, in grey levels."""
        return COLOURS[self.colour] if self.shade is None else shade_of(self.colour, self.shade)

    def positions(self, num_frames: int, *, fps: float = FPS, start: int = 0) -> Array:
        """Centroids [num_frames, 2] in units, of frame `start` and those after it."""
        seconds = (start + np.arange(num_frames)[:, None]) / fps
        return reflect(np.array(self.position) + np.array(self.velocity) * seconds, *self.bounds)


@dataclass(frozen=True)
class Attributes:
    """All that a caption says: the background, and one or two shapes, the front one first."""

    background: str
    shapes: tuple[ShapeAttributes, ...]


@dataclass(frozen=True)
class Ground:
    """What no caption says of a background: its colours, and a faint grating over it.

    top and bottom: colours of the edges; direction: of the crests' normal from the x axis, in
    [0, pi); phase: of the wave in the middle of the picture, in [0, 2 pi).
    """

    top: Colour
    bottom: Colour
    direction: float
    phase: float


@dataclass(frozen=True)
class Scene:
    """A clip before it is drawn; `shapes` from front to back. Without `ground` its background has
    the colours of its name, and no grating.
    """

    background: str
    shapes: tuple[Shape, ...]
    caption: str
    ground: Ground | None = None

    @property
    def attributes(self) -> Attributes:
        """The scene without positions: what `parse_caption` recovers from its caption."""
        names = [field.name for field in fields(ShapeAttributes)]
        bare = (ShapeAttributes(**{n: getattr(shape, n) for n in names}) for shape in self.shapes)
        return Attributes(self.background, tuple(bare))


class Clip(NamedTuple):
    """Frames uint8 [F, H, W, 3] and what they show."""

    frames: NDArray[np.uint8]
    caption: str


class ShapesDataset:
    """Unlimited clips by index: `dataset[i]` is `Clip(frames, caption)`; iterating never ends."""

    def __init__(
        self,
        num_frames: int = 81,
        *,
        seed: int = 0,
        split: Split = "train",
        size: int = 64,
        unsaid: bool = UNSAID,
    ) -> None:
        self.num_frames, self.seed, self.split, self.size = num_frames, seed, split, size
        self.unsaid = unsaid

    def __getitem__(self, index: int) -> Clip:
        scene = sample_scene(self.seed, index, split=self.split, unsaid=self.unsaid)
        return Clip(render(scene, self.num_frames, size=self.size), scene.caption)

    def __iter__(self) -> Iterator[Clip]:
        return (self[index] for index in count())


# Sampling


def sample_scene(seed: int, index: int, *, split: Split = "train", unsaid: bool = UNSAID) -> Scene:
    """Scene `index` of the data set `seed`: one shape, or two of different colours (`PAIRS`).

    Of two shapes the smaller is in front, so none is ever hidden by a larger one. Each starts at
    the wall that it moves away from, the two side by side. In "train" no shape is held out (see
    `is_held_out`), in "heldout" all are. The caption is the same with `unsaid` and without.

    Raises:
        UserError: if the split is unknown.
    """
    if split not in get_args(Split):
        raise UserError(f"Unknown split {split!r}: use one of {', '.join(get_args(Split))}.")
    rng = random.Random(f"shapes/{seed}/{index}/{split}")
    # outside the loop, which refuses pairs more often
    number = 1 + int(rng.random() < PAIRS[split])
    while True:
        background = _pick(rng, BACKGROUNDS)
        drawn = sorted((_sample_attributes(rng) for _ in range(number)), key=lambda s: s.radius)
        different = len({shape.colour for shape in drawn}) == len(drawn)
        held_out = [is_held_out(shape, background) for shape in drawn]
        if not different or not all(held is (split == "heldout") for held in held_out):
            continue
        places = [(rng.random(), rng.random()) for _ in drawn]
        shapes = _placed([Shape(**vars(shape), position=(0.0, 0.0)) for shape in drawn], places)
        if _pass_by(shapes):
            break
    scene = Scene(background, shapes, "")
    scene = replace(scene, caption=caption(scene.attributes, int(rng.random() * len(PHRASINGS))))
    if unsaid:
        rng = random.Random(f"shapes/unsaid/{seed}/{index}/{split}")
        return _with_unsaid(scene, rng, places)
    return scene


def _with_unsaid(scene: Scene, rng: random.Random, places: Sequence[tuple[float, float]]) -> Scene:
    """The scene with all that its caption leaves open."""
    top, bottom = (_sample_tint(rng, name) for name in edge_names(scene.background))
    if " to " not in scene.background:
        bottom = top
    ground = Ground(top, bottom, math.pi * rng.random(), 2 * math.pi * rng.random())
    while True:
        scales = sorted(_between(SCALES, rng.random()) for _ in scene.shapes)  # smaller in front
        shades = [rng.random() for _ in scene.shapes]
        looks = zip(scene.shapes, shades, scales, strict=True)
        shapes = _placed(
            [replace(s, shade=shade, scale=scale) for s, shade, scale in looks], places
        )
        if _pass_by(shapes):
            return replace(scene, shapes=shapes, ground=ground)


def edge_names(background: str) -> tuple[str, str]:
    """Names of the colours of its top and bottom."""
    top, _, bottom = background.partition(" to ")
    return top, bottom or top


def _sample_tint(rng: random.Random, name: str) -> Colour:
    red, green, blue = (_between(ends, rng.random()) for ends in zip(*TINTS[name], strict=True))
    return red, green, blue


def _between(ends: tuple[float, float], share: float) -> float:
    return ends[0] + (ends[1] - ends[0]) * share


def is_held_out(shape: ShapeAttributes, background: str) -> bool:
    """Whether a shape of this colour and kind never occurs on this background in training.

    A Latin rule: each pair of kind and background misses exactly one colour, and each pair of
    colour and kind at most one background.
    """
    colour, kind = list(COLOURS).index(shape.colour), list(KINDS).index(shape.kind)
    return (colour + 3 * kind + _HELD_OUT[background]) % len(COLOURS) == 0


def _pick(rng: random.Random, choices: Mapping[str, object]) -> str:
    return list(choices)[int(rng.random() * len(choices))]


def _sample_attributes(rng: random.Random) -> ShapeAttributes:
    choices: dict[str, Mapping[str, object]] = {"kind": KINDS, "colour": COLOURS, "size": SIZES}
    choices |= {"speed": SPEEDS, "direction": DIRECTIONS}
    return ShapeAttributes(**{field: _pick(rng, values) for field, values in choices.items()})


def _placed(shapes: Sequence[Shape], places: Sequence[tuple[float, float]]) -> tuple[Shape, ...]:
    """The shapes at their starts; `places`: where in the squares of these, 0 to 1 along x and y."""
    trios = zip(shapes, _lanes(shapes), places, strict=True)
    return tuple(_place(*trio) for trio in trios)


def _lanes(shapes: Sequence[Shape]) -> tuple[float, ...]:
    """How far each shape starts to the right of the middle of its way; of two, far apart."""
    if len(shapes) == 1:
        return (0.0,)
    front, back = shapes
    place = _middle_of_start(front, -LANE)
    far = max((LANE, -LANE), key=lambda lane: math.dist(place, _middle_of_start(back, lane)))
    return -LANE, far


def _middle_of_start(shape: ShapeAttributes, lane: float) -> Array:
    low, high = shape.bounds
    right, down = DIRECTIONS[shape.direction]
    to_wall = np.sign((right, down)) * ((high - low) / 2 - START_SPREAD)
    return (low + high) / 2 - to_wall + lane * np.array((-down, right))


def _place(shape: Shape, lane: float, place: tuple[float, float]) -> Shape:
    """The shape at its start, `lane` units to the right of the middle of its way."""
    middle = _middle_of_start(shape, lane)
    run_up = np.array(shape.velocity) * RUN_UP_SECONDS
    low, high = shape.bounds
    low, high = low - np.minimum(run_up, 0), high - np.maximum(run_up, 0)
    low, high = np.clip((middle - START_SPREAD, middle + START_SPREAD), low, high)
    x, y = low + (high - low) * np.array(place)
    return replace(shape, position=(float(x), float(y)))


def _pass_by(shapes: Sequence[Shape]) -> bool:
    """Whether no two lie over each other at the start, or too long later."""
    pairs = list(combinations(shapes, 2))
    return all(_start_apart(*pair) and not _stay_together(*pair) for pair in pairs)


def _start_apart(one: Shape, other: Shape) -> bool:
    return math.dist(one.position, other.position) >= one.radius + other.radius


def _stay_together(one: Shape, other: Shape) -> bool:
    """Whether they lie over each other for `TOGETHER_SECONDS`, as two of one speed may.

    That is, their centres within three quarters of the larger radius.
    """
    ways = [shape.positions(round(300 * _LOOKS), fps=_LOOKS) for shape in (one, other)]
    over = np.linalg.norm(ways[0] - ways[1], axis=1) < 0.75 * max(one.radius, other.radius)
    changes = np.flatnonzero(np.diff(over, prepend=False, append=False))
    return bool((np.diff(changes)[::2] >= TOGETHER_SECONDS * _LOOKS).any())


# Drawing


class Kind(NamedTuple):
    """The geometry of a kind at radius 1, where the area is pi and the centroid is (0, 0)."""

    distance: Callable[[Array, Array, float], Array]
    """(x, y, radius) -> signed distance to the outline, negative inside (exact at edges)."""
    extents: tuple[float, float, float]
    """How far it reaches sideways, up and down."""


def reflect(position: Array, low: Array, high: Array) -> Array:
    """Positions of free motion, folded into [low, high] as by perfectly elastic walls."""
    room = high - low
    return low + room - np.abs((position - low) % (2 * room) - room)


def render(
    scene: Scene, num_frames: int, size: int = 64, fps: float = FPS, start: int = 0
) -> NDArray[np.uint8]:
    """Draw frames `start` to `start + num_frames - 1` as uint8 [num_frames, size, size, 3].

    Raises:
        UserError: if the number of frames or the size is below 1.
    """
    if num_frames < 1 or size < 1:
        raise UserError(f"num_frames and size must be 1 or more, not {num_frames} and {size}.")
    frames = np.empty((num_frames, size, size, 3), np.uint8)
    background = ground_colours(scene, size).transpose(2, 0, 1)
    tracks = [shape.positions(num_frames, fps=fps, start=start) for shape in scene.shapes]
    for first in range(0, num_frames, 16):  # a chunk stays in the processor's cache
        part = slice(first, first + 16)
        canvas = np.broadcast_to(background, (len(frames[part]), 3, size, size)).copy()
        for shape, track in reversed(list(zip(scene.shapes, tracks, strict=True))):
            alpha = coverage(shape.kind, shape.radius, track[part], size)[:, None]
            colour = np.array(shape.rgb, np.float32)[:, None, None]
            canvas += alpha * (colour - canvas)
        frames[part] = (canvas + 0.5).transpose(0, 2, 3, 1)
    return frames


def ground_colours(scene: Scene, size: int) -> Array:
    """Colours [size, size or 1, 3] of the background of a scene."""
    ground = scene.ground
    if ground is None:
        return background_rows(scene.background, size)[:, None]
    rows = _rows_between((ground.top, ground.bottom), size)[:, None]
    return rows + WAVE_HEIGHT * grating(ground.direction, ground.phase, size)[:, :, None]


def background_rows(name: str, size: int) -> Array:
    """Colours [size, 3] of the rows of a background."""
    return _rows_between(BACKGROUNDS[name], size)


def _rows_between(edges: tuple[Colour, Colour], size: int) -> Array:
    top, bottom = np.array(edges, np.float32)
    down = ((np.arange(size, dtype=np.float32) + 0.5) / size)[:, None]
    return top + (bottom - top) * down


def grating(direction: float, phase: float, size: int) -> Array:
    """A wave [size, size] of height 1 around 0 (`Ground`)."""
    places = (np.arange(size, dtype=np.float32) + 0.5) * np.float32(WORLD / size) - WORLD / 2
    along = places[None, :] * math.cos(direction) + places[:, None] * math.sin(direction)
    return np.cos(2 * math.pi / WAVE * along + phase, dtype=np.float32)


def shade_of(colour: str, shade: float) -> Colour:
    """The colour between its darkest (0) and lightest (1) shade."""
    red, green, blue = (_between(ends, shade) for ends in zip(*SHADES[colour], strict=True))
    return red, green, blue


def coverage(kind: str, radius: float, centres: Array, size: int) -> Array:
    """Share of each pixel [F, size, size] that a shape covers, at centres [F, 2] in units."""
    scale = size / WORLD
    pixels = np.arange(size, dtype=np.float32) + 0.5
    local = pixels - (centres * scale).astype(np.float32)[:, :, None]  # [F, 2, size]
    x, y = local[:, 0, None, :], local[:, 1, :, None]
    return np.clip(0.5 - KINDS[kind].distance(x, y, radius * scale), 0, 1)


def _circle(x: Array, y: Array, radius: float) -> Array:
    return np.sqrt(x * x + y * y) - np.float32(radius)


_SQUARE = math.sqrt(math.pi) / 2  # half its side


def _square(x: Array, y: Array, radius: float) -> Array:
    return np.maximum(abs(x), abs(y)) - np.float32(_SQUARE * radius)


_TRIANGLE = math.sqrt(4 * math.pi / math.sqrt(27))  # centre to corner


def _triangle(x: Array, y: Array, radius: float) -> Array:
    half = np.float32(_TRIANGLE * radius / 2)
    return np.maximum(y, np.float32(math.sqrt(3) / 2) * abs(x) - y / 2) - half


_WAIST = 0.5  # of a star: inner radius / outer radius
_STAR = math.sqrt(math.pi / (5 * _WAIST * math.sin(math.pi / 5)))  # centre to point


def _star(x: Array, y: Array, radius: float) -> Array:
    """Mirror the plane on to one tenth of the star, where the outline is one straight edge."""
    x, y = abs(x), -y
    for degrees in (-18, 54):
        normal_x, normal_y = _unit(degrees + 90)
        below = 2 * np.minimum(normal_x * x + normal_y * y, 0)
        x, y = x - below * normal_x, y - below * normal_y
    x = abs(x)
    inner_x, inner_y = (_WAIST * part for part in _unit(54))
    length = math.hypot(inner_x, 1 - inner_y)
    normal_x, normal_y = np.float32((1 - inner_y) / length), np.float32(inner_x / length)
    return normal_x * x + normal_y * (y - np.float32(_STAR * radius))


def _unit(degrees: float) -> tuple[np.float32, np.float32]:
    angle = math.radians(degrees)
    return np.float32(math.cos(angle)), np.float32(math.sin(angle))


KINDS: dict[str, Kind] = {
    "circle": Kind(_circle, (1, 1, 1)),
    "square": Kind(_square, (_SQUARE, _SQUARE, _SQUARE)),
    "triangle": Kind(_triangle, (_TRIANGLE * math.sqrt(3) / 2, _TRIANGLE, _TRIANGLE / 2)),
    "star": Kind(_star, (_STAR * math.cos(math.pi / 10), _STAR, _STAR * math.cos(math.pi / 5))),
}


# Captions


class Phrasing(NamedTuple):
    """One way to say a scene: of a shape, of a scene with one shape, of a scene with two."""

    shape: str
    one: str
    two: str


PHRASINGS = (
    Phrasing(
        "a {size} {colour} {kind} drifts {adverb} {direction}",
        "{front} over {background}",
        "{front} and, behind it, {back} over {background}",
    ),
    Phrasing(
        "a {size} {colour} {kind} moving {adverb} {direction}",
        "on {background}, {front}",
        "on {background}, {front} in front of {back}",
    ),
    Phrasing(
        "a {speed} {size} {colour} {kind} that heads {direction}",
        "{front}, with {background} behind it",
        "{front} in front of {back}, with {background} behind them",
    ),
    Phrasing(
        "a {size} {colour} {kind} glides {direction} at a {speed} pace",
        "{background}: {front}",
        "{background}: {front} and further back {back}",
    ),
    Phrasing(
        "{direction}, {adverb}, goes a {size} {kind} painted {colour}",
        "{front}; all on {background}",
        "{front}; behind it, {back}; all on {background}",
    ),
)

_ADVERBS = {"slow": "slowly", "fast": "quickly"}
_TOWARDS = {"up": "upwards", "down": "downwards"}


def caption(attributes: Attributes, phrasing: int) -> str:
    """Say the attributes in one of `PHRASINGS`; `parse_caption` is the inverse."""
    words = PHRASINGS[phrasing]
    said = [
        words.shape.format(
            size=shape.size,
            colour=shape.colour,
            kind=shape.kind,
            speed=shape.speed,
            adverb=_ADVERBS[shape.speed],
            direction=_direction_words(shape.direction),
        )
        for shape in attributes.shapes
    ]
    places = dict(zip(("front", "back"), said, strict=False))
    text = words.one if len(said) == 1 else words.two
    text = text.format(background=_background_words(attributes.background), **places)
    return f"{text[0].upper()}{text[1:]}."


def parse_caption(text: str) -> Attributes:
    """Recover the attributes from a caption in any phrasing; case and spacing do not matter.

    Raises:
        UserError: if the text is no caption of this world, where no two shapes share a colour.
    """
    return _read(text)[2]


def token_classes() -> list[int]:
    """How many values each number of a token's labels takes (`token_labels`)."""
    own = [len(KINDS), len(COLOURS), len(SIZES), len(DIRECTIONS), len(SPEEDS)]
    return [len(BACKGROUNDS), 2, 2, *own]


def token_labels(text: str, count_tokens: Callable[[str], int]) -> list[list[int]]:
    """What each token of a caption speaks of, as class numbers `[tokens, classes]`; -1: of none.

    All tokens: background and number of shapes. Those of the words about one shape: whether it is
    in front or behind, and its kind, colour, size, direction and speed. `count_tokens` says how
    many tokens the beginning of a text has, up to the end of a word.

    Raises:
        UserError: if the text is no caption of this world.
    """
    plain, match, said = _read(text)
    choices: list[list[str]] = [list(t) for t in (KINDS, COLOURS, SIZES, DIRECTIONS, SPEEDS)]
    scene = [list(BACKGROUNDS).index(said.background), len(said.shapes) - 1]
    labels = [[*scene, *[-1] * (1 + len(choices))] for _ in range(count_tokens(text))]
    for place, shape in enumerate(said.shapes):
        values = (shape.kind, shape.colour, shape.size, shape.direction, shape.speed)
        own = [known.index(value) for known, value in zip(choices, values, strict=True)]
        spans = [match.span(name) for name in match.groupdict() if name.endswith(f"_{place}")]
        first, end = min(start for start, _ in spans), max(end for _, end in spans)
        for label in labels[count_tokens(plain[:first].rstrip()) : count_tokens(plain[:end])]:
            label[2:] = [place, *own]
    return labels


def _read(text: str) -> tuple[str, re.Match[str], Attributes]:
    """A caption in lower case without full stop, where it says what, and what it says."""
    plain = " ".join(text.lower().split()).rstrip(".")
    for pattern in _patterns():
        if match := pattern.fullmatch(plain):
            said = _attributes_from(match.groupdict())
            if len({shape.colour for shape in said.shapes}) < len(said.shapes):
                raise UserError(f'Two shapes of one colour cannot be told apart: "{text}".')
            return plain, match, said
    example = caption(sample_scene(0, 0).attributes, 0)
    raise UserError(f'No caption of the shapes world: "{text}". Write it like this: "{example}"')


def _direction_words(name: str) -> str:
    return _TOWARDS.get(name, f"to the {name}")


def _background_words(name: str) -> str:
    return f"a gradient from {name}" if " to " in name else f"a {name} background"


@cache
def _patterns() -> tuple[re.Pattern[str], ...]:
    """A pattern per phrasing and number of shapes, made from the sentence that `caption` fills."""
    return tuple(
        re.compile(
            sentence.format(
                front=_with_choices(words.shape, "_0"),
                back=_with_choices(words.shape, "_1"),
                background=_choice("background", map(_background_words, BACKGROUNDS)),
            )
        )
        for words in PHRASINGS
        for sentence in (words.one, words.two)
    )


def _with_choices(sentence: str, suffix: str) -> str:
    return sentence.format(
        size=_choice(f"size{suffix}", SIZES),
        colour=_choice(f"colour{suffix}", COLOURS),
        kind=_choice(f"kind{suffix}", KINDS),
        speed=_choice(f"speed{suffix}", SPEEDS),
        adverb=_choice(f"speed{suffix}", _ADVERBS.values()),
        direction=_choice(f"direction{suffix}", map(_direction_words, DIRECTIONS)),
    )


def _choice(name: str, words: Iterable[str]) -> str:
    longest_first = sorted(words, key=len, reverse=True)
    return f"(?P<{name}>{'|'.join(map(re.escape, longest_first))})"


def _attributes_from(found: dict[str, str]) -> Attributes:
    names = {_ADVERBS[name]: name for name in SPEEDS}
    names |= {_direction_words(name): name for name in DIRECTIONS}
    names |= {_background_words(name): name for name in BACKGROUNDS}
    said = {key: names.get(word, word) for key, word in found.items()}
    shapes = (
        ShapeAttributes(**{f.name: said[f"{f.name}_{i}"] for f in fields(ShapeAttributes)})
        for i in range(2)
        if f"kind_{i}" in said
    )
    return Attributes(said["background"], tuple(shapes))
