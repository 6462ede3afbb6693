"""Training a text encoder where there is no pretrained one: each token has to know its subject.

A linear probe on each token's embedding predicts the attributes of what the token speaks of: on
every word about the second shape, for instance, the colour of that shape, and on every token of the
caption what holds for the whole scene. Cross-attention can then find the words about a shape by one
attribute and read the others there. Were every token to know the whole caption, all would be alike
and attention could choose nothing: the network would have to work out itself which attributes
belong together, and hardly learns that.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.result import LossResult


class CaptionReader(nn.Module):
    """A text encoder with one linear probe over all attributes.

    `classes`: how many values each attribute has.
    """

    def __init__(self, encoder: nn.Module, dim: int, classes: Sequence[int]) -> None:
        super().__init__()
        self.encoder = encoder
        self.classes = tuple(classes)
        self.probe = nn.Linear(dim, sum(classes))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Token ids and mask `[B, L]` -> logits of all attributes `[B, L, sum(classes)]`."""
        return self.probe(self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state)


def caption_loss(reader: nn.Module, ids: Tensor, mask: Tensor, labels: Tensor) -> LossResult:
    """Cross-entropy of `labels` `[B, L, attributes]` (-1: no value), mean over the attributes.

    Of each, the mean over captions of the mean over a caption's tokens that have a value, so that
    parts of a larger batch add up exactly; a caption without any counts as known.
    """
    classes: Sequence[int] = reader.classes  # type: ignore[assignment]
    parts = reader(ids, mask).split(list(classes), dim=-1)  # [B, L, classes] each
    losses, right = [], []
    for index, logits in enumerate(parts):
        wanted = labels[..., index].masked_fill(mask == 0, -1)  # [B, L]
        counted = wanted >= 0
        tokens = counted.sum(dim=1).clamp(min=1)  # [B]
        missed = F.cross_entropy(logits.transpose(1, 2), wanted, ignore_index=-1, reduction="none")
        losses.append((missed.sum(dim=1) / tokens).mean())
        wrong = (logits.argmax(-1) != wanted) & counted
        right.append((1 - wrong.sum(dim=1) / tokens).mean())
    accuracy = torch.stack(right)
    metrics = {"caption/accuracy": accuracy.mean(), "caption/worst": accuracy.min()}
    return LossResult(torch.stack(losses).mean(), metrics)
