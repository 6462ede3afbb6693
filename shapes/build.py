"""Results that are made once: what a target is, and those that commands of the project make.

The chain and the ablations are lists of targets. Whatever is stopped goes on with the same command.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.config import VIDEO_KEYS, Config, load_config
from utils.errors import UserError
from utils.processes import default_processes, final_export, run_command, training_command

if TYPE_CHECKING:
    import argparse


class Target(ABC):
    """A result, what it depends on, and how it is made."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What it depends on beside the targets before it; UserError if an override is wrong."""

    @abstractmethod
    def make(self) -> str:
        """Make (on) what is missing, and tell what was reached; UserError if it failed."""

    def folders(self) -> Sequence[Path]:
        """What has to go before it can be made anew; other files are replaced."""
        return ()


class CommandTarget(Target):
    """A target that one of the project's own commands makes, and whose files tell if it is done."""

    @property
    @abstractmethod
    def name(self) -> str:
        """For people."""

    @property
    @abstractmethod
    def command(self) -> tuple[str, ...]:
        """The words of the command."""

    @abstractmethod
    def is_done(self) -> bool:
        """Whether the result is there."""

    def run(self) -> None:
        """Run the command to its end; UserError if it failed."""
        run_command(self.name, self.command)


@dataclass(frozen=True)
class Training(CommandTarget):
    """Weights that `train.py` makes, which can be stopped and goes on.

    `inputs` are overrides that say where its inputs are, `changes` those that decide the weights.
    `install` puts the exported folder where it is wanted. `judge` tells what the run in a folder
    reached, or why that is not good enough (UserError). `result`: the file that is there when it is
    done, if nothing else is written to it.
    """

    key: str
    config_path: Path
    logdir: Path
    processes: int
    install: Callable[[Path], None]
    inputs: Sequence[str] = ()
    changes: Sequence[str] = ()
    judge: Callable[[Path], str] = str
    result: Path | None = None

    @property
    def name(self) -> str:
        """See `CommandTarget`."""
        return f"training of {self.key}"

    @cached_property
    def config(self) -> Config:
        """All that it is trained with."""
        return load_config(self.config_path, [*self.inputs, *self.changes])

    @property
    def command(self) -> tuple[str, ...]:
        """See `CommandTarget`."""
        overrides = [*self.inputs, *self.changes]
        return training_command(
            self.config, self.config_path, self.logdir, overrides, self.processes
        )

    @property
    def exported(self) -> Path | None:
        """The folder of weights that it ended with, if it did."""
        return final_export(self.logdir, self.config.max_steps or 0)

    def identity(self) -> dict[str, Any]:
        """See `Target`."""
        return decides_weights(load_config(self.config_path, self.changes))

    def is_done(self) -> bool:
        """See `CommandTarget`."""
        return self.result is not None and self.result.is_file()

    def make(self) -> str:
        """See `Target`."""
        if self.exported is None:
            self.run()
        exported = self.exported
        if exported is None:
            raise UserError(f"the {self.name} was stopped early; the same command goes on")
        reached = self.judge(self.logdir)
        self.install(exported)
        return reached

    def folders(self) -> Sequence[Path]:
        """See `Target`."""
        return (self.logdir,)


def publish_to(target: Path, exported: Path) -> None:
    """An installer: a student's weights as a published checkpoint."""
    from wan.checkpoints import publish_student

    publish_student(exported / "model.pt", target)


def decides_weights(config: Config) -> dict[str, Any]:
    """What decides the weights of a training, by key."""
    from trainer.tasks import find_task
    from trainer.trainer import recipe

    # a task without roles makes no video and trains no transformer
    unrelated = () if find_task(config.trainer).roles else VIDEO_KEYS - {"seed"}
    return {key: value for key, value in recipe(config).items() if key not in unrelated}


def add_processes(parser: argparse.ArgumentParser) -> None:
    """The flag `--processes`, for `processes_of`."""
    parser.add_argument(
        "--processes", type=int, help="that share a part (default: one per GPU, else two at most)"
    )


def processes_of(args: argparse.Namespace) -> int:
    """How many processes share each part; UserError for none."""
    if args.processes is None:
        return default_processes()
    if args.processes < 1:
        raise UserError("--processes must be above 0")
    return args.processes
