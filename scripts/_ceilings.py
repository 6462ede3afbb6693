"""What a device reaches in the operations of a steady block, and the share of it that one takes.

The shapes are those of the network and its VAE: so many tokens of queries and keys, such channels.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from utils.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from pipeline import VideoPipeline
    from pipeline.timing import SteadyState
    from wan.dit import DiTConfig

TERA, GIGA = 10**12, 10**9
REPEATS = 5
SLOW = 1.0  # seconds; what takes longer on a CPU is run once more, not five times


def ceilings(
    pipe: VideoPipeline, steady: SteadyState, backends: Sequence[str] | None = None
) -> dict[str, Any]:
    """TFLOP/s of products, attention (`backends`: all) and convolutions; GB/s of copies."""
    import torch

    on_gpu = pipe.device.type == "cuda"
    source = torch.empty(2**28 if on_gpu else 2**20, dtype=torch.float32, device=pipe.device)
    target = torch.empty_like(source)
    copied = seconds_of(lambda: target.copy_(source), pipe.device)
    size = 2 ** (24 if on_gpu else 20)
    block = torch.empty(size, dtype=torch.uint8, device=pipe.device)
    host = torch.empty(size, dtype=torch.uint8, pin_memory=on_gpu)
    sent = seconds_of(lambda: host.copy_(block, non_blocking=True), pipe.device)
    return {
        "copy_gb_per_second": 2 * source.nbytes / copied / GIGA,
        "copy_to_host_gb_per_second": size / sent / GIGA,
        "matmul_tflops": products(
            pipe.dit.config, _most_tokens(pipe, steady), pipe.dit.dtype, pipe.device
        ),
        "attention_tflops": _attentions(pipe, steady, backends),
        "conv3d_tflops": _convolutions(pipe),
    }


def seconds_of(run: Callable[[], object], device: torch.device, repeats: int = REPEATS) -> float:
    """Median of some runs, after one that is not counted."""
    from pipeline.timing import Stopwatch

    watch, begin = Stopwatch(device), time.perf_counter()
    run()
    if time.perf_counter() - begin > SLOW:
        repeats = 1
    for _ in range(repeats):
        with watch.measure("run"):
            run()
    return statistics.median(watch.seconds("run"))


def ideal_seconds(
    pipe: VideoPipeline, steady: SteadyState, found: dict[str, Any], frame_bytes: int
) -> dict[str, float]:
    """Seconds of a steady block's DiT, VAE and copy at the ceilings that were found.

    Elementwise work takes none: so the share that is reached says what it costs.
    """
    from wan.flops import pass_attention_flops

    sizes, tokens = pipe.dit.config, pipe.shape.tokens_per_frame
    rows = 1 if pipe.setup.distilled else 2
    matmul, dit = found["matmul_tflops"], 0.0
    for part in (part for own in steady.passes for part in own.parts):
        queries, keys = part.frames * tokens, len(part.view.positions) * tokens
        rates = found["attention_tflops"][_shape_name(queries, keys)].values()
        rate = max((r for r in rates if isinstance(r, float)), default=matmul["attention"])
        per_layer = 2 * queries * sizes.dim
        linear = 6 * sizes.dim / matmul["attention"]
        linear += sizes.ffn_dim / matmul["feed-forward up"]
        linear += sizes.ffn_dim / matmul["feed-forward down"]
        dit += rows * sizes.num_layers * per_layer * linear / TERA
        dit += rows * pass_attention_flops(sizes, part.view, tokens) / rate / TERA
    vae = decoder_flops(pipe) / max(found["conv3d_tflops"].values()) / TERA
    copy = frame_bytes / found["copy_to_host_gb_per_second"] / GIGA
    return {"dit": dit, "vae": vae, "copy": copy, "end_to_end": dit + vae + copy}


def decoder_flops(pipe: VideoPipeline) -> int:
    """Operations of decoding a block of a stream, counted where nothing is computed."""
    import torch
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
    from torch.utils.flop_counter import FlopCounterMode

    from wan.vae import decode_moments

    with torch.device("meta"), torch.no_grad():
        model = AutoencoderKLWan.from_config(pipe.vae.model.config)
        counted = []
        for frames in (1, 1 + pipe.layout.block_frames):
            with FlopCounterMode(display=False) as counter:
                decode_moments(model, torch.empty(1, frames, *pipe.shape.latent))
            counted.append(counter.get_total_flops())
    return counted[1] - counted[0]


def _most_tokens(pipe: VideoPipeline, steady: SteadyState) -> int:
    """Tokens of the largest window of a steady block."""
    frames = max(part.frames for own in steady.passes for part in own.parts)
    return frames * pipe.shape.tokens_per_frame


def products(
    sizes: DiTConfig, rows: int, dtype: torch.dtype, device: torch.device
) -> dict[str, float]:
    """TFLOP/s of the network's four kinds of matrix product, over so many tokens."""
    import torch

    found = {}
    for name, n, k, m in (
        ("attention", rows, sizes.dim, sizes.dim),
        ("feed-forward up", rows, sizes.dim, sizes.ffn_dim),
        ("feed-forward down", rows, sizes.ffn_dim, sizes.dim),
        ("text", sizes.text_len, sizes.dim, sizes.dim),
    ):
        x = torch.randn(n, k, dtype=dtype, device=device)
        weight = torch.randn(m, k, dtype=dtype, device=device)
        took = seconds_of(partial(torch.nn.functional.linear, x, weight), device)
        found[name] = 2 * n * k * m / took / TERA
    return found


