"""Which videos an update has, and that no item is dropped or repeated within an epoch."""

import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pipeline.setup import Setup
from tests.tiny_training import FRAMES, LATENT, PROMPTS, TrainingWorld
from trainer.data import Batches, BatchSplit, open_training_data, split_batches
from trainer.tasks import find_task
from utils.datasets import Item, VideoDataset
from utils.draws import Draws
from utils.errors import UserError


@pytest.mark.parametrize(
    ("keys", "ranks", "videos", "accumulation"),
    [
        ({"global_batch_size": 16}, 2, 16, 4),
        ({"global_batch_size": 16, "total_batch_size": 16}, 2, 16, 4),
        ({"global_batch_size": None, "total_batch_size": 8}, 4, 8, 1),
        ({"global_batch_size": None, "gradient_accumulation_steps": 3}, 2, 12, 3),
        ({"global_batch_size": None}, 2, 4, 1),
    ],
)
def test_videos_per_update(
    keys: dict[str, Any],
    ranks: int,
    videos: int,
    accumulation: int,
    training_world: TrainingWorld,
    tmp_path: Path,
) -> None:
    plan = split_batches(training_world.config(tmp_path, batch_size=2, **keys), ranks)
    assert (plan.videos, plan.accumulation, plan.notes) == (videos, accumulation, ())
    assert plan.describe() == (
        f"{ranks} ranks x 2 videos x {accumulation} micro-batches = {videos} videos per update"
    )


@pytest.mark.parametrize(
    ("keys", "videos", "named"),
    [
        ({"global_batch_size": 8, "total_batch_size": 64}, 8, ["total_batch_size=64"]),
        (
            {"global_batch_size": 8, "total_batch_size": 4, "gradient_accumulation_steps": 9},
            8,
            ["total_batch_size=4", "gradient_accumulation_steps=9", "2 micro-batches"],
        ),
        (
            {
                "global_batch_size": None,
                "total_batch_size": 4,
                "gradient_accumulation_steps": 7,
            },
            4,
            ["gradient_accumulation_steps=7"],
        ),
    ],
)
def test_a_disagreement_is_one_line(
    keys: dict[str, Any],
    videos: int,
    named: list[str],
    training_world: TrainingWorld,
    tmp_path: Path,
) -> None:
    plan = split_batches(training_world.config(tmp_path, batch_size=2, **keys), 2)
    assert plan.videos == videos
    (note,) = plan.notes
    assert all(name in note for name in named)
    assert f"{videos} videos per update" in note


def test_fewer_videos_than_the_recipe_are_said(
    training_world: TrainingWorld, tmp_path: Path
) -> None:
    plan = split_batches(training_world.config(tmp_path, recipe_batch_size=64), 2)
    assert plan.notes == (
        "4 videos per update are fewer than the recipe's 64: set global_batch_size=64",
    )
    enough = training_world.config(tmp_path, recipe_batch_size=64, global_batch_size=64)
    assert not split_batches(enough, 2).notes


@pytest.mark.parametrize(
    ("videos", "ranks", "batch_size", "micro_batches", "each"),
    [
        (64, 24, 1, 3, "0 or 1"),
        (64, 24, 2, 2, "1 or 2"),
        (16, 2, 3, 3, "2 or 3"),
        (5, 5, 4, 1, "1"),
        (7, 2, 1, 4, "0 or 1"),
        (4, 3, 1, 2, "0 or 1"),
    ],
)
def test_any_number_of_ranks_shares_an_update(
    videos: int,
    ranks: int,
    batch_size: int,
    micro_batches: int,
    each: str,
    training_world: TrainingWorld,
    tmp_path: Path,
) -> None:
    """24 ranks were refused 64 videos. Every video counts once, and equally much."""
    keys = {"batch_size": batch_size, "global_batch_size": videos}
    split = split_batches(training_world.config(tmp_path, **keys), ranks)
    assert split.accumulation == micro_batches
    assert f"x {each} videos x" in split.describe()
    dealt: Counter[int] = Counter()
    weights: Counter[int] = Counter()
    for micro in range(split.accumulation):
        for rank in range(ranks):
            rows = split.indices(micro, rank)
            assert len(rows) <= batch_size
            dealt.update(rows)
            for row in rows:  # of the mean over the rows, then of that over the ranks
                weights[row] += split.weight(len(rows)) / len(rows) / ranks
    own = [split.indices_or_one(m, rank) for m in range(micro_batches) for rank in range(ranks)]
    assert len({*own}) == len(own), "ranks would take one micro-batch's rollouts for another's"
    assert dealt == dict.fromkeys(range(videos), 1)
    assert list(weights.values()) == pytest.approx([1 / videos] * videos)
    even = videos % (micro_batches * ranks) == 0
    assert any("not shared evenly" in note for note in split.notes) is not even


def test_more_ranks_than_videos_are_refused(training_world: TrainingWorld, tmp_path: Path) -> None:
    config = training_world.config(tmp_path, batch_size=1, global_batch_size=16)
    with pytest.raises(UserError, match="start at most 16, or set global_batch_size=24"):
        split_batches(config, 24)


