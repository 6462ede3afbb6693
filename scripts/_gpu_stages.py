"""The stages of `scripts/gpu_check.py` that no other command has: one of them per process.

    python scripts/_gpu_stages.py ceilings --config_path configs/rolling_forcing_dmd.yaml

Sizes come from the config and the model preset, so small ones rehearse every stage on a CPU.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # run by its path: the tree that it lies in comes first
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.benchmark import open_pipeline
from utils.cli import parse_command, run_main, set_up_logging
from utils.files import write_json

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from pipeline import VideoPipeline

TERA, GIGA = 10**12, 10**9
REPEATS = 5
PROFILED_KERNELS = 25


def machine(pipe: VideoPipeline) -> dict[str, Any]:
    """Versions, device, driver and clocks."""
    import torch

    about: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda}
    if pipe.device.type != "cuda":
        return about | {"device": "cpu"}
    properties = torch.cuda.get_device_properties(pipe.device)
    asked = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
    try:
        said = subprocess.run(
            ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        said = "nvidia-smi does not answer"
    return about | {
        "device": properties.name,
        "capability": [properties.major, properties.minor],
        "memory_bytes": properties.total_memory,
        "cudnn": torch.backends.cudnn.version(),
        asked: said,
    }


def ceilings(pipe: VideoPipeline) -> dict[str, Any]:
    """What this device reaches in a copy, and in the matrix products, attentions, convolutions."""
    import torch

    size = 2**28 if pipe.device.type == "cuda" else 2**20
    source = torch.empty(size, dtype=torch.float32, device=pipe.device)
    target = torch.empty_like(source)
    took = seconds_of(lambda: target.copy_(source), pipe.device)
    return {
        "copy_gb_per_second": 2 * source.nbytes / took / GIGA,
        "matmul_tflops": dict(_products(pipe)),
        "attention_tflops": _attentions(pipe),
        "conv3d_tflops": _convolutions(pipe),
    }


def decoding(pipe: VideoPipeline) -> dict[str, Any]:
    """Seconds that the VAE takes for the latents of a block, in several forms."""
    import torch

    latents = torch.zeros(1, pipe.layout.block_frames, *pipe.shape.latent, device=pipe.device)
    decoder = pipe.vae.streaming_decoder()
    decoder.decode(latents)

    def once() -> None:
        decoder.decode(latents)

    found = {"as it is": seconds_of(once, pipe.device)}
    torch.backends.cudnn.benchmark = True
    found["cudnn.benchmark"] = seconds_of(once, pipe.device)
    for weight in pipe.vae.model.parameters():
        if weight.ndim == 5:
            weight.data = weight.data.contiguous(memory_format=torch.channels_last_3d)
    found["cudnn.benchmark, channels_last_3d"] = seconds_of(once, pipe.device)
    return {"seconds": found}


def profile(pipe: VideoPipeline) -> dict[str, Any]:
    """The kernels of one steady block, by their time."""
    import torch
    from torch.profiler import ProfilerActivity

    stream, steady = pipe.open_stream(_text(pipe)), _steady(pipe)
    for _ in range(steady.first + 2):
        next(stream)
    on_gpu = pipe.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with torch.profiler.profile(activities=activities) as run:
        next(stream)
    time_of = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    rows = sorted(run.key_averages(), key=lambda row: -getattr(row, time_of))
    return {
        "milliseconds": {row.key: getattr(row, time_of) / 1000 for row in rows[:PROFILED_KERNELS]},
        "calls": sum(row.count for row in rows),
    }


def training(pipe: VideoPipeline) -> dict[str, Any]:
    """Seconds and memory of a generator's and a critic's step of DMD, all three networks alike."""
    import torch

    from model.dmd import critic_loss, generator_loss, predict_scores
    from model.self_rollout import RolloutDraw, self_rollout
    from pipeline.sampling import BlockNoise
    from pipeline.timing import random_dit

    setup, generator, blocks = pipe.setup, pipe.dit, 7
    critic = random_dit(generator.config, pipe.device, generator.dtype)
    teacher = random_dit(generator.config, pipe.device, generator.dtype)
    for trained in (generator, critic):
        trained.requires_grad_(True).gradient_checkpointing = True
    frames = setup.layout.start(blocks)
    drawn = RolloutDraw("rolling", blocks, (setup.levels.num // 2,) * blocks)
    timesteps = torch.full((1, frames), 500.0, device=pipe.device)
    prompt = _text(pipe).to(pipe.device)

    def rolled_out(*, grad: bool) -> Tensor:
        noise = BlockNoise(setup.counter_noise(), [0], pipe.device)
        with torch.set_grad_enabled(grad):
            text = generator.encode_text(prompt)
            return self_rollout(
                setup, generator, text, noise, drawn, scored_frames=frames, grad=grad
            )

    def generator_step() -> None:
        clip = rolled_out(grad=True)
        with torch.no_grad():
            scores = predict_scores(
                teacher,
                critic,
                torch.randn_like(clip),
                timesteps,
                real_text=teacher.encode_text(torch.cat([prompt, prompt])),
                fake_text=critic.encode_text(prompt),
                guidance_scale=3.0,
            )
        generator_loss(clip, scores).loss.backward()

    def critic_step() -> None:
        clip, text = rolled_out(grad=False), critic.encode_text(prompt)
        critic_loss(critic, clip, torch.randn_like(clip), timesteps, text).loss.backward()

    from pipeline.timing import peak_memory

    return {
        "seconds": {
            "generator": seconds_of(generator_step, pipe.device, repeats=1),
            "critic": seconds_of(critic_step, pipe.device, repeats=1),
        },
        "peak_memory_bytes": peak_memory(pipe.device),
    }


STAGES: dict[str, Callable[[VideoPipeline], dict[str, Any]]] = {
    "machine": machine,
    "ceilings": ceilings,
    "decoding": decoding,
    "profile": profile,
    "training": training,
}


def seconds_of(run: Callable[[], object], device: torch.device, repeats: int = REPEATS) -> float:
    """Median of some runs, after one that is not counted."""
    from pipeline.timing import Stopwatch

    watch = Stopwatch(device)
    run()
    for _ in range(repeats):
        with watch.measure("run"):
            run()
    return statistics.median(watch.seconds("run"))


def _text(pipe: VideoPipeline) -> Tensor:
    import torch

    sizes = pipe.dit.config
    return torch.zeros(1, sizes.text_len, sizes.text_dim, dtype=pipe.dit.dtype)


def _steady(pipe: VideoPipeline) -> Any:
    from pipeline.timing import SteadyState

    return SteadyState.of(pipe.setup.plan(pipe.setup.schedule(None)))


def _products(pipe: VideoPipeline) -> list[tuple[str, float]]:
    """TFLOP/s of the network's four kinds of matrix product, over the tokens of a window."""
    import torch

    sizes = pipe.dit.config
    rows = max(part.frames for own in _steady(pipe).passes for part in own.parts)
    rows *= pipe.shape.tokens_per_frame
    found = []
    for name, n, k, m in (
        ("attention", rows, sizes.dim, sizes.dim),
        ("feed-forward up", rows, sizes.dim, sizes.ffn_dim),
        ("feed-forward down", rows, sizes.ffn_dim, sizes.dim),
        ("text", sizes.text_len, sizes.dim, sizes.dim),
    ):
        x = torch.randn(n, k, dtype=pipe.dit.dtype, device=pipe.device)
        weight = torch.randn(m, k, dtype=pipe.dit.dtype, device=pipe.device)
        took = seconds_of(partial(torch.nn.functional.linear, x, weight), pipe.device)
        found.append((name, 2 * n * k * m / took / TERA))
    return found


