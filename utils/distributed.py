"""The one door to the environment that torchrun sets; without torchrun it is one rank of one.

`Ranks` share out videos; a `Team` of ranks makes each of them together.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from utils.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.distributed import ProcessGroup

T = TypeVar("T")
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
ANSWER_SECONDS = 300
"""So long a rank waits for the others of its team within their common work."""
IDLE = timedelta(days=365)  # so long for the leader's next word: nobody may be watching


def run_name() -> str:
    """The same for all ranks of one run, another for each run that is under way at a time."""
    names = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")
    told = "|".join(os.environ.get(name, "") for name in names)
    return hashlib.sha256(told.encode()).hexdigest()[:8]


@dataclass(frozen=True)
class Ranks:
    """This process among those that torchrun started."""

    rank: int
    world: int
    local_rank: int

    @classmethod
    def from_environment(cls) -> "Ranks":
        """Read RANK, WORLD_SIZE and LOCAL_RANK; UserError if only a part of them is there."""
        given = {name: os.environ[name] for name in NAMES if name in os.environ}
        if "RANK" not in given and given.get("WORLD_SIZE", "1") == "1":
            return cls(0, 1, 0)
        values = {"RANK": "", "WORLD_SIZE": "", "LOCAL_RANK": "0", **given}
        wrong = [name for name in NAMES if not values[name].isdecimal()]
        if wrong:
            raise UserError(
                f"the environment has {', '.join(given)}, but no number as {', '.join(wrong)}: "
                "start several ranks with torchrun, or unset what is there"
            )
        rank, world, local_rank = (int(values[name]) for name in NAMES)
        if rank >= world:
            raise UserError(f"RANK={rank} is not below WORLD_SIZE={world}: start with torchrun")
        return cls(rank, world, local_rank)

    @property
    def is_main(self) -> bool:
        """Whether this rank speaks and writes what is written once."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """This rank's items: every `world`-th, so that none is dropped and none doubled."""
        return list(items[self.rank :: self.world])

    def device_name(self, name: str) -> str:
        """`cuda` (or `auto`, if there are GPUs) becomes this rank's own GPU."""
        import torch

        if name in ("auto", "cuda") and torch.cuda.is_available():
            return f"cuda:{self.local_rank % torch.cuda.device_count()}"
        return name

    def teams(self, size: int) -> "Ranks":
        """This rank's team among all teams of `size` ranks; UserError if they do not come out even.

        A team shares videos out with the others as ranks do.
        """
        if self.world % size:
            raise UserError(
                f"sequence_parallel={size} needs {size} ranks for each video, and there are "
                f"{self.world}: start with torchrun --nproc_per_node={size} (or a multiple of it)"
            )
        return Ranks(self.rank // size, self.world // size, self.local_rank)

    def ends_last(self) -> bool:
        """Whether all other ranks have called this: true for exactly one of those of torchrun.

        Without torchrun nobody can be asked: then it is true for every rank.
        """
        if self.world == 1 or "TORCHELASTIC_RUN_ID" not in os.environ:
            return True
        from torch.distributed import rendezvous

        store, _, _ = next(rendezvous("env://", self.rank, self.world))
        return bool(store.add("ended", 1) == self.world)


ALONE = Ranks(rank=0, world=1, local_rank=0)


class Team:
    """The ranks that make one stream: see `wan.parallel.Exchange`, and words of the first to all.

    Collectives of one team never overlap. They and `hear` raise what the backend raises where a
    rank has ended or does not answer; `answered` puts that into words.
    """

    def __init__(self, rank: int, size: int, group: "ProcessGroup", words: "ProcessGroup") -> None:
        """`rank`: within the team. `words`: a group on the CPU, which waits for ever."""
        self.rank = rank
        self.size = size
        self._group: ProcessGroup | None = group
        self._words: ProcessGroup | None = words

    def close(self) -> None:
        """Let go of the connections, so that whoever waits for this rank learns that it ends."""
        self._group = self._words = None

    @property
    def leads(self) -> bool:
        """Whether this rank says what is done."""
        return self.rank == 0

    def all_to_all(self, parts: "Tensor") -> "Tensor":
        """Part i of `[size, ...]` goes to rank i; what came from each rank, in the same shape."""
        import torch
        import torch.distributed as dist

        got = torch.empty_like(parts)
        dist.all_to_all_single(got, parts, group=self._group)
        return got

    def all_gather(self, own: "Tensor") -> "Tensor":
        """Every rank's tensor `[...]`, in order: `[size, ...]`."""
        import torch
        import torch.distributed as dist

        got = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(got, own, group=self._group)
        return torch.stack(got)

    def tell(self, word: Any) -> None:
        """Of the leader: plain values and tensors on the CPU, for the others to `hear`."""
        import torch.distributed as dist

        dist.broadcast_object_list([word], group=self._words, group_src=0)

    def hear(self) -> Any:
        """Of the others: what the leader tells next; there is no limit to waiting for it."""
        import torch.distributed as dist

        heard: list[Any] = [None]
        dist.broadcast_object_list(heard, group=self._words, group_src=0)
        return heard[0]

    @contextmanager
    def answered(self) -> Iterator[None]:
        """UserError where another rank of the team does not take part within."""
        import torch.distributed as dist

        try:
            yield
        except RuntimeError as error:
            if isinstance(error, dist.DistError) or "gloo" in str(error):
                raise UserError(
                    "another rank of this stream has ended, or did not answer for "
                    f"{ANSWER_SECONDS} s: read what it said, and start again"
                ) from error
            raise


def require_address() -> None:
    """UserError where a rank is not told where the others meet."""
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(f"RANK is set but not {' and '.join(missing)}: start with torchrun")


def backend_between(device: "torch.device") -> str:
    """What ranks on such devices talk through; a GPU becomes this process's own."""
    import torch

    if device.type != "cuda":
        return "gloo"
    torch.cuda.set_device(device)
    return "cpu:gloo,cuda:nccl"


@contextmanager
def open_team(ranks: Ranks, size: int, device: "torch.device") -> Iterator[Team | None]:
    """This rank's team of `size`; None where every rank makes videos of its own.

    gloo between CPUs, NCCL between GPUs. UserError if the ranks do not come out even.
    """
    ranks.teams(size)
    if size == 1:
        yield None
        return
    import torch.distributed as dist

    require_address()
    backend = backend_between(device)
    limit = timedelta(seconds=ANSWER_SECONDS)
    dist.init_process_group(backend, timeout=limit, rank=ranks.rank, world_size=ranks.world)
    team = None
    try:
        teams = [list(range(first, first + size)) for first in range(0, ranks.world, size)]
        group, _ = dist.new_subgroups_by_enumeration(teams, timeout=limit)
        words, _ = dist.new_subgroups_by_enumeration(teams, timeout=IDLE, backend="gloo")
        team = Team(ranks.rank % size, size, group, words)
        del group, words
        yield team
    finally:
        if team is not None:
            team.close()
        dist.destroy_process_group()
