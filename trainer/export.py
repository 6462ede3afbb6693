"""Weights of a run in the published forms, for inference and for others."""

from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_model_state_dict

from model.lora import merge_lora
from model.vae import Autoencoder
from trainer.networks import Player
from trainer.sharding import World, full_tensor
from utils.config import Config
from utils.datasets import Dataset
from utils.files import write_tensors, write_torch, written_folder
from utils.video import to_float
from wan.vae import WanVAE, encode_moments

STATISTICS_CLIPS = 64


def export_generator(folder: Path, config: Config, player: Player, *, is_main: bool) -> None:
    """Write a student's weights; all ranks have to call it.

    `model.pt` holds `generator` and, once there is one, `generator_ema`, with names as published;
    `generator.safetensors` and `generator_ema.safetensors` hold the official names.
    """
    networks = {
        network: _merged(gathered(weights, is_main=is_main), config)
        for network, weights in weights_of(player).items()
    }
    if not is_main:
        return
    published = {
        network: {f"model.{name}": value for name, value in state.items()}
        for network, state in networks.items()
    }
    with written_folder(folder) as partial:
        write_torch(partial / "model.pt", published)
        for network, state in networks.items():
            write_tensors(partial / f"{network}.safetensors", state)


def export_vae(folder: Path, player: Player, data: Dataset, world: World) -> None:
    """Write `Wan2.1_VAE.pth`: the average if there is one, its latents made standard normal."""
    weights = list(weights_of(player).values())[-1]
    state = gathered(weights, is_main=world.is_main)
    if not world.is_main:
        return
    model = cast(Autoencoder, player.module).model
    vae = WanVAE.like(model, {k.removeprefix("model."): v for k, v in state.items()})
    vae.fold_statistics(*latent_moments(vae, data))
    with written_folder(folder) as partial:
        vae.save_official(partial / "Wan2.1_VAE.pth")


@torch.no_grad()
def latent_moments(vae: WanVAE, data: Dataset) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation `[C]` of the latents' means over the first clips of the data."""
    means = []
    for index in range(min(STATISTICS_CLIPS, len(data))):
        video = to_float(data[index]["video"])[None].to(vae.device, vae.dtype)
        means.append(encode_moments(vae.model, video)[0].movedim(2, 0).flatten(1))  # [C, n]
    together = torch.cat(means, dim=1).float()
    return together.mean(dim=1), together.std(dim=1)


def weights_of(player: Player) -> dict[str, dict[str, Tensor]]:
    """`generator` and, once there is an average, `generator_ema`: (sharded) tensors by name."""
    weights = cast(dict[str, Tensor], get_model_state_dict(player.module))
    if player.ema is None:
        return {"generator": weights}
    return {"generator": weights, "generator_ema": {**weights, **player.ema.shadow}}


def gathered(state: Mapping[str, Tensor], *, is_main: bool) -> dict[str, Tensor]:
    """Whole tensors on the main rank's CPU; empty on the others, which have to take part."""
    whole: dict[str, Tensor] = {}
    for name, value in state.items():
        tensor = full_tensor(value.detach())
        if is_main:
            whole[name] = tensor.cpu().contiguous()
    return whole


def _merged(state: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    if config.lora is None:
        return state
    return merge_lora(state, config.lora.rank, config.lora.alpha)
