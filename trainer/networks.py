"""Building the networks of a run: loaded, sharded, with optimisers and averages."""

import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import UMT5EncoderModel

from model.lora import add_lora, first_adapters, plain_name
from model.vae import Autoencoder, init_autoencoder
from pipeline.random_weights import drawn_weights
from pipeline.setup import Setup
from pipeline.text import TextSource
from trainer.ema import EMA
from trainer.sharding import (
    World,
    agreed,
    keep_gathered,
    load_drawn,
    load_full_state,
    make_mesh,
    reshard,
    shard_dit,
    shard_module,
    strategy_of,
)
from utils.config import ROOT, Config
from utils.devices import computes_in_bf16
from wan.attention import check_backend
from wan.checkpoints import empty_dit, read_state_dict
from wan.dit import DiTConfig, WanDiT
from wan.folders import ModelFolder, find_checkpoint
from wan.text_encoder import WanTextEncoder
from wan.vae import WanVAE

logger = logging.getLogger(__name__)

GATHERED_BYTES = 4 * 2**30
"""Of a network in the dtype that it computes in: so large ones stay gathered by themselves."""


@dataclass
class Player:
    """A trained network: its optimiser, learning rate, average and count of updates.

    `trained` holds the parameters as they are stored, by name. The module's own are these only
    while FSDP2 keeps them sharded; after a forward pass some are whole tensors without gradients.
    """

    name: str
    module: nn.Module
    optimiser: torch.optim.Optimizer
    learning_rate: Callable[[int], float]
    max_grad_norm: float
    ema_weight: float | None = None
    ema: EMA | None = None
    updates: int = 0
    trained: dict[str, nn.Parameter] = field(default_factory=dict)
    stays_gathered: bool = False

    def gathered(self) -> AbstractContextManager[None]:
        """The module is gathered once for all passes inside, where the config has it so."""
        return keep_gathered(self.module) if self.stays_gathered else nullcontext()

    def apply(self) -> None:
        """One optimiser step at this update's learning rate; gradients are then dropped."""
        for group in self.optimiser.param_groups:
            group["lr"] = self.learning_rate(self.updates)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.updates += 1

    def update_ema(self, *, active: bool, moved: bool) -> None:
        """Start the average at the first active step; from then on follow every update."""
        if self.ema_weight is None or not active:
            return
        if self.ema is None:
            self.ema = EMA(self.trained, self.ema_weight)
        elif moved:
            self.ema.update(self.trained)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The module holds the average meanwhile, if there is one."""
        if self.ema is None:
            yield
            return
        self.ema.swap(self.trained)
        reshard(self.module)
        try:
            yield
        finally:
            self.ema.swap(self.trained)
            reshard(self.module)


def compute_dtype(config: Config, device: torch.device) -> torch.dtype | None:
    """bf16 under mixed precision; None leaves the dtype of the weights."""
    mixed = config.mixed_precision
    if mixed is None:
        mixed = computes_in_bf16(device)
    return torch.bfloat16 if mixed else None


def build_dit(
    config: Config, world: World, role: str, sizes: DiTConfig, source: Path | None, *, trained: bool
) -> WanDiT:
    """A transformer in its role (`generator`, `real_score`, `fake_score`), loaded and sharded.

    Trained ones have fp32 master weights; frozen ones are kept in the compute dtype. Without a
    `source` its weights are drawn; on the meta device it has none.
    """
    low = compute_dtype(config, world.device)
    backend = check_backend(config.attention_backend, world.device, low or torch.float32)
    dit = empty_dit(sizes).requires_grad_(trained)
    if not trained and low is not None:
        dit.to(low)
    drawn = _drawn_weights(config, world, role, sizes, source)
    weights: dict[str, Tensor] = {}
    adapters: dict[str, Tensor] = {}
    with agreed():
        if source is not None and drawn is None:
            weights = read_state_dict(source)
        if role == "generator" and config.lora is not None:
            add_lora(dit, config.lora.rank, config.lora.alpha, config.lora.targets)
            adapters = first_adapters(dit, config.seed)
    names = {name: plain_name(name) for name in dit.state_dict()}
    if world.size > 1 or low is not None:
        mesh = make_mesh(strategy_of(config, role), world, config.hybrid_shard_size)
        shard_dit(dit, mesh, low)
    if world.device.type != "meta":
        if drawn is not None:
            load_drawn(dit, chain(drawn, adapters.items()), world.device, names)
        elif source is not None:
            load_full_state(dit, weights | adapters, source, world, names)
    dit.gradient_checkpointing = trained and config.gradient_checkpointing
    dit.selective_checkpointing = config.selective_checkpointing
    dit.attention_backend = backend
    if config.compile:
        dit.compile_blocks(every_size=True)
    return dit


def _drawn_weights(
    config: Config, world: World, role: str, sizes: DiTConfig, source: Path | None
) -> Iterable[tuple[str, Tensor]] | None:
    """The first weights of a network, one after the other; None for those that are in a file."""
    if role == "generator" and config.random_init:
        return empty_dit(sizes).first_weights(config.seed)
    return drawn_weights(sizes, world.device) if source is None else None


def build_generator(config: Config, setup: Setup, world: World) -> WanDiT:
    """The student: from `generator_ckpt`, or from its model folder."""
    sizes, source = _generator_source(config, setup)
    return build_dit(config, world, "generator", sizes, source, trained=True)


def build_causal_teacher(config: Config, setup: Setup, world: World) -> WanDiT:
    """A frozen network with the weights that the student starts from."""
    sizes, source = _generator_source(config, setup)
    return build_dit(config, world, "real_score", sizes, source, trained=False).eval()


def _generator_source(config: Config, setup: Setup) -> tuple[DiTConfig, Path | None]:
    with agreed():
        if setup.folder is None:
            return setup.sizes, None
        if config.generator_ckpt:
            return setup.sizes, find_checkpoint(config.generator_ckpt)
        return setup.sizes, setup.folder.path


def build_score(config: Config, setup: Setup, world: World, role: str, *, trained: bool) -> WanDiT:
    """Teacher (`real_score`) or critic (`fake_score`), from its model folder."""
    name = config.real_name if role == "real_score" else config.fake_name
    with agreed():
        folder = setup.folder
        if folder is not None and name != config.generator_name:
            folder = ModelFolder.find(config.model_root, name)
        sizes = sizes_of(config, name) if folder is None else folder.sizes
    source = None if folder is None else folder.path
    return build_dit(config, world, role, sizes, source, trained=trained)


def sizes_of(config: Config, name: str) -> DiTConfig:
    """Sizes of a network from its folder, or, if it is not here yet, from `configs/models/`."""
    preset = ROOT / "configs" / "models" / f"{name}.json"
    if preset.is_file() and not (ROOT / config.model_root / name).is_dir():
        return DiTConfig.from_dict(json.loads(preset.read_text(encoding="utf-8")))
    return ModelFolder.find(config.model_root, name).sizes


def make_player(
    config: Config, name: str, module: nn.Module, *, critic: bool = False, ema: bool = False
) -> Player:
    """Optimiser and schedule of a trained network (AdamW, as published)."""
    lr = config.lr_critic if critic else config.lr
    betas = (config.beta1_critic, config.beta2_critic) if critic else (config.beta1, config.beta2)
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    decay = config.weight_decay
    return Player(
        name,
        module,
        torch.optim.AdamW(trained.values(), lr=lr, betas=betas, weight_decay=decay, foreach=True),
        learning_rate_schedule(config, lr, critic=critic),
        config.max_grad_norm,
        config.ema_weight if ema and config.ema_weight > 0 else None,
        trained=trained,
        stays_gathered=stays_gathered(config, module),
    )


def stays_gathered(config: Config, module: nn.Module) -> bool:
    """Whether a trained network is whole on every rank while an update is made.

    A function of the config and of sizes alone, for all ranks have to do the same. Planned for
    bf16, unless the config computes in fp32.
    """
    if config.reshard_after_forward != "auto":
        return config.reshard_after_forward == "never"
    size = 4 if config.mixed_precision is False else 2
    return sum(p.numel() for p in module.parameters()) * size <= GATHERED_BYTES


def generator_updates(config: Config, steps: int) -> int:
    """How many of so many steps of a distillation update the generator."""
    return max(0, -(-(steps - config.critic_warmup_steps) // config.dfake_gen_update_ratio))


def learning_rate_schedule(config: Config, lr: float, *, critic: bool) -> Callable[[int], float]:
    """Learning rate of an update: linear warm-up, then constant or a cosine to zero."""
    total = config.max_steps
    if total is not None and config.trainer == "score_distillation" and not critic:
        total = generator_updates(config, total)

    def rate(update: int) -> float:
        warm = min(1.0, (update + 1) / (config.lr_warmup_steps + 1))
        if config.lr_schedule == "constant" or total is None:
            return lr * warm
        return lr * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, update / total)))

    return rate


def build_text(config: Config, setup: Setup, world: World) -> TextSource:
    """Text embeddings for training, from the student's folder or stored ones."""
    dtype = compute_dtype(config, world.device) or torch.float32
    everywhere = config.text_encoder_device == "auto" and not config.text_embeddings
    encoder = None
    if everywhere and world.size > 1:
        encoder = _shared_text_encoder(config, setup, world, dtype)
    with agreed():
        if not config.text_embeddings and world.device.type != "meta":
            files = setup.require_folder()
            files.require(files.text_encoder, files.tokenizer)
        return TextSource(
            setup,
            text_len=setup.sizes.text_len,
            dtype=dtype,
            device=world.device,
            encoder=encoder,
            spread=encoder is not None and strategy_of(config, "text_encoder") != "none",
        )


