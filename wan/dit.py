"""The Wan2.1 text-to-video diffusion transformer (arXiv 2503.20314, Sec. 4.2), leaf to root.

One class for teacher, critic and causal student, with the official parameter names. It knows
nothing of caches, masks or absolute time: an attention context decides what queries see.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from utils.errors import UserError
from wan.attention import Backend, attention, chosen_backend
from wan.context import AttentionContext, FullContext, LayerContext, SharedContext
from wan.parallel import Share

MAX_SIZE = 2**20  # of anything in a config.json
GRAPH_OPTIONS: dict[str, str | int | bool | Callable[..., Any]] = {
    # else what a pass reads of the cache comes after what it writes there, and the cache is copied
    "reorder_for_locality": False,
}


@dataclass(frozen=True)
class DiTConfig:
    """Sizes of the network: the official `config.json`. Defaults are those of the official class,
    since the published files leave them out."""

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    in_dim: int = 16
    out_dim: int = 16
    freq_dim: int = 256
    text_dim: int = 4096
    text_len: int = 512
    patch_size: tuple[int, int, int] = (1, 2, 2)
    qk_norm: bool = True
    cross_attn_norm: bool = True
    eps: float = 1e-6
    model_type: str = "t2v"

    @property
    def head_dim(self) -> int:
        """Channels per attention head."""
        return self.dim // self.num_heads

    @classmethod
    def from_dict(
        cls, config: Mapping[str, Any], source: str | Path = "the model's config.json"
    ) -> "DiTConfig":
        """From the official `config.json`; keys that do not size the network are passed over.

        Raises:
            UserError: a size is missing, of a wrong type or impossible; `source` is named.
        """
        names = {field.name for field in fields(cls)}
        known = {key: value for key, value in config.items() if key in names}
        missing = {"dim", "ffn_dim", "num_heads", "num_layers"} - known.keys()
        if missing:
            raise UserError(f"{source} lacks {', '.join(sorted(missing))}")
        if known.get("model_type", "t2v") != "t2v":
            raise UserError(
                f"model_type {known['model_type']} is not supported: use a text-to-video model"
            )
        if config.get("window_size") not in (None, [-1, -1], (-1, -1)):
            raise UserError(
                f"{source} has a window_size, which no causal model here has; remove it"
            )
        for field in fields(cls):
            if field.name in known and not _is_possible(field.name, known[field.name]):
                raise UserError(f"{source} has an impossible {field.name}: {known[field.name]!r}")
        if "patch_size" in known:
            known["patch_size"] = tuple(known["patch_size"])
        sizes = cls(**known)
        if sizes.dim % (2 * sizes.num_heads):
            raise UserError(
                f"{source} has dim {sizes.dim}, which num_heads {sizes.num_heads} does not divide "
                "into even parts"
            )
        if sizes.in_dim != sizes.out_dim:
            raise UserError(
                f"{source} has in_dim {sizes.in_dim} and out_dim {sizes.out_dim}, which a "
                "text-to-video model has equal; use a text-to-video model"
            )
        return sizes


def _is_possible(name: str, value: Any) -> bool:
    """Whether a key of `config.json` can have this value."""
    if name in ("qk_norm", "cross_attn_norm"):
        return isinstance(value, bool)
    if name == "patch_size":
        return (
            isinstance(value, list | tuple)
            and len(value) == 3
            and all([value[0] == 1, *map(_is_size, value)])
        )
    if name == "eps":
        return type(value) in (int, float) and 0 < value < 1
    if name == "freq_dim":
        return _is_size(value) and value % 2 == 0
    return name == "model_type" or _is_size(value)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 < value <= MAX_SIZE


class Modulation(NamedTuple):
    """Shift, scale and gate of one sub-layer: `[B, F, 1, dim]` each (F = 1: same for all)."""

    shift: Tensor
    scale: Tensor
    gate: Tensor

    def apply_to(self, x: Tensor) -> Tensor:
        """`x (1 + scale) + shift` for `x` `[B, F, tokens, dim]`."""
        return torch.addcmul(self.shift, x, 1 + self.scale)

    def gated(self, x: Tensor, update: Tensor) -> Tensor:
        """`x + update gate`, each `[B, F, tokens, dim]`."""
        return torch.addcmul(x, update, self.gate)


class TextContext(NamedTuple):
    """A prompt as the network sees it: every layer's cross-attention keys and values.

    `[B, text_len, heads, head_dim]` each. Made once per prompt by `WanDiT.encode_text`.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]


