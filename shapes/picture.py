"""One picture of drift: the four core methods from the same prefix, and how far each drifts.

    python -m shapes.picture                  # docs/images/drift_picture.png
    python -m shapes.picture --scene 3 --out other.png

Rows are methods, columns seconds after the prefix; prompt, prefix and noise are the same. The
frames are made by the weights of the first training seed, where `shapes.ablate` has them, and kept
beside its results, from which the picture can be drawn again without any weights. The curves are
of those results.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if not __package__:  # run by its path: the tree that it lies in comes first
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from shapes.drift import Protocol, given_frames, play
from shapes.kept import PROPERTIES
from shapes.plan import (
    MissingStart,
    Plan,
    add_weights_flags,
    current_results,
    played,
    weights_hashes,
)
from shapes.stored import BESIDE, POINTS
from shapes.table import Results
from shapes.variants import BLOCK, BLOCK_BARE, ROLLING, ROLLING_BARE, Row
from utils.cli import check_picture, parse_command, require_matplotlib, run_main, set_up_logging
from utils.config import load_config
from utils.errors import UserError
from utils.files import write_figure, write_json

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pipeline import VideoPipeline

ORDER = (BLOCK_BARE, ROLLING_BARE, BLOCK, ROLLING)
LABELS = {
    BLOCK_BARE.key: "Self Forcing,\nno sink",
    ROLLING_BARE.key: "Rolling Forcing,\nno sink",
    BLOCK.key: "Self Forcing,\nsink",
    ROLLING.key: "Rolling Forcing,\nsink",
}
LOOKS = {
    BLOCK_BARE.key: ("#d2691e", "--"),
    ROLLING_BARE.key: ("#1f6fb4", "--"),
    BLOCK.key: ("#d2691e", "-"),
    ROLLING.key: ("#1f6fb4", "-"),
}
STYLE: dict[Any, Any] = {"font.size": 9, "axes.grid": True, "grid.color": "#e6e8eb"}
SHOWN = ("tint", "phase")
SECONDS = [0.0, 5.0, 15.0, 60.0, 300.0]


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--out", type=Path, default=Path("docs/images/drift_picture.png"), help="(%(default)s)")
    add("--scene", type=int, default=3, help="number of the scene (%(default)s)")
    add("--seconds", type=float, nargs="+", default=SECONDS, help="after the prefix (%(default)s)")
    add_weights_flags(parser)
    return parser


def main(argv: Sequence[str]) -> int:
    """Make the frames that are missing, then draw."""
    args = parse_command(build_parser(), argv)
    set_up_logging(quiet=True)
    if not all(0 <= second < math.inf for second in args.seconds) or args.scene < 0:
        raise UserError("--seconds and --scene must be 0 or more")
    check_picture("--out", args.out)
    require_matplotlib()
    frames = {row.key: strip(args, row) for row in ORDER}
    draw_picture(frames, args.seconds, current_results(args), args.out)
    print(args.out)
    return 0


# --- frames --------------------------------------------------------------------------------------


def strip(args: argparse.Namespace, row: Row) -> NDArray[np.uint8]:
    """Frames of a row `[S, n * S, 3]`, one for each second: those that are kept, or made now.

    UserError if they are neither there nor can be made.
    """
    from utils.images import read_image, write_png

    path = args.results / f"frames-{row.key}-{args.scene}.png"
    kept = path.with_suffix(".json")
    known = frames_settings(kept)
    asked: dict[str, Any] = {"scene": args.scene, "seconds": args.seconds}
    config = load_config(args.configs / f"{row.config}.yaml", args.overrides)
    asked |= played(config)
    weights = weights_of(args, row)
    if weights is not None:
        asked |= weights_hashes(config, weights)
    if not (path.is_file() and known.items() >= asked.items()):
        if weights is None:
            raise UserError(
                f"no weights of {row.title} are there; python -m shapes.ablate makes them"
            )
        from pipeline import load_pipeline

        frames = made(load_pipeline(config, weights), args.scene, args.seconds)
        kept.unlink(missing_ok=True)  # it vouches for a picture that is there
        write_png(path, frames)
        write_json(kept, asked)
    return read_image(path).numpy()


def frames_settings(path: Path) -> dict[str, Any]:
    """What kept frames are of; nothing where that is not told, so that they are made anew."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def weights_of(args: argparse.Namespace, row: Row) -> Path | None:
    """Those of the first training seed, if they are there."""
    try:
        path, _ = Plan(args).find(row.key, 0)
    except MissingStart:
        return None
    return path if path.is_file() else None


