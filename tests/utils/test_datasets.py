import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from utils.datasets import (
    UNLIMITED,
    GlobalOrder,
    LatentDataset,
    OdePairDataset,
    PromptDataset,
    ShardInfo,
    VideoDataset,
    collate,
    open_dataset,
    write_shard,
)
from utils.errors import UserError
from utils.video import VideoWriter

CLIP = {"num_frames": 5, "height": 16, "width": 32}


def numbers(*shape: int, first: float = 0) -> torch.Tensor:
    return first + torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)


def write_video(path: Path, frames: int, caption: str | None = "a ball") -> None:
    """Frame i is grey of level 10 i, so that frames can be told apart after compression."""
    levels = 10 * torch.arange(frames, dtype=torch.uint8)
    with VideoWriter(path) as writer:
        writer.write(levels[:, None, None, None].expand(frames, 16, 32, 3))
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")


def frame_numbers(video: torch.Tensor) -> list[int]:
    return (video.float().mean(dim=(1, 2, 3)) / 10).round().int().tolist()


@pytest.fixture
def prompt_file(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("one\n\ntwo\nthree\n", encoding="utf-8")
    return path


# --- kinds of data ------------------------------------------------------------------------------


def test_prompts_and_their_longer_wordings(
    prompt_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extended = tmp_path / "extended.txt"
    extended.write_text("one ball\ntwo balls\nthree balls\n", encoding="utf-8")
    short = open_dataset(prompt_file, **CLIP)
    long = open_dataset(prompt_file, **CLIP, extended_path=extended)
    assert [short[i] for i in range(len(short))] == [{"prompt": p} for p in ("one", "two", "three")]
    assert long[1] == {"prompt": "two balls"}
    assert long.prompt(2) == "three balls"
    monkeypatch.setattr("utils.config.ROOT", tmp_path)
    from_root = open_dataset("prompts.txt", **CLIP, extended_path="extended.txt")
    assert from_root.prompt(1) == "two balls", "both are found below the project's root"
    table = tmp_path / "prompts.csv"
    table.write_text("prompt,id\none,1\ntwo,2\n", encoding="utf-8")
    assert [item["prompt"] for item in open_dataset(table, **CLIP)] == ["one", "two"]


def test_latents_come_back_by_index_over_shards_of_unequal_size(tmp_path: Path) -> None:
    data = numbers(5, 3, 2, 4, 6)
    write_shard(tmp_path / "0.safetensors", data[:2], ["a", "b"])
    write_shard(tmp_path / "1.safetensors", data[2:], ["c", "d", "é"])
    dataset = open_dataset(tmp_path, **CLIP)
    assert isinstance(dataset, LatentDataset)
    assert dataset.item_shape == (3, 2, 4, 6)
    assert [dataset.prompt(i) for i in range(len(dataset))] == ["a", "b", "c", "d", "é"]
    for index in (4, 0, 2, 1, 3):
        assert torch.equal(dataset[index]["latents"], data[index])
    with pytest.raises(IndexError):
        dataset[5]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_storage_is_returned_as_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    data = torch.randn(2, 3, 2, 4, 6, generator=torch.Generator().manual_seed(0))
    write_shard(tmp_path / "0.safetensors", data.to(dtype), ["a", "b"])
    stored = LatentDataset(tmp_path)[1]["latents"]
    assert stored.dtype == torch.float32
    assert torch.equal(stored, data[1].to(dtype).float())


def test_ode_pairs_carry_their_timesteps(tmp_path: Path) -> None:
    data = numbers(2, 3, 3, 2, 4, 6)
    timesteps = [1000.0, 833.333251953125, 0.0]
    write_shard(
        tmp_path / "0.safetensors", data, ["a", "b"], timesteps=timesteps, fingerprint="abc"
    )
    dataset = open_dataset(tmp_path, **CLIP)
    assert isinstance(dataset, OdePairDataset)
    assert dataset.timesteps == tuple(timesteps)
    item = dataset[1]
    assert item["prompt"] == "b"
    assert torch.equal(item["trajectory"], data[1])
    assert ShardInfo.read(tmp_path / "0.safetensors").fingerprint == "abc"


def test_videos_are_fitted_and_sorted_by_name(tmp_path: Path) -> None:
    write_video(tmp_path / "b.mp4", 5, "second")
    write_video(tmp_path / "a.mp4", 7, "first\nline")
    write_video(tmp_path / "c.01234567.part.mp4", 2, None)
    dataset = open_dataset(tmp_path, num_frames=5, height=32, width=32)
    assert isinstance(dataset, VideoDataset)
    assert [dataset.prompt(i) for i in range(len(dataset))] == ["first line", "second"]
    item = dataset[0]
    assert item["video"].shape == (5, 32, 32, 3)
    assert item["video"].dtype == torch.uint8
    assert frame_numbers(item["video"]) == [0, 1, 2, 3, 4]


def test_a_clip_is_cut_where_its_fraction_says(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", 7)
    dataset = VideoDataset(tmp_path, **CLIP)
    starts = [
        frame_numbers(dataset.clip(0, fraction)["video"])[0]
        for fraction in (0, 0.33, 0.34, 0.66, 0.67, 0.999)
    ]
    assert starts == [0, 0, 1, 1, 2, 2]
    assert frame_numbers(dataset.clip(0, 0.999)["video"]) == [2, 3, 4, 5, 6]


def test_collate_stacks_tensors_and_lists_the_rest() -> None:
    batch = collate([{"latents": numbers(2, 3, first=i), "prompt": str(i)} for i in range(4)])
    assert batch["prompt"] == ["0", "1", "2", "3"]
    assert batch["latents"].shape == (4, 2, 3)
    assert torch.equal(batch["latents"][3], numbers(2, 3, first=3))


# --- what can be wrong --------------------------------------------------------------------------


def test_what_is_not_data_is_said(tmp_path: Path, prompt_file: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for path, words in (
        (tmp_path / "gone", "does not exist"),
        (tmp_path / "gone.txt", "does not exist"),
        (empty, "holds no data"),
        ("endless:test", "endless:train or endless:heldout"),
    ):
        with pytest.raises(UserError, match=words):
            open_dataset(path, **CLIP)
    for path in ("endless:train", empty):
        with pytest.raises(UserError, match="xtended"):
            open_dataset(path, **CLIP, extended_path=prompt_file)


def test_short_and_uncaptioned_videos_are_named_when_the_folder_is_opened(tmp_path: Path) -> None:
    write_video(tmp_path / "short.mp4", 4)
    with pytest.raises(UserError, match=r"short\.mp4 has 4 frames and 5"):
        VideoDataset(tmp_path, **CLIP)
    (tmp_path / "short.txt").unlink()
    with pytest.raises(UserError, match=r"short\.txt"):
        VideoDataset(tmp_path, **CLIP)


def test_videos_of_any_kind_are_found_and_others_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Upper-case suffixes, other containers and sub-folders were passed over in silence."""
    (tmp_path / "sub").mkdir()
    write_video(tmp_path / "b.mp4", 5, "second")
    write_video(tmp_path / "sub" / "a.mp4", 5, "third")
    (tmp_path / "b.mp4").rename(tmp_path / "B.MP4")
    (tmp_path / "b.txt").rename(tmp_path / "B.txt")
    (tmp_path / "notes.doc").write_text("no video")
    with caplog.at_level("INFO"):
        dataset = open_dataset(tmp_path, **CLIP)
    assert [dataset.prompt(i) for i in range(len(dataset))] == ["second", "third"]
    assert "1 files that are no videos" in caplog.text
    assert "notes.doc" in caplog.text


def test_videos_are_read_at_the_rate_asked_for(tmp_path: Path) -> None:
    """Raw videos were taken frame by frame: one of 16 FPS ran at half speed where 8 were meant."""
    write_video(tmp_path / "a.mp4", 10)
    dataset = open_dataset(tmp_path, **CLIP, fps=8)
    assert frame_numbers(dataset[0]["video"]) == [0, 2, 4, 6, 8]
    with pytest.raises(UserError, match=r"has 3 frames at 4 FPS"):
        open_dataset(tmp_path, **CLIP, fps=4)


def test_all_faulty_videos_are_told_together(tmp_path: Path) -> None:
    """Only the first one was named."""
    write_video(tmp_path / "a.mp4", 4)
    write_video(tmp_path / "b.mp4", 5, None)
    (tmp_path / "c.mp4").write_bytes(b"nonsense")
    (tmp_path / "c.txt").write_text("a caption")
    write_video(tmp_path / "d.mp4", 5)
    with pytest.raises(UserError, match=r"(?s)3 of 4 .*a\.mp4 has 4.*b\.mp4 has no.*read .*c\.mp4"):
        VideoDataset(tmp_path, **CLIP)


def test_shards_that_are_none_or_do_not_go_together(tmp_path: Path) -> None:
    path = tmp_path / "b.safetensors"
    save_file({"x": numbers(2)}, path)
    with pytest.raises(UserError, match=r"no shard of latents or ODE pairs"):
        open_dataset(tmp_path, **CLIP)
    path.write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"not a readable safetensors"):
        open_dataset(tmp_path, **CLIP)
    write_shard(tmp_path / "a.safetensors", numbers(1, 3, 2, 4, 6), ["a"])
    write_shard(path, numbers(1, 3, 2, 4, 4), ["b"])
    with pytest.raises(UserError, match="different sizes"):
        open_dataset(tmp_path, **CLIP)
    write_shard(path, numbers(1, 2, 3, 2, 4, 6), ["b"], timesteps=[1000.0, 0.0])
    with pytest.raises(UserError, match="holds ode_pairs, not latents"):
        open_dataset(tmp_path, **CLIP)
    metadata = {"format": "latents", "prompts": '["a"]', "timesteps": "[]", "fingerprint": ""}
    save_file({"latents": numbers(2, 3, 2, 4, 6)}, path, metadata)
    with pytest.raises(UserError, match="contradicts"):
        open_dataset(tmp_path, **CLIP)


def test_a_shard_of_another_shape_than_said_is_not_written(tmp_path: Path) -> None:
    for data, timesteps in ((numbers(2, 3, 2, 4, 6), None), (numbers(1, 3, 3, 2, 4, 6), [9.0])):
        with pytest.raises(ValueError, match="is no shape"):
            write_shard(tmp_path / "x.safetensors", data, ["a"], timesteps=timesteps)
    assert not list(tmp_path.iterdir())


# --- order --------------------------------------------------------------------------------------


def test_every_item_comes_once_per_epoch_however_numbers_are_dealt() -> None:
    order = GlobalOrder(10, seed=3)
    by_rank = Counter(order.index(n) for rank in range(4) for n in range(20 + rank, 30, 4))
    assert by_rank == Counter(range(10))
    epochs = [[order.index(10 * epoch + n) for n in range(10)] for epoch in range(3)]
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert epochs[0] != list(range(10))


def test_the_order_is_a_function_of_length_and_seed_alone() -> None:
    numbers_asked = [37, 3, 12, 3, 38, 11]
    jumping, fresh = GlobalOrder(7, seed=1), []
    for n in numbers_asked:
        fresh.append(GlobalOrder(7, seed=1).index(n))
    assert [jumping.index(n) for n in numbers_asked] == fresh
    assert [GlobalOrder(7, seed=2).index(n) for n in numbers_asked] != fresh
    # Pinned: a resumed training meets the same order with any release of the libraries.
    assert [GlobalOrder(7, seed=1).index(n) for n in range(7)] == [4, 5, 2, 0, 1, 6, 3]


def test_an_epoch_is_computed_once_while_batches_straddle_two(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    order, computed = GlobalOrder(4, seed=0), []
    permutation = order._permutation
    monkeypatch.setattr(order, "_permutation", lambda e: computed.append(e) or permutation(e))
    for n in (0, 3, 4, 2, 5, 3, 7, 8, 6):
        order.index(n)
    assert computed == [0, 1, 2]


def test_data_without_end_is_read_as_it_comes() -> None:
    order = GlobalOrder(UNLIMITED, seed=5)
    assert [order.index(n) for n in (0, 1, 10**9)] == [0, 1, 10**9]


def test_order_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no items"):
        GlobalOrder(0, seed=0)


def test_prompt_dataset_refuses_extended_prompts_of_another_number(
    prompt_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "e.txt").write_text("only one\n", encoding="utf-8")
    with pytest.raises(UserError, match="one line for each prompt"):
        PromptDataset(prompt_file, tmp_path / "e.txt")


@pytest.mark.parametrize(
    ("shape", "prompts"), [((0, 1, 2, 2, 2), []), ((2,), ["a", "b"]), ((2, 1, 2, 2, 2), [1, 2])]
)
def test_a_shard_without_items_or_texts_is_refused(tmp_path, shape, prompts):
    metadata = {"format": "latents", "timesteps": "[]", "fingerprint": ""}
    save_file(
        {"latents": torch.zeros(shape)},
        tmp_path / "a.safetensors",
        metadata | {"prompts": json.dumps(prompts)},
    )
    with pytest.raises(UserError, match="no items with prompts in text"):
        LatentDataset(tmp_path)


def test_latents_that_are_no_numbers_are_refused(tmp_path):
    """A training went on with them to a loss of NaN."""
    write_shard(tmp_path / "a.safetensors", torch.full((1, 1, 2, 2, 2), torch.nan), ["a"])
    with pytest.raises(UserError, match="NaN or Inf"):
        LatentDataset(tmp_path)[0]
