"""Train and measure the variants of the method in the shapes world: what each keeps, in one table.

    python -m shapes.ablate --plan           # what is left to do, and what it costs
    python -m shapes.ablate                  # do it; the same command goes on where it was stopped
    python -m shapes.ablate --only rolling_forcing self_forcing --seeds 1
    python -m shapes.ablate --table_only --write docs/ablations.md

Every row (`shapes/variants.py`) goes on from a true prefix, and starts from noise, on scenes that
no decision was made on (`shapes/drift.py`). Distillations may all take as many operations as that
of Rolling Forcing does by its config, so their `max_steps` differ. Weights that ship are used where
their config is the one that is asked for; the others are trained, from the start that ships, and
two trainings that must end with the same weights are one. Results of other weights, another config
or another meter are made anew, or left out of the table. `key=value` goes to every training and
every video. What is made:

    results/ablations/*.json      the figures of each row, training seed and beginning: commit them
    runs/ablations/table.md, drift.png  the table and the curves; --write puts them into a page
    runs/ablations/train/HASH/    what was trained, by a hash of all that decides its weights
    runs/ablations/measured/      measured videos, batch by batch, until a part is complete
"""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

if not __package__:  # run by its path: the tree that it lies in comes first
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from shapes.build import CommandTarget, Training, processes_of
from shapes.drift import Protocol, play
from shapes.picture import draw_drift
from shapes.plan import (
    Measurement,
    MissingStart,
    Plan,
    add_weights_flags,
    current_results,
    played,
)
from shapes.table import MARKS, SPEED, SPEED_TIMES, make_page, read_speed, split_page
from shapes.variants import CORE_SEEDS, ROWS, STARTS
from utils.cli import parse_command, require_matplotlib, run_main, set_up_logging
from utils.config import Config
from utils.errors import UserError
from utils.files import check_folder, write_json, write_text

logger = logging.getLogger(__name__)

GFLOPS, FRAMES_PER_SECOND = 20.0, 40.0
"""Of a core: what the costs are told from, as measured on a shared AMD EPYC server."""
MEASURED_BYTES, RESULT_BYTES = 100, 2000
"""On the disk: of a measured frame, of the results of a video."""
SPEED_ROUNDS = 3


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        allow_abbrev=False,
        epilog=f"rows: {', '.join(ROWS)}",
    )
    add, usual = parser.add_argument, Protocol()
    add("--plan", action="store_true", help="say what is left to do and what it costs, no more")
    add("--only", nargs="+", metavar="ROW", help="these alone; overrides follow after --")
    add("--seeds", type=int, default=3, help="training seeds of core rows (default: %(default)s)")
    add("--table_only", action="store_true", help="sum up the results that are there")
    add("--write", type=Path, metavar="PAGE", help="put table and curves between its marks")
    add("--scenes", type=int, default=usual.scenes, help="of each row (default: %(default)s)")
    add("--times", type=int, default=12, help="length, in training clips (default: %(default)s)")
    add("--long_times", type=int, default=60, help="that of core rows from a true prefix (60)")
    add("--batch", type=int, default=usual.batch, help="videos made together (%(default)s)")
    add("--gflops", type=float, default=GFLOPS, help="of a core in training (%(default)g)")
    add("--fps", type=float, default=FRAMES_PER_SECOND, help="of a core in measuring (%(default)g)")
    add_weights_flags(parser)
    return parser


def main(argv: Sequence[str]) -> int:
    """Say what is missing and what it costs, make it, then sum up what is there."""
    args = parse_command(build_parser(), argv)
    set_up_logging(quiet=True)
    check_flags(args)
    lost = []
    if not args.table_only:
        targets = list_targets(args)
        print(cost_text(args, targets), flush=True)
        if args.plan:
            return 0
        lost = make_all(args, targets)
    failed = f"these parts failed, see above: {', '.join(lost)}"
    try:
        write_page(args)
    except UserError as error:
        raise UserError(failed if lost else str(error)) from error
    if lost:
        raise UserError(failed)
    return 0


