"""Several trainings one after the other in the processes of one torchrun.

    torchrun … run_jobs.py JOBS.json

Each job: `config`, `logdir`, `visualise`, `poison` (a player whose gradient becomes NaN on the last
rank alone), `sleep` (seconds before every pass of the second step), `lost` (in the second step the
last rank is `dead` or `stuck`). Writes `JOBS.done` with how each ended.
"""

import faulthandler
import json
import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from trainer.sharding import World, open_world
from trainer.trainer import Trainer
from trainer.updates import NonFiniteError
from trainer.watch import LostRanksError, end_alone
from utils.config import load_config


def run(job: dict[str, Any], world: World) -> str:
    trainer = Trainer(
        load_config(job["config"]),
        world,
        Path(job["logdir"]),
        visualise=job.get("visualise", False),
    )
    if "poison" in job:
        poison(trainer, world, job["poison"])
    if "sleep" in job:
        slow_down(trainer, job["sleep"])
    if "lost" in job and world.ranks.rank == world.size - 1:
        lose(trainer, job["lost"])
    try:
        trainer.train()
    except LostRanksError as error:
        end_alone(f"stopped: {error}")
    except NonFiniteError as error:
        return str(error)
    return f"step {trainer.step}"


def poison(trainer: Trainer, world: World, player: str) -> None:
    """One gradient of the last rank is NaN in the second step."""
    loss = trainer.task.loss

    def broken(phase: str, *arguments: Any) -> Any:
        result = loss(phase, *arguments)
        if (phase, trainer.step, world.ranks.rank) != (player, 1, world.size - 1):
            return result
        return type(result)(result.loss * float("nan"), result.metrics)

    trainer.task.loss = broken  # type: ignore[method-assign]


def slow_down(trainer: Trainer, seconds: float) -> None:
    """Passes of the second step take their time, and say that they have begun."""
    look = trainer.task.look

    def slow() -> None:
        if trainer.step == 1:
            (trainer.logdir / "slow").touch()
            time.sleep(seconds)
        look()

    trainer.task.look = slow


def lose(trainer: Trainer, how: str) -> None:
    """This rank is dead, or does not answer, in the middle of the second step."""
    loss = trainer.task.loss

    def lost(*arguments: Any) -> Any:
        if trainer.step == 1:
            trainer.store.wait()  # so that there is a state, however fast the other rank is
        if trainer.step == 1 and how == "dead":
            os.kill(os.getpid(), signal.SIGKILL)
        while trainer.step == 1:
            time.sleep(1)
        return loss(*arguments)

    trainer.task.loss = lost  # type: ignore[method-assign]


if __name__ == "__main__":
    faulthandler.dump_traceback_later(100, exit=True)  # ranks that wait for each other say where
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    jobs = Path(sys.argv[1])
    with open_world("cpu") as everybody:
        ends = [run(job, everybody) for job in json.loads(jobs.read_text(encoding="utf-8"))]
        if everybody.is_main:
            jobs.with_suffix(".done").write_text(json.dumps(ends), encoding="utf-8")
