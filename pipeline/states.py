"""States of streams on the disk: nested mappings and lists of tensors and plain values, exactly.

One `.safetensors` file: the tensors, and in its metadata the tree they hang in as JSON. Nothing in
it is code.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from utils.errors import UserError
from utils.files import write_tensors

TENSOR = "tensor"  # a tree's leaf {"tensor": name}; mappings are {"items": [[key, value], …]}
ITEMS = "items"


def state_bytes(state: Any) -> int:
    """Bytes of all tensors of a state."""
    if isinstance(state, Tensor):
        return state.nbytes
    if isinstance(state, Mapping):
        return sum(state_bytes(value) for value in state.values())
    if isinstance(state, list | tuple):
        return sum(state_bytes(value) for value in state)
    return 0


def write_state(state: Mapping[Any, Any], path: str | Path) -> None:
    """Write a state, whole or not at all; keys are texts or whole numbers."""
    tensors: dict[str, Tensor] = {}

    def planted(value: Any) -> Any:
        if isinstance(value, Tensor):
            name = str(len(tensors))
            tensors[name] = value.detach().contiguous().cpu().clone()
            return {TENSOR: name}
        if isinstance(value, Mapping):
            return {ITEMS: [[key, planted(item)] for key, item in value.items()]}
        if isinstance(value, list | tuple):
            return [planted(item) for item in value]
        return value

    tree = json.dumps(planted(state))
    write_tensors(path, tensors, {"tree": tree})


def read_state(path: str | Path) -> dict[Any, Any]:
    """What `write_state` wrote; UserError for anything else."""

    def grown(value: Any) -> Any:
        if isinstance(value, dict):
            if TENSOR in value:
                return file.get_tensor(value[TENSOR])
            return {key: grown(item) for key, item in value[ITEMS]}
        if isinstance(value, list):
            return [grown(item) for item in value]
        return value

    try:
        with safe_open(path, framework="pt") as file:
            state = grown(json.loads((file.metadata() or {})["tree"]))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is no readable state of a stream; save it again") from error
    if not isinstance(state, dict):
        raise UserError(f"{path} is no state of a stream; save it again")
    return state
