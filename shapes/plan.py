"""What the ablations have to make: trainings of equal cost, and what is measured of each row."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shapes.build import (
    CommandTarget,
    Training,
    add_processes,
    decides_weights,
    processes_of,
    publish_to,
)
from shapes.drift import TEST_SEED, TRUTH, Protocol
from shapes.stored import read_run, sum_up, write_run
from shapes.table import Results, Settings, read_results
from shapes.variants import BEGINNINGS, REFERENCE, ROWS, START, STARTS, Row, Weights, training_of
from utils.config import (
    ROOT,
    VIDEO_KEYS,
    Config,
    find_file,
    fingerprint,
    load_config,
    looked_up,
    to_dict,
)
from utils.errors import UserError
from utils.processes import script_command, videos_per_update
from wan.geometry import WAN_STRIDES

if TYPE_CHECKING:
    from pipeline import VideoPipeline

logger = logging.getLogger(__name__)

FOLDER, RESULTS = Path("runs/ablations"), Path("results/ablations")
CONFIGS, CHECKPOINTS = Path("configs/shapes"), Path("checkpoints")
SINK_KEYS = frozenset({"sink_position", "clean_pass_sees_sink", "sink_ema"})  # besides sink_size
CHAIN_MAKES = ("ode_init", START)
CHAIN_DATA = Path("runs/shapes/data")
NEAR_BUDGET = 0.02
"""A training this near to the budget keeps the `max_steps` of its config."""
_COUNTED: dict[str, dict[str, float]] = {}  # operations by player, by a hash of the config


def add_weights_flags(parser: argparse.ArgumentParser) -> None:
    """Where weights and results are, for `Plan` and `current_results`."""
    add = parser.add_argument
    add("--folder", type=Path, default=FOLDER, help="what is trained (default: %(default)s)")
    add("--results", type=Path, default=RESULTS, help="the figures (default: %(default)s)")
    add("--configs", type=Path, default=CONFIGS, help="folder of the configs")
    add("--checkpoints", type=Path, default=CHECKPOINTS, help="folder of what ships")
    add(
        "--starts",
        type=Path,
        help="folder of initialisations that do not ship, made by shapes/chain.py --shipped",
    )
    add("--retrain", action="store_true", help="make all distillations anew, though some ship")
    add_processes(parser)
    add("overrides", nargs="*", metavar="key=value", help="of every config")


def current_results(args: argparse.Namespace) -> Results | None:
    """The stored results that are of today's configs, trainings, protocol, meter and weights that
    ship; None if there are none.
    """
    from pipeline.records import file_hash

    clip = load_config(args.configs / f"{REFERENCE}.yaml", args.overrides).image_or_video_shape[1]
    scenes = Protocol(clip=clip, scene_seed=TEST_SEED)

    def of_today(path: Path, key: str, settings: Settings) -> bool:
        row, training = ROWS[key], training_of(key)
        config = load_config(args.configs / f"{row.config}.yaml", [*row.overrides, *args.overrides])
        protocol = replace(scenes, given=BEGINNINGS[settings["start"]].given)
        asked = {**played(config), **protocol_settings(protocol)}
        del asked["times"]
        weights = shipped_file(args, settings["weights"])
        asked |= weights_hashes(config, weights)
        if settings["trained"] or not weights.is_file():
            del asked["checkpoint_hash"]
        if settings["trained"] or "steps" in settings:
            steps = [f"max_steps={settings['steps']}"] if "steps" in settings else []
            changes = [*training.overrides, *args.overrides, *steps]
            first = load_config(args.configs / f"{training.config}.yaml", changes)
            own = replace(first, seed=first.seed + settings["training_seed"])
            asked["training"] = training_hash(own, None)
            start = shipped_file(args, f"shapes_{training.start}.pt")
            if settings["trained"] and start.is_file():
                asked["trained"] = training_hash(own, file_hash(start))
        same = all(settings.get(name) == value for name, value in asked.items())
        if not same:
            logger.warning(
                "%s is of other weights, another config, protocol or meter: left out", path
            )
        return same

    return read_results(args.results, of_today)


def shipped_file(args: argparse.Namespace, name: str) -> Path:
    """A file of what ships, from here or from the project's root."""
    return looked_up(args.checkpoints / name)


