"""Exponential moving average of weights, sharded as they are, on their device."""

from collections.abc import Mapping

import torch
from torch import Tensor

from trainer.sharding import local


class EMA:
    """shadow <- w shadow + (1 - w) weights, for the trained parameters; float32.

    Follows the placement of the parameters, so nothing is gathered.
    """

    def __init__(self, trained: Mapping[str, Tensor], weight: float) -> None:
        self.weight = weight
        self.shadow: dict[str, Tensor] = {
            name: parameter.detach().clone() for name, parameter in trained.items()
        }

    @torch.no_grad()
    def update(self, trained: Mapping[str, Tensor]) -> None:
        """Move towards the weights; each rank its own shards, all in one call."""
        shadows = [local(self.shadow[name]) for name in trained]
        weights = [local(parameter.detach()) for parameter in trained.values()]
        torch._foreach_lerp_(shadows, weights, 1 - self.weight)

    @torch.no_grad()
    def load(self, shadow: Mapping[str, Tensor]) -> None:
        """Take over stored averages."""
        for name, value in shadow.items():
            self.shadow[name].copy_(value)

    @torch.no_grad()
    def swap(self, trained: Mapping[str, Tensor]) -> None:
        """Exchange averages and weights, bit for bit; once more exchanges them back."""
        for name, parameter in trained.items():
            shadow, weight = local(self.shadow[name]), local(parameter.detach())
            before = weight.clone()
            weight.copy_(shadow)
            shadow.copy_(before)
