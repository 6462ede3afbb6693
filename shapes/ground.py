"""Reading backgrounds: the colours of a frame's background, and the grating over it.

Holds also what captions allow a video to show, which every reading begins with.
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np

from evaluation.statistics import Array
from shapes.world import (
    BACKGROUNDS,
    COLOURS,
    SCALES,
    SHADES,
    TINTS,
    UNSAID,
    WAVE,
    WORLD,
    edge_names,
)

_LIKE = 25.0  # grey levels: what is further from a fit counts less than a quarter
_WAYS = np.arange(0, np.pi, np.pi / 36)  # the directions of a grating that are tried
_TURN = np.pi / 36  # a step of its fit turns it no further


@dataclass(frozen=True)
class Allowed:
    """What captions allow a video to show.

    edges [backgrounds, top and bottom, least and greatest, 3]; shades [colours, darkest and
    lightest, 3]; scales: of radii over those of their sizes; grating: whether there is one.
    """

    edges: Array
    shades: Array
    scales: tuple[float, ...]
    grating: bool

    @property
    def middle_edges(self) -> Array:
        """Colours [backgrounds, top and bottom, 3] in the middle of what is allowed."""
        return self.edges.mean(2)

    @property
    def palette(self) -> Array:
        """Colours [colours, 3] of shapes, each in the middle of its shades."""
        return self.shades.mean(1)


@cache
def allowed(unsaid: bool = UNSAID) -> Allowed:
    """What captions allow, with what they leave open or without."""
    if unsaid:
        tints = [[TINTS[edge] for edge in edge_names(name)] for name in BACKGROUNDS]
        shades = [SHADES[name] for name in COLOURS]
        scales = tuple(np.linspace(*SCALES, 5).tolist())
        return Allowed(np.array(tints, np.float32), np.array(shades, np.float32), scales, True)
    edges = np.array(list(BACKGROUNDS.values()), np.float32)
    colours = np.array(list(COLOURS.values()), np.float32)
    return Allowed(np.stack([edges] * 2, 2), np.stack([colours] * 2, 1), (1.0,), False)


class Ground(NamedTuple):
    """What is behind all shapes, in F frames of S x S pixels.

    edges [F, 2, 3]: colours at the top and the bottom; grating [F, 3]: height in grey levels,
    direction and phase of its wave (`world.Ground`), NaN where there is none; colours
    [F, S, 1 or S, 3].
    """

    edges: Array
    grating: Array
    colours: Array


def fit_ground(pixels: Array, known: Allowed) -> Ground:
    """The background of frames [F, S, S, 3], linear from top to bottom, shapes being outliers.

    Starts from the likeliest known background; then least squares, weighting each pixel at colour
    distance d from the last fit by 1 / (1 + (d / 25)^2)^2. A grating, one wave of all channels, is
    then fitted to their mean together with a line from top to bottom, in the likeliest of 36
    directions first, and from there by Gauss and Newton's steps; the edges to what it leaves.
    """
    size = pixels.shape[1]
    thin = pixels[:, ::2, ::2]
    down = ((np.arange(size, dtype=np.float32) + 0.5) / size)[::2]
    basis = np.stack([1 - down, down], 1)  # [S/2, 2]
    named = np.einsum("hk,bkc->bhc", basis, known.middle_edges)[:, :, None]
    likeness = [(_LIKE / (_LIKE + distance(thin, rows))).mean((1, 2)) for rows in named]
    edges = known.middle_edges[np.argmax(likeness, axis=0)]
    for _ in range(4):
        edges = _fit_rows(thin, _unlike(thin, _rows(edges, basis)), basis)
    if not known.grating:
        return Ground(edges, np.full((len(pixels), 3), np.nan), ground_rows(edges, size))
    wave = _likeliest_wave(thin, _unlike(thin, _rows(edges, basis)))
    for _ in range(4):
        shown = _shown(wave, size)[:, ::2, ::2, None]
        weight = _unlike(thin, _rows(edges, basis) + shown)
        edges = _fit_rows(thin - shown, weight, basis)
        wave = _better_wave(wave, thin, weight)
    colours = ground_rows(edges, size) + _shown(wave, size)[..., None].astype(np.float32)
    return Ground(edges, _in_half_a_turn(wave), colours)


def ground_rows(edges: Array, size: int) -> Array:
    """Background colours [F, size, 1, 3] between edges [F, 2, 3]."""
    down = ((np.arange(size, dtype=np.float32) + 0.5) / size)[:, None]
    return (edges[:, None, 0] * (1 - down) + edges[:, None, 1] * down)[:, :, None]


def distance(a: Array, b: Array) -> Array:
    """Euclidean, over the last axis."""
    difference = a - b
    return np.sqrt(dot(difference, difference))


def dot(a: Array, b: Array) -> Array:
    """Over the last axis; for one as short as a colour's several times faster than a sum."""
    return np.einsum("...c,...c->...", a, b)


def outside(values: Array, least: Array, greatest: Array) -> Array:
    """How far colours are from those that are allowed."""
    return distance(values, np.clip(values, least, greatest))


