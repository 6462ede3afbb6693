"""Measure a model, or videos that are there already.

    python scripts/evaluate.py --config_path configs/shapes/rolling_forcing.yaml \\
        --checkpoint_path checkpoints/shapes_rolling_forcing.pt \\
        --prompts 16 --seeds 3 --seconds 60 --json out.json --plot out.png
    python scripts/evaluate.py --videos videos --meter shapes --json out.json

Videos of the prompts in `--data_path` are streamed and measured block by block: against the truth
where `--meter` names a package that knows it of these prompts, else against their own beginning
(`evaluation/statistics.py`); docs/shapes.md has the formulas. By default the package is that of the
config's `data_path`, if it is one such as shapes:train, and its held-out prompts are those without
`--data_path`. Results are kept one by one beside the JSON file (below `outputs/evaluation` if none
is given), so the same command goes on where it was stopped. Under torchrun the ranks share the
videos, also several ranks on one GPU:

    torchrun --nproc_per_node 8 scripts/evaluate.py ...
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run by its path: the tree that it lies in comes first
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.cli import check_picture, parse_command, require_matplotlib, run_main, set_up_logging
from utils.distributed import Ranks
from utils.errors import UserError
from utils.files import check_file

HELD_OUT_PROMPTS, SECONDS = 16, 60.0
OUTPUTS = Path("outputs") / "evaluation"
GENERATING_FLAGS = (
    *("data_path", "checkpoint_path", "prompts", "seeds", "seconds", "use_ema", "keep_videos"),
)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--config_path", help="experiment file")
    parser.add_argument("--checkpoint_path", help="distilled weights, .pt or .safetensors")
    parser.add_argument(
        "--use_ema", action="store_true", default=None, help="use its generator_ema weights"
    )
    parser.add_argument("--videos", type=Path, help="measure the mp4 files of this folder instead")
    parser.add_argument("--data_path", help="prompt file (default: held-out ones of the package)")
    parser.add_argument("--meter", metavar="PACKAGE", help="what knows the truth, such as shapes")
    parser.add_argument(
        "--prompts", type=int, help=f"the first so many (default: {HELD_OUT_PROMPTS}; a file: all)"
    )
    parser.add_argument("--seeds", type=int, help="videos per prompt (default: 1)")
    parser.add_argument("--seconds", type=float, help=f"length (default: {SECONDS:g})")
    parser.add_argument(
        "--json", type=Path, help=f"the figures (default: a file of its own in {OUTPUTS})"
    )
    parser.add_argument("--plot", type=Path, help="draw the per-second curves into this PNG")
    parser.add_argument("--vbench", type=Path, help="put the videos there, named as for VBench")
    parser.add_argument("--keep_videos", type=Path, help="keep the videos there, unjudged")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace videos there that were made otherwise"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1 … (default: a GPU if there is one)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the config")
    return parser


def main(argv: Sequence[str]) -> int:
    """Make what is missing; when all is there, sum it up."""
    args = parse_command(build_parser(), argv)
    ranks = Ranks.from_environment()
    set_up_logging(quiet=not ranks.is_main)
    check_flags(args)
    from utils.config import load_config

    config = load_config(args.config_path, args.overrides) if args.config_path else None
    from evaluation.runs import evaluate

    if args.data_path is None:
        args.prompts = args.prompts or HELD_OUT_PROMPTS
    args.seconds = SECONDS if args.seconds is None else args.seconds
    evaluate(args, config, ranks, OUTPUTS)
    return 0


def check_flags(args: argparse.Namespace) -> None:
    """UserError for what can be known to be wrong before anything is loaded."""
    if args.videos is None and args.config_path is None:
        raise UserError("say what to measure: --config_path (and --checkpoint_path), or --videos")
    if args.videos is not None:
        for flag in GENERATING_FLAGS:
            if vars(args)[flag] is not None:
                raise UserError(f"--videos measures what is there; leave out --{flag}")
        if args.overrides and args.config_path is None:
            raise UserError(f"{args.overrides[0]} changes a config; give --config_path too")
    if args.keep_videos is not None and args.vbench is not None:
        raise UserError("--vbench keeps the videos already; leave out --keep_videos")
    if args.overwrite and args.vbench is None and args.keep_videos is None:
        raise UserError("--overwrite is of videos that are kept; give --vbench or --keep_videos")
    if any(number is not None and number < 1 for number in (args.prompts, args.seeds)):
        raise UserError("--prompts and --seeds must be at least 1")
    if args.seconds is not None and not (math.isfinite(args.seconds) and args.seconds > 0):
        raise UserError(f"--seconds {args.seconds:g} must be a length above 0")
    for path in (args.json, args.plot):
        if path is not None:
            check_file(path)
    check_picture("--plot", args.plot)
    if args.plot is not None:
        require_matplotlib()


if __name__ == "__main__":
    sys.exit(run_main(main))
