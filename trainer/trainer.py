"""The one training loop, for every objective."""

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pipeline.setup import Setup
from trainer.checkpoint import (
    CheckpointStore,
    DamagedStateError,
    make_room,
    player_state,
    restore_player,
    whole_states,
)
from trainer.data import (
    Batches,
    first_prompts,
    open_heldout_data,
    open_training_data,
    split_batches,
)
from trainer.export import Exports
from trainer.health import HealthMonitor
from trainer.health_figure import draw_health
from trainer.heldout import HeldOut
from trainer.metrics import (
    METRICS_FILE,
    Means,
    MetricsLog,
    Timer,
    TrainingProgress,
    WandbSettings,
    mean_over_ranks,
)
from trainer.networks import compute_dtype
from trainer.samples import SampleVideos
from trainer.sharding import World, agreed, any_rank, check_shared
from trainer.space import require_space_for
from trainer.stopping import Stopping, StopRequested
from trainer.tasks import find_task
from trainer.tasks.base import TaskInputs
from trainer.updates import Updates
from trainer.watch import LostRanksError, Place, Watch, is_of_a_collective
from utils.config import FREE_KEYS, Config, check_training, save_config, to_dict
from utils.draws import Draws
from utils.errors import UserError
from utils.files import check_file, check_folder, remove_leftovers
from utils.processes import videos_per_update

logger = logging.getLogger(__name__)


def recipe(config: Config) -> dict[str, Any]:
    """What decides the weights that a training ends with, as far as a config says it."""
    fixed = {key: value for key, value in to_dict(config).items() if key not in FREE_KEYS}
    videos = videos_per_update(config)
    return {**fixed, "max_steps": config.max_steps, "videos_per_update": videos}


# Phases that are no part of training a step. All but the first follow the step's line in the log,
# and count in the next one's seconds.
BETWEEN_STEPS = ("heldout", "samples", "save", "export")
EXPORT_WAIT = 1.0  # seconds between two looks while the export before is being written