@pytest.mark.parametrize(("ranks", "batch_size"), [(1, 1), (2, 1), (1, 2), (2, 3), (3, 2), (5, 2)])
def test_every_item_comes_once_per_epoch_however_it_is_dealt(
    ranks: int, batch_size: int, training_world: TrainingWorld, tmp_path: Path
) -> None:
    """Seven items and twelve videos per update, so updates straddle epochs."""
    config = training_world.config(tmp_path, batch_size=batch_size, global_batch_size=12)
    plan, dataset = split_batches(config, ranks), open_training_data(config, Setup.of(config))
    dealt = [Batches(dataset, plan, rank, seed=3) for rank in range(ranks)]
    sequence: list[str] = []
    for update in range(7):
        row: dict[int, str] = {}
        for batches in dealt:
            for micro in range(plan.accumulation):
                batch, draws, _ = batches.micro_batch(micro, Draws(0, update, ()))
                assert draws.indices == plan.indices(micro, batches.rank)
                row |= dict(zip(draws.indices, batch["prompt"], strict=True))
            batches.advance()
        assert sorted(row) == list(range(12))
        sequence += [row[index] for index in range(12)]
    for epoch in range(12):
        assert Counter(sequence[epoch * 7 : epoch * 7 + 7]) == Counter(PROMPTS)
    assert sequence[:7] != sequence[7:14]
    alone = Batches(dataset, split_batches(config, 1), 0, seed=3)
    assert sequence[:5] == [dataset[alone.order.index(n)]["prompt"] for n in range(5)]


def test_what_is_read_ahead_is_what_is_asked_for_and_its_errors_wait(
    training_world: TrainingWorld, tmp_path: Path
) -> None:
    """In a thread, beside the step that is made; nobody hears of an item that is not trained on."""
    config = training_world.config(tmp_path, batch_size=2, global_batch_size=4)
    dataset, threads = open_training_data(config, Setup.of(config)), []

    class Watched:
        def __len__(self) -> int:
            return len(dataset)

        def __getitem__(self, index: int) -> dict[str, Any]:
            threads.append(threading.current_thread())
            if dataset.prompt(index) in broken:
                raise UserError("a broken item")
            return dataset[index]

    broken: list[str] = []
    split = split_batches(config, 1)
    plain, batches = Batches(dataset, split, 0, seed=3), Batches(Watched(), split, 0, seed=3)  # type: ignore[arg-type]
    later = plain.micro_batch(1, Draws(0, 0, ()))
    batches.read_ahead(1, Draws(0, 0, ()))
    assert batches.micro_batch(1, Draws(0, 0, ())) == later
    assert threading.main_thread() not in threads

    broken += later[0]["prompt"]
    batches.read_ahead(1, Draws(0, 0, ()))
    other = batches.micro_batch(0, Draws(0, 0, ()))
    assert other == plain.micro_batch(0, Draws(0, 0, ()))
    batches.read_ahead(1, Draws(0, 0, ()))
    with pytest.raises(UserError, match="a broken item"):
        batches.micro_batch(1, Draws(0, 0, ()))


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        (
            "flow",
            {"image_or_video_shape": [1, FRAMES, 16, 4, 4]},
            "the latents in .* are of .* the config of",
        ),
        ("flow", {"image_or_video_shape": [1, FRAMES + 1, *LATENT]}, "encode the videos"),
        ("flow", {"image_or_video_shape": [1, FRAMES - 1, *LATENT]}, None),
        ("flow", {"prompt_dropout": 0.5, "text_embeddings": None}, None),
        ("flow", {"sample_every": 1, "sample_prompts": ["a tree"]}, "prompt 'a tree'"),
        (
            "flow",
            {"data_path": "endless:train", "image_or_video_shape": [1, FRAMES, 16, 4, 4]},
            "set load_raw_video=true",
        ),
        ("ode", {"image_or_video_shape": [1, FRAMES, 16, 4, 4]}, "the trajectories are of"),
        ("ode", {"denoising_step_list": [1000, 500]}, "the trajectories are at timesteps"),
        ("ode", {}, None),
    ],
)
def test_data_are_checked_before_anything_is_built(
    kind: str,
    changes: dict[str, Any],
    said: str | None,
    training_world: TrainingWorld,
    tmp_path: Path,
) -> None:
    """Latents of another size ended in a traceback, and without a mask trained all the same."""
    task = training_world.ode() if kind == "ode" else training_world.flow()
    config = training_world.config(tmp_path, **task | changes)
    setup = Setup.of(config)
    data = open_training_data(config, setup)
    if said is None:
        find_task(config.trainer).check_data(config, setup, data)
    else:
        with pytest.raises(UserError, match=said):
            find_task(config.trainer).check_data(config, setup, data)


class Cuts(VideoDataset):
    """Of each clip where it is cut."""

    def __init__(self) -> None:
        pass

    def __len__(self) -> int:
        return 6

    def clip(self, index: int, start: float) -> Item:
        return {"prompt": f"{index} from {start}"}


def test_a_batch_that_is_read_again_is_cut_alike() -> None:
    """A run that went on between two uses of a rollout had other cuts of the same videos."""
    batches = Batches(Cuts(), BatchSplit(2, 2, 1, 1), rank=0, seed=0)
    first, again = (batches.micro_batch(0, Draws(0, update, ()))[0] for update in (4, 8))
    assert first == again
    batches.advance(passed_over=2)
    assert batches.micro_batch(0, Draws(0, 9, ()))[0] != first
