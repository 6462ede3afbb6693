"""Encode captioned videos to latents once, so that training needs no VAE.

    python scripts/encode_videos.py --config_path configs/shapes/rolling_forcing.yaml \\
        --data_path shapes:train --count 10000 --output_folder data/shapes_latents
    torchrun --nproc_per_node=8 scripts/encode_videos.py --config_path C --data_path FOLDER …

FOLDER (with its sub-folders) holds videos, `name.mp4` and `name.txt`; of each the first frames are
taken at the config's rate, resized and cropped to its size. The VAE is that of `generator_name`.
The same command again takes up a stopped run; each rank writes shards of its own.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from tqdm import tqdm

from pipeline.components import ModelFiles, choose_device, choose_dtype, video_shape
from pipeline.precompute import (
    STORAGE_DTYPES,
    Shard,
    ShardRun,
    build_parser,
    first_items,
    plan_shards,
    read_config,
    weights_hash,
)
from pipeline.prefix import encode_prefix
from utils.cli import run_main, set_up_logging
from utils.config import Config, fingerprint
from utils.datasets import (
    Dataset,
    LatentDataset,
    OdePairDataset,
    PromptDataset,
    open_dataset,
    write_shard,
)
from utils.distributed import Ranks
from utils.errors import UserError
from wan.checkpoints import load_dit_config
from wan.vae import WanVAE


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = build_parser("encode_videos.py", "Store the latents of captioned videos.")
    parser.add_argument(
        "--data_path", required=True, help="folder of .mp4 and .txt, or shapes:train"
    )
    parser.add_argument(
        "--num_frames", type=int, help="video frames per clip (default: the config's latent frames)"
    )
    parser.add_argument("--storage_dtype", choices=STORAGE_DTYPES, default="float32")
    return parser.parse_args([item for item in argv if item != "--"])


def main(argv: Sequence[str]) -> int:
    """Encode the clips that are not stored yet."""
    args = parse(argv)
    ranks = Ranks.from_environment()
    set_up_logging(quiet=not ranks.is_main)
    config = read_config(args, ranks)
    files = ModelFiles.find(config, config.generator_name)
    files.require(files.vae)
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    data, num_frames = open_videos(config, files, args.data_path, args.num_frames)
    prompts = [data.prompt(index) for index in range(first_items(data, args.count))]
    shards = plan_shards(args.output_folder, prompts, args.shard_size)
    settings = {
        "vae": weights_hash(files.vae),
        "dtype": str(dtype),
        "storage_dtype": args.storage_dtype,
        "clip": [num_frames, config.height, config.width, config.fps],
        "shard_size": args.shard_size,
    }
    run = ShardRun(config, fingerprint(settings), ranks)
    missing = run.missing(shards)
    if not missing:
        return 0
    vae = WanVAE.from_official(files.vae, device=device, dtype=dtype)
    storage = getattr(torch, args.storage_dtype)

    def make(shard: Shard, bar: tqdm) -> None:
        rows = []
        for index in shard.items:
            latents = encode_prefix(data[index]["video"], vae).latents  # [1, F, C, h, w]
            rows.append(latents.to("cpu", storage))
            bar.update()
        write_shard(shard.path, torch.cat(rows), shard.prompts, fingerprint=run.made_by)

    run.write(missing, make)
    return 0


def open_videos(
    config: Config, files: ModelFiles, path: str, num_frames: int | None
) -> tuple[Dataset, int]:
    """The videos at a path and the frames of a clip; UserError if the VAE cannot encode such."""
    shape = video_shape(config, load_dit_config(files.folder))
    if num_frames is None:
        num_frames = shape.video_frames(config.image_or_video_shape[1])
    if num_frames < 1 or shape.video_frames(shape.latent_frames(num_frames)) != num_frames:
        raise UserError(
            f"--num_frames {num_frames} is not possible: the VAE encodes 1, 5, 9, … "
            f"(1 + {shape.temporal_stride} n) frames"
        )
    data = open_dataset(
        path, num_frames=num_frames, height=config.height, width=config.width, fps=config.fps
    )
    if isinstance(data, PromptDataset | LatentDataset | OdePairDataset):
        raise UserError(f"{path} holds no videos: give a folder of .mp4 and .txt, or shapes:train")
    return data, num_frames


if __name__ == "__main__":
    sys.exit(run_main(main))
