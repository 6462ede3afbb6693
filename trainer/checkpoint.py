"""Checkpoints of a run: resumable states, written behind the training's back, and exports.

Layout of a run's folder:

    config.yaml                       the resolved configuration
    metrics.jsonl                     one line per step
    states/step_000100/               everything a resumed run needs (torch.distributed.checkpoint)
    checkpoint_model_000100/model.pt  weights as the publications store them, for inference.py

A state is written under a temporary name and takes its own when it is whole, so a kill at any
moment leaves the last good one.
"""

import io
import json
import logging
import pickle
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.utils._pytree import tree_map_only

from trainer.ema import EMA
from trainer.networks import Player
from trainer.sharding import World
from utils.errors import BAD_INPUT, UserError
from utils.files import remove_leftovers, replace_folder, told

logger = logging.getLogger(__name__)

STATES = "states"
PARTIAL = ".partial"
METADATA = ".metadata"
RUN_KEYS = {"step", "positions", "has_ema", "videos", "ranks", "config", "health"}
_NAME = re.compile(r"step_([0-9]{6,})")


class DamagedStateError(Exception):
    """A state that cannot be loaded; the message says why."""


class CheckpointStore:
    """Saves and finds the states of one run, which has its folder to itself.

    What goes wrong on one rank, also in the background, is raised on all.
    """

    def __init__(self, logdir: Path, world: World, *, keep: int) -> None:
        self.folder = logdir / STATES
        self.keep = keep
        self.is_main = world.is_main
        # A group of its own: the writing thread must not interleave with the training's messages.
        self._group = world.new_group()
        self._writing: Future[Any] | None = None
        self._partial = self.folder  # of the state being written

    def remove_unfinished(self) -> None:
        """Remove what killed runs left of states; on the main rank, before anything is written."""
        for part in self.folder.glob(f"*{PARTIAL}"):
            shutil.rmtree(part, ignore_errors=True)

    def states(self) -> list[Path]:
        """The whole states, newest first, as the main rank sees them."""
        found = [list(reversed(whole_states(self.folder))) if self.is_main else []]
        dist.broadcast_object_list(found, src=0, group=self._group)
        return found[0]

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Start writing a state; returns when `state` may change again, before it is written."""
        self.wait()
        writer = StateWriter(self.folder / f"step_{step:06d}", keep=self.keep)
        self._partial = writer.partial
        writing = dcp.async_save(
            snapshot(state),
            storage_writer=writer,
            process_group=self._group,
            async_stager=DefaultStager(StagingOptions(False, False, False, False)),
        )
        assert isinstance(writing, Future)
        self._writing = writing

    def write_now(self, folder: Path, state: dict[str, Any]) -> None:
        """Write a state to a folder of its own and wait for it; it is not resumed from."""
        writer = StateWriter(folder)
        self._partial = writer.partial
        with self._told():
            dcp.save(state, storage_writer=writer, process_group=self._group)

    def wait(self) -> None:
        """Until the state being written has its name.

        Raises:
            UserError: it could not be written (SystemExit on all but the main rank).
        """
        if self._writing is None:
            return
        writing, self._writing = self._writing, None
        with self._told():
            writing.result()

    def read_run(self, path: Path) -> dict[str, Any]:
        """What a state says of its run; DamagedStateError if it does not."""
        stored: dict[str, Any] = {"run": ""}
        self.load(path, stored)
        try:
            run = json.loads(stored["run"])
        except (TypeError, ValueError):
            run = None
        if not isinstance(run, dict) or not run.keys() >= RUN_KEYS:
            raise DamagedStateError("it holds no run of this program")
        return run

    def load(self, path: Path, state: dict[str, Any]) -> None:
        """Fill the tensors of `state` in place; plain values are replaced in the dict.

        Raises:
            DamagedStateError: the state is not whole, or not of these networks.
        """
        metadata = self._metadata(path)
        try:
            dcp.load(
                state,
                storage_reader=StateReader(path, metadata),
                planner=PlainPlanner(),
                process_group=self._group,
            )
        except CheckpointException as error:
            raise DamagedStateError(_reason(error)) from error

    def _metadata(self, path: Path) -> dcp_metadata.Metadata:
        """The same on all ranks, or DamagedStateError on all."""
        found: dcp_metadata.Metadata | None = None
        reasons: list[str | None] = [None] * dist.get_world_size()
        reason = None
        try:
            found = read_metadata(path)
        except DamagedStateError as error:
            reason = str(error)
        dist.all_gather_object(reasons, reason, group=self._group)
        if any(reasons):
            raise DamagedStateError(next(filter(None, reasons)))
        assert found is not None
        return found

    @contextmanager
    def _told(self) -> Iterator[None]:
        """A failure to write is one sentence of the main rank; nothing half-written stays."""
        try:
            yield
        except CheckpointException as error:
            if not self.is_main:
                raise SystemExit(BAD_INPUT) from error
            shutil.rmtree(self._partial, ignore_errors=True)
            raise UserError(f"the state could not be written: {_reason(error)}") from error


class StateWriter(dcp.FileSystemWriter):
    """Writes a state beside its place; `finish`, on one rank, gives it its name.

    What fails in these methods reaches all ranks, as far as it can be pickled: as a sentence.
    """

    def __init__(self, target: Path, *, keep: int | None = None) -> None:
        """`keep`: so many states up to this one stay, older ones are removed then."""
        self.target, self.keep = target, keep
        self.partial = target.with_name(target.name + PARTIAL)
        super().__init__(self.partial)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Begin with an empty folder."""
        if is_coordinator:
            shutil.rmtree(self.partial, ignore_errors=True)
        super().set_up_storage_writer(is_coordinator, *args, **kwargs)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Make the folder."""
        with _picklable(), told(self.target):
            return super().prepare_local_plan(plan)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Any:
        """Write this rank's tensors."""
        with _picklable(), told(self.target):
            return super().write_data(plan, planner)

    def finish(self, metadata: dcp_metadata.Metadata, results: list[list[WriteResult]]) -> None:
        """Write the metadata, give the state its name, remove the oldest states."""
        with _picklable(), told(self.target):
            super().finish(metadata=metadata, results=results)
            replace_folder(self.partial, self.target)
            if self.keep is not None:
                self._remove_old(self.keep)

    def _remove_old(self, keep: int) -> None:
        states = whole_states(self.target.parent)  # a later one is damaged, or this would be later
        for old in states[: states.index(self.target) + 1][:-keep]:
            shutil.rmtree(old, ignore_errors=True)
        remove_leftovers(self.target.parent)


