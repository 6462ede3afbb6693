"""The one door to the environment that torchrun sets; without torchrun it is one rank of one."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from utils.errors import UserError

T = TypeVar("T")
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


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
