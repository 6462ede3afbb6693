"""Teams of other sizes, compiled ones, and teams of which one rank fails: nobody waits for ever."""

from unittest.mock import Mock

import pytest
import torch

from pipeline.setup import Setup
from pipeline.teamwork import Teamwork
from pipeline.text_to_video import VideoPipeline
from tests.conftest import TinyWorld
from tests.pipeline.test_teamwork import VARIANTS, network, pipeline, same_latents
from tests.teams import team_of
from tests.tiny_pipeline import random_dit
from utils.config import load_config
from utils.errors import UserError
from wan.dit import WanDiT
from wan.vae import WanVAE


@pytest.mark.long
@pytest.mark.parametrize("size", [3, 4, 6])
def test_more_ranks_make_the_latents_of_one(size: int) -> None:
    vae = WanVAE.random(4)
    with team_of(size, network) as team:
        for overrides in VARIANTS.values():
            assert same_latents(vae, team, overrides), overrides


def compiled() -> WanDiT:
    """Not by Inductor, which takes longer; see `tests/pipeline/test_compiled.py`."""
    torch._dynamo.reset()
    dit = network()
    dit.compile_blocks(backend="aot_eager")
    return dit


@pytest.mark.slow
@pytest.mark.parametrize("merged", [True, pytest.param(False, marks=pytest.mark.long)])
def test_compiled_ranks_make_the_latents_of_one_that_is_eager(merged: bool) -> None:
    """In the steady state, with changes of prompt on the way, and nothing compiled again."""
    made, vae = [], WanVAE.random(4)
    with team_of(2, compiled) as team:
        for teamwork, dit in ((None, network()), (team, compiled())):
            pipe = pipeline(vae, teamwork, f"merge_clean_pass={merged}", dit=dit)
            if teamwork is not None:
                text = pipe.encode_prompts(["a"])
                pipe._latent_stream(text, num_latent_frames=None, seed=3).rehearse()
            with (
                torch._dynamo.config.patch(error_on_recompile=True),
                pipe.stream("a", seed=3, num_latent_frames=48) as stream,
            ):
                blocks = []
                while (latents := stream._open().peek()) is not None:
                    blocks.append(latents[1])
                    stream._open().take()
                    if latents[0] == 8:
                        stream.set_prompt("b", "recache")
            made.append(torch.cat(blocks, dim=1))
    torch.testing.assert_close(made[1], made[0], atol=2e-6, rtol=0)
    assert team.ends() == [0]  # type: ignore[attr-defined]


def broken(error: Exception) -> WanDiT:
    dit = random_dit(seed=1)
    dit.blocks[1].forward = Mock(side_effect=error)  # type: ignore[method-assign]
    return dit


def make_latents(world: TinyWorld, team: Teamwork, dit: WanDiT) -> None:
    """And see that the team is lost on the way."""
    setup = Setup.of(load_config(world.config, ["sequence_parallel=2"]), sizes=dit.config)
    pipe = VideoPipeline(setup, dit, vae=WanVAE.random(4), teamwork=team)
    team.when_lost = Mock()
    text = torch.zeros(1, 4, dit.config.text_dim)
    try:
        pipe.generate_latents(text, 6)
    finally:
        team.when_lost.assert_called_once()
        with pytest.raises(UserError, match="have ended: start again"):
            pipe.generate_latents(text, 6)


def test_an_error_of_the_leader(tiny_world: TinyWorld, capfd: pytest.CaptureFixture[str]) -> None:
    """The others were left waiting in an exchange."""
    with team_of(2, lambda: random_dit(seed=1)) as team, pytest.raises(MemoryError):
        make_latents(tiny_world, team, broken(MemoryError("full")))
    assert team.ends() == [1]  # type: ignore[attr-defined]
    assert "another rank of this stream has ended" in capfd.readouterr().err


def test_an_error_of_another_rank(tiny_world: TinyWorld, capfd: pytest.CaptureFixture[str]) -> None:
    """The leader was left waiting in an exchange."""
    with (
        team_of(2, lambda: broken(MemoryError("full"))) as team,
        pytest.raises(UserError, match="another rank of this stream has ended"),
    ):
        make_latents(tiny_world, team, random_dit(seed=1))
    assert team.ends() == [1]  # type: ignore[attr-defined]
    assert "MemoryError: full" in capfd.readouterr().err
