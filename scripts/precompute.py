"""Compute once what training would compute again and again: text embeddings, latents, ODE pairs.

    python scripts/precompute.py text --config_path configs/rolling_forcing_dmd.yaml \\
        --data_path prompts/vidprom_filtered_extended.txt --negative_prompt \\
        --output_folder data/vidprom_text
    python scripts/precompute.py latents --config_path C --data_path FOLDER --output_folder data/l
    torchrun --nproc_per_node=8 scripts/precompute.py ode_pairs \\
        --config_path configs/rolling_forcing_dmd.yaml \\
        --data_path prompts/vidprom_filtered_extended.txt --count 16000 \\
        --output_folder data/ode_pairs text_embeddings=data/vidprom_text

The same command again takes up a stopped run; each rank writes shards of its own, and the result
depends on neither ranks nor batches.

text: embeddings by the encoder of `generator_name`, in bfloat16 on a GPU; set `text_embeddings` in
a config to use them.

latents: FOLDER holds videos, each with a .txt of the same name; of each the first frames are taken
at the config's rate, resized and cropped to its size.

ode_pairs: states of the teacher's ODE at the student's levels, for `trainer: ode`. The teacher is
`real_name` (or `--checkpoint_path`, of the same size), bidirectional, with Euler steps on the
config's timestep shift; levels that are not on that grid are added to it, and each trajectory holds
the states at exactly the levels, and the clean end. Guidance is `guidance_scale` g of the config in
the form of the DMD teacher, v = v_cond + g (v_cond - v_uncond); the other usual form has g' =
g + 1. The unconditional prompt is `negative_prompt`; prompt i starts from the noise of (seed, i).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # run by its path: the tree that it lies in comes first
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.cli import parse_command, run_main, set_up_logging
from utils.distributed import Ranks
from utils.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor
    from tqdm import tqdm

    from pipeline.setup import Setup
    from trainer.precompute import Shard
    from utils.config import Config
    from utils.datasets import Dataset
    from wan.folders import ModelFolder

VERBS = ("text", "latents", "ode_pairs")
STORAGE_DTYPES = ("float32", "bfloat16", "float16")
PUBLISHED_STEPS = 48  # of CausVid's and Self Forcing's trajectories


def build_parser() -> argparse.ArgumentParser:
    """The command line as far as the verb; `verb_parsers` have the flags."""
    parser = argparse.ArgumentParser(
        prog="precompute.py",
        description=__doc__.split("\n")[0],
        epilog="precompute.py VERB --help shows the flags of a verb.",
    )
    parser.add_argument("verb", choices=VERBS, help="what to compute")
    return parser


def verb_parsers() -> dict[str, argparse.ArgumentParser]:
    """The command line behind each verb: what all share, then their own flags."""
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--config_path", required=True, help="experiment file")
    shared.add_argument("--output_folder", required=True, help="where the shards go")
    shared.add_argument("--count", type=int, help="only the first items of the data")
    shared.add_argument(
        "--shard_size", type=int, default=64, help="items per file (default: %(default)s)"
    )
    shared.add_argument("--device", help="cpu, cuda, cuda:1 … (default: a GPU if there is one)")
    shared.add_argument("overrides", nargs="*", metavar="key=value", help="of the config")
    prompts = argparse.ArgumentParser(add_help=False)
    prompts.add_argument(
        "--data_path",
        action="append",
        required=True,
        help="prompt file, or anything else with prompts (captioned videos, …); repeatable",
    )
    prompts.add_argument("--extended_prompt_path", help="longer prompts: they are what is read")
    stored = argparse.ArgumentParser(add_help=False)
    stored.add_argument("--storage_dtype", choices=STORAGE_DTYPES, default="float32")

    def verb(name: str, title: str, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
        return argparse.ArgumentParser(
            prog=f"precompute.py {name}",
            description=title,
            parents=[shared, *parents],
            allow_abbrev=False,
        )

    text = verb("text", "Store the text embeddings of prompts.", prompts)
    text.add_argument(
        "--negative_prompt",
        action="store_true",
        help="store the config's negative prompt and the empty prompt, too",
    )
    latents = verb("latents", "Store the latents of captioned videos.", stored)
    latents.add_argument("--data_path", required=True, help="folder of videos with .txt captions")
    latents.add_argument(
        "--num_frames", type=int, help="video frames per clip (default: the config's latent frames)"
    )
    pairs = verb("ode_pairs", "Store trajectories of the teacher's ODE.", prompts, stored)
    pairs.add_argument("--checkpoint_path", help="other weights for the teacher")
    pairs.add_argument("--num_steps", type=int, default=PUBLISHED_STEPS, help="(%(default)s)")
    pairs.add_argument("--num_latent_frames", type=int, help="(default: the config's)")
    pairs.add_argument("--batch_size", type=int, default=1, help="trajectories at once")
    pairs.add_argument("--seed", type=int, help="of the noise (default: the config's)")
    return {"text": text, "latents": latents, "ode_pairs": pairs}


def main(argv: Sequence[str]) -> int:
    """Compute the shards that are not there yet."""
    words = list(argv[1:] if argv[:1] == ["--"] else argv)
    verb = build_parser().parse_args(words[:1]).verb
    args = parse_command(verb_parsers()[verb], words[1:])
    ranks = Ranks.from_environment()
    set_up_logging(quiet=not ranks.is_main)
    from utils.config import load_config

    config = load_config(args.config_path, args.overrides)
    config.device = ranks.device_name(args.device or config.device)
    from pipeline.setup import Setup

    verbs = {"text": text, "latents": latents, "ode_pairs": ode_pairs}
    verbs[verb](config, Setup.of(config), args, ranks)
    return 0


# --- text ----------------------------------------------------------------------------------------


def text(config: Config, setup: Setup, args: argparse.Namespace, ranks: Ranks) -> None:
    """Encode prompts, one at a time: the very numbers that the pipeline computes."""
    import torch

    from pipeline.records import text_files
    from trainer.precompute import Shard, ShardRun, files_hash, list_shards, read_prompts_of
    from utils.config import fingerprint
    from utils.devices import choose_device
    from utils.embeddings import write_shard
    from wan.text_encoder import WanTextEncoder

    files = setup.require_folder()
    files.require(files.text_encoder, files.tokenizer)
    device = choose_device(config.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    prompts = read_prompts_of(args.data_path, args.count, args.extended_prompt_path)
    shards = list_shards(args.output_folder, list(dict.fromkeys(prompts)), args.shard_size)
    if args.negative_prompt:
        negatives = list(dict.fromkeys([config.negative_prompt, ""]))
        shards.append(Shard(Path(args.output_folder) / "negative.safetensors", 0, negatives))
    settings = {
        "text_encoder": files_hash(text_files(files)),
        "dtype": str(dtype),
        "shard_size": args.shard_size,
    }
    run = ShardRun(config, fingerprint(settings), ranks)
    missing = run.missing(shards)
    if not missing:
        return
    encoder = WanTextEncoder.from_official(
        files.text_encoder,
        files.tokenizer,
        device=device,
        dtype=dtype,
        text_len=setup.sizes.text_len,
    )

    def make(shard: Shard, bar: tqdm) -> None:
        embeddings = {}
        for prompt in shard.prompts:
            embeddings[prompt] = encoder.encode([prompt])[0].cpu()
            bar.update()
        write_shard(shard.path, embeddings, run.made_by)

    run.write(missing, make)


# --- latents -------------------------------------------------------------------------------------


def latents(config: Config, setup: Setup, args: argparse.Namespace, ranks: Ranks) -> None:
    """Encode clips."""
    import torch

    from pipeline.prefix import encode_prefix
    from trainer.precompute import ShardRun, first_items, list_shards, weights_hash
    from utils.config import fingerprint
    from utils.datasets import write_shard
    from utils.devices import choose_device
    from wan.vae import WanVAE

    files = setup.require_folder()
    files.require(files.vae)
    device = choose_device(config.device)
    data, num_frames = open_videos(config, setup, args.data_path, args.num_frames)
    prompts = [data.prompt(index) for index in range(first_items(data, args.count))]
    shards = list_shards(args.output_folder, prompts, args.shard_size)
    settings = {
        "vae": weights_hash(files.vae),
        "dtype": str(torch.float32),
        "storage_dtype": args.storage_dtype,
        "clip": [num_frames, config.height, config.width],
        "fps": config.fps,
        "shard_size": args.shard_size,
    }
    run = ShardRun(config, fingerprint(settings), ranks)
    missing = run.missing(shards)
    if not missing:
        return
    vae = WanVAE.from_official(files.vae, device=device)  # in 16 bits latents are visibly wrong
    storage = getattr(torch, args.storage_dtype)

    def make(shard: Shard, bar: tqdm) -> None:
        rows = []
        for index in shard.items:
            encoded = encode_prefix(data[index]["video"], vae).latents  # [1, F, C, h, w]
            rows.append(encoded.to("cpu", storage))
            bar.update()
        write_shard(shard.path, torch.cat(rows), shard.prompts, fingerprint=run.made_by)

    run.write(missing, make)


def open_videos(
    config: Config, setup: Setup, path: str, num_frames: int | None
) -> tuple[Dataset, int]:
    """The videos at a path and the frames of a clip; UserError if the VAE cannot encode such."""
    from utils.datasets import open_dataset

    shape = setup.shape
    if num_frames is None:
        num_frames = shape.video_frames(config.image_or_video_shape[1])
    if num_frames < 1 or shape.video_frames(shape.latent_frames(num_frames)) != num_frames:
        some = ", ".join(str(shape.video_frames(frames)) for frames in (1, 2, 3))
        raise UserError(
            f"--num_frames {num_frames} is not possible: the VAE encodes {some}, … "
            f"(1 + {shape.strides.time} n) frames"
        )
    data = open_dataset(
        path, num_frames=num_frames, height=config.height, width=config.width, fps=config.fps
    )
    if "video" not in data.holds:
        raise UserError(f"{path} holds no videos: give a folder of them, with .txt captions")
    return data, num_frames


# --- ODE pairs -----------------------------------------------------------------------------------


def ode_pairs(config: Config, setup: Setup, args: argparse.Namespace, ranks: Ranks) -> None:
    """Solve trajectories."""
    import torch

    from pipeline.trajectories import ode_grid
    from trainer.precompute import ShardRun, list_shards, read_prompts_of
    from utils.config import fingerprint
    from utils.datasets import write_shard

    if not setup.distilled:
        raise UserError("the config has no denoising_step_list: there are no levels to store")
    levels = setup.levels.tensor()
    grid = ode_grid(levels, args.num_steps, setup.levels.shift)
    prompts = read_prompts_of(args.data_path, args.count, args.extended_prompt_path)
    check_before_loading(config, setup, args, prompts)
    shards = list_shards(args.output_folder, prompts, args.shard_size)
    made_by = fingerprint(pair_settings(config, setup, args, levels, grid))
    run = ShardRun(config, made_by, ranks)
    missing = run.missing(shards)
    if not missing:
        return
    teacher = Teacher(config, setup, args, levels=levels, grid=grid)
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


def check_before_loading(
    config: Config, setup: Setup, args: argparse.Namespace, prompts: Sequence[str]
) -> None:
    """Raise UserError for what would stop the run after a large model was loaded."""
    from utils.embeddings import EmbeddingStore

    if args.batch_size < 1:
        raise UserError("--batch_size must be at least 1")
    setup.layout.require_full_blocks(latent_frames(config, args))
    needed = [config.negative_prompt, *prompts] if config.guidance_scale else prompts
    if config.text_embeddings is not None:
        EmbeddingStore(config.text_embeddings).require(needed)
    else:
        files = setup.require_folder()
        files.require(files.text_encoder, files.tokenizer)


class Teacher:
    """The bidirectional teacher with what is around it."""

    def __init__(
        self,
        config: Config,
        setup: Setup,
        args: argparse.Namespace,
        *,
        levels: Tensor,
        grid: Tensor,
    ) -> None:
        from pipeline.text_to_video import VideoPipeline
        from utils.devices import choose_device, choose_dtype
        from wan.attention import check_backend
        from wan.checkpoints import load_dit

        device = choose_device(config.device)
        dtype = choose_dtype(config.dtype, device)
        folder = teacher_folder(config, setup)
        dit = load_dit(folder.sizes, teacher_source(folder, args), device=device, dtype=dtype)
        dit.attention_backend = check_backend(config.attention_backend, device, dtype)
        self.pipe = VideoPipeline(setup, dit)
        self.frames = latent_frames(config, args)
        self.levels, self.grid = levels, grid
        self.seed = config.seed if args.seed is None else args.seed
        self.guidance: float | None = None
        self.negative: Tensor | None = None  # [L, text_dim]
        if config.guidance_scale != 0:
            self.guidance = 1 + config.guidance_scale
            self.negative = self.pipe.encode_prompts([config.negative_prompt])[0]

    def solve(self, items: Sequence[int], prompts: Sequence[str]) -> Tensor:
        """Trajectories `[B, T + 1, F, C, h, w]` of the prompts with these numbers."""
        from pipeline.trajectories import solve_trajectories
        from utils.embeddings import pad_batch

        pipe = self.pipe
        embeddings = pipe.encode_prompts(prompts)
        if self.negative is not None:
            embeddings = pad_batch([*embeddings, *[self.negative] * len(prompts)])
        return solve_trajectories(
            pipe.setup,
            pipe.dit,
            embeddings,
            levels=self.levels,
            grid=self.grid,
            num_latent_frames=self.frames,
            noise=pipe.setup.counter_noise(self.seed),
            samples=items,
            guidance_scale=self.guidance,
        )


def latent_frames(config: Config, args: argparse.Namespace) -> int:
    """Latent frames of a trajectory."""
    asked = args.num_latent_frames
    return config.image_or_video_shape[1] if asked is None else asked


def teacher_folder(config: Config, setup: Setup) -> ModelFolder:
    """The model folder of the teacher."""
    from wan.folders import ModelFolder

    if config.real_name == config.generator_name:
        return setup.require_folder()
    return ModelFolder.find(config.model_root, config.real_name)


def teacher_source(folder: ModelFolder, args: argparse.Namespace) -> Path:
    """Where the teacher's weights are."""
    from utils.config import find_file

    own = args.checkpoint_path
    return find_file(own, "checkpoint") if own else folder.path


def pair_settings(
    config: Config, setup: Setup, args: argparse.Namespace, levels: Tensor, grid: Tensor
) -> dict[str, Any]:
    """Everything that the numbers in a shard depend on, but the prompts."""
    from pipeline.records import text_files
    from trainer.precompute import files_hash, weights_hash
    from utils.devices import choose_device, choose_dtype
    from utils.embeddings import EmbeddingStore

    source = teacher_source(teacher_folder(config, setup), args)
    if config.text_embeddings:
        text: Any = sorted(EmbeddingStore(config.text_embeddings).made_by)
    else:
        text = files_hash(text_files(setup.require_folder()))
    return {
        "teacher": weights_hash(source),
        "text": text,
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
