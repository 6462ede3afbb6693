"""Writing `.safetensors` files that others may read."""

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write contiguous tensors with the permissions that any new file gets here.

    safetensors alone makes a file that only its owner can read.
    """
    path.touch()
    permissions = path.stat().st_mode
    save_file(dict(tensors), path, None if metadata is None else dict(metadata))
    path.chmod(permissions)
