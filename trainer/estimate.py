"""What a run needs per rank, from sizes alone: nothing is loaded, nothing is allocated."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from model.lora import add_lora
from model.self_rollout import rollout_flops
from pipeline.setup import Setup
from trainer.data import (
    BatchSplit,
    open_heldout_data,
    open_training_data,
    split_batches,
)
from trainer.networks import sizes_of
from trainer.sharding import shards_of, strategy_of
from trainer.tasks import find_task
from trainer.tasks.base import rollout_recipe
from utils.config import ROOT, Config, check_training
from utils.datasets import UNLIMITED
from utils.downloads import how_to_get
from utils.errors import UserError
from utils.packages import split_name
from wan.checkpoints import empty_dit
from wan.dit import DiTConfig
from wan.flops import forward_flops, training_flops
from wan.folders import ModelFolder

GIB = 2**30
FP32 = 4
TFLOPS = 400.0  # per second and rank, assumed where nothing was measured


@dataclass(frozen=True)
class NetworkMemory:
    """Bytes per rank that one network's weights and optimiser take."""

    role: str
    name: str
    parameters: int
    shards: int
    weights: int
    optimiser: int
    gradients: int
    average: int

    @property
    def total(self) -> int:
        """Everything, per rank."""
        return self.weights + self.optimiser + self.gradients + self.average


