"""The report of `scripts/benchmark.py --train`: seconds, operations and memory of each phase.

Updates are real ones (`trainer/timing.py`). Operations are those of the transformers, as the tasks
count them: matrix products and attention of all passes, a backward pass as two, with what
checkpointing and replaying compute once more; masked attention in full; no text, no VAE. Their
share is of the fastest of these networks' matrix products on the same device, measured just before.

Where nothing can run, the same phases are counted on tensors without memory
(`trainer/footprint.py`), and their seconds predicted at a rate.
"""

from __future__ import annotations

import statistics
import tempfile
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from scripts._ceilings import products
from scripts._machine import machine
from trainer.data import BatchSplit, split_batches
from trainer.estimate import networks_of, planned_setup
from trainer.footprint import footprint, is_known
from trainer.networks import compute_dtype, sizes_of
from trainer.sharding import open_world
from trainer.timing import BESIDE, TimedTrainer, Update, drawn_setup, opened, timed_config
from trainer.updates import NonFiniteError
from utils.config import Config
from utils.devices import choose_device
from utils.errors import UserError
from wan.checkpoints import empty_dit

TERA, GIB = 10**12, 2**30
UPDATE = "update"
STEPS = 1000  # of a recipe that does not say
RANKS_OF_A_NODE = 8
MOST_PARAMETERS_ON_CPU = 5 * 10**8  # of a network


# --- measuring -----------------------------------------------------------------------------------


def measure(config: Config, *, drawn: bool, updates: int, warmup: int) -> dict[str, Any] | None:
    """All figures as plain values, on the main rank; `warmup` updates of each kind do not count.

    `drawn`: of weights and data that are drawn.

    Raises:
        UserError: it cannot be run, or an update was not finite.
    """
    steps, config = config.max_steps, timed_config(config)
    limit = max(config.first_step_timeout, config.collective_timeout)
    with tempfile.TemporaryDirectory() as folder, open_world(config.device, limit=limit) as world:
        peak = peak_rate(config, world.device)
        trainer = opened(config, world, Path(folder), drawn=drawn)
        try:
            trainer.run(warmup + updates)
        except NonFiniteError as error:
            raise UserError(f"there is nothing to measure: {error}") from error
        finally:
            trainer.close()
        found: list[list[Update]] = [[]] * world.size
        dist.all_gather_object(found, trainer.made)
        if not world.is_main:
            return None
        kinds = {kind: _figures(found, kind, warmup, peak) for kind in (*trainer.cycle(), BESIDE)}
        return {
            "setting": _setting(trainer, drawn=drawn, updates=updates, warmup=warmup),
            "machine": machine(world.device),
            "peak_tflops_per_second": peak and peak / TERA,
            "updates": kinds,
            "step": _step(trainer, kinds, steps),
        }


def peak_rate(config: Config, device: torch.device) -> float | None:
    """Operations per second of the fastest matrix product of the transformers on a device."""
    names = set(networks_of(config).values())
    if not names:
        return None
    dtype = compute_dtype(config, device) or torch.float32
    rows = config.image_or_video_shape[1] * drawn_setup(config).shape.tokens_per_frame
    return TERA * max(
        rate
        for name in names
        for rate in products(sizes_of(config, name), rows, dtype, device).values()
    )


def _figures(
    found: Sequence[Sequence[Update]], kind: str, warmup: int, peak: float | None
) -> dict[str, Any]:
    """Of the updates of a kind, by phase: of every rank the mean time, the most memory of all."""
    by_rank = [[each for each in made if each.kind == kind][warmup:] for made in found]
    made = list(zip(*by_rank, strict=True))
    names = dict.fromkeys(phase for ranks in made for phase in ranks[0].seconds)
    seconds: defaultdict[str, list[float]] = defaultdict(list)
    memory: dict[str, int] = {}
    flops: Counter[str] = Counter()
    for ranks in made:
        for phase in names:  # not all updates have all of them
            seconds[phase].append(statistics.mean(each.seconds.get(phase, 0.0) for each in ranks))
        seconds[UPDATE].append(statistics.mean(sum(each.seconds.values()) for each in ranks))
        for phase, count in ranks[0].flops.items():
            flops[phase] += count / len(made)
        for phase, size in (pair for each in ranks for pair in each.memory.items()):
            memory[phase] = max(size, memory.get(phase, 0))
    flops[UPDATE] = sum(flops.values())
    memory[UPDATE] = max(memory.values())
    return {
        phase: _phase(spans, flops[phase], memory.get(phase), peak)
        for phase, spans in seconds.items()
    }


