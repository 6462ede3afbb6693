"""Checkpoints of a run: resumable states, written behind the training's back, and exports.

Layout of a run's folder:

    config.yaml                       the resolved configuration
    metrics.jsonl                     one line per step
    states/step_000100/               everything a resumed run needs (torch.distributed.checkpoint)
    checkpoint_model_000100/model.pt  weights as the publications store them, for inference.py

A state is written under a temporary name and takes its own when it is whole, so a kill at any
moment leaves the last good one.
"""

import fcntl
import logging
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.utils._pytree import tree_map_only

from trainer.ema import EMA
from trainer.networks import Player
from utils.errors import UserError

logger = logging.getLogger(__name__)

STATES = "states"
PARTIAL = ".partial"
LOCK = ".lock"


@contextmanager
def claimed(logdir: Path, *, is_main: bool) -> Iterator[None]:
    """Keep other runs out of a run's folder meanwhile; UserError if there is one in it.

    The main rank holds the lock. Where the file system has none, nobody is kept out.
    """
    if not is_main:
        yield
        return
    logdir.mkdir(parents=True, exist_ok=True)
    path = logdir / LOCK
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"another run is writing to {logdir}: wait for its end, or use another --logdir"
            ) from error
        except OSError:
            logger.warning("%s cannot be locked: start no other run in it", logdir)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            with suppress(OSError):
                logdir.rmdir()  # only if nothing was written


class CheckpointStore:
    """Saves and finds the states of one run."""

    def __init__(self, logdir: Path, *, keep: int, is_main: bool) -> None:
        self.folder = logdir / STATES
        self.keep = keep
        self.is_main = is_main
        # A group of its own: the writing thread must not interleave with the training's messages.
        self._group = dist.new_group(backend="gloo")
        self._writing: Future[Any] | None = None
        self._named: Future[None] | None = None  # on the main rank

    def _whole_states(self) -> list[Path]:
        """Oldest first."""
        whole = [path for path in self.folder.glob("step_*") if is_whole(path)]
        return sorted(whole, key=lambda path: int(path.name.removeprefix("step_")))

    def latest(self) -> Path | None:
        """The newest whole state."""
        states = self._whole_states()
        return states[-1] if states else None

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Start writing a state; returns when `state` may change again, before it is written."""
        self.wait()
        target = self.folder / f"step_{step:06d}"
        partial = target.with_suffix(PARTIAL)
        if self.is_main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        writing = dcp.async_save(snapshot(state), checkpoint_id=partial, process_group=self._group)
        assert isinstance(writing, Future)
        self._writing = writing
        if self.is_main:
            # `writing.result()` may return before its callback has run, hence a future of our own.
            named = self._named = Future()
            writing.add_done_callback(lambda done: self._finish(done, partial, target, named))

    def write_now(self, folder: Path, state: dict[str, Any]) -> None:
        """Write a state to a folder of its own and wait for it; it is not resumed from."""
        dcp.save(state, checkpoint_id=folder, process_group=self._group)

    def wait(self) -> None:
        """Until the state being written has its name; raises what went wrong while writing."""
        if self._writing is None:
            return
        try:
            self._writing.result()
        except CheckpointException as error:
            reasons = {str(failure[0]) for failure in error.failures.values()}
            raise UserError(f"the state could not be written: {', '.join(reasons)}") from error
        if self._named is not None:
            self._named.result()
        self._writing = self._named = None
        dist.barrier()

    def load(self, path: Path, state: dict[str, Any]) -> None:
        """Fill the tensors of `state` in place; plain values are replaced in the dict."""
        dcp.load(state, checkpoint_id=path, process_group=self._group)

    def _finish(
        self, done: "Future[Any]", partial: Path, target: Path, named: "Future[None]"
    ) -> None:
        if done.exception() is not None:
            named.set_result(None)  # `writing` tells what went wrong
            return
        try:
            shutil.rmtree(target, ignore_errors=True)
            partial.rename(target)
            states = self._whole_states()
            for old in states[: -self.keep]:
                shutil.rmtree(old, ignore_errors=True)
            named.set_result(None)
        except OSError as error:
            named.set_exception(error)


def is_whole(path: Path) -> bool:
    """Whether a state was written to its end."""
    return path.suffix != PARTIAL and (path / ".metadata").is_file()


def snapshot(state: dict[str, Any]) -> dict[str, Any]:
    """Copies of all tensors that are on the CPU; those on a GPU are copied by the writer."""
    return tree_map_only(
        Tensor, lambda t: t.detach().clone() if t.device.type == "cpu" else t, state
    )


def player_state(player: Player) -> dict[str, Any]:
    """Weights, optimiser, average and count of a player, as (sharded) tensors by name."""
    weights = get_model_state_dict(player.module)
    state: dict[str, Any] = {
        "weights": weights,
        "optimiser": whole_optimiser_state(player, weights),
        "updates": player.updates,
    }
    if player.ema is not None:
        state["ema"] = player.ema.shadow
    return state


def whole_optimiser_state(player: Player, weights: Mapping[str, Any]) -> dict[str, Any]:
    """The optimiser's state by names of weights, zero for those that never had a gradient.

    The optimiser holds none for these (of a VAE's layers in time, where it is trained on single
    frames), but an optimiser that is to be loaded wants one for each.
    """
    whole = cast(dict[str, Any], get_optimizer_state_dict(player.module, player.optimiser))
    states: dict[str, dict[str, Tensor]] = whole["state"]
    if not states:  # before the first step
        return whole
    like = next(iter(states.values()))
    names = [name for group in whole["param_groups"] for name in group["params"]]
    for name in [name for name in names if name not in states]:
        states[name] = {
            key: torch.zeros_like(value if value.ndim == 0 else weights[name])
            for key, value in like.items()
        }
    return whole


def restore_player(player: Player, state: Mapping[str, Any]) -> None:
    """Give a player what `player_state` held."""
    set_model_state_dict(player.module, state["weights"])
    set_optimizer_state_dict(player.module, player.optimiser, state["optimiser"])
    player.updates = state["updates"]
    if player.ema is not None:
        player.ema.load(state["ema"])


def start_ema(player: Player) -> None:
    """Make room for a stored average."""
    assert player.ema_weight is not None
    player.ema = EMA(player.trained, player.ema_weight)