class Trainer:
    """Trains the players of a task; can be stopped anywhere and resumed by the same command."""

    def __init__(
        self,
        config: Config,
        world: World,
        logdir: Path,
        *,
        wandb: WandbSettings | None = None,
        save: bool = True,
        visualise: bool = True,
        setup: Setup | None = None,
        timer: Timer | None = None,
    ) -> None:
        """`setup`: that of the config, for its model folder; all weights are drawn if it has none.

        `timer`: of the phases.
        """
        check_training(config)
        self.config = config
        self.world = world
        self.logdir = logdir
        self.saves = save
        self.visualises = visualise
        self.batch_split = split_batches(config, world.size)
        logger.info(self.batch_split.describe())
        for note in self.batch_split.notes if world.is_main else ():
            logger.warning(note)
        self.timer = timer or Timer(world.device)
        self.step = 0
        self.begun: list[str] = []  # players that the step under way has updated
        self.computed_in = str(compute_dtype(config, world.device) or torch.float32)
        self.stopping = Stopping(world)
        self.store = CheckpointStore(logdir, world, keep=config.keep_checkpoints)
        self.exports = Exports(logdir, keep=config.keep_exports)
        self.log = MetricsLog(logdir, wandb=wandb, tensorboard=True, is_main=world.is_main)
        self.watch = Watch(world, self._place, self._otherwise)
        self.stopped_by = 0  # the signal that ended the training
        self._saved: tuple[int, list[str]] | None = None  # `step` and `begun` of the newest state
        self._settled = False  # a step was made since the start
        with self._closed_on_error(), self.timer.phase("loading", whole=True):
            self.watch.begin()
            self._build(setup)

    def _build(self, setup: Setup | None) -> None:
        """Everything that needs the data, the networks or the run's folder."""
        config, world = self.config, self.world
        self._check_logdir()  # before any network is built
        task = find_task(config.trainer)
        with agreed():
            setup = setup or Setup.of(config)
            dataset = open_training_data(config, setup)
            task.check_data(config, setup, dataset)
            heldout = open_heldout_data(config, setup, task.check_items)
        look = self.stopping.look
        self.task = task(
            TaskInputs(config, setup, world, self.batch_split, self.timer, dataset, look)
        )
        self.batches = {
            name: Batches(
                dataset,
                self.batch_split,
                world.ranks.rank,
                config.seed + number,
                changes=config.prompt_change_probability if name == "generator" else 0.0,
            )
            for number, name in enumerate(self.task.players)
        }
        keep_state = self._keep_emergency if self.saves else None
        self.updates = Updates(self.task, self.batches, self.logdir, keep_state)
        self.heldout = HeldOut(self.task, heldout) if heldout else None
        self.health = HealthMonitor()
        self.means = Means()
        self._operations, self._first = 0.0, 0  # since the last line of the log, and its step
        self.samples = None
        if self.visualises and config.sample_every and (pipe := self.task.sampler()):
            prompts = config.sample_prompts or list(first_prompts(dataset, 4))
            self.samples = SampleVideos(
                pipe, self.logdir, prompts, config.sample_latent_frames, world, look
            )
        self._resume()
        self._first = self.step
        with agreed():
            if world.is_main:
                if self.saves and not self._is_done():
                    require_space_for(config, self.task, self.logdir, self.step)
                save_config(config, self.logdir / "config.yaml")

    def train(self) -> None:
        """Run until `max_steps`, or until SIGTERM or Ctrl-C asks to stop; a state is left.

        On every way out the state being written gets its name and the logs are closed.

        Raises:
            NonFiniteError, LostRanksError, UserError.
        """
        progress = TrainingProgress(self.config.max_steps, self.step, enabled=self.world.is_main)
        self.timer.read()  # what loading took belongs to no step
        with self.stopping.listening(self._otherwise), self._closed_on_error():
            try:
                self._go_on(progress)
                self.close()
            finally:
                progress.close()
        if self.stopped_by:
            logger.info("asked to stop: %s; the same command goes on there", self._left())

    def _go_on(self, progress: TrainingProgress) -> None:
        """Step by step to the end, or to where a signal ends it."""
        try:
            if self._saved is None:
                self._begin()
            else:
                self._follow_up(saved=True)  # what a kill kept from being done
            while not self._is_done():
                metrics = self.train_step()
                progress.update(metrics, str(metrics.get("health", "")).partition(":")[0])
                self._settle()
                self._follow_up()
        except StopRequested as request:
            self.stopped_by = request.number
            if self.saves and (self.step or self.begun) and self._saved != self._here():
                self.save()

    def _follow_up(self, *, saved: bool = False) -> None:
        """What is due after a step. The state comes first: what is cut off after it is made up for.

        `saved`: the state is there, and perhaps the rest of it.
        """
        due = self.step % self.config.log_iters == 0 or self._is_done()
        if self.begun:  # of the next step: these weights are no longer there
            missing = self.saves and self.world.is_main and not self.exports.holds(self.step)
            if self.step and due and missing:
                logger.warning("the weights of step %d were not exported in time", self.step)
            return
        if due and self.saves and not saved:
            if self.world.is_main:
                self.exports.forget(self.step)
            self.save()
        samples, step = self.samples, self.step
        if samples and step and step % self.config.sample_every == 0:
            self._unless(saved and samples.are_there(step), partial(self._sample, samples))
        if due and self.saves:
            self._unless(saved and self.exports.holds(step), self._export)
        if due and self.visualises and not saved:
            self._draw_health()

    def _unless(self, there: bool, make: Callable[[], None]) -> None:
        """Make what the main rank does not find in the run's folder; all ranks take part."""
        if any_rank(self.world.is_main and not there, self.world.device):
            make()

    def close(self) -> None:
        """Wait until state and weights have their names, finish the logs; may be called again.

        Raises:
            UserError: the last of them could not be written (SystemExit on the other ranks).
        """
        try:
            self.store.wait()
        finally:
            self.watch.end()  # from here on no rank waits for another
            try:
                self.exports.close()
            finally:
                self.log.close()

    @contextmanager
    def _closed_on_error(self) -> Iterator[None]:
        """Close all that is open after an error, which stays the one that is told."""
        try:
            yield
        except BaseException as error:
            if is_of_a_collective(error):  # what others have a part in would never end
                self.log.close()
                raise LostRanksError(
                    f"rank {self.world.ranks.rank} lost another one in {self._place().words} "
                    f"({str(error).splitlines()[0][:200]}); {self._otherwise()}"
                ) from error
            try:
                self.close()
            except (Exception, SystemExit) as second:
                logger.warning("%s", second)
            raise

    def train_step(self) -> dict[str, Any]:
        """One step: an update of each player that is due. Returns what is logged, if it is."""
        due = self.task.due(self.step)
        for name in due:
            if name not in self.begun:
                self.update(name)
                self.begun.append(name)
        if self.heldout and ((self.step + 1) % self.config.heldout_every == 0 or self._is_done(1)):
            with self.timer.phase("heldout", whole=True):
                self.means.add(self.heldout.measure())
        self.step += 1
        self.begun = []
        active = self.step >= self.config.ema_start_step + self.task.warmup_steps
        with self.timer.phase("average"):
            for name, player in self.task.players.items():
                player.update_ema(active=active, moved=name in due)
        logged = self.step % self.config.metrics_every == 0 or self._is_done()
        return self._record() if logged else {}

    def update(self, name: str) -> None:
        """The update of a player in this step."""
        number = self._update_number(name)
        self.means.add(self.updates.update(self.task.players[name], self.step, number))
        share = self.task.flops(name, Draws(self.config.seed, number, ()))
        self._operations += math.nan if share is None else share * self.batch_split.videos

    def _record(self) -> dict[str, Any]:
        """Reduce over ranks, judge, write: one line of the log."""
        metrics: dict[str, Any] = self.means.read()
        metrics |= self.task.derive(metrics)
        for name, player in self.task.players.items():
            metrics[f"{name}/updates"] = player.updates
        if skipped := self.updates.skipped(self._update_number()):
            metrics["skipped_updates"] = skipped
        steps = self.step - self._first
        seconds = {name: value / steps for name, value in self.timer.read().items()}
        metrics["seconds"] = seconds
        trained = seconds["step"] - sum(seconds.get(name, 0.0) for name in BETWEEN_STEPS)
        rate = self._operations / steps / self.world.size / trained / 1e12
        metrics["tflops_per_second"] = rate
        self._operations, self._first = 0.0, self.step
        metrics["memory_gib"] = peak_memory(self.world.device)
        say_heldout(self.step, metrics)
        metrics["health"] = str(self.health.update(metrics))
        with agreed():
            self.log.write(self.step, metrics)
        return metrics

    # --- between steps --------------------------------------------------------------------------

    def _begin(self) -> None:
        """Drop the log of a run that never got to a state; measure before the first update."""
        with agreed():
            self.log.resume(0)
        if self.heldout:
            with self.timer.phase("heldout", whole=True):
                metrics = mean_over_ranks(self.heldout.measure())
            say_heldout(0, metrics)
            with agreed():
                self.log.write(0, metrics)

    def _settle(self) -> None:
        """After the first step since the start, ranks wait no longer than the config says."""
        if not self._settled:
            self._settled = True
            self.world.set_limit(self.config.collective_timeout)

    def save(self) -> None:
        """Write the resumable state, behind the training's back."""
        with self.timer.phase("save"):
            self.store.save(self.step, self._state())
        self._saved = self._here()

    def _export(self) -> None:
        with self.timer.phase("export"):
            while any_rank(self.exports.is_writing(EXPORT_WAIT), self.world.device):
                self.stopping.look()  # the other ranks wait with the main one, and lose nobody
            self.exports.wait()
            write = self.task.export()
            if write is not None:
                self.exports.start(self.step, write)

    def _sample(self, samples: SampleVideos) -> None:
        player = next(iter(self.task.players.values()))
        averaged = player.averaged if self.config.sample_weights == "ema" else nullcontext
        with self.timer.phase("samples"), averaged(), player.gathered():
            for prompt, path in samples(self.step):
                self.log.video(self.step, f"samples/{path.stem}", path, prompt)

    def _draw_health(self) -> None:
        """The curves that the verdict is about, beside the log and in it."""
        if self.world.is_main:
            sentence = str(self.health.verdict())
            try:
                path = draw_health(self.logdir, sentence)
            except UserError as error:
                logger.warning("no figure: %s", error)
                return
            if path is not None:
                self.log.figure(self.step, "health", path, sentence)

    def _keep_emergency(self, folder: Path) -> str:
        """Write the state before a broken update; says where it is."""
        try:
            self.store.wait()
            self.store.write_now(folder / "state", self._state())
        except (UserError, SystemExit) as error:
            return f"The state before was lost: {error}"
        return f"The state before is in {folder}"

    # --- resuming -------------------------------------------------------------------------------

    def _state(self) -> dict[str, Any]:
        players = self.task.players
        run = {
            "step": self.step,
            "begun": self.begun,
            "means": self.means.state_dict(),
            "task": self.task.state_dict(),
            "broken": self.updates.broken,
            "positions": {name: batches.position for name, batches in self.batches.items()},
            "has_ema": [name for name, p in players.items() if p.ema is not None],
            "untrained": [name for name, p in players.items() if not p.optimiser.state],
            "videos": self.batch_split.videos,
            "ranks": self.world.size,
            "config": to_dict(self.config),
            "computed_in": self.computed_in,
            "health": self.health.state_dict(),
        }
        states = {name: player_state(player) for name, player in players.items()}
        return {"run": json.dumps(run), "players": states}

    def _resume(self) -> None:
        """Go on from the newest state that is whole; a damaged one is passed over and named."""
        states = self.store.states()
        reason = ""
        for path in states:
            try:
                run = self.store.read_run(path)
                self._check_same_run(run)
                self._load(path, run)
            except DamagedStateError as error:
                reason = reason or str(error)
                logger.warning("%s is damaged, the state before it is tried: %s", path, error)
                continue
            self.updates.take_up(run.get("broken", {}))
            self._went_on(path, run)
            return
        if states:
            raise UserError(
                f"none of the states in {self.store.folder} can be loaded ({reason}): move them "
                "away to begin again, or use another --logdir"
            )
        self.updates.take_up({})

    def _check_logdir(self) -> None:
        """UserError before any weight is loaded: another run is in it, or it cannot be written."""
        with agreed():
            if self.world.is_main:
                check_file(self.logdir / "config.yaml")
                check_file(self.logdir / METRICS_FILE)
                check_folder(self.store.folder)
                remove_leftovers(self.logdir)
                self.store.remove_unfinished()
        if self.saves or self.visualises:
            check_shared(self.logdir, self.world)
        for path in self.store.states():
            with suppress(DamagedStateError):
                self._check_same_run(self.store.read_run(path))
                return

    def _load(self, path: Path, run: Mapping[str, Any]) -> None:
        """Fill all players from a state; raises DamagedStateError, perhaps after some are."""
        if run["positions"].keys() != self.task.players.keys():
            raise DamagedStateError(f"it trains {', '.join(run['positions'])}")
        untrained = run.get("untrained", [])  # older states were saved after all had an update
        for name, player in self.task.players.items():
            averaged = name in run["has_ema"] and player.ema_weight is not None  # forced, perhaps
            make_room(player, ema=averaged, moments=name not in untrained)
        state = self._state()
        self.store.load(path, state)
        for name, player in self.task.players.items():
            restore_player(player, state["players"][name])
            self.batches[name].position = run["positions"][name]
        self.step, self.begun = run["step"], run.get("begun", [])
        self.means.load_state_dict(run.get("means", {}))
        self.task.load_state_dict(run.get("task", {}))
        self.health.load_state_dict(run["health"])

    def _went_on(self, path: Path, run: Mapping[str, Any]) -> None:
        with agreed():
            self.log.resume(self.step + 1)
        self._saved = self._here()
        logger.info("going on at step %d from %s", self.step, path)
        if run["ranks"] != self.world.size:
            logger.info(
                "%d ranks instead of %d, now %s: same videos per update and same draws, only "
                "rounding differs",
                self.world.size,
                run["ranks"],
                self.batch_split.describe(),
            )

    def _check_same_run(self, run: Mapping[str, Any]) -> None:
        """Raise UserError naming the keys in which this config is another one."""
        ours, theirs = to_dict(self.config), run["config"]
        # A cosine ends at max_steps, so another end is another learning rate in every step.
        free = FREE_KEYS - ({"max_steps"} if self.config.lr_schedule == "cosine" else set())
        differing = [
            f"{key} ({theirs.get(key)} -> {ours.get(key)})"
            for key in sorted(ours.keys() | theirs.keys())
            if key not in free and ours.get(key) != theirs.get(key)
        ]
        if self.batch_split.videos != run["videos"]:
            differing.append(
                f"videos per update ({run['videos']} -> {self.batch_split.videos}; "
                f"global_batch_size={run['videos']} keeps them on any number of ranks)"
            )
        theirs_in = run.get("computed_in", self.computed_in)  # older states do not say
        if self.computed_in != theirs_in:
            differing.append(f"what is computed in ({theirs_in} -> {self.computed_in})")
        if not differing:
            return
        what = f"{self.logdir} holds a run of another config: {', '.join(differing)}"
        if not self.config.resume.force:
            raise UserError(f"{what}; use another --logdir, or resume.force=true to go on with it")
        logger.warning("%s; going on, as resume.force says", what)

    # --- where it stands ------------------------------------------------------------------------

    def _is_done(self, steps: int = 0) -> bool:
        """Whether it is done after so many steps more."""
        return self.config.max_steps is not None and self.step + steps >= self.config.max_steps

    def _here(self) -> tuple[int, list[str]]:
        return self.step, list(self.begun)

    def _update_number(self, player: str | None = None) -> int:
        """A number of its own for every update of every player: the `update` of all draws.

        Without a player, the lowest number of this step.
        """
        names = list(self.task.players)
        return self.step * len(names) + (0 if player is None else names.index(player))

    def _place(self) -> Place:
        """Where this rank is, for the others."""
        phase = self.timer.now
        words = phase if phase == "loading" else f"{phase} (step {self.step + 1})"
        return Place(self.stopping.places + self.timer.entered, words)

    def _otherwise(self) -> str:
        """What is left of the run where it ends at once."""
        states = whole_states(self.store.folder) if self.saves else []
        if states:
            return f"the newest state so far is {states[-1]}"
        return "there is no state so far"

    def _left(self) -> str:
        """What a run that was stopped has left."""
        if not self.saves:
            return "nothing was saved (--no_save)"
        if self._saved is None:
            return "before the first update there is nothing to save"
        further = f" and the {' and '.join(self.begun)} of the next one" if self.begun else ""
        return f"saved at step {self.step}{further}"


def say_heldout(step: int, metrics: Mapping[str, Any]) -> None:
    """Say the held-out loss in one line, if it was measured."""
    if "heldout/loss" in metrics:
        logger.info("held-out loss %.4g (step %d)", metrics["heldout/loss"], step)


def peak_memory(device: torch.device) -> float:
    """Peak memory of this process in GiB: of the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