@dataclass(frozen=True)
class Measurement(CommandTarget):
    """The videos of a row, of one training seed and one beginning: `shapes.drift`, summed up."""

    row: Row
    seed: int
    beginning: str
    config_path: Path
    weights: Path
    protocol: Protocol
    overrides: Sequence[str]
    trained: dict[str, Any]
    folder: Path
    results: Path
    processes: int

    @property
    def name(self) -> str:
        """See `CommandTarget`."""
        return f"{self.row.key}, seed {self.seed}, {BEGINNINGS[self.beginning].title}"

    @property
    def stem(self) -> str:
        """The name of its files."""
        return f"{self.row.key}-{self.seed}-{self.beginning}"

    @property
    def result(self) -> Path:
        """The file to commit."""
        return self.results / f"{self.stem}.json"

    @property
    def measured(self) -> Path:
        """What `shapes.drift` writes."""
        return self.folder / "measured" / f"{self.stem}.json"

    @property
    def videos(self) -> int:
        """How many it makes."""
        return self.protocol.scenes

    @property
    def frames(self) -> int:
        """Video frames of all of them."""
        return self.videos * WAN_STRIDES.time * self.protocol.times * self.protocol.clip

    @property
    def command(self) -> tuple[str, ...]:
        """See `CommandTarget`."""
        p = self.protocol
        words = (
            *("--config_path", self.config_path, "--checkpoint_path", self.weights),
            *("--scenes", p.scenes, "--given", p.given, "--times", p.times, "--clip", p.clip),
            *("--batch", p.batch, "--scene_seed", p.scene_seed, "--json", self.measured),
            *self.overrides,
        )
        return script_command("shapes/drift.py", words, min(self.processes, p.scenes))

    def identity(self) -> dict[str, Any]:
        """See `Target`: the same on every machine; without weights that are not here any more, but
        with what they were trained as. How its operations are counted is no part of it.
        """
        trained = {name: value for name, value in self.trained.items() if name != "operations"}
        settings = {**played(self.config), **protocol_settings(self.protocol), **trained}
        if not self.weights.is_file():
            return settings
        model = self.of_weights
        return {**model, **settings}

    @cached_property
    def config(self) -> Config:
        """How it is played."""
        return load_config(self.config_path, self.overrides)

    @cached_property
    def of_weights(self) -> dict[str, str]:
        """See `weights_hashes`."""
        return weights_hashes(self.config, self.weights)

    def is_done(self) -> bool:
        """See `CommandTarget`: figures of these settings are there, of so many scenes or more, and
        of videos as long or longer.
        """
        if not self.result.is_file():
            return False
        content, identity = read_run(self.result), self.identity()
        times, scenes = identity.pop("times"), self.protocol.scenes
        settings = content["settings"]
        same = all(settings.get(name) == value for name, value in identity.items())
        return same and settings["times"] >= times and len(content["videos"]) >= scenes

    def make(self) -> str:
        """See `Target`."""
        if not self.weights.is_file():
            raise UserError(f"{self.name}: its weights {self.weights} are missing")
        self.run()
        content = json.loads(self.measured.read_text(encoding="utf-8"))
        clip, given = (content["settings"][f"{name}_seconds"] for name in ("clip", "given"))
        videos = [sum_up(result, n, clip, given) for n, result in enumerate(content["videos"])]
        told = {
            **{"row": self.row.key, "training_seed": self.seed, "start": self.beginning},
            **{"config": str(self.config_path), "overrides": list(self.overrides)},
            **{"weights": self.weights.name, "clip_seconds": clip},
        }
        write_run(self.result, {**told, **self.identity(), **self.trained}, videos)
        return str(self.result)

    def open(self) -> VideoPipeline:
        """The model that it plays."""
        from pipeline import load_pipeline

        return load_pipeline(self.config, self.weights)