def check_flags(args: argparse.Namespace) -> None:
    """UserError for what can be known to be wrong before anything starts."""
    for key in args.only or ():
        if key not in ROWS:
            raise UserError(f"--only {key} is no row; choose from {', '.join(ROWS)}")
    if min(args.scenes, args.seeds, args.times, args.long_times, args.batch) < 1:
        raise UserError("--scenes, --seeds, --times, --long_times and --batch must be at least 1")
    if args.seeds > len(CORE_SEEDS):
        raise UserError(f"--seeds must be at most {len(CORE_SEEDS)}")
    if not (args.gflops > 0 and args.fps > 0):
        raise UserError("--gflops and --fps must be above 0")
    processes_of(args)
    check_folder(args.folder)
    check_folder(args.results)
    if args.write is not None:
        split_page(args.write)
    require_matplotlib()


def list_targets(args: argparse.Namespace) -> list[CommandTarget]:
    """What is made and what is to be, in order: of the first training seed all rows first.

    Rows of a start alone that is not there are left out, unless they are asked for.
    """
    plan = Plan(args)
    for seed in range(args.seeds):
        for row in (ROWS[key] for key in args.only or ROWS):
            if seed in row.seeds:
                try:
                    plan.add(row, seed)
                except MissingStart as error:
                    if args.only or row.weights not in STARTS:
                        raise
                    logger.warning("%s is left out: %s", row.key, error)
    return plan.needed()


# --- what it costs -------------------------------------------------------------------------------


def cost_text(args: argparse.Namespace, targets: Sequence[CommandTarget]) -> str:
    """What is left to do: trainings, operations, videos, hours at the stated rates, disk."""
    from trainer.estimate import missing_data

    cores = processes_of(args)
    trainings = [target for target in targets if isinstance(target, Training)]
    parts = [target for target in targets if isinstance(target, Measurement)]
    left = [training for training in trainings if not training.is_done()]
    missing = [part for part in parts if not part.is_done()]
    taken: dict[Path | None, float] = {
        part.weights: part.trained.get("operations", 0.0) / 1e12 for part in parts
    }
    teraflop = {training.name: taken.get(training.result, 0.0) for training in left}
    total, uncounted = sum(teraflop.values()), sum(not taken for taken in teraflop.values())
    beside = f", and {uncounted} trainings of starts, which are not counted" * bool(uncounted)
    lines = [
        f"{training.name}: max_steps={training.config.max_steps}"
        + (f", {teraflop[training.name]:,.1f} TFLOP" if teraflop[training.name] else "")
        for training in left
    ]
    frames, videos = (sum(part.frames for part in missing), sum(part.videos for part in missing))
    absent = dict.fromkeys(path for each in left for path in missing_data(each.config))
    lines += [f"{path} is missing: shapes/chain.py --shipped makes it" for path in absent]
    disk = sum(training_bytes(training.config) for training in left) + frames * MEASURED_BYTES
    return "\n".join(
        [
            *lines,
            f"{len(left)} of {len(trainings)} trainings are left: {total:,.1f} TFLOP, "
            f"{total * 1e3 / (args.gflops * cores) / 3600:.1f} h at {args.gflops:g} GFLOP/s in "
            f"each of {cores} processes (--gflops){beside}",
            f"{videos} of {sum(part.videos for part in parts)} videos are left: {frames:,} frames, "
            f"{frames / (args.fps * cores) / 3600:.1f} h at {args.fps:g} frames/s in each of "
            f"{cores} processes (--fps)",
            f"disk: {disk / 1e9:.1f} GB in {args.folder}, {videos * RESULT_BYTES / 1e6:.1f} MB in "
            f"{args.results}",
        ]
    )


