"""One optimiser step of a player, and what becomes of one that is not finite."""

import json
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from trainer.data import Batches
from trainer.networks import Player
from trainer.sharding import any_rank, full_tensor
from trainer.tasks.base import Task
from utils.draws import ATTEMPT, Draws
from utils.files import write_json

logger = logging.getLogger(__name__)

EMERGENCY = "emergency_"
DIAGNOSIS = "diagnosis.json"


class NonFiniteError(RuntimeError):
    """A loss or a gradient is not a finite number; the optimiser did not step."""


@dataclass(frozen=True)
class Diagnosis:
    """What was found in place of an update. `attempt`: so many tries of it were broken before."""

    step: int
    player: str
    update: int
    attempt: int
    loss: str
    grad_norm: str
    gradients_not_finite: list[str]

    def folder(self, logdir: Path) -> Path:
        """Where it is kept."""
        again = f"_{self.attempt}" if self.attempt else ""
        return logdir / f"{EMERGENCY}{self.step:06d}_{self.player}{again}"

    def __str__(self) -> str:
        return (
            f"step {self.step}: {self.player} loss {self.loss}, gradient norm {self.grad_norm}, "
            f"{len(self.gradients_not_finite)} gradients not finite; the optimiser did not step"
        )


class Updates:
    """Makes updates; one that is broken is drawn anew, with other noise and the next videos.

    `broken` counts the broken tries of each update by its number. It belongs into states, and a
    start also takes up what was found since: so the same end is not run into again, and what is
    drawn in a try is a function of (seed, update, try) alone.
    """

    def __init__(
        self,
        task: Task,
        batches: Mapping[str, Batches],
        logdir: Path,
        keep_state: Callable[[Path], str] | None,
    ) -> None:
        """`keep_state`: writes the state before the update, and says where; None: nothing is."""
        self.task = task
        self.batches = batches
        self.logdir = logdir
        self.keep_state = keep_state
        self.broken: dict[int, int] = {}

    def skipped(self, before: int) -> int:
        """How many tries were broken in the updates before this number."""
        return sum(count for update, count in self.broken.items() if update < before)

    def update(self, player: Player, step: int, number: int) -> dict[str, Tensor | float]:
        """One optimiser step over all micro-batches; what was measured.

        Raises:
            NonFiniteError: it is not finite and the config stops there, or has had enough of it.
        """
        failed = 0
        while True:
            attempt = self.broken.get(number, 0)
            measured, found = self._try(player, step, number, attempt)
            if found is None:
                keeps = self.task.keeps_batch(player.name, step)
                self.batches[player.name].advance(attempt - 1 if keeps else attempt)
                return measured
            failed += 1
            self._pass_over(found, failed)
            player.optimiser.zero_grad(set_to_none=True)
            self.broken[number] = attempt + 1

    def take_up(self, found: Mapping[str, int]) -> None:
        """Count what a state says, and what lies in the run's folder, as all ranks are told."""
        self.broken = {int(update): count for update, count in found.items()}
        told = [diagnoses(self.logdir) if self.task.world.is_main else {}]
        dist.broadcast_object_list(told, src=0)
        for update, (count, folder) in told[0].items():
            if count > self.broken.get(update, 0):
                self.broken[update] = count
                logger.info("what %s tells of is drawn anew", folder)

    def _try(
        self, player: Player, step: int, number: int, attempt: int
    ) -> tuple[dict[str, Tensor | float], Diagnosis | None]:
        """What was measured, and the diagnosis if the optimiser did not step."""
        task = self.task
        with player.gathered():
            sums, measured = self._gradients(player, step, number, attempt)
        task.look()
        with task.timer.phase("optimiser"):
            norm = full_tensor(clip_grad_norm_(player.trained.values(), player.max_grad_norm))
            loss = sums[f"{player.name}/loss"]
            broken = not (math.isfinite(loss.item()) and math.isfinite(norm.item()))
            if any_rank(broken, task.world.device):
                names = not_finite(player)
                said = (f"{loss.item()}", f"{norm.item()}")
                return {}, Diagnosis(step, player.name, number, attempt, *said, names)
            rate = player.learning_rate(player.updates)
            player.apply()
        for metrics in measured:
            task.collect(metrics)
        return {**sums, f"{player.name}/grad_norm": norm, f"{player.name}/lr": rate}, None

    def _gradients(
        self, player: Player, step: int, number: int, attempt: int
    ) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
        """All micro-batches, to and fro: means of their numbers, and what each has measured."""
        task, batches, draws = self.task, self.batches[player.name], self._draws(number, attempt)
        sums: dict[str, Tensor] = {}
        measured: list[dict[str, Tensor]] = []
        for micro in range(task.batch_split.accumulation):
            task.look()
            with task.timer.phase("data"):
                batch, own, weight = batches.micro_batch(micro, draws, attempt)
            self._read_ahead(player, step, number, attempt, micro + 1)
            result = task.loss(player.name, batch, own)
            task.look()
            with task.timer.phase("backward"):
                (result.loss * weight).backward()
            metrics = {f"{player.name}/loss": result.loss.detach(), **result.metrics}
            for name, value in metrics.items():
                if value.ndim == 0:
                    sums[name] = sums.get(name, 0) + value.float() * weight
            if weight:
                measured.append(metrics)
        return sums, measured

    def _draws(self, number: int, attempt: int) -> Draws:
        return Draws(self.task.config.seed, number + attempt * ATTEMPT, ())

    def _read_ahead(self, player: Player, step: int, number: int, attempt: int, micro: int) -> None:
        """Have a micro-batch read that is needed next, or the first one of the next update.

        If all goes well: one that is drawn anew is on another batch, which is read when it is due.
        """
        task, batches = self.task, self.batches[player.name]
        if micro < task.batch_split.accumulation:
            batches.read_ahead(micro, self._draws(number, attempt), attempt)
            return
        following = step + 1
        while player.name not in task.due(following):
            following += 1
        if task.config.max_steps is not None and following >= task.config.max_steps:
            return
        done = attempt if task.keeps_batch(player.name, step) else 1 + attempt
        number += (following - step) * len(task.players)
        attempt = self.broken.get(number, 0)
        batches.read_ahead(0, self._draws(number, attempt), done + attempt)

    def _pass_over(self, found: Diagnosis, failed: int) -> None:
        """Write down what was found; NonFiniteError unless the update may be drawn anew."""
        config = self.task.config
        total = self.skipped(found.update + 1) + 1
        if config.on_nonfinite == "stop":
            why = "go back to an earlier state and lower lr or max_grad_norm"
        elif failed > config.max_skips_in_a_row:
            why = f"max_skips_in_a_row is {config.max_skips_in_a_row}"
        elif total > config.max_skips:
            why = f"max_skips is {config.max_skips}"
        else:
            logger.warning("%s; it is drawn anew (%d of %d)", found, total, config.max_skips)
            self._write(found)
            return
        if self.keep_state is None:
            raise NonFiniteError(f"{found}. Nothing was saved (--no_save); {why}")
        kept = self.keep_state(found.folder(self.logdir))
        self._write(found)
        raise NonFiniteError(
            f"{found}. {kept}; {why}; the same command draws this update anew and goes on"
        )

    def _write(self, found: Diagnosis) -> None:
        if self.keep_state is not None and self.task.world.is_main:
            write_json(found.folder(self.logdir) / DIAGNOSIS, asdict(found))


def not_finite(player: Player) -> list[str]:
    """Names of the parameters whose gradient is not finite; all ranks have to call it."""
    return [
        name
        for name, parameter in player.trained.items()
        if parameter.grad is not None and not full_tensor(parameter.grad).isfinite().all()
    ]


def diagnoses(logdir: Path) -> dict[int, tuple[int, Path]]:
    """Broken tries of each update that a run's folder tells of, and the newest that tells it."""
    found: dict[int, tuple[int, Path]] = {}
    for path in sorted(logdir.glob(f"{EMERGENCY}*/{DIAGNOSIS}")):
        try:
            told: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            update, count = int(told["update"]), int(told.get("attempt", 0)) + 1
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            logger.warning("%s is not as it was written: it is left out", path)
            continue
        if count > found.get(update, (0, path))[0]:
            found[update] = count, path.parent
    return found
