"""Videos from prompts, block by block, of any length.

    python inference.py --config_path configs/rolling_forcing_dmd.yaml \\
        --checkpoint_path checkpoints/rolling_forcing_dmd.pt \\
        --data_path prompts/example_prompts.txt --output_folder videos --num_output_frames 126
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from pipeline.batch import BatchRun, Outputs, plan_jobs
from utils.cli import run_main, set_up_logging
from utils.config import Config, load_config
from utils.distributed import Ranks
from utils.errors import UserError

SHIPPED_CONFIG = "configs/shapes/rolling_forcing.yaml"
SHIPPED_CHECKPOINT = "checkpoints/shapes_rolling_forcing.pt"


def build_parser() -> argparse.ArgumentParser:
    """The command line: published flags first, then ours."""
    parser = argparse.ArgumentParser(
        prog="inference.py",
        description="Turn prompts into videos of any length, written while they are generated.",
        epilog="key=value overrides of the config may follow the flags, e.g. sampling_steps=20.",
        allow_abbrev=False,
    )
    model = parser.add_argument_group("model")
    model.add_argument("--config_path", help="experiment file (default: the model that ships)")
    model.add_argument("--checkpoint_path", help="distilled weights, .pt or .safetensors")
    model.add_argument("--use_ema", action="store_true", help="use its generator_ema weights")
    source = parser.add_argument_group("what to generate")
    source.add_argument("--data_path", help="prompt file, one per line; with --i2v a folder")
    source.add_argument(
        "--extended_prompt_path", help="longer prompts, line by line, for the model"
    )
    source.add_argument("--prompt", action="append", default=[], help="a prompt; repeatable")
    source.add_argument("--i2v", action="store_true", help="--data_path holds images and captions")
    source.add_argument("--image", help="an image that every video starts from")
    source.add_argument("--video", help="a video that every video continues")
    source.add_argument(
        "--prefix_frames",
        choices=("reconstructed", "none"),
        default="reconstructed",
        help="whether the output begins with the image or video it continues",
    )
    length = source.add_mutually_exclusive_group()
    length.add_argument(
        "--num_output_frames", type=int, help="length in latent frames, any number (default: 21)"
    )
    length.add_argument("--duration", type=float, metavar="SECONDS", help="length in seconds")
    source.add_argument("--num_samples", type=int, help="videos per prompt")
    source.add_argument("--seed", type=int, help="the same seed gives the same videos")
    output = parser.add_argument_group("output")
    output.add_argument("--output_folder", default="videos", help="(default: %(default)s)")
    output.add_argument("--save_with_index", action="store_true", help="name files by number")
    output.add_argument("--overwrite", action="store_true", help="redo videos that are there")
    output.add_argument("--fps", type=int, help="frames per second of the files")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", help="cpu, cuda, cuda:1 … (default: a GPU if there is one)")
    machine.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=argparse.SUPPRESS)
    return parser


def read_config(args: argparse.Namespace, ranks: Ranks) -> Config:
    """The experiment file with the flags and overrides on top."""
    overrides = list(args.overrides)
    for key in ("seed", "num_samples", "fps", "dtype"):
        if (value := vars(args)[key]) is not None:
            overrides.append(f"{key}={value}")
    config = load_config(args.config_path or SHIPPED_CONFIG, overrides)
    config.device = ranks.device_name(args.device or config.device)
    config.i2v = config.i2v or args.i2v
    return config


def use_what_ships(args: argparse.Namespace) -> None:
    """Without --config_path, the shapes model; one sentence if its weights are not here."""
    if args.config_path is not None:
        return
    if args.checkpoint_path is None:
        args.checkpoint_path = SHIPPED_CHECKPOINT
    root = Path(__file__).resolve().parent
    missing = [p for p in ("wan_models/Shapes", SHIPPED_CHECKPOINT) if not (root / p).exists()]
    if missing:
        raise UserError(
            f"the model that ships is not in this checkout ({', '.join(missing)} missing); fetch "
            "the published one with `python scripts/download.py wan2.1-1.3b rolling-forcing` and "
            "give --config_path configs/rolling_forcing_dmd.yaml "
            "--checkpoint_path checkpoints/rolling_forcing_dmd.pt --data_path PROMPTS"
        )


def main(argv: Sequence[str]) -> int:
    """Parse, plan, generate."""
    args = build_parser().parse_args([item for item in argv if item != "--"])
    ranks = Ranks.from_environment()
    set_up_logging(quiet=not ranks.is_main)
    use_what_ships(args)
    config = read_config(args, ranks)
    jobs = plan_jobs(
        config,
        data_path=args.data_path,
        extended_prompt_path=args.extended_prompt_path,
        prompts=args.prompt,
        image=args.image,
        video=args.video,
        with_index=args.save_with_index,
        ema=args.use_ema,
    )
    outputs = Outputs(
        Path(args.output_folder),
        num_latent_frames=args.num_output_frames,
        duration=args.duration,
        prefix_frames=args.prefix_frames,
        overwrite=args.overwrite,
    )
    run = BatchRun(config, args.checkpoint_path, outputs, use_ema=args.use_ema, ranks=ranks)
    try:
        run(jobs)
    except torch.OutOfMemoryError as error:
        raise UserError(
            "the GPU has too little memory for this model; close other programs, or use a smaller "
            "resolution (height=… width=…)"
        ) from error
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
