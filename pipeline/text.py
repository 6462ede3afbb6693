"""Prompts to text embeddings: stored ones, or from the text encoder, loaded when it is needed."""

from collections.abc import Sequence
from operator import attrgetter

import torch
from cachetools import LRUCache
from torch import Tensor

from pipeline.setup import Setup
from utils.devices import choose_device
from utils.embeddings import EmbeddingStore, pad_batch, trim
from utils.errors import UserError
from wan.text_encoder import WanTextEncoder

REMEMBERED_BYTES = 2 * 2**30  # of embeddings kept


class TextSource:
    """Embeddings of prompts, on the device of whoever asks; the newest ones are remembered.

    A sharded encoder has to run on all ranks at once: then `remembers` is False, so that every
    rank encodes equally often.
    """

    def __init__(
        self,
        setup: Setup,
        *,
        text_len: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """`dtype` is the encoder's; `text_encoder_device: auto` puts it on `device`."""
        self._setup = setup
        self._text_len = text_len
        self._dtype = dtype
        self._device = device
        name = setup.machine.text_encoder_device
        self._encoder_device = device if name == "auto" else choose_device(name)
        self._stored = EmbeddingStore(setup.text_embeddings) if setup.text_embeddings else None
        self._encoder: WanTextEncoder | None = None
        self._remembered: LRUCache[str, Tensor] = LRUCache(REMEMBERED_BYTES, attrgetter("nbytes"))
        self.remembers = True

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings `[B, L, dim]`, float32, zeros behind each prompt's tokens; L <= text_len."""
        if not prompts:
            raise UserError("there is no prompt to encode")
        return pad_batch([self._one(prompt) for prompt in prompts]).to(self._device)

    def free(self) -> None:
        """Drop the text encoder from memory; it is loaded again when it is needed."""
        if self._encoder is not None:
            self._encoder.close()
            self._encoder = None

    def _one(self, prompt: str) -> Tensor:
        """`[tokens, dim]`, on the CPU."""
        if prompt in self._remembered:
            return self._remembered[prompt]
        if self._stored is not None:
            embedding = self._stored[prompt]
        else:
            embedding = trim(self.encoder().encode([prompt])[0].float().cpu())
        if self.remembers and embedding.nbytes <= self._remembered.maxsize:
            self._remembered[prompt] = embedding
        return embedding

    def encoder(self) -> WanTextEncoder:
        """The text encoder, loaded at its first use."""
        if self._encoder is None:
            folder = self._setup.require_folder()
            folder.require(folder.text_encoder, folder.tokenizer)
            self._encoder = WanTextEncoder.from_official(
                folder.text_encoder,
                folder.tokenizer,
                device=self._encoder_device,
                dtype=self._dtype,
                text_len=self._text_len,
            )
        return self._encoder
