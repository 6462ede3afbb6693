"""The whole method in the shapes world, stage by stage, from nothing to a measured student.

    python -m shapes.chain                  # everything, into runs/shapes
    python -m shapes.chain --until teacher  # a part of it; the same command goes on
    python -m shapes.chain --redo teacher   # again from there; then go on without --redo
    python -m shapes.chain --quick          # a few updates of each stage, checked

Every stage is one of the project's own commands with a config of `configs/shapes`, and can be
stopped at any point: the same command goes on there. What a stage cost and reached is printed and
kept in `chain.json`; if its config has changed since, the chain says so. `key=value` goes to every
stage. Use the result with `model_root=runs/shapes/models --checkpoint_path
runs/shapes/checkpoints/shapes_rolling_forcing.pt`.

With `--quick` each stage makes a few updates, starting from the weights that ship for the stages
before it (text encoder, VAE and teacher start from scratch), and has to lower its own held-out loss
by the share in `QUICK`; the student has to move, and to keep most of the prompt accuracy of both
initialisations.
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from pipeline.batch import file_hash, network_files
from pipeline.setup import video_settings
from shapes import init
from trainer.tasks import find_task
from trainer.trainer import recipe
from utils.cli import parse_command, run_main
from utils.config import (
    ROOT,
    VIDEO_KEYS,
    Config,
    find_file,
    fingerprint,
    load_config,
    to_dict,
)
from utils.errors import UserError
from utils.files import make_folder, write_json, written
from utils.launch import (
    default_processes,
    final_export,
    run_command,
    run_together,
    script_command,
    training_command,
)
from wan.checkpoints import publish_model, publish_student, read_state_dict
from wan.folders import TEXT_ENCODER_FILE, VAE_FILE, ModelFolder
from wan.weights import converted, read_weights, save_weights

MODEL = "Shapes"
ACCURACIES = ("background", "colour", "kind", "direction")
STARTS = {"ode_init": "ODE initialisation", "causal_init": "causal initialisation"}
MIN_KEPT_ACCURACY = 0.8


@dataclass(frozen=True)
class Quick:
    """What `--quick` changes of a training, and the share by which its held-out loss must fall."""

    margin: float
    overrides: tuple[str, ...]


QUICK_TEACHER = ("random_init=true", "lr_warmup_steps=5", "heldout_videos=8")
QUICK = {
    "text_encoder": Quick(0.2, ("max_steps=30", "lr_warmup_steps=5", "heldout_videos=64")),
    "vae_images": Quick(0.3, ("max_steps=20", "lr_warmup_steps=5", "ema_start_step=1000")),
    "vae_short": Quick(
        0.04, ("max_steps=10", "lr=4.5e-5", "lr_warmup_steps=5", "heldout_videos=8")
    ),
    "vae": Quick(
        0.02,
        (
            *("max_steps=12", "lr=8e-5", "lr_warmup_steps=5", "heldout_videos=4"),
            "image_or_video_shape=[1,4,16,8,8]",
        ),
    ),
    "teacher_short": Quick(0.2, ("max_steps=20", "total_batch_size=16", *QUICK_TEACHER)),
    "teacher": Quick(0.2, ("max_steps=16", "total_batch_size=8", *QUICK_TEACHER)),
    "ode_init": Quick(
        0.1, ("max_steps=24", "lr_warmup_steps=5", "heldout_videos=8", "total_batch_size=8")
    ),
    "causal_init": Quick(
        0.05, ("max_steps=10", "lr_warmup_steps=5", "heldout_videos=4", "total_batch_size=4")
    ),
    # The loss is the critic's, so the student moves little.
    "rolling_forcing": Quick(
        0.03,
        (
            *("max_steps=8", "lr=1e-4", "lr_critic=2e-4", "heldout_videos=4"),
            *("image_or_video_shape=[1,15,16,8,8]", "num_training_frames=15"),
            "ema_start_step=1000",
        ),
    ),
}
QUICK_HELDOUT = 8


class Chain:
    """Where things are, and how a command is run."""

    def __init__(
        self, folder: Path, overrides: Sequence[str], *, quick: bool, processes: int
    ) -> None:
        self.folder, self.overrides = folder, overrides
        self.quick, self.processes = quick, processes
        self.own_models = folder / "models"

    @property
    def models(self) -> Path:
        """`model_root` of the stages after the VAE."""
        return ROOT / "wan_models" if self.quick else self.own_models

    @property
    def checkpoints(self) -> Path:
        """Where students are taken from."""
        return ROOT / "checkpoints" if self.quick else self.folder / "checkpoints"

    def data(self, name: str) -> Path:
        """Folder of stored data."""
        return self.folder / "data" / name

    def logdir(self, name: str) -> Path:
        """Folder of a training."""
        return self.folder / "train" / name

    def run(self, script: str, runs: Mapping[str, Sequence[object]]) -> None:
        """Run one of the project's scripts, once for each list of arguments; UserError if it fails.

        All processes share each run. With `--quick`, where starting takes longer than the work, a
        run has one process, and as many are under way at once.
        """
        ranks, at_once = (1, self.processes) if self.quick else (self.processes, 1)
        commands = {name: script_command(script, words, ranks) for name, words in runs.items()}
        run_together(commands, at_most=at_once)

    def train(self, name: str, config: Config, logdir: Path, overrides: Sequence[str]) -> None:
        """Train (on) with `configs/shapes/<name>.yaml`; UserError if it fails."""
        path = self.config(name)
        command = training_command(config, path, logdir, overrides, self.processes)
        run_command(f"training of {name}", command)

    def config(self, name: str) -> Path:
        """An experiment file of the shapes world."""
        return ROOT / "configs" / "shapes" / f"{name}.yaml"

    def values(self, name: str, keys: Iterable[str]) -> dict[str, Any]:
        """Some values of an experiment file; UserError if an override is wrong."""
        values = to_dict(self.load(name))
        return {key: values[key] for key in keys}

    def load(self, name: str) -> Config:
        """An experiment file with the overrides on top; UserError if one is wrong."""
        return load_config(self.config(name), self.overrides)


class Stage(Protocol):
    """A part of the chain: calling it does what is missing and tells what it reached."""

    def __call__(self, chain: Chain) -> str:
        """Do what is missing; UserError if it failed."""

    def identity(self, chain: Chain) -> dict[str, Any]:
        """What its result depends on, besides the stages before it."""

    def folders(self, chain: Chain) -> list[Path]:
        """What has to go before it can be done anew."""


@dataclass(frozen=True)
class Step:
    """A stage that is a function; `config` names the experiment that it depends on."""

    run: Callable[[Chain], str]
    config: str | None = None

    def __call__(self, chain: Chain) -> str:
        """Run the function."""
        return self.run(chain)

    def identity(self, chain: Chain) -> dict[str, Any]:
        """What the experiment's videos depend on."""
        return video_settings(to_dict(chain.load(self.config))) if self.config else {}

    def folders(self, chain: Chain) -> list[Path]:
        """It replaces what it wrote."""
        return []


