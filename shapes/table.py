"""What becomes of the figures of the ablations: a table, curves, a place in a page."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from evaluation.curves import draw_curves
from evaluation.meters import Curve, Result
from evaluation.results import mean_and_spread, measures_of
from evaluation.statistics import mean as mean_of_known
from shapes.truth import ShapesTruth
from shapes.variants import VARIANTS
from utils.config import ROOT
from utils.errors import UserError
from utils.files import write_text

TRUTH = ShapesTruth()
MARKS = ("<!-- ablations -->", "<!-- /ablations -->")
UNKNOWN = "–"


@dataclass(frozen=True)
class Column:
    """Mean over the videos of the mean over `measures`.

    `lengths`: the videos that tell it; of several the first that know the measures.
    """

    title: str
    measures: tuple[str, ...]
    digits: int = 2
    lengths: tuple[Literal["short", "long"], ...] = ("short",)


ANY_LENGTH: tuple[Literal["short", "long"], ...] = ("short", "long")


COLUMNS = (
    Column(
        "prompt followed, first 5 s",
        ("accuracy.colour", "accuracy.kind", "accuracy.background", "accuracy.direction"),
    ),
    Column("right, last 5 s", ("late.right",)),
    Column("drift of right", ("drift.right",)),
    Column("drift of background", ("drift.background_error",), 1),
    Column("drift of colour", ("drift.colour_error",), 1),
    Column("motion, last 5 s", ("late.motion",)),
    Column("drift of motion", ("drift.motion",)),
    Column("path, last 5 s", ("late.path",)),
    Column("drift of path", ("drift.path",)),
    Column("flicker", ("background_flicker.ratio",)),
    Column("never wrong in 5 s", ("survival.5s",), lengths=ANY_LENGTH),
    Column("never wrong in 60 s", ("survival.60s",), lengths=ANY_LENGTH),
    Column("never wrong in 5 min", ("survival.300s",), lengths=ANY_LENGTH),
    Column("right at 60 s", ("right_at.60s",), lengths=ANY_LENGTH),
    Column("right at 5 min", ("right_at.300s",), lengths=ANY_LENGTH),
    Column("right, last 5 s of long videos", ("late.right",), lengths=("long",)),
    Column("motion, last 5 s of long videos", ("late.motion",), lengths=("long",)),
    Column("frames/s", ("fps",), 1),
)

CURVES = {
    "right": TRUTH.curves["right"],
    "colour_right": Curve("colour right (share of frames)", share=True),
    "kind_right": Curve("kind right (share of frames)", share=True),
    **{name: TRUTH.curves[name] for name in ("motion", "path", "background_error", "survival")},
}

LEGEND = (
    "Mean over all videos ± standard deviation (n - 1) of the seeds' means, where there are "
    "several. Prompt followed: mean of colour, kind, background and direction. Right: share of the "
    "frames in which every shape has its colour and kind. Motion: speed over the prompt's. Path: 1 "
    "if each half second follows the world's law, 0 for a still picture. Drift: last 5 s minus "
    "first 5 s; of background and colour, of their error in grey levels. Never wrong: share of the "
    "videos without a second in which half of the frames are wrong; right at: of those that are "
    "right in most of the 5 s before, whatever was earlier. Long videos: those of the greater "
    "length. The formulas are in docs/shapes.md."
)


Figures = dict[str, dict[str, Any]]  # by variant


def write_table(folder: Path, short: Figures, long: Figures) -> str:
    """The table as a file, and as text."""
    text = make_table(short, long)
    write_text(folder / "table.md", text)
    return text


def make_table(short: Figures, long: Figures) -> str:
    """Markdown: what was measured, the table, and what each variant is for."""
    rows = [variant for variant in VARIANTS if variant.key in short or variant.key in long]
    lines = [f"{describe(short, long)}. {LEGEND}", ""]
    lines.append(markdown_row(["variant", *(column.title for column in COLUMNS)]))
    lines.append(markdown_row(["---", *("---:" for _ in COLUMNS)]))
    made = {
        variant.key: [figures[variant.key] for figures in (short, long) if variant.key in figures]
        for variant in rows
    }
    changes = {key: changed(contents) for key, contents in made.items()}
    alike = len(set(changes.values())) == 1
    for variant in rows:
        title = variant.title if alike else f"{variant.title}{changes[variant.key]}"
        videos = [figures.get(variant.key, {}).get("videos", []) for figures in (short, long)]
        lines.append(markdown_row([title, *(cell(c, *videos) for c in COLUMNS)]))
    lines.append("")
    for variant in rows:
        config, weights = (
            " and ".join(dict.fromkeys(shown_path(c["settings"][key]) for c in made[variant.key]))
            for key in ("config", "checkpoint")
        )
        parts = f"{config} with {weights}{changes[variant.key]}"
        lines.append(f"- **{variant.title}** ({parts}): {variant.why}.")
    return "\n".join(lines) + "\n"


def changed(contents: Sequence[dict[str, Any]]) -> str:
    """The overrides that figures were made with, to follow a name; empty if there were none."""
    seen = dict.fromkeys(item for c in contents for item in c["settings"]["overrides"])
    return "".join(f", {override}" for override in seen)


def shown_path(path: str) -> str:
    """A file as people know it: from the project's root on, if it is in there."""
    absolute = Path(path).absolute()
    inside = absolute.is_relative_to(ROOT)
    return f"`{absolute.relative_to(ROOT) if inside else path}`"


