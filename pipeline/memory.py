"""What an inference will hold in memory, from sizes alone, before anything is loaded."""

from pathlib import Path

import torch

from pipeline.setup import Setup
from wan.checkpoints import memory_estimate

GIB = 2**30


def memory_report(setup: Setup, dtype: torch.dtype, batch: int = 1) -> str:
    """One line: what is needed while prompts are encoded, and then while videos are made.

    The text encoder is freed in between (`VideoPipeline.free_text_encoder`).
    """
    assert setup.folder is not None
    rows = batch if setup.distilled else 2 * batch  # guidance runs every video twice
    cache = setup.cache(setup.sizes, batch=rows, dtype=dtype, device=torch.device("meta"))
    text = 0 if setup.text_embeddings else _file_bytes(setup.folder.text_encoder)
    transformer = {"transformer": memory_estimate(setup.sizes, dtype)}
    encoding = transformer | {"text encoder": text * dtype.itemsize // 2}  # its file is in bf16
    making = transformer | {
        "cache": cache.num_bytes,
        "VAE": _file_bytes(setup.folder.vae) * dtype.itemsize // 4,  # the published one is in fp32
    }
    phases = {"to make videos": making}
    if text:
        phases = {"to encode prompts": encoding, **phases}
    said = ", then ".join(
        f"{readable(sum(parts.values()))} {what} "
        f"({', '.join(f'{name} {readable(size)}' for name, size in parts.items())})"
        for what, parts in phases.items()
    )
    return f"memory needed: about {said} and activations"


def readable(size: int) -> str:
    """Bytes in words."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 2**20:.1f} MiB"


def _file_bytes(path: Path) -> int:
    if path.is_dir():
        return sum(file.stat().st_size for file in path.glob("*.safetensors"))
    return path.stat().st_size if path.is_file() else 0