@dataclass(frozen=True)
class Training:
    """A stage that trains with `configs/shapes/<name>.yaml`.

    `install` puts the exported weights where later stages look. `inputs` are overrides that say
    where its own inputs are. `from_shipped`: with `--quick` it builds on what ships.
    """

    name: str
    install: Callable[[Chain, Path], None]
    inputs: Callable[[Chain], Sequence[str]] = lambda chain: ()
    from_shipped: bool = True

    def __call__(self, chain: Chain) -> str:
        """Train, install, and tell how the held-out loss went."""
        models = chain.models if self.from_shipped else chain.own_models
        overrides = [f"model_root={models}", *self.inputs(chain), *self._changes(chain)]
        config = load_config(chain.config(self.name), overrides)
        if not (config.max_steps and config.heldout_every):
            raise UserError(f"{self.name}: max_steps and heldout_every must be above 0")
        logdir = chain.logdir(self.name)
        chain.train(self.name, config, logdir, overrides)
        final = final_export(logdir, config.max_steps)
        if final is None:
            raise UserError(f"{self.name} was stopped early; the same command goes on")
        first, last = heldout_losses(logdir / "metrics.jsonl")
        if chain.quick:
            check_margin(self.name, first, last)
        self.install(chain, final)
        return f"held-out loss {first:.4f} -> {last:.4f}"

    def restore(self, chain: Chain) -> None:
        """Install once more what the finished training ended with, if it is finished."""
        steps = load_config(chain.config(self.name), self._changes(chain)).max_steps
        final = final_export(chain.logdir(self.name), steps or 0)
        if final is not None:
            self.install(chain, final)

    def identity(self, chain: Chain) -> dict[str, Any]:
        """What decides the weights; UserError if an override is wrong."""
        config = load_config(chain.config(self.name), self._changes(chain))
        values = recipe(config)
        if not find_task(config.trainer).roles:  # no video is made, no transformer trained
            unrelated = VIDEO_KEYS - {"seed"}
            values = {key: value for key, value in values.items() if key not in unrelated}
        return values

    def folders(self, chain: Chain) -> list[Path]:
        """The run."""
        return [chain.logdir(self.name)]

    def _changes(self, chain: Chain) -> list[str]:
        quick = (*QUICK[self.name].overrides, "log_iters=1000000", "heldout_every=1000000")
        return [*(quick if chain.quick else ()), *chain.overrides]


