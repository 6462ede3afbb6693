"""A world of so many ranks that are not there: a task runs in it as it is, without memory.

One process stands for rank 0. Networks are sharded by FSDP2 over a process group that sends
nothing; weights, texts and data are tensors on the meta device, which have sizes alone. Kernels are
those of a GPU (or of a CPU, where the config asks for one) as far as they decide what is kept.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp._fully_shard import _fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.testing._internal.distributed import fake_pg  # noqa: F401 - registers the backend "fake"
from transformers import UMT5Config, UMT5EncoderModel

import wan.context
from pipeline.setup import Setup
from pipeline.text import TextSource
from trainer.live_memory import GATHERED, META, ROUNDED, LiveMemory
from trainer.networks import shard_text
from trainer.sharding import World, strategy_of
from utils.config import Config
from utils.devices import computes_in_bf16
from utils.distributed import Ranks
from wan.text_encoder import official_umt5_weights, umt5_config_from_shapes
from wan.weights import read_weights

CACHE, TEXT_ENCODER = "KV cache", "text encoder"
UMT5_XXL = {
    "vocab_size": 256384,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_heads": 64,
    "num_layers": 24,
    "relative_attention_num_buckets": 32,
    "dropout_rate": 0.0,
}
aten = torch.ops.aten


class PlannedWorld(World):
    """Its meshes are of CPUs, since PyTorch has none of the meta device."""

    def mesh(self, shards: int) -> DeviceMesh:
        """See `World`."""
        if shards not in self.meshes:
            sides = (self.size // shards, shards)
            names = ("copies", "shards")
            self.meshes[shards] = init_device_mesh("cpu", sides, mesh_dim_names=names)
        return self.meshes[shards]


def planned_config(config: Config) -> Config:
    """The config with what a device decides said as it is on the device that is planned for.

    That is a GPU, unless the config asks for a CPU. Compiled networks keep less; they are planned
    as if they were not compiled.
    """
    on_cpu = config.device == "cpu"
    mixed, merged = config.mixed_precision, config.merge_clean_pass
    if mixed is None:
        mixed = not on_cpu or computes_in_bf16(torch.device("cpu"))
    return replace(
        config,
        mixed_precision=mixed,
        merge_clean_pass=on_cpu if merged is None else merged,
        attention_backend="auto",
        compile=False,
    )


@contextmanager
def planned_world(config: Config, ranks: int, local: int) -> Iterator[tuple[World, LiveMemory]]:
    """A world of `ranks` ranks, `local` on each node, and what follows its memory."""
    memory = LiveMemory(rounded=1 if config.device == "cpu" else ROUNDED)
    dist.init_process_group("fake", store=dist.HashStore(), rank=0, world_size=ranks)
    try:
        with ExitStack() as patches:
            for owner, name, stand_in in _stand_ins(memory, on_cpu=config.device == "cpu"):
                patches.enter_context(patch.object(owner, name, stand_in, create=name == "meta"))
            patches.enter_context(memory)
            yield PlannedWorld(Ranks(0, ranks, 0), META, local), memory
    finally:
        dist.destroy_process_group()


class PlannedText(TextSource):
    """Embeddings without content, of an encoder without weights.

    They have all tokens; where the encoder is on the training's device it runs.
    """

    def __init__(self, config: Config, setup: Setup, world: World, memory: LiveMemory) -> None:
        dtype = torch.bfloat16 if config.mixed_precision else torch.float32
        here = config.text_encoder_device != "cpu" and not config.text_embeddings
        super().__init__(
            replace(setup, text_embeddings=None),  # what is stored need not be here
            text_len=setup.sizes.text_len,
            dtype=dtype,
            device=META,
            spread=here and world.size > 1 and strategy_of(config, "text_encoder") != "none",
        )
        self._shape = setup.sizes.text_len, setup.sizes.text_dim
        self._model: UMT5EncoderModel | None = None
        if here:
            with torch.device("meta"), memory.making(TEXT_ENCODER):
                model = UMT5EncoderModel(umt5_sizes(setup)).to(dtype).eval().requires_grad_(False)
                model.encoder.embed_tokens = model.shared
                if world.size > 1:
                    shard_text(config, world, model)
            self._model = model

    def _together(self, prompts: Sequence[str]) -> list[Tensor]:
        self._run(len(set(prompts)))
        return [torch.zeros(self._shape, device=META) for _ in prompts]

    def _one(self, prompt: str) -> Tensor:
        if prompt not in self._remembered:
            self._run(1)
            self._remembered[prompt] = torch.zeros(self._shape)
        return self._remembered[prompt]

    def _run(self, rows: int) -> None:
        if self._model is not None:
            ids = torch.zeros(rows, self._shape[0], dtype=torch.int64, device=META)
            with torch.no_grad():
                self._model(input_ids=ids, attention_mask=torch.ones_like(ids))


def umt5_sizes(setup: Setup) -> UMT5Config:
    """Of the text encoder in the model folder; of the published one where there is none yet."""
    file = setup.folder.text_encoder if setup.folder is not None else None
    if file is None or not file.exists():
        return UMT5Config(**UMT5_XXL)
    weights = official_umt5_weights(read_weights(file, "a text encoder"))
    return umt5_config_from_shapes({key: value.shape for key, value in weights.items()}, file)


# --- stand-ins -----------------------------------------------------------------------------------


def _stand_ins(memory: LiveMemory, *, on_cpu: bool) -> Sequence[tuple[Any, str, Any]]:
    """What is replaced meanwhile: owner, name, and what takes its place."""
    cache = Setup.cache

    def made_cache(*args: Any, **given: Any) -> Any:
        with memory.making(CACHE):
            return cache(*args, **given)

    whole = FSDPParam.init_all_gather_outputs

    def made_whole(*args: Any, **given: Any) -> None:
        with memory.making(GATHERED):
            whole(*args, **given)

    def all_gather_object(objects: list[Any], one: Any, *group: Any) -> None:
        objects[:] = [one] * len(objects)

    always = [
        (dist, "all_gather_object", all_gather_object),
        (FSDPParam, "init_all_gather_outputs", made_whole),
        (torch, "meta", _Streams),
        (_fully_shard, "_get_device_from_mesh", lambda mesh: META),
        (FSDPParamGroup, "_validate_no_meta_params", lambda group: None),
        (Setup, "cache", made_cache),
    ]
    if on_cpu:
        return [*always, (F, "scaled_dot_product_attention", _attention_of_cpu)]
    return [
        *always,
        (F, "scaled_dot_product_attention", _attention),
        (F, "rms_norm", _rms_norm),
        (wan.context, "MaskedContext", _Masked),
    ]


class _Streams:
    """What FSDP2 asks of a device."""

    class Stream:
        """Nothing runs, so nothing is awaited."""

        def __init__(self, *args: object, **settings: object) -> None: ...

        def record(self, *_: object) -> "_Streams.Stream":
            """Itself."""
            return self

        record_event = record

        def wait_stream(self, stream: object) -> None:
            """At once."""

        wait_event = wait_stream

    Event = Stream

    @staticmethod
    def current_stream(*_: object) -> "_Streams.Stream":
        """One as good as another."""
        return _Streams.Stream()

    @staticmethod
    def stream(stream: object) -> Any:
        """Nothing changes."""
        return nullcontext()


def _attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Any = None, **settings: Any) -> Tensor:
    """A fused kernel; without a GPU PyTorch would take the path that writes all scores."""
    if attn_mask is not None:  # of the text encoder
        return aten._scaled_dot_product_efficient_attention(q, k, v, attn_mask, True)[0]
    return aten._scaled_dot_product_flash_attention(q, k, v)[0]


def _attention_of_cpu(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Any = None, **settings: Any
) -> Tensor:
    """The same of a CPU."""
    return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=attn_mask)[0]


class _Masked:
    """Stands for `wan.context.MaskedContext`, whose mask is none of numbers on a GPU."""

    steady = True

    def __init__(self, mask: Tensor, positions: Any, grid: Any, head_dim: int, device: Any) -> None:
        turn = wan.context.rotation(positions, grid, head_dim, device)
        self.layer = wan.context.FullLayer(turn)

    def of(self, layer: int) -> wan.context.FullLayer:
        """See `AttentionContext`."""
        return self.layer


def _rms_norm(x: Tensor, shape: Any, weight: Tensor | None = None, eps: Any = None) -> Tensor:
    """One kernel; without a GPU PyTorch would take it apart."""
    if weight is None or not x.is_meta:
        return _real_rms_norm(x, shape, weight, eps)
    return _fused_rms_norm(x, weight)[0]


_real_rms_norm = F.rms_norm


@torch.library.custom_op("planned::rms_norm", mutates_args=())
def _fused_rms_norm(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    raise AssertionError("only ever runs on tensors without memory")


@torch.library.custom_op("planned::rms_norm_backward", mutates_args=())
def _fused_rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    raise AssertionError("only ever runs on tensors without memory")


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[1])


_fused_rms_norm.register_fake(
    lambda x, weight: (torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32))
)
_fused_rms_norm_backward.register_fake(
    lambda grad, x, weight, scale: (torch.empty_like(x), torch.empty_like(weight))
)
_fused_rms_norm.register_autograd(
    lambda ctx, grad, _: _fused_rms_norm_backward(grad, *ctx.saved_tensors), setup_context=_keep
)