def _phase(
    spans: Sequence[float], flops: float, memory: int | None, peak: float | None
) -> dict[str, Any]:
    """The figures of a phase: `flops` the mean, over `spans` of so many seconds."""
    rate = flops / statistics.mean(spans) if flops else None
    return {
        "seconds": {"median": statistics.median(spans), "min": min(spans), "max": max(spans)},
        "raw_seconds": list(spans),
        "tflop": flops / TERA if flops else None,
        "tflops_per_second": rate and rate / TERA,
        "share_of_peak": rate and peak and rate / peak,
        "peak_memory_bytes": memory,
    }


def _step(
    trainer: TimedTrainer, kinds: dict[str, dict[str, Any]], max_steps: int | None
) -> dict[str, Any]:
    """What a step takes, the mean over a cycle of updates; and the recipe."""
    config, cycle = trainer.config, trainer.cycle()
    steps = config.dfake_gen_update_ratio if len(trainer.task.players) > 1 else 1
    seconds = kinds[BESIDE][UPDATE]["seconds"]["median"]
    for kind, count in cycle.items():
        own = kinds[kind][UPDATE]
        took = own["seconds"]["median"]
        if own["tflop"]:  # rollouts are of many lengths: not of those that happened to be drawn
            took = trainer.usual_flops(kind) / TERA / own["tflops_per_second"]
        seconds += count * took / steps
    return _recipe(config, trainer.batch_split, seconds, max_steps)


def _recipe(
    config: Config, split: BatchSplit, seconds: float, max_steps: int | None
) -> dict[str, Any]:
    """What follows from the seconds of a step, as if all were such: also a critic's warm-up."""
    recipe, steps_of_recipe = config.recipe_batch_size or split.videos, max_steps or STEPS
    return {
        "seconds": seconds,
        "videos_per_second_per_rank": split.videos / seconds / split.ranks,
        "recipe": {"steps": steps_of_recipe, "videos_per_update": recipe},
        "hours": seconds * steps_of_recipe * recipe / split.videos / 3600,
    }


def _setting(trainer: TimedTrainer, *, drawn: bool, updates: int, warmup: int) -> dict[str, Any]:
    """What the figures hold for."""
    config, device = trainer.config, trainer.world.device
    on_gpu = device.type == "cuda"
    return {
        "trainer": config.trainer,
        "networks": ", ".join(f"{role} {name}" for role, name in networks_of(config).items()),
        "weights_and_data": "random" if drawn else "those of the config",
        "latent_frames": config.image_or_video_shape[1],
        "resolution": [config.width, config.height],
        "videos_per_update": trainer.batch_split.describe(),
        "sharding": config.sharding_strategy,
        "computed_in": trainer.computed_in.removeprefix("torch."),
        "gradient_checkpointing": config.gradient_checkpointing,
        "replayed_backward": config.replayed_backward,
        "compiled": config.compile,
        "memory": "CUDA max_memory_allocated" if on_gpu else "peak resident set of the process",
        "warmup_updates": warmup,
        "measured_updates": updates,
    }


# --- counting ------------------------------------------------------------------------------------


def is_too_large(config: Config) -> bool:
    """Whether networks of this size are only counted here: on a CPU an update would take days."""
    if choose_device(config.device).type != "cpu":
        return False
    parameters = (
        sum(weight.numel() for weight in empty_dit(sizes_of(config, name)).parameters())
        for name in set(networks_of(config).values())
    )
    return max(parameters, default=0) > MOST_PARAMETERS_ON_CPU


