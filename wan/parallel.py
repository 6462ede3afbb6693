"""One stream on several ranks: tokens are shared out, attention by heads (Ulysses).

Everything but attention works token by token, so every rank keeps its part of each frame's tokens.
Around attention tokens are exchanged for heads (arXiv 2309.14509, Sec. 3): a rank then has all
tokens of its heads, and its cache holds these heads alone. Cross-attention works on the rank's own
tokens with all heads, so that the keys and values of the text are whole everywhere.
"""

from typing import Protocol

import torch
from torch import Tensor

from utils.errors import UserError


class Exchange(Protocol):
    """What ranks tell each other; all of them make the same calls in the same order."""

    rank: int
    size: int

    def all_to_all(self, parts: Tensor) -> Tensor:
        """Part i of `[size, ...]` goes to rank i; what came from each rank, in the same shape."""
        ...

    def all_gather(self, own: Tensor) -> Tensor:
        """Every rank's tensor `[...]`, in order: `[size, ...]`."""
        ...


def check_shares(size: int, *, tokens_per_frame: int, num_heads: int) -> None:
    """UserError unless so many ranks can share a frame's tokens, and a layer's heads."""
    if tokens_per_frame % size or num_heads % size:
        possible = [
            str(each)
            for each in range(1, num_heads + 1)
            if not (tokens_per_frame % each or num_heads % each)
        ]
        raise UserError(
            f"sequence_parallel={size} does not divide the {tokens_per_frame} tokens of a latent "
            f"frame and the {num_heads} heads of this model: use one of {', '.join(possible)}"
        )


class Share:
    """This rank's part of every sequence: of the tokens, and within attention of the heads."""

    def __init__(self, ranks: Exchange) -> None:
        self.ranks = ranks
        self.size = ranks.size

    def tokens_of(self, x: Tensor) -> Tensor:
        """This rank's tokens of `[B, F, T, D]`: `[B, F, t, D]`."""
        return x.chunk(self.size, dim=2)[self.ranks.rank].contiguous()

    def whole(self, x: Tensor) -> Tensor:
        """All ranks' tokens: the inverse of `tokens_of`."""
        return self.ranks.all_gather(x.contiguous()).movedim(0, 2).flatten(2, 3)

    @torch.compiler.disable  # compiled blocks are cut here: before and behind each exchange
    def to_heads(self, x: Tensor, frames: int) -> Tensor:
        """`[n, B, F * t, H, D]` of own tokens -> all tokens of own heads `[n, B, F * T, h, D]`."""
        parts = x.unflatten(3, (self.size, -1)).movedim(3, 0)  # [ranks, n, B, F * t, h, D]
        got = self.ranks.all_to_all(parts.contiguous())
        return got.unflatten(3, (frames, -1)).movedim(0, 3).flatten(2, 4)

    @torch.compiler.disable
    def to_tokens(self, x: Tensor, frames: int) -> Tensor:
        """The inverse of `to_heads`: `[B, F * T, h, D]` -> `[B, F * t, H, D]`."""
        parts = x.unflatten(1, (frames, self.size, -1)).movedim(2, 0).flatten(2, 3)
        got = self.ranks.all_to_all(parts.contiguous())  # [ranks, B, F * t, h, D]
        return got.movedim(0, 2).flatten(2, 3)

    def all_heads(self, own: Tensor) -> Tensor:
        """What each rank has of its heads `[..., h, D]`, together: `[..., H, D]`."""
        return self.ranks.all_gather(own.contiguous()).movedim(0, -3).flatten(-3, -2)

    def heads_of_first(self, whole: Tensor | None, own: Tensor) -> Tensor:
        """Own heads, as `own`, of what the first rank has of all of them `[..., H, D]`."""
        if whole is None:
            parts = own.new_zeros(self.size, *own.shape)
        else:
            parts = whole.to(own).unflatten(-2, (self.size, -1)).movedim(-3, 0)
        return self.ranks.all_to_all(parts.contiguous())[0]
