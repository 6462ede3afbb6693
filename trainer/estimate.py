"""What a run needs per rank, from sizes alone: nothing is loaded, nothing is allocated."""

import json
from dataclasses import dataclass

import torch

from pipeline.components import ModelFiles, new_cache
from trainer.data import open_training_data, plan_batches
from trainer.networks import compute_dtype
from trainer.sharding import shards_of, strategy_of
from utils.config import ROOT, Config
from wan.checkpoints import empty_dit, load_dit_config
from wan.dit import DiTConfig

GIB = 2**30
FP32 = 4


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

    Trained networks have fp32 weights, two fp32 moments and fp32 gradients; frozen ones their
    weights in the compute dtype.
    """
    count = sum(parameter.numel() for parameter in empty_dit(sizes).parameters())
    shards = shards_of(strategy_of(config, role), world, local_world, config.hybrid_shard_size)
    share = -(-count // shards)
    low = compute_dtype(config)
    if role == "real_score":
        return NetworkMemory(
            role, name, count, shards, share * (low.itemsize if low else FP32), 0, 0, 0
        )
    average = share * FP32 if role == "generator" and config.ema_weight > 0 else 0
    return NetworkMemory(
        role, name, count, shards, share * FP32, 2 * share * FP32, share * FP32, average
    )


def networks_of(config: Config) -> dict[str, str]:
    """Role -> model folder of the networks that a run has."""
    roles = {"generator": config.generator_name}
    if config.trainer == "score_distillation":
        roles |= {"real_score": config.real_name, "fake_score": config.fake_name}
    return roles


def sizes_of(config: Config, name: str) -> DiTConfig:
    """Sizes of a network from its folder, or, if it is not here yet, from `configs/models/`."""
    preset = ROOT / "configs" / "models" / f"{name}.json"
    if preset.is_file() and not (ROOT / config.model_root / name).is_dir():
        return DiTConfig.from_dict(json.loads(preset.read_text(encoding="utf-8")))
    return load_dit_config(ModelFiles.find(config, name).folder)


def cache_bytes(config: Config, sizes: DiTConfig) -> int:
    """KV cache of the longest training rollout."""
    cache = new_cache(
        config,
        sizes,
        batch=config.batch_size,
        dtype=compute_dtype(config) or torch.float32,
        device=torch.device("meta"),
        recent_frames=config.num_training_frames,
    )
    return cache.num_bytes


def dry_run_report(config: Config, world: int, local_world: int | None = None) -> str:
    """Validate config and data for `world` ranks and describe what a rank will hold."""
    plan = plan_batches(config, world)
    dataset = open_training_data(config)
    local = local_world or min(world, 8)
    lines = [f"data: {len(dataset)} items in {config.data_path}", plan.describe(), *plan.notes]
    lines.append(f"memory per rank of {world} (GiB), without activations:")
    header = f"{'network':12} {'folder':20} {'parameters':>14} {'shards':>6}"
    lines.append(f"{header} {'weights':>8} {'adam':>8} {'grads':>8} {'ema':>8} {'total':>8}")
    total = 0
    for role, name in networks_of(config).items():
        memory = network_memory(config, role, name, sizes_of(config, name), world, local)
        parts = (memory.weights, memory.optimiser, memory.gradients, memory.average, memory.total)
        numbers = " ".join(f"{size / GIB:8.2f}" for size in parts)
        lines.append(f"{role:12} {name:20} {memory.parameters:14,} {memory.shards:6} {numbers}")
        total += memory.total
    if config.trainer == "score_distillation":
        cache = cache_bytes(config, sizes_of(config, config.generator_name))
        lines.append(f"{'KV cache':64} {cache / GIB:8.2f}".rstrip())
        total += cache
    lines.append(f"all together {total / GIB:.2f} GiB per rank")
    return "\n".join(lines)
