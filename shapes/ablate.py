"""Train and measure the variants of the method in the shapes world; table, curves, contact sheets.

    python -m shapes.ablate
    python -m shapes.ablate --only rolling_forcing self_forcing --seeds 1
    python -m shapes.ablate --table_only --write docs/ablations.md

Weights that ship (`checkpoints/shapes_*.pt`) are used where the config is the one that they were
trained with. What is missing, changed by `key=value` or in `--configs` (with `--retrain`, all) is
trained in the folder, from the causal initialisation that ships; variants that differ in their sink
alone share one training, if its rollouts are too short for a sink to matter, and a variant whose
weights and config are then those of another is left out. What is finished is skipped, so the same
command goes on where it was stopped; results of other weights, another config or other numbers are
made anew. `key=value` goes to every training and evaluation. The folder gets

    table.md                     the table; --write also puts it between the marks of a page
    curves.png, curves_300s.png  the main variants, second by second
    contact_sheets/*.png         a few prompts, from the first frame to the last
    60s/, 300s/                  the figures of each variant, and its videos
    train/<variant>-<hash>/      what was trained here, by a hash of its config and its start
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:  # run by its path: the tree that it lies in comes first
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from shapes import held_out_prompts
from shapes.build import (
    CommandTarget,
    Training,
    add_processes,
    decides_weights,
    processes_of,
    publish_to,
)
from shapes.table import MARKS, TRUTH, Figures, draw, split_page, write_table
from shapes.variants import INITIALISATIONS, START, STUDENTS, VARIANTS, Variant
from utils.cli import parse_command, require_matplotlib, run_main
from utils.config import ROOT, Config, find_file, fingerprint, load_config
from utils.errors import UserError
from utils.files import check_folder, write_text
from utils.processes import script_command

CONFIGS, CHECKPOINTS = Path("configs/shapes"), Path("checkpoints")
SINK_KEYS = frozenset({"sink_position", "clean_pass_sees_sink"})  # besides sink_size
SHEET_ROWS, SHEET_COLUMNS = 4, 8


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        allow_abbrev=False,
        epilog=f"variants: {', '.join(v.key for v in VARIANTS)}",
    )
    add = parser.add_argument
    add("--folder", type=Path, default=Path("runs/ablations"), help="(default: %(default)s)")
    add("--only", nargs="+", metavar="VARIANT", help="these alone; overrides follow after --")
    add("--retrain", action="store_true", help="train all anew, though weights ship")
    add("--table_only", action="store_true", help="sum up the figures that are there")
    add("--write", type=Path, metavar="PAGE", help="put the table between the marks of this page")
    add_processes(parser)
    for prefix, sizes in (("", (16, 3, 60.0)), ("long_", (8, 2, 300.0))):
        for name, size in zip(("prompts", "seeds", "seconds"), sizes, strict=True):
            add(f"--{prefix}{name}", type=type(size), default=size, help=f"(default: {size:g})")
    add("--configs", type=Path, default=CONFIGS, help="folder of the configs")
    add("--checkpoints", type=Path, default=CHECKPOINTS, help="folder of what ships")
    add("overrides", nargs="*", metavar="key=value", help="of every config")
    return parser


def main(argv: Sequence[str]) -> int:
    """Make what is missing, then sum up what is there."""
    args = parse_command(build_parser(), argv)
    check_flags(args)
    lost = [] if args.table_only else make_all(args)
    failed = f"these parts failed, see above: {', '.join(lost)}"
    try:
        sum_up(args)
    except UserError as error:
        raise UserError(failed if lost else str(error)) from error
    if lost:
        raise UserError(failed)
    return 0


def check_flags(args: argparse.Namespace) -> None:
    """UserError for what can be known to be wrong before anything starts."""
    known = [variant.key for variant in VARIANTS]
    for key in args.only or ():
        if key not in known:
            raise UserError(f"--only {key} is no variant; choose from {', '.join(known)}")
    counts = (args.prompts, args.seeds, args.long_prompts, args.long_seeds)
    if not all(number > 0 for number in (*counts, args.seconds, args.long_seconds)):
        raise UserError("prompts, seeds and seconds must be above 0")
    if f"{args.seconds:g}" == f"{args.long_seconds:g}":
        raise UserError("--seconds and --long_seconds must differ")
    processes_of(args)
    check_folder(args.folder)
    if args.write is not None:
        split_page(args.write)
    require_matplotlib()


# --- what is to be done --------------------------------------------------------------------------


@dataclass(frozen=True)
class Measurement(CommandTarget):
    """A variant at one length: `evaluate.py`, then a contact sheet of its videos."""

    variant: Variant
    config: Path
    weights: Path
    prompts: int
    seeds: int
    seconds: float
    overrides: Sequence[str]
    folder: Path
    sheet: Path
    processes: int

    @property
    def name(self) -> str:
        """See `CommandTarget`."""
        return f"{self.variant.key}, {self.seconds:g} s"

    @property
    def json(self) -> Path:
        """Where the figures go."""
        return self.folder / f"{self.variant.key}.json"

    @property
    def videos(self) -> Path:
        """Where the videos go."""
        return self.folder / "videos" / self.variant.key

    @property
    def command(self) -> tuple[str, ...]:
        """See `CommandTarget`."""
        words = (
            *("--config_path", self.config, "--checkpoint_path", self.weights),
            *("--prompts", self.prompts, "--seeds", self.seeds, "--seconds", f"{self.seconds:g}"),
            *("--json", self.json, "--keep_videos", self.videos, "--overwrite"),
            *("--meter", TRUTH.name, *self.overrides),
        )
        return script_command("scripts/evaluate.py", words, self.processes)

    def identity(self) -> dict[str, Any]:
        """See `Target`: the settings of the figures, and as `videos` whose they are."""
        from evaluation.trials import Evaluation, list_trials
        from pipeline.setup import Setup

        config = load_config(self.config, self.overrides)
        setup = Setup.of(config)
        settings = Evaluation(setup, self.weights, use_ema=False, seconds=self.seconds).settings
        trials = list_trials(held_out_prompts(self.prompts), self.seeds, config.seed)
        videos = [(trial.prompt, trial.seed) for trial in trials]
        return {**settings, "meter": TRUTH.version, "videos": videos}

    def is_done(self) -> bool:
        """See `CommandTarget`: the figures of exactly these videos are there, and the sheet."""
        if not (self.sheet.is_file() and self.json.is_file()):
            return False
        content = read_json(self.json)
        videos = [(result["prompt"], result["seed"]) for result in content["videos"]]
        there = {**content["settings"], "videos": videos}
        return all(there.get(name) == value for name, value in self.identity().items())

    def make(self) -> str:
        """See `Target`."""
        from evaluation.trials import vbench_name
        from utils.video import contact_sheet, spread_frames, write_png

        if not self.weights.is_file():
            raise UserError(f"{self.name}: its weights {self.weights} are missing")
        self.sheet.unlink(missing_ok=True)  # of what was there before
        self.run()
        prompts = list(dict.fromkeys(held_out_prompts(self.prompts)))[:SHEET_ROWS]
        files = [self.videos / vbench_name(prompt, 0) for prompt in prompts]
        rows = [spread_frames(file, SHEET_COLUMNS).numpy() for file in files]
        write_png(self.sheet, contact_sheet(rows, SHEET_COLUMNS))
        return str(self.json)


def list_targets(args: argparse.Namespace) -> list[CommandTarget]:
    """All in order: each training right before the first measurement that needs it.

    A variant that would be the videos of an earlier one is left out.
    """
    targets: list[CommandTarget] = []
    weights: dict[str, Path] = {}
    first: dict[tuple[str, Path], str] = {}
    for variant in VARIANTS:
        if args.only and variant.key not in args.only:
            continue
        key = variant.weights
        shipped = find_shipped(args, key)
        if shipped is None:
            key = trained_as(args, key)
            shipped = find_shipped(args, key)
        if key not in weights:
            if shipped is None:
                target, shipped = student_training(args, key)
                targets.append(target)
            weights[key] = shipped
        same = first.setdefault((variant.config, weights[key]), variant.key)
        if same != variant.key:
            print(f"{variant.key}: left out, it would be the same videos as {same}")
            continue
        lengths = (False, True) if variant.long else (False,)
        targets += [measurement(args, variant, weights[key], long=long) for long in lengths]
    return targets


def trained_as(args: argparse.Namespace, key: str) -> str:
    """The first student whose training ends with the same weights; UserError for a bad config."""
    asked = decides(load_config(args.configs / f"{key}.yaml", args.overrides))
    for name in STUDENTS:
        try:
            config = load_config(args.configs / f"{name}.yaml", args.overrides)
        except UserError:  # missing, or not possible with these overrides: not this one
            continue
        if decides(config) == asked:
            return name
    raise AssertionError(f"{key} is trained as itself")


def decides(config: Config) -> dict[str, Any]:
    """What decides the weights of a training.

    A rollout that fits into one attention sees its first frames anyway: no sink changes a bit.
    """
    from pipeline.schedule import BlockLayout
    from trainer.tasks.base import rollout_recipe

    decided = decides_weights(config)
    layout = BlockLayout(config.num_frame_per_block, config.independent_first_frame)
    if rollout_recipe(config).longest_frames(layout) > config.attention_frames:
        return decided
    model = {key: value for key, value in decided["model_kwargs"].items() if key != "sink_size"}
    rest = {key: value for key, value in decided.items() if key not in SINK_KEYS}
    return {**rest, "model_kwargs": model}


def find_shipped(args: argparse.Namespace, key: str) -> Path | None:
    """Weights that are not to be made here; UserError if they are missing and cannot be.

    What ships was trained with the project's configs, what lies elsewhere with those of --configs:
    any other config has to be trained.
    """
    name = args.checkpoints / f"shapes_{key}.pt"
    found = next((path for path in (name, ROOT / name) if path.is_file()), None)
    if key in INITIALISATIONS and found is None:
        raise UserError(f"{name} is missing and not trained here; make it with shapes/chain.py")
    if found is None or key in INITIALISATIONS:
        return found
    asked = load_config(args.configs / f"{key}.yaml", args.overrides)
    ours = args.checkpoints.resolve() in (CHECKPOINTS.resolve(), (ROOT / CHECKPOINTS).resolve())
    theirs = ROOT / CONFIGS if ours else args.configs
    trained = load_config(theirs / f"{key}.yaml")
    return None if args.retrain or decides(asked) != decides(trained) else found


def student_training(args: argparse.Namespace, key: str) -> tuple[Training, Path]:
    """A training and its weights; UserError if it has no end, or there is nothing to start from."""
    from pipeline.records import file_hash

    path = args.configs / f"{key}.yaml"
    if load_config(path, args.overrides).max_steps is None:
        raise UserError(f"{path} never ends; give max_steps=…")
    inputs = [f"generator_ckpt={find_shipped(args, START)}"]
    config = load_config(path, [*inputs, *args.overrides])
    start = find_file(str(config.generator_ckpt), "checkpoint")
    decided = fingerprint({**decides_weights(config), "generator_ckpt": file_hash(start)})
    logdir = args.folder / "train" / f"{key}-{decided}"
    result = logdir / f"shapes_{key}.pt"
    training = Training(
        *(key, path, logdir, processes_of(args), partial(publish_to, result)),
        inputs=inputs,
        changes=args.overrides,
        result=result,
    )
    return training, result


def measurement(
    args: argparse.Namespace, variant: Variant, weights: Path, *, long: bool
) -> Measurement:
    """A variant at the usual length, or the greater one."""
    prompts, seeds, seconds = (
        (args.long_prompts, args.long_seeds, args.long_seconds)
        if long
        else (args.prompts, args.seeds, args.seconds)
    )
    suffix = f"_{seconds:g}s" if long else ""
    return Measurement(
        *(variant, args.configs / f"{variant.config}.yaml", weights, prompts, seeds, seconds),
        overrides=args.overrides,
        folder=figures_folder(args.folder, seconds),
        sheet=args.folder / "contact_sheets" / f"{variant.key}{suffix}.png",
        processes=processes_of(args),
    )


def figures_folder(folder: Path, seconds: float) -> Path:
    """Where the figures of videos of this length go."""
    return folder / f"{seconds:g}s"


# --- doing it ------------------------------------------------------------------------------------


def make_all(args: argparse.Namespace) -> list[str]:
    """Run what is not done; the names of what failed. The table is renewed on the way."""
    targets = list_targets(args)
    lost = []
    for number, target in enumerate(targets, start=1):
        which = f"[{number}/{len(targets)}] {target.name}"
        try:
            if target.is_done():
                print(f"{which}: is there")
                continue
            print(f"{which}\n{shlex.join(target.command)}", flush=True)
            target.make()
            if isinstance(target, Measurement):
                write_table(args.folder, *read_all(args))
        except UserError as error:
            print(error, file=sys.stderr)
            lost.append(target.name)
    return lost


# --- what becomes of it --------------------------------------------------------------------------


def sum_up(args: argparse.Namespace) -> None:
    """Write the table and the curves, print the table, and put it into the page."""
    short, long = read_all(args)
    text = write_table(args.folder, short, long)
    draw(short, args.folder / "curves.png")
    draw(long, args.folder / f"curves_{args.long_seconds:g}s.png")
    print(text)
    print(args.folder / "table.md")
    if args.write is not None:
        before, after = split_page(args.write)
        write_text(args.write, f"{before}{MARKS[0]}\n\n{text}\n{MARKS[1]}{after}")
        print(args.write)


def read_all(args: argparse.Namespace) -> tuple[Figures, Figures]:
    """The figures of both lengths; UserError if there are none."""
    lengths = args.seconds, args.long_seconds
    short, long = (read_figures(figures_folder(args.folder, seconds)) for seconds in lengths)
    if not short and not long:
        raise UserError(
            f"{args.folder} holds no figures of {lengths[0]:g} s or {lengths[1]:g} s videos yet"
        )
    return short, long


def read_figures(folder: Path) -> Figures:
    """What is there of today's meter, in the order of the variants."""
    files = {variant.key: folder / f"{variant.key}.json" for variant in VARIANTS}
    figures = {key: read_json(file) for key, file in files.items() if file.is_file()}
    for key, content in list(figures.items()):
        if content["settings"].get("meter") != TRUTH.version:
            print(f"{files[key]} was measured by another version of the meter: left out")
            del figures[key]
    return figures


def read_json(path: Path) -> dict[str, Any]:
    """Figures as evaluate.py wrote them."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        known = content.keys() >= {"settings", "summary", "videos"}
    except (OSError, ValueError, AttributeError):
        known = False
    if not known:
        raise UserError(f"{path} holds no figures of evaluate.py; delete it")
    return content


if __name__ == "__main__":
    sys.exit(run_main(main))
