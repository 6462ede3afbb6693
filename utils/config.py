"""Experiment configuration: typed, strict, layered.

Defaults <- those of the method <- `base` files <- the file <- `key=value`. `utils/config_schema.py`
declares the keys. An unknown key, a wrong type or an impossible value ends in one sentence before
any weights are read.
"""

import difflib
import hashlib
import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, is_dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from utils.config_schema import (
    FREE_KEYS,
    LATENT_STRIDE,
    METHOD_DEFAULTS,
    ROUNDING_KEYS,
    VIDEO_KEYS,
    Bounds,
    Config,
    declared,
)
from utils.downloads import how_to_get
from utils.errors import UserError
from utils.files import write_text
from utils.packages import split_name
from utils.strict_yaml import parse_value, read_yaml

__all__ = [
    "FREE_KEYS",
    "METHOD_DEFAULTS",
    "ROOT",
    "ROUNDING_KEYS",
    "VIDEO_KEYS",
    "Config",
    "check_config",
    "check_training",
    "config_of",
    "find_file",
    "fingerprint",
    "load_config",
    "save_config",
    "save_resolved",
    "to_dict",
]

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parent.parent

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
TRAINERS = ("score_distillation", "ode", "diffusion", "consistency", "vae")  # of trainer/tasks
NEAR = 0.6  # how alike a key has to be to be what was meant


@dataclass(frozen=True)
class _Layer:
    """Values of one file or of the overrides, and its name."""

    source: str
    values: dict[str, Any]


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read an experiment file with `key=value` overrides into a validated `Config`.

    Raises UserError in one sentence for anything wrong.
    """
    path = find_file(path, "config file")
    given = _parse_overrides(overrides)
    layers = [*_read_with_bases(path), _Layer(path.name, given)]
    inert = {key for layer in layers for key in layer.values if _is_inert(key, layer.values[key])}
    layers = [_live(layer) for layer in layers]
    _check_keys(layers)
    method = _find_method(path, layers)
    if method is not None:
        layers.insert(0, _Layer(method, {"method": method, **METHOD_DEFAULTS[method]}))
    config = _merge(layers)
    check_config(config)
    if inert:
        logger.info("%s: without effect here: %s", path.name, ", ".join(sorted(inert)))
    return config


def config_of(values: Mapping[str, Any], what: str, overrides: Sequence[str] = ()) -> Config:
    """A validated `Config` of plain values, such as a record holds; the other keys are defaults.

    Raises UserError, naming `what`, for anything wrong.
    """
    layers = [_Layer(what, dict(values)), _Layer(what, _parse_overrides(overrides))]
    _check_keys(layers)
    config = _merge(layers)
    check_config(config)
    return config


def save_config(config: Config, path: Path) -> None:
    """Write the resolved configuration, without its secret, as YAML; it can be loaded again."""
    save_resolved(to_dict(config), path)


def save_resolved(values: Mapping[str, Any], path: Path) -> None:
    """Write a configuration that `to_dict` gave, as `save_config` does."""
    write_text(path, OmegaConf.to_yaml(OmegaConf.create(dict(values))))


def to_dict(config: Config) -> dict[str, Any]:
    """The resolved configuration as plain values, without its secret."""
    return asdict(replace(config, wandb_key=None))


def fingerprint(values: Mapping[str, Any]) -> str:
    """A short hash of plain values, the same on every machine."""
    text = OmegaConf.to_yaml(OmegaConf.create(dict(values)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def find_file(path: str | Path, what: str) -> Path:
    """`path` as given, else below the project's root; UserError if it is in neither place."""
    try:
        for candidate in (Path(path), ROOT / path):
            if candidate.is_file():
                return candidate
        if Path(path).is_dir():
            raise UserError(f"{what} {path} is a folder; give a file")
    except OSError as error:  # no permission, a name too long
        raise UserError(f"{what} {path} cannot be read: {error.strerror}") from error
    if not (ROOT / "configs" / "default_config.yaml").is_file():
        raise UserError(
            f"{what} {path} does not exist: configs and weights are looked for in the checkout "
            "where `pip install -e .` was run, and this is an installation without -e"
        )
    raise UserError(f"{what} {path} does not exist; {how_to_get(path, ROOT)}")


def looked_up(path: str | Path) -> Path:
    """`path` as given, or below the project's root if it is only there."""
    given = Path(path)
    return given if given.exists() or not (ROOT / path).exists() else ROOT / path


# --- layers -------------------------------------------------------------------------------------


