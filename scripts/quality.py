"""What is lost where a setting is not exact: the gate of float8 and of decoding in bfloat16.

    python scripts/quality.py --config_path configs/shapes/rolling_forcing.yaml \\
        --checkpoint_path checkpoints/shapes_rolling_forcing.pt linear_dtype=float8

The same prompts and seed are made with and without `linear_dtype`, `kv_cache_dtype` and `vae_dtype`
as they are set, and compared block by block. Ends with exit code 1 if the first window or the
frames are further from the exact ones than the flags allow.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # run by its path: the tree that it lies in comes first
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.cli import check_outputs, parse_command, run_main, set_up_logging
from utils.errors import UserError
from utils.files import write_json

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline import VideoPipeline
    from pipeline.quality import Quality
    from pipeline.setup import Setup

FAILED = 1  # exit code
PROMPTS, NUM_PROMPTS = "prompts/example_prompts.txt", 2


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--config_path", required=True, help="experiment file")
    parser.add_argument("--checkpoint_path", help="distilled weights, .pt or .safetensors")
    parser.add_argument("--use_ema", action="store_true", help="use its generator_ema weights")
    parser.add_argument("--data_path", default=PROMPTS, help=f"prompts (default: {PROMPTS})")
    parser.add_argument(
        "--prompts", type=int, default=NUM_PROMPTS, help=f"the first so many ({NUM_PROMPTS})"
    )
    parser.add_argument("--blocks", type=int, default=8, help="of each video (default: 8)")
    parser.add_argument("--seed", type=int, help="(default: the config's)")
    parser.add_argument(
        "--most_error", type=float, default=0.1, help="of the first window (default: 0.1)"
    )
    parser.add_argument(
        "--least_decibels", type=float, default=25, help="mean of the frames (default: 25)"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1 … (default: a GPU if there is one)")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the config")
    return parser


def main(argv: Sequence[str]) -> int:
    """Parse, make, compare, print."""
    args = parse_command(build_parser(), argv)
    set_up_logging(quiet=True)
    if args.blocks < 1 or args.prompts < 1:
        raise UserError("--blocks and --prompts must be at least 1")
    check_outputs(args.json)
    from utils.config import load_config, looked_up
    from utils.prompts import read_prompts

    given = [f"device={args.device}"] if args.device else []
    config = load_config(args.config_path, [*args.overrides, *given])
    from pipeline.quality import Limits
    from pipeline.setup import Setup

    quality = quality_of(
        Setup.of(config),
        args.checkpoint_path,
        use_ema=args.use_ema,
        prompts=read_prompts(looked_up(args.data_path))[: args.prompts],
        blocks=args.blocks,
        seed=args.seed,
        limits=Limits(args.most_error, args.least_decibels),
    )
    print(quality.table())
    if args.json is not None:
        write_json(args.json, quality.record())
    return FAILED if quality.faults() else 0


def quality_of(
    setup: Setup,
    checkpoint: str | None,
    *,
    use_ema: bool = False,
    preset: Path | None = None,
    prompts: Sequence[str] = (),
    **asked: Any,
) -> Quality:
    """What the gate finds; `asked`: see `measure`.

    `preset`: sizes of random weights, whose prompts are noise. By default the prompts are examples.
    """
    from pipeline.quality import measure
    from pipeline.random_weights import random_pipeline, random_text, read_preset
    from pipeline.text_to_video import load_generator
    from utils.config import find_file
    from utils.prompts import read_prompts

    def load(setup: Setup) -> VideoPipeline:
        if preset is not None:
            return random_pipeline(setup, read_preset(preset)["vae"]["base_dim"])
        return load_generator(setup, checkpoint, use_ema=use_ema)

    def encode(pipe: VideoPipeline) -> list[Tensor]:
        if preset is not None:
            return [random_text(pipe)]
        chosen = prompts or read_prompts(find_file(PROMPTS, "prompt file"))[:NUM_PROMPTS]
        return list(pipe.encode_once(chosen).values())

    return measure(setup, load, encode, **asked)


if __name__ == "__main__":
    sys.exit(run_main(main))
