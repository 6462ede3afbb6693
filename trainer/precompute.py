"""Data computed once before training: shards that a stopped run takes up, spread over ranks.

The verbs themselves are in `scripts/precompute.py`.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from pipeline.records import file_hash
from utils.config import Config, fingerprint, save_config
from utils.datasets import UNLIMITED, Dataset, open_dataset
from utils.distributed import Ranks
from utils.errors import UserError
from utils.files import locked, remove_leftovers


def read_prompts_of(
    paths: Sequence[str], count: int | None, extended_path: str | None = None
) -> list[str]:
    """The prompts of data sets of any kind, one after the other, or the first `count` of them."""
    if extended_path and len(paths) > 1:
        raise UserError("extended prompts go with one prompt file: give one --data_path")
    prompts: list[str] = []
    for path in paths:
        # Captions are wanted alone: any length and size of clip will do.
        data = open_dataset(path, num_frames=1, height=16, width=16, extended_path=extended_path)
        left = None if count is None else count - len(prompts)
        prompts += [data.prompt(index) for index in range(first_items(data, left))]
    return prompts


def first_items(data: Dataset, count: int | None) -> int:
    """How many items of a data set are meant: `count` at most, else all it has."""
    if count is None and len(data) >= UNLIMITED:
        raise UserError("this data set has no end: say how many items to take with --count")
    if count is not None and count < 0:
        raise UserError("--count must be at least 1")
    return len(data) if count is None else min(count, len(data))


def weights_hash(path: Path) -> str:
    """A short hash of a weights file, or of all weights in a folder."""
    return files_hash([path] if path.is_file() else sorted(path.glob("**/*.safetensors")))


def files_hash(files: Sequence[Path]) -> str:
    """A short hash of some files, wherever they are."""
    return fingerprint({str(place): file_hash(file) for place, file in enumerate(files)})


@dataclass(frozen=True)
class Shard:
    """A file to write: items `start ... start + len(prompts) - 1` of the data."""

    path: Path
    start: int
    prompts: list[str]

    @property
    def items(self) -> range:
        """Indices of its items."""
        return range(self.start, self.start + len(self.prompts))

    def batches(self, size: int) -> Iterator[tuple[range, list[str]]]:
        """Indices and prompts of `size` items at a time."""
        for first in range(0, len(self.prompts), size):
            yield self.items[first : first + size], self.prompts[first : first + size]


def list_shards(folder: str | Path, prompts: Sequence[str], size: int) -> list[Shard]:
    """All shards of a run, named by their number; their contents do not depend on the ranks."""
    if size < 1:
        raise UserError(f"--shard_size {size} must be at least 1")
    if not prompts:
        raise UserError("there is nothing to do: --count must be at least 1")
    return [
        Shard(Path(folder) / f"{number:06d}.safetensors", start, list(prompts[start:][:size]))
        for number, start in enumerate(range(0, len(prompts), size))
    ]


@dataclass(frozen=True)
class ShardRun:
    """Writes this rank's share of the shards that are not there yet.

    `made_by`: a fingerprint of the settings. A shard of other settings is never overwritten; the
    last shard is made again when `--count` has grown.
    """

    config: Config
    made_by: str
    ranks: Ranks

    def missing(self, shards: Sequence[Shard]) -> list[Shard]:
        """This rank's unfinished shards; UserError if files of other settings are in the way."""
        done = {shard.path for shard in shards if self._is_done(shard)}
        # Shared out before the done ones are left out: other ranks may be finishing some now.
        return [shard for shard in self.ranks.share(shards) if shard.path not in done]

    def write(self, shards: Sequence[Shard], make: Callable[[Shard, tqdm], None]) -> None:
        """`make` each shard; it moves the bar on by the items it has done."""
        folder, is_main = shards[0].path.parent, self.ranks.is_main
        total = sum(len(shard.prompts) for shard in shards)
        with (
            locked(folder, "give another --output_folder", is_main=is_main),
            tqdm(total=total, desc="items of this rank", disable=not is_main) as bar,
        ):
            if self.ranks.world == 1:  # else a rank may be writing already
                remove_leftovers(folder)
            if is_main:
                save_config(self.config, folder / "config.yaml")
            for shard in shards:
                try:
                    make(shard, bar)
                except torch.OutOfMemoryError as error:
                    raise UserError(
                        "the GPU has too little memory: use a smaller --batch_size or resolution"
                    ) from error

    def _is_done(self, shard: Shard) -> bool:
        if not shard.path.is_file():
            return False
        prompts, made_by = _header(shard.path)
        if made_by != self.made_by or prompts != shard.prompts[: len(prompts)]:
            raise UserError(
                f"{shard.path} was made with other settings or prompts: give another "
                "--output_folder, or remove it"
            )
        return len(prompts) == len(shard.prompts)


def _header(path: Path) -> tuple[list[str], str]:
    """The prompts of a shard and the fingerprint of the settings that made it."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a readable safetensors file: remove it") from error
    return json.loads(metadata.get("prompts", "[]")), metadata.get("fingerprint", "")