def timestep_embedding(timesteps: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding `[n] -> [n, dim]`, cosines first, computed in float64."""
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float64, device=timesteps.device) / half
    angles = timesteps.to(torch.float64)[:, None] * 10_000.0**-exponents
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class SelfAttention(nn.Module):
    """Queries, keys and values of one layer; what they attend to is the context's business."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.q = nn.Linear(config.dim, config.dim)
        self.k = nn.Linear(config.dim, config.dim)
        self.v = nn.Linear(config.dim, config.dim)
        self.o = nn.Linear(config.dim, config.dim)
        self.norm_q = _qk_norm(config)
        self.norm_k = _qk_norm(config)

    def split(self, x: Tensor) -> Tensor:
        """Tokens to heads: `[B, L, dim] -> [B, L, heads, head_dim]`."""
        return x.unflatten(-1, (self.num_heads, -1))

    def forward(self, x: Tensor, context: LayerContext, backend: Backend) -> Tensor:
        """`[B, L, dim] -> [B, L, dim]`."""
        q = self.split(self.norm_q(self.q(x)))
        k = self.split(self.norm_k(self.k(x)))
        v = self.split(self.v(x))
        return self.o(context.attend(q, k, v, backend).flatten(2))


class CrossAttention(SelfAttention):
    """Attention of video tokens to the text. Padding is attended to, as published."""

    def encode(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of text `[B, text_len, dim]`."""
        return self.split(self.norm_k(self.k(text))), self.split(self.v(text))

    def forward(  # type: ignore[override]
        self, x: Tensor, keys: Tensor, values: Tensor, backend: Backend
    ) -> Tensor:
        """`[B, L, dim] -> [B, L, dim]`."""
        q = self.split(self.norm_q(self.q(x)))
        return self.o(attention(q, keys, values, backend=backend).flatten(2))


class Block(nn.Module):
    """One transformer block: self-attention, cross-attention, feed-forward."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.self_attn = SelfAttention(config)
        self.norm3 = (
            nn.LayerNorm(config.dim, config.eps) if config.cross_attn_norm else nn.Identity()
        )
        self.cross_attn = CrossAttention(config)
        self.norm2 = nn.LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.ffn = nn.Sequential(
            nn.Linear(config.dim, config.ffn_dim),
            nn.GELU(approximate="tanh"),
            nn.Linear(config.ffn_dim, config.dim),
        )
        self.modulation = _modulation(6, config.dim)

    def encode_text(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """This layer's text keys and values of `[B, text_len, dim]`."""
        return self.cross_attn.encode(text)

    def forward(self, compute: "BlockFunction", *inputs: Any) -> Tensor:
        """`compute(self, *inputs)`: `Block.compute`, or its compiled form.

        What is hooked to the call of a module (FSDP) stays outside of the graph.
        """
        return compute(self, *inputs)

    def compute(
        self,
        x: Tensor,
        time: Tensor,
        text_keys: Tensor,
        text_values: Tensor,
        context: LayerContext,
        backend: Backend,
    ) -> Tensor:
        """`x` `[B, F, tokens, dim]`, `time` `[B, F or 1, 6, dim]` -> like x."""
        parts = (self.modulation + time).unsqueeze(3).unbind(2)  # 6 x [B, F, 1, dim]
        for_attention, for_ffn = Modulation(*parts[:3]), Modulation(*parts[3:])
        frames = x.shape[1]

        attended = self.self_attn(
            for_attention.apply_to(self.norm1(x)).flatten(1, 2), context, backend
        )
        x = for_attention.gated(x, attended.unflatten(1, (frames, -1)))
        read = self.cross_attn(self.norm3(x).flatten(1, 2), text_keys, text_values, backend)
        x = x + read.unflatten(1, (frames, -1))
        return for_ffn.gated(x, self.ffn(for_ffn.apply_to(self.norm2(x))))


BlockFunction = Callable[..., Tensor]
"""`Block.compute`, or its compiled form."""


def _computed_twice(block: Block, *inputs: Any) -> Tensor:
    """`Block.compute`, of which the backward pass computes all again but what attention gave."""
    contexts = partial(create_selective_checkpoint_contexts, _policy)
    return checkpoint(Block.compute, block, *inputs, use_reentrant=False, context_fn=contexts)


def _policy(ctx: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Kernels of attention, of PyTorch or of a package, are the ones whose names say so."""
    name = str(operation)
    if "backward" not in name and ("attention" in name or "flash_attn" in name):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


class Head(nn.Module):
    """Tokens to patches of velocity."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        pt, ph, pw = config.patch_size
        self.norm = nn.LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.head = nn.Linear(config.dim, pt * ph * pw * config.out_dim)
        self.modulation = _modulation(2, config.dim)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """`x` `[B, F, tokens, dim]`, `time` `[B, F or 1, dim]` -> `[B, F, tokens, patch]`."""
        shift, scale = (self.modulation + time[:, :, None]).unsqueeze(3).unbind(2)
        return self.head(self.norm(x) * (1 + scale) + shift)


class WanDiT(nn.Module):
    """Predicts the velocity v = noise - clean of noisy latents, per-frame timesteps.

    Latents are `[B, F, C, H, W]`; timesteps `[B]` or `[B, F]` in [0, 1000].
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        self.attention_backend: Backend = "auto"
        self.gradient_checkpointing = False
        self.selective_checkpointing = False  # of the former: attention is not computed again
        self.share: Share | None = None  # of several ranks that work on the same sequences
        self._graph: BlockFunction | None = None
        self._graph_twice: BlockFunction = _computed_twice
        self._every_size = False
        dim = config.dim
        if config.patch_size[0] != 1:
            raise UserError("patch_size must keep time: its first number has to be 1")
        self.patch_embedding = nn.Conv3d(config.in_dim, dim, config.patch_size, config.patch_size)
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(
            nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.head = Head(config)

    @torch.no_grad()
    def first_weights(self, seed: int) -> Iterator[tuple[str, Tensor]]:
        """Weights to train from scratch, as the official class starts: a pure function of `seed`.

        Xavier-uniform matrices, zero biases, normal (0.02) text and time embeddings, zero head.
        Drawn one after the other, on the CPU, whatever memory this network has; of a name that
        comes twice the second counts.
        """
        generator = torch.Generator().manual_seed(seed)
        names = {parameter: name for name, parameter in self.named_parameters()}

        def made(like: Tensor | None, fill: Callable[..., Any], **how: Any) -> tuple[str, Tensor]:
            assert isinstance(like, nn.Parameter)
            value = torch.empty(like.shape)
            fill(value.flatten(1) if like is self.patch_embedding.weight else value, **how)
            return names[like], value

        xavier = partial(nn.init.xavier_uniform_, generator=generator)
        normal = partial(nn.init.normal_, generator=generator)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                yield made(module.weight, xavier)
                yield made(module.bias, nn.init.zeros_)
            elif isinstance(module, nn.LayerNorm | nn.RMSNorm) and module.weight is not None:
                yield made(module.weight, nn.init.ones_)
                if isinstance(module, nn.LayerNorm):
                    yield made(module.bias, nn.init.zeros_)
        yield made(self.patch_embedding.bias, nn.init.zeros_)
        yield made(self.patch_embedding.weight, xavier)
        for embedding in (self.text_embedding, self.time_embedding):
            for layer in (embedding[0], embedding[2]):
                yield made(cast(nn.Linear, layer).weight, normal, std=0.02)
        scale = self.config.dim**-0.5
        for block in (*self.blocks, self.head):
            yield made(cast(Block | Head, block).modulation, normal, std=scale)
        yield made(self.head.head.weight, nn.init.zeros_)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights, in which the network computes."""
        return self.patch_embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.patch_embedding.weight.device

    def encode_text(self, embeddings: Tensor) -> TextContext:
        """Text MLP and all layers' cross-attention K/V of `[B, L <= text_len, text_dim]`.

        Shorter text is padded with zeros to `text_len`; the padding takes part in attention, as in
        the published model.
        """
        missing = self.config.text_len - embeddings.shape[1]
        if missing < 0:
            raise ValueError(f"text of {embeddings.shape[1]} tokens exceeds {self.config.text_len}")
        padded = F.pad(embeddings, (0, 0, 0, missing)).to(self.dtype)
        text = self.text_embedding(padded)  # [B, text_len, dim]
        pairs = [cast(Block, block).encode_text(text) for block in self.blocks]
        return TextContext(tuple(k for k, _ in pairs), tuple(v for _, v in pairs))

    def compile_blocks(self, *, every_size: bool = False, backend: str = "inductor") -> None:
        """torch.compile the blocks, attention included; all layers share one graph.

        Passes whose context is steady have a graph of exactly their sizes, made when they first
        come; all others run eager, so a stream that ramps up compiles nothing. With `every_size`
        (training, whose rollouts and batches vary) all passes are compiled, for sizes of all kinds.
        """
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        options = GRAPH_OPTIONS if backend == "inductor" else None
        self._graph, self._graph_twice = (
            torch.compile(function, dynamic=every_size, backend=backend, options=options)
            for function in (Block.compute, _computed_twice)
        )
        self._every_size = every_size

    @property
    def is_compiled(self) -> bool:
        """Whether `compile_blocks` was called."""
        return self._graph is not None

    def full_context(self, latents: Tensor) -> FullContext:
        """The context of the bidirectional model for `latents` `[B, F, C, H, W]`."""
        config = self.config
        grid = (latents.shape[3] // config.patch_size[1], latents.shape[4] // config.patch_size[2])
        frames = latents.shape[1]
        return FullContext(frames, grid, config.head_dim, latents.device)

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        text: TextContext,
        context: AttentionContext | None = None,
    ) -> Tensor:
        """Velocity of `latents` `[B, F, C, H, W]`, in the dtype of `latents`.

        `context` defaults to full attention.
        """
        context = context or self.full_context(latents)
        x = self._embed_patches(latents)  # [B, F, h*w, dim]
        if self.share is not None:
            x, context = self.share.tokens_of(x), SharedContext(context, self.share, x.shape[1])
        time = self._embed_time(timesteps)  # [B, F or 1, dim]
        modulation = self.time_projection(time).unflatten(-1, (6, -1))  # [B, F or 1, 6, dim]
        backend = chosen_backend(self.attention_backend, x.device, x.dtype)
        twice = self.gradient_checkpointing and torch.is_grad_enabled()
        selective = twice and self.selective_checkpointing
        compute = self._compute_for(context, selective=selective)
        layers = zip(self.blocks, text.keys, text.values, strict=True)
        for layer, (block, keys, values) in enumerate(layers):
            inputs = (compute, x, modulation, keys, values, context.of(layer), backend)
            if twice and not selective:
                x = checkpoint(block, *inputs, use_reentrant=False)
            else:
                x = block(*inputs)
        patches = self.head(x, time)
        return self._unpatch(self.share.whole(patches) if self.share else patches, latents)

    def _compute_for(self, context: AttentionContext, *, selective: bool) -> BlockFunction:
        if self._graph is not None and (self._every_size or context.steady):
            return self._graph_twice if selective else self._graph
        return _computed_twice if selective else Block.compute

    def _embed_patches(self, latents: Tensor) -> Tensor:
        _, ph, pw = self.config.patch_size
        patches = rearrange(
            latents.to(self.dtype),
            "b f c (h ph) (w pw) -> b f (h w) (c ph pw)",
            ph=ph,
            pw=pw,
        )
        return F.linear(patches, self.patch_embedding.weight.flatten(1), self.patch_embedding.bias)

    def _embed_time(self, timesteps: Tensor) -> Tensor:
        per_frame = timesteps if timesteps.ndim == 2 else timesteps[:, None]  # [B, F or 1]
        waves = timestep_embedding(per_frame.flatten(), self.config.freq_dim)
        return self.time_embedding(waves.to(self.dtype)).unflatten(0, per_frame.shape)

    def _unpatch(self, patches: Tensor, latents: Tensor) -> Tensor:
        _, ph, pw = self.config.patch_size
        flow = rearrange(
            patches,
            "b f (h w) (ph pw c) -> b f c (h ph) (w pw)",
            h=latents.shape[3] // ph,
            ph=ph,
            pw=pw,
        )
        return flow.to(latents.dtype)


def _qk_norm(config: DiTConfig) -> nn.Module:
    return nn.RMSNorm(config.dim, config.eps) if config.qk_norm else nn.Identity()


def _modulation(parts: int, dim: int) -> nn.Parameter:
    """Learned offsets `[1, parts, dim]`, normal with variance 1 / dim."""
    offsets = torch.empty(1, parts, dim)
    if not offsets.is_meta:  # normal draws on the meta device import 70 MB of torch, in seconds
        offsets.normal_(std=dim**-0.5)
    return nn.Parameter(offsets)
