"""What is said of memory before loading is what is counted, at published sizes on fake CUDA."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch import nn
from transformers import UMT5Config, UMT5EncoderModel

from pipeline import VideoPipeline
from pipeline.memory import TEXT_BYTES, phases, with_profile
from tests.fake_cuda import CUDA, FakeCuda, made_on
from tests.published import published_setup
from tests.test_true_size import AS_ON_CUDA, at_steady_state, made_dit
from utils.profiles import PROFILES
from wan.float8 import use_float8
from wan.vae import WanVAE


@pytest.fixture
def cuda() -> Iterator[FakeCuda]:
    with FakeCuda() as device:
        yield device


def held(module: nn.Module) -> int:
    return sum(value.nbytes for value in module.state_dict().values())


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name == "16gb" else pytest.mark.long)
        for name in PROFILES
    ],
)
def test_making_videos(cuda: FakeCuda, tmp_path: Path, name: str) -> None:
    """A steady block, to uint8 frames on the host, under each profile."""
    setup = with_profile(published_setup(tmp_path, *AS_ON_CUDA), name)
    dit = made_dit("1.3B")
    if setup.machine.linear_dtype == "float8":
        use_float8(dit.blocks)
    with torch.device("meta"):
        model = AutoencoderKLWan(base_dim=96)
    made_on(CUDA, model, torch.float32)
    for decoding in (model.post_quant_conv, model.decoder):
        made_on(CUDA, decoding, torch.bfloat16)
    vae = WanVAE(model)
    vae.frugal = setup.machine.vae_frugal
    text = torch.zeros(1, 512, 4096, dtype=torch.bfloat16, device=CUDA)
    with cuda.measured() as counts:
        stream = VideoPipeline(setup, dit, vae=vae).open_stream(text, seed=0)
        stream.next_block()
        at_steady_state(stream)
        stream.next_block()
        counts.peak = counts.live
        stream.next_block()
    said = phases(setup, torch.bfloat16)[-1]
    assert said.parts["transformer"] == held(dit)
    assert said.parts["cache"] == stream.rollout.cache.num_bytes
    assert said.parts["VAE"] == pytest.approx(held(model), rel=0.01)
    counted = held(dit) + held(model) + counts.peak
    assert counted <= said.total <= 1.06 * counted, (said.parts, counted, counts.peak)


def test_encoding_prompts(cuda: FakeCuda) -> None:
    """umt5-xxl on the longest prompt."""
    config = UMT5Config(
        vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_heads=64, num_layers=2
    )
    with torch.device("meta"):
        model = UMT5EncoderModel(config)
    made_on(CUDA, model, torch.bfloat16)
    ids, mask = (torch.ones(1, 512, dtype=torch.int64, device=CUDA) for _ in range(2))
    with cuda.measured() as counts, torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
    assert 0.8 * TEXT_BYTES < counts.peak <= TEXT_BYTES
