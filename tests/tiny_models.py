"""Tiny models in files with the official names and formats, written in well under a second."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import Unigram

from wan.text_encoder import WanTextEncoder, WanTokenizer
from wan.vae import WanVAE

WORDS = """
a the red blue green yellow circle square triangle ball cat dog moves left right up down slowly
quickly jumps over falls rolls on grass under sky sea of in and is video
"""


def write_tiny_vae(path: str | Path, base_dim: int = 8, seed: int = 0) -> None:
    """Write a random `Wan2.1_VAE.pth` with the official key names and 16 latent channels."""
    WanVAE.random(base_dim=base_dim, seed=seed).save_official(path)


def write_tiny_text_encoder(
    folder: str | Path, dim: int = 32, layers: int = 2, seed: int = 0
) -> None:
    """Write `models_t5_umt5-xxl-enc-bf16.pth` and `google/umt5-xxl/` under `folder`."""
    tokenizer_folder = Path(folder) / "google" / "umt5-xxl"
    vocab_size = write_tiny_tokenizer(tokenizer_folder)
    encoder = WanTextEncoder.random(
        WanTokenizer.from_folder(tokenizer_folder),
        vocab_size,
        dim=dim,
        dim_ffn=2 * dim,
        num_layers=layers,
        seed=seed,
    )
    encoder.model.to(torch.bfloat16)
    encoder.save_official(Path(folder) / "models_t5_umt5-xxl-enc-bf16.pth")


def write_tiny_tokenizer(folder: str | Path) -> int:
    """Write a tokenizer made like umt5's: unigram, NFKC, byte fallback. Returns its size."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    fallback = [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    letters = [(letter, -10.0) for letter in "▁abcdefghijklmnopqrstuvwxyz,.!?'-0123456789é，。"]
    words = [(f"▁{word}", -5.0) for word in WORDS.split()]
    vocab = special + fallback + letters + words
    tokenizer = Tokenizer(Unigram(vocab, unk_id=2, byte_fallback=True))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer.add_special_tokens([piece for piece, _ in special])
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "T5Tokenizer",
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "model_max_length": 512,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return len(vocab)
