"""Data sets: what a training item is, where it is stored, and in which order items come.

Items are dicts of CPU tensors and strings; `prompt` is always among them. `open_dataset` finds out
what a path holds.

A *shard* is one safetensors file of N items, written by `write_shard`:

- tensor `latents` [N, F, C, h, w], or `trajectories` [N, S, F, C, h, w] (float32, bf16 or fp16);
- metadata `format` ("latents" | "ode_pairs"), `prompts` (JSON list of N), `timesteps` (JSON list of
  S, noisy to clean, the last is 0; empty for latents), `fingerprint` (of the settings that made
  it).

Only the rows asked for are read, and they come as float32.
"""

import json
import logging
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from utils.config import looked_up
from utils.draws import Purpose
from utils.errors import UserError
from utils.files import is_temporary, whole_files, write_tensors
from utils.noise import philox
from utils.packages import offered, split_name
from utils.prompts import PROMPT_SUFFIXES, read_caption, read_extended_prompts, read_prompts
from utils.video import VIDEO_SUFFIXES, probe_video, read_video

logger = logging.getLogger(__name__)

Item = dict[str, Any]

UNLIMITED = 2**40
"""`len` of a data set without end: more items than any training reads."""

FAULTS_NAMED = 5
TENSOR_OF = {"latents": "latents", "ode_pairs": "trajectories"}


class Dataset(Protocol):
    """Items by index."""

    @property
    def holds(self) -> frozenset[str]:
        """What each item has."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Item: ...

    def prompt(self, index: int) -> str:
        """The item's prompt, without reading the rest of it."""
        ...


def open_dataset(
    path: str | Path,
    *,
    num_frames: int,
    height: int,
    width: int,
    fps: float | None = None,
    extended_path: str | Path | None = None,
) -> Dataset:
    """The data set at a path: what it is follows from what is there.

    A file of prompts in one of their forms (`PROMPT_SUFFIXES`), a folder of .safetensors latents or
    ODE pairs (its shards say which), a folder of videos with captions; `package:split`, such as
    `shapes:train`, is what that package offers (see utils/packages.py). Videos give clips of
    `num_frames` x `height` x `width`, at `fps` frames per second (None: the files' own frames);
    `extended_path` is for prompts.

    Raises:
        UserError: there is nothing of the kind, or it is not whole.
    """
    named = split_name(str(path))
    if named is not None:
        if extended_path is not None:
            raise UserError(f"{path} writes its own prompts: leave out the extended ones.")
        package, split = named
        size = {"num_frames": num_frames, "height": height, "width": width}
        return offered(package, "open_dataset")(split, **size)
    place = looked_up(path)
    if place.suffix.lower() in PROMPT_SUFFIXES and not place.is_dir():
        return PromptDataset(place, extended_path)
    if extended_path is not None:
        raise UserError(f"Extended prompts go with a prompt file, and {path} is none.")
    shards = whole_files(place, "*.safetensors")
    if shards:
        kind = LatentDataset if ShardInfo.read(shards[0]).format == "latents" else OdePairDataset
        return kind(place)
    if _videos(place):
        return VideoDataset(place, num_frames, height, width, fps)
    forms = ", ".join(PROMPT_SUFFIXES)
    raise UserError(
        f"{path} {'holds no data' if place.exists() else 'does not exist'}: give a file of prompts "
        f"({forms}), a folder of .safetensors shards, a folder of videos with .txt captions, or "
        "package:split, as in shapes:train."
    )


def collate(items: Sequence[Item]) -> dict[str, Any]:
    """Items as one batch: tensors stacked to `[B, ...]`, everything else in lists of B."""
    columns = {key: [item[key] for item in items] for key in items[0]}
    return {
        key: torch.stack(column) if isinstance(column[0], Tensor) else column
        for key, column in columns.items()
    }


class GlobalOrder:
    """The order of a data set's items over all of training: a pure function of (length, seed).

    Number n counts items over all ranks and micro-batches, so it is all that a resumed training
    has to know of its place in the data. Epoch n // length is a permutation of its own; every item
    comes once in it, however the numbers are dealt to ranks. A data set without end
    (`UNLIMITED`) is read as it comes: its items are independent draws already.
    """

    def __init__(self, length: int, seed: int) -> None:
        if length < 1:
            raise ValueError("there is no order of no items")
        self.length = length
        self.seed = seed
        self._epochs: dict[int, NDArray[np.int64]] = {}  # the last two: batches may straddle

    def index(self, n: int) -> int:
        """The item that is number `n` of training."""
        if self.length >= UNLIMITED:
            return n
        epoch, place = divmod(n, self.length)
        if epoch not in self._epochs:
            newest = list(self._epochs.items())[-1:]
            self._epochs = dict([*newest, (epoch, self._permutation(epoch))])
        return int(self._epochs[epoch][place])

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        # Sorting raw bits, which numpy promises never to change, unlike `permutation`.
        bits = philox(self.seed, Purpose.DATA_ORDER, (epoch,)).bit_generator.random_raw(self.length)
        return np.argsort(bits, kind="stable")