def heldout_losses(metrics: Path) -> tuple[float, float]:
    """First and last held-out loss of a run."""
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    losses = [row["heldout/loss"] for row in rows if "heldout/loss" in row]
    return losses[0], losses[-1]


def check_margin(name: str, first: float, last: float) -> None:
    """UserError unless the held-out loss fell by the stated share."""
    margin = QUICK[name].margin
    if not last <= (1 - margin) * first:
        raise UserError(
            f"{name}: the held-out loss went from {first:.4f} to {last:.4f}, "
            f"but has to fall by {margin:.1%}"
        )


# --- the stages ----------------------------------------------------------------------------------


def start_models(chain: Chain) -> str:
    """Sizes, tokenizer and an untrained text encoder."""
    folder = chain.own_models / MODEL
    if not (folder / TEXT_ENCODER_FILE).exists():
        init.main(["--folder", str(folder)])
    return "sizes, tokenizer"


def install_text_encoder(chain: Chain, exported: Path) -> None:
    """The text encoder, as it was exported."""
    with written(chain.own_models / MODEL / TEXT_ENCODER_FILE) as part:
        shutil.copyfile(exported / TEXT_ENCODER_FILE, part)


def install_vae(chain: Chain, exported: Path) -> None:
    """The VAE, in half precision."""
    source = exported / VAE_FILE
    halved = converted(read_weights(source, "a VAE"), source, dtype=torch.float16)
    save_weights(halved, chain.own_models / MODEL / VAE_FILE)


def install_teacher(chain: Chain, exported: Path) -> None:
    """The teacher's average becomes the model folder's transformer."""
    publish_model(exported / "model.pt", chain.own_models / MODEL)


def install_student(name: str) -> Callable[[Chain, Path], None]:
    """An installer of a published checkpoint."""

    def install(chain: Chain, exported: Path) -> None:
        target = chain.folder / "checkpoints" / f"shapes_{name}.pt"
        publish_student(exported / "model.pt", target)

    return install


