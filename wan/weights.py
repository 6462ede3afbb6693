"""Weight files: reading them safely, checking them strictly, giving them to a network.

Nothing but tensors is ever unpickled, and files are mapped into memory, not copied.
"""

import json
import pickle
import struct
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from utils.errors import UserError
from utils.files import write_torch

Shapes = Mapping[str, Sequence[int]]
# All that the unpickler raises on bytes that are no pickle, and torch on files that are not whole.
UNPICKLING_ERRORS = (
    *(pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError),
    *(IndexError, KeyError, AttributeError, TypeError, struct.error),
)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a `.pth`, a `.safetensors`, or a folder of (sharded) `.safetensors`.

    Nothing but tensors is unpickled, and a `.pth` is mapped, not copied, into memory.

    Raises:
        UserError: there is no such file, or it holds no tensors.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist: give the path of the downloaded weights.")
    if path.is_dir():
        return {k: v for shard in shard_files(path) for k, v in read_weights(shard).items()}
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise _unreadable(path) from error
    weights = read_pickle(path)
    if not isinstance(weights, dict) or not all(isinstance(v, Tensor) for v in weights.values()):
        raise UserError(f"{path} does not hold one network's tensors: give another file.")
    return weights


def read_pickle(path: Path) -> Any:
    """What a torch file holds: tensors and containers of them, mapped into memory.

    Raises:
        UserError: it is not a torch file, or not a whole one.
    """
    try:
        mapped = zipfile.is_zipfile(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except UNPICKLING_ERRORS as error:
        raise _unreadable(path) from error


def shard_files(folder: Path, stem: str = "") -> list[Path]:
    """The files `stem*.safetensors` of a folder that are one network: its index's, or the one.

    Raises:
        UserError: there are none, or several without an index.
    """
    indices = sorted(folder.glob(f"{stem}*.safetensors.index.json"))
    if indices:
        weight_map = json.loads(indices[0].read_text(encoding="utf-8"))["weight_map"]
        return [folder / name for name in sorted(set(weight_map.values()))]
    files = sorted(folder.glob(f"{stem}*.safetensors"))
    if len(files) != 1:
        raise UserError(
            f"{folder} should hold one {stem}*.safetensors or an index of several; fetch the "
            "model with `python scripts/download.py`"
        )
    return files


def assign_weights(
    model: nn.Module,
    names: Mapping[str, str],
    weights: Mapping[str, Tensor],
    source: str | Path,
    *,
    device: str | torch.device,
    dtype: torch.dtype,
) -> None:
    """Put `weights` in the place of the parameters of `model`, copied only if they must change.

    `names` maps every name in the model's state to its key in `weights`; tied parameters share one.

    Raises:
        UserError: keys or shapes differ; the message names `source` and the first that do.
    """
    expected = dict.fromkeys(names.values())
    missing = [key for key in expected if key not in weights]
    unexpected = [key for key in weights if key not in expected]
    for kind, keys in (("has no", missing), ("has the unexpected", unexpected)):
        if keys:
            some = ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
            raise UserError(f"{source} is not the right file: it {kind} {some}.")
    own = model.state_dict()
    for name, key in names.items():
        if weights[key].shape != own[name].shape:
            shapes = f"{list(weights[key].shape)} instead of {list(own[name].shape)}"
            raise UserError(f"{source} is not the right file: {key} has shape {shapes}.")
    cast = {key: weights[key].to(device=device, dtype=dtype) for key in expected}
    model.load_state_dict({name: cast[key] for name, key in names.items()}, assign=True)


def save_weights(weights: Mapping[str, Tensor], path: str | Path) -> None:
    """Write a `.pth`, whole or not at all."""
    write_torch(path, {key: value.detach().cpu() for key, value in weights.items()})


def _unreadable(path: Path) -> UserError:
    return UserError(
        f"{path} is not a readable checkpoint: it is incomplete, or holds more than tensors; "
        "fetch it again"
    )
