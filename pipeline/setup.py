"""The one door of configuration: a `Config` goes in, a frozen `Setup` of plain parts comes out.

Below it nobody sees a `Config`. What a video is made of (geometry, blocks, policy, levels, step
rule, guidance, files) is decided here and nowhere else, and caches and rollouts are built here
alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pipeline.passes import Plan
from pipeline.rollout import Rollout
from pipeline.sampling import BlockNoise, OdeStep, Renoise, Sampler, StepRule
from pipeline.schedule import BlockLayout, Schedule, ScheduleKind
from utils.config import VIDEO_KEYS, Config, to_dict
from utils.devices import choose_device, choose_merging, computed_dtype
from utils.errors import UserError
from utils.noise import CounterNoise
from wan.dit import DiTConfig, TextContext, WanDiT
from wan.flow import denoising_timesteps
from wan.folders import ModelFolder
from wan.geometry import WAN_STRIDES, Strides, VideoShape
from wan.kv_cache import ContextPolicy, KVCache
from wan.parallel import Share, check_shares


@dataclass(frozen=True)
class Levels:
    """The levels of a rollout, and how a block goes from one to the next.

    `timesteps`: of a distilled student, `[T]` falling; None where `sampler` takes `num` steps.
    """

    num: int
    timesteps: tuple[float, ...] | None
    rule: str | None
    sampler: Sampler
    shift: float

    def step_rule(self, noise: BlockNoise) -> StepRule:
        """How blocks move between levels; by default what the weights are made for."""
        if self.timesteps is None:
            ode = OdeStep.with_steps(self.sampler, self.num, self.shift)
            return Renoise(ode.timesteps, noise) if self.rule == "renoise" else ode
        if self.rule == "ode":
            return OdeStep.at(self.tensor())
        return Renoise(self.tensor(), noise)

    def tensor(self) -> Tensor:
        """Timesteps of a distilled student: `[T]`, float32, on the CPU."""
        assert self.timesteps is not None, "this model is not distilled"
        return torch.tensor(self.timesteps)


@dataclass(frozen=True)
class Machine:
    """Where and how the networks run, as it was asked for (see `utils.devices`)."""

    device: str
    dtype: str
    attention_backend: str
    text_encoder_device: str
    compile: bool
    vae_dtype: str
    vae_device: str
    vae_frugal: bool
    merge_clean_pass: bool | None
    sequence_parallel: int
    linear_dtype: str
    kv_cache_dtype: str


@dataclass(frozen=True)
class Setup:
    """All that a config says of making video.

    `resolved`: the config as plain values, to be kept beside what it made.
    `folder`: the model folder; None for networks that are given.
    `sizes`: of the generator. `kind`: of the schedule.
    `guidance_scale` g: v_uncond + g (v_cond - v_uncond); None for a distilled student.
    `says_what_drops`: whether a video longer than one attention surprises (see `ContextPolicy`).
    """

    resolved: Mapping[str, Any]
    folder: ModelFolder | None
    sizes: DiTConfig
    shape: VideoShape
    layout: BlockLayout
    policy: ContextPolicy
    kind: ScheduleKind
    levels: Levels
    guidance_scale: float | None
    negative_prompt: str
    context_noise: float
    seed: int
    fps: int
    text_embeddings: str | None
    says_what_drops: bool
    machine: Machine

    @classmethod
    def of(
        cls,
        config: Config,
        *,
        folder: ModelFolder | None = None,
        sizes: DiTConfig | None = None,
        strides: Strides | None = None,
    ) -> "Setup":
        """What `config` means.

        Sizes and the VAE's strides are read from the model folder `generator_name`, unless given:
        with `sizes` no folder is looked for. Raises UserError for a resolution that the model
        cannot have, or a folder that is not there.
        """
        if folder is None and sizes is None:
            folder = ModelFolder.find(config.model_root, config.generator_name)
        if sizes is None:
            assert folder is not None
            sizes = folder.sizes
        if strides is None:
            strides = WAN_STRIDES if folder is None else folder.strides
        shape = VideoShape(
            config.height, config.width, sizes.in_dim, strides, patch_size=sizes.patch_size
        )
        check_shares(
            config.sequence_parallel,
            tokens_per_frame=shape.tokens_per_frame,
            num_heads=sizes.num_heads,
        )
        steps = config.denoising_step_list
        warp, shift = config.warp_denoising_step, config.generator_shift
        return cls(
            resolved=to_dict(config),
            folder=folder,
            sizes=sizes,
            shape=shape,
            layout=BlockLayout(config.num_frame_per_block, config.independent_first_frame),
            policy=ContextPolicy(
                config.model_kwargs.sink_size,
                config.attention_frames,
                config.sink_position,
                config.clean_pass_sees_sink,
                config.window_attention,
                config.sink_ema,
            ),
            kind=config.schedule or "block",
            levels=Levels(
                num=config.num_levels,
                timesteps=tuple(denoising_timesteps(steps, shift, warp=warp).tolist())
                if steps
                else None,
                rule=config.step_rule,
                sampler=config.sampler,
                shift=shift,
            ),
            guidance_scale=None if config.distilled else config.sampling_guidance_scale,
            negative_prompt=config.negative_prompt,
            context_noise=config.context_noise,
            seed=config.seed,
            fps=config.fps,
            text_embeddings=config.text_embeddings,
            says_what_drops=config.method == "self_forcing"
            and config.model_kwargs.local_attn_size == -1,
            machine=Machine(
                config.device,
                config.dtype,
                config.attention_backend,
                config.text_encoder_device,
                config.compile,
                config.vae_dtype,
                config.vae_device,
                config.vae_frugal,
                config.merge_clean_pass,
                config.sequence_parallel,
                config.linear_dtype,
                config.kv_cache_dtype,
            ),
        )

    def under(self, config: Config) -> "Setup":
        """What another config means for the same networks."""
        return Setup.of(config, folder=self.folder, sizes=self.sizes, strides=self.shape.strides)

    @property
    def distilled(self) -> bool:
        """Whether the generator is sampled in the few levels it was distilled to."""
        return self.levels.timesteps is not None

    @property
    def merges_clean_pass(self) -> bool:
        """Whether a clean pass shares a forward with the window behind it."""
        return choose_merging(self.machine.merge_clean_pass, choose_device(self.machine.device))

    def video_settings(self) -> dict[str, Any]:
        """See the function."""
        return video_settings(self.resolved)

    def bidirectional(self) -> "Setup":
        """The same videos, all blocks together in full attention."""
        return replace(self, kind="full")

    def block_video_frames(self, block: int) -> int:
        """Video frames of one block, in a video that is decoded from its start."""
        before, after = (self.layout.start(number) for number in (block, block + 1))
        return self.shape.video_frames(after) - self.shape.video_frames(before)

    def require_folder(self) -> ModelFolder:
        """The model folder; UserError where networks were given instead."""
        if self.folder is None:
            raise UserError("this pipeline was built without a model folder; give it its parts")
        return self.folder

    def counter_noise(self, seed: int | None = None) -> CounterNoise:
        """The noise of a seed, by default the config's."""
        return CounterNoise(
            self.seed if seed is None else seed,
            self.shape.latent,
            self.layout.block_frames,
            self.layout.frames(0),
        )

    def schedule(
        self,
        num_blocks: int | None,
        first_block: int = 0,
        *,
        kind: ScheduleKind | None = None,
        block_levels: tuple[int, ...] | None = None,
    ) -> Schedule:
        """The sequence of windows; UserError where it cannot be unbounded."""
        kind = kind or self.kind
        if kind == "full" and num_blocks is None:
            raise UserError(
                "a bidirectional model needs a number of frames: it cannot stream for ever"
            )
        if kind == "full" and first_block:
            raise UserError("a bidirectional model cannot continue an image or a video")
        return Schedule(kind, self.levels.num, num_blocks, first_block, block_levels)

    def plan(self, schedule: Schedule) -> Plan:
        """The passes of a schedule."""
        return Plan(schedule, self.layout, self.policy, merged=self.merges_clean_pass)

    def cache(
        self,
        sizes: DiTConfig,
        *,
        batch: int,
        dtype: torch.dtype,
        device: torch.device,
        recent_frames: int | None = None,
        evicts: bool = True,
        share: Share | None = None,
    ) -> KVCache:
        """An empty cache for `batch` videos of a network.

        `recent_frames` defaults to what the policy reads; more are kept if it is more. When frames
        go into an averaged sink does not depend on it, unless they are all kept (not `evicts`).
        `share`: of the ranks that make the videos together.
        """
        block = self.layout.block_frames
        sink, least, recent = 0, 0, 0
        if self.kind != "full":
            sink, least = self.policy.sink_frames, self.policy.stored_capacity(block)
            recent = max(recent_frames or 0, least)
        return KVCache(
            num_layers=sizes.num_layers,
            num_heads=sizes.num_heads,
            head_dim=sizes.head_dim,
            tokens_per_frame=self.shape.tokens_per_frame,
            latent=self.shape.latent,
            sink_frames=sink,
            recent_frames=recent,
            batch=batch,
            dtype=dtype,
            device=device,
            share=share,
            in_float8=self.machine.kv_cache_dtype == "float8",
            sink_ema=self.policy.sink_ema,
            sink_lag=(least if evicts else recent) - block,
        )

    def rollout(
        self,
        dit: WanDiT,
        schedule: Schedule,
        *,
        text: TextContext,
        noise: BlockNoise,
        rule: StepRule | None = None,
        guidance_scale: float | None = None,
        recent_frames: int | None = None,
        evicts: bool = True,
        prefix: Sequence[Tensor] = (),
    ) -> Rollout:
        """A rollout at its start, with a cache of its own.

        `rule` defaults to that of `levels`; `recent_frames`, `evicts`: see `cache`; the rest: see
        `Rollout`.
        """
        keys = text.keys[0]
        rows = len(noise.samples) if guidance_scale is None else 2 * len(noise.samples)
        return Rollout(
            dit,
            self.plan(schedule),
            cache=self.cache(
                dit.config,
                batch=rows,
                dtype=keys.dtype,
                device=keys.device,
                recent_frames=recent_frames,
                evicts=evicts,
                share=dit.share,
            ),
            grid=self.shape.grid,
            rule=rule or self.levels.step_rule(noise),
            noise=noise,
            text=text,
            guidance_scale=guidance_scale,
            context_noise=self.context_noise,
            prefix=prefix,
        )


def video_settings(resolved: Mapping[str, Any]) -> dict[str, Any]:
    """Of a config as plain values, those that all videos depend on but the seed, which each has.

    `dtype` is the one that is computed in: `auto` is another one on another machine.
    """
    values = {name: value for name, value in resolved.items() if name in VIDEO_KEYS}
    del values["seed"]
    return {**values, "dtype": str(computed_dtype(resolved["dtype"], resolved["device"]))}