@dataclass(frozen=True)
class Precomputing:
    """A stage that stores data for training, and as `<name>_heldout` for its held-out loss.

    `keys`: what the data depend on of `config`. `quick`: how many for training with `--quick`.
    """

    name: str
    verb: str
    config: str
    keys: tuple[str, ...]
    training: int
    heldout: int
    quick: int
    flags: tuple[str, ...]
    quick_flags: tuple[str, ...]

    def __call__(self, chain: Chain) -> str:
        """Compute what is missing, and tell how much there is."""
        counts = self._counts(chain)
        runs = {
            folder.name: (
                *(self.verb, "--config_path", chain.config(self.config), "--data_path", source),
                *("--count", count, "--output_folder", folder),
                *(self.quick_flags if chain.quick else self.flags),
                *(f"model_root={chain.models}", *chain.overrides),
            )
            for folder, (source, count) in zip(self.folders(chain), counts.items(), strict=True)
        }
        chain.run("scripts/precompute.py", runs)
        return ", ".join(f"{count} of {source}" for source, count in counts.items())

    def identity(self, chain: Chain) -> dict[str, Any]:
        """What the data depend on, and how many they are."""
        flags = self.quick_flags if chain.quick else self.flags
        stored = {"flags": list(flags), **self._counts(chain)}
        return {**chain.values(self.config, self.keys), **stored}

    def folders(self, chain: Chain) -> list[Path]:
        """The data for training, and the held-out ones."""
        return [chain.data(self.name), chain.data(f"{self.name}_heldout")]

    def _counts(self, chain: Chain) -> dict[str, int]:
        train, heldout = (
            (self.quick, QUICK_HELDOUT) if chain.quick else (self.training, self.heldout)
        )
        return {"shapes:train": train, "shapes:heldout": heldout}


LATENTS = Precomputing(
    "latents",
    "latents",
    "teacher",
    keys=("image_or_video_shape", "dtype"),
    training=3072,
    heldout=64,
    quick=16,
    flags=("--storage_dtype", "bfloat16", "--shard_size", "64"),
    quick_flags=("--storage_dtype", "bfloat16", "--shard_size", "16"),
)
LONG_LATENTS = replace(
    LATENTS, name="long_latents", config="causal_init", training=1024, heldout=32
)
ODE_PAIRS = Precomputing(
    "ode_pairs",
    "ode_pairs",
    "rolling_forcing",
    keys=(
        *("image_or_video_shape", "dtype", "seed", "num_frame_per_block"),
        *("independent_first_frame", "timestep_shift", "denoising_step_list"),
        *("warp_denoising_step", "guidance_scale", "negative_prompt", "model_kwargs"),
    ),
    training=512,
    heldout=32,
    quick=32,
    flags=("--num_steps", "25", "--batch_size", "16", "--shard_size", "16"),
    quick_flags=("--num_steps", "10", "--batch_size", "16", "--shard_size", "16"),
)


def stored(name: str) -> Callable[[Chain], Sequence[str]]:
    """Overrides for data that an earlier stage stored."""

    def inputs(chain: Chain) -> Sequence[str]:
        heldout = chain.data(f"{name}_heldout")
        return [f"data_path={chain.data(name)}", f"heldout_data_path={heldout}"]

    return inputs


def start_from(name: str) -> Callable[[Chain], Sequence[str]]:
    """Overrides for a student's first weights."""
    return lambda chain: [f"generator_ckpt={chain.checkpoints / f'shapes_{name}.pt'}"]


def evaluate(chain: Chain) -> str:
    """Prompt accuracy of both initialisations and of the student, in the first five seconds."""
    checkpoints = {name: chain.checkpoints / f"shapes_{name}.pt" for name in STARTS}
    checkpoints["rolling_forcing"] = chain.folder / "checkpoints" / "shapes_rolling_forcing.pt"
    results = {name: chain.folder / f"evaluation_{name}.json" for name in checkpoints}
    runs = {
        f"evaluation of {name}": (
            *("--config_path", chain.config("rolling_forcing"), "--checkpoint_path", checkpoint),
            *("--prompts", 4 if chain.quick else 16, "--seconds", 5, "--json", results[name]),
            *(f"model_root={chain.models}", *chain.overrides),
        )
        for name, checkpoint in checkpoints.items()
    }
    chain.run("scripts/evaluate.py", runs)
    reached = {name: prompt_accuracy(path) for name, path in results.items()}
    after, before = reached["rolling_forcing"], max(reached[name] for name in STARTS)
    if chain.quick:
        check_moved(checkpoints["causal_init"], checkpoints["rolling_forcing"])
        if after < MIN_KEPT_ACCURACY * before:
            fell = f"from {before:.2f} (initialisation) to {after:.2f}"
            raise UserError(f"prompt accuracy fell {fell}")
    starts = " -> ".join(f"{reached[name]:.2f} ({title})" for name, title in STARTS.items())
    return f"prompt accuracy {starts} -> {after:.2f} (student)"


