"""What a GPU alone can show: every kernel path against the same on the CPU, or against eager.

    pytest -m gpu

Everything is small: the whole file takes a minute on one GPU.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from pipeline import VideoPipeline
from pipeline.setup import Setup
from pipeline.stream import Stream
from tests.tiny_pipeline import random_dit, write_config
from utils.config import load_config
from utils.errors import UserError
from wan.attention import Backend, attention, best_backend, check_backend
from wan.context import MaskedContext, frame_mask
from wan.dit import WanDiT
from wan.rope import apply_rope, rotation
from wan.vae import WanVAE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GPU, CPU = torch.device("cuda:0"), torch.device("cpu")
METHODS: dict[str, dict[str, object]] = {
    "rolling_forcing": {},
    "self_forcing": {"model_kwargs": {"local_attn_size": 12, "sink_size": 3}},
    "infinite_forcing": {},
}
STEADY = 9  # blocks after which every pass has its full size, in all of them


def made_dit(dtype: torch.dtype, device: torch.device) -> WanDiT:
    """Heads of 64 channels, which every kernel takes; four layers."""
    dit = random_dit(dim=128, ffn_dim=256, num_layers=4)
    return dit.to(device, dtype)


def made_pipe(
    folder: Path,
    method: str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    compiled: bool = False,
    merged: bool = False,
) -> VideoPipeline:
    config = write_config(
        folder / "config.yaml",
        method=method,
        generator_name="none",
        height=64,
        width=96,
        denoising_step_list=[1000, 800, 600, 400, 200],
        merge_clean_pass=merged,
        **METHODS[method],
    )
    dit = made_dit(dtype, device)
    vae = WanVAE.random(base_dim=8)
    vae.to(device).decode_in(dtype)
    pipe = VideoPipeline(Setup.of(load_config(config), sizes=dit.config), dit, vae=vae)
    if compiled:
        pipe.compile()
    return pipe


def opened(pipe: VideoPipeline) -> Stream:
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(1, 9, pipe.dit.config.text_dim, generator=generator)
    return pipe.open_stream(text, seed=0)


def latents_of(pipe: VideoPipeline, blocks: int = STEADY + 3) -> Tensor:
    rollout, found = opened(pipe).rollout, {}
    while len(found) < blocks:
        result = rollout.step()
        assert result is not None
        found.update(result.finished)
    return torch.cat([found[block] for block in range(blocks)], dim=1).float().cpu()


def distance(found: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference, relative to that of what is expected."""
    return ((found - expected).norm() / expected.norm()).item()


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    """Products of float32 in float32; no compiled graph of another test."""
    torch._dynamo.reset()
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


# --- kernels -------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", get_args(Backend))
def test_attention_equals_that_of_the_cpu(backend: str) -> None:
    try:
        chosen = check_backend(backend, GPU, torch.bfloat16)
    except UserError as error:
        pytest.skip(str(error))
    q, k, v = (torch.randn(2, length, 4, 64).bfloat16() for length in (192, 256, 256))
    expected = attention(q.float(), k.float(), v.float())
    found = attention(q.to(GPU), k.to(GPU), v.to(GPU), backend=chosen).float().cpu()
    assert distance(found, expected) < 0.01


def test_rotation_equals_that_of_the_cpu() -> None:
    x = torch.randn(1, 5 * 24, 2, 64)
    by = [rotation((0, 1, 2, 7, 8), (4, 6), 64, device) for device in (CPU, GPU)]
    found = apply_rope(x.to(GPU), by[1]).cpu()
    torch.testing.assert_close(found, apply_rope(x, by[0]), rtol=1e-6, atol=1e-6)


