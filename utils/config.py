"""Experiment configuration: typed, strict, layered.

`default_config.yaml` <- defaults of the method <- `base` files <- the file <- `key=value`. The
dataclass declares names and types, the YAML files hold every value. An unknown key, a wrong type or
an impossible value ends in one sentence before any weights are read.
"""

import difflib
import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from utils.errors import UserError
from utils.files import write_text

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parent.parent
DEFAULTS = ROOT / "configs" / "default_config.yaml"

Method = Literal["rolling_forcing", "self_forcing", "infinite_forcing"]

# What a publication means by its method. Each value can be overridden on its own.
METHOD_DEFAULTS: dict[str, dict[str, Any]] = {
    "rolling_forcing": {
        "schedule": "rolling",
        "sink_position": "contiguous",
        "clean_pass_sees_sink": False,
        "num_training_frames": 27,
        "rolling_probability": 0.5,
        "model_kwargs": {"sink_size": 3},
    },
    "self_forcing": {
        "schedule": "block",
        "sink_position": "original",
        "clean_pass_sees_sink": True,
        "num_training_frames": 21,
        "rolling_probability": 0.0,
        "model_kwargs": {"sink_size": 0},
    },
    "infinite_forcing": {
        "schedule": "block",
        "sink_position": "contiguous",
        "clean_pass_sees_sink": True,
        "num_training_frames": 21,
        "rolling_probability": 0.0,
        "model_kwargs": {"sink_size": 1},
    },
}

# Keys of the published files that steer nothing in this codebase.
INERT_KEYS = frozenset(
    {
        "gc_interval",
        "causal",
        "ckpt_step",
        "prompt_name",
        "prompt_path",
        "eval_first_n",
        "num_frames",
        "discriminator_lr_multiplier",
    }
)
INERT_SUFFIX = "_fsdp_wrap_strategy"
PLACEHOLDER_KEYS = ("wandb_host", "wandb_key", "wandb_entity", "wandb_project")
LATENT_STRIDE = 8  # `image_or_video_shape` of the published files counts latents of this stride


@dataclass
class ModelKwargs:
    """Options of the student, grouped as in the published files."""

    timestep_shift: float | None
    local_attn_size: int
    sink_size: int


@dataclass
class Sharding:
    """How each network is spread over ranks; null: as `sharding_strategy` says."""

    generator: Literal["full", "hybrid", "hybrid_full", "none"] | None
    real_score: Literal["full", "hybrid", "hybrid_full", "none"] | None
    fake_score: Literal["full", "hybrid", "hybrid_full", "none"] | None
    text_encoder: Literal["full", "hybrid", "hybrid_full", "none"] | None


@dataclass
class Lora:
    """Low-rank adapters instead of full training (arXiv 2106.09685)."""

    rank: int
    alpha: int
    targets: list[str]


@dataclass
class Vae:
    """Sizes of a VAE trained from scratch, and weights of its loss."""

    base_dim: int
    dim_mult: list[int]
    num_res_blocks: int
    kl_weight: float
    l1_weight: float
    edge_weight: float


@dataclass
class Resume:
    """What to do with a run that is there already."""

    force: bool


