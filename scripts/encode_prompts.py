"""Encode prompts once, so that training and inference need no text encoder.

    python scripts/encode_prompts.py --config_path configs/rolling_forcing_dmd.yaml \\
        --data_path prompts/vidprom_filtered_extended.txt --negative_prompt \\
        --output_folder data/vidprom_text
    torchrun --nproc_per_node=8 scripts/encode_prompts.py …

Set `text_embeddings: data/vidprom_text` in a config to use them. The encoder is that of
`generator_name`, in bfloat16 on a GPU. The same command again takes up a stopped run; each rank
writes shards of its own.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from tqdm import tqdm

from pipeline.components import ModelFiles, choose_device
from pipeline.precompute import (
    Shard,
    ShardRun,
    build_parser,
    plan_shards,
    read_config,
    read_prompts_of,
    weights_hash,
)
from utils.cli import parse_command, run_main, set_up_logging
from utils.config import Config, fingerprint
from utils.distributed import Ranks
from utils.embeddings import write_shard
from wan.checkpoints import load_dit_config
from wan.text_encoder import WanTextEncoder


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = build_parser("encode_prompts.py", "Store the text embeddings of prompts.")
    parser.add_argument(
        "--data_path",
        action="append",
        required=True,
        help="prompt file, or anything else with prompts (captioned videos, shapes:train); "
        "repeatable",
    )
    parser.add_argument("--extended_prompt_path", help="longer prompts: they are what is encoded")
    parser.add_argument(
        "--negative_prompt",
        action="store_true",
        help="store the config's negative prompt and the empty prompt, too",
    )
    return parse_command(parser, argv)


def main(argv: Sequence[str]) -> int:
    """Encode the prompts that are not stored yet."""
    args = parse(argv)
    ranks = Ranks.from_environment()
    set_up_logging(quiet=not ranks.is_main)
    config = read_config(args, ranks)
    files = ModelFiles.find(config, config.generator_name)
    files.require(files.text_encoder, files.tokenizer)
    device = choose_device(config.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    prompts = read_prompts_of(args.data_path, args.count, args.extended_prompt_path)
    shards = plan_shards(args.output_folder, list(dict.fromkeys(prompts)), args.shard_size)
    if args.negative_prompt:
        negatives = list(dict.fromkeys([config.negative_prompt, ""]))
        shards.append(Shard(Path(args.output_folder) / "negative.safetensors", 0, negatives))
    settings = {
        "text_encoder": weights_hash(files.text_encoder),
        "dtype": str(dtype),
        "shard_size": args.shard_size,
    }
    run = ShardRun(config, fingerprint(settings), ranks)
    missing = run.missing(shards)
    if not missing:
        return 0
    encoder = load_encoder(config, files, device, dtype)

    def make(shard: Shard, bar: tqdm) -> None:
        embeddings = {}
        for prompt in shard.prompts:  # one at a time: the very numbers that the pipeline computes
            embeddings[prompt] = encoder.encode([prompt])[0].cpu()
            bar.update()
        write_shard(shard.path, embeddings, run.made_by)

    run.write(missing, make)
    return 0


def load_encoder(
    config: Config, files: ModelFiles, device: torch.device, dtype: torch.dtype
) -> WanTextEncoder:
    """The text encoder for the length of text that the generator reads."""
    text_len = load_dit_config(files.folder).text_len
    return WanTextEncoder.from_official(
        files.text_encoder, files.tokenizer, device=device, dtype=dtype, text_len=text_len
    )


if __name__ == "__main__":
    sys.exit(run_main(main))
