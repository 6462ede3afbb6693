"""The training of the text encoder: its data, its labels, its held-out loss, and its resuming."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from model.result import LossResult
from shapes import text_encoder
from shapes.text_encoder import TextEncoderTraining
from tests.tiny_training import (
    TrainingWorld,
    assert_goes_on_bit_for_bit,
    assert_heldout_changes_nothing,
    heldout_against_one_batch,
    write_training_world,
)
from trainer.estimate import dry_run_report
from trainer.sharding import open_world
from trainer.trainer import Trainer
from utils.config import ROOT, load_config
from utils.draws import Draws
from utils.errors import UserError

HELDOUT = {"heldout_every": 2, "heldout_videos": 4}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TrainingWorld:
    return write_training_world(tmp_path_factory.mktemp("training"))


@pytest.fixture
def values(world: TrainingWorld) -> dict[str, Any]:
    return world.of_package("shapes:text_encoder", "shapes")


def test_it_goes_on_bit_for_bit(
    world: TrainingWorld, values: dict[str, Any], tmp_path: Path
) -> None:
    values["ema_start_step"] = 2
    assert_goes_on_bit_for_bit(world, tmp_path, values, ["text"], ema=False)


def test_its_held_out_loss_is_that_of_one_batch(
    world: TrainingWorld, values: dict[str, Any], tmp_path: Path
) -> None:
    player, found, expected = heldout_against_one_batch(world, tmp_path, values | HELDOUT)
    assert player == "text"
    del expected["heldout/caption/worst"]
    assert found == pytest.approx(expected, rel=1e-4)
    assert len(found) > 1


def test_measuring_leaves_dropout_alone(
    world: TrainingWorld, values: dict[str, Any], tmp_path: Path
) -> None:
    assert_heldout_changes_nothing(world, tmp_path, values | HELDOUT)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data_path": "{prompts}"}, "its own captions: shapes:train"),
        ({"heldout_data_path": "{prompts}"} | HELDOUT, "heldout_data_path: .* captions"),
        ({"trainer": "shapes:captions"}, "shapes:captions is unknown: use shapes:text_encoder"),
    ],
)
def test_what_it_cannot_train_on_is_refused(
    changes: dict[str, Any],
    said: str,
    world: TrainingWorld,
    values: dict[str, Any],
    tmp_path: Path,
) -> None:
    filled = {
        key: value.format(prompts=world.prompts) if isinstance(value, str) else value
        for key, value in changes.items()
    }
    with pytest.raises(UserError, match=said):
        dry_run_report(world.config(tmp_path, **values | filled), 1)


def test_labels_stand_at_the_tokens_that_speak_of_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With the tokenizer that ships, and of a caption that is cut before its end mark."""
    seen: dict[str, Tensor] = {}

    def record(reader: Any, ids: Tensor, mask: Tensor, labels: Tensor) -> LossResult:
        seen.update(ids=ids, mask=mask, labels=labels)
        return LossResult(torch.zeros(()), {})

    monkeypatch.setattr(text_encoder, "caption_loss", record)
    words = Tokenizer.from_file(str(ROOT / "wan_models/Shapes/google/umt5-xxl/tokenizer.json"))
    captions = [
        "A gray background: a small purple star glides to the upper left at a slow pace.",
        "A small red circle drifts quickly upwards and, behind it, a large blue star drifts slowly "
        "to the left over a navy background.",
    ]
    config = load_config(ROOT / "configs/shapes/text_encoder.yaml", ["device=cpu"])
    with open_world("cpu") as ranks:
        task = Trainer(config, ranks, tmp_path / "run", visualise=False, save=False).task
        assert isinstance(task, TextEncoderTraining)

        def said(place: int) -> list[str]:
            task.loss("text", {"prompt": captions}, Draws(0, 0, range(2)))
            rows = zip(seen["ids"], seen["labels"][..., 2] == place, strict=True)
            return [words.decode(row[chosen].tolist()).strip(" ,.") for row, chosen in rows]

        assert said(0) == [
            "small purple star glides to the upper left at a slow",
            "small red circle drifts quickly upwards",
        ]
        assert said(1) == ["", "large blue star drifts slowly to the left"]
        assert (seen["labels"][..., 0] >= 0).sum(dim=1).equal(seen["mask"].sum(dim=1) - 1)
        task.encoder.text_len = 12
        assert said(0)[0] == "small purple star glides to the"
        assert seen["labels"].shape[:2] == (2, 12)
        assert (seen["labels"][:, -1] == -1).all(), "the end mark"
