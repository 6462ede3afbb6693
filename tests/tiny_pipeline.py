"""Pipelines over recorded or random tiny weights, through the same loader as every model."""

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from pipeline import VideoPipeline, load_pipeline
from tests.golden_cases import Case, load_weights
from wan.dit import DiTConfig, WanDiT

TINY_DIT = {
    "model_type": "t2v",
    "dim": 48,
    "ffn_dim": 96,
    "num_heads": 2,
    "num_layers": 2,
    "freq_dim": 16,
    "text_dim": 32,
    "text_len": 24,
}


def write_dit_folder(folder: Path, config: dict[str, Any], weights: dict[str, Tensor]) -> None:
    """The transformer's part of an official model folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(
        {key: value.contiguous() for key, value in weights.items()},
        folder / "diffusion_pytorch_model.safetensors",
    )


def random_dit(seed: int = 0, **sizes: Any) -> WanDiT:
    """A network with random weights that no layer leaves without effect."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        dit = WanDiT(DiTConfig.from_dict(TINY_DIT | sizes))
        for parameter in dit.parameters():
            if parameter.ndim == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
    return dit.requires_grad_(False).eval()


def write_config(path: Path, **values: Any) -> Path:
    path.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
    return path


def golden_pipeline(case: Case, tmp_path: Path, **values: Any) -> VideoPipeline:
    """The pipeline of a recorded rollout, its weights in an official model folder."""
    meta = case.meta
    write_dit_folder(tmp_path / "models" / "Tiny", meta["dit"], load_weights(meta["weights"]))
    rows, columns = meta["latent_hw"]
    config = {
        "model_root": str(tmp_path / "models"),
        "generator_name": "Tiny",
        "height": rows * 8,
        "width": columns * 8,
        "num_frame_per_block": meta["num_frame_per_block"],
        "denoising_step_list": meta["denoising_step_list_config"],
        "warp_denoising_step": meta["warp_denoising_step"],
        "timestep_shift": meta["timestep_shift"],
        "context_noise": meta["context_noise"],
        **values,
    }
    return load_pipeline(write_config(tmp_path / "config.yaml", **config), device="cpu")
