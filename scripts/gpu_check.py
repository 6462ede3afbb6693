"""Ten minutes on a GPU machine: ceilings, tests, speed, kernels, training, a long run.

    python scripts/gpu_check.py --out runs/gpu
    python scripts/gpu_check.py --out runs/cpu --device cpu \\
        --model configs/models/tiny.json height=32 width=48

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

from scripts._compare import row as compared_row
from utils.cli import parse_command, run_main
from utils.config import find_file
from utils.errors import UserError
from utils.files import make_folder, write_json

ROOT = Path(__file__).resolve().parent.parent
LEAST_SECONDS = 15  # below which the long run is left out
SHARE_OF_BLOCKS = 0.4  # of the long run's time; the rest starts it, and measures its first blocks
LONG_BLOCKS = 10  # that are compared with the last ones
ONE_VIDEO = (
    *("batch_size=1", "total_batch_size=1", "global_batch_size=1"),
    *("num_training_frames=21", "gradient_checkpointing=true"),
)
VARIANTS = (
    "compile=false merge_clean_pass=false",
    "compile=true merge_clean_pass=false",
    "compile=true merge_clean_pass=true",
)


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
        Stage("machine", 20, (*own, "machine", *given)),
        Stage("ceilings", 40, (*own, "ceilings", *given)),
        Stage("tests", 100, ("-m", "pytest", "-m", "gpu", "tests/test_gpu.py"), json=False),
        Stage("variants", 240, (*timed, "--turns", str(args.turns), "--compare", *VARIANTS)),
        Stage("decoding", 40, (*own, "decoding", *given)),
        Stage("profile", 30, (*own, "profile", *given)),
        Stage("training", 90, (*bench, *training_flags(args))),
        Stage("sharded", 40, (*own, "sharded", *given)),
    ]


def training_flags(args: argparse.Namespace) -> tuple[str, ...]:
    """Two steps of the config's distillation on one video, the first of which warms up."""
    given = vars(args) | {"model": None}  # sizes are those of the config's networks
    chosen = flags(argparse.Namespace(**given))
    return ("--train", "--random_weights", "--updates", "1", *chosen, *ONE_VIDEO)


def long_run(args: argparse.Namespace, left: float) -> Stage | None:
    """A stream for the seconds that are left; None where that is nothing."""
    if left < LEAST_SECONDS:
        return None
    minutes = ("--long", f"{SHARE_OF_BLOCKS * left / 60:.3f}", "--blocks", str(LONG_BLOCKS))
    command = ("scripts/benchmark.py", "--random_weights", *flags(args), *minutes)
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
    file.unlink(missing_ok=True)
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
    if stage.json and file.is_file():  # of variants what is there is written after each run
        figures = json.loads(file.read_text(encoding="utf-8"))
    return Outcome(stage.name, state, time.monotonic() - begin, figures)


def row(outcome: Outcome) -> str:
    """What the table says of a stage: a line, or one more for each variant."""
    said, *others = told(outcome.figures or {})
    first = f"{outcome.name:12} {outcome.state:12} {outcome.seconds:6.1f} s  {said}".rstrip()
    return "\n".join([first, *(f"{'':14}{other}" for other in others)])


def told(figures: dict[str, Any]) -> list[str]:
    """Figures of a stage in words; one piece at least."""
    if "summary" in figures:
        return ["", *(compared_row(*found) for found in figures["summary"].items())]
    if "fps" in figures:
        fps, end = figures["fps"], figures["long"] or {}
        said = f"{fps['dit_only']:.2f} FPS DiT, {fps['end_to_end']:.2f} end to end, "
        said += f"{figures['peak_memory_bytes'] / 2**30:.2f} GiB"
        if end:
            said += f"; block {end['blocks']} takes {end['against_the_first']:.3f} of the first"
        return [said]
    if "copy_gb_per_second" in figures:
        said = f"copy {figures['copy_gb_per_second']:.0f} GB/s"
        return [
            said + "".join(f", {k} {v:.0f} TFLOP/s" for k, v in figures["matmul_tflops"].items())
        ]
    if "step" in figures or "predicted" in figures:
        measured = (figures if "step" in figures else figures["predicted"])["updates"]
        return [", ".join(_told_update(*found) for found in measured.items())]
    if "updates" in figures:
        return [", ".join(f"{len(steps)} of {name}" for name, steps in figures["updates"].items())]
    if "seconds" in figures:
        return [", ".join(f"{k} {1000 * v:.0f} ms" for k, v in figures["seconds"].items())]
    if "device" in figures:
        return [f"{figures['device']}, torch {figures['torch']}"]
    return [""]


def _told_update(kind: str, phases: dict[str, Any]) -> str:
    """An update of a training in words: measured, or counted alone."""
    whole = phases["update"]
    size = f"{whole['peak_memory_bytes'] / 2**30:.2f} GiB"
    if "predicted_seconds" in whole:
        return f"{kind} counted: {whole['tflop']:.4g} TFLOP, {size}"
    rate = f" ({whole['tflops_per_second']:.3g} TFLOP/s)" if whole["tflop"] else ""
    return f"{kind} {whole['seconds']['median']:.2f} s{rate}, {size}"


def speeds_of(outcomes: Sequence[Outcome]) -> dict[str, tuple[float, float]]:
    """Frames per second, DiT only and end to end, of the variants and the long run."""
    found = {}
    for figures in (outcome.figures or {} for outcome in outcomes):
        for name, one in figures.get("summary", {}).items():
            found[name] = one["fps_dit_only"]["median"], one["fps_end_to_end"]["median"]
        if "fps" in figures:
            found["long run"] = figures["fps"]["dit_only"], figures["fps"]["end_to_end"]
    return found


def plot(outcomes: Sequence[Outcome], path: Path) -> None:
    """Frames per second of the runs, as bars."""
    speeds = speeds_of(outcomes)
    if not speeds or find_spec("matplotlib") is None:
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.add_subplot()
    for offset, label in enumerate(("DiT", "end to end")):
        places = [place + 0.4 * offset for place in range(len(speeds))]
        axes.bar(places, [fps[offset] for fps in speeds.values()], 0.4, label=label)
    names = [name.replace(" ", "\n") for name in speeds]
    axes.set_xticks([place + 0.2 for place in range(len(speeds))], names)
    axes.set_ylabel("frames per second")
    axes.legend()
    figure.savefig(path)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", required=True, type=Path, help="folder of the results")
    parser.add_argument("--minutes", type=float, default=10, help="for all stages (default: 10)")
    parser.add_argument("--blocks", type=int, default=12, help="of each short run (default: 12)")
    parser.add_argument("--turns", type=int, default=2, help="of the variants (default: 2)")
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
    if not 0 < args.minutes <= 1440 or min(args.blocks, args.turns) < 1:
        raise UserError("--minutes must be from 0 to 1440, --blocks and --turns at least 1")
    args.out = make_folder(args.out.absolute())  # the stages run from the project's root
    args.config_path = str(find_file(args.config_path, "config file").absolute())
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
    last = long_run(args, end - time.monotonic())
    if last is not None:
        finish(last)
    plot(outcomes, args.out / "gpu_check.png")
    return int(any(outcome.state != "done" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(run_main(main))