# --- prompts ------------------------------------------------------------------------------------


class PromptDataset:
    """The prompts of a text file; item: `prompt`, in the wording that the model reads.

    `extended_path` holds the longer wordings, line by line; where it is given they are the items.
    """

    holds = frozenset({"prompt"})

    def __init__(self, path: str | Path, extended_path: str | Path | None = None) -> None:
        prompts = self._prompts = read_prompts(path)
        if extended_path:
            self._prompts = read_extended_prompts(looked_up(extended_path), prompts)

    def __len__(self) -> int:
        return len(self._prompts)

    def __getitem__(self, index: int) -> Item:
        return {"prompt": self.prompt(index)}

    def prompt(self, index: int) -> str:
        """See `Dataset`."""
        return self._prompts[index]


# --- videos -------------------------------------------------------------------------------------


class VideoDataset:
    """Captioned videos, `name.mp4` with `name.txt`, of a folder and its sub-folders, by path.

    Item: `video` uint8 [num_frames, height, width, 3] (resized and cropped to cover the size) and
    `prompt`. The frames are those seen at `fps`, by the time stamps of the file; None takes its own
    frames as they come. Opening decodes each file once, to count them.
    """

    holds = frozenset({"video", "prompt"})

    def __init__(
        self,
        folder: str | Path,
        num_frames: int,
        height: int,
        width: int,
        fps: float | None = None,
    ) -> None:
        """Raises UserError naming the files that are unreadable, too short or not captioned."""
        self.num_frames, self.height, self.width, self.fps = num_frames, height, width, fps
        self._paths = _videos(Path(folder))
        if not self._paths:
            kinds = ", ".join(VIDEO_SUFFIXES)
            raise UserError(f"{folder} holds no video ({kinds}): put videos and captions there.")
        _say_passed_over(Path(folder))
        self._prompts: list[str] = []
        self._lengths: list[int] = []
        faults = []
        for path in self._paths:
            try:
                self._prompts.append(_read_caption(path))
                self._lengths.append(self._length(path))
            except UserError as error:
                faults.append(str(error))
        if faults:
            listed = "\n".join(faults[:FAULTS_NAMED])
            more = len(faults) - FAULTS_NAMED
            rest = f"\n... and {more} more" if more > 0 else ""
            raise UserError(
                f"{len(faults)} of {len(self._paths)} videos cannot be used:\n{listed}{rest}"
            )

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Item:
        return self.clip(index)

    def prompt(self, index: int) -> str:
        """See `Dataset`."""
        return self._prompts[index]

    def clip(self, index: int, fraction: float = 0.0) -> Item:
        """The item cut from its file at `fraction` (0 <= fraction < 1) of the possible starts.

        0 is the file's beginning; every start is met by an equal share of the fractions.
        """
        starts = self._lengths[index] - self.num_frames + 1
        video = read_video(
            self._paths[index],
            int(fraction * starts),
            self.num_frames,
            fps=self.fps,
            size=(self.height, self.width),
        )
        return {"video": video, "prompt": self.prompt(index)}

    def _length(self, path: Path) -> int:
        frames = probe_video(path, self.fps).frames
        if frames < self.num_frames:
            rate = "" if self.fps is None else f" at {self.fps:g} FPS"
            raise UserError(
                f"{path} has {frames} frames{rate} and {self.num_frames} are needed: take it away, "
                "or ask for fewer frames."
            )
        return frames


def _videos(folder: Path) -> list[Path]:
    """The videos under a folder by path, without those that are still being written."""
    return [path for path in _files(folder) if path.suffix.lower() in VIDEO_SUFFIXES]


def _files(folder: Path) -> list[Path]:
    """The files under a folder by path, without hidden and unfinished ones."""
    found = sorted(folder.rglob("*"), key=lambda path: path.relative_to(folder).as_posix())
    return [
        path
        for path in found
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and not is_temporary(path)
    ]


def _say_passed_over(folder: Path) -> None:
    """Say in one line how many files are neither videos nor captions of one."""
    captions = {path.with_suffix(".txt") for path in _videos(folder)}
    known = set(_videos(folder)) | captions
    others = [path.relative_to(folder) for path in _files(folder) if path not in known]
    if others:
        logger.info(
            "%s: %d files that are no videos are passed over (%s, …)",
            folder,
            len(others),
            others[0],
        )


def _read_caption(video: Path) -> str:
    caption = video.with_suffix(".txt")
    if not caption.is_file():
        raise UserError(f"{video} has no caption: write it into {caption}.")
    return read_caption(caption)


