"""The layers of the VAE against diffusers' own, on the paths of all devices; compiled and eager."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from safetensors.torch import save_file
from torch import Tensor

from wan import vae_layers
from wan.vae import StreamingDecoder, WanVAE, decode_moments, encode_moments

ARCHITECTURES = {
    "as published": {},
    "temporal stride 8": {"dim_mult": (1, 2, 2, 2), "temporal_downsample": (True, True, True)},
    "temporal stride 2": {"dim_mult": (1, 3), "temporal_downsample": (True,), "num_res_blocks": 1},
    "images": {"dim_mult": (1, 2), "temporal_downsample": (False,)},
}


@pytest.fixture(params=["CPU", "GPU"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The convolutions of a device: what a GPU computes runs on a CPU too, slowly."""
    if request.param == "GPU":
        monkeypatch.setattr(vae_layers, "_by_onednn", lambda x: False)
    return request.param


def made(path: str, **sizes: object) -> WanVAE:
    vae = WanVAE.random(**({"base_dim": 4} | sizes))  # type: ignore[arg-type]
    with torch.no_grad():
        for name, weight in vae.model.named_parameters():
            if name.endswith(("gamma", "bias")):
                weight.add_(0.1 * torch.randn_like(weight))
    if path == "GPU":
        vae_layers.put_channels_together(vae.model)
    return vae


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def assert_equal(ours: Tensor, theirs: Tensor) -> None:
    """To rounding in float32."""
    assert ours.shape == theirs.shape
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def stock_moments(model: AutoencoderKLWan, video: Tensor) -> tuple[Tensor, Tensor]:
    """diffusers' encoder, clip by clip; its own loop over clips knows the published stride only."""
    past: list[Any] = [None] * 100
    clips = [video[:, :1], *video[:, 1:].split(model.config["scale_factor_temporal"], dim=1)]
    moments = [
        model.quant_conv(model.encoder(clip.transpose(1, 2), feat_cache=past, feat_idx=[0]))
        for clip in clips
    ]
    mean, spread = torch.cat(moments, dim=2).transpose(1, 2).chunk(2, dim=2)
    return mean, spread


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param(sizes, id=name, marks=() if name == "as published" else pytest.mark.slow)
        for name, sizes in ARCHITECTURES.items()
    ],
)
def test_what_comes_out_is_what_diffusers_makes(path: str, sizes: dict[str, object]) -> None:
    """Latents, video and gradients, of two odd videos. It decodes frames one by one alone."""
    vae = made(path, **sizes)
    stock, side = copy.deepcopy(vae.model), vae.spatial_stride
    video = noise(2, 1 + 3 * vae.temporal_stride, 3, 3 * side, 5 * side)
    mean, spread = encode_moments(vae.model, video)
    rebuilt, _ = decode_moments(vae.model, mean, pixels_at_once=2 * 3 * 5)
    expected = stock_moments(stock, video)
    theirs = stock.decode(expected[0].transpose(1, 2)).sample.transpose(1, 2)
    gradients = []
    for model, results in (
        (vae.model, (mean, spread, rebuilt.clamp(-1, 1))),
        (stock, (*expected, theirs)),
    ):
        sum(x.square().mean() for x in results).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    for ours, other in zip((mean, spread, rebuilt), (*expected, theirs), strict=True):
        assert_equal(ours.clamp(other.min(), other.max()), other)
    assert (gradients[0] - gradients[1]).norm() < 1e-4 * gradients[1].norm()


@pytest.mark.parametrize(
    "chunks",
    [[1] * 6, [1, 2, 3], *(pytest.param(c, marks=pytest.mark.slow) for c in ([6], [3, 3], [2, 4]))],
)
def test_cuts_of_a_stream_change_nothing(path: str, chunks: list[int]) -> None:
    """With and without gradient, which takes another way to the same buffers."""
    vae, latents = made(path), noise(2, 6, 16, 3, 5)
    decoder = vae.streaming_decoder()
    vae.pixels_at_once = 3 * 3 * 5
    video = torch.cat([decoder.decode(part) for part in latents.split(chunks, dim=1)], dim=1)
    mean, std = vae.statistics()
    with torch.enable_grad():
        whole, _ = decode_moments(vae.model, latents * std + mean)
    assert_equal(video, whole.detach().clamp(-1, 1))


def test_weights_go_through_files_in_any_order_of_memory(tmp_path: Path) -> None:
    """Of channels that lie together safetensors refuses to write; keys and values stay."""
    apart, together = made("CPU"), made("CPU")
    together.model.load_state_dict(apart.model.state_dict())
    vae_layers.put_channels_together(together.model)
    conv = together.model.decoder.conv_in
    assert conv.weight.is_contiguous(memory_format=torch.channels_last_3d)
    save_file(together.official_state_dict(), tmp_path / "vae.safetensors")
    loaded = WanVAE.from_official(tmp_path / "vae.safetensors").official_state_dict()
    for key, value in apart.official_state_dict().items():
        assert torch.equal(loaded[key], value)


# --- compiled ------------------------------------------------------------------------------------


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.fx.GraphModule]]:
    """What dynamo hands to a compiler; nothing else may be in the way of a GPU's path."""
    monkeypatch.setattr(vae_layers, "_by_onednn", lambda x: False)
    torch._dynamo.reset()
    found: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        found.append(graph)
        return graph.forward

    torch._dynamo.register_backend(keep, name="kept_graphs")
    yield found
    torch._dynamo.reset()
    torch._dynamo.backends.registry._COMPILER_FNS.pop("kept_graphs")


def blocks_of(decoder: StreamingDecoder, latents: Tensor) -> list[Tensor]:
    return [decoder.decode(block) for block in latents.split(3, dim=1)]


@pytest.mark.slow
def test_the_steady_call_is_one_static_graph(graphs: list[torch.fx.GraphModule]) -> None:
    """Over blocks, restarts, states and streams, as eager; the first block is eager."""
    vae, latents = made("GPU"), noise(1, 15, 16, 2, 3)
    expected = blocks_of(vae.streaming_decoder(), latents)
    vae.compile_decoder(3, backend="kept_graphs")
    decoder = vae.streaming_decoder()
    assert not blocks_of(decoder, latents[:, :3])[1:]
    assert not graphs
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = blocks_of(decoder, latents[:, 3:6])
        state = decoder.state_dict()
        found += blocks_of(decoder, latents[:, 6:])
        resumed = vae.streaming_decoder()
        resumed.load_state_dict({key: value.contiguous() for key, value in state.items()})
        again = blocks_of(resumed, latents[:, 6:])
        resumed.restart()
        restarted = blocks_of(resumed, latents)
    assert len(graphs) == 1
    expected = expected[1:] + expected[2:] + expected
    for ours, theirs in zip(found + again + restarted, expected, strict=True):
        assert_equal(ours, theirs)


def test_a_compiled_decoder_lets_cudnn_measure_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """While it runs alone; without one the last bits would differ from process to process."""
    vae, seen = made("CPU"), []
    monkeypatch.setattr(
        "wan.vae.decode_moments",
        lambda *_, **__: seen.append(torch.backends.cudnn.benchmark) or (torch.zeros(1), ()),
    )
    vae.decode_next(torch.zeros(1, 1, 16, 2, 2), None)
    vae.compile_decoder(3).decode_next(torch.zeros(1, 1, 16, 2, 2), None)
    assert seen == [False, True]
    assert not torch.backends.cudnn.benchmark
