"""The umt5 text encoder of Wan2.1: prompts to embeddings.

Owns the way from a prompt to what the DiT reads: cleaning, token ids, the encoder, and zeros after
the last token. The tokenizer's own files decide the ids, as they stand; the encoder is
transformers' `UMT5EncoderModel`, its sizes read from tensor shapes. Weights keep the official key
names here; transformers' names are translated at the border (`official_umt5_key`).
"""

import html
import logging
import re
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Self

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import UMT5Config, UMT5EncoderModel

from utils.errors import UserError
from wan.weights import Shapes, StateDict, assign_weights, read_weights, save_weights

logger = logging.getLogger(__name__)


def clean_prompt(text: str) -> str:
    """Repair broken Unicode, resolve HTML entities, and make every run of whitespace one space."""
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


@dataclass(frozen=True)
class TokenBatch:
    """Token ids [B, L] and the mask [B, L] that is 1 on tokens and 0 on padding, both int64."""

    ids: Tensor
    mask: Tensor


class WanTokenizer:
    """Text to token ids, with the end mark last and padding after it.

    `split` gives the ids of a text without end mark or padding. Text is taken as it is; cleaning
    prompts is the encoder's business.
    """

    def __init__(self, split: Callable[[str], list[int]], pad_id: int, eos_id: int) -> None:
        self.split = split
        self.pad_id = pad_id
        self.eos_id = eos_id

    @classmethod
    def from_folder(cls, path: str | Path) -> Self:
        """Read `tokenizer.json` or, in a folder without it, `spiece.model`.

        Raises:
            UserError: the folder has neither, or the file is not a T5 tokenizer.
        """
        folder = Path(path)
        for name, read in (("tokenizer.json", _from_json), ("spiece.model", _from_sentencepiece)):
            if (folder / name).is_file():
                split, pad_id, eos_id = read(folder / name)
                if pad_id is None or eos_id is None or min(pad_id, eos_id) < 0:
                    raise UserError(f"{folder / name} has no <pad> or </s>: fetch umt5's own.")
                return cls(split, pad_id, eos_id)
        raise UserError(f"{folder} has neither tokenizer.json nor spiece.model: fetch one of them.")

    def __call__(self, prompts: Sequence[str], length: int = 512) -> TokenBatch:
        """Tokenize to exactly `length` ids each: cut before the end mark, padded after it."""
        ids = torch.full((len(prompts), length), self.pad_id)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            tokens = [*self.split(prompt)[: length - 1], self.eos_id]
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
        return TokenBatch(ids, mask)

    def cut(self, text: str, length: int = 512) -> tuple[int, str] | None:
        """How many tokens of a text are dropped, and the text from there on; None if none."""
        tokens = len(self.split(text))
        if tokens < length:
            return None
        kept = bisect_right(range(len(text)), length - 1, key=lambda n: len(self.split(text[:n])))
        return tokens - (length - 1), text[max(kept - 1, 0) :]


Splitter = tuple[Callable[[str], list[int]], int | None, int | None]