# --- shards -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShardInfo:
    """What a shard says of itself; `shape` is that of its tensor, items first."""

    path: Path
    format: str
    shape: tuple[int, ...]
    prompts: tuple[str, ...]
    timesteps: tuple[float, ...]
    fingerprint: str

    @classmethod
    def read(cls, path: Path) -> "ShardInfo":
        """Read the header alone; UserError if the file is no shard of this format."""
        try:
            with safe_open(path, framework="pt") as file:
                metadata: Mapping[str, str] = file.metadata() or {}
                kind = metadata["format"]
                info = cls(
                    path,
                    kind,
                    tuple(file.get_slice(TENSOR_OF[kind]).get_shape()),
                    tuple(json.loads(metadata["prompts"])),
                    tuple(json.loads(metadata["timesteps"])),
                    metadata["fingerprint"],
                )
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is not a readable safetensors file: make it again.") from error
        except (KeyError, ValueError, TypeError) as error:
            raise UserError(
                f"{path} is no shard of latents or ODE pairs: make them with scripts/precompute.py."
            ) from error
        dimensions = 5 if kind == "latents" else 6
        texts = all(isinstance(prompt, str) for prompt in info.prompts)
        if not (info.prompts and texts and len(info.shape) == dimensions):
            raise UserError(f"{path} holds no items with prompts in text: make it again.")
        states = info.shape[1:2] if kind == "ode_pairs" else (0,)
        if info.shape[:1] != (len(info.prompts),) or states != (len(info.timesteps),):
            raise UserError(f"{path} contradicts its own metadata: make it again.")
        return info


def write_shard(
    path: Path,
    data: Tensor,
    prompts: Sequence[str],
    *,
    timesteps: Sequence[float] | None = None,
    fingerprint: str = "",
) -> None:
    """Write N items, whole or not at all.

    `data`: latents `[N, F, C, h, w]`, or with `timesteps` (S, noisy to clean, the last is 0)
    trajectories `[N, S, F, C, h, w]`; stored in its dtype.
    """
    kind = "latents" if timesteps is None else "ode_pairs"
    leading = [len(prompts)] if timesteps is None else [len(prompts), len(timesteps)]
    if list(data.shape[:-4]) != leading:
        raise ValueError(f"{list(data.shape)} is no shape of {leading} {kind}")
    metadata = {
        "format": kind,
        "prompts": json.dumps(list(prompts), ensure_ascii=False),
        "timesteps": json.dumps(list(timesteps or ())),
        "fingerprint": fingerprint,
    }
    write_tensors(path, {TENSOR_OF[kind]: data.cpu().contiguous()}, metadata)


class _Shards:
    """A folder of shards of one format, one after the other by name."""

    format: ClassVar[str]

    def __init__(self, folder: str | Path) -> None:
        """Raises UserError for a folder without shards, or with shards that do not go together."""
        self.shards = [ShardInfo.read(path) for path in whole_files(Path(folder), "*.safetensors")]
        if not self.shards:
            raise UserError(f"{folder} holds no .safetensors shard: check the path.")
        first = self.shards[0]
        for shard in self.shards:
            if shard.format != self.format:
                raise UserError(f"{shard.path} holds {shard.format}, not {self.format}.")
            if (shard.shape[1:], shard.timesteps) != (first.shape[1:], first.timesteps):
                raise UserError(
                    f"{shard.path} and {first.path} hold items of different sizes or timesteps: "
                    "keep them in different folders."
                )
        self._ends = list(accumulate(len(shard.prompts) for shard in self.shards))

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def item_shape(self) -> tuple[int, ...]:
        """Shape of one item's tensor."""
        return self.shards[0].shape[1:]

    def prompt(self, index: int) -> str:
        """See `Dataset`."""
        shard, row = self._find(index)
        return shard.prompts[row]

    def _find(self, index: int) -> tuple[ShardInfo, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        place = bisect_right(self._ends, index)
        shard = self.shards[place]
        return shard, index - self._ends[place] + len(shard.prompts)

    def _row(self, index: int) -> Tensor:
        shard, row = self._find(index)
        with safe_open(shard.path, framework="pt") as file:
            item = file.get_slice(TENSOR_OF[self.format])[row].to(torch.float32)
        if not item.isfinite().all():
            raise UserError(f"{shard.path} holds NaN or Inf (item {row}): make it again.")
        return item


class LatentDataset(_Shards):
    """Encoded videos; item: `latents` [F, C, h, w] float32, `prompt`."""

    format = "latents"
    holds = frozenset({"latents", "prompt"})

    def __getitem__(self, index: int) -> Item:
        return {"latents": self._row(index), "prompt": self.prompt(index)}


class OdePairDataset(_Shards):
    """Trajectories of the teacher's ODE; item: `trajectory` [S, F, C, h, w] float32, `prompt`."""

    format = "ode_pairs"
    holds = frozenset({"trajectory", "prompt"})

    @property
    def timesteps(self) -> tuple[float, ...]:
        """The timestep of each of the S states, noisy to clean; the last is 0."""
        return self.shards[0].timesteps

    def __getitem__(self, index: int) -> Item:
        return {"trajectory": self._row(index), "prompt": self.prompt(index)}
