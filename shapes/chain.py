"""The whole method in the shapes world, stage by stage, from nothing to a measured student.

    python -m shapes.chain                  # everything, into runs/shapes
    python -m shapes.chain --until teacher  # a part of it; the same command goes on
    python -m shapes.chain --redo teacher   # again from there; then go on without --redo
    python -m shapes.chain --quick          # a few updates of each stage, checked
    python -m shapes.chain --shipped        # from the models that ship: starts and student alone

Every stage is one of the project's own commands with a config of `configs/shapes`, and can be
stopped at any point: the same command goes on there. What a stage cost and reached is printed and
kept in `chain.json`; if its config has changed since, the chain says so. `key=value` goes to every
stage. Use the result with `model_root=runs/shapes/models --checkpoint_path
runs/shapes/checkpoints/shapes_rolling_forcing.pt`.

With `--shipped` text encoder, VAE and teacher are those that ship, so what comes out goes with them
(`python -m shapes.ablate --starts runs/shapes_shipped/checkpoints`).

With `--quick` each stage makes a few updates, starting from the weights that ship for the stages
before it (text encoder, VAE and teacher start from scratch; `STAND_INS` names others for the starts
that do not ship), and has to lower its own held-out loss by the share in `QUICK`; the student has
to move, and to keep most of the prompt accuracy of its initialisation.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

if not __package__:  # run by its path: the tree that it lies in comes first
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from shapes.build import Target, Training, add_processes, processes_of, publish_to
from shapes.world import UNSAID
from utils.cli import parse_command, run_main
from utils.config import ROOT, find_file, fingerprint, load_config, to_dict
from utils.errors import UserError
from utils.files import make_folder, write_json, written, written_folder
from utils.processes import run_together, script_command

MODEL = "Shapes"
ACCURACIES = ("background", "colour", "kind", "direction")
STAND_INS = {"ode_init": "self_forcing", "directed_init": "causal_init"}
"""With `--quick`: which student that ships is taken for a start that does not."""
COMPARED = {"ode_init": "ODE initialisation", "causal_init": "causal initialisation"}
MIN_KEPT_ACCURACY = 0.8
ODE_STEPS = 25
"""Of a trajectory of the teacher."""
OF_MODELS = ("init", "text_encoder", "vae_images", "vae_short", "vae", "teacher_short", "teacher")
"""Stages that are done with `--shipped`."""


class Quick(NamedTuple):
    """What `--quick` changes of a training, and the share by which its held-out loss must fall.

    Below 0, as where the held-out loss does not tell what a stage is for: by which it may rise.
    """

    margin: float
    words: str

    @property
    def overrides(self) -> tuple[str, ...]:
        """The changes, one `key=value` each."""
        return (*self.words.split(), "log_iters=1000000", "heldout_every=1000000")


ON_CLIPS = "max_steps=10 total_batch_size=4 lr_warmup_steps=5 heldout_videos=4"
# The loss is the critic's, so the student moves little.
ON_ROLLOUTS = (
    "max_steps=8 lr=1e-4 lr_critic=2e-4 heldout_videos=4 ema_start_step=1000 "
    "image_or_video_shape=[1,15,16,8,8] num_training_frames=15"
)
QUICK = {
    "text_encoder": Quick(0.2, "max_steps=30 lr_warmup_steps=5 heldout_videos=64"),
    "vae_images": Quick(0.3, "max_steps=20 lr_warmup_steps=5 ema_start_step=1000"),
    "vae_short": Quick(0.04, "max_steps=10 lr=4.5e-5 lr_warmup_steps=5 heldout_videos=8"),
    "vae": Quick(
        0.02,
        "max_steps=32 lr=6e-5 lr_warmup_steps=10 heldout_videos=4 "
        "image_or_video_shape=[1,4,16,8,8]",
    ),
    "teacher_short": Quick(
        0.2,
        "max_steps=20 total_batch_size=16 random_init=true lr_warmup_steps=5 heldout_videos=8",
    ),
    "teacher": Quick(
        0.2, "max_steps=16 total_batch_size=8 random_init=true lr_warmup_steps=5 heldout_videos=8"
    ),
    "ode_init": Quick(0.1, "max_steps=24 total_batch_size=8 lr_warmup_steps=5 heldout_videos=8"),
    "causal_init": Quick(0.05, ON_CLIPS),
    "directed_init": Quick(-0.2, ON_CLIPS),  # no prompt of the held-out clips changes
    "rolling_forcing": Quick(0.03, ON_ROLLOUTS),
    "rolling_directed": Quick(0.03, ON_ROLLOUTS),
}
QUICK_HELDOUT = 8


@dataclass(frozen=True)
class Chain:
    """Where things are, and how commands are run.

    `shipped`: from the models that ship. `rebuilt` stands in for the chain's own models while they
    are put together again.
    """

    folder: Path
    overrides: Sequence[str]
    quick: bool
    processes: int
    shipped: bool = False
    rebuilt: Path | None = None

    @property
    def own_models(self) -> Path:
        """`model_root` of the stages up to the VAE."""
        return self.rebuilt or self.folder / "models"

    @property
    def models(self) -> Path:
        """`model_root` of the stages after the VAE."""
        return ROOT / "wan_models" if self.quick or self.shipped else self.own_models

    @property
    def stages(self) -> list[str]:
        """Names of the stages, in order."""
        return [name for name in STAGES if not (self.shipped and name in OF_MODELS)]

    @property
    def checkpoints(self) -> Path:
        """Where students are taken from."""
        return ROOT / "checkpoints" if self.quick else self.folder / "checkpoints"

    def student(self, name: str) -> Path:
        """Where a student goes that is trained here."""
        return self.folder / "checkpoints" / f"shapes_{name}.pt"

    def start(self, name: str) -> Path:
        """Where a student is taken from that others start from."""
        shipped = STAND_INS.get(name, name) if self.quick else name
        return self.checkpoints / f"shapes_{shipped}.pt"

    def data(self, name: str) -> Path:
        """Folder of stored data."""
        return self.folder / "data" / name

    def stored(self, name: str) -> list[str]:
        """Overrides for data that an earlier stage stored."""
        heldout = self.data(f"{name}_heldout")
        return [f"data_path={self.data(name)}", f"heldout_data_path={heldout}"]

    def config(self, name: str) -> Path:
        """An experiment file of the shapes world."""
        return ROOT / "configs" / "shapes" / f"{name}.yaml"

    def run(self, script: str, words: Mapping[str, Sequence[object]]) -> None:
        """Run a script once for each list of words, with the chain's overrides; UserError if it
        fails.

        All processes share each run. With `--quick`, where starting takes longer than the work, a
        run has one process, and as many are under way at once.
        """
        ranks, at_once = (1, self.processes) if self.quick else (self.processes, 1)
        more = (f"model_root={self.models}", *self.overrides)
        commands = {
            name: script_command(script, (*given, *more), ranks) for name, given in words.items()
        }
        run_together(commands, at_most=at_once)


Stage = Callable[[Chain], Target]  # a part of the chain, in a certain folder


# --- trainings -----------------------------------------------------------------------------------


def training(
    name: str,
    install: Callable[[Chain, Path], None],
    inputs: Callable[[Chain], Sequence[str]] = lambda chain: (),
    *,
    from_shipped: bool = True,
) -> Stage:
    """A stage that trains with `configs/shapes/<name>.yaml`.

    `install` puts the exported weights where later stages look. `inputs` are overrides that say
    where its own inputs are. `from_shipped`: with `--quick` it builds on what ships.
    """

    def stage(chain: Chain) -> Target:
        models = chain.models if from_shipped else chain.own_models
        quick = QUICK[name].overrides if chain.quick else ()
        return ChainTraining(
            name,
            chain.config(name),
            chain.folder / "train" / name,
            chain.processes,
            install=partial(install, chain),
            inputs=[f"model_root={models}", *inputs(chain)],
            changes=[*quick, *chain.overrides],
            judge=partial(judge_run, name, checked=chain.quick),
        )

    return stage


class ChainTraining(Training):
    """A training that is measured on held-out data and has an end."""

    def make(self) -> str:
        """See `Target`."""
        if not (self.config.max_steps and self.config.heldout_every):
            raise UserError(f"{self.key}: max_steps and heldout_every must be above 0")
        return super().make()


def judge_run(name: str, logdir: Path, *, checked: bool) -> str:
    """How the held-out loss of a run went; if `checked`, UserError unless it fell enough."""
    rows = [
        json.loads(line)
        for line in (logdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    losses = [row["heldout/loss"] for row in rows if "heldout/loss" in row]
    if checked:
        check_margin(name, losses[0], losses[-1])
    return f"held-out loss {losses[0]:.4f} -> {losses[-1]:.4f}"


def check_margin(name: str, first: float, last: float) -> None:
    """UserError unless the held-out loss fell by the stated share, or rose by no more."""
    margin = QUICK[name].margin
    if not last <= (1 - margin) * first:
        wanted = f"has to fall by {margin:.1%}" if margin >= 0 else f"may rise by {-margin:.1%}"
        raise UserError(
            f"{name}: the held-out loss went from {first:.4f} to {last:.4f}, but {wanted}"
        )


def install_text_encoder(chain: Chain, exported: Path) -> None:
    """The text encoder, as it was exported."""
    from wan.folders import TEXT_ENCODER_FILE

    with written(chain.own_models / MODEL / TEXT_ENCODER_FILE) as part:
        shutil.copyfile(exported / TEXT_ENCODER_FILE, part)


def install_vae(chain: Chain, exported: Path) -> None:
    """The VAE, in half precision."""
    import torch

    from wan.folders import VAE_FILE
    from wan.weights import converted, read_weights, save_weights

    source = exported / VAE_FILE
    halved = converted(read_weights(source, "a VAE"), source, dtype=torch.float16)
    save_weights(halved, chain.own_models / MODEL / VAE_FILE)


def install_teacher(chain: Chain, exported: Path) -> None:
    """The teacher's average becomes the model folder's transformer."""
    from wan.checkpoints import publish_model

    publish_model(exported / "model.pt", chain.own_models / MODEL)


def student(name: str, *, data: str | None = None, start: str | None = None) -> Stage:
    """A training that ends in a published checkpoint: on what data, from which student."""

    def inputs(chain: Chain) -> list[str]:
        stored = chain.stored(data) if data else []
        return [*stored, *([f"generator_ckpt={chain.start(start)}"] if start else [])]

    return training(name, lambda chain, run: publish_to(chain.student(name), run), inputs)


# --- the other stages ----------------------------------------------------------------------------


@dataclass(frozen=True)
class EmptyModel(Target):
    """Sizes, tokenizer and an untrained text encoder."""

    chain: Chain

    def identity(self) -> dict[str, Any]:
        """See `Target`."""
        return {}

    def make(self) -> str:
        """See `Target`."""
        from shapes import init
        from wan.folders import TEXT_ENCODER_FILE

        folder = self.chain.own_models / MODEL
        if not (folder / TEXT_ENCODER_FILE).exists():
            init.main(["--folder", str(folder)])
        return "sizes, tokenizer"


@dataclass(frozen=True)
class Precomputing(Target):
    """Data for training, and as `<name>_heldout` for the held-out loss.

    `keys`: what the data depend on of `config`. `counts`: how many for training, and held out.
    """

    chain: Chain
    name: str
    verb: str
    config: str
    keys: Sequence[str]
    counts: tuple[int, int]
    flags: Sequence[str]

    @property
    def sources(self) -> dict[str, int]:
        """How many of what."""
        return dict(zip(("shapes:train", "shapes:heldout"), self.counts, strict=True))

    def identity(self) -> dict[str, Any]:
        """See `Target`."""
        values = to_dict(load_config(self.chain.config(self.config), self.chain.overrides))
        return {**{k: values[k] for k in self.keys}, "flags": list(self.flags), **self.sources}

    def make(self) -> str:
        """See `Target`."""
        config = self.chain.config(self.config)
        words = {
            folder.name: (
                *(self.verb, "--config_path", config, "--data_path", source),
                *("--count", count, "--output_folder", folder, *self.flags),
            )
            for folder, (source, count) in zip(self.folders(), self.sources.items(), strict=True)
        }
        self.chain.run("scripts/precompute.py", words)
        return ", ".join(f"{count} of {source}" for source, count in self.sources.items())

    def folders(self) -> Sequence[Path]:
        """See `Target`."""
        return [self.chain.data(self.name), self.chain.data(f"{self.name}_heldout")]


def latents(chain: Chain) -> Target:
    """Clips as latents; the teacher's trainings take the first frames of each."""
    counts = (16, QUICK_HELDOUT) if chain.quick else (2048, 64)
    flags = ("--storage_dtype", "bfloat16", "--shard_size", "16" if chain.quick else "64")
    keys = ("image_or_video_shape", "dtype")
    return Precomputing(chain, "latents", "latents", "causal_init", keys, counts, flags)


