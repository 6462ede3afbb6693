"""Prompts to text embeddings: stored ones, or from the text encoder, loaded when it is needed."""

import logging
from collections.abc import Iterable, Sequence
from operator import attrgetter

import torch
from cachetools import LRUCache
from torch import Tensor

from pipeline.setup import Setup
from utils.devices import choose_device, free_bytes
from utils.embeddings import EmbeddingStore, pad_batch, trim
from utils.errors import UserError
from wan.folders import file_bytes
from wan.text_encoder import WanTextEncoder

logger = logging.getLogger(__name__)

REMEMBERED_BYTES = 2 * 2**30  # of embeddings kept
WORKING_BYTES = 2**29  # beside the weights of an encoder that encodes


def encoder_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the text encoder computes in beside a generator of this dtype: float16 is too narrow."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def encoder_bytes(file: int, dtype: torch.dtype) -> int:
    """Memory of the weights of an encoder in this dtype whose file, in bfloat16, has so many."""
    return file * dtype.itemsize // 2


class TextSource:
    """Embeddings of prompts, on the device of whoever asks; the newest ones are remembered.

    With `text_encoder_device: auto` the encoder is where the generator is; on the CPU, which is
    said, if a GPU cannot hold it beside what is still to come there: `room` bytes.
    An encoder that is spread over ranks runs on all of them at once, however many prompts each has:
    every call is one pass, and nothing is remembered.
    """

    def __init__(
        self,
        setup: Setup,
        *,
        text_len: int,
        dtype: torch.dtype,
        device: torch.device,
        room: int | None = None,
        encoder: WanTextEncoder | None = None,
        spread: bool = False,
    ) -> None:
        """`dtype` is the encoder's, `device` the generator's. `room` None: it is not asked.

        `encoder`: one that is there. `spread`: every rank has a part of it.
        """
        self.room = room
        self._setup = setup
        self._text_len = text_len
        self._dtype = dtype
        self._device = device
        wish = setup.machine.text_encoder_device
        self._place = None if wish == "auto" else choose_device(wish)
        self._stored = EmbeddingStore(setup.text_embeddings) if setup.text_embeddings else None
        self._spread = spread
        self._encoder = encoder
        self._negative: Tensor | None = None
        self._remembered: LRUCache[str, Tensor] = LRUCache(REMEMBERED_BYTES, attrgetter("nbytes"))

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings `[B, L, dim]`, float32, zeros behind each prompt's tokens; L <= text_len."""
        if not prompts:
            raise UserError("there is no prompt to encode")
        each = self._together(prompts) if self._spread else [self._one(p) for p in prompts]
        return pad_batch(each).to(self._device)

    def negative(self) -> Tensor:
        """Embedding `[1, L, dim]` of the negative prompt; encoded once and kept."""
        if self._negative is None:
            self._negative = self([self._setup.negative_prompt])
        return self._negative

    def encode_once(self, prompts: Iterable[str]) -> dict[str, Tensor]:
        """Embeddings `[1, L, dim]` by prompt, on the CPU; the text encoder is then freed.

        The negative prompt of a model that needs one is remembered.
        """
        texts = {prompt: self([prompt]).cpu() for prompt in prompts}
        if not self._setup.distilled:
            self.negative()
        self.free()
        return texts

    def free(self) -> None:
        """Drop the text encoder from memory; it is loaded again when it is needed.

        One that is spread over ranks stays.
        """
        if self._encoder is not None and not self._spread:
            self._encoder.close()
            self._encoder = None

    def _together(self, prompts: Sequence[str]) -> list[Tensor]:
        """`[tokens, dim]` of each prompt, by one pass for all of them."""
        distinct = list(dict.fromkeys(prompts))
        each = dict(zip(distinct, self.encoder().encode(distinct).float(), strict=True))
        return [trim(each[prompt]) for prompt in prompts]

    def _one(self, prompt: str) -> Tensor:
        """`[tokens, dim]`, on the CPU."""
        if prompt in self._remembered:
            return self._remembered[prompt]
        if self._stored is not None:
            embedding = self._stored[prompt]
        else:
            embedding = trim(self.encoder().encode([prompt])[0].float().cpu())
        if embedding.nbytes <= self._remembered.maxsize:
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
                device=self.place(),
                dtype=self._dtype,
                text_len=self._text_len,
            )
        return self._encoder

    def place(self) -> torch.device:
        """Where the encoder is to be, now and later."""
        if self._place is None:
            self._place = self._chosen_place()
        return self._place

    def _chosen_place(self) -> torch.device:
        if self._device.type != "cuda" or self.room is None:
            return self._device
        file = file_bytes(self._setup.require_folder().text_encoder)
        needed = encoder_bytes(file, self._dtype) + WORKING_BYTES
        if needed + self.room <= free_bytes(self._device):
            return self._device
        logger.info("the text encoder is on the CPU: the GPU has no room for it")
        return torch.device("cpu")