def describe(*figures: Figures) -> str:
    """How many videos of what length, made where."""
    seen = []
    for content in (content for group in figures for content in group.values()):
        prompts = len({result["prompt"] for result in content["videos"]})
        seeds = len({result["seed"] for result in content["videos"]})
        settings = content["settings"]
        seen.append(
            f"{counted(prompts, 'prompt')} × {counted(seeds, 'seed')} × {settings['seconds']:g} s "
            f"on {settings['device']}{changed([content])}"
        )
    return "; ".join(dict.fromkeys(seen))


def counted(number: int, noun: str) -> str:
    """A number of things, in words."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def cell(column: Column, short: Sequence[Result], long: Sequence[Result]) -> str:
    """`mean ± spread` of the first of the column's videos that know the measures."""
    videos = {"short": short, "long": long}
    for results in (videos[length] for length in column.lengths):
        if results:
            mean, spread = column_figures(column, results)
            if not np.isnan(mean):
                shown = f"{mean:.{column.digits}f}"
                return shown if np.isnan(spread) else f"{shown} ± {spread:.{column.digits}f}"
    return UNKNOWN


def column_figures(column: Column, results: Sequence[Result]) -> tuple[float, float]:
    """Mean over the videos, and spread of the seeds' means."""
    values = []
    for result in results:
        known = measures_of(result, TRUTH)
        values.append([known.get(name, np.nan) for name in column.measures])
    each = mean_of_known(np.array(values, float).T)  # [videos]
    mean, spread = mean_and_spread(each[:, None], [result["seed"] for result in results])
    return float(mean[0]), float(spread[0])


def markdown_row(cells: Sequence[str]) -> str:
    """One line of a table."""
    return f"| {' | '.join(cells)} |"


def draw(figures: Figures, out: Path) -> None:
    """The curves of the main variants, as far as they are there."""
    drawn = {
        variant.title: figures[variant.key]["summary"]["shapes"]
        for variant in VARIANTS
        if variant.drawn and variant.key in figures
    }
    if drawn:
        draw_curves(drawn, out, CURVES)


def split_page(page: Path) -> tuple[str, str]:
    """What stands before and after the marks; UserError if they are not there once."""
    try:
        text = page.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"Cannot read {page}: {error.strerror}.") from error
    pattern = f"(?s)(.*){re.escape(MARKS[0])}.*{re.escape(MARKS[1])}(.*)"
    found = re.fullmatch(pattern, text)
    if found is None or any(text.count(mark) != 1 for mark in MARKS):
        raise UserError(f"{page} needs one {MARKS[0]} and one {MARKS[1]} after it")
    return found[1], found[2]