def weights_hashes(config: Config, weights: Path) -> dict[str, str]:
    """Hashes of all that a model is read from; its settings are told by `played`."""
    from pipeline.records import model_settings
    from pipeline.setup import Setup

    found = model_settings(Setup.of(config), weights, use_ema=False)
    return {name: value for name, value in found.items() if name != "config_hash"}


def played(config: Config) -> dict[str, str]:
    """A hash of all in a config that its videos depend on, on any machine."""
    values = {k: v for k, v in to_dict(config).items() if k in VIDEO_KEYS and k != "seed"}
    return {"config_hash": fingerprint(values)}


def protocol_settings(protocol: Protocol) -> dict[str, Any]:
    """What a measured video depends on beside its model."""
    settings = {**asdict(protocol), "meter": TRUTH.version}
    return {name: value for name, value in settings.items() if name not in ("scenes", "batch")}


class MissingStart(UserError):
    """An initialisation that only the chain can make is not at `path`."""

    def __init__(self, path: Path) -> None:
        """Where it is looked for first."""
        self.path = path
        super().__init__(
            f"{path} is missing and not trained here; make it with shapes/chain.py --shipped, and "
            "say with --starts where it is"
        )


class Plan:
    """What is to be done, in order: each training right before the first row that needs it."""

    def __init__(self, args: argparse.Namespace) -> None:
        """Nothing yet: `add` and `find` plan.

        UserError for a config that is not possible, or weights that nobody can make.
        """
        self.args = args
        self.targets: list[Training | Measurement] = []
        self.weights: dict[str, Path] = {}
        self.steps: dict[str, tuple[int, float]] = {}

    def needed(self) -> list[CommandTarget]:
        """All but the trainings whose weights nothing needs that is still to be made."""
        missing = (part for part in self.targets if isinstance(part, Measurement))
        needed = {part.weights for part in missing if not part.is_done()}
        kept: list[CommandTarget] = []
        for target in reversed(self.targets):
            if isinstance(target, Training):
                if target.result not in needed:
                    continue
                needed.add(Path(target.config.generator_ckpt or ""))
            kept.insert(0, target)
        return kept

    def add(self, row: Row, seed: int) -> None:
        """A row's training, if it is to be made, and its videos.

        MissingStart if they are to be made of an initialisation that is not there.
        """
        try:
            self.targets += self.measurements(row, seed, *self.find(row.weights or row.key, seed))
        except MissingStart as error:
            parts = self.measurements(row, seed, error.path, {"trained": ""})
            if not all(part.is_done() for part in parts):
                raise
            self.targets += parts

    def measurements(
        self, row: Row, seed: int, weights: Path, trained: dict[str, Any]
    ) -> list[Measurement]:
        """The videos of a row, from each beginning."""
        args, parts = self.args, []
        for beginning, how in BEGINNINGS.items():
            protocol = Protocol(
                scenes=args.scenes,
                given=how.given,
                times=args.long_times if row.core and how.given else args.times,
                clip=self.reference.image_or_video_shape[1],
                batch=args.batch,
                scene_seed=TEST_SEED,
            )
            path, changes = self.path(row.config), [*row.overrides, *args.overrides]
            where = args.folder, args.results, processes_of(args)
            parts.append(
                Measurement(row, seed, beginning, path, weights, protocol, changes, trained, *where)
            )
        return parts

    def find(self, key: str, seed: int) -> tuple[Path, dict[str, Any]]:
        """The weights of a row or a start, planned if need be, and for results what they are:
        `trained`, a hash of what decides them if they do not ship, and `training`, the same without
        where it starts; the `steps` of a distillation and its `operations`.
        """
        if key in STARTS:
            return self.start(key)
        training = training_of(key)
        config, changes = self.distillation(training, seed)
        steps, operations = self.steps[repr(training)]
        told = {"steps": steps, "operations": operations}
        shipped = self.shipped.get(fingerprint(decides(config)))
        if shipped is not None:
            return shipped, {"trained": "", "training": training_hash(config, None), **told}
        path, trained = self.planned(f"{key}, seed {seed}", training, changes)
        return path, {**trained, **told}

    def start(self, key: str) -> tuple[Path, dict[str, Any]]:
        """The weights of a start: those that ship or that the chain made, as they are, or from data
        of the chain.

        MissingStart if the chain alone can make them.
        """
        name, made = f"shapes_{key}.pt", self.args.starts
        shipped = shipped_file(self.args, name)
        for path in (shipped, *([] if made is None else [made / name])):
            if path.is_file():
                return path, {"trained": ""}
        if key in CHAIN_MAKES:
            raise MissingStart(shipped)
        return self.planned(key, STARTS[key], self.args.overrides)

    def planned(
        self, name: str, training: Weights, changes: Sequence[str]
    ) -> tuple[Path, dict[str, Any]]:
        """The weights that a training ends with; it is planned unless another ends with them."""
        inputs = []
        if training.start is not None:
            inputs = [f"generator_ckpt={self.start(training.start)[0]}"]
        path, where = self.path(training.config), self.args.folder / "train"
        config = load_config(path, [*inputs, *changes])
        identity = training_hash(config, self.started(config))
        inputs += self.data(config)
        if identity not in self.weights:
            logdir = where / identity
            result = self.weights[identity] = logdir / f"shapes_{path.stem}.pt"
            install, ranks = partial(publish_to, result), processes_of(self.args)
            made = Training(
                name, path, logdir, ranks, install, inputs=inputs, changes=changes, result=result
            )
            self.targets.append(made)
        trained = {"trained": identity, "training": training_hash(config, None)}
        return self.weights[identity], trained

    def data(self, config: Config) -> list[str]:
        """Overrides for data that the chain makes: those beside the starts that it made."""
        if self.args.starts is None:
            return []
        beside = {
            name: self.args.starts.parent / "data" / Path(value).name
            for name in ("data_path", "heldout_data_path")
            if (value := vars(config)[name]) and Path(value).parent == CHAIN_DATA
        }
        return [f"{name}={path}" for name, path in beside.items() if path.is_dir()]

    def started(self, config: Config) -> str:
        """What a training goes on from: a hash of the file, or of the training that makes it."""
        from pipeline.records import file_hash

        if config.generator_ckpt is None:
            return ""
        to_make = {str(path): identity for identity, path in self.weights.items()}
        known = to_make.get(config.generator_ckpt)
        return known or file_hash(find_file(config.generator_ckpt, "checkpoint"))

    def distillation(self, training: Weights, seed: int) -> tuple[Config, list[str]]:
        """A distillation and its overrides: its own, those of all, and the steps it may take.

        It takes as many operations as the reference does; of every seed as many steps as of the
        first.
        """
        path, changes = self.path(training.config), [*training.overrides, *self.args.overrides]
        config = load_config(path, changes)
        if repr(training) not in self.steps:
            self.steps[repr(training)] = affordable(config, self.budget)
        steps, _ = self.steps[repr(training)]
        changes += [f"max_steps={steps}"] * (steps != config.max_steps)
        changes += [f"seed={config.seed + seed}"] * (seed > 0)
        return load_config(path, changes), changes

    @cached_property
    def reference(self) -> Config:
        """The config that the budget comes from; UserError if it has no end."""
        path = self.path(training_of(REFERENCE).config)
        config = load_config(path, self.args.overrides)
        if config.max_steps is None:
            raise UserError(f"{path} never ends; give max_steps=…")
        return config

    @cached_property
    def budget(self) -> float:
        """Floating-point operations of each distillation."""
        return operations(self.reference, self.reference.max_steps or 0)

    @cached_property
    def shipped(self) -> dict[str, Path]:
        """Students that ship, by what decides their weights.

        What ships was trained with the project's configs, what lies elsewhere with `--configs`.
        """
        args, found = self.args, dict[str, Path]()
        ours = args.checkpoints.resolve() in (CHECKPOINTS.resolve(), (ROOT / CHECKPOINTS).resolve())
        plain = (row for row in ROWS.values() if not row.overrides and row.weights is None)
        for row in () if args.retrain else plain:
            path = shipped_file(args, f"shapes_{row.key}.pt")
            if path.is_file():
                config = (ROOT / CONFIGS if ours else args.configs) / f"{row.config}.yaml"
                found.setdefault(fingerprint(decides(load_config(config))), path)
        return found

    def path(self, config: str) -> Path:
        """A file of the configs."""
        return Path(self.args.configs / f"{config}.yaml")


