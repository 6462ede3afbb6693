"""Weight files of every kind: read safely, checked strictly, given to a network, written whole.

Nothing but tensors is ever unpickled, and files are mapped into memory, not copied. What trainers
and libraries put around the names of a network (`model.`, `generator.`, `_orig_mod.`, a dict in a
dict) is found out by one name that every network of its kind has, and left out.
"""

import json
import pickle
import re
import struct
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from utils.errors import UserError
from utils.files import whole_files, write_torch

StateDict = dict[str, Tensor]
Shapes = Mapping[str, Sequence[int]]
Network = Literal["generator", "generator_ema", "critic"]
NETWORKS: tuple[Network, ...] = ("generator", "generator_ema", "critic")
Kind = Literal["a Wan2.1 transformer", "a VAE", "a text encoder"]

# A name, official or diffusers' and transformers', that every network of its kind has.
ANCHORS: dict[Kind, tuple[str, ...]] = {
    "a Wan2.1 transformer": ("patch_embedding.weight",),
    "a VAE": ("decoder.conv1.weight", "decoder.conv_in.weight"),
    "a text encoder": ("token_embedding.weight", "shared.weight", "encoder.embed_tokens.weight"),
}
# What wrappers of training frameworks leave anywhere in a parameter's name.
WRAPPERS = frozenset(
    {"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod", "module", "_module"}
)
# What usually stands in front of all names of a network.
USUAL = frozenset(
    {*NETWORKS, "model", "diffusion_model", "pipe", "dit", "transformer", "student", "net", "vae"}
)
ADAPTER = re.compile(
    r"(?<![a-z])(lora|dora|loha|lokr|hada)(?![a-z])|(^|\.)diff(_b|_m)?$", re.IGNORECASE
)
FP8_SCALE = re.compile(r"(^|\.)(scaled_fp8|scale_weight|scale_input|weight_scale|input_scale)$")
IMAGE_TO_VIDEO = re.compile(r"^img_emb\.|\.k_img\.|image_embedder\.|\.add_k_proj\.")
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# All that the unpickler raises on bytes that are no pickle, and torch on files that are not whole.
UNPICKLING_ERRORS = (
    *(pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError),
    *(IndexError, KeyError, AttributeError, TypeError, struct.error),
)


def read_weights(
    path: str | Path, kind: Kind, network: Network = "generator", stem: str = ""
) -> StateDict:
    """One network's (memory-mapped) tensors by name, without what was put around the names.

    `path` is a pickle (`.pt`, `.pth`, `.ckpt`, `.bin`), a `.safetensors`, or a folder of
    `stem*.safetensors`. `network` chooses among those of a distilled file.

    Raises:
        UserError: no such file, not one network of this kind, or not dense floating-point tensors.
    """
    path = Path(path)
    weights = choose_network(read_tensors(path, stem), kind, network, path)
    check_kinds(weights, path)
    return weights


