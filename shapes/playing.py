"""The model that a command of the laboratory plays: its flags, its pipeline, what it was."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shapes.world import FPS
from utils.config import find_file, load_config
from utils.distributed import ALONE, Ranks
from utils.errors import UserError

if TYPE_CHECKING:
    from pipeline import VideoPipeline


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Which model, on which device, and where its figures go."""
    add = parser.add_argument
    add("--config_path", required=True, help="experiment file of the shapes world")
    add("--checkpoint_path", help="distilled weights, .pt or .safetensors")
    add("--use_ema", action="store_true", help="use its generator_ema weights")
    add("--json", type=Path, help="write the figures to this file")
    add("--device", help="cpu, cuda, cuda:1 … (default: a GPU if there is one)")
    add("overrides", nargs="*", metavar="key=value", help="of the config")


def open_model(args: argparse.Namespace, ranks: Ranks = ALONE) -> VideoPipeline:
    """The pipeline that the flags name, on this rank's own GPU if there are several.

    UserError for one whose videos are not square.
    """
    config = load_config(args.config_path, args.overrides)
    weights = args.checkpoint_path
    checkpoint = find_file(weights, "checkpoint") if weights else None
    if config.height != config.width:
        raise UserError(f"{args.config_path} makes no square videos, as the shapes world needs")
    from pipeline import load_pipeline

    device = ranks.device_name(args.device or config.device) if ranks.world > 1 else args.device
    return load_pipeline(config, checkpoint, device, use_ema=args.use_ema)


def require_rate(pipe: VideoPipeline) -> None:
    """UserError unless videos have as many frames per second as the world."""
    if pipe.setup.fps != FPS:
        raise UserError(
            f"the config has fps={pipe.setup.fps:g}, and this is measured in videos of the "
            f"world's {FPS}"
        )


def describe_model(args: argparse.Namespace, pipe: VideoPipeline) -> dict[str, Any]:
    """What the figures of a model depend on, for the file that holds them."""
    return {
        "config_path": args.config_path,
        "checkpoint_path": args.checkpoint_path,
        "use_ema": args.use_ema,
        "overrides": args.overrides,
        **pipe.model_settings,
    }
