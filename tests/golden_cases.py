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


OWN_DIR = Path(__file__).parent / "golden"
# What the published files hold, whatever the sizes and seeds of a set: a set may leave them out.
FACTS = ("manifest_", "published_configs")


def golden_dir() -> Path:
    return Path(os.environ.get("GOLDEN_DIR", OWN_DIR))


def load_json(name: str) -> dict[str, Any]:
    path = golden_dir() / f"{name}.json"
    if name.startswith(FACTS) and not path.is_file():
        path = OWN_DIR / path.name
    return json.loads(path.read_text(encoding="utf-8"))


def load_case(name: str) -> Case:
    return Case(load_json(name), load_file(golden_dir() / f"{name}.safetensors"))


def load_weights(file_name: str) -> dict[str, Tensor]:
    return load_file(golden_dir() / file_name)


def recorded_names(prefix: str = "") -> list[str]:
    """Names of all files of the set that start with `prefix`."""
    files = (path for kind in ("json", "safetensors") for path in golden_dir().glob(f"*.{kind}"))
    return sorted({path.stem for path in files if path.stem.startswith(prefix)})


def case_names(prefix: str) -> list[str]:
    """Names of all recorded cases that start with `prefix`; without one, a name that fails."""
    return recorded_names(prefix) or [prefix]


def entries(name: str, key: str) -> list[str]:
    """Names of what a case recorded under `key`; without the case, a name that fails."""
    return list(load_json(name)[key]) if (golden_dir() / f"{name}.json").is_file() else ["missing"]
