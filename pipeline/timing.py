"""How long the parts of a stream take: the figures of `scripts/benchmark.py`.

The stream of `pipeline` itself is timed, to uint8 frames in host memory, VAE and clean passes
included. `SteadyState` says from which block on all blocks are alike.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from pipeline.passes import Pass, Plan
from pipeline.setup import Setup
from pipeline.stream import Stream
from pipeline.text_to_video import VideoPipeline
from utils.devices import choose_decoding_dtype, choose_device, choose_dtype
from utils.errors import UserError
from wan.attention import best_backend, check_backend
from wan.checkpoints import empty_dit
from wan.context import CachedContext
from wan.dit import DiTConfig, WanDiT
from wan.flops import pass_flops
from wan.vae import StreamingDecoder, WanVAE

TERA = 10**12


# --- the pipeline that is timed ------------------------------------------------------------------


class Stopwatch:
    """Seconds of named parts: CUDA events on a GPU, where nothing waits for them; else a clock."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._device = device
        self._open: tuple[str, Any] | None = None
        self._spans: dict[str, list[tuple[Any, Any]]] = defaultdict(list)
        self.on_start: Callable[[], object] = lambda: None

    def start(self, name: str) -> None:
        """A part begins; parts do not overlap."""
        self.on_start()
        self._open = name, self._now()

    def stop(self) -> None:
        """The part that began last ends."""
        assert self._open is not None
        name, begin = self._open
        self._spans[name].append((begin, self._now()))

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Around one part."""
        self.start(name)
        yield
        self.stop()

    def reset(self) -> None:
        """Forget all."""
        self._spans.clear()

    def seconds(self, name: str) -> list[float]:
        """Every duration of a part since the last reset."""
        if not self._on_gpu:
            return [end - begin for begin, end in self._spans[name]]
        torch.cuda.synchronize(self._device)
        return [begin.elapsed_time(end) / 1000 for begin, end in self._spans[name]]

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


class TimedDecoder(StreamingDecoder):
    """A decoder whose calls are timed."""

    def __init__(self, vae: WanVAE, watch: Stopwatch) -> None:
        super().__init__(vae)
        self._watch = watch

    def decode(self, latents: Tensor) -> Tensor:
        """See `StreamingDecoder.decode`."""
        with self._watch.measure("decode"):
            return super().decode(latents)


class TimedVAE(WanVAE):
    """A VAE whose streams are timed."""

    def __init__(self, vae: WanVAE, watch: Stopwatch) -> None:
        super().__init__(vae.model)
        self._watch = watch

    def streaming_decoder(self) -> StreamingDecoder:
        """See `WanVAE.streaming_decoder`."""
        return TimedDecoder(self, self._watch)


def timed(pipe: VideoPipeline, watch: Stopwatch) -> VideoPipeline:
    """The same networks; their passes are told to `watch` as `window`, `clean` and `decode`.

    A clean pass that shares its forward with a window is part of `window`.
    """

    def before(dit: nn.Module, arguments: tuple[Any, ...]) -> None:
        context = arguments[3]  # latents, timesteps, text, context
        alone = isinstance(context, CachedContext) and context.destination is not None
        watch.start("clean" if alone else "window")

    pipe.dit.register_forward_pre_hook(before)
    pipe.dit.register_forward_hook(lambda *_: watch.stop())
    return VideoPipeline(pipe.setup, pipe.dit, vae=TimedVAE(pipe.vae, watch))


def random_pipeline(setup: Setup, base_dim: int) -> VideoPipeline:
    """Networks of the setup's sizes with random weights; `base_dim` is the VAE's."""
    machine = setup.machine
    device = choose_device(machine.device)
    dtype = choose_dtype(machine.dtype, device)
    dit = random_dit(setup.sizes, device, dtype)
    dit.attention_backend = check_backend(machine.attention_backend, device, dtype)
    vae = WanVAE.random(base_dim=base_dim, z_dim=setup.sizes.in_dim)
    nn.Module.to(vae.model, device, dtype)
    vae.decode_in(choose_decoding_dtype(machine.vae_dtype, dtype))
    return VideoPipeline(setup, dit, vae=vae)


def read_preset(path: Path) -> dict[str, Any]:
    """An official `config.json` with an entry `vae`; UserError if it is not one."""
    try:
        sizes = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not readable as JSON") from error
    if not isinstance(sizes, dict) or not isinstance(sizes.get("vae"), dict):
        raise UserError(f'{path} is no model preset: it needs an entry "vae": {{"base_dim": …}}')
    base_dim = sizes["vae"].get("base_dim")
    if not isinstance(base_dim, int) or base_dim < 1:
        raise UserError(f"{path}: vae.base_dim must be a number of channels above 0")
    return sizes


@torch.no_grad()
def random_dit(config: DiTConfig, device: torch.device, dtype: torch.dtype) -> WanDiT:
    """A network with freshly initialised weights, made in place on `device`."""
    dit = empty_dit(config).to(dtype).to_empty(device=device)
    for module in dit.modules():
        if isinstance(module, nn.Linear | nn.Conv3d | nn.LayerNorm | nn.RMSNorm):
            module.reset_parameters()
    for name, parameter in dit.named_parameters():
        if name.endswith("modulation"):
            parameter.normal_(std=config.dim**-0.5)
    return dit.requires_grad_(False).eval()


# --- what is measured ----------------------------------------------------------------------------


@dataclass(frozen=True)
class SteadyState:
    """Where every pass sees a full context: from block `first` on; `passes` of one such block."""

    first: int
    passes: list[Pass]

    @classmethod
    def of(cls, plan: Plan) -> "SteadyState":
        """The first repetition of a plan without end."""
        start = plan.first_repetition()
        found = (plan.at(index) for index in range(start, start + plan.period))
        passes = [own for own in found if own is not None]
        return cls(max(own.parts[-1].blocks[0] for own in passes if own.parts), passes)

    def flops(self, sizes: DiTConfig, tokens: int, *, window: bool) -> int:
        """Operations of all forwards with a window, or of all that are clean passes alone."""
        return sum(
            pass_flops(sizes, part.view, tokens)
            for own in self.passes
            if (own.window is not None) == window
            for part in own.parts
        )


@dataclass(frozen=True)
class Measured:
    """Seconds and frames of the measured blocks, and what surrounds them."""

    block: list[float]
    window: list[float]
    clean: list[float]
    decode: list[float]
    frames: int
    first_frame: dict[str, float]
    peak_memory: int


class BlockBar(tqdm):
    """Blocks on stderr; and passes, of which one takes minutes where the network is large."""

    def __init__(self, watch: Stopwatch, blocks: int) -> None:
        super().__init__(total=blocks, desc="blocks", miniters=0, mininterval=1.0)
        self._passes = 0
        watch.on_start = self.show_pass

    def show_pass(self) -> None:
        """A pass begins."""
        self._passes += 1
        self.set_postfix_str(f"pass {self._passes}", refresh=False)
        self.update(0)


def run(pipe: VideoPipeline, watch: Stopwatch, *, skipped: int, blocks: int) -> Measured:
    """Stream `skipped` blocks, then `blocks` measured ones; then start a second stream."""
    dit = pipe.dit.config
    text = torch.randn(1, dit.text_len, dit.text_dim, generator=torch.Generator().manual_seed(0))
    if pipe.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(pipe.device)
    intervals, frames = [], 0
    with BlockBar(watch, skipped + blocks) as bar:
        stream, cold = open_and_show(pipe, text)
        bar.update()
        for _ in range(skipped - 1):
            next(stream)
            bar.update()
        watch.reset()
        for _ in range(blocks):
            begin = time.perf_counter()
            frames += len(next(stream))
            intervals.append(time.perf_counter() - begin)
            bar.update()
    parts = {name: watch.seconds(name) for name in ("window", "clean", "decode")}
    stream.close()
    memory = peak_memory(pipe.device)
    second, warm = open_and_show(pipe, text)
    second.close()
    return Measured(
        intervals,
        **parts,
        frames=frames,
        first_frame={"cold": cold, "warm": warm},
        peak_memory=memory,
    )


def open_and_show(pipe: VideoPipeline, text: Tensor) -> tuple[Stream, float]:
    """A new stream, and the seconds from text embeddings to its first frames on the host."""
    begin = time.perf_counter()
    stream = pipe.open_stream(text)
    next(stream)
    return stream, time.perf_counter() - begin


def peak_memory(device: torch.device) -> int:
    """Bytes: most ever allocated on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# --- the report ----------------------------------------------------------------------------------