@contextmanager
def _picklable() -> Iterator[None]:
    """What cannot be sent to the other ranks would leave them waiting; a sentence can."""
    try:
        yield
    except Exception as error:
        raise UserError(str(error) or type(error).__name__) from error


class StateReader(dcp.FileSystemReader):
    """Reads a state whose metadata are read already; every checksum is checked."""

    def __init__(self, path: Path, metadata: dcp_metadata.Metadata) -> None:
        super().__init__(path)
        self._metadata = metadata

    def read_metadata(self) -> dcp_metadata.Metadata:
        """What was given."""
        return self._metadata

    def _slice_file(self, file: IO[bytes], sinfo: Any) -> IO[bytes]:
        file.seek(sinfo.offset)
        part = io.BytesIO(file.read(sinfo.length))
        with zipfile.ZipFile(part) as archive:  # torch.load checks no checksum
            if broken := archive.testzip():
                raise DamagedStateError(f"{broken} in {sinfo.relative_path} is not as written")
        part.seek(0)
        return part


class PlainPlanner(DefaultLoadPlanner):
    """Loads plain values without unpickling anything else."""

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        """Refuse what is no tensor, number, text or container of them."""
        plain = torch.load(value, weights_only=True)
        value.seek(0)
        del plain  # nothing in it runs code
        super().load_bytes(read_item, value)