def _read_with_bases(path: Path) -> list[_Layer]:
    layers: list[_Layer] = []
    seen: set[Path] = set()
    current: Path | None = path
    while current is not None:
        if current.resolve() in seen:
            raise UserError(f"{current} is its own base; remove the circle of `base:` lines")
        seen.add(current.resolve())
        values = read_yaml(current)
        base = values.pop("base", None)
        layers.insert(0, _Layer(current.name, values))
        if base is None:
            return layers
        if not isinstance(base, str):
            raise UserError(f"{current} names base: {base}, which is no name of a file")
        following = current.parent / base
        if not following.is_file():
            raise UserError(f"{current} names base: {base}, which does not exist beside it")
        current = following
    return layers


def _parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """`a.b=value` as nested values; of the same key the last one holds."""
    nested: dict[str, Any] = {}
    for item in overrides:
        name, equals, text = item.partition("=")
        *groups, last = name.strip().split(".")
        if not equals or name.startswith("-") or not all((*groups, last)):
            raise UserError(f"'{item}' is not an override; write key=value")
        if name == "base":
            raise UserError("base names the file below another one: write it there")
        value = parse_value(text, f"the override {item} is not readable")
        place = nested
        for group in groups:
            if not isinstance(place.get(group), dict):
                place[group] = {}
            place = place[group]
        place[last] = value
    return nested


def _is_inert(key: str, value: object) -> bool:
    placeholder = key.startswith("wandb_") and value == key.upper()  # of the published files
    return placeholder or key in INERT_KEYS or key.endswith(INERT_SUFFIX)


def _live(layer: _Layer) -> _Layer:
    kept = {k: v for k, v in layer.values.items() if not _is_inert(k, v)}
    return _Layer(layer.source, _with_resolution(kept))


def _find_method(path: Path, layers: Sequence[_Layer]) -> str | None:
    """The method that the layers name; a foreign file without the key is known by its name."""
    for layer in reversed(layers):
        if layer.values.get("method") is not None:
            method = str(layer.values["method"])
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
    if any(layer.values.get("schedule") is not None for layer in layers):
        return None
    raise UserError(
        f"{path.name} does not say which method it is: add method=… ({', '.join(METHOD_DEFAULTS)})"
    )


def _with_resolution(values: dict[str, Any]) -> dict[str, Any]:
    """Within a layer, `image_or_video_shape` gives the resolution unless height or width do."""
    shape = values.get("image_or_video_shape")
    if not isinstance(shape, list) or [type(size) for size in shape] != [int] * 5:
        return values
    height, width = (size * LATENT_STRIDE for size in shape[-2:])
    given = values.get("height", height), values.get("width", width)
    if given != (height, width):
        raise UserError(
            f"height x width is {given[0]}x{given[1]} but image_or_video_shape means "
            f"{height}x{width}; give one of them, or make them agree"
        )
    return {**values, "height": height, "width": width}


