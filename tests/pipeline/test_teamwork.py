"""Several ranks make the video of one: whatever is asked of it, to the last bit."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline import load_pipeline
from pipeline.session import Session
from pipeline.setup import Setup
from pipeline.teamwork import Teamwork
from pipeline.text_to_video import VideoPipeline
from server.models import RandomText
from tests.conftest import TinyWorld
from tests.teams import team_of
from tests.tiny_pipeline import random_dit
from utils.config import load_config
from utils.distributed import Ranks
from utils.errors import UserError
from wan.dit import WanDiT
from wan.vae import WanVAE

SIZE = ["height=64", "width=96", "device=cpu"]  # 24 tokens per latent frame
GUIDED = ["denoising_step_list=null", "sampling_steps=4", "sampler=unipc"]
VARIANTS = {
    "rolling merged": ["merge_clean_pass=true"],
    "rolling": ["merge_clean_pass=false"],
    "self forcing": ["method=self_forcing"],
    "self forcing unmerged": ["method=self_forcing", "merge_clean_pass=false"],
    "infinite forcing": ["method=infinite_forcing"],
    "infinite forcing unmerged": ["method=infinite_forcing", "merge_clean_pass=false"],
    "context noise": ["context_noise=100"],
    "averaged sink, causal window": ["sink_ema=0.9", "window_attention=block_causal"],
    "guided": GUIDED,
    "bidirectional": ["schedule=full", *GUIDED],
}
FAST = (
    "averaged sink, causal window",
    "rolling merged",
    "self forcing unmerged",
    "infinite forcing",
    "guided",
)
SLOW = ("rolling", "bidirectional")


def network() -> WanDiT:
    """At these sizes matrix products of a part of the rows have the same bits on a CPU."""
    return random_dit(seed=1, num_heads=12)


@pytest.fixture(scope="module")
def vae() -> WanVAE:
    return WanVAE.random(4)


@pytest.fixture(scope="module")
def two() -> Iterator[Teamwork]:
    with team_of(2, network) as teamwork:
        yield teamwork
    assert teamwork.ends() == [0]  # type: ignore[attr-defined]


def pipeline(
    vae: WanVAE, teamwork: Teamwork | None, *overrides: str, dit: WanDiT | None = None
) -> VideoPipeline:
    size = 1 if teamwork is None else teamwork.share.size
    config = load_config(
        "configs/rolling_forcing_dmd.yaml", [*SIZE, *overrides, f"sequence_parallel={size}"]
    )
    dit = dit or network()
    setup = Setup.of(config, sizes=dit.config)
    text = RandomText(setup, torch.device("cpu"))
    return VideoPipeline(setup, dit, vae=vae, text=text, teamwork=teamwork)


def pair(vae: WanVAE, team: Teamwork, *overrides: str) -> tuple[VideoPipeline, VideoPipeline]:
    return pipeline(vae, None, *overrides), pipeline(vae, team, *overrides)


def same_latents(vae: WanVAE, team: Teamwork, overrides: list[str]) -> bool:
    """Of two videos in a batch, long enough that frames leave the cache."""
    made = []
    for pipe in pair(vae, team, *overrides):
        text = pipe.encode_prompts(["a", "b"])
        made.append(pipe.generate_latents(text, 30, seed=3))
    return torch.equal(*made)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *FAST,
        *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW),
        *(pytest.param(n, marks=pytest.mark.long) for n in VARIANTS if n not in FAST + SLOW),
    ],
)
def test_two_ranks_make_the_latents_of_one(vae: WanVAE, two: Teamwork, name: str) -> None:
    assert same_latents(vae, two, VARIANTS[name])


def test_fewer_rows_may_round_otherwise(vae: WanVAE, two: Teamwork) -> None:
    """Three tokens of each frame on a rank: CPU kernels take their tails in another order."""
    made = []
    for pipe in pair(vae, two, "height=32", "width=48"):
        made.append(pipe.generate_latents(pipe.encode_prompts(["a"]), 9, seed=3))
    torch.testing.assert_close(*made, atol=1e-5, rtol=0)


def steps(session: Session, count: int) -> list[Tensor]:
    blocks = [session.step() for _ in range(count)]
    return [block.frames for block in blocks if block is not None]


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def directed(pipe: VideoPipeline) -> Session:
    """A session with a change of every kind."""
    session = Session.start(pipe, "a", seed=1)
    steps(session, 2)
    for prompt, policy, blend, seed in (
        ("b", "keep", 0, None),
        ("c", "recache", 0, None),
        ("d", "renoise", 0, 5),
        ("e", "recache", 2, None),
        ("f", "cut", 0, None),
        (None, "keep", 0, 9),
        ("g", "keep", 2, None),
    ):
        session.set_prompt(prompt, policy, blend, seed=seed)  # type: ignore[arg-type]
        steps(session, 1)
    return session


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param([], id="distilled"),
        pytest.param(GUIDED, id="guided", marks=pytest.mark.slow),
    ],
)
def test_a_session_is_directed_saved_and_branched_alike(
    vae: WanVAE, two: Teamwork, overrides: list[str], tmp_path: Path
) -> None:
    """Saved in a blend by two ranks it goes on on one, and the reverse."""
    pipes = pair(vae, two, *overrides)
    alone, together = (directed(pipe) for pipe in pipes)
    assert alone._hash == together._hash
    with pytest.raises(UserError, match="policy must be"):  # which the others never hear of
        together.set_prompt("h", "none")  # type: ignore[arg-type]
    copies = [s.save(tmp_path / n) for s, n in ((alone, "one"), (together, "two"))]
    branches = [s.branch(s.branch_points[4], "x", 7, policy="recache") for s in (alone, together)]
    assert same(steps(branches[0], 2), steps(branches[1], 2))
    expected = steps(alone, 2)
    assert same(expected, steps(together, 2))
    for pipe, copy in zip(pipes, reversed(copies), strict=True):
        loaded = Session.load(pipe, copy)
        assert same(expected, steps(loaded, 2))
        loaded.close()


def test_a_rank_holds_its_heads_alone_and_lets_go_of_what_is_closed(
    vae: WanVAE, two: Teamwork
) -> None:
    one, both = (Session.start(pipe, "a", seed=1) for pipe in pair(vae, two))
    whole, own = one._stream.rollout.cache, both._stream.rollout.cache
    assert own.num_bytes - own._latents.nbytes == (whole.num_bytes - whole._latents.nbytes) // 2
    two.load()
    before = len(two._dropped)
    both.close()
    assert len(two._dropped) == before + 1
    two.load()  # any word takes it along
    assert not two._dropped


def test_an_image_is_continued_alike_without_its_sink(vae: WanVAE, two: Teamwork) -> None:
    """The settings of a variant and the blocks of a prefix reach the other ranks."""
    image = torch.randint(256, (64, 96, 3), dtype=torch.uint8)
    made = []
    for pipe in pair(vae, two):
        other = pipe.variant(["model_kwargs.sink_size=0"])
        with other.stream("a", seed=1, num_latent_frames=12, image=image) as stream:
            made.append(torch.cat(list(stream)))
    assert torch.equal(*made)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["sequence_parallel=3"], "does not divide the 6 tokens .* and the 2 heads .*: use one of"),
        (["sequence_parallel=2", "width=64"], None),
        (["sequence_parallel=0"], "sequence_parallel must be at least 1"),
        (["sequence_parallel=2"], "under torchrun --nproc_per_node=2; set it to 1 here"),
    ],
)
def test_what_does_not_divide_is_refused(
    tiny_world: TinyWorld, overrides: list[str], words: Any
) -> None:
    if words is None:
        config = load_config(tiny_world.config, overrides)
        assert Setup.of(config).machine.sequence_parallel == 2
        return
    with pytest.raises(UserError, match=words):
        load_pipeline(tiny_world.config, overrides=overrides, device="cpu")


def test_teams_share_out_videos_as_ranks_do() -> None:
    assert [Ranks(rank, 6, rank).teams(3) for rank in (0, 2, 3)] == [
        Ranks(0, 2, 0),
        Ranks(0, 2, 2),
        Ranks(1, 2, 3),
    ]
    assert Ranks(1, 3, 1).teams(1) == Ranks(1, 3, 1)
    with pytest.raises(UserError, match="needs 4 ranks for each video, and there are 6"):
        Ranks(0, 6, 0).teams(4)
