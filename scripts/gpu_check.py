"""Ten minutes on a GPU machine: ceilings, tests, speed, kernels, training, a long run.

    python scripts/gpu_check.py --out runs/gpu
    python scripts/gpu_check.py --out runs/cpu --device cpu --model tiny.json height=32 width=48

Weights are random, no file and no network is needed. Every stage is a process of its own with a
limit of its own, so that none takes the time of the next. Results are in OUT/gpu_check.json as soon
as a stage has ended, what it said in OUT/STAGE.log; a table comes last, and a plot where matplotlib
is installed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

if not __package__:  # run by its path: the tree that it lies in comes first
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.cli import parse_command, run_main
from utils.errors import UserError
from utils.files import write_json

ROOT = Path(__file__).resolve().parent.parent
LEAST_SECONDS = 15  # below which the long run is left out
SHARE_OF_BLOCKS = 0.5  # of the long run's time; the rest starts it and fills its context


@dataclass(frozen=True)
class Stage:
    """A command under a limit in seconds; `json`: it writes its figures to a file."""

    name: str
    limit: float
    command: tuple[str, ...]
    json: bool = True


@dataclass(frozen=True)
class Outcome:
    """How a stage ended: `done`, `failed` or `out of time`; with its figures, if it gave any."""

    name: str
    state: str
    seconds: float
    figures: dict[str, Any] | None


def stages(args: argparse.Namespace) -> list[Stage]:
    """What is run, in order; the long run comes behind them, with what is left."""
    own, bench = ("scripts/_gpu_stages.py",), ("scripts/benchmark.py",)
    given = flags(args)
    timed = (*bench, "--random_weights", *given, "--blocks", str(args.blocks))
    return [
        Stage("machine", 30, (*own, "machine", *given)),
        Stage("ceilings", 45, (*own, "ceilings", *given)),
        Stage("tests", 110, ("-m", "pytest", "-m", "gpu", "tests/test_gpu.py"), json=False),
        Stage("eager 1", 45, timed),
        Stage("compiled 1", 110, (*timed, "compile=true")),
        Stage("eager 2", 45, timed),
        Stage("compiled 2", 60, (*timed, "compile=true")),
        Stage("decoding", 45, (*own, "decoding", *given)),
        Stage("profile", 45, (*own, "profile", *given)),
        Stage("training", 60, (*own, "training", *given)),
    ]


def long_run(args: argparse.Namespace, outcomes: Sequence[Outcome], left: float) -> Stage | None:
    """As many blocks as fit into the seconds that are left; None where that is nothing."""
    eager = [o.figures for o in outcomes if o.name.startswith("eager") and o.figures]
    if not eager or left < LEAST_SECONDS:
        return None
    blocks = int(left * SHARE_OF_BLOCKS / eager[0]["seconds"]["block_interval"])
    flag = ("--blocks", str(max(1, blocks)))
    command = ("scripts/benchmark.py", "--random_weights", *flags(args), *flag)
    return Stage("long", left, command)


def flags(args: argparse.Namespace) -> tuple[str, ...]:
    """What all commands are given."""
    named = [
        word
        for name in ("config_path", "model", "device")
        if vars(args)[name] is not None
        for word in (f"--{name}", str(vars(args)[name]))
    ]
    return (*named, *args.overrides)


def run(stage: Stage, out: Path) -> Outcome:
    """One stage in a process of its own, which is ended with all its children at the limit."""
    file = out / f"{stage.name.replace(' ', '_')}.json"
    told = ("--json", str(file)) if stage.json else ()
    begin = time.monotonic()
    with file.with_suffix(".log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            [sys.executable, *stage.command, *told],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            state = "done" if process.wait(stage.limit) == 0 else "failed"
        except subprocess.TimeoutExpired:
            state = "out of time"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    figures = None
    if stage.json and state == "done":
        figures = json.loads(file.read_text(encoding="utf-8"))
    return Outcome(stage.name, state, time.monotonic() - begin, figures)


def row(outcome: Outcome) -> str:
    """A line of the table."""
    said, figures = "", outcome.figures or {}
    if "fps" in figures:
        fps, seconds = figures["fps"], figures["seconds"]
        said = (
            f"{fps['dit_only']:.2f} FPS DiT, {fps['end_to_end']:.2f} end to end, "
            f"p99 {1000 * seconds['block_interval_p99']:.0f} ms, "
            f"{figures['peak_memory_bytes'] / 2**30:.2f} GiB"
        )
    elif "copy_gb_per_second" in figures:
        said = f"copy {figures['copy_gb_per_second']:.0f} GB/s"
        said += "".join(f", {k} {v:.0f} TFLOP/s" for k, v in figures["matmul_tflops"].items())
    elif "seconds" in figures:
        said = ", ".join(f"{k} {1000 * v:.0f} ms" for k, v in figures["seconds"].items())
    elif "device" in figures:
        said = f"{figures['device']}, torch {figures['torch']}"
    return f"{outcome.name:12} {outcome.state:12} {outcome.seconds:6.1f} s  {said}".rstrip()


def plot(outcomes: Sequence[Outcome], path: Path) -> None:
    """Frames per second of the runs, as bars."""
    speeds = {o.name: o.figures["fps"] for o in outcomes if o.figures and "fps" in o.figures}
    if not speeds or find_spec("matplotlib") is None:
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for offset, (key, label) in enumerate({"dit_only": "DiT", "end_to_end": "end to end"}.items()):
        places = [place + 0.4 * offset for place in range(len(speeds))]
        axes.bar(places, [fps[key] for fps in speeds.values()], 0.4, label=label)
    axes.set_xticks([place + 0.2 for place in range(len(speeds))], list(speeds))
    axes.set_ylabel("frames per second")
    axes.legend()
    figure.savefig(path)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", required=True, type=Path, help="folder of the results")
    parser.add_argument("--minutes", type=float, default=10, help="for all stages (default: 10)")
    parser.add_argument("--blocks", type=int, default=20, help="of each short run (default: 20)")
    parser.add_argument(
        "--config_path", default="configs/rolling_forcing_dmd.yaml", help="experiment file"
    )
    parser.add_argument("--model", help="preset of sizes (default: that of the config)")
    parser.add_argument("--device", help="cpu, cuda … (default: a GPU if there is one)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the config")
    return parser


def main(argv: Sequence[str]) -> int:
    """Run all stages; 1 if one of them did not end well."""
    args = parse_command(build_parser(), argv)
    if not 0 < args.minutes <= 1440 or args.blocks < 1:
        raise UserError("--minutes must be from 0 to 1440 and --blocks at least 1")
    args.out.mkdir(parents=True, exist_ok=True)
    return check(args, stages(args))


def check(args: argparse.Namespace, planned: Sequence[Stage]) -> int:
    """Run `planned`, then the long run; write what is there after each."""
    end = time.monotonic() + 60 * args.minutes
    outcomes: list[Outcome] = []

    def finish(stage: Stage) -> None:
        left = end - time.monotonic()
        limit = min(stage.limit, max(0.0, left))
        outcomes.append(run(Stage(stage.name, limit, stage.command, stage.json), args.out))
        write_json(args.out / "gpu_check.json", [asdict(outcome) for outcome in outcomes])
        print(row(outcomes[-1]), flush=True)

    for stage in planned:
        finish(stage)
    last = long_run(args, outcomes, end - time.monotonic())
    if last is not None:
        finish(last)
    plot(outcomes, args.out / "gpu_check.png")
    return int(any(outcome.state != "done" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(run_main(main))