def _rows(edges: Array, basis: Array) -> Array:
    return np.einsum("hk,fkc->fhc", basis, edges)[:, :, None]


def _unlike(pixels: Array, fitted: Array) -> Array:
    """Weights [F, S, S] of pixels in a fit, the less the less they are like the last one."""
    off = pixels - fitted
    return 1 / (1 + dot(off, off) / _LIKE**2) ** 2


def _fit_rows(pixels: Array, weight: Array, basis: Array) -> Array:
    """Edges [F, 2, 3] of weighted pixels [F, S, S, 3]; basis [S, 2]."""
    normal = np.einsum("fh,hi,hj->fij", weight.sum(2), basis, basis)
    target = np.einsum("fhc,hi->fic", (weight[..., None] * pixels).sum(2), basis)
    return np.linalg.solve(normal, target)


# Gratings: waves [F, 3] of a height, a direction and a phase, which go on beyond their ranges


@cache
def _places(size: int) -> tuple[Array, Array]:
    """x and y [size, size] of all pixels, in units from the middle."""
    at = (np.arange(size) + 0.5) * (WORLD / size) - WORLD / 2
    x, y = np.meshgrid(at, at)
    return x, y


@cache
def _thin_places(size: int) -> tuple[Array, Array, Array]:
    """x and y [N] of every second pixel of every second row of 2 * size; lines [2, N]."""
    x, y = (places[::2, ::2].reshape(-1) for places in _places(2 * size))
    down = y / WORLD + 0.5
    return x, y, np.stack([1 - down, down])


def _shown(wave: Array, size: int) -> Array:
    """The waves as they are drawn [F, size, size]."""
    x, y = _places(size)
    height, way, phase = wave.T[:, :, None, None]
    along = x * np.cos(way) + y * np.sin(way)
    return height * np.cos(2 * np.pi / WAVE * along + phase)


@cache
def _tried(size: int) -> tuple[Array, Array]:
    """Of each of `_WAYS`: lines, cosine and -sine [D, 4, N], and the products of each two."""
    x, y, lines = _thin_places(size)
    angle = 2 * np.pi / WAVE * (np.outer(np.cos(_WAYS), x) + np.outer(np.sin(_WAYS), y))
    waves = np.stack([np.cos(angle), -np.sin(angle)], 1)  # [D, 2, N]
    basis = np.concatenate([np.broadcast_to(lines, (len(_WAYS), *lines.shape)), waves], 1)
    return basis, basis[:, :, None] * basis[:, None]


def _likeliest_wave(thin: Array, weight: Array) -> Array:
    """The best wave in one of `_WAYS` for each frame of `thin` [F, S, S, 3]."""
    basis, products = _tried(thin.shape[1])
    weight = weight.reshape(len(thin), -1).astype(np.float64)
    mean = thin.mean(3).reshape(len(thin), -1)
    normal = np.tensordot(weight, products, (1, 3))  # [F, D, 4, 4]
    target = np.tensordot(weight * mean, basis, (1, 2))  # [F, D, 4]
    solved = np.linalg.solve(normal, target[..., None])[..., 0]
    best = (target * solved).sum(2).argmax(1)
    cosine, sine = solved[np.arange(len(thin)), best, 2:].T
    return np.stack([np.hypot(cosine, sine), _WAYS[best], np.arctan2(sine, cosine)], 1)


def _better_wave(wave: Array, thin: Array, weight: Array) -> Array:
    """One step of the waves towards the least squares of weighted frames [F, S, S, 3]."""
    x, y, lines = _thin_places(thin.shape[1])
    weight = weight.reshape(len(thin), 1, -1).astype(np.float64)
    mean = thin.mean(3).reshape(len(thin), -1, 1)
    height, way, phase = wave.T[:, :, None]
    angle = 2 * np.pi / WAVE * (x * np.cos(way) + y * np.sin(way))  # [F, N]
    turned = 2 * np.pi / WAVE * (y * np.cos(way) - x * np.sin(way))
    waves = [np.cos(angle), -np.sin(angle), -height * np.sin(angle + phase) * turned]
    basis = np.concatenate(
        [np.broadcast_to(lines, (len(thin), *lines.shape)), np.stack(waves, 1)], 1
    )
    normal = (basis * weight) @ basis.swapaxes(1, 2)
    normal[:, 4, 4] += weight.sum((1, 2))  # where there is no wave nothing says how to turn it
    solved = np.linalg.solve(normal, (basis * weight) @ mean)[:, 2:, 0]
    cosine, sine, turn = solved.T
    way = wave[:, 1] + np.clip(turn, -_TURN, _TURN)
    return np.stack([np.hypot(cosine, sine), way, np.arctan2(sine, cosine)], 1)


def _in_half_a_turn(wave: Array) -> Array:
    """The same waves with directions in [0, pi) and phases in [0, 2 pi)."""
    height, way, phase = wave.T
    turns = np.floor(way / math.pi)
    phase = np.where(turns % 2 == 1, -phase, phase)
    return np.stack([height, way - turns * math.pi, phase % (2 * math.pi)], 1)
