"""The stages of `scripts/gpu_check.py` that no other command has: one of them per process.

    python scripts/_gpu_stages.py ceilings --config_path configs/rolling_forcing_dmd.yaml

Sizes come from the config and the model preset, so small ones rehearse every stage on a CPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

if not __package__:  # run by its path: the tree that it lies in comes first
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts import _ceilings, _machine
from scripts._ceilings import seconds_of
from scripts.benchmark import open_pipeline
from utils.cli import parse_command, run_main, set_up_logging
from utils.files import write_json

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline import VideoPipeline
    from wan.vae import WanVAE

UPDATES = 2


def machine(pipe: VideoPipeline) -> dict[str, Any]:
    """Versions, device, driver and clocks, commit."""
    return _machine.machine(pipe.device)


def ceilings(pipe: VideoPipeline) -> dict[str, Any]:
    """What this device reaches, with every kernel of attention that it has."""
    return _ceilings.ceilings(pipe, _steady(pipe))


def decoding(pipe: VideoPipeline) -> dict[str, Any]:
    """Seconds that the VAE takes for the latents of a block, in several forms."""
    import copy

    import torch

    latents = torch.zeros(1, pipe.layout.block_frames, *pipe.shape.latent, device=pipe.device)
    one_by_one, compiled = copy.copy(pipe.vae), copy.copy(pipe.vae)
    one_by_one.pixels_at_once = 0
    found = {
        "as it is": _decoded(pipe.vae, latents),
        "one latent frame after the other": _decoded(one_by_one, latents),
    }
    if pipe.device.type == "cuda":
        compiled.compile_decoder(pipe.layout.block_frames)
        found["compiled, cudnn.benchmark"] = _decoded(compiled, latents)
    for order in (torch.channels_last_3d, torch.contiguous_format):
        for weight in pipe.vae.model.parameters():
            if weight.ndim == 5:
                weight.data = weight.data.contiguous(memory_format=order)
        found[f"diffusers, {str(order).removeprefix('torch.')}"] = _stock(pipe, latents)
    return {"seconds": found}


def profile(pipe: VideoPipeline) -> dict[str, Any]:
    """The kernels of one steady block, by their time."""
    stream = pipe.open_stream(_text(pipe))
    for _ in range(_steady(pipe).first + 2):
        next(stream)
    return _machine.kernels(stream, pipe.device)


def sharded(device: str | None) -> dict[str, Any]:
    """Two updates of DMD and of an ODE initialisation in the shapes world, under FSDP2."""
    with TemporaryDirectory() as folder:
        pairs = Path(folder) / "pairs"
        write_pairs(pairs)
        given = {"dmd": ("rolling_forcing", []), "ode": ("ode_init", [f"data_path={pairs}"])}
        return {
            "updates": {
                name: updates(config, [*words, f"device={device or 'auto'}"], Path(folder) / name)
                for name, (config, words) in given.items()
            }
        }


SMALL_TRAINING = (
    f"max_steps={UPDATES} sharding_strategy=full batch_size=1 total_batch_size=1 "
    "num_training_frames=9 image_or_video_shape=[1,9,16,8,8] heldout_every=0 ema_start_step=0 "
    "dfake_gen_update_ratio=1 generator_ckpt=null"
)


def updates(config_name: str, words: Sequence[str], logdir: Path) -> list[dict[str, float]]:
    """The numbers that each update of a training of the shapes world logs."""
    from trainer.metrics import flatten, read_metrics
    from trainer.sharding import open_world
    from trainer.trainer import Trainer
    from utils.config import load_config

    given = [*SMALL_TRAINING.split(), *words]
    config = load_config(f"configs/shapes/{config_name}.yaml", given)
    with open_world(config.device) as world:
        Trainer(config, world, logdir, save=False, visualise=False).train()
    numbers = (flatten(line).items() for line in read_metrics(logdir))
    return [{key: x for key, x in line if isinstance(x, int | float)} for line in numbers]


def write_pairs(folder: Path) -> None:
    """Trajectories of noise, as good as a teacher's for the speed of a training on them."""
    import torch

    from pipeline.setup import Setup
    from utils.config import load_config
    from utils.datasets import write_shard

    config = load_config("configs/shapes/ode_init.yaml", SMALL_TRAINING.split())
    levels = Setup.of(config).levels.tensor().tolist()
    drawn = torch.randn(2, len(levels) + 1, *config.image_or_video_shape[1:])
    folder.mkdir()
    prompts = ["a small red circle", "a large blue square"]
    write_shard(folder / "0.safetensors", drawn, prompts, timesteps=[*levels, 0.0])


STAGES: dict[str, Callable[[VideoPipeline], dict[str, Any]]] = {
    "machine": machine,
    "ceilings": ceilings,
    "decoding": decoding,
    "profile": profile,
}


def _decoded(vae: WanVAE, latents: Tensor) -> float:
    decoder = vae.streaming_decoder()
    decoder.decode(latents)
    return seconds_of(lambda: decoder.decode(latents), latents.device)


def _stock(pipe: VideoPipeline, latents: Tensor) -> float:
    """diffusers' own decoder, one latent frame after the other."""
    import torch

    model, past = pipe.vae.model, [None] * 100
    frames = latents.transpose(1, 2).to(pipe.vae.decoded_dtype).split(1, dim=2)

    @torch.no_grad()
    def block(*, first: bool = False) -> None:
        for i, frame in enumerate(frames):
            x = model.post_quant_conv(frame)
            model.decoder(x, feat_cache=past, feat_idx=[0], first_chunk=first and i == 0)

    block(first=True)
    return seconds_of(block, latents.device)


def _text(pipe: VideoPipeline) -> Tensor:
    import torch

    sizes = pipe.dit.config
    return torch.zeros(1, sizes.text_len, sizes.text_dim, dtype=pipe.dit.dtype)


def _steady(pipe: VideoPipeline) -> Any:
    from pipeline.timing import SteadyState

    return SteadyState.of(pipe.setup.plan(pipe.setup.schedule(None)))


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("stage", choices=[*STAGES, "sharded"])
    parser.add_argument("--config_path", required=True, help="experiment file")
    parser.add_argument("--model", help="preset of sizes (default: that of the config)")
    parser.add_argument("--device", help="cpu, cuda … (default: a GPU if there is one)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the config")
    parser.set_defaults(random_weights=True, checkpoint_path=None)
    return parser


def main(argv: Sequence[str]) -> int:
    """Run one stage."""
    args = parse_command(build_parser(), argv)
    set_up_logging(quiet=True)
    if args.stage == "sharded":
        found = sharded(args.device)
    else:
        found = STAGES[args.stage](open_pipeline(args))
    print(found)
    if args.json is not None:
        write_json(args.json, found)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
