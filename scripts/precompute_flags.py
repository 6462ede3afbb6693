"""The flags that all scripts have which compute training data once, and the config they give."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from utils.distributed import Ranks

if TYPE_CHECKING:
    from utils.config import Config

STORAGE_DTYPES = ("float32", "bfloat16", "float16")


def shared_parser(name: str, description: str) -> argparse.ArgumentParser:
    """The flags that all precomputing scripts have."""
    parser = argparse.ArgumentParser(
        prog=name,
        description=description,
        epilog="key=value overrides of the config may follow the flags.",
        allow_abbrev=False,
    )
    parser.add_argument("--config_path", required=True, help="experiment file")
    parser.add_argument("--output_folder", required=True, help="where the shards go")
    parser.add_argument("--count", type=int, help="only the first items of the data")
    parser.add_argument(
        "--shard_size", type=int, default=64, help="items per file (default: %(default)s)"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1 … (default: a GPU if there is one)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=argparse.SUPPRESS)
    return parser


def read_config(args: argparse.Namespace, ranks: Ranks) -> Config:
    """The experiment file with the flags and overrides on top."""
    from utils.config import load_config

    config = load_config(args.config_path, args.overrides)
    config.device = ranks.device_name(args.device or config.device)
    return config