def _shared_text_encoder(
    config: Config, setup: Setup, world: World, dtype: torch.dtype
) -> WanTextEncoder:
    """The text encoder of the student's folder, of which each rank only ever holds its shards.

    With the strategy `none` that is all of it.
    """
    with agreed():
        files = setup.require_folder()
        files.require(files.text_encoder, files.tokenizer)
        encoder, weights = WanTextEncoder.open_official(
            files.text_encoder, files.tokenizer, text_len=setup.sizes.text_len
        )
    model = encoder.model.to(dtype)
    shard_text(config, world, model)
    load_full_state(model, weights, files.text_encoder, world, encoder.official_names)
    return encoder


def shard_text(config: Config, world: World, model: UMT5EncoderModel) -> None:
    """Spread the text encoder over the ranks, unless its strategy is `none`."""
    strategy = strategy_of(config, "text_encoder")
    if strategy != "none":
        mesh = make_mesh(strategy, world, config.hybrid_shard_size)
        # The table of tokens on its own, so that it does not stay whole after a pass.
        shard_module(model, [model.shared, *model.encoder.block], mesh, None)


def build_trained_vae(config: Config, setup: Setup, world: World) -> Autoencoder:
    """The VAE to train, sharded: from scratch with `random_init`, else the student's folder's."""
    if config.random_init:
        sizes = config.vae
        vae = WanVAE.random(
            sizes.base_dim, dim_mult=sizes.dim_mult, num_res_blocks=sizes.num_res_blocks
        )
        init_autoencoder(vae.model, config.seed)
    else:
        vae = build_vae(setup, world)
    module = Autoencoder(vae.to(world.device).model.requires_grad_(True).train())
    low = compute_dtype(config, world.device)
    if world.size > 1 or low is not None:
        for weight in module.parameters():  # FSDP takes none whose channels lie together
            weight.data = weight.data.contiguous()
        mesh = make_mesh(strategy_of(config, "generator"), world, config.hybrid_shard_size)
        shard_module(module, [], mesh, low)
    return module


def build_vae(setup: Setup, world: World) -> WanVAE:
    """The VAE of the student's folder, whole on every rank."""
    files = setup.folder
    if files is None:
        with torch.device("meta" if world.device.type == "meta" else "cpu"):
            return WanVAE.random(z_dim=setup.sizes.in_dim).to(world.device)
    with agreed():
        files.require(files.vae)
        vae, weights = WanVAE.open_official(files.vae)
    load_full_state(vae.model, weights, files.vae, world, vae.official_names)
    return vae.to(world.device)