_GLOBALS = {
    *(("torch.distributed.checkpoint.metadata", name) for name in dcp_metadata.__all__),
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("collections", "OrderedDict"),
    *(("pathlib", name) for name in ("PosixPath", "WindowsPath")),
    *(("pathlib._local", name) for name in ("PosixPath", "WindowsPath")),
}


class _MetadataUnpickler(pickle.Unpickler):
    """Makes only what metadata consist of: a pickle can name any function to call."""

    def find_class(self, module: str, name: str) -> Any:
        """A class or a dtype that is on the list."""
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in _GLOBALS:
            return super().find_class(module, name)
        raise DamagedStateError(f"its metadata ask for {module}.{name}, which no state holds")


def read_metadata(path: Path) -> dcp_metadata.Metadata:
    """What a state holds and where, without running code that a stranger put there.

    Raises:
        DamagedStateError: the file is missing, damaged, or holds more than metadata.
    """
    try:
        with (path / METADATA).open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
    except DamagedStateError:
        raise
    except Exception as error:  # whatever a damaged pickle leads to
        raise DamagedStateError(f"its metadata cannot be read ({error})") from error
    if not isinstance(metadata, dcp_metadata.Metadata):
        raise DamagedStateError("its metadata are none")
    metadata.storage_meta = metadata.storage_meta or dcp_metadata.StorageMeta()
    return metadata


def whole_states(folder: Path) -> list[Path]:
    """The states in a folder that were written to their end, oldest first.

    Only names of ours count: a copy that a person named otherwise is left alone.
    """
    found = {}
    for path in folder.iterdir() if folder.is_dir() else ():
        name = _NAME.fullmatch(path.name)
        if name and path.name == f"step_{int(name[1]):06d}" and is_whole(path):
            found[int(name[1])] = path
    return [found[step] for step in sorted(found)]


def is_whole(path: Path) -> bool:
    """Whether a state was written to its end."""
    try:
        return path.suffix != PARTIAL and (path / METADATA).is_file()
    except OSError:  # a folder of someone else
        return False


def _reason(error: CheckpointException) -> str:
    """What the first rank that failed says, in one line."""
    _, (first, _) = min(error.failures.items())
    if isinstance(first, KeyboardInterrupt):
        raise first
    text = " ".join(str(first).split()) or type(first).__name__
    return text[:300]


def snapshot(state: dict[str, Any]) -> dict[str, Any]:
    """Copies of all tensors that are on the CPU; those on a GPU are copied by the writer."""
    return tree_map_only(
        Tensor, lambda t: t.detach().clone() if t.device.type == "cpu" else t, state
    )


def player_state(player: Player) -> dict[str, Any]:
    """Weights, optimiser, average and count of a player, as (sharded) tensors by name.

    Before its first update it has no optimiser's state.
    """
    weights = get_model_state_dict(player.module)
    state: dict[str, Any] = {"weights": weights, "updates": player.updates}
    if player.optimiser.state:  # to ask one that has made no step for its state is a step
        state["optimiser"] = whole_optimiser_state(player, weights)
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
    if "optimiser" in state:
        groups = player.optimiser.param_groups
        ours = [{key: group[key] for key in group.keys() - {"params"}} for group in groups]
        set_optimizer_state_dict(player.module, player.optimiser, state["optimiser"])
        for group, values in zip(player.optimiser.param_groups, ours, strict=True):
            group.update(values)  # a forced resume goes on with betas and decay of its own config
    player.updates = state["updates"]
    if player.ema is not None:
        player.ema.load(state["ema"])


def make_room(player: Player, *, ema: bool, moments: bool) -> None:
    """Make a player hold what a stored one held, so that it can be filled."""
    player.ema = None
    if ema:
        assert player.ema_weight is not None
        player.ema = EMA(player.trained, player.ema_weight)
    if moments:
        get_optimizer_state_dict(player.module, player.optimiser)  # makes what is not there yet
    else:
        player.optimiser.state.clear()
