"""Process groups, meshes and FSDP2: how networks are spread over ranks."""

import contextlib
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from utils.config import Config
from utils.devices import choose_device
from utils.distributed import Ranks, backend_between, require_address
from utils.errors import BAD_INPUT, UserError
from utils.files import make_folder, part_path, told
from wan.dit import WanDiT
from wan.weights import check_finite, check_keys

MARGIN = 60.0  # seconds: a library's own limit, after which it tells less than `trainer.watch`


@dataclass
class World:
    """This process among all: one rank of one without torchrun, over the same code.

    `limit`: seconds that a rank waits for the others. `local_world`: so many ranks, one after the
    other, are on one node.
    """

    ranks: Ranks
    device: torch.device
    local_world: int
    limit: float = 3600.0
    meshes: dict[int, DeviceMesh] = field(default_factory=dict)
    groups: list[dist.ProcessGroup] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.ranks.world

    @property
    def is_main(self) -> bool:
        """Whether this rank writes what is written once."""
        return self.ranks.is_main

    def mesh(self, shards: int) -> DeviceMesh:
        """The (copies, shards) mesh; one for all networks that are spread alike."""
        if shards not in self.meshes:
            mesh = init_device_mesh(
                self.device.type, (self.size // shards, shards), mesh_dim_names=("copies", "shards")
            )
            self.meshes[shards] = mesh
            self.groups += mesh.get_all_groups()
            self.set_limit(self.limit)
        return self.meshes[shards]

    def node(self) -> dist.ProcessGroup | None:
        """The ranks of this node, in order; None where a rank has one of its own."""
        return self.mesh(self.local_world).get_group("shards") if self.local_world > 1 else None

    def new_group(self) -> dist.ProcessGroup:
        """A group of all ranks between their CPUs, apart from all others' messages."""
        group = dist.new_group(backend="gloo", timeout=_with_margin(self.limit))
        assert isinstance(group, dist.ProcessGroup)
        self.groups.append(group)
        return group

    def set_limit(self, seconds: float) -> None:
        """From now on a rank waits so long for the others."""
        self.limit = seconds
        for group in (None, *self.groups):
            _set_pg_timeout(_with_margin(seconds), group)


def _with_margin(seconds: float) -> timedelta:
    return timedelta(seconds=seconds + MARGIN)


@contextlib.contextmanager
def open_world(device_name: str, *, limit: float = 3600.0) -> Iterator[World]:
    """Join (or found) the process group; gloo on CPUs, NCCL between GPUs.

    `limit`: seconds that a rank waits for the others.
    """
    ranks = Ranks.from_environment()
    device = choose_device(ranks.device_name(device_name))
    backend = backend_between(device)
    if "RANK" in os.environ:
        require_address()
        dist.init_process_group(backend, timeout=_with_margin(limit))
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield World(ranks, device, _ranks_of_a_node(ranks), limit)
    finally:
        dist.destroy_process_group()


def _ranks_of_a_node(ranks: Ranks) -> int:
    """As torchrun says it, but the same everywhere: where nodes differ, a part of each."""
    sizes = [ranks.world] * ranks.world
    dist.all_gather_object(sizes, int(os.environ.get("LOCAL_WORLD_SIZE", str(ranks.world))))
    return math.gcd(ranks.world, *sizes)


def shards_of(strategy: str, world: int, local_world: int, hybrid: int | None) -> int:
    """Over how many ranks one copy of a network is spread."""
    shards = {
        "full": world,
        "hybrid": hybrid or local_world,
        "hybrid_full": hybrid or local_world,
        "none": 1,
    }[strategy]
    if world % shards:
        raise UserError(
            f"{world} ranks cannot be split into groups of {shards}; set hybrid_shard_size "
            "to a divisor, or sharding_strategy=full"
        )
    return shards


def make_mesh(strategy: str, world: World, hybrid: int | None) -> DeviceMesh:
    """The (copies, shards) mesh of a strategy: shards are spread, copies are kept equal."""
    return world.mesh(shards_of(strategy, world.size, world.local_world, hybrid))


def strategy_of(config: Config, network: str) -> str:
    """Sharding strategy of one network."""
    chosen = {
        "generator": config.sharding.generator,
        "real_score": config.sharding.real_score,
        "fake_score": config.sharding.fake_score,
        "target": config.sharding.generator,
        "text_encoder": config.sharding.text_encoder,
    }[network]
    return chosen or config.sharding_strategy


def shard_module(
    module: nn.Module,
    blocks: list[nn.Module],
    mesh: DeviceMesh,
    compute_dtype: torch.dtype | None,
) -> None:
    """FSDP2 over transformer blocks, then the rest; compute in `compute_dtype`, reduce in fp32."""
    # Inputs are not cast: timesteps would lose their digits in bf16. The networks cast themselves.
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(module, mesh=mesh, mp_policy=policy)
    # FSDP2 hooks the gradients of a module's outputs and warns of views, which would break if
    # they were changed in place; nobody changes an output here.
    warnings.filterwarnings(
        "ignore", r".*returned a view tensor", UserWarning, r"torch\.distributed\.fsdp"
    )


def shard_dit(dit: WanDiT, mesh: DeviceMesh, compute_dtype: torch.dtype | None) -> None:
    """Shard a transformer, whose `encode_text` is called outside of forward."""
    blocks = list(dit.blocks)
    shard_module(dit, blocks, mesh, compute_dtype)
    for module in (dit, *blocks):
        register_fsdp_forward_method(module, "encode_text")


def reshard(module: nn.Module) -> None:
    """Drop the whole tensors that forward passes left: the next one gathers the shards anew."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


@contextlib.contextmanager
def keep_gathered(module: nn.Module) -> Iterator[None]:
    """Inside, what a pass gathers stays whole for the passes that follow; it is dropped at the end.

    Of each block as of the rest, which stays whole from one forward pass to the next anyway.
    """
    sharded = [part for part in module.modules() if isinstance(part, FSDPModule)]

    def drop(after: bool) -> None:
        for part in sharded:
            part.set_reshard_after_backward(after, recurse=False)
            if part is not module:
                part.set_reshard_after_forward(after, recurse=False)

    drop(False)
    try:
        yield
    finally:
        drop(True)
        reshard(module)


def load_full_state(
    module: nn.Module,
    weights: Mapping[str, Tensor],
    source: Path,
    world: World,
    names: Mapping[str, str] | None = None,
) -> None:
    """Give a (sharded, possibly meta) module its weights, which are memory-mapped.

    The ranks of a node share out the reading: each tensor is read by one of them, which hands it to
    the others, and each cuts out its own shard. So a rank never holds more than one full tensor
    that it has read, on the host, and the one that is handed round, on its device. All ranks have
    to call it. `names`: as in `assign_weights`.

    Raises:
        UserError: keys or shapes differ, or values are not finite (SystemExit on the other ranks).
    """
    own = module.state_dict()
    names = {name: name for name in own} if names is None else names
    expected = {key: own[name] for name, key in names.items()}
    with agreed():
        check_keys(expected, weights, source)
    loaded = {
        key: shard_like(expected[key], full)
        for key, full in _handed_round(expected, weights, source, world)
    }
    module.load_state_dict({name: loaded[key] for name, key in names.items()}, assign=True)


def _handed_round(
    expected: Mapping[str, Tensor], weights: Mapping[str, Tensor], source: Path, world: World
) -> Iterator[tuple[str, Tensor]]:
    """Names and whole tensors, on the device and in the types of `expected`, on all ranks alike.

    Raises UserError at the end, when no rank waits for another one: values are not finite.
    """
    failure: UserError | None = None
    # The largest first, so that tensors of like size are read at the same time.
    order = sorted(expected, key=lambda key: expected[key].numel(), reverse=True)
    node, place = world.node(), world.ranks.rank % world.local_world
    for first in range(0, len(order), world.local_world):
        turn = order[first : first + world.local_world]
        read = _read(weights, turn[place], expected) if place < len(turn) else None
        for reader, key in enumerate(turn):
            ours = expected[key]
            if reader == place and read is not None:
                full, read = read.to(world.device), None
                try:
                    check_finite({key: full}, source, weights)
                except UserError as error:
                    failure = failure or error
            else:
                full = torch.empty(ours.shape, dtype=ours.dtype, device=world.device)
            if node is not None:
                dist.broadcast(full, group=node, group_src=reader)
            yield key, full
    with agreed():
        if failure is not None:
            raise failure


def _read(weights: Mapping[str, Tensor], key: str, expected: Mapping[str, Tensor]) -> Tensor:
    """One tensor in the type that it will have, in memory of its own."""
    full = torch.empty(expected[key].shape, dtype=expected[key].dtype)
    return full.copy_(weights[key])


def load_drawn(
    module: nn.Module,
    drawn: Iterable[tuple[str, Tensor]],
    device: torch.device,
    names: Mapping[str, str],
) -> None:
    """Give a (sharded, possibly meta) module its first weights, which each rank draws alike.

    One at a time, of which it keeps its shard; see `load_full_state`.
    """
    own = module.state_dict()
    named = {key: name for name, key in names.items()}
    loaded = {}
    for key, full in drawn:
        ours = own[named[key]]
        loaded[named[key]] = shard_like(ours, full.to(device, ours.dtype))
    module.load_state_dict(loaded, assign=True)


@torch.no_grad()
def overwrite(
    module: nn.Module, stored: Mapping[str, Tensor], weights: Mapping[str, Tensor]
) -> None:
    """Give a frozen module other values of some of its parameters, each rank its own shards.

    `stored`: its parameters as they were before its first forward pass (see `Player.trained`).
    """
    if isinstance(module, FSDPModule):
        module.reshard()  # else it goes on with the whole ones of its last forward pass
    ours = [local(stored[name]) for name in weights]
    torch._foreach_copy_(ours, [local(tensor) for tensor in weights.values()])


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_like(ours: Tensor, full: Tensor) -> Tensor:
    """`full` in the placement of `ours`."""
    if not isinstance(ours, DTensor):
        return full
    placed = distribute_tensor(full, ours.device_mesh, ours.placements, src_data_rank=None)
    return placed.clone()  # the shard alone, so that the full tensor is freed


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole of a tensor, on every rank (a collective if it is sharded)."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextlib.contextmanager
def agreed() -> Iterator[None]:
    """All ranks leave the block, or none: what one raises in it ends the others, too.

    The (first) rank that failed raises its own error and says it; the others leave with its exit
    code and say nothing. A rank that raises before a collective of the block still leaves the
    others in it.
    """
    if dist.get_world_size() == 1:
        yield
        return
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    codes: list[int | None] = [None] * dist.get_world_size()
    code = None if failure is None else BAD_INPUT if isinstance(failure, UserError) else 1
    dist.all_gather_object(codes, code)
    failed = [rank for rank, code in enumerate(codes) if code]
    if failure is not None and failed[0] == dist.get_rank():
        raise failure
    if failed:
        raise SystemExit(codes[failed[0]]) from failure


def check_shared(folder: Path, world: World) -> None:
    """UserError unless every rank sees what the main rank writes to a folder."""
    if world.size == 1:
        return
    name = [""]
    with agreed():
        if world.is_main:
            with told(folder):
                make_folder(folder)
                mark = part_path(folder / "shared")
                mark.touch()
            name = [mark.name]
    dist.broadcast_object_list(name, src=0)
    with agreed():
        if not (folder / name[0]).is_file():
            raise UserError(
                f"rank {world.ranks.rank} does not see what the main rank writes to {folder}: "
                "give a --logdir on a disk that all nodes share"
            )
    if world.is_main:
        mark.unlink(missing_ok=True)


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is set on any rank."""
    vote = torch.tensor(int(flag), device=device)
    dist.all_reduce(vote, dist.ReduceOp.MAX)
    return bool(vote.item())
