"""The shapes world as a data set of training."""

from typing import get_args

import torch

from shapes.world import ShapesDataset, Split, sample_scene
from utils.datasets import UNLIMITED, Item
from utils.errors import UserError


class ShapesVideos:
    """Clips of the shapes world; item: `video` uint8 [F, H, H, 3], `prompt`. It has no end."""

    holds = frozenset({"video", "prompt"})

    def __init__(self, split: str, num_frames: int, height: int, width: int) -> None:
        if split not in get_args(Split):
            known = " or ".join(f"shapes:{name}" for name in get_args(Split))
            raise UserError(f"shapes:{split} is unknown: use {known}.")
        if height != width:
            raise UserError(f"The shapes world is square: {height}x{width} is not possible.")
        self._clips = ShapesDataset(num_frames, split=split, size=height)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return UNLIMITED

    def __getitem__(self, index: int) -> Item:
        clip = self._clips[index]
        return {"video": torch.from_numpy(clip.frames), "prompt": clip.caption}

    def prompt(self, index: int) -> str:
        """See `Dataset`."""
        return sample_scene(self._clips.seed, index, split=self._clips.split).caption