def figures(pipe: VideoPipeline, steady: SteadyState, measured: Measured) -> dict[str, Any]:
    """All that is reported, as plain values; times in seconds."""
    blocks = len(measured.block)
    rows = 1 if pipe.setup.distilled else 2  # with guidance, text and no text
    sizes, tokens = pipe.dit.config, pipe.shape.tokens_per_frame
    windows, cleans = (
        rows * steady.flops(sizes, tokens, window=window) for window in (True, False)
    )
    window_flops = windows * blocks / len(measured.window)
    clean_flops = cleans * blocks / len(measured.clean) if measured.clean else 0
    block_flops = windows + cleans
    dit = (sum(measured.window) + sum(measured.clean)) / blocks
    interval = statistics.mean(measured.block)
    window = statistics.mean(measured.window)
    clean = statistics.mean(measured.clean) if measured.clean else None
    per_block = measured.frames / blocks
    intervals = torch.tensor(measured.block, dtype=torch.float64)
    return {
        "frames_per_block": per_block,
        "passes_per_block": {
            "window": len(measured.window) / blocks,
            "clean": len(measured.clean) / blocks,
        },
        "seconds": {
            "window_pass": window,
            "clean_pass": clean,
            "vae_decode": sum(measured.decode) / blocks,
            "dit_per_block": dit,
            "block_interval": interval,
            "block_interval_p50": intervals.quantile(0.5).item(),
            "block_interval_p99": intervals.quantile(0.99).item(),
            "first_frame": measured.first_frame,
        },
        "fps": {"dit_only": per_block / dit, "end_to_end": per_block / interval},
        "flops": {
            "window_pass": window_flops,
            "clean_pass": clean_flops,
            "dit_per_block": block_flops,
        },
        "tflops_per_second": {
            "window_pass": window_flops / window / TERA,
            "clean_pass": clean_flops / clean / TERA if clean else None,
            "dit_per_block": block_flops / dit / TERA,
        },
        "peak_memory_bytes": measured.peak_memory,
    }


