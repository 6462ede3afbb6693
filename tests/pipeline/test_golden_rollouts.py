"""Rollouts against the published implementations, through the public API alone."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.golden_cases import case_names, load_case
from tests.tiny_pipeline import golden_pipeline

pytestmark = pytest.mark.golden
TOLERANCE = 1e-4


def method_of(meta: dict[str, Any]) -> dict[str, Any]:
    """Configuration of the method that recorded a case."""
    reference = meta["reference"]
    if reference.startswith("RollingForcing/"):
        return {
            "method": "rolling_forcing",
            "max_attention_frames": meta["max_attention_frames"],
            "model_kwargs": {"sink_size": meta["sink_frames"]},
        }
    method = "infinite_forcing" if reference.startswith("Infinite-Forcing/") else "self_forcing"
    return {
        "method": method,
        "max_attention_frames": meta["max_attention_frames"],
        "model_kwargs": {
            "sink_size": meta["sink_size"],
            "local_attn_size": meta["local_attn_size"],
        },
    }


@pytest.mark.parametrize(
    "name",
    [
        *case_names("rolling_inference"),
        *case_names("self_forcing_inference"),
        *case_names("infinite_forcing_inference"),
    ],
)
def test_rollout_gives_the_recorded_latents(name: str, tmp_path: Path) -> None:
    case = load_case(name)
    pipe = golden_pipeline(case, tmp_path, **method_of(case.meta))
    recorded = case.tensors
    latents = pipe.generate_latents(
        recorded["prompt_embeds"],
        num_latent_frames=case.meta["frames"],
        noise=(recorded["noise"], recorded["eps"]),
    )
    torch.testing.assert_close(latents, recorded["latents"], atol=TOLERANCE, rtol=0)
