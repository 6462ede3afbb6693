"""Exponential moving average of weights, sharded as they are, on their device."""

from collections.abc import Mapping

import torch
from torch import Tensor


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
        """Move towards the weights."""
        for name, parameter in trained.items():
            self.shadow[name].lerp_(parameter.detach(), 1 - self.weight)

    @torch.no_grad()
    def load(self, shadow: Mapping[str, Tensor]) -> None:
        """Take over stored averages."""
        for name, value in shadow.items():
            self.shadow[name].copy_(value)