def training_bytes(config: Config) -> float:
    """What a training leaves on the disk: states with the moments of Adam, exports of the student.

    A critic is as large as the student.
    """
    from trainer.networks import sizes_of
    from wan.checkpoints import empty_dit

    dit = empty_dit(sizes_of(config, config.generator_name))
    weights = 4 * sum(parameter.numel() for parameter in dit.parameters())
    state = weights * (7 if config.trainer == "score_distillation" else 4)
    exports = 2 * -(-(config.max_steps or 0) // config.log_iters)
    return (config.keep_checkpoints + 1) * state + exports * weights


# --- doing it ------------------------------------------------------------------------------------


def make_all(args: argparse.Namespace, targets: Sequence[CommandTarget]) -> list[str]:
    """Run what is not done, then all rows in turns for their speed; the names of what failed."""
    lost = []
    for number, target in enumerate(targets, start=1):
        which = f"[{number}/{len(targets)}] {target.name}"
        try:
            if target.is_done():
                print(f"{which}: is there")
                continue
            print(f"{which}\n{shlex.join(target.command)}", flush=True)
            target.make()
        except UserError as error:
            print(error, file=sys.stderr)
            lost.append(target.name)
    try:
        measure_speed(args, [target for target in targets if isinstance(target, Measurement)])
    except UserError as error:
        print(error, file=sys.stderr)
        lost.append("frames per second")
    return lost


def measure_speed(args: argparse.Namespace, found: Sequence[Measurement]) -> None:
    """Frames per second of each row, all in turns (A B C A B C …), a video at a time, one seed.

    Text and decoding count, loading does not. Some rows alone do not replace a run of all, nor do
    those whose weights are here one in which there were more.
    """
    from tqdm import tqdm

    from utils.devices import choose_device, device_name

    parts = {part.row.key: part for part in reversed(found) if part.weights.is_file()}
    of = {key: played(parts[key].config)["config_hash"] for key in ROWS if key in parts}
    path = args.results / SPEED
    known = read_speed(path)["of"]
    if not parts or (args.only and path.is_file()) or known.items() >= of.items():
        return
    if lost := known.keys() - of.keys():
        logger.warning("frames/s stay as they are: no weights here of %s", ", ".join(sorted(lost)))
        return
    pipes = {key: parts[key].open() for key in of}
    protocol = replace(next(iter(parts.values())).protocol, scenes=1, given=0, times=SPEED_TIMES)
    rates: dict[str, list[float]] = {key: [] for key in pipes}
    for number in tqdm(range(SPEED_ROUNDS + 1), "frames/s, all rows in turns"):
        for key, pipe in pipes.items():
            start = time.perf_counter()
            frames = sum(shown.shape[1] for shown in play(pipe, protocol, [0]))
            if number:  # the first round warms up
                rates[key].append(frames / (time.perf_counter() - start))
    machine = next(iter(pipes.values())).setup.machine
    device = device_name(str(choose_device(machine.device)))
    write_json(path, {"of": of, "device": device, "frames_per_second": rates})


# --- what becomes of it --------------------------------------------------------------------------


def write_page(args: argparse.Namespace) -> None:
    """Write the table and the curves, print the table, and put both into a page."""
    results = current_results(args)
    if results is None:
        raise UserError(f"{args.results} holds no results of these rows yet")
    text, picture = make_page(results), args.folder / "drift.png"
    if args.write is not None:
        picture = args.write.parent / "images" / "drift.png"
        before, after = split_page(args.write)
        shown = f"![Drift over time](images/{picture.name})"
        write_text(args.write, f"{before}{MARKS[0]}\n\n{text}\n{shown}\n\n{MARKS[1]}{after}")
        print(args.write)
    draw_drift(results, picture)
    write_text(args.folder / "table.md", text)
    print(text, args.folder / "table.md", picture, sep="\n")


if __name__ == "__main__":
    sys.exit(run_main(main))
