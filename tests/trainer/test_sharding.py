"""What sharded networks send over the wire, and in which precision their gradients are summed."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from model.self_rollout import RolloutDraw, self_rollout
from pipeline.sampling import BlockNoise
from pipeline.setup import Setup
from tests.tiny_pipeline import random_dit
from tests.tiny_training import (
    FRAMES,
    LATENT,
    SIZES,
    TrainingWorld,
    tensors,
    trained_state,
)
from trainer.networks import Player, make_player, stays_gathered
from trainer.sharding import World, full_tensor, local, make_mesh, open_world, shard_dit
from utils.config import Config
from utils.distributed import Ranks
from utils.noise import CounterNoise

CPU = torch.device("cpu")
GATHERS, REDUCTIONS = "_allgather_base_", "_reduce_scatter_base_"


class Collectives(TorchDispatchMode):
    """How often each collective is called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "c10d":
            self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def four() -> Iterator[World]:
    """One of four ranks that it does not have: collectives are called, and nothing comes."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield World(Ranks(0, 4, 0), CPU, 4)
    dist.destroy_process_group()


def student(config: Config, world: World) -> Player:
    """A sharded one that computes in bf16."""
    dit = random_dit(1, **SIZES).requires_grad_(True)
    dit.gradient_checkpointing = True
    shard_dit(dit, make_mesh("full", world, None), torch.bfloat16)
    return make_player(config, "generator", dit)


def rolled(config: Config, player: Player, *, replayed: bool, grad: bool = True) -> Tensor:
    """A rolling rollout of six blocks, of which half are scored."""
    drawn = RolloutDraw("rolling", 2 * FRAMES, (1,) * 2 * FRAMES)
    noise = BlockNoise(CounterNoise(0, LATENT, 1), [0], CPU)
    setup = Setup.of(config, sizes=player.module.config)  # type: ignore[arg-type]
    embeddings = torch.randn(1, 3, setup.sizes.text_dim, generator=torch.Generator().manual_seed(1))
    with torch.set_grad_enabled(grad):
        return self_rollout(
            setup,
            player.module,  # type: ignore[arg-type]
            player.module.encode_text(embeddings),  # type: ignore[operator]
            noise,
            drawn,
            scored_frames=FRAMES,
            grad=grad,
            replayed=replayed,
        )


@pytest.mark.filterwarnings("ignore:Set timeout")
@pytest.mark.parametrize("replayed", [False, True])
def test_a_student_is_gathered_once_for_a_rollout_and_its_gradient(
    replayed: bool, four: World, training_world: TrainingWorld, tmp_path: Path
) -> None:
    """Every pass gathered every block anew: 65 GB in a rollout of 23 passes at 1.3B."""
    gathers = {}
    for choice in ("always", "never"):
        config = training_world.config(tmp_path, reshard_after_forward=choice)
        player = student(config, four)
        with player.gathered(), Collectives() as counted:
            video = rolled(config, player, replayed=replayed)
            forward = counted.calls[GATHERS]
            video.sum().backward()
        assert all(isinstance(p, DTensor) for p in player.module.parameters())
        gathers[choice] = (forward, counted.calls[GATHERS])
    whole = SIZES["num_layers"] + 1  # its blocks, and the rest of it
    assert gathers["never"] == (whole, whole)
    assert gathers["always"][0] > 5 * whole
    assert gathers["always"][1] > gathers["always"][0] + whole


@pytest.mark.filterwarnings("ignore:Set timeout")
def test_what_ends_a_rollout_leaves_nothing_gathered(
    four: World, training_world: TrainingWorld, tmp_path: Path
) -> None:
    """As a signal does, between two passes; and later passes gather and drop as before."""
    config = training_world.config(tmp_path)
    player = student(config, four)

    def gathers() -> int:
        with Collectives() as counted:
            rolled(config, player, replayed=False, grad=False)
        return counted.calls[GATHERS]

    before = gathers()

    def interrupted() -> None:
        with player.gathered():
            gathers()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert all(isinstance(p, DTensor) for p in player.module.parameters())
    assert gathers() == before


def test_large_networks_are_not_gathered_by_themselves(
    training_world: TrainingWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sizes and the config decide, so all ranks do the same."""
    dit = random_dit(1, **SIZES)
    count = sum(p.numel() for p in dit.parameters())
    for mixed, bytes_each in ((True, 2), (None, 2), (False, 4)):
        config = training_world.config(tmp_path, mixed_precision=mixed)
        for room, expected in ((count * bytes_each, True), (count * bytes_each - 1, False)):
            monkeypatch.setattr("trainer.networks.GATHERED_BYTES", room)
            assert stays_gathered(config, dit) is expected


@pytest.mark.slow
def test_gathered_or_not_a_training_is_the_same(
    training_world: TrainingWorld, tmp_path: Path
) -> None:
    """In bf16, where the whole tensors are copies of the weights: stale ones would be seen."""
    changes = {"mixed_precision": True, "replayed_backward": True, "dfake_gen_update_ratio": 1}
    left, right = (
        trained_state(
            training_world.config(tmp_path, **changes, max_steps=2, reshard_after_forward=choice),
            tmp_path / choice,
        )
        for choice in ("always", "never")
    )
    for name, value in tensors(left, "/weights/").items():
        assert torch.equal(local(value), local(right[name])), name


def test_windows_of_one_graph_are_summed_in_bf16_and_replayed_ones_in_fp32(
    training_world: TrainingWorld, tmp_path: Path
) -> None:
    """FSDP2 reduces what autograd has summed, in the dtype of the gathered weights.

    docs/training.md says so. The text is encoded once, so its gradient is one in either way.
    """
    config = training_world.config(tmp_path)
    found: dict[bool, dict[str, Tensor]] = {}
    with open_world("cpu") as world:
        for replayed in (False, True):
            player = student(config, world)
            rolled(config, player, replayed=replayed).square().sum().backward()
            found[replayed] = {
                name: full_tensor(p.grad)
                for name, p in player.trained.items()
                if p.grad is not None
            }
    assert all(torch.equal(value, value.bfloat16()) for value in found[False].values())
    exact = {n: g for n, g in found[True].items() if not torch.equal(g, g.bfloat16())}
    assert all("text" in name or "cross_attn" in name for name in found[True].keys() - exact.keys())
    for name, value in exact.items():
        error = (found[False][name] - value).norm() / value.norm()
        assert 1e-4 < error < 6e-3, name