def check_moved(start: Path, trained: Path) -> None:
    """UserError unless most weights of a student are others than those it began with."""
    before, after = (read_state_dict(path) for path in (start, trained))
    moved = sum(int((after[name] != value).sum()) for name, value in before.items())
    if moved < 0.5 * sum(value.numel() for value in before.values()):
        raise UserError(f"{trained} is all but {start}: its training changed nothing")


def prompt_accuracy(evaluation: Path) -> float:
    """Mean share of what is right, by a JSON of `scripts/evaluate.py`."""
    measures = json.loads(evaluation.read_text(encoding="utf-8"))["summary"]["shapes"]["measures"]
    rights = [measures[f"accuracy.{what}"]["mean"] or 0.0 for what in ACCURACIES]
    return sum(rights) / len(rights)


STAGES: dict[str, Stage] = {
    "init": Step(start_models),
    "text_encoder": Training("text_encoder", install_text_encoder, from_shipped=False),
    "vae_images": Training("vae_images", install_vae, from_shipped=False),
    "vae_short": Training("vae_short", install_vae, from_shipped=False),
    "vae": Training("vae", install_vae, from_shipped=False),
    "latents": LATENTS,
    "teacher_short": Training("teacher_short", install_teacher, stored("latents")),
    "teacher": Training("teacher", install_teacher, stored("latents")),
    "ode_pairs": ODE_PAIRS,
    "ode_init": Training("ode_init", install_student("ode_init"), stored("ode_pairs")),
    "long_latents": LONG_LATENTS,
    "causal_init": Training(
        "causal_init",
        install_student("causal_init"),
        lambda chain: [*stored("long_latents")(chain), *start_from("ode_init")(chain)],
    ),
    "rolling_forcing": Training(
        "rolling_forcing", install_student("rolling_forcing"), start_from("causal_init")
    ),
    "evaluate": Step(evaluate, "rolling_forcing"),
}


# --- running them --------------------------------------------------------------------------------


