"""The one training loop, for every objective."""

import json
import logging
import math
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from pipeline.setup import Setup
from trainer.checkpoint import (
    CheckpointStore,
    DamagedStateError,
    player_state,
    restore_player,
    start_ema,
)
from trainer.data import (
    Batches,
    first_prompts,
    open_heldout_data,
    open_training_data,
    split_batches,
)
from trainer.health import HealthMonitor
from trainer.heldout import HeldOut
from trainer.metrics import (
    METRICS_FILE,
    MetricsLog,
    Timer,
    TrainingProgress,
    WandbSettings,
    mean_over_ranks,
)
from trainer.networks import Player, compute_dtype
from trainer.samples import SampleVideos
from trainer.sharding import World, agreed, any_rank, full_tensor, highest
from trainer.tasks import find_task
from trainer.tasks.base import TaskInputs
from utils.config import FREE_KEYS, Config, check_training, save_config, to_dict
from utils.draws import Draws
from utils.errors import UserError
from utils.files import check_file, check_folder, remove_leftovers, write_json
from utils.processes import export_folder, videos_per_update

logger = logging.getLogger(__name__)


def recipe(config: Config) -> dict[str, Any]:
    """What decides the weights that a training ends with, as far as a config says it."""
    fixed = {key: value for key, value in to_dict(config).items() if key not in FREE_KEYS}
    videos = videos_per_update(config)
    return {**fixed, "max_steps": config.max_steps, "videos_per_update": videos}


# Phases that are no part of training a step. All but the first follow the step's line in the log,
# and count in the next one's seconds.
BETWEEN_STEPS = ("heldout", "samples", "save", "export")


class NonFiniteError(RuntimeError):
    """A loss or a gradient is not a finite number; the optimiser did not step."""