def read_tensors(path: Path, stem: str = "") -> StateDict:
    """Every tensor of a file, or of the shards of a folder; names of dicts in dicts are joined.

    Raises:
        UserError: there is no such file, or it is not whole, or it holds no tensors.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist; check the path, or fetch the weights again")
    tensors: StateDict = {}
    for file in shard_files(path, stem) if path.is_dir() else [path]:
        for name, tensor in _named_tensors(file):
            if name in tensors:
                raise UserError(f"{path} holds {name} twice; give a file of one network")
            tensors[name] = tensor
    if not tensors:
        raise UserError(f"{path} holds no tensors; give another file")
    return tensors


def choose_network(
    tensors: Mapping[str, Tensor], kind: Kind, network: Network, source: Path
) -> StateDict:
    """The tensors of one network, with the names that it has on its own.

    Raises:
        UserError: it is not there, or cannot be told from others, or is an adapter of a network.
    """
    if any(ADAPTER.search(name) for name in tensors):
        raise UserError(
            f"{source} does not fit this network: it looks like a LoRA, which has to be merged "
            "into its base first"
        )
    present = networks_among(tensors)
    if network not in present and (present or network != "generator"):
        hint = " (leave out --use_ema)" if network == "generator_ema" else ""
        others = ", ".join(present) or "one network"
        raise UserError(f"{source} holds no {network}, only {others}{hint}")
    own = {n: t for n, t in tensors.items() if not present or network in n.split(".")}
    roots = _roots(own, kind)
    if len(roots) > 1:
        some = ", ".join(root.rstrip(".") or "one without a prefix" for root in roots)
        raise UserError(f"{source} holds several networks ({some}): save the one to use on its own")
    root = roots[0] if roots else _usual_prefix(own)
    return {n.removeprefix(root): t for n, t in own.items() if n.startswith(root)}


def networks_among(names: Iterable[str]) -> tuple[Network, ...]:
    """The networks of a distilled file by the names in it; none if it holds bare weights."""
    words = {word for name in names for word in name.split(".")}
    return tuple(network for network in NETWORKS if network in words)


def shard_files(folder: Path, stem: str = "") -> list[Path]:
    """The files `stem*.safetensors` of a folder that are one network: its index's, or the one.

    Raises:
        UserError: there are none, or several without an index, or the index is broken.
    """
    indices = sorted(folder.glob(f"{stem}*.safetensors.index.json"))
    if not indices:
        files = whole_files(folder, f"{stem}*.safetensors")
        if len(files) != 1:
            raise UserError(
                f"{folder} should hold one {stem}*.safetensors or an index of several; fetch the "
                "model with `python scripts/download.py`"
            )
        return files
    weight_map = read_json(indices[0]).get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not names or not all(_is_shard_name(name) for name in names):
        raise UserError(
            f"{indices[0]} has no weight_map from names to files beside it; fetch the model again"
        )
    for name in names:
        if not (folder / name).is_file():
            raise UserError(f"{folder / name} is missing; fetch the model again")
    return [folder / name for name in sorted(set(names))]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a model folder.

    Raises:
        UserError: the file cannot be read, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path} is not readable as JSON; fetch it again") from error
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise UserError(f"{path} must hold a JSON object, not a {kind}; fetch it again")
    return content


def check_keys(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], source: Path) -> None:
    """Raise UserError unless `found` has exactly the keys and shapes of `expected`."""
    missing = [key for key in expected if key not in found]
    unexpected = [key for key in found if key not in expected]
    resized = [key for key in expected if key in found and expected[key].shape != found[key].shape]
    if not (missing or unexpected or resized):
        return
    parts = [f"{source} does not fit this network: {looks_like(expected, found)}"]
    for name, keys in (("missing", missing), ("unexpected", unexpected)):
        if keys:
            parts.append(f"{len(keys)} keys {name} ({_first(keys)})")
    if resized:
        key = resized[0]
        sizes = f"{key} is {_size(found[key])}, not {_size(expected[key])}"
        parts.append(f"{len(resized)} of another size ({sizes})")
    raise UserError("; ".join(parts))


def check_kinds(weights: Mapping[str, Tensor], source: Path) -> None:
    """Raise UserError for the first tensor that is not dense and of floating point."""
    for key, tensor in weights.items():
        if "float8" in str(tensor.dtype) or FP8_SCALE.search(key):
            raise UserError(
                f"{source} holds fp8 weights ({key}), and fp8, scaled or not, is not supported; "
                "give the file in bf16, fp16 or fp32"
            )
        what = None
        if type(tensor) not in (Tensor, nn.Parameter):
            what = type(tensor).__name__
        elif tensor.is_meta:
            what = "on the meta device"
        elif tensor.layout != torch.strided:
            what = str(tensor.layout)
        elif tensor.dtype not in FLOATS:
            what = str(tensor.dtype)
        if what is not None:
            raise UserError(
                f"{source} cannot be used: {key} is {what.removeprefix('torch.')}, and weights "
                "are dense tensors of fp32, fp16, bf16 or fp64"
            )


@torch.no_grad()
def check_finite(
    weights: Mapping[str, Tensor], source: Path, given: Mapping[str, Tensor] | None = None
) -> None:
    """Raise UserError for the first tensor with NaN or Inf; one wait for the device in all.

    `given` are the same tensors before they were converted: what is finite there is too large for
    the new type.
    """
    holds = {key: _all_finite(tensor) for key, tensor in weights.items() if tensor.numel()}
    if not holds or bool(torch.stack(list(holds.values())).all()):
        return
    key = next(key for key, finite in holds.items() if not finite)
    if given is not None and bool(_all_finite(given[key])):
        kind = str(weights[key].dtype).removeprefix("torch.")
        raise UserError(
            f"{source} cannot be used in {kind}: values of {key} are too large for it; use "
            "bfloat16 or float32"
        )
    raise UserError(
        f"{source} cannot be used: {key} holds NaN or Inf; its training diverged, or the file is "
        "damaged"
    )


def assign_weights(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    source: str | Path,
    *,
    names: Mapping[str, str] | None = None,
    device: str | torch.device,
    dtype: torch.dtype | None,
) -> None:
    """Put `weights` in the place of the parameters of `model`, copied only if they must change.

    `names` maps every name in the model's state to its key in `weights` (tied parameters share
    one); None where they are the same. `dtype` None leaves each as it is.

    Raises:
        UserError: keys or shapes differ, or values are not finite; the message names `source`.
    """
    source, own = Path(source), model.state_dict()
    names = {name: name for name in own} if names is None else names
    check_keys({key: own[name] for name, key in names.items()}, weights, source)
    moved = converted(weights, source, device=device, dtype=dtype)
    model.load_state_dict({name: moved[key] for name, key in names.items()}, assign=True)


def converted(
    weights: Mapping[str, Tensor],
    source: Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> StateDict:
    """The weights on `device` in `dtype`, copied only if they must change.

    Raises:
        UserError: values are not finite, or are too large for `dtype`.
    """
    moved = {key: value.detach().to(device, dtype) for key, value in weights.items()}
    check_finite(moved, source, weights)
    return moved


def save_weights(weights: Mapping[str, Tensor], path: str | Path) -> None:
    """Write a `.pth`, whole or not at all."""
    write_torch(path, {key: value.detach().cpu() for key, value in weights.items()})


# --- what a file is -----------------------------------------------------------------------------


def kind_of(names: Iterable[str]) -> Kind | None:
    """What kind of network has these names, whatever is put around them."""
    names = list(names)
    return next((kind for kind in ANCHORS if _roots(names, kind)), None)


def looks_like(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """What kind of file this is, as far as its names tell."""
    wanted, kind = kind_of(expected), kind_of(found)
    if kind is None:
        return f"it is not {wanted or 'of its kind'}"
    if kind != wanted:
        return f"it looks like {kind}"
    if kind == "a Wan2.1 transformer":
        if any(key.startswith("vace_") for key in found):
            return "it looks like a VACE model"
        if any(IMAGE_TO_VIDEO.search(key) for key in found):
            return "it looks like an image-to-video model"
        ours, theirs = _network_size(expected), _network_size(found)
        if ours != theirs:
            other = "a teacher of another size" if theirs > ours else "a model of another size"
            return (
                f"it looks like {other}: {theirs[0]} channels and {theirs[1]} layers, "
                f"where {ours[0]} and {ours[1]} are configured (generator_name)"
            )
        if any("cls" in key or "gan" in key for key in found):
            return "it looks like a critic with a classifier head"
    return f"it looks like an incomplete or extended {kind.removeprefix('a ')}"


def _network_size(state: Mapping[str, Tensor]) -> tuple[int, int]:
    layers = {key.split(".")[1] for key in state if key.startswith("blocks.")}
    channels = state["patch_embedding.weight"].shape[:1]
    return channels[0] if channels else 0, len(layers)


def _roots(names: Iterable[str], kind: Kind) -> list[str]:
    """What stands in front of the names of each network of this kind."""
    names = list(names)
    for anchor in ANCHORS[kind]:
        ends = [name for name in names if f".{name}".endswith(f".{anchor}")]
        if ends:
            return sorted(name.removesuffix(anchor) for name in ends)
    return []


def _usual_prefix(names: Iterable[str]) -> str:
    """What stands in front of all names and is usual there, for files without an anchor."""
    parts = [name.split(".")[:-1] for name in names]
    common: list[str] = []
    for words in zip(*parts, strict=False):
        if len(set(words)) > 1 or words[0] not in USUAL:
            break
        common.append(words[0])
    return "".join(f"{word}." for word in common)


def _size(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a number"


def _first(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (", …" if len(keys) > 3 else "")


# --- files --------------------------------------------------------------------------------------


def _named_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Plain names and tensors of one file."""
    _refuse_other_formats(path)
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no state dict but a {type(content).__name__}")
    for words, tensor in _flat(content):
        yield ".".join(word for word in words if word not in WRAPPERS), tensor


