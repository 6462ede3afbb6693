"""Reading the weights of others: official, diffusers and distilled files, strictly.

Everything is opened with `weights_only` and memory mapping; the network is built on the meta
device and takes the tensors over, so memory stays at the size of the one network that is read.
"""

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor

from utils.errors import UserError
from utils.files import write_tensors, write_torch
from wan.dit import DiTConfig, WanDiT
from wan.weights import read_pickle, shard_files

logger = logging.getLogger(__name__)

Network = Literal["generator", "generator_ema", "critic"]
NETWORKS: tuple[Network, ...] = ("generator", "generator_ema", "critic")
# Names that wrappers of training frameworks leave inside parameter names.
WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.", "module.")
LORA_MARKS = ("lora_A", "lora_B", "lora_down", "lora_up")

StateDict = dict[str, Tensor]


def load_dit_config(folder: Path) -> DiTConfig:
    """Sizes of the network in a model folder (official or diffusers layout)."""
    for path in (folder / "config.json", folder / "transformer" / "config.json"):
        if path.is_file():
            return DiTConfig.from_dict(_official_names(_read_json(path)))
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
    state = read_state_dict(source, network)
    dit = empty_dit(config)
    check_keys(dit.state_dict(), state, source)
    moved = {
        key: value.to(device, dtype if value.is_floating_point() else None)
        for key, value in state.items()
    }
    dit.load_state_dict(moved, assign=True)
    return dit.requires_grad_(False).eval()


def empty_dit(config: DiTConfig) -> WanDiT:
    """The network without memory: parameters on the meta device."""
    with torch.device("meta"):
        return WanDiT(config)


def read_state_dict(source: Path, network: Network = "generator") -> StateDict:
    """Official names to (memory-mapped) tensors of one network."""
    if source.is_dir():
        if network != "generator":
            _raise_absent(source, network, ["one network"])
        state = _read_folder(source)
    elif source.is_file():
        state = _read_file(source, network)
    else:
        raise UserError(f"checkpoint {source} does not exist; check the path")
    return _diffusers_to_official(clean_names(state))


def networks_in(source: Path) -> tuple[Network, ...]:
    """The networks of a distilled file, or none if it holds bare weights."""
    keys = _unwrap(_open_pt(source)) if _is_pickle(source) else _safetensors_keys(source)
    return tuple(
        name for name in NETWORKS if name in keys or any(k.startswith(f"{name}.") for k in keys)
    )


def read_best(source: Path) -> StateDict:
    """Weights of a training run's `model.pt`: the average, or the student where there is none."""
    averaged = "generator_ema" in networks_in(source)
    return read_state_dict(source, "generator_ema" if averaged else "generator")


def publish_student(source: Path, target: Path, dtype: torch.dtype = torch.float16) -> None:
    """Write a run's best weights as a distilled checkpoint, under both published names.

    `torch.save` keeps what the two share once.
    """
    state = {f"model.{name}": value.to(dtype) for name, value in read_best(source).items()}
    write_torch(target, {"generator": state, "generator_ema": state})


def publish_model(source: Path, folder: Path, dtype: torch.dtype = torch.float16) -> None:
    """Write a run's best weights into a model folder, as the official release has them."""
    state = {name: value.to(dtype).contiguous() for name, value in read_best(source).items()}
    write_tensors(folder / "diffusion_pytorch_model.safetensors", state)


def clean_names(state: Mapping[str, Tensor]) -> StateDict:
    """Strip `model.` in front and the wrappers' names anywhere in the keys."""
    return {_clean(key): value for key, value in state.items()}


def check_keys(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], source: Path) -> None:
    """Raise UserError unless `found` has exactly the keys and shapes of `expected`."""
    missing = [key for key in expected if key not in found]
    unexpected = [key for key in found if key not in expected]
    resized = [key for key in expected if key in found and expected[key].shape != found[key].shape]
    if not (missing or unexpected or resized):
        return
    parts = [f"{source} does not fit this network: {_looks_like(expected, found)}"]
    for name, keys in (("missing", missing), ("unexpected", unexpected)):
        if keys:
            parts.append(f"{len(keys)} keys {name} ({_first(keys)})")
    if resized:
        key = resized[0]
        sizes = f"{key} is {_size(found[key])}, not {_size(expected[key])}"
        parts.append(f"{len(resized)} of another size ({sizes})")
    raise UserError("; ".join(parts))


def memory_estimate(config: DiTConfig, dtype: torch.dtype) -> int:
    """Bytes of the network's weights."""
    return sum(p.numel() for p in empty_dit(config).parameters()) * dtype.itemsize


def official_to_diffusers_names(official: Iterable[str]) -> dict[str, str]:
    """Official DiT key -> diffusers key, from diffusers' own converter."""
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    # Converting {key: key} gives {diffusers key: official key}: the names themselves travel.
    converted = convert_wan_transformer_to_diffusers({key: key for key in official})
    return {old: new for new, old in converted.items()}


def _read_folder(folder: Path) -> StateDict:
    inside = folder / "transformer"
    return _read_safetensors(
        shard_files(inside if inside.is_dir() else folder, "diffusion_pytorch_model")
    )


