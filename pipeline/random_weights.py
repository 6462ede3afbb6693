"""Pipelines of any size without a file: random weights, for speed and for a look at the page."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn

from pipeline.setup import Setup
from pipeline.teamwork import Teamwork
from pipeline.text import TextSource
from pipeline.text_to_video import (
    VideoPipeline,
    check_machine,
    place_of_vae,
    prepared_vae,
    ready_pipeline,
)
from utils.errors import UserError
from wan.checkpoints import empty_dit
from wan.dit import DiTConfig, WanDiT
from wan.vae import WanVAE


def random_pipeline(
    setup: Setup,
    base_dim: int,
    *,
    text: TextSource | None = None,
    teamwork: Teamwork | None = None,
) -> VideoPipeline:
    """Networks of the setup's sizes; weights depend on its seed. `base_dim` is the VAE's.

    `teamwork` as in `load_generator`.
    """
    device, dtype, backend = check_machine(setup, teamwork)
    if teamwork is not None and teamwork.leads:
        teamwork.load()
    with torch.random.fork_rng():
        torch.manual_seed(setup.seed)
        dit = random_dit(setup.sizes, device, dtype)
    vae = WanVAE.random(base_dim=base_dim, z_dim=setup.sizes.in_dim)
    apart, beside = place_of_vae(setup, device, dtype)
    vae = prepared_vae(vae.to(apart), setup, beside)
    return ready_pipeline(setup, dit, backend, vae=vae, text=text, teamwork=teamwork)


def random_text(pipe: VideoPipeline) -> Tensor:
    """Text embeddings `[1, L, dim]`, always the same."""
    sizes = pipe.dit.config
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, sizes.text_len, sizes.text_dim, generator=generator)


def read_preset(path: Path) -> dict[str, Any]:
    """An official `config.json` with an entry `vae`; UserError if it is not one."""
    try:
        sizes = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not readable as JSON") from error
    if not isinstance(sizes, dict) or not isinstance(sizes.get("vae"), dict):
        raise UserError(f'{path} is no model preset: it needs an entry "vae": {{"base_dim": …}}')
    base_dim = sizes["vae"].get("base_dim")
    if not isinstance(base_dim, int) or base_dim < 1:
        raise UserError(f"{path}: vae.base_dim must be a number of channels above 0")
    return sizes


def drawn_weights(sizes: DiTConfig, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Names and weights of a network, drawn on `device` one after the other, always the same.

    Nothing is kept, so a network of any size takes no more memory than it has itself.
    """
    for name, like in empty_dit(sizes).state_dict().items():
        shape = like.shape
        if len(shape) == 1:  # of a norm, or a bias
            fill = torch.ones if name.endswith("weight") else torch.zeros
            yield name, fill(shape, device=device)
        else:
            draw = torch.Generator(device).manual_seed(crc32(name.encode()))
            drawn = torch.randn(shape, generator=draw, device=device)
            yield name, drawn * shape[1:].numel() ** -0.5


@torch.no_grad()
def random_dit(config: DiTConfig, device: torch.device, dtype: torch.dtype) -> WanDiT:
    """A network with freshly initialised weights, made in place on `device`."""
    dit = empty_dit(config).to(dtype).to_empty(device=device)
    for module in dit.modules():
        if isinstance(module, nn.Linear | nn.Conv3d | nn.LayerNorm | nn.RMSNorm):
            module.reset_parameters()
    for name, parameter in dit.named_parameters():
        if name.endswith("modulation"):
            parameter.normal_(std=config.dim**-0.5)
    return dit.requires_grad_(False).eval()
