"""Solve the teacher's ODE for prompts and store its states at the student's levels.

    torchrun --nproc_per_node=8 scripts/generate_ode_pairs.py \\
        --config_path configs/rolling_forcing_dmd.yaml \\
        --data_path prompts/vidprom_filtered_extended.txt --count 16000 \\
        --output_folder data/ode_pairs text_embeddings=data/vidprom_text

The teacher is `real_name` of the config (or `--checkpoint_path`, of the same size), bidirectional,
with Euler steps on the config's timestep shift. The config's warped `denoising_step_list` lies on
the grid of steps (it is added where it does not), and each trajectory holds the states at exactly
these timesteps and the clean end: [T + 1, F, C, h, w].

Guidance is `guidance_scale` g of the config in the form of the DMD teacher,
v = v_cond + g (v_cond - v_uncond); the other usual form, v_uncond + g' (v_cond - v_uncond), has
g' = g + 1. The unconditional prompt is `negative_prompt`.

Prompt i starts from the noise of (seed, i), so the result depends on neither ranks nor batches. The
same command again takes up a stopped run; each rank writes shards of its own.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor
from tqdm import tqdm

from pipeline.components import ModelFiles, block_layout, choose_device, choose_dtype
from pipeline.precompute import (
    STORAGE_DTYPES,
    Shard,
    ShardRun,
    build_parser,
    plan_shards,
    read_config,
    read_prompts_of,
    weights_hash,
)
from pipeline.text_to_video import VideoPipeline
from pipeline.trajectories import ode_grid, solve_trajectories
from utils.cli import parse_command, run_main, set_up_logging
from utils.config import Config, find_file, fingerprint
from utils.datasets import write_shard
from utils.distributed import Ranks
from utils.embeddings import EmbeddingStore, pad_batch
from utils.errors import UserError
from utils.noise import CounterNoise
from wan.attention import check_backend
from wan.checkpoints import load_dit, load_dit_config
from wan.flow import denoising_timesteps

PUBLISHED_STEPS = 48  # of CausVid's and Self Forcing's trajectories


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = build_parser("generate_ode_pairs.py", "Store trajectories of the teacher's ODE.")
    parser.add_argument(
        "--data_path", action="append", required=True, help="anything with prompts; repeatable"
    )
    parser.add_argument("--extended_prompt_path", help="longer prompts, for the teacher")
    parser.add_argument("--checkpoint_path", help="other weights for the teacher")
    parser.add_argument("--num_steps", type=int, default=PUBLISHED_STEPS, help="(%(default)s)")
    parser.add_argument("--num_latent_frames", type=int, help="(default: the config's)")
    parser.add_argument("--batch_size", type=int, default=1, help="trajectories at once")
    parser.add_argument("--seed", type=int, help="of the noise (default: the config's)")
    parser.add_argument("--storage_dtype", choices=STORAGE_DTYPES, default="float32")
    return parse_command(parser, argv)


def main(argv: Sequence[str]) -> int:
    """Solve the trajectories that are not stored yet."""
    args = parse(argv)
    ranks = Ranks.from_environment()
    set_up_logging(quiet=not ranks.is_main)
    config = read_config(args, ranks)
    levels, grid = levels_and_grid(config, args.num_steps)
    prompts = read_prompts_of(args.data_path, args.count, args.extended_prompt_path)
    check_before_loading(config, args, prompts)
    shards = plan_shards(args.output_folder, prompts, args.shard_size)
    run = ShardRun(config, fingerprint(settings_of(config, args, levels, grid)), ranks)
    missing = run.missing(shards)
    if not missing:
        return 0
    teacher = Teacher(config, args, levels=levels, grid=grid)
    storage = getattr(torch, args.storage_dtype)

    def make(shard: Shard, bar: tqdm) -> None:
        rows = []
        for items, texts in shard.batches(args.batch_size):
            rows.append(teacher.solve(items, texts).to("cpu", storage))
            bar.update(len(items))
        write_shard(
            shard.path,
            torch.cat(rows),
            shard.prompts,
            timesteps=[*levels.tolist(), 0.0],
            fingerprint=run.made_by,
        )

    run.write(missing, make)
    return 0


def levels_and_grid(config: Config, num_steps: int) -> tuple[Tensor, Tensor]:
    """Timesteps of the student's levels `[T]`, and those of the Euler steps."""
    if config.denoising_step_list is None:
        raise UserError("the config has no denoising_step_list: there are no levels to store")
    shift = config.generator_shift
    steps, warp = config.denoising_step_list, config.warp_denoising_step
    levels = denoising_timesteps(steps, shift, warp=warp)
    return levels, ode_grid(levels, num_steps, shift)