def _from_json(file: Path) -> Splitter:
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the tokenizers library raises plain Exception
        raise UserError(
            f"{file} cannot be read as a tokenizer ({error}): fetch it again."
        ) from None
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def split(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    return split, tokenizer.token_to_id("<pad>"), tokenizer.token_to_id("</s>")


def _from_sentencepiece(file: Path) -> Splitter:
    from sentencepiece import SentencePieceProcessor

    try:
        processor = SentencePieceProcessor(model_file=str(file))
    except (RuntimeError, OSError):
        raise UserError(
            f"{file} cannot be read as a sentencepiece model: fetch it again."
        ) from None
    return processor.encode, processor.pad_id(), processor.eos_id()


class WanTextEncoder:
    """A umt5 encoder with its tokenizer; every prompt gets exactly `text_len` positions."""

    def __init__(self, model: UMT5EncoderModel, tokenizer: WanTokenizer, text_len: int) -> None:
        self._model: UMT5EncoderModel | None = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.text_len = text_len

    @classmethod
    def from_official(
        cls,
        weights_path: str | Path,
        tokenizer_folder: str | Path,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        text_len: int = 512,
    ) -> Self:
        """Load `models_t5_umt5-xxl-enc-bf16.pth` (or `.safetensors`) or a folder `text_encoder/`.

        Key names may be the official ones or transformers'.

        Raises:
            UserError: a file does not exist, or is not a umt5 encoder or tokenizer.
        """
        encoder, weights = cls.open_official(weights_path, tokenizer_folder, text_len=text_len)
        model, names = encoder.model, encoder.official_names
        assign_weights(model, weights, weights_path, names=names, device=device, dtype=dtype)
        return encoder

    @classmethod
    def open_official(
        cls, weights_path: str | Path, tokenizer_folder: str | Path, *, text_len: int = 512
    ) -> tuple[Self, StateDict]:
        """An encoder without memory, and the (memory-mapped) weights for it, by official names.

        Raises:
            UserError: as `from_official`, but for weights that do not fit.
        """
        tokenizer = WanTokenizer.from_folder(tokenizer_folder)
        weights = official_umt5_weights(read_weights(weights_path, "a text encoder"))
        shapes = {key: value.shape for key, value in weights.items()}
        config = umt5_config_from_shapes(shapes, weights_path)
        with torch.device("meta"):
            model = UMT5EncoderModel(config)
        model.encoder.embed_tokens = model.shared
        return cls(model, tokenizer, text_len), weights

    @classmethod
    def random(
        cls,
        tokenizer: WanTokenizer,
        vocab_size: int,
        dim: int = 32,
        dim_ffn: int = 64,
        num_heads: int = 4,
        num_layers: int = 2,
        text_len: int = 512,
        seed: int = 0,
    ) -> Self:
        """Make an untrained encoder whose weights depend on `seed` alone."""
        config = UMT5Config(
            vocab_size=vocab_size,
            d_model=dim,
            d_kv=dim // num_heads,
            d_ff=dim_ffn,
            num_heads=num_heads,
            num_layers=num_layers,
            dropout_rate=0.0,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls(UMT5EncoderModel(config), tokenizer, text_len)

    @property
    def model(self) -> UMT5EncoderModel:
        """The transformers module; a RuntimeError after `close`."""
        if self._model is None:
            raise RuntimeError("this text encoder is closed; load it again to encode more prompts")
        return self._model

    @property
    def official_names(self) -> dict[str, str]:
        """Of every name in the model's state the official one; tied parameters share theirs."""
        return {key: official_umt5_key(key) for key in self.model.state_dict()}

    @property
    def dim(self) -> int:
        """Size of one token's embedding."""
        return self.model.config.d_model

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights and of the embeddings."""
        return self.model.shared.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are, and where embeddings appear."""
        return self.model.shared.weight.device

    def to(self, device: str | torch.device) -> Self:
        """Move the weights."""
        nn.Module.to(self.model, device)
        return self

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Clean, tokenize and encode prompts to [B, text_len, dim], zero after each last token.

        What does not fit into `text_len` tokens is dropped, which is said once for each prompt.

        Raises:
            UserError: an embedding has NaN or Inf; the first such prompt is named. Or the tokenizer
                knows more tokens than the weights.
        """
        cleaned = [clean_prompt(prompt) for prompt in prompts]
        for prompt in cleaned:
            if (cut := self.tokenizer.cut(prompt, self.text_len)) is not None:
                _say_cut(prompt, self.text_len, *cut)
        tokens = self.tokenizer(cleaned, self.text_len)
        last = self.model.config.vocab_size - 1
        if (token := int(tokens.ids.max())) > last:
            raise UserError(
                f"the tokenizer gives token {token}, and the text encoder's last is {last}: "
                "they are not of one model; fetch both again"
            )
        embeddings = self.encode_ids(tokens.ids, tokens.mask)
        finite = embeddings.isfinite().all(dim=2).all(dim=1)  # [B]
        for prompt, right in zip(prompts, finite.tolist(), strict=True):
            if not right:
                kind = str(self.dtype).removeprefix("torch.")
                raise UserError(
                    f"the text encoder gives NaN or Inf in {kind} for the prompt '{prompt[:60]}': "
                    "use another dtype, or fetch its weights again"
                )
        return embeddings

    @torch.no_grad()
    def encode_ids(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Encode ids [B, L] under mask [B, L] to [B, L, dim], zero where the mask is 0."""
        ids, mask = ids.to(self.device), mask.to(self.device)
        embeddings = self.model(input_ids=ids, attention_mask=mask).last_hidden_state  # [B, L, dim]
        return embeddings.masked_fill(mask.unsqueeze(-1) == 0, 0.0)

    def official_state_dict(self) -> dict[str, Tensor]:
        """The weights under the key names of `models_t5_umt5-xxl-enc-bf16.pth`."""
        return official_umt5_weights(self.model.state_dict())

    def save_official(self, path: str | Path) -> None:
        """Write the weights as the official file holds them."""
        save_weights(self.official_state_dict(), path)

    def close(self) -> None:
        """Let go of the weights, so that their memory can be used for something else."""
        self._model = None


@lru_cache(maxsize=4096)  # said once
def _say_cut(prompt: str, text_len: int, dropped: int, rest: str) -> None:
    logger.warning(
        "the prompt '%s…' is longer than the %d tokens that the model reads: the last %d are "
        "dropped, from '%s' on",
        prompt[:40],
        text_len,
        dropped,
        rest.strip()[:40],
    )


# --- key names and sizes -----------------------------------------------------------------------

_EMBEDDING = "token_embedding.weight"
_OUTSIDE_BLOCKS = {
    "shared.weight": _EMBEDDING,
    "encoder.embed_tokens.weight": _EMBEDDING,
    "encoder.final_layer_norm.weight": "norm.weight",
}
_IN_BLOCK = {
    "layer.0.layer_norm": "norm1",
    "layer.0.SelfAttention.q": "attn.q",
    "layer.0.SelfAttention.k": "attn.k",
    "layer.0.SelfAttention.v": "attn.v",
    "layer.0.SelfAttention.o": "attn.o",
    "layer.0.SelfAttention.relative_attention_bias": "pos_embedding.embedding",
    "layer.1.layer_norm": "norm2",
    "layer.1.DenseReluDense.wi_0": "ffn.gate.0",
    "layer.1.DenseReluDense.wi_1": "ffn.fc1",
    "layer.1.DenseReluDense.wo": "ffn.fc2",
}


def official_umt5_key(key: str) -> str:
    """Translate transformers' name of an encoder parameter to the official one."""
    match = re.fullmatch(r"encoder\.block\.(\d+)\.(.+)\.weight", key)
    if match and match[2] in _IN_BLOCK:
        return f"blocks.{match[1]}.{_IN_BLOCK[match[2]]}.weight"
    return _OUTSIDE_BLOCKS.get(key, key)


def official_umt5_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename transformers' keys to the official ones; official keys stay as they are."""
    return {official_umt5_key(key): value for key, value in weights.items()}


def umt5_config_from_shapes(shapes: Shapes, source: str | Path = "the file") -> UMT5Config:
    """Sizes of the encoder from the shapes of official weights.

    Raises:
        UserError: the shapes are not those of a umt5 encoder (`source` is named in the message).
    """
    blocks = {int(m[1]) for key in shapes if (m := re.match(r"blocks\.(\d+)\.", key))}
    try:
        vocab_size, dim = shapes[_EMBEDDING]
        num_buckets, num_heads = shapes["blocks.0.pos_embedding.embedding.weight"]
        dim_attn = shapes["blocks.0.attn.q.weight"][0]
        dim_ffn = shapes["blocks.0.ffn.fc1.weight"][0]
        dim_head = dim_attn // num_heads
    except KeyError as error:
        raise UserError(f"{source} is not a umt5 text encoder: it has no key {error}.") from None
    except (ValueError, IndexError, ZeroDivisionError):
        raise UserError(
            f"{source} is not a umt5 text encoder: its tensors have other shapes."
        ) from None
    return UMT5Config(
        vocab_size=vocab_size,
        d_model=dim,
        d_kv=dim_head,
        d_ff=dim_ffn,
        num_heads=num_heads,
        num_layers=max(blocks) + 1,
        relative_attention_num_buckets=num_buckets,
        dropout_rate=0.0,  # the same update whatever was drawn before
    )
