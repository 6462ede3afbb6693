"""The shapes world as a data set."""

import pytest
import torch

from shapes.dataset import ShapesVideos
from shapes.world import ShapesDataset
from utils.datasets import UNLIMITED, open_dataset
from utils.errors import UserError


def test_shapes_are_drawn_on_demand_and_splits_differ() -> None:
    train = open_dataset("shapes:train", num_frames=3, height=32, width=32)
    assert isinstance(train, ShapesVideos)
    assert len(train) == UNLIMITED
    item, clip = train[12345678], ShapesDataset(3, split="train", size=32)[12345678]
    assert torch.equal(item["video"], torch.from_numpy(clip.frames))
    assert item["prompt"] == clip.caption == train.prompt(12345678)
    heldout = open_dataset("shapes:heldout", num_frames=3, height=32, width=32)
    assert [train.prompt(i) for i in range(3)] != [heldout.prompt(i) for i in range(3)]


@pytest.mark.parametrize(
    ("path", "width", "words"),
    [("shapes:test", 32, "shapes:train or shapes:heldout"), ("shapes:train", 48, "square")],
)
def test_what_it_has_not_is_said(path: str, width: int, words: str) -> None:
    with pytest.raises(UserError, match=words):
        open_dataset(path, num_frames=3, height=32, width=width)
