"""An error of one rank ends all of its team, with a sentence; nobody waits for ever."""

from unittest.mock import Mock

import pytest
import torch

from pipeline.setup import Setup
from pipeline.teamwork import Teamwork
from pipeline.text_to_video import VideoPipeline
from tests.conftest import TinyWorld
from tests.teams import team_of
from tests.tiny_pipeline import random_dit
from utils.config import load_config
from utils.errors import UserError
from wan.dit import WanDiT
from wan.vae import WanVAE


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