class Record:
    """`chain.json`: what each stage depends on, cost over all its starts, and reached."""

    def __init__(self, path: Path, identities: Mapping[str, str]) -> None:
        """`identities`: a hash of what each stage depends on now."""
        self.path, self.identities = path, identities
        self.stages: dict[str, dict[str, Any]] = {}
        if path.exists():
            try:
                self.stages = json.loads(path.read_text(encoding="utf-8"))["stages"]
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise UserError(f"{path} is not a chain's record; give another --folder") from error

    def check(self, names: Iterable[str]) -> None:
        """UserError if one of these stages was begun with another config."""
        for name in names:
            if name in self.stages and self.stages[name].get("of") != self.identities[name]:
                raise UserError(
                    f"{name} was begun with another config; --redo {name} does it and all that "
                    "follows anew, or give another --folder"
                )

    def forget(self, names: Iterable[str]) -> None:
        """As if these stages had never begun."""
        for name in names:
            self.stages.pop(name, None)
        self._write()

    def is_done(self, name: str) -> bool:
        """Whether a stage has a result."""
        return "result" in self.stages.get(name, {})

    def finish(self, name: str, result: str) -> None:
        """Keep a stage's result."""
        self.stages[name]["result"] = result
        self._write()

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the seconds of a piece of work to a stage, however it ends."""
        self.stages.setdefault(name, {"of": self.identities[name], "seconds": 0.0})
        self._write()
        start = time.perf_counter()
        try:
            yield
        finally:
            stage = self.stages[name]
            stage["seconds"] += time.perf_counter() - start
            self._write()

    def table(self) -> str:
        """All stages so far, their cost and result."""
        lines = [f"{'stage':<16} {'minutes':>7}  result"]
        for name, stage in self.stages.items():
            lines.append(f"{name:<16} {stage['seconds'] / 60:>7.1f}  {stage.get('result', '-')}")
        total = sum(stage["seconds"] for stage in self.stages.values())
        return "\n".join([*lines, f"{'all':<16} {total / 60:>7.1f}"])

    def _write(self) -> None:
        write_json(self.path, {"stages": self.stages})


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--folder", type=Path, help="(default: runs/shapes, runs/shapes_quick)")
    parser.add_argument("--until", choices=STAGES, help="the last stage to run")
    parser.add_argument(
        "--redo", choices=STAGES, help="do this stage and all that follow anew; once is enough"
    )
    parser.add_argument("--quick", action="store_true", help="a few updates per stage, checked")
    processes = default_processes()
    parser.add_argument(
        "--processes", type=int, default=processes, help="that share a stage (%(default)s here)"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of every config")
    return parser


def go_back(chain: Chain, record: Record, name: str) -> None:
    """To right before a stage: without what it and later ones made, with what the others had.

    UserError, before anything is lost, if one of the others was begun with another config.
    """
    number = list(STAGES).index(name)
    before, again = list(STAGES)[:number], list(STAGES)[number:]
    record.check(before)
    record.forget(again)
    for path in (path for name in again for path in STAGES[name].folders(chain)):
        shutil.rmtree(path, ignore_errors=True)
    whole, chain.own_models = chain.own_models, chain.own_models.with_suffix(".part")
    shutil.rmtree(chain.own_models, ignore_errors=True)
    for stage in (STAGES[name] for name in before):
        if isinstance(stage, Training):
            stage.restore(chain)
        elif stage is STAGES["init"]:
            stage(chain)
    shutil.rmtree(whole, ignore_errors=True)
    if chain.own_models.exists():
        chain.own_models.rename(whole)
    chain.own_models = whole


def check_shipped(chain: Chain) -> dict[str, str]:
    """Hashes of the weights that `--quick` builds on; UserError unless they are there."""
    config = load_config(chain.config("rolling_forcing"), [f"model_root={chain.models}"])
    files = ModelFolder.find(config.model_root, MODEL)
    files.require(files.vae, files.text_encoder, files.tokenizer)
    if not network_files(files.path):
        raise UserError(f"{files.path} has no teacher, which --quick builds on.")
    starts = [find_file(chain.checkpoints / f"shapes_{name}.pt", "checkpoint") for name in STARTS]
    parts = [files.vae, files.text_encoder, *network_files(files.path), *starts]
    return {path.name: file_hash(path) for path in parts}


def main(argv: Sequence[str]) -> int:
    """Run the stages that are not done."""
    args = parse_command(build_parser(), argv)
    if args.processes < 1:
        raise UserError("--processes must be above 0")
    if args.redo and args.until and list(STAGES).index(args.until) < list(STAGES).index(args.redo):
        raise UserError(f"--until {args.until} comes before --redo {args.redo}, which deletes more")
    folder = args.folder or Path("runs") / ("shapes_quick" if args.quick else "shapes")
    chain = Chain(folder.absolute(), args.overrides, quick=args.quick, processes=args.processes)
    shipped = check_shipped(chain) if args.quick else {}
    identities = {
        name: fingerprint({**stage.identity(chain), **shipped}) for name, stage in STAGES.items()
    }
    names = list(STAGES)
    names = names[: names.index(args.until) + 1 if args.until else None]
    make_folder(chain.folder)
    record = Record(chain.folder / "chain.json", identities)
    if args.redo:
        go_back(chain, record, args.redo)
    record.check(names)
    for name in names:
        if record.is_done(name):
            continue
        print(f"--- {name}", flush=True)
        with record.timed(name):
            result = STAGES[name](chain)
        record.finish(name, result)
        print(f"--- {name}: {result} ({record.stages[name]['seconds']:.0f} s)", flush=True)
    print(record.table())
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
