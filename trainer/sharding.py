"""Process groups, meshes and FSDP2: how networks are spread over ranks."""

import contextlib
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from utils.config import Config
from utils.devices import choose_device
from utils.distributed import Ranks
from utils.errors import BAD_INPUT, UserError
from wan.dit import WanDiT
from wan.weights import check_finite, check_keys


@dataclass(frozen=True)
class World:
    """This process among all: one rank of one without torchrun, over the same code."""

    ranks: Ranks
    device: torch.device
    local_world: int

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.ranks.world

    @property
    def is_main(self) -> bool:
        """Whether this rank writes what is written once."""
        return self.ranks.is_main


@contextlib.contextmanager
def open_world(device_name: str) -> Iterator[World]:
    """Join (or found) the process group; gloo on CPUs, NCCL between GPUs."""
    ranks = Ranks.from_environment()
    device = choose_device(ranks.device_name(device_name))
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise UserError(f"RANK is set but not {' and '.join(missing)}: start with torchrun")
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", str(ranks.world)))
    try:
        yield World(ranks, device, local)
    finally:
        dist.destroy_process_group()


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
    shards = shards_of(strategy, world.size, world.local_world, hybrid)
    return init_device_mesh(
        world.device.type, (world.size // shards, shards), mesh_dim_names=("copies", "shards")
    )


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


def load_full_state(
    module: nn.Module, state: Mapping[str, Tensor], source: Path, device: torch.device
) -> None:
    """Give a (sharded, possibly meta) module its weights from a full state dict.

    Every rank cuts its own shard out of the memory-mapped tensors, one at a time: nothing is
    communicated, and no rank ever holds more than one full tensor. Raises UserError on a mismatch,
    and for values that are not finite.
    """
    own = module.state_dict()
    check_keys(own, state, source)
    loaded = {}
    for key, ours in own.items():
        full = state[key].to(device, ours.dtype, copy=True)  # never memory-mapped
        check_finite({key: full}, source, state)
        loaded[key] = shard_like(ours, full)
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

    The rank that failed raises its own error and says it; the others leave with its exit code and
    say nothing. A rank that raises before a collective of the block still leaves the others in it.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    codes: list[int | None] = [None] * dist.get_world_size()
    code = None if failure is None else BAD_INPUT if isinstance(failure, UserError) else 1
    dist.all_gather_object(codes, code)
    if failure is not None:
        raise failure
    if any(codes):
        raise SystemExit(max(filter(None, codes)))


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is set on any rank."""
    return bool(highest(int(flag), device))


def highest(number: int, device: torch.device) -> int:
    """The highest number that any rank gives."""
    vote = torch.tensor(number, device=device)
    dist.all_reduce(vote, dist.ReduceOp.MAX)
    return int(vote.item())
