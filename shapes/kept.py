"""What captions of the shapes world leave open, as properties that a video should keep."""

import math

import numpy as np

from evaluation.intervals import Interval
from evaluation.keeping import Property, Trace, Traces, trace
from evaluation.statistics import Array
from shapes.ground import allowed
from shapes.meter import Measures, ShapeTrack
from shapes.world import BACKGROUNDS, COLOURS, SCALES, WAVE_HEIGHT, ShapeAttributes

PROPERTIES = {
    "tint": Property("colour of the background's top and bottom", 1.0),
    "phase": Property("phase of the grating", math.pi / 2, circular=True),
    "direction": Property(
        "direction of the grating (half a turn is none)", math.pi / 2, circular=True
    ),
    "shade": Property("shade of a shape, darkest 0, lightest 1", 1 / 3),
    "size": Property("radius over that of the caption's size", (SCALES[1] - SCALES[0]) / 3),
}
"""Spreads are the mean distances of two clips; tints are measured in theirs, as it is another for
each colour."""

ERRORS = {
    **{"tint": 0.036, "phase": 0.01, "direction": 0.007, "shade": 0.07, "size": 0.1},
    **{"right": 0.05, "background_right": 0.01, "motion": 0.04, "path": 0.065, "grating": 0.025},
}
"""What is read in true clips that went through the VAE: of properties the mean drift, in their
spread; of what stands beside them (`ShapesReport.per_second`) how far the mean is from 1. No
difference below three times that is claimed (`told_apart`)."""


def traces(measures: Measures, *, given: int = 0) -> Traces:
    """Of `PROPERTIES`, in one video (`evaluation.keeping.trace`); UserError for a video that was
    measured as one of which captions leave nothing open.
    """
    seen, prompt = measures.seen, measures.prompt
    fps = seen.fps
    tints = [_tint(seen.edges[:, edge], prompt.background, edge) for edge in (0, 1)]
    phase, direction = _wave(seen.grating, given or max(1, round(fps)))
    shades = [shades_of(*pair) for pair in zip(seen.shapes, prompt.shapes, strict=True)]
    sizes = [sizes_of(*pair) for pair in zip(seen.shapes, prompt.shapes, strict=True)]
    values = {"tint": tints, "phase": [phase], "direction": [direction]}
    values |= {"shade": shades, "size": sizes}
    return {name: _traces(things, name, fps, given) for name, things in values.items()}


def wave_height(measures: Measures) -> Array:
    """Height of the grating over that of the world's [F]."""
    return measures.seen.grating[:, 0] / WAVE_HEIGHT


def told_apart(name: str, difference: Interval) -> bool:
    """Whether a difference of means is claimed: its interval leaves out 0, and it is above three
    times the meter's error.
    """
    return difference.leaves_out_zero() and bool(abs(difference.mean) > 3 * ERRORS[name])


def _traces(things: list[Array], name: str, fps: float, given: int) -> list[Trace]:
    return [trace(thing, PROPERTIES[name], fps=fps, given=given) for thing in things]


def _tint(edges: Array, background: str, edge: int) -> Array:
    """Colours [F, 3], from the middle of what the caption allows, over their spread there."""
    least, greatest = allowed(True).edges[list(BACKGROUNDS).index(background), edge]
    return (edges - (least + greatest) / 2) / mean_distance(greatest - least)


def mean_distance(sides: Array) -> float:
    """Of two points in a box with these sides, by a grid that is even in each coordinate."""
    steps = 32
    apart = np.arange(steps) / steps
    share = np.where(apart == 0, 1, 2 * (1 - apart)) / steps  # of pairs of a grid's points
    grid = np.meshgrid(*(side * apart for side in sides), indexing="ij")
    weight = share[:, None, None] * share[:, None] * share
    return float((np.sqrt(sum(axis**2 for axis in grid)) * weight).sum())


def _wave(grating: Array, reference: int) -> tuple[Array, Array]:
    """Phase and twice the direction [F, 1].

    A wave is the same with its direction turned by half a turn and its phase the other way, so the
    direction nearer to that of the first frames is taken.
    """
    _, way, phase = grating.T
    first = np.exp(2j * way[:reference]).mean()
    turned = np.cos(way - np.angle(first) / 2) < 0
    return np.where(turned, -phase, phase)[:, None], (2 * way)[:, None]


def shades_of(track: ShapeTrack, shape: ShapeAttributes) -> Array:
    """Shade of a shape of a captioned colour [F, 1], from the darkest (0) to the lightest (1)."""
    darkest, lightest = allowed(True).shades[list(COLOURS).index(shape.colour)]
    span = lightest - darkest
    return ((track.rgb - darkest) @ span / (span @ span))[:, None]


def sizes_of(track: ShapeTrack, shape: ShapeAttributes) -> Array:
    """Radius of a shape over that of its captioned size [F, 1]; NaN while partly hidden."""
    return (np.sqrt(track.area / np.pi) / shape.radius)[:, None]