def network_memory(
    config: Config, role: str, name: str, sizes: DiTConfig, world: int, local_world: int
) -> NetworkMemory:
    """Weights, Adam moments, gradients and average of one network, per rank.

    The student and the critic have fp32 weights, and what is trained of them (with LoRA the
    adapters) two fp32 moments, an fp32 gradient and, for the student, an fp32 average; the teacher
    has its weights in the compute dtype.
    """
    dit = empty_dit(sizes)
    frozen = role in ("real_score", "target")
    if role == "generator" and config.lora is not None:
        add_lora(dit, config.lora.rank, config.lora.alpha, config.lora.targets)
    count = sum(p.numel() for p in dit.parameters())
    trained = 0 if frozen else sum(p.numel() for p in dit.parameters() if p.requires_grad)
    shards = shards_of(strategy_of(config, role), world, local_world, config.hybrid_shard_size)
    share, moving = -(-count // shards), -(-trained // shards) * FP32
    size = planned_dtype(config).itemsize if role == "real_score" else FP32
    average = moving if role == "generator" and config.ema_weight > 0 else 0
    return NetworkMemory(role, name, count, shards, share * size, 2 * moving, moving, average)


def planned_dtype(config: Config) -> torch.dtype:
    """What a run computes in on GPUs, for which it is planned."""
    return torch.float32 if config.mixed_precision is False else torch.bfloat16


def networks_of(config: Config) -> dict[str, str]:
    """Role -> model folder of the transformers that a run has."""
    return find_task(config.trainer).networks(config)


def planned_setup(config: Config) -> Setup:
    """The setup of a run, also of one whose model folder is not here yet."""
    folder = model_folder(config, config.generator_name)
    if folder is not None:
        return Setup.of(config, folder=folder)
    return Setup.of(config, sizes=sizes_of(config, config.generator_name))


def model_folder(config: Config, name: str) -> ModelFolder | None:
    """A model folder, if it is here yet."""
    try:
        return ModelFolder.find(config.model_root, name)
    except UserError:
        return None


def missing_weights(config: Config) -> list[str]:
    """Weights that the run will need and that have not been fetched."""
    names = sorted(set(networks_of(config).values()))
    missing = [
        f"{config.model_root}/{name}" for name in names if model_folder(config, name) is None
    ]
    checkpoint = config.generator_ckpt
    if checkpoint and not any((base / checkpoint).is_file() for base in (Path(), ROOT)):
        missing.append(checkpoint)
    return missing


def cache_bytes(config: Config, setup: Setup) -> int:
    """KV cache of the longest training rollout; two of what passes look back at, if replayed."""
    cache = setup.cache(
        setup.sizes,
        batch=config.batch_size,
        dtype=planned_dtype(config),
        device=torch.device("meta"),
        recent_frames=None if config.replayed_backward else config.num_training_frames,
    )
    return cache.num_bytes * (2 if config.replayed_backward else 1)


@dataclass(frozen=True)
class Operations:
    """Floating-point operations that one video takes on average.

    In an update of the generator, in one of the critic, and in a step.
    """

    generator: float
    critic: float
    step: float


def operations(config: Config) -> Operations:
    """Of a distillation, as the loop counts them; over the rollouts that its first updates draw."""
    setup, updates = planned_setup(config), 300
    student, teacher = (sizes_of(config, n) for n in (config.generator_name, config.real_name))
    frames, tokens = config.image_or_video_shape[1], setup.shape.tokens_per_frame
    recipe, twice = rollout_recipe(config), config.gradient_checkpointing
    drawn = Counter(recipe.draw(setup.layout, update) for update in range(updates))

    def rollout(*, grad: bool) -> float:
        each = (
            count
            * rollout_flops(
                setup, student, one, scored_frames=frames, grad=grad, checkpointing=twice
            )
            for one, count in drawn.items()
        )
        return sum(each) / updates

    own = forward_flops(student, frames, frames, tokens)
    scores = own + 2 * forward_flops(teacher, frames, frames, tokens)
    generator = rollout(grad=True) + scores
    critic = rollout(grad=False) + training_flops(own, checkpointing=twice)
    return Operations(generator, critic, generator / config.dfake_gen_update_ratio + critic)


def time_lines(config: Config, split: BatchSplit, tflops: float) -> list[str]:
    """Operations and time of a step at a rate that is assumed; none where they are not counted."""
    if config.trainer != "score_distillation":
        return []
    per_video = operations(config).step
    own = per_video * split.accumulation * -(-split.videos // (split.accumulation * split.ranks))
    seconds = own / (tflops * 1e12)
    steps = config.max_steps or 1000
    return [
        f"a step: {per_video / 1e12:.0f} TFLOP for each video, {seconds:.0f} s at {tflops:g} "
        f"TFLOP/s per rank (assumed; --tflops); {seconds * steps / 3600:.1f} h for {steps:,} steps"
    ]


def disk_lines(config: Config) -> list[str]:
    """What a save takes on the disk."""
    held = {
        role: network_memory(config, role, name, sizes_of(config, name), 1, 1)
        for role, name in networks_of(config).items()
        if role != "real_score"
    }
    if not held:
        return []
    state = sum(each.weights + each.optimiser + each.average for each in held.values())
    forms = (1 + config.export_safetensors) * (1 + (config.ema_weight > 0))
    return [
        f"disk: {state / GIB:.2f} GiB for each of {config.keep_checkpoints + 1} states, "
        f"{forms * held['generator'].weights / GIB:.2f} GiB for each export, every "
        f"{config.log_iters} steps"
    ]


def dry_run_report(
    config: Config, world: int, local_world: int | None = None, *, tflops: float = TFLOPS
) -> str:
    """Validate config and data for `world` ranks and describe what a rank will hold.

    What has to be fetched first, weights or data, is said and need not be here. `tflops`: the rate
    per rank that the hours are computed from.
    """
    check_training(config)
    batches, setup = split_batches(config, world), planned_setup(config)
    lines = [*data_lines(config, setup), batches.describe(), *batches.notes]
    memory = memory_lines(config, setup, world, local_world or min(world, 8))
    if memory:
        lines += [f"memory per rank of {world} (GiB), without activations:", *memory]
    else:
        lines.append(f"trainer: {config.trainer} holds no transformer; its memory is not estimated")
    lines += [*time_lines(config, batches, tflops), *disk_lines(config)]
    lines += [
        f"not here yet: {missing} ({how_to_get(missing, ROOT)})"
        for missing in (*missing_weights(config), *missing_data(config))
    ]
    return "\n".join(lines)


def data_lines(config: Config, setup: Setup) -> list[str]:
    """What is trained and measured on, as far as it is here; UserError if it is of no use."""
    task, missing = find_task(config.trainer), missing_data(config)
    lines = []
    if config.data_path not in missing and config.extended_data_path not in missing:
        data = open_training_data(config, setup)
        task.check_data(config, setup, data)
        items = "items without end" if len(data) >= UNLIMITED else f"{len(data)} items"
        lines.append(f"data: {items} in {config.data_path}")
    if config.heldout_data_path not in missing:
        heldout = open_heldout_data(config, setup, task.check_items)
        if heldout is not None:
            measured = min(config.heldout_videos, len(heldout))
            lines.append(f"held-out data: {measured} items of {config.heldout_data_path}")
    return lines


def missing_data(config: Config) -> list[str]:
    """Files and folders of data that the run will need and that are not here."""
    heldout = config.heldout_data_path if config.heldout_every else None
    paths = (config.data_path, config.extended_data_path, heldout)
    return [
        path
        for path in paths
        if path
        and split_name(path) is None
        and not any((b / path).exists() for b in (Path(), ROOT))
    ]


def memory_lines(config: Config, setup: Setup, world: int, local: int) -> list[str]:
    """A table of what each network takes, and what there is beside them; none without networks."""
    header = f"{'network':12} {'folder':20} {'parameters':>14} {'shards':>6}"
    lines = [f"{header} {'weights':>8} {'adam':>8} {'grads':>8} {'ema':>8} {'total':>8}"]
    total = 0
    for role, name in networks_of(config).items():
        memory = network_memory(config, role, name, sizes_of(config, name), world, local)
        parts = (memory.weights, memory.optimiser, memory.gradients, memory.average, memory.total)
        numbers = " ".join(f"{size / GIB:8.2f}" for size in parts)
        lines.append(f"{role:12} {name:20} {memory.parameters:14,} {memory.shards:6} {numbers}")
        total += memory.total
    if total == 0:
        return []
    if config.trainer == "score_distillation":
        cache = cache_bytes(config, setup)
        lines.append(f"{'KV cache':64} {cache / GIB:8.2f}".rstrip())
        total += cache
    lines.append(f"all together {total / GIB:.2f} GiB per rank")
    if setup.folder is not None and not config.text_embeddings:
        where = "on the CPU" if config.text_encoder_device == "cpu" else "before sharding"
        file = setup.folder.text_encoder
        text = file.stat().st_size / GIB if file.is_file() else 0.0
        lines.append(f"not counted: the text encoder, {text:.2f} GiB in its file, {where}")
    return lines
