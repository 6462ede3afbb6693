"""Text embeddings stored on disk, so that the text encoder need not be loaded.

A store is a folder of `*.safetensors` shards; a tensor's name is `embedding_key(prompt)`, its value
the embedding without padding, `[tokens, dim]`, in the dtype that the encoder gave. The same prompt
may lie in several shards.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from utils.config import looked_up
from utils.errors import UserError
from utils.files import whole_files, write_tensors


def embedding_key(prompt: str) -> str:
    """Name of a prompt's embedding: 32 hex digits of the SHA-256 of the stripped text."""
    return hashlib.sha256(prompt.strip().encode("utf-8")).hexdigest()[:32]


def trim(embedding: Tensor) -> Tensor:
    """Drop the zero rows at the end of `[tokens, dim]` (at least one row stays)."""
    rows = (embedding != 0).any(dim=1).nonzero()
    return embedding[: int(rows.max()) + 1 if len(rows) else 1]


def pad_batch(embeddings: Sequence[Tensor]) -> Tensor:
    """Stack `[tokens_i, dim]` into `[B, max tokens, dim]`, zeros behind the shorter ones."""
    return pad_sequence(list(embeddings), batch_first=True)


def write_shard(path: Path, embeddings: Mapping[str, Tensor], fingerprint: str = "") -> None:
    """Write one shard of `{prompt: [tokens, dim]}`, whole or not at all.

    Its metadata say which prompts are in it and the `fingerprint` of the settings that made it.
    """
    tensors = {embedding_key(prompt): trim(e).contiguous() for prompt, e in embeddings.items()}
    prompts = json.dumps(list(embeddings), ensure_ascii=False)
    write_tensors(path, tensors, {"prompts": prompts, "fingerprint": fingerprint})


class EmbeddingStore:
    """Read access to a folder of shards; only the embeddings asked for are read."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = looked_up(folder)
        shards = whole_files(self.folder, "*.safetensors")
        if not shards:
            raise UserError(f"{folder} holds no *.safetensors of text embeddings; check the path")
        self._shard_of: dict[str, Path] = {}
        self.made_by: set[str] = set()  # fingerprints of the settings that made the shards
        for shard in shards:
            try:
                with safe_open(shard, framework="pt") as file:
                    self._shard_of.update(dict.fromkeys(file.keys(), shard))
                    self.made_by.add((file.metadata() or {}).get("fingerprint", ""))
            except SafetensorError as error:
                raise UserError(f"{shard} is not a readable safetensors file") from error

    def __contains__(self, prompt: str) -> bool:
        return embedding_key(prompt) in self._shard_of

    def __len__(self) -> int:
        return len(self._shard_of)

    def require(self, prompts: Iterable[str]) -> None:
        """Raise UserError naming the first of these prompts that is not stored."""
        for prompt in prompts:
            if prompt not in self:
                raise UserError(f"{self.folder} has no embedding of the prompt '{prompt[:60]}'")

    def __getitem__(self, prompt: str) -> Tensor:
        """Embedding `[tokens, dim]` of a prompt, float32; UserError if it is not stored."""
        self.require([prompt])
        key = embedding_key(prompt)
        with safe_open(self._shard_of[key], framework="pt") as file:
            embedding = file.get_tensor(key)
        if embedding.ndim != 2 or not embedding.is_floating_point():
            raise UserError(
                f"{self._shard_of[key]} holds {list(embedding.shape)} of {embedding.dtype} and no "
                "embedding [tokens, dim] of floating point; make it again"
            )
        if not embedding.isfinite().all():
            raise UserError(
                f"{self._shard_of[key]} holds NaN or Inf for the prompt '{prompt[:60]}'; make it "
                "again"
            )
        return embedding.to(torch.float32)