@dataclass
class Config:
    """Every key of an experiment file; `configs/default_config.yaml` explains each one."""

    # method
    method: Method | None
    schedule: Literal["rolling", "block", "full"] | None
    sink_position: Literal["contiguous", "original"]
    clean_pass_sees_sink: bool
    max_attention_frames: int
    num_frame_per_block: int
    independent_first_frame: bool
    context_noise: float
    model_kwargs: ModelKwargs
    # levels
    denoising_step_list: list[float] | None
    warp_denoising_step: bool
    timestep_shift: float
    num_train_timestep: int
    step_rule: Literal["renoise", "ode"] | None
    sampler: Literal["unipc", "dpm++", "euler"]
    sampling_steps: int
    sampling_guidance_scale: float
    negative_prompt: str
    # networks
    model_root: str
    generator_name: str
    real_name: str
    fake_name: str
    generator_ckpt: str | None
    random_init: bool
    text_embeddings: str | None
    # video
    height: int
    width: int
    image_or_video_shape: list[int]
    fps: int
    num_samples: int
    seed: int
    i2v: bool
    # machine
    device: str
    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    attention_backend: str
    text_encoder_device: str
    # training, objective
    trainer: Literal["score_distillation", "ode", "diffusion", "vae", "text_encoder"]
    distribution_loss: Literal["dmd"]
    denoising_loss_type: Literal["flow"]
    guidance_scale: float
    ts_schedule: bool
    last_step_only: bool
    same_step_across_blocks: bool
    num_training_frames: int
    rolling_probability: float
    reencode_first_frame: bool
    dfake_gen_update_ratio: int
    teacher_forcing: bool
    diffusion_forcing: bool
    window_forcing: bool
    clean_context_noise: float
    prompt_dropout: float
    weighting_scheme: Literal["bell", "none"]
    vae: Vae
    # training, data
    data_path: str | None
    extended_data_path: str | None
    load_raw_video: bool
    heldout_data_path: str | None
    # training, loop
    max_steps: int | None
    batch_size: int
    global_batch_size: int | None
    total_batch_size: int | None
    gradient_accumulation_steps: int | None
    recipe_batch_size: int | None
    log_iters: int
    keep_checkpoints: int
    sample_every: int
    sample_prompts: list[str]
    sample_latent_frames: int
    heldout_every: int
    heldout_videos: int
    resume: Resume
    # training, optimisation
    lr: float
    lr_critic: float
    lr_schedule: Literal["constant", "cosine"]
    lr_warmup_steps: int
    beta1: float
    beta2: float
    beta1_critic: float
    beta2_critic: float
    weight_decay: float
    max_grad_norm: float
    ema_weight: float
    ema_start_step: int
    lora: Lora | None
    # training, memory and speed
    mixed_precision: bool | None
    gradient_checkpointing: bool
    sharding_strategy: Literal["full", "hybrid", "hybrid_full", "none"]
    sharding: Sharding
    hybrid_shard_size: int | None
    compile: bool
    # training, logs
    wandb_host: str | None
    wandb_key: str | None
    wandb_entity: str | None
    wandb_project: str | None

    @property
    def generator_shift(self) -> float:
        """Timestep shift of the student's levels."""
        shift = self.model_kwargs.timestep_shift
        return self.timestep_shift if shift is None else shift

    @property
    def distilled(self) -> bool:
        """Whether the student is sampled in the few levels it was distilled to."""
        return self.denoising_step_list is not None

    @property
    def num_levels(self) -> int:
        """T: the number of levels of a rollout."""
        return len(self.denoising_step_list) if self.denoising_step_list else self.sampling_steps

    @property
    def attention_frames(self) -> int:
        """Frames in one attention."""
        local = self.model_kwargs.local_attn_size
        return local if local > 0 else self.max_attention_frames


_KEYS = [key.name for key in fields(Config)]
TRAINING_KEYS = frozenset(
    {"real_name", "fake_name", "generator_ckpt", "random_init", *_KEYS[_KEYS.index("trainer") :]}
) - {"compile"}
"""Keys that make no difference to a video or its speed, once its weights are there."""


@dataclass
class _Layers:
    """Configuration layers in rising precedence, and where unknown things came from."""

    values: list[dict[str, Any]] = field(default_factory=list)
    inert: set[str] = field(default_factory=set)

    def add(self, layer: Mapping[str, Any]) -> None:
        kept = {}
        for key, value in layer.items():
            placeholder = key in PLACEHOLDER_KEYS and value == key.upper()
            if key in INERT_KEYS or key.endswith(INERT_SUFFIX) or placeholder:
                self.inert.add(key)
            else:
                kept[key] = value
        self.values.append(_with_resolution(kept))


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read an experiment file with `key=value` overrides into a validated `Config`.

    Raises UserError in one sentence for anything wrong.
    """
    path = find_file(path, "config file")
    layers = _Layers()
    files = _read_with_bases(path)
    given = _parse_overrides(overrides)
    method = _find_method(path, [*files, given])
    layers.add(_read_yaml(DEFAULTS))
    if method is not None:
        layers.add({"method": method, **METHOD_DEFAULTS[method]})
    for layer in (*files, given):
        layers.add(layer)
    config = _merge(layers.values, path)
    _validate(config)
    if layers.inert:
        logger.info("%s: without effect here: %s", path.name, ", ".join(sorted(layers.inert)))
    return config


def save_config(config: Config, path: Path) -> None:
    """Write the resolved configuration, without its secret, as YAML; it can be loaded again."""
    write_text(path, OmegaConf.to_yaml(OmegaConf.structured(replace(config, wandb_key=None))))


def to_dict(config: Config) -> dict[str, Any]:
    """The resolved configuration as plain values, without its secret."""
    return OmegaConf.to_container(OmegaConf.structured(replace(config, wandb_key=None)))  # type: ignore[return-value]


def fingerprint(values: Mapping[str, Any]) -> str:
    """A short hash of plain values, the same on every machine."""
    text = OmegaConf.to_yaml(OmegaConf.create(dict(values)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def find_file(path: str | Path, what: str) -> Path:
    """`path` as given, else below the project's root; UserError if it is in neither place."""
    for candidate in (Path(path), ROOT / path):
        if candidate.is_file():
            return candidate
    if Path(path).is_dir():
        raise UserError(f"{what} {path} is a folder; give a file")
    raise UserError(f"{what} {path} does not exist; check the path")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = OmegaConf.to_container(OmegaConf.load(path))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text; save it as UTF-8") from error
    except Exception as error:  # the YAML library has no common base for all that can be wrong
        first = str(error).splitlines()[0]
        raise UserError(f"{path} is not readable as YAML: {first}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold `key: value` lines")
    return values  # type: ignore[return-value]


