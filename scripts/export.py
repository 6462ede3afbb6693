"""Write a transformer's weights as others read them.

    python scripts/export.py --checkpoint_path checkpoints/rolling_forcing_dmd.pt --use_ema \\
        --model_folder wan_models/Wan2.1-T2V-1.3B --output_folder rolling_forcing

The folder `transformer/` below `--output_folder` is what `WanTransformer3DModel.from_pretrained` of
diffusers loads; `--checkpoint_path rolling_forcing` plays it here.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run by its path: the tree that it lies in comes first
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.cli import run_main


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="export.py",
        description="Write a transformer's weights as others read them.",
        allow_abbrev=False,
    )
    parser.add_argument("--checkpoint_path", required=True, help="weights, .pt or .safetensors")
    parser.add_argument("--use_ema", action="store_true", help="use its generator_ema weights")
    parser.add_argument("--model_folder", type=Path, required=True, help="has the config.json")
    parser.add_argument("--output_folder", type=Path, required=True)
    parser.add_argument("--to", choices=("diffusers",), default="diffusers", help="the layout")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="(default: that of the weights)"
    )
    return parser


def main(argv: Sequence[str]) -> int:
    """Read, check, write, say where."""
    args = build_parser().parse_args(argv)
    import torch

    from wan.checkpoints import load_dit_config, write_diffusers
    from wan.folders import find_checkpoint

    target = write_diffusers(
        find_checkpoint(args.checkpoint_path),
        load_dit_config(args.model_folder),
        args.output_folder,
        network="generator_ema" if args.use_ema else "generator",
        dtype=getattr(torch, args.dtype) if args.dtype else None,
    )
    print(f"wrote {target}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
