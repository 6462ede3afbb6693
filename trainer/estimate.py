"""What a run needs and how long it takes, before it starts: nothing is loaded or allocated."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from model.lora import add_lora
from pipeline.memory import CONTEXT
from pipeline.setup import Setup
from trainer.data import (
    BatchSplit,
    open_heldout_data,
    open_training_data,
    split_batches,
)
from trainer.footprint import Footprint, footprint, is_known
from trainer.networks import sizes_of
from trainer.sharding import shards_of
from trainer.tasks import find_task
from utils.config import ROOT, Config, check_training, config_of, looked_up, to_dict
from utils.datasets import UNLIMITED
from utils.downloads import how_to_get
from utils.errors import UserError
from utils.packages import split_name
from wan.checkpoints import empty_dit
from wan.folders import ModelFolder

GIB = 2**30
FP32 = 4
TFLOPS = 400.0  # per second and rank, assumed where nothing was measured
CARDS = (80.0, 141.0)  # GB
GAPS = 0.05  # of the peak, between tensors: a guess


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
    if checkpoint and not looked_up(checkpoint).exists():
        missing.append(checkpoint)
    return missing


def time_lines(config: Config, split: BatchSplit, found: Footprint, tflops: float) -> list[str]:
    """Operations and time of a step at a rate that is assumed, once all players take turns; hours
    as if they did from the first step on.
    """
    rows = split.accumulation * -(-split.videos // (split.accumulation * split.ranks))
    seconds = found.step_flops * rows / (tflops * 1e12)
    steps = config.max_steps or 1000
    return [
        f"a step: {found.step_flops / 1e12:.3g} TFLOP for each video, {seconds:.3g} s at "
        f"{tflops:g} TFLOP/s per rank (assumed; --tflops); {seconds * steps / 3600:.1f} h for "
        f"{steps:,} steps of {split.videos} videos"
    ]


def disk_lines(config: Config) -> list[str]:
    """What a save takes on the disk."""
    held = {role: parameters(config, role) for role in networks_of(config)}
    states = [
        FP32 * (own.all + (2 + (role == "generator" and config.ema_weight > 0)) * own.trained)
        for role, own in held.items()
        if role in ("generator", "fake_score")
    ]
    if not states:
        return []
    forms = (1 + config.export_safetensors) * (1 + (config.ema_weight > 0))
    return [
        f"disk: {sum(states) / GIB:.2f} GiB for each of {config.keep_checkpoints + 1} states, "
        f"{forms * FP32 * held['generator'].all / GIB:.2f} GiB for each export, every "
        f"{config.log_iters} steps"
    ]


class Parameters(NamedTuple):
    """Of a network: how many there are, and how many of them are trained."""

    all: int
    trained: int


def parameters(config: Config, role: str) -> Parameters:
    """Of the network in a role."""
    dit = empty_dit(sizes_of(config, networks_of(config)[role]))
    if role == "generator" and config.lora is not None:
        add_lora(dit, config.lora.rank, config.lora.alpha, config.lora.targets)
    counts = [(p.numel(), p.requires_grad) for p in dit.parameters()]
    return Parameters(sum(n for n, _ in counts), sum(n for n, trained in counts if trained))


def dry_run_report(
    config: Config,
    world: int,
    local_world: int | None = None,
    *,
    tflops: float = TFLOPS,
    cards: Sequence[float] = CARDS,
) -> str:
    """Validate config and data for `world` ranks and describe what a rank will hold.

    What has to be fetched first, weights or data, is said and need not be here. `tflops`: the rate
    per rank that the hours are computed from; `cards`: GB of memory of the GPUs that are asked for.
    """
    check_training(config)
    batches, setup = split_batches(config, world), planned_setup(config)
    lines = [*data_lines(config, setup), batches.describe(), *batches.notes]
    if is_known(config):
        local = local_world or math.gcd(world, 8)
        found = footprint(config, setup, world, local)
        lines += [f"memory of a rank of {world} (GiB), predicted:", *memory_lines(found)]
        on_cpu = config.device == "cpu"
        for card in () if on_cpu else cards:
            lines += card_lines(config, setup, found, card, world, local)
        lines += [*time_lines(config, batches, found, tflops), *disk_lines(config)]
    else:
        lines.append(f"trainer: {config.trainer} holds no transformer; its memory is not estimated")
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
        path for path in paths if path and split_name(path) is None and not looked_up(path).exists()
    ]


def memory_lines(found: Footprint) -> list[str]:
    """A table of what there is at the peak of each phase, by part."""
    parts = list(dict.fromkeys(part for phase in found.phases for part in phase.parts))
    widths = [max(len(part), 6) for part in parts]
    header = " ".join(f"{part:>{width}}" for part, width in zip(parts, widths, strict=True))
    lines = [f"{'update':10} {'phase':10} {'total':>6} {header}"]
    for phase in found.phases:
        sizes = " ".join(
            f"{phase.parts.get(part, 0) / GIB:{width}.2f}"
            for part, width in zip(parts, widths, strict=True)
        )
        lines.append(f"{phase.player:10} {phase.name:10} {phase.peak / GIB:6.2f} {sizes}")
    return [*lines, f"at most {found.peak / GIB:.2f} GiB per rank"]


def needed(found: Footprint) -> int:
    """Bytes of a GPU, with what its libraries take and gaps between tensors."""
    return round(found.peak * (1 + GAPS)) + CONTEXT


def card_lines(
    config: Config, setup: Setup, found: Footprint, card: float, world: int, local: int
) -> list[str]:
    """Whether it fits into a GPU of so many GB; if not, what each key that helps would change."""
    room = card * 1e9
    said = f"{needed(found) / GIB:.1f} of {room / GIB:.1f} GiB of {world} GPUs of {card:g} GB"
    if needed(found) <= room:
        return [f"fits: {said}"]
    lines = [f"does not fit: {said}, with {GAPS:.0%} for gaps and {CONTEXT / GIB} GiB for CUDA"]
    tried: list[str] = []
    for change in changes(config, world, local):
        size = _needed_with([change], config, setup, world, local)
        if size < needed(found):
            tried.append(change)
            lines.append(f"  {change}: {size / GIB:.1f} GiB{', fits' if size <= room else ''}")
            if size <= room:
                return lines
    if len(tried) > 1:
        size = _needed_with(tried, config, setup, world, local)
        end = "fits" if size <= room else "does not fit: take more or larger GPUs"
        lines.append(f"  all of these: {size / GIB:.1f} GiB, {end}")
    return lines


def changes(config: Config, world: int, local: int) -> list[str]:
    """Keys that may save memory, those that cost least first."""
    keeps_all = not config.gradient_checkpointing
    distils = config.trainer == "score_distillation"
    shards = shards_of(config.sharding_strategy, world, local, config.hybrid_shard_size)
    found = [
        (f"batch_size={config.batch_size // 2}", config.batch_size > 1),
        (
            "text_encoder_device=cpu",
            config.text_encoder_device != "cpu" and not config.text_embeddings,
        ),
        ("gradient_checkpointing=true", keeps_all),
        ("selective_checkpointing=false", not keeps_all and config.selective_checkpointing),
        ("reshard_after_forward=always", config.reshard_after_forward != "always"),
        ("sharding_strategy=full", shards < world),
        ("replayed_backward=true", distils and not config.replayed_backward),
    ]
    return [change for change, helps in found if helps]


def _needed_with(
    overrides: Sequence[str], config: Config, setup: Setup, world: int, local: int
) -> int:
    changed = config_of(to_dict(config), "what would help", overrides)
    return needed(footprint(changed, setup, world, local))