def _read_with_bases(path: Path) -> list[dict[str, Any]]:
    layers: list[dict[str, Any]] = []
    seen: set[Path] = set()
    current: Path | None = path
    while current is not None:
        if current.resolve() in seen:
            raise UserError(f"{current} is its own base; remove the circle of `base:` lines")
        seen.add(current.resolve())
        layer = _read_yaml(current)
        base = layer.pop("base", None)
        layers.insert(0, layer)
        if base is None:
            return layers
        following = current.parent / base
        if not following.is_file():
            raise UserError(f"{current} names base: {base}, which does not exist beside it")
        current = following
    return layers


def _parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    for item in overrides:
        if "=" not in item or item.startswith(("-", "=")):
            raise UserError(f"'{item}' is not an override; write key=value")
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist(list(overrides)))  # type: ignore[return-value]
    except Exception as error:
        raise UserError(f"overrides are not readable: {str(error).splitlines()[0]}") from error


def _find_method(path: Path, layers: Sequence[Mapping[str, Any]]) -> str | None:
    """The method that the layers name; a foreign file without the key is known by its name."""
    for layer in reversed(layers):
        if layer.get("method") is not None:
            method = str(layer["method"])
            if method not in METHOD_DEFAULTS:
                raise UserError(
                    f"method={method} is unknown; choose one of {', '.join(METHOD_DEFAULTS)}"
                )
            return method
    name = path.stem.lower()
    for pattern, method in (
        (name.startswith("rolling_forcing"), "rolling_forcing"),
        ("vsink" in name, "infinite_forcing"),
        (name.startswith("self_forcing"), "self_forcing"),
    ):
        if pattern:
            logger.info("%s: method %s, taken from the file's name", path.name, method)
            return method
    if any(layer.get("schedule") is not None for layer in layers):
        return None
    raise UserError(
        f"{path.name} does not say which method it is: add method=… ({', '.join(METHOD_DEFAULTS)})"
    )


def _with_resolution(layer: dict[str, Any]) -> dict[str, Any]:
    """Within a layer, `image_or_video_shape` gives the resolution unless height or width do."""
    shape = layer.get("image_or_video_shape")
    if not isinstance(shape, list) or len(shape) != 5:
        return layer
    height, width = (size * LATENT_STRIDE for size in shape[-2:])
    given = layer.get("height", height), layer.get("width", width)
    if given != (height, width):
        raise UserError(
            f"height x width is {given[0]}x{given[1]} but image_or_video_shape means "
            f"{height}x{width}; give one of them, or make them agree"
        )
    return {**layer, "height": height, "width": width}


