"""Which rank the others wait for, and what counts as a lost one."""

import pytest
import torch.distributed as dist

from trainer.sharding import make_mesh, open_world
from trainer.watch import is_of_a_collective, missing


@pytest.mark.parametrize(
    ("second", "who"),
    [
        ({0: "9 30 save (step 4)", 1: "7 28 rollout (step 4)"}, "rank 1, silent since rollout"),
        ({0: "9 30 save (step 4)", 1: "9 28 rollout (step 4)"}, "rank 1, which is in rollout"),
        ({0: "9 28 rollout (step 4)", 1: "9 30 save (step 4)"}, ""),
        ({0: "9 28 rollout (step 4)"}, ""),
    ],
)
def test_who_is_missing(second: dict[int, str], who: str) -> None:
    """A rank whose thread is silent is dead; else the one that has passed the fewest places."""
    first = {0: "7 30 save (step 4)", 1: "7 28 rollout (step 4)"}
    said = missing(first, second, own=0)
    assert said == (f"{who} (step 4)" if who else "")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (dist.DistBackendError("NCCL"), True),
        (RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer"), True),
        (RuntimeError("shape mismatch"), False),
        (ValueError("gloo"), False),
    ],
)
def test_which_errors_are_of_lost_ranks(error: Exception, expected: bool) -> None:
    assert is_of_a_collective(error) is expected


def test_networks_that_are_spread_alike_share_a_mesh() -> None:
    """Each network had groups, and so communicators, of its own."""
    with open_world("cpu") as world:
        meshes = [make_mesh(strategy, world, None) for strategy in ("full", "hybrid", "none")]
        assert len({id(mesh) for mesh in meshes}) == 1
