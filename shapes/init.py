"""Start a model folder of the shapes world: sizes, tokenizer, an untrained text encoder.

    python -m shapes.init --folder runs/shapes/models/Shapes

The file names are those of the official release, so every later step goes through the loaders of
the published models.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import Unigram

if not __package__:  # run by its path: the tree that it lies in comes first
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from shapes.world import sample_scene
from utils.cli import run_main
from utils.errors import UserError
from utils.files import make_folder, write_json, written

DIT = {
    "model_type": "t2v",
    "dim": 128,
    "ffn_dim": 512,
    "freq_dim": 64,
    "text_dim": 128,
    "text_len": 64,
    "num_heads": 4,
    "num_layers": 6,
}
TEXT = {"dim": 128, "dim_ffn": 256, "num_heads": 4, "num_layers": 4}
SPECIAL = ("<pad>", "</s>", "<unk>")
TOKENIZER_SETTINGS = {  # for the published code, which asks transformers' AutoTokenizer
    "tokenizer_class": "PreTrainedTokenizerFast",
    "pad_token": "<pad>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "model_max_length": 512,
}
CAPTIONS_READ = 3000


def vocabulary() -> list[str]:
    """Words and marks of the captions, as the tokenizer cuts them."""
    captions = (sample_scene(0, index).caption.lower() for index in range(CAPTIONS_READ))
    text = " ".join(captions)
    for mark in ",;:.":
        text = text.replace(mark, f" {mark} ")
    return sorted(set(text.split()))


def write_tokenizer(folder: Path) -> int:
    """A tokenizer made like umt5's (unigram, NFKC, byte fallback), lower case; returns its size."""
    words = vocabulary()
    fallback = [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    letters = [(letter, -12.0) for letter in "▁abcdefghijklmnopqrstuvwxyz0123456789"]
    marks = [(word, -5.0) for word in words if not word.isalpha() and len(word) == 1]
    whole = [(f"▁{word}", -5.0) for word in words if word.isalpha()]
    vocab = [(piece, 0.0) for piece in SPECIAL] + fallback + letters + marks + whole
    tokenizer = Tokenizer(Unigram(vocab, unk_id=2, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer.add_special_tokens(list(SPECIAL))
    with written(folder / "tokenizer.json") as part:
        tokenizer.save(str(part))
    write_json(folder / "tokenizer_config.json", TOKENIZER_SETTINGS)
    return len(vocab)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--folder", type=Path, required=True, help="gets the files")
    parser.add_argument("--seed", type=int, default=0, help="of the text encoder's first weights")
    return parser


def main(argv: Sequence[str]) -> int:
    """Write the folder."""
    args = build_parser().parse_args(argv)
    from wan.folders import TEXT_ENCODER_FILE, TOKENIZER_FOLDER
    from wan.text_encoder import WanTextEncoder, WanTokenizer

    if (args.folder / TEXT_ENCODER_FILE).exists():
        raise UserError(f"{args.folder} holds a text encoder already; give another --folder")
    make_folder(args.folder)
    write_json(args.folder / "config.json", DIT)
    size = write_tokenizer(args.folder / TOKENIZER_FOLDER)
    tokenizer = WanTokenizer.from_folder(args.folder / TOKENIZER_FOLDER)
    encoder = WanTextEncoder.random(
        tokenizer, size, text_len=int(str(DIT["text_len"])), seed=args.seed, **TEXT
    )
    encoder.save_official(args.folder / TEXT_ENCODER_FILE)
    print(f"wrote {args.folder}: {size} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
