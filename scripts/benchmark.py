"""How fast a stream is: time per pass and per block, frames per second, operations, memory.

    python scripts/benchmark.py --config_path configs/rolling_forcing_dmd.yaml --random_weights
    python scripts/benchmark.py --config_path C --checkpoint_path K --blocks 50 --json out.json

The stream of `pipeline` itself is timed, to uint8 frames in host memory, VAE and clean passes
included. Blocks of the ramp-up, whose passes see less than a full context, are computed but not
measured; nor are the `--warmup` blocks behind them. `--random_weights` needs no files: sizes come
from `configs/models`, weights and text embeddings are random (neither changes the time).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # run by its path: the tree that it lies in comes first
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.cli import parse_command, run_main, set_up_logging
from utils.errors import UserError
from utils.files import write_json

if TYPE_CHECKING:
    from pipeline import VideoPipeline

TERA = 10**12


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--config_path", required=True, help="experiment file")
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument("--checkpoint_path", help="distilled weights, .pt or .safetensors")
    weights.add_argument("--random_weights", action="store_true", help="sizes alone, no files")
    parser.add_argument(
        "--model", help="sizes for --random_weights (default: configs/models/<generator_name>.json)"
    )
    parser.add_argument("--blocks", type=int, default=20, help="blocks to measure (default: 20)")
    parser.add_argument(
        "--warmup", type=int, default=3, help="blocks between ramp-up and measurement (default: 3)"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1 … (default: a GPU if there is one)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the config")
    return parser


def main(argv: Sequence[str]) -> int:
    """Parse, build, run, print."""
    args = parse_command(build_parser(), argv)
    set_up_logging(quiet=True)
    check(args)
    pipe = open_pipeline(args)
    from pipeline.timing import SteadyState, Stopwatch, figures, run, setting, timed

    watch = Stopwatch(pipe.device)
    pipe = timed(pipe, watch)
    steady = SteadyState.of(pipe.setup.plan(pipe.setup.schedule(None)))
    skipped = steady.first + 1 + args.warmup  # the clean pass of a block runs in the next one
    measured = run(pipe, watch, skipped=skipped, blocks=args.blocks)
    about, result = setting(pipe, args, steady), figures(pipe, steady, measured)
    print(table(about, result))
    if args.json is not None:
        write_json(args.json, {"setting": about, **result})
    return 0


def check(args: argparse.Namespace) -> None:
    """UserError for flags that make no sense."""
    if args.blocks < 1 or args.warmup < 0:
        raise UserError("--blocks must be at least 1 and --warmup at least 0")
    if args.model is not None and not args.random_weights:
        raise UserError("--model gives sizes for --random_weights; add that flag, or drop --model")
    if args.json is not None and not args.json.resolve().parent.is_dir():
        raise UserError(f"the folder of --json {args.json} does not exist")


def open_pipeline(args: argparse.Namespace) -> VideoPipeline:
    """The pipeline of the command line; `args.preset` becomes the preset that is used, if any."""
    from utils.config import find_file, load_config

    given = [f"{key}={vars(args)[key]}" for key in ("device", "dtype") if vars(args)[key]]
    config = load_config(args.config_path, [*args.overrides, *given])
    if config.schedule == "full":
        raise UserError("a bidirectional model cannot stream; give the config of a causal one")
    from pipeline import load_pipeline
    from pipeline.timing import random_pipeline, read_preset

    args.preset, args.method, args.generator_name = None, config.method, config.generator_name
    if not args.random_weights:
        return load_pipeline(config, args.checkpoint_path)
    named = args.model or f"configs/models/{config.generator_name}.json"
    args.preset = find_file(named, "model preset")
    from pipeline.setup import Setup
    from wan.dit import DiTConfig

    preset = read_preset(args.preset)
    setup = Setup.of(config, sizes=DiTConfig.from_dict(preset, source=args.preset))
    return random_pipeline(setup, preset["vae"]["base_dim"])


def table(about: dict[str, Any], result: dict[str, Any]) -> str:
    """The report as text."""
    seconds, fps = result["seconds"], result["fps"]
    flops, rate = result["flops"], result["tflops_per_second"]
    lines = [f"{key.replace('_', ' ')}: {value}" for key, value in about.items()]
    lines.append("")
    for name in ("window_pass", "clean_pass", "dit_per_block"):
        speed = "" if rate[name] is None else f", {rate[name]:.4g} TFLOP/s"
        lines.append(_row(name, f"{_ms(seconds[name])}, {flops[name] / TERA:.4g} TFLOP{speed}"))
    lines += [
        _row("vae_decode", f"{_ms(seconds['vae_decode'])} per block"),
        _row("block_interval", f"{_ms(seconds['block_interval'])} to uint8 frames on the host"),
        _row(
            "p50, p99",
            f"{_ms(seconds['block_interval_p50'])}, {_ms(seconds['block_interval_p99'])}",
        ),
        _row(
            "first_frame",
            f"{_ms(seconds['first_frame']['cold'])} cold, "
            f"{_ms(seconds['first_frame']['warm'])} in a second stream",
        ),
        _row("FPS", f"{fps['dit_only']:.2f} DiT only, {fps['end_to_end']:.2f} end to end"),
        _row("peak_memory", f"{result['peak_memory_bytes'] / 2**30:.2f} GiB"),
    ]
    return "\n".join(lines)


def _row(name: str, value: str) -> str:
    return f"{name.replace('_', ' '):16} {value}"


def _ms(seconds: float | None) -> str:
    return "not run" if seconds is None else f"{1000 * seconds:.2f} ms"


if __name__ == "__main__":
    sys.exit(run_main(main))