def check_before_loading(config: Config, args: argparse.Namespace, prompts: Sequence[str]) -> None:
    """Raise UserError for what would stop the run after a large model was loaded."""
    if args.batch_size < 1:
        raise UserError("--batch_size must be at least 1")
    block_layout(config).require_full_blocks(latent_frames(config, args))
    needed = [config.negative_prompt, *prompts] if config.guidance_scale else prompts
    if config.text_embeddings is not None:
        EmbeddingStore(config.text_embeddings).require(needed)
    else:
        files = ModelFiles.find(config, config.generator_name)
        files.require(files.text_encoder, files.tokenizer)


class Teacher:
    """The bidirectional teacher with what is around it."""

    def __init__(
        self, config: Config, args: argparse.Namespace, *, levels: Tensor, grid: Tensor
    ) -> None:
        device = choose_device(config.device)
        dtype = choose_dtype(config.dtype, device)
        sizes = load_dit_config(ModelFiles.find(config, config.real_name).folder)
        dit = load_dit(sizes, teacher_source(config, args), device=device, dtype=dtype)
        dit.attention_backend = check_backend(config.attention_backend, device, dtype)
        self.pipe = VideoPipeline(config, dit, files=ModelFiles.find(config, config.generator_name))
        self.frames = latent_frames(config, args)
        self.levels, self.grid = levels, grid
        self.seed = config.seed if args.seed is None else args.seed
        self.negative: Tensor | None = None  # [L, text_dim]
        if config.guidance_scale != 0:
            self.negative = self.pipe.encode_prompts([config.negative_prompt])[0]

    def solve(self, items: Sequence[int], prompts: Sequence[str]) -> Tensor:
        """Trajectories `[B, T + 1, F, C, h, w]` of the prompts with these numbers."""
        pipe, layout = self.pipe, block_layout(self.pipe.config)
        text, guidance = pipe.encode_prompts(prompts), None
        if self.negative is not None:
            text = pad_batch([*text, *[self.negative] * len(prompts)])
            guidance = 1 + pipe.config.guidance_scale
        return solve_trajectories(
            pipe.config,
            pipe.dit,
            text,
            levels=self.levels,
            grid=self.grid,
            num_latent_frames=self.frames,
            noise=CounterNoise(self.seed, pipe.shape.latent, layout.block_frames, layout.frames(0)),
            samples=items,
            guidance_scale=guidance,
        )


def latent_frames(config: Config, args: argparse.Namespace) -> int:
    """Latent frames of a trajectory."""
    asked = args.num_latent_frames
    return config.image_or_video_shape[1] if asked is None else asked


def teacher_source(config: Config, args: argparse.Namespace) -> Path:
    """Where the teacher's weights are."""
    if args.checkpoint_path:
        return find_file(args.checkpoint_path, "checkpoint")
    return ModelFiles.find(config, config.real_name).folder


def settings_of(
    config: Config, args: argparse.Namespace, levels: Tensor, grid: Tensor
) -> dict[str, Any]:
    """Everything that the numbers in a shard depend on, but the prompts."""
    encoder = ModelFiles.find(config, config.generator_name).text_encoder
    return {
        "teacher": weights_hash(teacher_source(config, args)),
        "text": config.text_embeddings or weights_hash(encoder),
        "levels": levels.tolist(),
        "grid": grid.tolist(),
        "guidance_scale": config.guidance_scale,
        "negative_prompt": config.negative_prompt,
        "shape": [latent_frames(config, args), config.height, config.width],
        "block": [config.num_frame_per_block, config.independent_first_frame],
        "seed": config.seed if args.seed is None else args.seed,
        "dtype": str(choose_dtype(config.dtype, choose_device(config.device))),
        "storage_dtype": args.storage_dtype,
        "shard_size": args.shard_size,
    }


if __name__ == "__main__":
    sys.exit(run_main(main))