def setting(pipe: VideoPipeline, args: argparse.Namespace, steady: SteadyState) -> dict[str, Any]:
    """What the figures hold for."""
    levels, device = pipe.setup.levels, pipe.device
    on_gpu = device.type == "cuda"
    backend = pipe.dit.attention_backend
    return {
        "config": str(args.config_path),
        "weights": "random" if args.random_weights else str(args.checkpoint_path or "model folder"),
        "model": str(args.preset or args.generator_name),
        "method": args.method,
        "schedule": pipe.setup.kind,
        "resolution": [pipe.shape.width, pipe.shape.height],
        "levels": levels.num,
        "device": torch.cuda.get_device_name(device) if on_gpu else _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": str(pipe.dit.dtype).removeprefix("torch."),
        "attention_backend": best_backend(device, pipe.dit.dtype) if backend == "auto" else backend,
        "vae": f"in (Wan2.1, base_dim {pipe.vae.model.config['base_dim']})",
        "vae_dtype": str(pipe.vae.decoded_dtype).removeprefix("torch."),
        "clean_pass": "in, in one forward with a window" if pipe.setup.merges_clean_pass else "in",
        "text_encoder": "out",
        "memory": "CUDA max_memory_allocated" if on_gpu else "peak resident set",
        "ramp_up_blocks": steady.first + 1,
        "warmup_blocks": args.warmup,
        "measured_blocks": args.blocks,
    }


def _processor() -> str:
    return f"CPU {platform.processor() or platform.machine()}, {os.cpu_count()} cores"
