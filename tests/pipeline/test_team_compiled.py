"""Compiled ranks of a team: their graphs are cut at the exchanges, and the video is the same."""

import pytest
import torch

from pipeline.setup import Setup
from pipeline.text_to_video import VideoPipeline
from server.models import RandomText
from tests.teams import team_of
from tests.tiny_pipeline import random_dit
from utils.config import load_config
from wan.dit import WanDiT
from wan.vae import WanVAE

SIZE = ["height=64", "width=96", "device=cpu"]


def compiled() -> WanDiT:
    """Not by Inductor, which takes longer; see `tests/pipeline/test_compiled.py`."""
    torch._dynamo.reset()
    dit = random_dit(seed=1, num_heads=12)
    dit.compile_blocks(backend="aot_eager")
    return dit


@pytest.mark.slow
@pytest.mark.parametrize("merged", [True, False])
def test_compiled_ranks_make_the_latents_of_one_that_is_eager(merged: bool) -> None:
    """In the steady state, with changes of prompt on the way, and nothing compiled again."""
    made, vae = [], WanVAE.random(4)
    with team_of(2, compiled) as team:
        for teamwork, dit in ((None, random_dit(seed=1, num_heads=12)), (team, compiled())):
            keys = [*SIZE, f"merge_clean_pass={merged}"]
            keys.append(f"sequence_parallel={1 if teamwork is None else 2}")
            setup = Setup.of(
                load_config("configs/rolling_forcing_dmd.yaml", keys), sizes=dit.config
            )
            text = RandomText(setup, torch.device("cpu"))
            pipe = VideoPipeline(setup, dit, vae=vae, text=text, teamwork=teamwork)
            if teamwork is not None:
                stream = pipe._latent_stream(
                    pipe.encode_prompts(["a"]), num_latent_frames=None, seed=3
                )
                stream.rehearse()
                del stream
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