def _flat(content: Mapping[Any, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[Any, Tensor]]:
    """The words of each name and its tensor, of dicts in dicts; what is no tensor is left out."""
    for key, value in content.items():
        words = (*above, *str(key).split("."))
        if isinstance(value, Tensor):
            yield words, value
        elif isinstance(value, Mapping):
            yield from _flat(value, words)


def _read_safetensors(path: Path) -> StateDict:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} is not a readable safetensors file; fetch it again") from error


def _read_pickle(path: Path) -> Any:
    try:
        mapped = zipfile.is_zipfile(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except UNPICKLING_ERRORS as error:
        raise UserError(
            f"{path} is not a readable checkpoint: it is incomplete, or holds more than tensors; "
            "fetch it again"
        ) from error


def _refuse_other_formats(path: Path) -> None:
    """Raise UserError for files that are known by their first bytes."""
    try:
        with path.open("rb") as file:
            start = file.read(len(b"version https://git-lfs"))
    except OSError as error:
        raise UserError(f"{path} is not readable: {error.strerror}") from error
    if start.startswith(b"GGUF"):
        raise UserError(f"{path} is a GGUF file, which is not supported; give the safetensors file")
    if start == b"version https://git-lfs":
        raise UserError(f"{path} is a Git LFS pointer and not the file; run `git lfs pull`")


def _is_shard_name(name: Any) -> bool:
    """Whether an index's entry is the plain name of a file beside it."""
    return isinstance(name, str) and name.endswith(".safetensors") and not set("/\\\0") & set(name)


def _all_finite(tensor: Tensor) -> Tensor:
    """One boolean, on the tensor's device; the extremes of a tensor are NaN if anything in it is.

    One pass without memory of its own, unlike `isfinite`.
    """
    low, high = torch.aminmax(tensor)
    return low.isfinite() & high.isfinite()
