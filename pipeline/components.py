"""From a configuration to its parts: files, device, dtype, policy, step rule."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.sampling import BlockNoise, OdeStep, Renoise, StepRule
from pipeline.schedule import BlockLayout, Schedule
from utils.config import ROOT, Config, find_file
from utils.errors import UserError
from wan.checkpoints import load_dit_config, memory_estimate
from wan.dit import DiTConfig
from wan.flow import denoising_timesteps
from wan.geometry import VideoShape
from wan.kv_cache import ContextPolicy, KVCache

logger = logging.getLogger(__name__)

GIB = 2**30
VAE_FILE = "Wan2.1_VAE.pth"
TEXT_ENCODER_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
TOKENIZER_FOLDER = Path("google") / "umt5-xxl"


@dataclass(frozen=True)
class ModelFiles:
    """Where the parts of a model folder are, in the official or the diffusers layout."""

    folder: Path
    vae: Path
    text_encoder: Path
    tokenizer: Path

    @classmethod
    def find(cls, config: Config, name: str) -> "ModelFiles":
        """The folder `name` below `model_root` (from here or from the project's root)."""
        places = [base / config.model_root / name for base in (Path(), ROOT)]
        folder = next((place for place in places if place.is_dir()), None)
        if folder is None:
            raise UserError(
                f"the model folder {places[0]} does not exist; fetch it with "
                "`python scripts/download.py` (see `--list`), or set model_root=…"
            )
        if (folder / "transformer").is_dir():
            return cls(folder, folder / "vae", folder / "text_encoder", folder / "tokenizer")
        return cls(folder, folder / VAE_FILE, folder / TEXT_ENCODER_FILE, folder / TOKENIZER_FOLDER)

    def require(self, *paths: Path) -> None:
        """Raise UserError for the first of these that is missing."""
        for path in paths:
            if not path.exists():
                raise UserError(
                    f"{path} is missing; fetch the model again with `python scripts/download.py`"
                )


def find_checkpoint(path: str | Path) -> Path:
    """A weights file, or a folder of safetensors (from here or from the project's root)."""
    for place in (Path(path), ROOT / path):
        if place.is_dir() and any(place.glob("**/*.safetensors")):
            return place
    return find_file(path, "checkpoint")


def choose_device(name: str) -> torch.device:
    """`auto` is the first GPU if there is one; UserError if the device is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device '{name}' is unknown; use cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device '{name}' is not supported; use cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device {name} was asked for but there is no GPU here; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {name} does not exist: there are {torch.cuda.device_count()} GPUs")
    return device


def device_name(device: str) -> str:
    """A device in words, for what was measured on it."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(torch.device(device))
    return f"cpu ({torch.get_num_threads()} threads)"


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on a GPU and float32 elsewhere; UserError for float16 on a CPU."""
    if name == "float16" and device.type == "cpu":
        raise UserError("dtype float16 needs a GPU; use bfloat16 or float32 on the CPU")
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)


def computes_in_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for bfloat16: without them it is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    capabilities: Callable[[], Mapping[str, Any]] = getattr(torch.cpu, "get_capabilities", dict)
    known = capabilities()  # empty before torch 2.12, which cannot tell
    return any(known.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def video_shape(config: Config, dit: DiTConfig) -> VideoShape:
    """Geometry of this configuration's videos."""
    return VideoShape(config.height, config.width, channels=dit.in_dim, patch_size=dit.patch_size)


def block_layout(config: Config) -> BlockLayout:
    """How latent frames fall into blocks."""
    return BlockLayout(config.num_frame_per_block, config.independent_first_frame)


def context_policy(config: Config) -> ContextPolicy:
    """What a pass may look back at."""
    return ContextPolicy(
        config.model_kwargs.sink_size,
        config.attention_frames,
        config.sink_position,
        config.clean_pass_sees_sink,
    )


def level_timesteps(config: Config) -> torch.Tensor:
    """Timestep of each level of a distilled student: `[T]`, float32, on the CPU."""
    steps = config.denoising_step_list or []
    return denoising_timesteps(steps, config.generator_shift, warp=config.warp_denoising_step)


def step_rule(config: Config, noise: BlockNoise, device: torch.device) -> StepRule:
    """How blocks move between levels: `step_rule`, by default what the weights are made for."""
    if config.denoising_step_list is None:
        ode = OdeStep.with_steps(
            config.sampler, config.sampling_steps, config.generator_shift, device
        )
        return Renoise(ode.timesteps, noise) if config.step_rule == "renoise" else ode
    timesteps = level_timesteps(config)
    if config.step_rule == "ode":
        return OdeStep.at(timesteps, device)
    return Renoise(timesteps, noise)


def new_cache(
    config: Config,
    dit: DiTConfig,
    *,
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    recent_frames: int | None = None,
) -> KVCache:
    """An empty cache for `batch` videos; `recent_frames` defaults to what the policy reads."""
    policy, block = context_policy(config), config.num_frame_per_block
    shape = video_shape(config, dit)
    if config.schedule == "full":
        sink, recent = 0, 0
    else:
        sink = policy.sink_frames
        recent = max(recent_frames or 0, policy.recent_capacity(block), block)
    return KVCache(
        num_layers=dit.num_layers,
        num_heads=dit.num_heads,
        head_dim=dit.head_dim,
        tokens_per_frame=shape.tokens_per_frame,
        latent=shape.latent,
        sink_frames=sink,
        recent_frames=recent,
        batch=batch,
        dtype=dtype,
        device=device,
    )


def new_schedule(config: Config, num_blocks: int | None, first_block: int = 0) -> Schedule:
    """The configured sequence of windows; UserError where it cannot be unbounded."""
    kind = config.schedule or "block"
    if kind == "full" and num_blocks is None:
        raise UserError("a bidirectional model needs a number of frames: it cannot stream for ever")
    if kind == "full" and first_block:
        raise UserError("a bidirectional model cannot continue an image or a video")
    return Schedule(kind, config.num_levels, num_blocks, first_block)


def memory_report(config: Config, files: ModelFiles, dtype: torch.dtype, batch: int = 1) -> str:
    """One line: what will be in memory, estimated from sizes alone, before anything is loaded."""
    dit = load_dit_config(files.folder)
    rows = batch if config.distilled else 2 * batch  # guidance runs every video twice
    cache = new_cache(config, dit, batch=rows, dtype=dtype, device=torch.device("meta"))
    text = 0 if config.text_embeddings else _file_bytes(files.text_encoder)
    parts = {
        "transformer": memory_estimate(dit, dtype),
        "cache": cache.num_bytes,
        "VAE": _file_bytes(files.vae) * dtype.itemsize // 4,  # the published file is in fp32
        "text encoder": text * dtype.itemsize // 2,  # and this one in bf16
    }
    listed = ", ".join(f"{name} {_readable(size)}" for name, size in parts.items())
    return f"memory needed: about {_readable(sum(parts.values()))} ({listed}) and activations"


def _readable(size: int) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 2**20:.1f} MiB"


def _file_bytes(path: Path) -> int:
    if path.is_dir():
        return sum(file.stat().st_size for file in path.glob("*.safetensors"))
    return path.stat().st_size if path.is_file() else 0