def test_masked_attention_with_its_backward_pass_equals_that_of_the_cpu() -> None:
    """FlexAttention on the GPU, a dense mask on the CPU."""
    mask, grid = frame_mask(6, 3), (8, 8)
    leaves = [torch.randn(1, 6 * 64, 2, 64) for _ in range(3)]
    results = []
    for device in (CPU, GPU):
        own = [x.to(device).requires_grad_(True) for x in leaves]
        context = MaskedContext(mask, tuple(range(6)), grid, 64, device)
        out = context.of(0).attend(*own, "auto")
        out.square().sum().backward()
        results.append([out.detach().cpu(), *[x.grad.cpu() for x in own if x.grad is not None]])
    assert len(results[1]) == 4
    for expected, found in zip(*results, strict=True):
        assert distance(found, expected) < 1e-3


def test_the_vae_equals_that_of_the_cpu() -> None:
    vaes = [WanVAE.random(base_dim=8).to(device) for device in (CPU, GPU)]
    video = torch.randint(0, 256, (1, 9, 3, 64, 96), dtype=torch.uint8)
    encoded = [vae.encode(video).cpu() for vae in vaes]
    assert distance(encoded[1], encoded[0]) < 1e-3
    whole, *others = [vae.decode(encoded[0]).cpu() for vae in vaes]
    decoder = vaes[1].streaming_decoder()
    cut = [decoder.decode(part).cpu() for part in encoded[0].split([1, 2], dim=1)]
    for found in (*others, torch.cat(cut, dim=1)):
        assert distance(found, whole) < 1e-3


def test_the_vae_equals_that_of_diffusers_in_both_orders_of_memory() -> None:
    vae = WanVAE.random(base_dim=8).to(GPU)
    latents = torch.randn(1, 4, 16, 8, 12)
    mean, std = vae.statistics()
    mu = (latents.to(GPU) * std + mean).transpose(1, 2)
    conv = vae.model.decoder.conv_in
    assert conv.weight.is_contiguous(memory_format=torch.channels_last_3d)
    found = vae.decode(latents)
    for order in (torch.channels_last_3d, torch.contiguous_format):
        for weight in vae.model.parameters():
            if weight.ndim == 5:
                weight.data = weight.data.contiguous(memory_format=order)
        with torch.no_grad():
            expected = vae.model.decode(mu).sample.transpose(1, 2)
        assert distance(found, expected) < 1e-3


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-3), (torch.bfloat16, 0.05)])
def test_the_compiled_decoder_equals_eager(dtype: torch.dtype, most: float) -> None:
    """Over blocks, a restart and a state, without a second compilation."""
    vae, latents = WanVAE.random(base_dim=8).to(GPU), torch.randn(1, 12, 16, 8, 12)
    expected = vae.decode(latents)
    decoder = vae.decode_in(dtype).compile_decoder(3).streaming_decoder()
    blocks = latents.split(3, dim=1)
    found = [decoder.decode(block) for block in blocks[:2]]
    with torch._dynamo.config.patch(error_on_recompile=True):
        found += [decoder.decode(block) for block in blocks[2:]]
        state = decoder.state_dict()
        decoder.restart()
        again = [decoder.decode(block) for block in blocks]
        decoder.load_state_dict(state)
        decoder.decode(blocks[0])
    for video in (found, again):
        assert distance(torch.cat(video, dim=1).float(), expected) < most


def test_the_kernel_that_runs_is_the_one_that_was_chosen() -> None:
    """FlashAttention-3 or cuDNN on capability 9, flash on others from 8 on; no slow fallback."""
    q, k, v = (torch.randn(1, 256, 4, 128, device=GPU, dtype=torch.bfloat16) for _ in range(3))
    chosen = best_backend(GPU, torch.bfloat16)
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        attention(q, k, v)
    names = " ".join(event.key.lower() for event in seen.key_averages())
    capability = torch.cuda.get_device_capability()
    if capability[0] == 9:
        assert chosen in ("flash3", "cudnn")
    elif capability >= (8, 0):
        assert chosen in ("flash2", "sdpa")
    words = {"cudnn": ("cudnn", "sdpa"), "flash3": ("flash",), "flash2": ("flash",)}
    if capability >= (8, 0):
        assert any(word in names for word in words.get(chosen, ("flash",))), (chosen, names)


