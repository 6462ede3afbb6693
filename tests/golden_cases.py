"""Access to the recorded numbers of the published implementations.

The directory comes from the environment variable GOLDEN_DIR (default: tests/golden), so the same
tests run over any set of the same format; nothing here assumes a size, a seed or a count.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One recorded case: what was run (`meta`, the json) and its tensors."""

    meta: dict[str, Any]
    tensors: dict[str, Tensor]


def golden_dir() -> Path:
    return Path(os.environ.get("GOLDEN_DIR", Path(__file__).parent / "golden"))


def load_json(name: str) -> dict[str, Any]:
    return json.loads((golden_dir() / f"{name}.json").read_text(encoding="utf-8"))


def load_case(name: str) -> Case:
    return Case(load_json(name), load_file(golden_dir() / f"{name}.safetensors"))


def load_weights(file_name: str) -> dict[str, Tensor]:
    return load_file(golden_dir() / file_name)


def case_names(prefix: str) -> list[str]:
    """Names of all recorded cases that start with `prefix`; none at all is an error."""
    names = sorted(p.stem for p in golden_dir().glob(f"{prefix}*.safetensors"))
    if not names:
        raise FileNotFoundError(f"no golden case '{prefix}*' in {golden_dir()}")
    return names