def training_hash(config: Config, start: str | None) -> str:
    """Of all that decides the weights of a training: its config, the models that it reads, and
    `start`, a hash of those that it goes on from (None: without them).
    """
    return fingerprint({**decides(config), "generator_ckpt": start, "models": models_hash(config)})


def models_hash(config: Config) -> str:
    """Of networks, VAE and text encoder in the model folders of a training, if they are here."""
    from pipeline.records import file_hash, network_files, text_files, weight_files
    from trainer.estimate import model_folder, networks_of

    names = sorted({config.generator_name, *networks_of(config).values()})
    folders = [found for name in names if (found := model_folder(config, name)) is not None]
    paths = [path for folder in folders for path in network_files(folder.path)]
    for folder in folders:
        if folder.path.name == config.generator_name:
            paths += [*weight_files(folder.vae), *text_files(folder)]
    return "+".join(map(file_hash, paths))


def affordable(config: Config, budget: float) -> tuple[int, float]:
    """How many steps of a distillation a budget of operations pays, and what they take.

    Those of its config, if they are near enough; else whole turns of student and critic behind the
    critic's warm-up.
    """
    steps = config.max_steps or 0
    if abs(operations(config, steps) / budget - 1) > NEAR_BUDGET:
        alone, every = config.critic_warmup_steps, config.dfake_gen_update_ratio
        before = operations(config, alone)
        turn = operations(config, alone + every) - before
        steps = alone + every * max(1, round((budget - before) / turn))
    return steps, operations(config, steps)