# --- streams -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_latents_equal_those_of_the_cpu(tmp_path: Path, method: str) -> None:
    """Twelve blocks: noise drawn ahead, the cache and its slots, positions, levels."""
    expected, found = (
        latents_of(made_pipe(tmp_path, method, device, torch.float32)) for device in (CPU, GPU)
    )
    assert distance(found, expected) < 1e-3


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_compiled_equals_eager_over_all_layers(tmp_path: Path, method: str, merged: bool) -> None:
    """One graph serves all layers; one that read another layer's cache would be far off.

    All is compiled before the first stream, and nothing in a second one.
    """
    expected = latents_of(made_pipe(tmp_path, method, GPU, torch.float32, merged=merged))
    pipe = made_pipe(tmp_path, method, GPU, torch.float32, compiled=True, merged=merged)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            assert distance(latents_of(pipe), expected) < 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_a_steady_block_waits_for_its_frames_alone(tmp_path: Path, method: str) -> None:
    """What synchronises without being asked to raises; the event at the end does not."""
    stream = opened(made_pipe(tmp_path, method, GPU, torch.bfloat16))
    for _ in range(STEADY):
        next(stream)
    torch.cuda.set_sync_debug_mode("error")
    try:
        frames = [next(stream) for _ in range(2)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(x.device == CPU and x.is_contiguous() and x.shape[0] == 12 for x in frames)


def test_frames_lie_in_pinned_memory_that_is_used_again(tmp_path: Path) -> None:
    """Not in that of frames that somebody holds."""
    stream = opened(made_pipe(tmp_path, "rolling_forcing", GPU, torch.bfloat16))
    held = next(stream)
    before = held.clone()
    for _ in range(STEADY):
        next(stream)
    made = torch.cuda.host_memory_stats()["num_host_alloc"]
    assert all(next(stream).is_pinned() for _ in range(6))
    assert torch.cuda.host_memory_stats()["num_host_alloc"] == made
    assert torch.equal(held, before)


def test_memory_does_not_grow_and_is_given_back(tmp_path: Path) -> None:
    pipe = made_pipe(tmp_path, "rolling_forcing", GPU, torch.bfloat16)
    opened(pipe).close()
    before = torch.cuda.memory_allocated()
    stream = opened(pipe)
    for _ in range(STEADY + 1):
        next(stream)
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    next(stream)
    peak = torch.cuda.max_memory_allocated()
    for _ in range(30):
        next(stream)
    assert torch.cuda.memory_allocated() == held
    assert torch.cuda.max_memory_allocated() == peak
    stream.close()
    del stream
    rotation.cache_clear()
    assert torch.cuda.memory_allocated() <= before


# --- training ------------------------------------------------------------------------------------


def test_a_network_learns_as_on_the_cpu() -> None:
    """Gradients of all weights with checkpointing, in float32."""
    found: list[dict[str, Tensor]] = []
    for device in (CPU, GPU):
        dit = made_dit(torch.float32, device).requires_grad_(True)
        dit.gradient_checkpointing = True
        generator = torch.Generator().manual_seed(0)
        latents = torch.randn(1, 3, 16, 8, 12, generator=generator).to(device)
        text = dit.encode_text(torch.ones(1, 4, dit.config.text_dim, device=device))
        dit(latents, torch.full((1, 3), 500.0, device=device), text).square().mean().backward()
        found.append({k: p.grad.cpu() for k, p in dit.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    largest = max(grad.norm() for grad in found[0].values())
    for name, grad in found[0].items():
        assert (found[1][name] - grad).norm() < 1e-3 * largest, name


def test_nccl_on_one_rank(tmp_path: Path) -> None:
    store = f"file://{tmp_path / 'store'}"
    dist.init_process_group("nccl", init_method=store, rank=0, world_size=1, device_id=GPU)
    try:
        values = torch.arange(4.0, device=GPU)
        dist.all_reduce(values)
        parts = [torch.empty_like(values)]
        dist.all_gather(parts, values)
        assert torch.equal(parts[0].cpu(), torch.arange(4.0))
    finally:
        dist.destroy_process_group()
