"""What an objective returns."""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class LossResult:
    """A scalar loss to differentiate, and detached measurements of the same batch."""

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)
