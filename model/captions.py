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


def caption_loss(
    reader: nn.Module,
    ids: Tensor,
    mask: Tensor,
    labels: Tensor,
    weights: Tensor | float = 1.0,
) -> LossResult:
    """Mean cross-entropy over tokens and attributes; `labels` `[B, L, attributes]`, -1: no value.

    `weights` `[attributes]`: by what each one's mean over tokens is multiplied, so that parts of a
    larger batch add up exactly.
    """
    classes: Sequence[int] = reader.classes  # type: ignore[assignment]
    parts = reader(ids, mask).split(list(classes), dim=-1)  # [B, L, classes] each
    valid = mask.bool()
    losses, right = [], []
    for index, logits in enumerate(parts):
        wanted = labels[..., index].masked_fill(~valid, -1)
        losses.append(F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=-1))
        counted = wanted >= 0
        right.append((logits.argmax(-1) == wanted)[counted].float().mean())
    loss = (torch.stack(losses).nan_to_num() * weights).mean()
    accuracy = torch.stack(right).nan_to_num(1.0)
    metrics = {"caption/accuracy": (accuracy * weights).mean(), "caption/worst": accuracy.min()}
    return LossResult(loss, metrics)
