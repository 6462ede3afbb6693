"""What an update of each initialisation costs, side by side: operations and seconds.

    python -m shapes.starts
    python -m shapes.starts --updates 5 image_or_video_shape=[1,36,16,8,8]

Real updates of the shapes configs, on this machine, for one number of videos of one length, timed
as `scripts/benchmark.py --train --random_weights` does. An ODE start also needs its pairs: `data`
is what `scripts/precompute.py ode_pairs` computes for one, counted.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run by its path: the tree that it lies in comes first
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from shapes.chain import ODE_STEPS
from utils.cli import parse_command, run_main, set_up_logging
from utils.config import ROOT, Config, load_config

GIGA = 10**9
WINDOWS = ["window_forcing=true", "teacher_forcing=false"]
KINDS = {
    "ODE pairs": ("ode_init", []),
    "teacher forcing": ("teacher_forcing", []),
    "window forcing": ("causal_init", []),
    "consistency, teacher forcing": ("consistency_init", []),
    "consistency, window forcing": ("consistency_init", WINDOWS),
}
SAME = ["image_or_video_shape=[1,21,16,8,8]", "batch_size=4", "total_batch_size=4"]
SAME += ["heldout_every=0", "generator_ckpt=null", "mixed_precision=false", "device=cpu"]


@dataclass(frozen=True)
class Cost:
    """Of one video of an update; `data`: operations of what has to be made for it before."""

    name: str
    operations: float
    data: float
    seconds: float


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--updates", type=int, default=4, help="updates to time (default: 4)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of all configs")
    return parser


def main(argv: Sequence[str]) -> int:
    """Print a Markdown table."""
    args = parse_command(build_parser(), argv)
    set_up_logging(quiet=True)
    print("| start | GFLOP per video | data, GFLOP per video | seconds per video |")
    print("|---|---|---|---|")
    for cost in costs(max(1, args.updates), args.overrides):
        data = f"{cost.data / GIGA:.1f}" if cost.data else "–"
        figures = f"{cost.operations / GIGA:.2f} | {data} | {cost.seconds:.3f}"
        print(f"| {cost.name} | {figures} |", flush=True)
    return 0


def costs(updates: int, overrides: Sequence[str]) -> Iterator[Cost]:
    """Of each start, in order."""
    for name, (file, own) in KINDS.items():
        words = [*SAME, *own, *overrides]
        config = load_config(ROOT / "configs" / "shapes" / f"{file}.yaml", words)
        yield measured(name, config, updates)


def measured(name: str, config: Config, updates: int) -> Cost:
    """The median of so many updates, after one that warms up."""
    from trainer.sharding import open_world
    from trainer.timing import opened, timed_config

    with tempfile.TemporaryDirectory() as folder, open_world(config.device) as world:
        trainer = opened(timed_config(config), world, Path(folder), drawn=True)
        trainer.run(updates + 1)
        trainer.close()
    made = [update for update in trainer.made if update.kind == "generator"][1:]
    videos = trainer.batch_split.videos
    operations = statistics.mean(sum(update.flops.values()) for update in made)
    seconds = statistics.median(sum(update.seconds.values()) for update in made)
    return Cost(name, operations / videos, data_flops(config), seconds / videos)


def data_flops(config: Config) -> float:
    """Operations of the teacher's trajectory for a video of ODE pairs; else nothing is made."""
    from pipeline.setup import Setup
    from pipeline.trajectories import ode_grid
    from wan.flops import forward_flops

    if config.trainer != "ode":
        return 0.0
    setup, frames = Setup.of(config), config.image_or_video_shape[1]
    steps = len(ode_grid(setup.levels.tensor(), ODE_STEPS, setup.levels.shift))
    return 2 * steps * forward_flops(setup.sizes, frames, frames, setup.shape.tokens_per_frame)


if __name__ == "__main__":
    sys.exit(run_main(main))