def _read_file(path: Path, network: Network) -> StateDict:
    if not _is_pickle(path):
        return _choose(_read_safetensors([path], f"{network}."), network, path)
    content = _unwrap(_open_pt(path))
    if any(name in content for name in NETWORKS):
        if network not in content:
            _raise_absent(path, network, [name for name in NETWORKS if name in content])
        content = _as_dict(content[network], path)
    elif network != "generator":
        _raise_absent(path, network, ["one network"])
    return {key: value for key, value in content.items() if isinstance(value, Tensor)}


def _choose(state: StateDict, network: Network, path: Path) -> StateDict:
    """Of a safetensors file of several networks only `network`, without its prefix."""
    prefix = f"{network}."
    chosen = {key.removeprefix(prefix): v for key, v in state.items() if key.startswith(prefix)}
    if chosen:
        return chosen
    others = [name for name in NETWORKS if any(key.startswith(f"{name}.") for key in state)]
    if others or network != "generator":
        _raise_absent(path, network, others or ["one network"])
    return state


def _raise_absent(path: Path, network: str, present: Iterable[str]) -> None:
    hint = " (leave out --use_ema)" if network == "generator_ema" else ""
    raise UserError(f"{path} holds no {network}, only {', '.join(present)}{hint}")


def _is_pickle(path: Path) -> bool:
    return path.suffix != ".safetensors"


def _open_pt(path: Path) -> dict[str, Any]:
    return _as_dict(read_pickle(path), path)


def _as_dict(content: Any, path: Path) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no state dict but a {type(content).__name__}")
    return content


def _unwrap(content: dict[str, Any]) -> dict[str, Any]:
    """What lies inside the entry that some trainers put around all weights."""
    for name in ("state_dict", "model"):
        if isinstance(content.get(name), dict):
            return content[name]
    return content


def _read_safetensors(paths: Iterable[Path], prefix: str = "") -> StateDict:
    """All tensors of the files, or those under `prefix` if there are any."""
    state: StateDict = {}
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path} is missing; fetch the model again")
        try:
            with safe_open(path, framework="pt") as file:
                keys = list(file.keys())
                under = [key for key in keys if prefix and key.startswith(prefix)]
                state.update({key: file.get_tensor(key) for key in under or keys})
        except Exception as error:  # safetensors' own error type is not exported everywhere
            raise UserError(f"{path} is not a readable safetensors file") from error
    return state


def _safetensors_keys(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except Exception as error:
        raise UserError(f"{path} is not a readable safetensors file") from error


def _clean(key: str) -> str:
    for wrapper in WRAPPERS:
        key = key.replace(wrapper, "")
    return key.removeprefix("model.")


def _diffusers_to_official(state: StateDict) -> StateDict:
    if not any(key.startswith("condition_embedder.") for key in state):
        return state
    layers = {key.split(".")[1] for key in state if key.startswith("blocks.")}
    config = DiTConfig(dim=12, ffn_dim=12, num_heads=1, num_layers=len(layers))
    names = official_to_diffusers_names(empty_dit(config).state_dict())
    official = {new: old for old, new in names.items()}
    return {official.get(key, key): value for key, value in state.items()}


def _official_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """An official `config.json` from a diffusers one."""
    if "num_attention_heads" not in config:
        return dict(config)
    heads = config["num_attention_heads"]
    renamed = {
        "num_heads": heads,
        "dim": heads * config["attention_head_dim"],
        "in_dim": config["in_channels"],
        "out_dim": config["out_channels"],
        "qk_norm": config.get("qk_norm") is not None,
    }
    same = ("ffn_dim", "freq_dim", "num_layers", "text_dim", "patch_size", "eps", "cross_attn_norm")
    return renamed | {key: config[key] for key in same if key in config}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not readable as JSON; fetch it again") from error


def _looks_like(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """What kind of file this is, as far as its names tell."""
    if any(mark in key for key in found for mark in LORA_MARKS):
        return "it looks like a LoRA, which has to be merged into its base first"
    if any(key.startswith(("encoder.", "decoder.")) for key in found):
        return "it looks like a VAE"
    if "token_embedding.weight" in found or "shared.weight" in found:
        return "it looks like a text encoder"
    width = found.get("patch_embedding.weight")
    if width is None:
        return "it is not a Wan2.1 transformer"
    ours, theirs = _network_size(expected), _network_size(found)
    if ours != theirs:
        kind = "a teacher of another size" if theirs > ours else "a model of another size"
        return (
            f"it looks like {kind}: {theirs[0]} channels and {theirs[1]} layers, "
            f"where {ours[0]} and {ours[1]} are configured (generator_name)"
        )
    if any(key.startswith(("img_emb.", "blocks.0.cross_attn.k_img")) for key in found):
        return "it looks like an image-to-video model"
    if any("cls" in key or "gan" in key for key in found):
        return "it looks like a critic with a classifier head"
    return "it looks like an incomplete or extended Wan2.1 transformer"


def _network_size(state: Mapping[str, Tensor]) -> tuple[int, int]:
    layers = {key.split(".")[1] for key in state if key.startswith("blocks.")}
    return state["patch_embedding.weight"].shape[0], len(layers)


def _size(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape))


def _first(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (", …" if len(keys) > 3 else "")
