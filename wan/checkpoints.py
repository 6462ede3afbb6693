"""Transformers in files: official, diffusers and distilled ones, read strictly and written.

The network is built on the meta device and takes the (memory-mapped) tensors over, so memory stays
at the size of the one network that is read.
"""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from utils.errors import UserError
from utils.files import write_json, write_tensors, write_torch
from wan.dit import DiTConfig, WanDiT
from wan.float8 import use_float8
from wan.weights import (
    Network,
    StateDict,
    assign_weights,
    check_keys,
    converted,
    networks_among,
    read_json,
    read_tensors,
    read_weights,
)

logger = logging.getLogger(__name__)

STEM = "diffusion_pytorch_model"


def load_dit_config(folder: Path) -> DiTConfig:
    """Sizes of the network in a model folder (official or diffusers layout)."""
    for path in (folder / "config.json", folder / "transformer" / "config.json"):
        if path.is_file():
            return DiTConfig.from_dict(_official_names(read_json(path), path), path)
    raise UserError(
        f"{folder} has no config.json: it is not a Wan2.1 model folder; "
        "fetch one with `python scripts/download.py wan2.1-1.3b`"
    )


def load_dit(
    config: DiTConfig,
    source: Path,
    *,
    network: Network = "generator",
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> WanDiT:
    """A `WanDiT` with the weights of `source`: a model folder, a `.pt` or a `.safetensors`.

    `network` chooses among those of a distilled file. Raises UserError for a file that does not
    hold exactly this network, saying what it looks like instead.
    """
    dit = empty_dit(config)
    state = read_state_dict(source, network)
    assign_weights(dit, state, source, device=device, dtype=dtype)
    return dit.requires_grad_(False).eval()


def check_dit(config: DiTConfig, source: Path, network: Network = "generator") -> None:
    """Raise what `load_dit` would of names and shapes, without reading weights."""
    check_keys(empty_dit(config).state_dict(), read_state_dict(source, network), source)


def empty_dit(config: DiTConfig) -> WanDiT:
    """The network without memory: parameters on the meta device."""
    with torch.device("meta"):
        return WanDiT(config)


def read_state_dict(source: Path, network: Network = "generator") -> StateDict:
    """Official names to (memory-mapped) tensors of one network, in a file or a model folder."""
    inside = source / "transformer"
    source = inside if inside.is_dir() else source
    return _diffusers_to_official(read_weights(source, "a Wan2.1 transformer", network, STEM))


def networks_in(source: Path) -> tuple[Network, ...]:
    """The networks of a distilled file, or none if it holds bare weights."""
    return networks_among(read_tensors(source, STEM))


def read_best(source: Path) -> StateDict:
    """Weights of a training run's `model.pt`: the average, or the student where there is none."""
    averaged = "generator_ema" in networks_in(source)
    return read_state_dict(source, "generator_ema" if averaged else "generator")


def publish_student(source: Path, target: Path, dtype: torch.dtype = torch.float16) -> None:
    """Write a run's best weights as a distilled checkpoint, under both published names.

    `torch.save` keeps what the two share once.
    """
    weights = converted(read_best(source), source, dtype=dtype)
    state = {f"model.{name}": value for name, value in weights.items()}
    write_torch(target, {"generator": state, "generator_ema": state})


def publish_model(source: Path, folder: Path, dtype: torch.dtype = torch.float16) -> None:
    """Write a run's best weights into a model folder, as the official release has them."""
    weights = converted(read_best(source), source, dtype=dtype)
    tensors = {name: value.contiguous() for name, value in weights.items()}
    write_tensors(folder / f"{STEM}.safetensors", tensors)


def write_diffusers(
    source: Path,
    config: DiTConfig,
    folder: Path,
    *,
    network: Network = "generator",
    dtype: torch.dtype | None = None,
) -> Path:
    """Write `folder/transformer/` as diffusers' `WanTransformer3DModel` reads it; its path.

    `dtype` None leaves each tensor as it is in `source`. Raises UserError for a file that does not
    hold this network, and for a network that diffusers cannot have.
    """
    if not config.qk_norm:
        raise UserError("diffusers has no Wan2.1 transformer without qk_norm")
    dit = load_dit(config, source, network=network, dtype=dtype)
    state = dit.state_dict()
    names = official_to_diffusers_names(state)
    target = folder / "transformer"
    tensors = {names[key]: value.contiguous() for key, value in state.items()}
    write_tensors(target / f"{STEM}.safetensors", tensors, {"format": "pt"})
    write_json(target / "config.json", _diffusers_config(config))
    return target


def memory_estimate(config: DiTConfig, dtype: torch.dtype, *, in_float8: bool = False) -> int:
    """Bytes of the network's weights, those of its blocks in float8 or not."""
    dit = empty_dit(config).to(dtype)
    if in_float8:
        use_float8(dit.blocks)
    return sum(value.nbytes for value in dit.state_dict().values())


def official_to_diffusers_names(official: Iterable[str]) -> dict[str, str]:
    """Official DiT key -> diffusers key, from diffusers' own converter."""
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    # Converting {key: key} gives {diffusers key: official key}: the names themselves travel.
    converted = convert_wan_transformer_to_diffusers({key: key for key in official})
    return {old: new for new, old in converted.items()}


def _diffusers_to_official(state: StateDict) -> StateDict:
    if not any(key.startswith("condition_embedder.") for key in state):
        return state
    layers = {key.split(".")[1] for key in state if key.startswith("blocks.")}
    config = DiTConfig(dim=12, ffn_dim=12, num_heads=1, num_layers=len(layers))
    names = official_to_diffusers_names(empty_dit(config).state_dict())
    official = {new: old for old, new in names.items()}
    return {official.get(key, key): value for key, value in state.items()}


def _official_names(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """An official `config.json` from a diffusers one."""
    if "num_attention_heads" not in config:
        return dict(config)
    names = {
        **{"num_attention_heads": "num_heads", "in_channels": "in_dim", "out_channels": "out_dim"},
        **{key: key for key in ("ffn_dim", "freq_dim", "num_layers", "text_dim", "patch_size")},
        **{key: key for key in ("eps", "cross_attn_norm")},
    }
    renamed = {names[key]: value for key, value in config.items() if key in names}
    heads, head_dim = config["num_attention_heads"], config.get("attention_head_dim")
    if type(heads) is not int or type(head_dim) is not int:
        raise UserError(
            f"{path} must say num_attention_heads and attention_head_dim as whole numbers; "
            "fetch it again"
        )
    if config.get("image_dim") is not None or config.get("added_kv_proj_dim") is not None:
        renamed["model_type"] = "i2v"
    return renamed | {"dim": heads * head_dim, "qk_norm": config.get("qk_norm") is not None}


def _diffusers_config(config: DiTConfig) -> dict[str, Any]:
    """The `config.json` of a `WanTransformer3DModel` of these sizes."""
    return {
        "_class_name": "WanTransformer3DModel",
        "patch_size": list(config.patch_size),
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.head_dim,
        "in_channels": config.in_dim,
        "out_channels": config.out_dim,
        "text_dim": config.text_dim,
        "freq_dim": config.freq_dim,
        "ffn_dim": config.ffn_dim,
        "num_layers": config.num_layers,
        "cross_attn_norm": config.cross_attn_norm,
        "qk_norm": "rms_norm_across_heads",
        "eps": config.eps,
    }