def operations(config: Config, steps: int) -> float:
    """Floating-point operations of so many steps of a distillation, all videos together."""
    from trainer.estimate import planned_setup
    from trainer.footprint import update_flops
    from trainer.networks import generator_updates

    asked = fingerprint({**to_dict(config), "max_steps": None})
    if asked not in _COUNTED:
        _COUNTED[asked] = update_flops(config, planned_setup(config))
    of = _COUNTED[asked]
    one = steps * of["critic"] + generator_updates(config, steps) * of["generator"]
    return one * videos_per_update(config)


def decides(config: Config) -> dict[str, Any]:
    """What decides the weights of a training.

    A rollout that fits into one attention sees its first frames anyway: no sink changes a bit.
    """
    from pipeline.schedule import BlockLayout
    from trainer.tasks.base import rollout_recipe

    decided = decides_weights(config)
    if config.trainer != "score_distillation":
        return decided
    layout = BlockLayout(config.num_frame_per_block, config.independent_first_frame)
    if rollout_recipe(config).longest_frames(layout) > config.attention_frames:
        return decided
    model = {key: value for key, value in decided["model_kwargs"].items() if key != "sink_size"}
    rest = {key: value for key, value in decided.items() if key not in SINK_KEYS}
    return {**rest, "model_kwargs": model}
