"""Low-rank adapters (LoRA, arXiv 2106.09685) through peft; merged into the weights on export."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from utils.errors import UserError

BASE, ADAPTER_A, ADAPTER_B = ".base_layer.", ".lora_A.default.", ".lora_B.default."


def add_lora(module: nn.Module, rank: int, alpha: int, targets: Sequence[str]) -> None:
    """Put adapters beside the linear layers named by `targets`; everything else is frozen."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UserError("lora needs the package peft: pip install peft") from error
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets))
    try:
        inject_adapter_in_model(config, module)
    except ValueError as error:
        raise UserError(f"lora.targets {list(targets)} name no layer of the network") from error


def plain_name(name: str) -> str:
    """Of a parameter in a module with adapters the name in the network that it adapts."""
    return name.replace(BASE, ".")


def first_adapters(module: nn.Module, seed: int) -> dict[str, Tensor]:
    """First values of a module's adapters.

    A is drawn as peft draws it (Kaiming uniform with a = sqrt 5, that is U(-1/sqrt n, 1/sqrt n) for
    n inputs), B is zero, so the module starts as the network it adapts.
    """
    generator = torch.Generator().manual_seed(seed)
    adapters: dict[str, Tensor] = {}
    for name, parameter in module.state_dict().items():
        if ADAPTER_A in name:
            bound = parameter.shape[1] ** -0.5
            adapters[name] = (2 * torch.rand(parameter.shape, generator=generator) - 1) * bound
        elif ADAPTER_B in name:
            adapters[name] = torch.zeros(parameter.shape)
    return adapters


def merge_lora(state: Mapping[str, Tensor], rank: int, alpha: int) -> dict[str, Tensor]:
    """Plain names and weights: W + (alpha / rank) B A."""
    merged: dict[str, Tensor] = {}
    for name, value in state.items():
        if ADAPTER_A in name or ADAPTER_B in name:
            continue
        plain = plain_name(name)
        stem = name.removesuffix(f"{BASE}weight") if name.endswith(f"{BASE}weight") else None
        if stem is None:
            merged[plain] = value
            continue
        down, up = state[f"{stem}{ADAPTER_A}weight"], state[f"{stem}{ADAPTER_B}weight"]
        merged[plain] = value + (alpha / rank) * (up.float() @ down.float()).to(value.dtype)
    return merged