def _attentions(
    pipe: VideoPipeline, steady: SteadyState, backends: Sequence[str] | None
) -> dict[str, dict[str, Any]]:
    """Of each kernel in the passes of a steady block; why, where one cannot run."""
    from typing import get_args

    import torch

    from wan.attention import Backend, attention, check_backend

    sizes, found = pipe.dit.config, {}
    for part in (part for own in steady.passes for part in own.parts):
        queries, keys = (
            torch.randn(
                (1, frames * pipe.shape.tokens_per_frame, sizes.num_heads, sizes.head_dim),
                dtype=pipe.dit.dtype,
                device=pipe.device,
            )
            for frames in (part.frames, len(part.view.positions))
        )
        name = _shape_name(queries.shape[1], keys.shape[1])
        if name in found:
            continue
        flop = 4 * queries.shape[1] * keys.shape[1] * sizes.dim
        rates: dict[str, float | str] = {}
        for backend in backends or get_args(Backend):
            try:
                chosen = check_backend(backend, pipe.device, pipe.dit.dtype)
                run = partial(attention, queries, keys, keys, backend=chosen)
                rates[backend] = flop / seconds_of(run, pipe.device) / TERA
            except (UserError, RuntimeError, ImportError) as error:
                rates[backend] = str(error).partition("\n")[0]
        found[name] = rates
    return found


def _shape_name(queries: int, keys: int) -> str:
    return f"{queries} x {keys} tokens"


def _convolutions(pipe: VideoPipeline) -> dict[str, float]:
    """Of the decoder's convolutions at three of its sizes, in both orders of memory."""
    import torch

    channels, found = int(pipe.vae.model.config["base_dim"]), {}
    device, dtype = pipe.device, pipe.vae.decoded_dtype
    for shrink in (1, 2, 4):
        c, height, width = channels * shrink, pipe.shape.height, pipe.shape.width
        shape = (1, c, 6, height // shrink, width // shrink)
        conv = torch.nn.Conv3d(c, c, 3, dtype=dtype, device=device).requires_grad_(False)
        x: Tensor = torch.randn(shape, dtype=dtype, device=device)
        for order in (torch.contiguous_format, torch.channels_last_3d):
            conv.weight.data = conv.weight.data.contiguous(memory_format=order)
            x = x.contiguous(memory_format=order)
            outputs = c * 4 * (shape[3] - 2) * (shape[4] - 2)
            name = f"{c} channels, {shape[3]}x{shape[4]}, {str(order).removeprefix('torch.')}"
            found[name] = 2 * outputs * 27 * c / seconds_of(partial(conv, x), device) / TERA
    return found
