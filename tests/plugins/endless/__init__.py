"""A package that plugs in by name: clips without end of one grey level each, and a truth meter."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from evaluation.meters import Curve, FrameMeter, Result
from utils.datasets import UNLIMITED, Item
from utils.errors import UserError


class Greys:
    """Item: `video` uint8 [F, H, W, 3] of one grey level, `prompt`."""

    holds = frozenset({"video", "prompt"})

    def __init__(self, first: int, shape: tuple[int, ...]) -> None:
        self._first, self._shape = first, shape

    def __len__(self) -> int:
        return UNLIMITED

    def __getitem__(self, index: int) -> Item:
        level = (37 * index + self._first) % 256
        video = torch.full(self._shape, level, dtype=torch.uint8)
        video[:, ::2] //= 2  # something to learn
        return {"video": video, "prompt": self.prompt(index)}

    def prompt(self, index: int) -> str:
        return f"grey {(37 * index + self._first) % 256}"


def open_dataset(split: str, *, num_frames: int, height: int, width: int) -> Greys:
    if split not in ("train", "heldout"):
        raise UserError(f"endless:{split} is unknown: use endless:train or endless:heldout.")
    return Greys(["train", "heldout"].index(split), (num_frames, height, width, 3))


def held_out_prompts(count: int) -> list[str]:
    return [f"grey {37 * index + 1}" for index in range(count)]


class _Measuring:
    def __init__(self, level: int) -> None:
        self._level, self._errors = level, []

    def add(self, frames: np.ndarray) -> None:
        self._errors += [float(np.abs(frame - float(self._level)).mean()) for frame in frames]

    def report(self, *, fps: float, first: int, block: int) -> Any:
        error = sum(self._errors) / len(self._errors)
        return {"seconds": 1.0, "error": error, "per_second": {"error": [error]}}


class GreyTruth(FrameMeter):
    """Square videos of the prompts "grey 38"."""

    def start(self, prompt: str, *, height: int, width: int) -> Any:
        word, _, level = prompt.partition(" ")
        known = word == "grey" and height == width
        return _Measuring(int(level)) if known else None

    def extra_curves(self, results: Sequence[Result]) -> Mapping[str, list[float]]:
        return {"share": [1.0 for _ in results[:2]]}

    def groups(self, results: Sequence[Result]) -> Mapping[str, list[Result]]:
        dark = [result for result in results if len(result["prompt"]) < len("grey 100")]
        return {"dark": dark, "light": [r for r in results if r not in dark]} if dark else {}


def open_meter() -> GreyTruth:
    return GreyTruth(
        name="endless",
        version=1,
        main_figures={"error": ("error",), "speed of making": ("fps",)},
        curves={"error": Curve("error"), "share": Curve("share", share=True)},
    )