def ode_pairs(chain: Chain) -> Target:
    """Trajectories of the teacher."""
    counts = (32, QUICK_HELDOUT) if chain.quick else (512, 32)
    steps = "10" if chain.quick else str(ODE_STEPS)
    flags = ("--num_steps", steps, "--batch_size", "16", "--shard_size", "16")
    keys = (
        *("image_or_video_shape", "dtype", "seed", "num_frame_per_block"),
        *("independent_first_frame", "timestep_shift", "denoising_step_list"),
        *("warp_denoising_step", "guidance_scale", "negative_prompt", "model_kwargs"),
    )
    return Precomputing(chain, "ode_pairs", "ode_pairs", "ode_init", keys, counts, flags)


@dataclass(frozen=True)
class Accuracies(Target):
    """Prompt accuracy of the initialisations and of their student, in the first five seconds."""

    chain: Chain

    def identity(self) -> dict[str, Any]:
        """See `Target`."""
        from pipeline.setup import video_settings

        config = self.chain.config("rolling_forcing")
        return video_settings(to_dict(load_config(config, self.chain.overrides)))

    def make(self) -> str:
        """See `Target`."""
        chain = self.chain
        own = [name for name in COMPARED if not (chain.quick and name in STAND_INS)]
        starts = {name: chain.start(name) for name in own}
        checkpoints = {**starts, "rolling_forcing": chain.student("rolling_forcing")}
        results = {name: chain.folder / f"evaluation_{name}.json" for name in checkpoints}
        words = {
            f"evaluation of {name}": (
                *("--config_path", chain.config("rolling_forcing")),
                *("--checkpoint_path", checkpoint, "--prompts", 4 if chain.quick else 16),
                *("--seconds", 5, "--json", results[name]),
            )
            for name, checkpoint in checkpoints.items()
        }
        chain.run("scripts/evaluate.py", words)
        reached = {name: prompt_accuracy(path) for name, path in results.items()}
        after, before = reached["rolling_forcing"], max(reached[name] for name in starts)
        if chain.quick:
            check_moved(checkpoints["causal_init"], checkpoints["rolling_forcing"])
            if after < MIN_KEPT_ACCURACY * before:
                fell = f"from {before:.2f} (initialisation) to {after:.2f}"
                raise UserError(f"prompt accuracy fell {fell}")
        told = " -> ".join(f"{reached[name]:.2f} ({COMPARED[name]})" for name in starts)
        return f"prompt accuracy {told} -> {after:.2f} (student)"


