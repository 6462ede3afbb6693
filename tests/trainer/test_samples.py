"""Sample videos: what one rank cannot write keeps no other waiting."""

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trainer.samples import SampleVideos
from utils.distributed import ALONE
from utils.errors import UserError
from utils.video import VideoWriter


def test_a_failed_write_comes_when_all_passes_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other ranks waited for this one's share of the passes that it left out."""
    made: list[str] = []

    def blocks(prompt: str) -> Iterator[torch.Tensor]:
        for _ in range(3):
            made.append(prompt)
            yield torch.zeros(4, 16, 16, 3, dtype=torch.uint8)

    def stream(prompt: str, num_latent_frames: int) -> Any:
        return nullcontext(blocks(prompt))

    def write(writer: VideoWriter, frames: object) -> None:
        raise UserError(f"cannot write {writer.path.stem[3:]}")

    monkeypatch.setattr(VideoWriter, "write", write)
    pipe: Any = SimpleNamespace(stream=stream, setup=SimpleNamespace(fps=16))
    with pytest.raises(UserError, match="cannot write a cat"):
        SampleVideos(pipe, tmp_path, ["a cat", "a dog"], 3, ALONE)(100)
    assert made == ["a cat"] * 3 + ["a dog"] * 3
    assert not list(tmp_path.rglob("*.mp4"))
