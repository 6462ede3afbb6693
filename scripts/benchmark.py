"""How fast a stream is: time per pass and per block, frames per second, operations, memory.

    python scripts/benchmark.py --config_path configs/rolling_forcing_dmd.yaml --random_weights
    python scripts/benchmark.py --config_path C --checkpoint_path K --blocks 50 --json out.json

The stream of `pipeline` itself is timed, to uint8 frames in host memory, VAE and clean passes
included. Blocks of the ramp-up, whose passes see less than a full context, are computed but not
measured; nor are the `--warmup` blocks behind them. `--random_weights` needs no files: sizes come
from `configs/models`, weights and text embeddings are random (neither changes the time).
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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline import Stream, VideoPipeline, load_pipeline
from pipeline.components import choose_device, choose_dtype
from utils.cli import run_main, set_up_logging
from utils.config import Config, find_file, load_config
from utils.errors import UserError
from utils.files import write_json
from wan.attention import best_backend, check_backend
from wan.checkpoints import empty_dit
from wan.dit import DiTConfig, WanDiT
from wan.flops import pass_flops
from wan.kv_cache import View
from wan.vae import StreamingDecoder, WanVAE

TERA = 10**12


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--config_path", required=True, help="experiment file")
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument("--checkpoint_path", help="distilled weights, .pt or .safetensors")
    weights.add_argument("--random_weights", action="store_true", help="sizes alone, no files")
    parser.add_argument(
        "--model", help="sizes for --random_weights (default: configs/models/<generator_name>.json)"
    )
    parser.add_argument("--blocks", type=int, default=20, help="blocks to measure (default: 20)")
    parser.add_argument(
        "--warmup", type=int, default=3, help="blocks between ramp-up and measurement (default: 3)"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1 … (default: a GPU if there is one)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the config")
    return parser


# --- the pipeline that is timed ------------------------------------------------------------------


class Stopwatch:
    """Seconds of named parts: CUDA events on a GPU, where nothing waits for them; else a clock."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._device = device
        self._open: tuple[str, Any] | None = None
        self._spans: dict[str, list[tuple[Any, Any]]] = defaultdict(list)

    def start(self, name: str) -> None:
        """A part begins; parts do not overlap."""
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
    """The same networks; their passes are told to `watch` as `window`, `clean` and `decode`."""

    def before(dit: nn.Module, arguments: tuple[Any, ...]) -> None:
        context = arguments[3]  # latents, timesteps, text, context
        watch.start("window" if context.destination is None else "clean")

    pipe.dit.register_forward_pre_hook(before)
    pipe.dit.register_forward_hook(lambda *_: watch.stop())
    return VideoPipeline(pipe.config, pipe.dit, files=pipe.files, vae=TimedVAE(pipe.vae, watch))


def random_pipeline(config: Config, preset: Path) -> VideoPipeline:
    """Networks of the sizes in a preset with random weights."""
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    sizes = read_preset(preset)
    dit = random_dit(DiTConfig.from_dict(sizes), device, dtype)
    dit.attention_backend = check_backend(config.attention_backend, device, dtype)
    vae = WanVAE.random(base_dim=sizes["vae"]["base_dim"], z_dim=dit.config.in_dim)
    nn.Module.to(vae.model, device, dtype)
    return VideoPipeline(config, dit, vae=vae)


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
    """Where every pass sees a full context: from block `first` on, in these views."""

    first: int
    window: View
    clean: View

    @classmethod
    def of(cls, pipe: VideoPipeline) -> "SteadyState":
        """Of this pipeline's schedule and policy."""
        config, layout, policy = pipe.config, pipe.layout, pipe.policy
        blocks = config.num_levels if config.schedule == "rolling" else 1

        def views(block: int) -> tuple[View, View]:
            finished, frames = layout.start(block), layout.block_frames
            window = policy.view(finished, blocks * frames)
            return window, policy.view(finished, frames, clean_pass=True)

        def sizes(block: int) -> tuple[int, int]:
            window, clean = views(block)
            return len(window.positions), len(clean.positions)

        # a context of n frames is full after n blocks at the latest
        full = sizes(config.attention_frames + 1)
        first = next(block for block in count(1) if sizes(block) == full)
        return cls(first, *views(first))


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