class Trainer:
    """Trains the players of a task; can be stopped at any step and resumed by the same command."""

    def __init__(
        self,
        config: Config,
        world: World,
        logdir: Path,
        *,
        wandb: WandbSettings | None = None,
        save: bool = True,
        visualise: bool = True,
    ) -> None:
        check_training(config)
        self.config = config
        self.world = world
        self.logdir = logdir
        self.saves = save
        self.batch_split = split_batches(config, world.size)
        logger.info(self.batch_split.describe())
        for note in self.batch_split.notes if world.is_main else ():
            logger.warning(note)
        self.timer = Timer(world.device)
        self.step = 0
        self.computed_in = str(compute_dtype(config, world.device) or torch.float32)
        self.store = CheckpointStore(logdir, keep=config.keep_checkpoints, is_main=world.is_main)
        self.log = MetricsLog(logdir, wandb=wandb, tensorboard=True, is_main=world.is_main)
        self._check_logdir()  # before any network is built
        setup = Setup.of(config)
        dataset = open_training_data(config, setup)
        task = find_task(config.trainer)
        heldout = open_heldout_data(config, setup, task.check_items)
        self.task = task(TaskInputs(config, setup, world, self.batch_split, self.timer, dataset))
        self.batches = {
            name: Batches(dataset, self.batch_split, world.ranks.rank, config.seed + number)
            for number, name in enumerate(self.task.players)
        }
        self.heldout = HeldOut(self.task, heldout) if heldout else None
        self.health = HealthMonitor()
        self.samples = None
        if visualise and config.sample_every:
            prompts = config.sample_prompts or list(first_prompts(dataset, 4))
            pipe = self.task.sampler()
            self.samples = (
                SampleVideos(pipe, logdir, prompts, config.sample_latent_frames, world.ranks)
                if pipe
                else None
            )
        self._asked_by = 0  # the signal that asks this rank to stop
        self.stopped_by = 0  # the signal that ended the training
        with self._closed_on_error():
            self._resume()
            with agreed():
                if world.is_main:
                    save_config(config, logdir / "config.yaml")

    def train(self) -> None:
        """Run until `max_steps`, or until SIGTERM or Ctrl-C asks to stop; saves the last state.

        On every way out the state being written gets its name and the logs are closed.
        """
        progress = TrainingProgress(self.config.max_steps, self.step, enabled=self.world.is_main)
        self.timer.read()  # what loading took belongs to no step
        with self._asked_to_stop(progress), self._closed_on_error():
            try:
                if self.step == 0:
                    self._begin()
                while not self._is_done() and not self.stopped_by:
                    self._do_step(progress)
                self.close()
            finally:
                progress.close()
        if self.stopped_by:
            said = f"saved at step {self.step}" if self.saves else "nothing was saved (--no_save)"
            logger.info("asked to stop: %s; the same command goes on there", said)

    def _do_step(self, progress: TrainingProgress) -> None:
        """A step and what is due after it."""
        metrics = self.train_step()
        progress.update(metrics, str(metrics["health"]).partition(":")[0])
        if self.samples and self.step % self.config.sample_every == 0:
            with self.timer.phase("samples"), agreed():
                for name, path in self.samples(self.step).items():
                    self.log.video(self.step, name, path)
        self.stopped_by = highest(self._asked_by, self.world.device)
        if self.step % self.config.log_iters == 0 or self._is_done() or self.stopped_by:
            self.save()

    def close(self) -> None:
        """Wait until the last state has its name, and finish the logs; may be called again."""
        try:
            self.store.wait()
        finally:
            self.log.close()

    @contextmanager
    def _closed_on_error(self) -> Iterator[None]:
        """Close all that is open after an error, which stays the one that is told."""
        try:
            yield
        except BaseException:
            try:
                self.close()
            except (Exception, SystemExit) as error:
                logger.warning("%s", error)
            raise

    def train_step(self) -> dict[str, Any]:
        """One step: an update of each player that is due. Returns what is logged."""
        operations: float = 0
        measured: dict[str, Any] = {}
        due = self.task.due(self.step)
        for name in due:
            draws = Draws(self.config.seed, self._update_number(name), ())
            measured |= self._update(self.task.players[name], draws)
            share = self.task.flops(name, draws)
            operations += math.nan if share is None else share * self.batch_split.videos
        self.step += 1
        active = self.step >= self.config.ema_start_step
        for name, player in self.task.players.items():
            player.update_ema(active=active, moved=name in due)
        if self.heldout and (self.step % self.config.heldout_every == 0 or self._is_done()):
            measured |= self._measure(self.heldout)
        return self._record(measured, operations)

    def save(self) -> None:
        """Write the resumable state (behind the training's back) and the published weights."""
        if not self.saves:
            return
        with self.timer.phase("save"):
            self.store.save(self.step, self._state())
        self._export()

    def _export(self) -> None:
        with self.timer.phase("export"), agreed():
            self.task.export(self._export_folder())

    def _export_folder(self) -> Path:
        return export_folder(self.logdir, self.step)

    def _begin(self) -> None:
        """Drop the log of a run that never got to a state; measure before the first update."""
        with agreed():
            self.log.resume(0)
        if self.heldout:
            metrics = mean_over_ranks(self._measure(self.heldout))
            say_heldout(0, metrics)
            with agreed():
                self.log.write(0, metrics)

    def _measure(self, heldout: HeldOut) -> dict[str, Tensor]:
        """The held-out numbers of the weights as they are; means over ranks make them whole."""
        with self.timer.phase("heldout", whole=True):
            return heldout.measure()

    def _update(self, player: Player, draws: Draws) -> dict[str, Tensor | float]:
        """One optimiser step of a player over all its micro-batches."""
        sums: dict[str, Tensor] = {}
        batches, parts = self.batches[player.name], self.batch_split.accumulation
        for micro in range(parts):
            with self.timer.phase("data"):
                batch, own_draws = batches.micro_batch(micro, draws)
            result = self.task.loss(player.name, batch, own_draws)
            with self.timer.phase("backward"):
                (result.loss / parts).backward()
            metrics = {f"{player.name}/loss": result.loss.detach(), **result.metrics}
            for name, value in self.task.collect(metrics).items():
                sums[name] = sums.get(name, 0) + value.float() / parts
        with self.timer.phase("optimiser"):
            norm = full_tensor(clip_grad_norm_(player.trained.values(), player.max_grad_norm))
            self._require_finite(player, sums[f"{player.name}/loss"], norm, draws)
            rate = player.learning_rate(player.updates)
            player.apply()
        if not self.task.keeps_batch(player.name, self.step):
            batches.advance()
        return {**sums, f"{player.name}/grad_norm": norm, f"{player.name}/lr": rate}

    def _record(self, measured: dict[str, Any], operations: float) -> dict[str, Any]:
        """Reduce over ranks, judge, write."""
        metrics: dict[str, Any] = mean_over_ranks(measured)
        metrics |= self.task.derive(metrics)
        for name, player in self.task.players.items():
            metrics[f"{name}/updates"] = player.updates
        seconds = self.timer.read()
        metrics["seconds"] = seconds
        trained = seconds["step"] - sum(seconds.get(name, 0.0) for name in BETWEEN_STEPS)
        metrics["tflops_per_second"] = operations / self.world.size / trained / 1e12
        metrics["memory_gib"] = peak_memory(self.world.device)
        say_heldout(self.step, metrics)
        verdict = self.health.update(metrics)
        metrics["health"] = str(verdict)
        with agreed():
            self.log.write(self.step, metrics)
        return metrics

    def _require_finite(self, player: Player, loss: Tensor, norm: Tensor, draws: Draws) -> None:
        """Stop all ranks before the optimiser steps on a loss or gradient that is not finite."""
        broken = not (math.isfinite(loss.item()) and math.isfinite(norm.item()))
        if not any_rank(broken, self.world.device):
            return
        names = [
            name
            for name, parameter in player.trained.items()
            if parameter.grad is not None and not full_tensor(parameter.grad).isfinite().all()
        ]
        diagnosis = {
            "step": self.step,
            "player": player.name,
            "update": draws.update,
            "loss": str(loss.item()),
            "grad_norm": str(norm.item()),
            "gradients_not_finite": names,
        }
        raise NonFiniteError(
            f"step {self.step}: {player.name} loss {loss.item()}, gradient norm {norm.item()}, "
            f"{len(names)} gradients not finite; the optimiser did not step. "
            f"{self._keep_emergency(diagnosis)}; go back to an earlier state and lower lr or "
            "max_grad_norm"
        )

    def _keep_emergency(self, diagnosis: Mapping[str, Any]) -> str:
        """Write the state before a broken update and what was found; says where they are."""
        if not self.saves:
            return "Nothing was saved (--no_save)"
        folder = self.logdir / f"emergency_{self.step:06d}"
        try:
            self.store.wait()
            self.store.write_now(folder / "state", self._state())
            if self.world.is_main:
                write_json(folder / "diagnosis.json", diagnosis)
        except (UserError, SystemExit) as error:
            return f"The state before was lost: {error}"
        return f"The state before is in {folder}"

    # --- resuming -------------------------------------------------------------------------------

    def _state(self) -> dict[str, Any]:
        run = {
            "step": self.step,
            "positions": {name: batches.position for name, batches in self.batches.items()},
            "has_ema": [name for name, p in self.task.players.items() if p.ema is not None],
            "videos": self.batch_split.videos,
            "ranks": self.world.size,
            "config": to_dict(self.config),
            "computed_in": self.computed_in,
            "health": self.health.state_dict(),
        }
        players = {name: player_state(player) for name, player in self.task.players.items()}
        return {"run": json.dumps(run), "players": players}

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
            self._went_on(path, run)
            return
        if states:
            raise UserError(
                f"none of the states in {self.store.folder} can be loaded ({reason}): move them "
                "away to begin again, or use another --logdir"
            )

    def _check_logdir(self) -> None:
        """UserError before any weight is loaded: another run is in it, or it cannot be written."""
        with agreed():
            if self.world.is_main:
                check_file(self.logdir / "config.yaml")
                check_file(self.logdir / METRICS_FILE)
                check_folder(self.store.folder)
                remove_leftovers(self.logdir)
        for path in self.store.states():
            with suppress(DamagedStateError):
                self._check_same_run(self.store.read_run(path))
                return

    def _load(self, path: Path, run: Mapping[str, Any]) -> None:
        """Fill all players from a state; raises DamagedStateError, perhaps after some are."""
        if run["positions"].keys() != self.task.players.keys():
            raise DamagedStateError(f"it trains {', '.join(run['positions'])}")
        for name, player in self.task.players.items():
            player.ema = None
            if name in run["has_ema"]:
                start_ema(player)
        state = self._state()
        self.store.load(path, state)
        for name, player in self.task.players.items():
            restore_player(player, state["players"][name])
            self.batches[name].position = run["positions"][name]
        self.step = run["step"]
        self.health.load_state_dict(run["health"])

    def _went_on(self, path: Path, run: Mapping[str, Any]) -> None:
        with agreed():
            self.log.resume(self.step + 1)
        logger.info("going on at step %d from %s", self.step, path)
        missing = self.world.is_main and not self._export_folder().is_dir()
        if self.saves and any_rank(missing, self.world.device):
            self._export()  # killed after the state was whole, before these weights were
        if run["ranks"] != self.world.size:
            logger.info(
                "%d ranks instead of %d: same videos per update and same draws, only rounding "
                "differs",
                self.world.size,
                run["ranks"],
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
            differing.append(f"videos per update ({run['videos']} -> {self.batch_split.videos})")
        theirs_in = run.get("computed_in", self.computed_in)  # older states do not say
        if self.computed_in != theirs_in:
            differing.append(f"what is computed in ({theirs_in} -> {self.computed_in})")
        if not differing:
            return
        what = f"{self.logdir} holds a run of another config: {', '.join(differing)}"
        if not self.config.resume.force:
            raise UserError(f"{what}; use another --logdir, or resume.force=true to go on with it")
        logger.warning("%s; going on, as resume.force says", what)

    # --- stopping -------------------------------------------------------------------------------

    def _is_done(self) -> bool:
        return self.config.max_steps is not None and self.step >= self.config.max_steps

    def _update_number(self, player: str) -> int:
        """A number of its own for every update of every player: the `update` of all draws."""
        return self.step * len(self.task.players) + list(self.task.players).index(player)

    @contextmanager
    def _asked_to_stop(self, progress: TrainingProgress) -> Iterator[None]:
        """SIGTERM and Ctrl-C end the loop after the current step; a second Ctrl-C ends at once."""

        def remember(number: int, frame: FrameType | None) -> None:
            self._asked_by = number
            if number == signal.SIGINT:
                signal.signal(number, signal.SIG_DFL)
                progress.say("stopping after this step; Ctrl-C once more stops at once")

        before = {
            number: signal.signal(number, remember) for number in (signal.SIGTERM, signal.SIGINT)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


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