def made(pipe: VideoPipeline, scene: int, seconds: Sequence[float]) -> NDArray[np.uint8]:
    """Frames of one scene `[S, n * S, 3]`: so long after the last that was given."""
    fps, usual = pipe.setup.fps, Protocol()
    last = given_frames(pipe, usual) - 1
    wanted = [last + round(second * fps) for second in seconds]
    clips = math.ceil(pipe.shape.latent_frames(max(wanted) + 1) / usual.clip)
    found: dict[int, Any] = {}
    start = 0
    for block in play(pipe, Protocol(times=clips), [scene]):
        shown = block[0].numpy()
        found |= {n: shown[n - start] for n in wanted if start <= n < start + len(shown)}
        start += len(shown)
    return np.concatenate([found[number] for number in wanted], axis=1)


# --- drawing -------------------------------------------------------------------------------------


def draw_picture(
    frames: dict[str, NDArray[np.uint8]],
    seconds: Sequence[float],
    results: Results | None,
    out: Path,
) -> None:
    """Write the PNG: frames of each row, and under them the curves of what is stored."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.6, 5.4 if results is None else 8.2), layout="constrained")
        upper: Any = figure
        if results is not None:
            parts: Any = figure.subfigures(2, 1, height_ratios=[5.4, 2.8])
            upper, lower = parts
            draw_shown(lower, results)
        grid = upper.subplots(len(frames), len(seconds), squeeze=False)
        for (key, row), axes in zip(frames.items(), grid, strict=True):
            for axis, picture in zip(axes, np.split(row, len(seconds), axis=1), strict=True):
                axis.imshow(picture, interpolation="nearest")
                axis.set_xticks([])
                axis.set_yticks([])
                axis.grid(visible=False)
                axis.spines[:].set_visible(False)
            colour, _ = LOOKS[key]
            axes[0].set_ylabel(LABELS[key], rotation=0, ha="right", va="center", color=colour)
        for axis, second in zip(grid[0], seconds, strict=True):
            axis.set_title("end of the prefix" if second == 0 else length(second), fontsize=9)
        write_figure(out, figure)


def draw_shown(figure: Any, results: Results) -> None:
    """The curves below the frames."""
    axes = figure.subplots(1, len(SHOWN), squeeze=False)[0]
    for axis, name in zip(axes, SHOWN, strict=True):
        draw_curves_of(axis, results, name)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)


def draw_drift(results: Results, out: Path) -> None:
    """Write the curves of the core rows: all properties, and what stands beside them."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    names = [*PROPERTIES, *BESIDE]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(14, 5.6), layout="constrained")
        axes = figure.subplots(2, len(PROPERTIES)).flatten()
        for axis, name in zip(axes, names, strict=True):
            draw_curves_of(axis, results, name)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False)
        write_figure(out, figure)


def draw_curves_of(axis: Any, results: Results, name: str) -> None:
    """One property, or what stands beside, over the time from a true prefix: mean and interval."""
    for row in ORDER:
        seen = results.primary(row.key)
        if seen is None:
            continue
        found = seen.interval(name)
        seconds = (np.array(POINTS) - 0.5) * results.settings[row.key][0]["clip_seconds"]
        colour, dashes = LOOKS[row.key]
        label = LABELS[row.key].replace("\n", " ")
        axis.plot(seconds, found.mean, dashes, color=colour, lw=1.5, label=label)
        axis.fill_between(seconds, found.low, found.high, color=colour, alpha=0.15, lw=0)
    title = BESIDE.get(name) or f"drift of {name} (1: another clip's)"
    axis.set_title(title, loc="left", fontsize=9)
    axis.set_xscale("log")
    ticks = [5, 15, 60, 300]
    axis.set_xticks(ticks, [length(tick) for tick in ticks])
    axis.minorticks_off()
    axis.set_ylim(bottom=0)
    axis.spines[["top", "right"]].set_visible(False)


def length(seconds: float) -> str:
    """A time in words."""
    return f"{seconds / 60:g} min" if seconds >= 120 else f"{seconds:g} s"


if __name__ == "__main__":
    sys.exit(run_main(main))
