"""Does a model go on from what it sees? True clips of the shapes world, continued.

    python -m shapes.continuation --config_path configs/shapes/self_forcing.yaml \\
        --checkpoint_path checkpoints/shapes_self_forcing.pt

The model gets the first seconds of a true clip that begins at `--start` of its held-out scene, by
then often on another way than the caption says, and continues it. How far are its shapes from where
they really went, in units of the world (64 wide)? `still` is how far they go: the distance of a
picture that stops. A model that has learned how a prompt goes, rather than how what it sees goes
on, does worse than that from the first moment.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

if not __package__:  # run by its path: the tree that it lies in comes first
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from shapes.meter import observe
from shapes.playing import add_model_flags, describe_model, open_model
from shapes.world import COLOURS, FPS, Scene, render, sample_scene
from utils.cli import check_outputs, parse_command, run_main, set_up_logging
from utils.errors import UserError
from utils.files import write_json

SECONDS = (0.25, 0.5, 1.0, 2.0, 3.0)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--scenes", type=int, default=16, help="the first held-out scenes (%(default)s)")
    add("--start", type=float, default=4.0, help="where the clips begin, in s (%(default)s)")
    add("--blocks", type=int, default=5, help="blocks that are given (%(default)s)")
    add_model_flags(parser)
    return parser


def main(argv: Sequence[str]) -> int:
    """Continue, measure, print a table."""
    args = parse_command(build_parser(), argv)
    set_up_logging(quiet=True)
    if args.scenes < 1 or args.blocks < 1 or not 0 <= args.start < math.inf:
        raise UserError("--scenes and --blocks must be at least 1, --start at least 0")
    check_outputs(args.json)
    import torch
    from tqdm import tqdm

    pipe = open_model(args)
    given = pipe.shape.video_frames(pipe.layout.start(args.blocks))
    frames = given + round(SECONDS[-1] * FPS)
    blocks = pipe.layout.blocks_for(pipe.shape.latent_frames(frames))
    start, errors, still = round(args.start * FPS), [], []
    for index in tqdm(range(args.scenes), "scenes"):
        scene = sample_scene(0, index, split="heldout")
        past = torch.from_numpy(render(scene, given, size=pipe.shape.height, start=start))
        video = pipe.generate([scene.caption], pipe.layout.start(blocks), index, video=past)[0]
        errors.append(distances(video.numpy()[:frames], scene, start, given))
        still.append(travelled(scene, frames, start, given))
    found = np.concatenate(errors)
    figures = {
        "seconds": list(SECONDS),
        "median": [median_of_seen(column) for column in found.T],
        "still": np.median(np.concatenate(still), axis=0).tolist(),
        "seen": np.isfinite(found).mean(axis=0).tolist(),
    }
    for name, row in figures.items():
        print(f"{name:<8}" + "".join("       –" if x is None else f"{x:>8.2f}" for x in row))
    if args.json is not None:
        settings = {
            **{"scenes": args.scenes, "start": args.start, "blocks": args.blocks},
            **describe_model(args, pipe),
        }
        write_json(args.json, {**figures, **settings})
    return 0


def distances(
    video: NDArray[np.uint8], scene: Scene, start: int, given: int
) -> NDArray[np.floating]:
    """Distance of each shape from its true place, in units: `[shapes, len(SECONDS)]`.

    `video` uint8 `[F, S, S, 3]` shows the scene from frame `start` on, the first `given` frames of
    it truly. NaN where a shape is not seen.
    """
    colours = np.array([COLOURS[shape.colour] for shape in scene.shapes], np.float32)
    tracks = observe(video, colours=colours).shapes
    at = moments(given)
    true = [shape.positions(len(video), start=start) for shape in scene.shapes]
    pairs = zip(tracks, true, strict=True)
    return np.stack([np.hypot(*(track.position - path)[at].T) for track, path in pairs])


def travelled(scene: Scene, frames: int, start: int, given: int) -> NDArray[np.floating]:
    """How far each shape is from where it last was given, in units: `[shapes, len(SECONDS)]`."""
    paths = [shape.positions(frames, start=start) for shape in scene.shapes]
    return np.stack([np.hypot(*(path[moments(given)] - path[given - 1]).T) for path in paths])


def median_of_seen(distances: NDArray[np.floating]) -> float | None:
    """The median distance of the shapes that are seen; None if none is."""
    seen = distances[np.isfinite(distances)]
    return float(np.median(seen)) if len(seen) else None


def moments(given: int) -> list[int]:
    """The frames of `SECONDS` after the last given one."""
    return [given - 1 + round(seconds * FPS) for seconds in SECONDS]


if __name__ == "__main__":
    sys.exit(run_main(main))
