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

from evaluation.intervals import difference, mean_interval
from evaluation.statistics import Array, mean, to_json
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
    import torch
    from tqdm import tqdm

    pipe = open_model(args)
    protocol = {"scenes": args.scenes, "start": args.start, "blocks": args.blocks}
    other = None if args.against is None else read_other(args.against, protocol)
    given = pipe.shape.video_frames(pipe.layout.start(args.blocks))
    frames = given + round(SECONDS[-1] * FPS)
    blocks = pipe.layout.blocks_for(pipe.shape.latent_frames(frames))
    start = round(args.start * FPS)
    off: list[Array] = []
    still: list[Array] = []
    for index in tqdm(range(args.scenes), "scenes"):
        scene = sample_scene(0, index, split="heldout")
        past = torch.from_numpy(render(scene, given, size=pipe.shape.height, start=start))
        video = pipe.generate([scene.caption], pipe.layout.start(blocks), index, video=past)[0]
        off.append(distances(video.numpy()[:frames], scene, start, given))
        still.append(travelled(scene, frames, start, given))
    own = np.stack([mean(shapes) for shapes in off])
    stopped = np.stack([mean(shapes) for shapes in still])
    rows = {
        "distance": [mean_interval(column) for column in columns(own)],
        "still": [mean_interval(column) for column in columns(stopped)],
    }
    if other is not None:
        pairs = zip(columns(own), columns(other), strict=True)
        rows["difference"] = [difference(*pair) for pair in pairs]
    seen = np.isfinite(np.concatenate(off)).mean(axis=0)
    cells = {name: [found.text() for found in row] for name, row in rows.items()}
    cells = {"seconds": [f"{s:g}" for s in SECONDS], **cells, "seen": [f"{s:.2f}" for s in seen]}
    for name, row in cells.items():
        print(f"{name:<12}" + "".join(f"{cell:>24}" for cell in row))
    if args.json is not None:
        figures = {"seconds": SECONDS, "scenes_off": own, "seen": seen, **rows}
        write_json(args.json, to_json({**figures, **protocol, **describe_model(args, pipe)}))
    return 0


def columns(values: Array) -> list[Array]:
    """Values `[scenes, seconds]` as intervals are made of them: `[1, scenes]` of each second."""
    return [column[None] for column in values.T]


def read_other(path: Path, protocol: Mapping[str, Any]) -> Array:
    """Distances `[scenes, seconds]` of `--against`; UserError unless of the same scenes."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = np.array(content["scenes_off"], float)
        same = {name: content[name] for name in protocol} == protocol
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--against {path} holds no figures of this command") from error
    if not same:
        raise UserError(f"--against {path} is of other --scenes, --start or --blocks: no pairs")
    return found


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