def _merge(layers: Sequence[Mapping[str, Any]], path: Path) -> Config:
    merged: DictConfig = OmegaConf.structured(Config)
    for layer in layers:
        _check_keys(layer, Config, path)
        try:
            merged.merge_with(OmegaConf.create(dict(layer)))
        except OmegaConfBaseException as error:
            reason = str(error).splitlines()[0].rstrip(".")
            raise UserError(f"{path.name}: {error.full_key or 'config'}: {reason}") from error
    shape = list(merged.image_or_video_shape)
    latent = [merged.height // LATENT_STRIDE, merged.width // LATENT_STRIDE]
    merged.image_or_video_shape = [*shape[:-2], *latent]
    config = OmegaConf.to_object(merged)
    assert isinstance(config, Config)
    return config


def _check_keys(layer: Mapping[str, Any], schema: type, path: Path) -> None:
    """Raise UserError for a key that the schema lacks, naming the nearest one it has."""
    types = get_type_hints(schema)
    for key, value in layer.items():
        if key not in types:
            nearest = difflib.get_close_matches(str(key), types, 1, cutoff=0.0)[0]
            raise UserError(f"{path.name}: unknown key '{key}'; did you mean '{nearest}'?")
        if is_dataclass(types[key]):
            if not isinstance(value, Mapping):
                raise UserError(f"{path.name}: {key} must hold `key: value` lines, not '{value}'")
            _check_keys(value, types[key], path)


def _validate(config: Config) -> None:
    for holds, sentence in (*_video_checks(config), *_training_checks(config)):
        if not holds:
            raise UserError(sentence)
    _validate_window(config)


def _video_checks(config: Config) -> list[tuple[bool, str]]:
    steps = config.denoising_step_list
    return [
        (config.height >= 16 and config.height % 16 == 0, "height must be a multiple of 16"),
        (config.width >= 16 and config.width % 16 == 0, "width must be a multiple of 16"),
        (
            len(config.image_or_video_shape) == 5 and min(config.image_or_video_shape) >= 1,
            "image_or_video_shape must be five sizes: batch, frames, C, H, W",
        ),
        (config.num_frame_per_block >= 1, "num_frame_per_block must be at least 1"),
        (config.max_attention_frames >= 1, "max_attention_frames must be at least 1"),
        (config.model_kwargs.sink_size >= 0, "model_kwargs.sink_size must be at least 0"),
        (
            config.model_kwargs.local_attn_size == -1 or config.model_kwargs.local_attn_size >= 1,
            "model_kwargs.local_attn_size must be -1 or at least 1",
        ),
        (config.fps >= 1, "fps must be at least 1"),
        (config.num_samples >= 1, "num_samples must be at least 1"),
        (config.sampling_steps >= 1, "sampling_steps must be at least 1"),
        (0 <= config.context_noise <= 1000, "context_noise must be between 0 and 1000"),
        (config.generator_shift > 0, "timestep_shift must be above 0"),
        (
            steps is None or (len(steps) > 0 and all(0 < s <= 1000 for s in steps)),
            "denoising_step_list must hold timesteps above 0 and up to 1000",
        ),
        (
            steps is None or all(a > b for a, b in pairwise(steps)),
            "denoising_step_list must fall from step to step",
        ),
    ]


def _training_checks(config: Config) -> list[tuple[bool, str]]:
    most = config.max_steps
    return [
        (most is None or most >= 1, "max_steps must be at least 1"),
        (
            1 <= config.num_train_timestep <= 1000,
            "num_train_timestep must be between 1 and 1000",
        ),
        (config.dfake_gen_update_ratio >= 1, "dfake_gen_update_ratio must be at least 1"),
        (config.batch_size >= 1, "batch_size must be at least 1"),
        (config.log_iters >= 1, "log_iters must be at least 1"),
        (config.keep_checkpoints >= 1, "keep_checkpoints must be at least 1"),
        (config.sample_every >= 0, "sample_every must be at least 0"),
        (config.heldout_every >= 0, "heldout_every must be at least 0"),
        (config.heldout_videos >= 1, "heldout_videos must be at least 1"),
        (
            config.heldout_every == 0 or config.heldout_data_path is not None,
            "heldout_every needs data to measure: set heldout_data_path",
        ),
        (min(config.lr, config.lr_critic) >= 0, "lr and lr_critic must be at least 0"),
        (config.max_grad_norm > 0, "max_grad_norm must be above 0"),
        (config.lora is None or config.lora.rank >= 1, "lora.rank must be at least 1"),
        (0 <= config.rolling_probability <= 1, "rolling_probability must be between 0 and 1"),
        (0 <= config.prompt_dropout <= 1, "prompt_dropout must be between 0 and 1"),
        (
            not (config.window_forcing and (config.teacher_forcing or config.diffusion_forcing)),
            "window_forcing has its own windows and levels: without teacher_forcing and "
            "diffusion_forcing",
        ),
        (
            0 <= config.clean_context_noise <= 1000,
            "clean_context_noise must be between 0 and 1000",
        ),
        (
            config.clean_context_noise == 0 or config.teacher_forcing or config.window_forcing,
            "clean_context_noise needs teacher_forcing or window_forcing",
        ),
        (0 <= config.ema_weight <= 1, "ema_weight must be between 0 and 1"),
    ]


def _validate_window(config: Config) -> None:
    """Frames in one attention must hold the pass itself and the pinned frames."""
    if config.schedule == "full":
        return
    blocks = config.num_levels if config.schedule == "rolling" else 1
    own = blocks * config.num_frame_per_block
    needed = own + config.model_kwargs.sink_size
    if config.attention_frames < needed:
        raise UserError(
            f"{config.attention_frames} frames in one attention are too few: a window has {own} "
            f"frames beside {config.model_kwargs.sink_size} sink frames; raise "
            "max_attention_frames (or model_kwargs.local_attn_size) or use fewer levels"
        )