def _attentions(pipe: VideoPipeline) -> dict[str, dict[str, float | str]]:
    """TFLOP/s of each kernel in the passes of a steady block; why, where one cannot run."""
    from typing import get_args

    import torch

    from utils.errors import UserError
    from wan.attention import Backend, attention, check_backend

    sizes, found = pipe.dit.config, {}
    for part in (part for own in _steady(pipe).passes for part in own.parts):
        queries, keys = (
            torch.randn(
                (1, frames * pipe.shape.tokens_per_frame, sizes.num_heads, sizes.head_dim),
                dtype=pipe.dit.dtype,
                device=pipe.device,
            )
            for frames in (part.frames, len(part.view.positions))
        )
        flop = 4 * queries.shape[1] * keys.shape[1] * sizes.dim
        rates: dict[str, float | str] = {}
        for backend in get_args(Backend):
            try:
                check_backend(backend, pipe.device, pipe.dit.dtype)
                run = partial(attention, queries, keys, keys, backend=backend)
                took = seconds_of(run, pipe.device)
                rates[backend] = flop / took / TERA
            except (UserError, RuntimeError, ImportError) as error:
                rates[backend] = str(error).partition("\n")[0]
        found[f"{queries.shape[1]} x {keys.shape[1]} tokens"] = rates
    return found


def _convolutions(pipe: VideoPipeline) -> dict[str, float]:
    """TFLOP/s of the decoder's largest convolutions, in both orders of memory."""
    import torch

    channels, found = int(pipe.vae.model.config["base_dim"]), {}
    for shrink in (1, 2):
        c, height, width = channels * shrink, pipe.shape.height, pipe.shape.width
        shape = (1, c, 6, height // shrink, width // shrink)
        conv = torch.nn.Conv3d(c, c, 3, dtype=pipe.dit.dtype, device=pipe.device)
        x = torch.randn(shape, dtype=pipe.dit.dtype, device=pipe.device)
        for order in (torch.contiguous_format, torch.channels_last_3d):
            conv.weight.data = conv.weight.data.contiguous(memory_format=order)
            x = x.contiguous(memory_format=order)
            with torch.no_grad():
                outputs = conv(x).numel()
                took = seconds_of(partial(conv, x), pipe.device)
            name = f"{c} channels, {shape[3]}x{shape[4]}, {str(order).removeprefix('torch.')}"
            found[name] = 2 * outputs * 27 * c / took / TERA
    return found


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("stage", choices=list(STAGES))
    parser.add_argument("--config_path", required=True, help="experiment file")
    parser.add_argument("--model", help="preset of sizes (default: that of the config)")
    parser.add_argument("--device", help="cpu, cuda … (default: a GPU if there is one)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the config")
    parser.set_defaults(random_weights=True, checkpoint_path=None)
    return parser


def main(argv: Sequence[str]) -> int:
    """Run one stage."""
    args = parse_command(build_parser(), argv)
    set_up_logging(quiet=True)
    found = STAGES[args.stage](open_pipeline(args))
    print(found)
    if args.json is not None:
        write_json(args.json, found)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
