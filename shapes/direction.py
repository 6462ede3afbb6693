"""Is a change of prompt followed, and when? Scenes of the shapes world that change on the way.

    python -m shapes.direction --config_path configs/shapes/rolling_forcing.yaml \\
        --checkpoint_path checkpoints/shapes_rolling_directed.pt

A video shows one held-out scene for some seconds; then the prompt becomes another one, of other
colours and another background, under each policy from the same seed. Told are, of what has to
change, the share of videos in which it is right within `--seconds` of the change and stays so, and
the median time until then, counted in the video from the moment of the change.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

if not __package__:  # run by its path: the tree that it lies in comes first
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from shapes.meter import measure
from shapes.playing import add_model_flags, describe_model, open_model, require_rate
from shapes.world import FPS, Scene, sample_scene
from utils.cli import check_outputs, parse_command, run_main, set_up_logging
from utils.errors import UserError
from utils.files import write_json

if TYPE_CHECKING:
    from pipeline import VideoPipeline
    from pipeline.changes import Policy

MEASURES = ("colour", "background", "kind")
BLOCKS_BEFORE = 8


class Way(NamedTuple):
    """How a change is made."""

    policy: Policy
    blend_blocks: int = 0

    @property
    def name(self) -> str:
        """As a prompt schedule writes it."""
        return f"{self.policy}, blend {self.blend_blocks}" if self.blend_blocks else self.policy


WAYS = (Way("keep"), Way("keep", 4), Way("recache"), Way("renoise"), Way("cut"))


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--changes", type=int, default=24, help="videos of each policy (%(default)s)")
    add("--seconds", type=float, default=9.0, help="watched after the change (%(default)s)")
    add_model_flags(parser)
    return parser


def main(argv: Sequence[str]) -> int:
    """Change, measure, print a table."""
    args = parse_command(build_parser(), argv)
    set_up_logging(quiet=True)
    if args.changes < 1 or not 1 <= args.seconds <= 600:
        raise UserError("--changes must be at least 1, --seconds from 1 to 600")
    check_outputs(args.json)
    from tqdm import tqdm

    pipe = open_model(args)
    require_rate(pipe)
    frames = round(args.seconds * FPS)
    figures = {}
    for way in WAYS:
        pairs = zip(range(args.changes), pairs_of_scenes(), strict=False)
        found = [
            seconds_until_right(changed_video(pipe, pair, way, frames, seed), pair[1])
            for seed, pair in tqdm(pairs, way.name, total=args.changes, leave=False)
        ]
        figures[way.name] = {
            name: follows([each[name] for each in found], args.seconds) for name in MEASURES
        }
    print(f"{'':<16}" + "".join(f"{name:>22}" for name in MEASURES))
    for name, row in figures.items():
        cells = (
            f"{share:.0%} " + ("–" if s is None else f"after {s:.1f} s")
            for share, s in row.values()
        )
        print(f"{name:<16}" + "".join(f"{cell:>22}" for cell in cells))
    if args.json is not None:
        settings = {
            **{"changes": args.changes, "seconds": args.seconds},
            **describe_model(args, pipe),
        }
        write_json(args.json, {"followed": figures, **settings})
    return 0


def pairs_of_scenes() -> Iterator[tuple[Scene, Scene]]:
    """Held-out scenes of one shape that differ in background, colour and kind of shape."""
    last: Scene | None = None
    index = 0
    while True:
        scene = sample_scene(0, index, split="heldout")
        index += 1
        if len(scene.shapes) > 1:
            continue
        if last is None:
            last = scene
            continue
        one, other = last.shapes[0], scene.shapes[0]
        if (
            last.background != scene.background
            and one.colour != other.colour
            and one.kind != other.kind
        ):
            yield last, scene
            last = None


def changed_video(
    pipe: VideoPipeline, scenes: tuple[Scene, Scene], way: Way, frames: int, seed: int
) -> NDArray[np.uint8]:
    """The first `frames` frames from the change on: `[frames, S, S, 3]`."""
    with pipe.stream(scenes[0].caption, seed=seed) as stream:
        for _ in range(BLOCKS_BEFORE):
            stream.next_block()
        stream.set_prompt(scenes[1].caption, way.policy, way.blend_blocks)
        blocks: list[NDArray[np.uint8]] = []
        while sum(map(len, blocks)) < frames:
            block = stream.next_block()
            assert block is not None
            blocks.append(block.numpy())
    return np.concatenate(blocks)[:frames]


def seconds_until_right(video: NDArray[np.uint8], scene: Scene) -> dict[str, float | None]:
    """When each of `MEASURES` is right for the rest of the video, in seconds; None: never.

    Right means in nine of ten frames of every half second from then on.
    """
    measures = measure(video, scene.attributes)
    (shape,) = measures.shapes
    rights = {
        "colour": shape.colour_right,
        "background": measures.background_right,
        "kind": shape.kind_right,
    }
    return {name: _settled(rights[name]) for name in MEASURES}


def _settled(right: NDArray[np.floating]) -> float | None:
    half = FPS // 2
    pieces = [right[start : start + half] for start in range(0, len(right) - half + 1, half)]
    known = [np.isfinite(piece) for piece in pieces]
    good = [
        not seen.any() or float(piece[seen].mean()) >= 0.9
        for piece, seen in zip(pieces, known, strict=True)
    ]
    if not good or not good[-1]:
        return None
    wrong = [index for index, value in enumerate(good) if not value]
    return (wrong[-1] + 1 if wrong else 0) * half / FPS


def follows(times: Sequence[float | None], seconds: float) -> tuple[float, float | None]:
    """Share of the times that there are, and their median; those past `seconds` do not count."""
    found = [time for time in times if time is not None and time <= seconds]
    return len(found) / len(times), float(np.median(found)) if found else None


if __name__ == "__main__":
    sys.exit(run_main(main))