def check_moved(start: Path, trained: Path) -> None:
    """UserError unless most weights of a student are others than those it began with."""
    from wan.checkpoints import read_state_dict

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
    "init": EmptyModel,
    "text_encoder": training("text_encoder", install_text_encoder, from_shipped=False),
    "vae_images": training("vae_images", install_vae, from_shipped=False),
    "vae_short": training("vae_short", install_vae, from_shipped=False),
    "vae": training("vae", install_vae, from_shipped=False),
    "latents": latents,
    "teacher_short": training("teacher_short", install_teacher, lambda c: c.stored("latents")),
    "teacher": training("teacher", install_teacher, lambda c: c.stored("latents")),
    "ode_pairs": ode_pairs,
    "ode_init": student("ode_init", data="ode_pairs"),
    "causal_init": student("causal_init", data="latents", start="ode_init"),
    "rolling_forcing": student("rolling_forcing", start="causal_init"),
    "directed_init": student("directed_init", data="latents", start="causal_init"),
    "rolling_directed": student("rolling_directed", start="directed_init"),
    "evaluate": Accuracies,
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

    def summary(self) -> str:
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
    parser.add_argument(
        "--folder", type=Path, help="(default: runs/shapes, runs/shapes_quick, runs/shapes_shipped)"
    )
    parser.add_argument("--until", choices=STAGES, help="the last stage to run")
    parser.add_argument(
        "--redo", choices=STAGES, help="do this stage and all that follow anew; once is enough"
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--quick", action="store_true", help="a few updates per stage, checked")
    how.add_argument("--shipped", action="store_true", help="from the teacher that ships on")
    add_processes(parser)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of every config")
    return parser


def go_back(chain: Chain, record: Record, name: str) -> None:
    """To right before a stage: without what it and later ones made, with what the others had.

    UserError, before anything is lost, if one of the others was begun with another config.
    """
    number = chain.stages.index(name)
    before, again = chain.stages[:number], chain.stages[number:]
    record.check(before)
    record.forget(again)
    for path in (path for name in again for path in STAGES[name](chain).folders()):
        shutil.rmtree(path, ignore_errors=True)
    if chain.shipped:
        return
    with written_folder(chain.own_models) as part:
        for target in (STAGES[name](replace(chain, rebuilt=part)) for name in before):
            if isinstance(target, EmptyModel):
                target.make()
            elif isinstance(target, Training) and target.exported is not None:
                target.install(target.exported)


def check_shipped(chain: Chain) -> dict[str, str]:
    """Hashes of the weights that ship and are built on; UserError unless they are there."""
    from pipeline.records import file_hash, network_files
    from wan.folders import ModelFolder

    config = load_config(chain.config("rolling_forcing"), [f"model_root={chain.models}"])
    files = ModelFolder.find(config.model_root, MODEL)
    files.require(files.vae, files.text_encoder, files.tokenizer)
    if not network_files(files.path):
        raise UserError(f"{files.path} has no teacher to build on.")
    names = (*COMPARED, *STAND_INS) if chain.quick else ()
    starts = {find_file(chain.start(name), "checkpoint") for name in names}
    parts = [files.vae, files.text_encoder, *network_files(files.path), *sorted(starts)]
    return {path.name: file_hash(path) for path in parts}


def main(argv: Sequence[str]) -> int:
    """Run the stages that are not done."""
    args = parse_command(build_parser(), argv)
    processes = processes_of(args)
    if args.redo and args.until and list(STAGES).index(args.until) < list(STAGES).index(args.redo):
        raise UserError(f"--until {args.until} comes before --redo {args.redo}, which deletes more")
    kind = "_quick" if args.quick else "_shipped" if args.shipped else ""
    folder = args.folder or Path("runs") / f"shapes{kind}"
    chain = Chain(folder.absolute(), args.overrides, args.quick, processes, args.shipped)
    if unknown := {args.redo, args.until} - {None, *chain.stages}:
        raise UserError(f"--shipped has no stage {' or '.join(sorted(unknown))}: its result ships")
    shipped = check_shipped(chain) if args.quick or args.shipped else {}
    targets = {name: STAGES[name](chain) for name in chain.stages}
    identities = {
        name: fingerprint({**target.identity(), **shipped, "unsaid": UNSAID})
        for name, target in targets.items()
    }
    names = chain.stages
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
            result = targets[name].make()
        record.finish(name, result)
        print(f"--- {name}: {result} ({record.stages[name]['seconds']:.0f} s)", flush=True)
    print(record.summary())
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
