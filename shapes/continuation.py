"""Does a model go on from what it sees? True clips of the shapes world, continued.

    python -m shapes.continuation --config_path configs/shapes/self_forcing.yaml \\
        --checkpoint_path checkpoints/shapes_self_forcing.pt

The model gets the first seconds of a true clip that begins at `--start` of its held-out scene, by
then often on another way than the caption says, and continues it. How far are its shapes from where
they really went, in units of the world (64 wide)? `still` is how far they go: the distance of a
picture that stops. A model that has learned how a prompt goes, rather than how what it sees goes
on, does worse than that from the first moment. Told are means over the scenes with their 95 %
intervals, and with `--against other.json`, the figures of another model, the paired differences.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

if not __package__:  # run by its path: the tree that it lies in comes first
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evaluation.intervals import Interval, difference, mean_interval
from evaluation.statistics import Array, mean, to_json
from shapes.meter import observe
from shapes.playing import add_model_flags, describe_model, open_model, require_rate
from shapes.world import COLOURS, FPS, Scene, render, sample_scene
from utils.cli import check_outputs, parse_command, run_main, set_up_logging
from utils.errors import UserError
from utils.files import write_json

SECONDS = (0.25, 0.5, 1.0, 2.0, 3.0)
MOST_SHAPES = 2  # in a scene


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--scenes", type=int, default=16, help="the first held-out scenes (%(default)s)")
    add("--start", type=float, default=4.0, help="where the clips begin, in s (%(default)s)")
    add("--blocks", type=int, default=5, help="blocks that are given (%(default)s)")
    add("--against", type=Path, metavar="JSON", help="tell differences from these figures, too")
    add_model_flags(parser)
    return parser


def main(argv: Sequence[str]) -> int:
    """Continue, measure, print a table."""
    args = parse_command(build_parser(), argv)
    set_up_logging(quiet=True)
    if args.scenes < 1 or args.blocks < 1 or not 0 <= args.start < math.inf:
        raise UserError("--scenes and --blocks must be at least 1, --start at least 0")
    check_outputs(args.json)
    other = None if args.against is None else read_other(args.against)
    import torch
    from tqdm import tqdm

    pipe = open_model(args)
    require_rate(pipe)
    given = pipe.shape.video_frames(pipe.layout.start(args.blocks))
    protocol = {"scenes": args.scenes, "start": args.start, "given_frames": given}
    if other is not None:
        check_same(args.against, other, protocol)
    frames = given + round(SECONDS[-1] * FPS)
    blocks = pipe.layout.blocks_for(pipe.shape.latent_frames(frames))
    start = round(args.start * FPS)
    off = np.full((args.scenes, MOST_SHAPES, len(SECONDS)), np.nan)
    still = off.copy()
    for index in tqdm(range(args.scenes), "scenes"):
        scene = sample_scene(0, index, split="heldout")
        past = torch.from_numpy(render(scene, given, size=pipe.shape.height, start=start))
        video = pipe.generate([scene.caption], pipe.layout.start(blocks), index, video=past)[0]
        shapes = slice(len(scene.shapes))
        off[index, shapes] = distances(video.numpy()[:frames], scene, start, given)
        still[index, shapes] = travelled(scene, frames, start, given)
    rows = {"distance": of_scenes(off), "still": of_scenes(still)}
    if other is not None:
        both = np.isfinite(off) & np.isfinite(other["off"])
        pair = (np.where(both, each, np.nan) for each in (off, other["off"]))
        rows["difference"] = difference(*map(scene_means, pair))
    seen = np.isfinite(off).sum((0, 1)) / np.isfinite(still).sum((0, 1))
    print(f"{'seconds':<12}" + "".join(f"{second:>24g}" for second in SECONDS))
    for name, row in rows.items():
        print(f"{name:<12}" + "".join(f"{at.text():>24}" for at in row.each()))
    print(f"{'seen':<12}" + "".join(f"{share:>24.2f}" for share in seen))
    if args.json is not None:
        figures = {"seconds": SECONDS, "off": off, "seen": seen}
        figures |= {name: [at[:3] for at in row.each()] for name, row in rows.items()}
        write_json(args.json, to_json({**figures, **protocol, **describe_model(args, pipe)}))
    return 0


def scene_means(values: Array) -> Array:
    """Of `[scenes, shapes, seconds]` the means over the shapes, `[1, scenes, seconds]`."""
    return mean(np.moveaxis(values, 1, 0))[None]


def of_scenes(values: Array) -> Interval:
    """Of `[scenes, shapes, seconds]` the mean over the scenes, second by second."""
    return mean_interval(scene_means(values))


def read_other(path: Path) -> dict[str, Any]:
    """The figures of `--against`; UserError for another file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        off = np.array(content["off"], float)
        if off.shape[1:] == (MOST_SHAPES, len(content["seconds"])):
            return {**content, "off": off}
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise UserError(f"--against {path} holds no figures of this command")


def check_same(path: Path, other: Mapping[str, Any], protocol: Mapping[str, Any]) -> None:
    """UserError unless its clips are the same."""
    for name, value in {**protocol, "seconds": list(SECONDS)}.items():
        if other.get(name) != value:
            raise UserError(f"--against {path} has {name}={other.get(name)}, not {value}: no pairs")


def distances(video: NDArray[np.uint8], scene: Scene, start: int, given: int) -> Array:
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


def travelled(scene: Scene, frames: int, start: int, given: int) -> Array:
    """How far each shape is from where it last was given, in units: `[shapes, len(SECONDS)]`."""
    paths = [shape.positions(frames, start=start) for shape in scene.shapes]
    return np.stack([np.hypot(*(path[moments(given)] - path[given - 1]).T) for path in paths])


def moments(given: int) -> list[int]:
    """The frames of `SECONDS` after the last given one."""
    return [given - 1 + round(seconds * FPS) for seconds in SECONDS]


if __name__ == "__main__":
    sys.exit(run_main(main))
