"""The objective of a text encoder: each token is asked about its own subject only."""

import torch
from torch import Tensor, nn

from shapes.captions import caption_loss


class Reader(nn.Module):
    """Logits that were given."""

    classes = (2, 3)

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.logits


def sure_of(labels: Tensor) -> Tensor:
    """Logits `[B, L, 5]` that are sure of labels `[B, L, 2]`."""
    parts = [
        20.0 * nn.functional.one_hot(labels[..., index].clamp(min=0), size)
        for index, size in enumerate(Reader.classes)
    ]
    return torch.cat(parts, dim=-1)


def test_every_token_has_labels_of_its_own() -> None:
    labels = torch.tensor([[[0, 2], [1, 0], [1, -1]]])
    ids, mask = torch.zeros(1, 3, dtype=torch.int64), torch.ones(1, 3, dtype=torch.int64)
    result = caption_loss(Reader(sure_of(labels)), ids, mask, labels)
    assert result.loss < 1e-6
    assert result.metrics["caption/accuracy"] == 1
    swapped = labels[:, [1, 0, 2]]
    wrong = caption_loss(Reader(sure_of(labels)), ids, mask, swapped)
    assert wrong.metrics["caption/worst"] == 0, "both tokens that speak of it are wrong"
    assert torch.isclose(wrong.loss, torch.tensor((2 / 3 + 1) * 20 / 2), atol=1e-3)


def test_padding_and_tokens_without_a_value_do_not_count() -> None:
    labels = torch.tensor([[[0, 2], [1, -1], [1, 1]]])
    ids, mask = torch.zeros(1, 3, dtype=torch.int64), torch.tensor([[1, 1, 0]])
    logits = sure_of(labels)
    logits[0, 1, 2:] = 20.0 * torch.rand(3)  # no value
    logits[0, 2] = 20.0 * torch.rand(5)  # padding
    assert caption_loss(Reader(logits), ids, mask, labels).loss < 1e-6


def test_parts_of_a_batch_add_up() -> None:
    """Two ranks once made another update than one, since captions differ in their tokens."""
    labels = torch.tensor([[[0, 2], [1, 0], [1, -1]], [[-1, 1], [-1, -1], [0, -1]]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    whole = caption_loss(Reader(logits), mask, mask, labels)
    parts = [
        caption_loss(Reader(logits[row, None]), mask[row, None], mask[row, None], labels[row, None])
        for row in range(2)
    ]
    assert torch.isclose(whole.loss, sum(part.loss for part in parts) / 2)
    name = "caption/accuracy"
    assert torch.isclose(whole.metrics[name], sum(part.metrics[name] for part in parts) / 2)
