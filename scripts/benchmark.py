"""How fast a stream is: every part of a block, frames per second, start, memory, ceilings.

    python scripts/benchmark.py --config_path configs/rolling_forcing_dmd.yaml --random_weights
    python scripts/benchmark.py --config_path C --checkpoint_path K --blocks 100 --json out.json
    python scripts/benchmark.py --config_path C --random_weights --file out.mp4 --long 10
    python scripts/benchmark.py --config_path C --random_weights --compare "" "compile=true"
    torchrun --nproc_per_node=8 scripts/benchmark.py -- --train --config_path C --random_weights

The stream of `pipeline` itself is timed, to uint8 frames in host memory, VAE and clean passes
included. Blocks of the ramp-up, whose passes see less than a full context, are computed but not
measured; nor are the `--warmup` blocks behind them. Then come `--blocks` blocks end to end, some in
their parts, with `--file` as many again that are written to an mp4 meanwhile, and with `--long`
what fits into so many minutes. `--random_weights` needs no files: sizes come from `configs/models`,
weights and text embeddings are drawn from the seed (they do not change the time).

With `--train` a few updates of each network of the config's training are timed instead, by phase:
see `scripts/_training.py`, which says what is counted. Nothing is saved.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # run by its path: the tree that it lies in comes first
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.cli import check_picture, parse_command, require_matplotlib, run_main, set_up_logging
from utils.errors import UserError
from utils.files import write_json

if TYPE_CHECKING:
    from pipeline import VideoPipeline
    from scripts._compare import Variant


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
        "--warmup",
        type=int,
        help="blocks between ramp-up and measurement (default: 3), or updates (default: 1)",
    )
    parser.add_argument("--file", type=Path, help="write as many blocks again to this mp4")
    parser.add_argument(
        "--long", type=float, default=0, metavar="MINUTES", help="go on, and measure the end"
    )
    parser.add_argument(
        "--buffer", type=int, default=1, help="blocks before a viewer begins (default: 1)"
    )
    parser.add_argument(
        "--compare",
        nargs="+",
        metavar="VARIANT",
        help='overrides in quotes, measured in turns, as in --compare "" "compile=true"',
    )
    parser.add_argument("--turns", type=int, default=3, help="of --compare (default: 3)")
    parser.add_argument(
        "--quality",
        action="store_true",
        help="of float8 and the like: compare with exact videos (see scripts/quality.py)",
    )
    parser.add_argument("--train", action="store_true", help="updates of the config's training")
    parser.add_argument(
        "--updates", type=int, help="with --train: of each network, to measure (default: 2)"
    )
    parser.add_argument(
        "--fake",
        action="store_true",
        help="with --train: run nothing, count operations and memory and predict seconds",
    )
    parser.add_argument("--world_size", type=int, help="with --train: ranks to count for")
    parser.add_argument(
        "--tflops",
        type=float,
        help=f"with --train: TFLOP/s of a rank, for predicted seconds (default: {TFLOPS:g})",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1 … (default: a GPU if there is one)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    parser.add_argument("--plot", type=Path, help="draw them to this .png")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the config")
    return parser


def main(argv: Sequence[str]) -> int:
    """Parse, measure, print."""
    begin = time.perf_counter()
    args = parse_command(build_parser(), argv)
    set_up_logging(quiet=True)
    check(args)
    if args.train:
        return train(args)
    return compare(args) if args.compare else measure(args, begin)


def check(args: argparse.Namespace) -> None:
    """UserError for flags that make no sense."""
    if args.warmup is None:
        args.warmup = 1 if args.train else 3
    if args.train:
        check_of_training(args)
    else:
        for name in ("updates", "fake", "world_size", "tflops"):
            if vars(args)[name] not in (None, False):
                raise UserError(f"--{name} is of --train; add that flag, or drop --{name}")
    if args.blocks < 1 or args.warmup < 0:
        raise UserError("--blocks must be at least 1 and --warmup at least 0")
    if args.buffer < 1 or args.turns < 1 or not 0 <= args.long <= 1440:
        raise UserError("--buffer and --turns must be at least 1, --long 0 to 1440 minutes")
    if args.model is not None and not args.random_weights:
        raise UserError("--model gives sizes for --random_weights; add that flag, or drop --model")
    if args.json is not None and not args.json.resolve().parent.is_dir():
        raise UserError(f"the folder of --json {args.json} does not exist")
    if args.file is not None and args.file.suffix.lower() != ".mp4":
        raise UserError(f"--file {args.file} must be the name of an .mp4 file")
    if args.compare and (args.file or len(args.compare) < 2):
        raise UserError("--compare needs two variants or more, and writes no --file")
    if args.compare and args.quality:
        raise UserError("--compare measures speed alone; scripts/quality.py compares frames")
    check_picture("--plot", args.plot)
    if args.plot is not None:
        require_matplotlib()


TFLOPS = 600.0  # per second: what attention reaches on an H200, the slower kernel; see predict.py
OF_A_STREAM = (
    *("checkpoint_path", "model", "blocks", "file", "long", "buffer"),
    *("compare", "turns", "quality", "dtype", "plot"),
)


def check_of_training(args: argparse.Namespace) -> None:
    """UserError for flags that --train does not have."""
    args.updates = 2 if args.updates is None else args.updates
    args.tflops = TFLOPS if args.tflops is None else args.tflops
    if args.updates < 1 or not 0 < args.tflops < 10**6 or not 1 <= (args.world_size or 1) < 10**5:
        raise UserError("--updates and --world_size must be at least 1, --tflops above 0")
    parser = build_parser()
    for name in OF_A_STREAM:
        if vars(args)[name] != parser.get_default(name):
            raise UserError(f"--{name} is of a stream, and --train measures updates; drop one")


# --- a training ----------------------------------------------------------------------------------


def train(args: argparse.Namespace) -> int:
    """Measure updates of a training on all ranks, or count them; the main one tells."""
    from utils.config import check_training, load_config
    from utils.distributed import Ranks

    device = [f"device={args.device}"] if args.device else []
    config = load_config(args.config_path, [*args.overrides, *device])
    check_training(config)
    from scripts import _training

    ranks, result = Ranks.from_environment(), dict[str, Any]()
    counts = args.fake or _training.is_too_large(config)
    if not counts:
        drawn = args.random_weights
        measured = _training.measure(config, drawn=drawn, updates=args.updates, warmup=args.warmup)
        if measured is not None:
            measured["setting"] = {"config": str(args.config_path), **measured["setting"]}
            result = measured
            print(_training.table(result), flush=True)
            if args.json is not None:  # what is counted beside it may not come in time
                write_json(args.json, result)
    if not ranks.is_main:
        return 0
    if counts or "driver" in result["machine"]:  # of a GPU: beside what was measured
        if counts and not args.fake:
            print("too large for a CPU: counted on fake tensors, as with --fake")
        counted = _training.count(config, args.world_size or ranks.world, args.tflops)
        result["predicted"] = counted
        print(_training.prediction(counted))
    if args.json is not None:
        write_json(args.json, result)
    return 0


# --- one run -------------------------------------------------------------------------------------


def measure(args: argparse.Namespace, begin: float) -> int:
    """Measure one pipeline; `begin` is when the command began, on `time.perf_counter`."""
    pipe = open_pipeline(args)
    load = time.perf_counter() - begin
    from pipeline.timing import SteadyState
    from scripts._report import plot, setting, table

    steady = SteadyState.of(pipe.setup.plan(pipe.setup.schedule(None)))
    about = setting(pipe, args, steady)
    result = report(pipe, args, steady, load)
    print(table(about, result))
    if args.quality:
        from scripts.quality import quality_of

        found = quality_of(pipe.setup, args.checkpoint_path, preset=args.preset)
        result["quality"] = found.record()
        print(f"\n{found.table()}")
    if args.json is not None:
        write_json(args.json, {"setting": about, **result})
    if args.plot is not None:
        plot(result, args.plot)
    return 1 if result.get("quality", {}).get("faults") else 0


def report(
    pipe: VideoPipeline, args: argparse.Namespace, steady: Any, load: float
) -> dict[str, Any]:
    """All figures of a run, as plain values."""
    from pipeline.timing import Asked, Viewing, run
    from scripts._ceilings import ceilings, ideal_seconds
    from scripts._machine import kernels, machine
    from scripts._report import figures

    before = machine(pipe.device)
    skipped = steady.first + 1 + args.warmup  # the clean pass of a block runs in the next one
    measured, ran = run(
        pipe,
        Asked(skipped, args.blocks, args.long, args.file),
        last=partial(kernels, device=pipe.device),
    )
    result = figures(pipe, steady, measured)
    seconds, frames = result["seconds"], result["frames_per_block"]
    found = ceilings(pipe, steady, [pipe.dit.attention_backend])
    pixels = int(frames) * pipe.shape.height * pipe.shape.width * 3
    ideal = ideal_seconds(pipe, steady, found, pixels)
    took = {"dit": "dit_per_block", "vae": "vae_decode", "copy": "copy_to_host"}
    took["end_to_end"] = "block_interval"
    viewer = Viewing.of(measured.block, frames, pipe.setup.fps, args.buffer)
    cold = load + measured.first_frame["cold"]
    return {
        **result,
        "start": {"load": load, "compile": compile_seconds(), "cold": cold},
        "viewer": asdict(viewer),
        "ceilings": found,
        "share_of_ceiling": {name: ideal[name] / seconds[key] for name, key in took.items()},
        "kernels": ran,
        "machine": before | {"driver_afterwards": machine(pipe.device).get("driver")},
    }


def compile_seconds() -> float:
    """What torch.compile has taken in this process."""
    if "torch._dynamo" not in sys.modules:
        return 0.0
    from torch._dynamo.utils import calculate_time_spent

    return calculate_time_spent().get("total_wall_time", 0.0)


def open_pipeline(args: argparse.Namespace) -> VideoPipeline:
    """The pipeline of the command line; `args.preset` becomes the preset that is used, if any."""
    from utils.config import find_file, load_config

    given = [f"{key}={vars(args)[key]}" for key in ("device", "dtype") if vars(args)[key]]
    config = load_config(args.config_path, [*args.overrides, *given])
    if config.schedule == "full":
        raise UserError("a bidirectional model cannot stream; give the config of a causal one")
    from pipeline import load_pipeline
    from pipeline.random_weights import random_pipeline, read_preset

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


# --- several in turns ----------------------------------------------------------------------------


def compare(args: argparse.Namespace) -> int:
    """Measure the variants in turns; what is there after each run is in --json at once."""
    from scripts._compare import Variant, in_turns, plot, table
    from utils.config import load_config

    variants = [Variant.read(said) for said in args.compare]
    if len({variant.name for variant in variants}) < len(variants):
        raise UserError("--compare was given one variant twice")
    for variant in variants:
        load_config(variant.config or args.config_path, [*args.overrides, *variant.overrides])

    def keep(result: dict[str, Any]) -> None:
        if args.json is not None:
            write_json(args.json, result)

    with tempfile.TemporaryDirectory() as folder:
        run = partial(run_variant, args, Path(folder) / "run.json")
        result = in_turns(variants, args.turns, run, keep)
    print(table(result))
    if args.plot is not None:
        plot(result, args.plot)
    return 0


def run_variant(args: argparse.Namespace, json_path: Path, variant: Variant) -> dict[str, Any]:
    """The report of one run, in a process of its own."""
    print(f"{variant.name} …", flush=True)
    command = [sys.executable, __file__, *words_of(args, variant), "--json", str(json_path)]
    if subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode:
        raise UserError(f'the run of --compare "{variant.name}" failed: see above')
    return json.loads(json_path.read_text(encoding="utf-8"))


def words_of(args: argparse.Namespace, variant: Variant) -> list[str]:
    """The command line of one variant."""
    values = vars(args) | {"config_path": variant.config or args.config_path}
    names = ("config_path", "checkpoint_path", "model", "blocks", "warmup", "long", "buffer")
    words = [
        word
        for name in (*names, "device", "dtype")
        if values[name] is not None
        for word in (f"--{name}", str(values[name]))
    ]
    random = ["--random_weights"] if args.random_weights else []
    return [*words, *random, *args.overrides, *variant.overrides]


if __name__ == "__main__":
    sys.exit(run_main(main))