def run(pipe: VideoPipeline, watch: Stopwatch, *, skipped: int, blocks: int) -> Measured:
    """Stream `skipped` blocks, then `blocks` measured ones; then start a second stream."""
    dit = pipe.dit.config
    text = torch.randn(1, dit.text_len, dit.text_dim, generator=torch.Generator().manual_seed(0))
    if pipe.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(pipe.device)
    stream, cold = open_and_show(pipe, text)
    for _ in range(skipped - 1):
        next(stream)
    watch.reset()
    intervals, frames = [], 0
    for _ in range(blocks):
        begin = time.perf_counter()
        frames += len(next(stream))
        intervals.append(time.perf_counter() - begin)
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
    rows = 1 if pipe.config.distilled else 2  # with guidance, text and no text
    sizes, tokens = pipe.dit.config, pipe.shape.tokens_per_frame
    window_flops = rows * pass_flops(sizes, steady.window, tokens)
    clean_flops = rows * pass_flops(sizes, steady.clean, tokens)
    block_flops = (window_flops * len(measured.window) + clean_flops * len(measured.clean)) / blocks
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
    config, device = pipe.config, pipe.device
    on_gpu = device.type == "cuda"
    backend = pipe.dit.attention_backend
    return {
        "config": str(args.config_path),
        "weights": "random" if args.random_weights else str(args.checkpoint_path or "model folder"),
        "model": str(args.preset or config.generator_name),
        "method": config.method,
        "schedule": config.schedule,
        "resolution": [pipe.shape.width, pipe.shape.height],
        "levels": config.num_levels,
        "device": torch.cuda.get_device_name(device) if on_gpu else _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": str(pipe.dit.dtype).removeprefix("torch."),
        "attention_backend": best_backend(device, pipe.dit.dtype) if backend == "auto" else backend,
        "vae": f"in (Wan2.1, base_dim {pipe.vae.model.config['base_dim']})",
        "clean_pass": "in",
        "text_encoder": "out",
        "memory": "CUDA max_memory_allocated" if on_gpu else "peak resident set",
        "ramp_up_blocks": steady.first + 1,
        "warmup_blocks": args.warmup,
        "measured_blocks": args.blocks,
    }


def table(about: dict[str, Any], result: dict[str, Any]) -> str:
    """The report as text."""
    seconds, fps = result["seconds"], result["fps"]
    flops, rate = result["flops"], result["tflops_per_second"]
    lines = [f"{key.replace('_', ' ')}: {value}" for key, value in about.items()]
    lines.append("")
    for name in ("window_pass", "clean_pass", "dit_per_block"):
        speed = "" if rate[name] is None else f", {rate[name]:.4g} TFLOP/s"
        lines.append(_row(name, f"{_ms(seconds[name])}, {flops[name] / TERA:.4g} TFLOP{speed}"))
    lines += [
        _row("vae_decode", f"{_ms(seconds['vae_decode'])} per block"),
        _row("block_interval", f"{_ms(seconds['block_interval'])} to uint8 frames on the host"),
        _row(
            "p50, p99",
            f"{_ms(seconds['block_interval_p50'])}, {_ms(seconds['block_interval_p99'])}",
        ),
        _row(
            "first_frame",
            f"{_ms(seconds['first_frame']['cold'])} cold, "
            f"{_ms(seconds['first_frame']['warm'])} in a second stream",
        ),
        _row("FPS", f"{fps['dit_only']:.2f} DiT only, {fps['end_to_end']:.2f} end to end"),
        _row("peak_memory", f"{result['peak_memory_bytes'] / 2**30:.2f} GiB"),
    ]
    return "\n".join(lines)


def _row(name: str, value: str) -> str:
    return f"{name.replace('_', ' '):16} {value}"


def _ms(seconds: float | None) -> str:
    return "not run" if seconds is None else f"{1000 * seconds:.2f} ms"


def _processor() -> str:
    return f"CPU {platform.processor() or platform.machine()}, {os.cpu_count()} cores"


# --- entry ---------------------------------------------------------------------------------------


def main(argv: Sequence[str]) -> int:
    """Parse, build, run, print."""
    args = build_parser().parse_intermixed_args(argv)
    set_up_logging(quiet=True)
    check(args)
    pipe = open_pipeline(args)
    watch = Stopwatch(pipe.device)
    pipe = timed(pipe, watch)
    steady = SteadyState.of(pipe)
    skipped = steady.first + 1 + args.warmup  # the clean pass of a block runs in the next one
    measured = run(pipe, watch, skipped=skipped, blocks=args.blocks)
    about, result = setting(pipe, args, steady), figures(pipe, steady, measured)
    print(table(about, result))
    if args.json is not None:
        write_json(args.json, {"setting": about, **result})
    return 0


def check(args: argparse.Namespace) -> None:
    """UserError for flags that make no sense."""
    if args.blocks < 1 or args.warmup < 0:
        raise UserError("--blocks must be at least 1 and --warmup at least 0")
    if args.model is not None and not args.random_weights:
        raise UserError("--model gives sizes for --random_weights; add that flag, or drop --model")
    if args.json is not None and not args.json.resolve().parent.is_dir():
        raise UserError(f"the folder of --json {args.json} does not exist")


def open_pipeline(args: argparse.Namespace) -> VideoPipeline:
    """The pipeline of the command line; `args.preset` becomes the preset that is used, if any."""
    given = [f"{key}={vars(args)[key]}" for key in ("device", "dtype") if vars(args)[key]]
    config = load_config(args.config_path, [*args.overrides, *given])
    if config.schedule == "full":
        raise UserError("a bidirectional model cannot stream; give the config of a causal one")
    args.preset = None
    if not args.random_weights:
        return load_pipeline(config, args.checkpoint_path)
    named = args.model or f"configs/models/{config.generator_name}.json"
    args.preset = find_file(named, "model preset")
    return random_pipeline(config, args.preset)


if __name__ == "__main__":
    sys.exit(run_main(main))