def count(config: Config, ranks: int, tflops: float) -> dict[str, Any]:
    """Operations and memory of each phase on one of `ranks` ranks, as plain values; nothing runs.

    Seconds are operations at a rate of `tflops`: what moves bytes, between GPUs too, takes none.

    Raises:
        UserError: it trains something else than transformers.
    """
    if not is_known(config):
        raise UserError(
            f"trainer: {config.trainer} holds no transformer, whose updates alone are counted"
        )
    split = split_batches(config, ranks)
    found = footprint(config, planned_setup(config), ranks, min(ranks, RANKS_OF_A_NODE))
    share = split.accumulation * -(-split.videos // (split.accumulation * ranks))
    players: dict[str, dict[str, Any]] = {name: {} for name in found.flops}
    for phase in found.phases:
        flops = share * found.flops[phase.player].get(phase.name, 0) / TERA
        players[phase.player][phase.name] = _counted(flops, tflops, phase.peak)
    seconds = 0.0
    for name, phases in players.items():
        flops = sum(each["tflop"] or 0 for each in phases.values())
        peak = max(each["peak_memory_bytes"] for each in phases.values())
        phases[UPDATE] = _counted(flops, tflops, peak)
        seconds += found.updates[name] * flops / tflops
    return {
        "tflops_per_second": tflops,
        "ranks": split.describe(),
        "updates": players,
        "step": _recipe(config, split, seconds, config.max_steps),
    }


def _counted(tflop: float, tflops: float, memory: int) -> dict[str, Any]:
    """The figures of a phase; without operations no seconds are predicted."""
    return {
        "tflop": tflop or None,
        "predicted_seconds": tflop / tflops or None,
        "peak_memory_bytes": memory,
    }


# --- as text -------------------------------------------------------------------------------------


HEADER = (
    f"  {'phase':12} {'seconds':>9}  {'(min to max)':21} {'TFLOP':>9} {'TFLOP/s':>9} "
    f"{'of peak':>8} {'peak GiB':>9}"
)


def table(result: dict[str, Any]) -> str:
    """The report as text."""
    lines = [f"{key.replace('_', ' ')}: {value}" for key, value in result["setting"].items()]
    if peak := result["peak_tflops_per_second"]:
        lines.append(f"peak: {peak:.4g} TFLOP/s, the fastest matrix product of these networks here")
    for kind, phases in result["updates"].items():
        lines += ["", f"{kind} (each rank's share)", HEADER]
        lines += [row(phase, figures) for phase, figures in phases.items()]
    return "\n".join([*lines, "", f"a step: {_said(result['step'])}"])


def prediction(counted: dict[str, Any]) -> str:
    """What was counted as text."""
    lines = [
        f"predicted, not measured, of {counted['ranks']}: seconds at "
        f"{counted['tflops_per_second']:g} TFLOP/s, elementwise work and communication left out; "
        "memory as allocated, counted on fake tensors"
    ]
    for player, phases in counted["updates"].items():
        lines += ["", f"{player} (each rank's share)"]
        lines.append(f"  {'phase':12} {'predicted s':>11} {'TFLOP':>9} {'peak GiB':>9}")
        for phase, figures in phases.items():
            numbers = 21 * " "
            if figures["tflop"]:
                numbers = f"{figures['predicted_seconds']:11.4g} {figures['tflop']:9.4g}"
            lines.append(f"  {phase:12} {numbers} {figures['peak_memory_bytes'] / GIB:9.2f}")
    return "\n".join([*lines, "", f"a step, predicted: {_said(counted['step'])}"])


def _said(step: dict[str, Any]) -> str:
    recipe = step["recipe"]
    return (
        f"{step['seconds']:.4g} s, {step['videos_per_second_per_rank']:.4g} videos per second and "
        f"rank; {step['hours']:.3g} hours for {recipe['steps']:,} steps of "
        f"{recipe['videos_per_update']} videos on these ranks"
    )


def row(phase: str, figures: dict[str, Any]) -> str:
    """A line of the table."""
    seconds = figures["seconds"]
    spread = f"({seconds['min']:.3g} to {seconds['max']:.3g})"
    line = f"  {phase:12} {seconds['median']:9.4g}  {spread:21}"
    if figures["tflop"] is None:
        line += 29 * " "
    else:
        line += f" {figures['tflop']:9.4g} {figures['tflops_per_second']:9.4g}"
        line += f" {figures['share_of_peak']:8.1%}"
    memory = figures["peak_memory_bytes"]
    return line if memory is None else f"{line} {memory / GIB:9.2f}"
