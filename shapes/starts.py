"""What an update of each initialisation costs, side by side: operations and seconds.

    python -m shapes.starts
    python -m shapes.starts --updates 5 image_or_video_shape=[1,36,16,8,8]

Real updates of the shapes configs, on this machine, for one number of videos of one length. What
is in clips and weights changes neither figure: clips are noise, made on the spot. An ODE start
also needs its pairs: `data` is what `scripts/precompute.py ode_pairs` computes for one, counted.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

if not __package__:  # run by its path: the tree that it lies in comes first
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.cli import parse_command, run_main, set_up_logging
from utils.config import ROOT, Config, load_config

GIGA = 10**9
PAIR_STEPS = 48  # of the teacher, each with and without prompt
WINDOWS = ["window_forcing=true", "teacher_forcing=false"]
STARTS = {
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
    for name, (file, own) in STARTS.items():
        words = [*SAME, *own, *overrides]
        config = load_config(ROOT / "configs" / "shapes" / f"{file}.yaml", words)
        with tempfile.TemporaryDirectory() as folder:
            data = write_clips(Path(folder), config)
            config = replace(config, data_path=str(data), max_steps=None)
            yield measured(name, config, Path(folder) / "run", updates)


def write_clips(folder: Path, config: Config) -> Path:
    """Noise in the form of what a config trains on, with captions."""
    import torch

    from pipeline.setup import Setup
    from shapes.world import sample_scene
    from utils.datasets import write_shard

    setup, frames = Setup.of(config), config.image_or_video_shape[1]
    captions = [sample_scene(0, index).caption for index in range(8)]
    shape: tuple[int, ...] = (frames, *setup.shape.latent)
    extra: dict[str, Any] = {}
    if config.trainer == "ode":
        extra["timesteps"] = [*setup.levels.tensor().tolist(), 0.0]
        shape = (len(extra["timesteps"]), *shape)
    draw = torch.Generator().manual_seed(0)
    clips = torch.randn(len(captions), *shape, generator=draw)
    data = folder / "data"
    data.mkdir()
    write_shard(data / "000000.safetensors", clips, captions, **extra)
    return data


def measured(name: str, config: Config, logdir: Path, updates: int) -> Cost:
    """The mean over updates, after one that warms up."""
    from pipeline.trajectories import ode_grid
    from trainer.sharding import open_world
    from trainer.trainer import Trainer
    from utils.draws import Draws
    from wan.flops import forward_flops

    with open_world("cpu") as world:
        trainer = Trainer(config, world, logdir, save=False, visualise=False)
        trainer.train_step()
        seconds, operations = 0.0, 0.0
        for _ in range(updates):
            counted = trainer.task.flops("generator", Draws(config.seed, trainer.step, ()))
            operations += counted or 0
            seconds += trainer.train_step()["seconds"]["step"]
        videos = updates * trainer.batch_split.videos
        setup = trainer.task.setup
        trainer.close()
    data = 0.0
    if config.trainer == "ode":
        frames, tokens = config.image_or_video_shape[1], setup.shape.tokens_per_frame
        steps = len(ode_grid(setup.levels.tensor(), PAIR_STEPS, setup.levels.shift))
        data = 2 * steps * forward_flops(setup.sizes, frames, frames, tokens)
    return Cost(name, operations / updates, data, seconds / videos)


if __name__ == "__main__":
    sys.exit(run_main(main))
