from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from utils.embeddings import EmbeddingStore, embedding_key, pad_batch, trim, write_shard
from utils.errors import UserError


def embedding(tokens: int, padding: int = 0, dim: int = 3) -> torch.Tensor:
    return torch.cat([torch.randn(tokens, dim).abs() + 0.1, torch.zeros(padding, dim)])


def test_a_store_gives_back_what_its_shards_hold(tmp_path: Path) -> None:
    first, second = embedding(4, padding=5), embedding(2)
    write_shard(tmp_path / "0.safetensors", {"a ball": first})
    write_shard(tmp_path / "1.safetensors", {"ein Würfel": second})
    store = EmbeddingStore(tmp_path)
    assert len(store) == 2
    assert torch.equal(store["a ball"], first[:4]), "without padding"
    assert torch.equal(store[" ein Würfel\n"], second), "a prompt is known without outer spaces"
    assert "a ball" in store
    assert "A ball" not in store


def test_stored_half_precision_comes_back_as_float32(tmp_path: Path) -> None:
    value = embedding(3)
    write_shard(tmp_path / "0.safetensors", {"x": value.bfloat16()})
    stored = EmbeddingStore(tmp_path)["x"]
    assert stored.dtype == torch.float32
    assert torch.equal(stored, value.bfloat16().float())


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (torch.full((2, 3), float("inf")), "holds NaN or Inf for the prompt 'x'"),
        (torch.ones(2, 3, dtype=torch.int64), r"holds \[2, 3\] of torch.int64"),
    ],
)
def test_stored_embeddings_are_numbers(value: torch.Tensor, sentence: str, tmp_path: Path) -> None:
    """They made black videos."""
    write_shard(tmp_path / "0.safetensors", {"x": value})
    with pytest.raises(UserError, match=sentence):
        EmbeddingStore(tmp_path)["x"]


def test_trim_keeps_zero_rows_between_tokens_and_at_least_one_row() -> None:
    rows = torch.tensor([[1.0, 0], [0, 0], [0, -2], [0, 0]])
    assert torch.equal(trim(rows), rows[:3])
    assert torch.equal(trim(torch.zeros(4, 2)), torch.zeros(1, 2))


def test_pad_batch_puts_zeros_behind_shorter_texts() -> None:
    short, long = embedding(1), embedding(3)
    batch = pad_batch([short, long])
    assert batch.shape == (2, 3, 3)
    assert torch.equal(batch[0, :1], short)
    assert torch.equal(batch[1], long)
    assert not batch[0, 1:].any()


def test_a_shard_says_what_is_in_it_and_what_made_it(tmp_path: Path) -> None:
    write_shard(tmp_path / "0.safetensors", {"é": embedding(1), "b": embedding(1)}, "abc")
    with safe_open(tmp_path / "0.safetensors", framework="pt") as file:
        assert file.metadata() == {"prompts": '["é", "b"]', "fingerprint": "abc"}
        assert set(file.keys()) == {embedding_key("é"), embedding_key("b")}
    assert [path.name for path in tmp_path.iterdir()] == ["0.safetensors"]


def test_a_folder_is_found_from_the_projects_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shard(tmp_path / "texts" / "0.safetensors", {"a": embedding(1)})
    monkeypatch.setattr("utils.config.ROOT", tmp_path)
    assert len(EmbeddingStore("texts")) == 1


def test_what_is_not_there_or_not_readable_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no \*\.safetensors"):
        EmbeddingStore(tmp_path)
    path = tmp_path / "0.safetensors"
    write_shard(path, {"a": embedding(1)})
    with pytest.raises(UserError, match="no embedding of the prompt 'b'"):
        EmbeddingStore(tmp_path)["b"]
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(UserError, match=r"0\.safetensors is not a readable"):
        EmbeddingStore(tmp_path)