def _merge(layers: Sequence[_Layer]) -> Config:
    merged = deepcopy(_defaults())
    for layer in layers:
        _check_forms(layer.values, Config, f"{layer.source}: ")
        _merge_values(merged, layer.values, layer.source)
    shape = list(merged.image_or_video_shape)
    latent = [merged.height // LATENT_STRIDE, merged.width // LATENT_STRIDE]
    merged.image_or_video_shape = [*shape[:-2], *latent]
    config = OmegaConf.to_object(merged)
    assert isinstance(config, Config)
    return config


def _merge_values(merged: DictConfig, values: Mapping[str, Any], source: str) -> None:
    """All at once, which is quick; if that fails, one by one for the name of the one at fault."""
    try:
        merged.merge_with(OmegaConf.create(dict(values)))
    except (OmegaConfBaseException, ValueError, TypeError, ArithmeticError) as error:
        if len(values) > 1:
            for key, value in values.items():
                _merge_values(merged, {key: value}, source)
        reason = str(error).splitlines()[0].rstrip(".")
        name = getattr(error, "full_key", None) or ", ".join(values)
        raise UserError(f"{source}: {name}: {reason}") from error


@cache
def _defaults() -> DictConfig:
    return OmegaConf.structured(Config)


@cache
def _hints(schema: type) -> dict[str, Any]:
    return get_type_hints(schema)


def _check_forms(values: Mapping[str, Any], schema: type, where: str) -> None:
    """Raise UserError for a single value where a group or a list has to be."""
    hints = _hints(schema)
    for key, value in values.items():
        inner = group_of(hints[key])
        if value is None:
            continue
        if inner is not None and not isinstance(value, Mapping):
            raise UserError(f"{where}{key} must hold `key: value` lines, not '{value}'")
        if inner is not None:
            _check_forms(value, inner, f"{where}{key}.")
        elif _element_of(hints[key]) is not None and not isinstance(value, list):
            raise UserError(f"{where}{key} must be a list, such as [a, b], not '{value}'")


# --- unknown keys --------------------------------------------------------------------------------


def _check_keys(layers: Sequence[_Layer]) -> None:
    """Raise UserError naming all keys that there are not, each with the one that is near."""
    said: dict[str, list[str]] = {}
    for layer in layers:
        for name, near in _unknown_keys(layer.values, Config, ""):
            hint = f" (did you mean '{near}'?)" if near else ""
            said.setdefault(layer.source, []).append(f"'{name}'{hint}")
    if said:
        lists = [
            f"{source}: unknown key{'s' if len(names) > 1 else ''} {', '.join(names)}"
            for source, names in said.items()
        ]
        raise UserError(f"{'; '.join(lists)}; docs/config.md lists all keys")


def _unknown_keys(
    values: Mapping[str, Any], schema: type, group: str
) -> Iterator[tuple[str, str | None]]:
    """Keys that a schema lacks, and the nearest one that it has."""
    for key, value in values.items():
        inner = group_of(_hints(schema).get(key))
        if key not in declared(schema):
            yield f"{group}{key}", _nearest(key, schema, group)
        elif inner is not None and isinstance(value, Mapping):
            yield from _unknown_keys(value, inner, f"{group}{key}.")


def _nearest(key: str, schema: type, group: str) -> str | None:
    for name, hint in _hints(schema).items():
        inner, last = group_of(hint), key.rpartition(".")[2]
        if inner is not None and last in declared(inner):
            return f"{name}.{last}"
    near = difflib.get_close_matches(key, declared(schema), 1, cutoff=NEAR)
    return f"{group}{near[0]}" if near else None


def group_of(hint: Any) -> type | None:
    """The dataclass that a type is, or may be besides null."""
    return next((each for each in (hint, *get_args(hint)) if is_dataclass(each)), None)  # type: ignore[return-value]


# --- impossible values ---------------------------------------------------------------------------


def check_config(config: Config) -> None:
    """Raise UserError for a value outside of its key's bounds, or for keys that contradict."""
    _check_bounds(config, "")
    for holds, sentence in _rules(config):
        if not holds:
            raise UserError(sentence)
    _check_window(config)


def check_training(config: Config) -> None:
    """Raise UserError for what a config may say of videos, but not of this training."""
    if "float8" in (config.linear_dtype, config.kv_cache_dtype):
        raise UserError(
            "linear_dtype and kv_cache_dtype are for inference: a training needs auto for both"
        )
    if config.lr_schedule == "cosine" and config.max_steps is None:
        raise UserError("lr_schedule=cosine falls to zero at max_steps: set it, or use constant")
    if config.generator_ckpt and (config.random_init or config.trainer == "vae"):
        other = "random_init" if config.random_init else "trainer: vae"
        raise UserError(f"generator_ckpt is not read with {other}: leave one of them out")
    if config.trainer == "vae" and config.lora is not None:
        raise UserError("lora is of transformers: a VAE has no adapters")
    if config.trainer in ("score_distillation", "ode") and config.schedule == "full":
        raise UserError(
            f"trainer: {config.trainer} is for a student that looks back at a past: set schedule "
            "to rolling or block, not full"
        )
    rolls_out = config.trainer == "score_distillation" or config.window_forcing
    if rolls_out and config.denoising_step_list is not None:
        _check_window(config, rolls=bool(config.rolling_probability))
    if config.trainer != "score_distillation":
        return
    if config.step_rule == "ode":
        raise UserError(
            "score_distillation trains on rollouts that renoise: set step_rule=renoise or null"
        )
    scored, block = config.image_or_video_shape[1], config.num_frame_per_block
    first = 1 if config.independent_first_frame else 0
    shortest = first + -(-(scored - first) // block) * block
    if config.num_training_frames < shortest:
        raise UserError(
            f"num_training_frames={config.num_training_frames} is too few: the whole blocks that "
            f"hold the {scored} scored frames of image_or_video_shape are {shortest}"
        )
    if config.max_steps and config.critic_warmup_steps >= config.max_steps:
        raise UserError(
            f"critic_warmup_steps={config.critic_warmup_steps} leaves the generator no update of "
            f"max_steps={config.max_steps}"
        )


def _check_bounds(group: Any, prefix: str) -> None:
    schema: type = type(group)
    hints = _hints(schema)
    for name, key in declared(schema).items():
        value, where = getattr(group, name), f"{prefix}{name}"
        if is_dataclass(value):
            _check_bounds(value, f"{where}.")
        elif isinstance(value, list):
            _check_list(where, value, key.bounds, _element_of(hints[name]))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            _check_number(where, value, key.bounds)


def _element_of(hint: Any) -> Any:
    """The type of the elements of a list, which may also be null; None for another type."""
    lists = [each for each in (hint, *get_args(hint)) if get_origin(each) is list]
    return get_args(lists[0])[0] if lists else None


def _check_list(where: str, values: list[Any], bounds: Bounds, element: type) -> None:
    if bounds.length is not None:
        fewest, most = bounds.length
        if not fewest <= len(values) <= most:
            count = f"{fewest}" if fewest == most else f"{fewest} to {most}"
            raise UserError(f"{where} must hold {count} values, not {len(values)}")
    for value in values:
        if not isinstance(value, element):
            raise UserError(f"{where} must hold single values, not {value}")
        if isinstance(value, int | float):
            _check_number(f"each value of {where}", value, bounds)
    if bounds.falling and any(a <= b for a, b in pairwise(values)):
        raise UserError(f"{where} must fall from step to step, not go {values}")


def _check_number(where: str, value: float, bounds: Bounds) -> None:
    if not math.isfinite(value):
        raise UserError(f"{where} must be a finite number, not {value}")
    if not bounds.allow(value):
        raise UserError(f"{where} must be {bounds.words()}, not {value}")


def _rules(config: Config) -> list[tuple[bool, str]]:
    """What keys say about each other."""
    return [
        (
            config.trainer in TRAINERS or split_name(config.trainer) is not None,
            f"trainer={config.trainer} is unknown; choose one of {', '.join(TRAINERS)}, or a task "
            "of another package, as package:name",
        ),
        (
            config.heldout_every == 0 or config.heldout_data_path is not None,
            "heldout_every needs data to measure: set heldout_data_path",
        ),
        (
            not (config.window_forcing and (config.teacher_forcing or config.diffusion_forcing)),
            "window_forcing has its own windows and levels: without teacher_forcing and "
            "diffusion_forcing",
        ),
        *(
            (
                re.fullmatch(r"auto|cpu|cuda(:\d+)?", value) is not None,
                f"{name} must be auto, cpu, cuda or cuda:N, not '{value}'",
            )
            for name, value in (
                ("device", config.device),
                ("text_encoder_device", config.text_encoder_device),
                ("vae_device", config.vae_device),
            )
        ),
        (
            config.sink_ema is None or config.model_kwargs.sink_size > 0,
            "sink_ema averages frames into the sink: set model_kwargs.sink_size to at least 1",
        ),
        (
            config.schedule != "full"
            or (config.sink_ema is None and config.window_attention == "full"),
            "sink_ema and window_attention are for a network that looks back at a past, not "
            "schedule=full",
        ),
        *(
            (
                value == 0
                or config.teacher_forcing
                or config.window_forcing
                or config.motion_guard_attention == "windows",
                f"{name} needs teacher_forcing, window_forcing or motion_guard_attention=windows",
            )
            for name, value in (
                ("clean_context_noise", config.clean_context_noise),
                ("prompt_change_probability", config.prompt_change_probability),
            )
        ),
        (
            config.max_score_timestep == 1000 or not config.ts_schedule,
            "max_score_timestep and ts_schedule exclude each other: scores below the one, above "
            "the level of the other",
        ),
        (
            config.critic_updates_per_rollout <= config.dfake_gen_update_ratio,
            f"critic_updates_per_rollout={config.critic_updates_per_rollout} is more than "
            f"dfake_gen_update_ratio={config.dfake_gen_update_ratio}: a rollout of another student "
            "is of no use to the critic",
        ),
    ]


def _check_window(config: Config, *, rolls: bool = False) -> None:
    """Frames in one attention must hold the pass itself and the pinned frames.

    `rolls`: windows are rolled over whatever the schedule.
    """
    if config.schedule == "full":
        return
    blocks = config.num_levels if rolls or config.schedule == "rolling" else 1
    own = blocks * config.num_frame_per_block
    needed = own + config.model_kwargs.sink_size
    if config.attention_frames < needed:
        raise UserError(
            f"{config.attention_frames} frames in one attention are too few: a window has {own} "
            f"frames beside {config.model_kwargs.sink_size} sink frames; raise "
            "max_attention_frames (or model_kwargs.local_attn_size) or use fewer levels"
        )
