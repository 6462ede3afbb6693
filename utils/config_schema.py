"""Every key of an experiment file, declared once: type, default, bounds, meaning, what it decides.

All else follows from here: the checks, `configs/default_config.yaml`, `docs/config.md`, which keys
make another video of a video, another training of a training, and which may change on the way.
"""

from collections.abc import Callable
from dataclasses import Field, dataclass, field, fields
from typing import Any, Literal

Method = Literal["rolling_forcing", "self_forcing", "infinite_forcing"]
Strategy = Literal["full", "hybrid", "hybrid_full", "none"]
Role = Literal["video", "weights", "course", "rounding"]
# What a publication means by its method. Each value can be overridden on its own.
METHOD_DEFAULTS: dict[str, dict[str, Any]] = {
    "rolling_forcing": {
        "schedule": "rolling",
        "sink_position": "contiguous",
        "clean_pass_sees_sink": False,
        "num_training_frames": 27,
        "rolling_probability": 0.5,
        "model_kwargs": {"sink_size": 3},
    },
    "self_forcing": {
        "schedule": "block",
        "sink_position": "original",
        "clean_pass_sees_sink": True,
        "num_training_frames": 21,
        "rolling_probability": 0.0,
        "model_kwargs": {"sink_size": 0},
    },
    "infinite_forcing": {
        "schedule": "block",
        "sink_position": "contiguous",
        "clean_pass_sees_sink": True,
        "num_training_frames": 21,
        "rolling_probability": 0.0,
        "model_kwargs": {"sink_size": 1},
    },
}
NEGATIVE_PROMPT = (  # of the publications
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"
    "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，"
    "手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)


@dataclass(frozen=True)
class Bounds:
    """Which values of a type are possible; of a list, these are the bounds of its elements.

    Numbers are finite. `also` is one value outside of the bounds that has a meaning of its own.
    `length`: fewest and most elements of a list. `falling`: each element is below the one before.
    """

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    multiple_of: int | None = None
    also: int | None = None
    length: tuple[int, int] | None = None
    falling: bool = False

    @property
    def is_set(self) -> bool:
        """Whether a number can be outside of them."""
        ends = (self.at_least, self.above, self.at_most, self.below, self.multiple_of)
        return any(end is not None for end in ends)

    def allow(self, value: float) -> bool:
        """Whether a number is possible."""
        if self.also is not None and value == self.also:
            return True
        return (
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
            and (self.multiple_of is None or value % self.multiple_of == 0)
        )

    def words(self) -> str:
        """Of numbers, to follow "must be" or to stand alone: "at least 1 and at most 1000"."""
        ends = [
            f"{word} {end}"
            for word, end in (
                ("at least", self.at_least),
                ("above", self.above),
                ("at most", self.at_most),
                ("below", self.below),
            )
            if end is not None
        ]
        text = " and ".join(ends)
        if self.multiple_of is not None:
            text = f"a multiple of {self.multiple_of}, {text}"
        return text if self.also is None else f"{self.also} or {text}"


HEIGHT, WIDTH = 480, 832  # pixels, as published
LATENT_STRIDE = 8  # `image_or_video_shape` of the published files counts latents of this stride

UNBOUNDED = Bounds()
COUNT = Bounds(at_least=1, at_most=10**6)
COUNT_OR_NONE = Bounds(at_least=0, at_most=10**6)
SIZE = Bounds(at_least=1, at_most=16384)
SIDE = Bounds(at_least=16, at_most=16384, multiple_of=16)
STEPS = Bounds(at_least=1, at_most=10**9)
STEPS_OR_NONE = Bounds(at_least=0, at_most=10**9)
SECONDS = Bounds(at_least=1, at_most=10**7)
SHARE = Bounds(at_least=0, at_most=1)
TIMESTEP = Bounds(at_least=0, at_most=1000)
LEVELS = Bounds(at_least=1, at_most=1000)
SHIFT = Bounds(above=0, at_most=1000)
SCALE = Bounds(at_least=0, at_most=1000)
RATE = Bounds(at_least=0, at_most=10)
DECAY = Bounds(at_least=0, below=1)


@dataclass(frozen=True)
class Key:
    """What a field of a configuration means beyond its type.

    `decides`: what a video shows; the weights that a training ends with; a training's course, which
    may differ from one start to the next; the last bits of a video and nothing that can be seen.
    Empty: it is of the machine and its logs alone.
    `section`: heading of the part of the file that begins here. `form`: what a text may be.
    """

    meaning: str
    decides: tuple[Role, ...]
    bounds: Bounds
    section: str
    form: str


def key(
    default: Any,
    meaning: str,
    *decides: Role,
    bounds: Bounds = UNBOUNDED,
    section: str = "",
    form: str = "",
) -> Any:
    """A field of a configuration."""
    metadata = {"key": Key(meaning, decides, bounds, section, form)}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    if isinstance(default, type):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def declared(schema: type) -> dict[str, Key]:
    """The keys of a configuration by name, in order."""
    return {each.name: each.metadata["key"] for each in fields(schema)}


def default_of(each: "Field[Any]") -> Any:
    """A field's default."""
    return each.default_factory() if callable(each.default_factory) else each.default


@dataclass
class ModelKwargs:
    """Options of the student, grouped as in the published files."""

    timestep_shift: float | None = key(
        None, "of the student's levels; null: `timestep_shift`", bounds=SHIFT
    )
    local_attn_size: int = key(
        -1,
        "latent frames in one attention; -1: `max_attention_frames`",
        bounds=Bounds(at_least=1, at_most=10**6, also=-1),
    )
    sink_size: int = key(
        0,
        "first latent frames of the video that stay in view for ever; about half of those in view "
        "are the deep sink of Deep Forcing (arXiv 2512.05081)",
        bounds=COUNT_OR_NONE,
    )


@dataclass
class Sharding:
    """How each network is spread over ranks; null: as `sharding_strategy` says."""

    generator: Strategy | None = key(None, "the student")
    real_score: Strategy | None = key(None, "the teacher")
    fake_score: Strategy | None = key(None, "the critic")
    text_encoder: Strategy | None = key(None, "where `text_encoder_device` is auto")


@dataclass
class Lora:
    """Low-rank adapters instead of full training (arXiv 2106.09685)."""

    rank: int = key(64, "rank of the adapters", bounds=SIZE)
    alpha: int = key(64, "their scale is alpha / rank", bounds=COUNT)
    targets: list[str] = key(
        ["q", "k", "v", "o", "ffn.0", "ffn.2"],
        "names of the layers that get one",
        bounds=Bounds(length=(1, 100)),
    )


@dataclass
class Vae:
    """Sizes of a VAE trained from scratch, and weights of its loss."""

    base_dim: int = key(96, "channels at full resolution", bounds=SIZE)
    dim_mult: list[int] = key(
        [1, 2, 4, 4],
        "times as many at each stage",
        bounds=Bounds(at_least=1, at_most=64, length=(4, 4)),
    )
    num_res_blocks: int = key(
        2, "residual blocks of a stage", bounds=Bounds(at_least=1, at_most=100)
    )
    kl_weight: float = key(1e-6, "of the divergence from the prior", bounds=COUNT_OR_NONE)
    l1_weight: float = key(0.01, "of the absolute error", bounds=COUNT_OR_NONE)
    edge_weight: float = key(1.0, "of the error of edges", bounds=COUNT_OR_NONE)


@dataclass
class Resume:
    """What to do with a run that is there already."""

    force: bool = key(False, "go on although the config differs from the run's")


@dataclass
class Config:
    """Every key of an experiment file; `docs/config.md` lists them all."""

    method: Method | None = key(
        None,
        "stands for values of `schedule`, `sink_position`, `clean_pass_sees_sink`, "
        "`num_training_frames`, `rolling_probability` and `model_kwargs.sink_size`",
        section="method",
    )
    schedule: Literal["rolling", "block", "full"] | None = key(
        None, "full: all frames together, a bidirectional model", "video", "weights"
    )
    sink_position: Literal["contiguous", "original"] = key(
        "contiguous",
        "contiguous: right before the recent frames; original: at its true distance",
        "video",
        "weights",
    )
    clean_pass_sees_sink: bool = key(
        True, "false: the rule of the released Rolling Forcing weights", "video", "weights"
    )
    sink_ema: float | None = key(
        None,
        "weight of the past in an average: frames that a pass no longer sees are averaged into its "
        "sink (EMA-Sink of Reward Forcing, arXiv 2512.04678); null: they are dropped",
        "video",
        "weights",
        bounds=SHARE,
    )
    window_attention: Literal["full", "block_causal"] = key(
        "full",
        "block_causal: a block of a window sees the past, itself and the less noisy blocks before "
        "it alone (the window of Wave Forcing, github.com/SJTU-DENG-Lab/WaveForcing)",
        "video",
        "weights",
    )
    max_attention_frames: int = key(
        21,
        "latent frames in one attention, the pass's own included",
        "video",
        "weights",
        bounds=COUNT,
    )
    num_frame_per_block: int = key(3, "latent frames per block", "video", "weights", bounds=COUNT)
    independent_first_frame: bool = key(
        False, "the first block is a single frame", "video", "weights"
    )
    context_noise: float = key(
        0,
        "timestep of the clean pass, in training rollouts as in inference",
        "video",
        "weights",
        bounds=TIMESTEP,
    )
    model_kwargs: ModelKwargs = key(ModelKwargs, "options of the student", "video", "weights")

    denoising_step_list: list[float] | None = key(
        None,
        "timesteps of a distilled student; null: sample with `sampler`",
        "video",
        "weights",
        section="levels",
        bounds=Bounds(above=0, at_most=1000, length=(1, 1000), falling=True),
    )
    warp_denoising_step: bool = key(
        False, "pass them through the timestep shift", "video", "weights"
    )
    timestep_shift: float = key(
        5.0, "k in s' = k s / (1 + (k - 1) s)", "video", "weights", bounds=SHIFT
    )
    num_train_timestep: int = key(
        1000, "training: timesteps of the scores lie on a grid of so many", "weights", bounds=LEVELS
    )
    step_rule: Literal["renoise", "ode"] | None = key(
        None, "null: renoise for a distilled student, else ode", "video"
    )
    sampler: Literal["unipc", "dpm++", "euler"] = key(
        "unipc", "where there is no `denoising_step_list`", "video"
    )
    sampling_steps: int = key(50, "its number of levels", "video", bounds=LEVELS)
    sampling_guidance_scale: float = key(
        5.0, "g in v_uncond + g (v_cond - v_uncond), same case", "video", bounds=SCALE
    )
    negative_prompt: str = key(NEGATIVE_PROMPT, "what guidance leads away from", "video", "weights")

    model_root: str = key(
        "wan_models", "folder of model folders in the official layout", section="networks"
    )
    generator_name: str = key(
        "Wan2.1-T2V-1.3B", "student; its folder also gives text encoder and VAE", "video", "weights"
    )
    real_name: str = key("Wan2.1-T2V-14B", "teacher (training)", "weights")
    fake_name: str = key("Wan2.1-T2V-1.3B", "critic (training)", "weights")
    generator_ckpt: str | None = key(None, "weights the student starts from (training)", "weights")
    random_init: bool = key(False, "train the student (or the VAE) from scratch", "weights")
    text_embeddings: str | None = key(
        None, "folder of stored text embeddings; skips the text encoder", "video"
    )

    height: int = key(HEIGHT, "pixels", "video", "weights", section="video", bounds=SIDE)
    width: int = key(WIDTH, "pixels", "video", "weights", bounds=SIDE)
    image_or_video_shape: list[int] = key(
        [1, 21, 16, HEIGHT // LATENT_STRIDE, WIDTH // LATENT_STRIDE],
        "scored clip [batch, frames, C, H, W]; sets height and width",
        "weights",
        bounds=Bounds(at_least=1, at_most=16384, length=(5, 5)),
    )
    fps: int = key(16, "frames per second", "video", "weights", bounds=LEVELS)
    num_samples: int = key(1, "videos per prompt", "course", bounds=COUNT)
    seed: int = key(
        0,
        "of all noise and draws",
        "video",
        "weights",
        bounds=Bounds(at_least=0, at_most=2**63 - 1),
    )
    i2v: bool = key(False, "videos start from images", "video")

    device: str = key(
        "auto", "auto: a GPU if there is one", section="machine", form="cpu, cuda, cuda:N, auto"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = key(
        "auto", "of inference; auto: bfloat16 on a GPU, float32 elsewhere", "video"
    )
    vae_dtype: Literal["auto", "float32", "bfloat16"] = key(
        "auto",
        "of decoding; auto: as `dtype`. bfloat16: about 55 dB from float32. Encoding: float32",
        "video",
    )
    vae_device: str = key(
        "auto",
        "auto: where the generator is; on another one a block is decoded while the next is made",
        form="cpu, cuda, cuda:N, auto",
    )
    vae_frugal: bool = key(
        False,
        "decode one latent frame after the other, without a way back: 1.6 GB less, not faster, and "
        "a step that fails ends its stream",
        "rounding",
    )
    linear_dtype: Literal["auto", "float8"] = key(
        "auto",
        "of the matrices of the transformer blocks; auto: as `dtype`. float8: half their memory, "
        "faster from compute capability 8.9 on, not exact (`scripts/quality.py`)",
        "video",
    )
    kv_cache_dtype: Literal["auto", "float8"] = key(
        "auto",
        "of kept keys and values; auto: as `dtype`. float8: half their memory, not exact",
        "video",
    )
    merge_clean_pass: bool | None = key(
        None,
        "a clean pass shares a forward with the window behind it; null: on a CPU, where it is "
        "faster",
        "rounding",
    )
    sequence_parallel: int = key(
        1,
        "ranks of torchrun that make each video together (inference); they divide a latent "
        "frame's tokens and the heads of a layer",
        bounds=Bounds(at_least=1, at_most=1024),
    )
    attention_backend: Literal["auto", "flash3", "cudnn", "flash2", "sdpa"] = key(
        "auto", "kernel of attention; auto: the fastest that is there"
    )
    text_encoder_device: str = key(
        "auto",
        "auto: where the generator is; cpu saves 11 GB of its memory",
        form="cpu, cuda, cuda:N, auto",
    )

    trainer: str = key(
        "score_distillation",
        "DMD, ODE initialisation, flow matching (schedule: full trains a bidirectional network), "
        "consistency distillation of a causal network, the VAE, or a task of another package, such "
        "as shapes:text_encoder",
        "weights",
        form="score_distillation, ode, diffusion, consistency, vae, package:name",
        section="training: objective",
    )
    distribution_loss: Literal["dmd"] = key("dmd", "of score_distillation", "weights")
    denoising_loss_type: Literal["flow"] = key("flow", "of the critic", "weights")
    guidance_scale: float = key(
        3.0, "g in cond + g (cond - uncond) of the teacher", "weights", bounds=SCALE
    )
    ts_schedule: bool = key(
        False, "scores at timesteps above the level where a Self Forcing rollout stops", "weights"
    )
    max_score_timestep: float = key(
        1000.0,
        "scores of teacher and critic at timesteps below this one, of 1000; at lower ones a "
        "teacher sees what a clip looks like, and does not put its own in its place",
        "weights",
        bounds=Bounds(above=0, at_most=1000),
    )
    last_step_only: bool = key(False, "every block goes through all levels", "weights")
    same_step_across_blocks: bool = key(
        True, "false: each block stops at a level of its own (Self Forcing)", "weights"
    )
    same_step_across_videos: bool = key(
        True,
        "false: a level of its own for every video of a batch; all levels that one needs are run "
        "for all",
        "weights",
    )
    scored_clip: Literal["end", "anywhere"] = key(
        "end",
        "end: rollouts of all lengths, their last frames are scored; anywhere: all of the longest "
        "length, the clip lies anywhere in them (LongLive's streaming tuning, arXiv 2509.22622)",
        "weights",
    )
    num_training_frames: int = key(
        21, "longest rollout, latent frames: at least the scored ones", "weights", bounds=COUNT
    )
    rolling_probability: float = key(
        0.0, "share of rollouts that use the rolling schedule", "weights", bounds=SHARE
    )
    true_prefix_probability: float = key(
        0.0,
        "distillation: share of the updates whose rollouts go on from the first block of their "
        "true clips, for which the student gets no gradient; needs latents or videos",
        "weights",
        bounds=SHARE,
    )
    prompt_change_probability: float = key(
        0.0,
        "true clips behind clean frames: share of which the clean frames before a random block are "
        "another clip's, so that a prompt that changes is followed; needs stored latents",
        "weights",
        bounds=SHARE,
    )
    reencode_first_frame: bool = key(
        True, "longer rollouts: the scored clip starts with a re-encoded image", "weights"
    )
    dfake_gen_update_ratio: int = key(
        5, "critic updates per generator update", "weights", bounds=COUNT
    )
    critic_warmup_steps: int = key(
        0,
        "distillation: steps of the critic alone before the generator's first update, so that it "
        "knows the student's videos by then; `ema_start_step` counts from there",
        "weights",
        bounds=STEPS_OR_NONE,
    )
    critic_updates_per_rollout: int = key(
        1,
        "critic updates on one batch and its rollouts, each at new noise levels; at most "
        "`dfake_gen_update_ratio`",
        "weights",
        bounds=COUNT,
    )
    motion_guard_weight: float = key(
        0.0,
        "distillation: weight of the student's error on true clips at its own levels, against loss "
        "of motion (HiAR, arXiv 2603.08703); needs latents or videos",
        "weights",
        bounds=SCALE,
    )
    motion_guard_attention: Literal["full", "windows"] = key(
        "full",
        "full: all frames of a clip, at one level, see each other, as published; windows: as "
        "rollouts see them, behind clean frames",
        "weights",
    )
    teacher_forcing: bool = key(
        False, "diffusion, consistency: look back at clean blocks", "weights"
    )
    diffusion_forcing: bool = key(
        False, "diffusion, consistency: a noise level per block", "weights"
    )
    window_forcing: bool = key(
        False,
        "diffusion, consistency: teacher forcing on the windows and levels of a rollout",
        "weights",
    )
    clean_context_noise: float = key(
        0,
        "teacher, window forcing: highest timestep of the clean blocks",
        "weights",
        bounds=TIMESTEP,
    )
    consistency_steps: int = key(
        48,
        "consistency: steps of the teacher from noise to clean, a multiple of the student's levels "
        "(Causal Forcing++, arXiv 2605.15141)",
        "weights",
        bounds=LEVELS,
    )
    prompt_dropout: float = key(
        0.0, "diffusion: share of clips trained without their prompt", "weights", bounds=SHARE
    )
    weighting_scheme: Literal["bell", "none"] = key(
        "bell", "diffusion: weight of a timestep in the loss, see wan/flow.py; none: 1", "weights"
    )
    vae: Vae = key(Vae, "vae: sizes (with `random_init`) and loss", "weights")

    data_path: str | None = key(
        None,
        "what is trained on",
        "weights",
        section="training: data",
        form="prompts.txt, folder of latents, ODE pairs or videos, shapes:train",
    )
    extended_data_path: str | None = key(None, "longer prompts, line by line", "weights")
    load_raw_video: bool = key(
        False, "the data are videos, to be encoded while training", "weights"
    )
    heldout_data_path: str | None = key(
        None, "data that are measured and never trained on", "course", form="as `data_path`"
    )

    max_steps: int | None = key(
        None,
        "steps in all (critic updates for score_distillation); null: for ever",
        "weights",
        "course",
        section="training: loop",
        bounds=STEPS,
    )
    batch_size: int = key(1, "per GPU and micro-step", "weights", "course", bounds=COUNT)
    global_batch_size: int | None = key(
        None,
        "videos per update; gives the accumulation, before the next two",
        "weights",
        "course",
        bounds=COUNT,
    )
    total_batch_size: int | None = key(
        None, "the same, before the next one", "weights", "course", bounds=COUNT
    )
    gradient_accumulation_steps: int | None = key(
        None, "micro-steps per update", "weights", "course", bounds=COUNT
    )
    recipe_batch_size: int | None = key(
        64, "warn when an update has fewer videos; null: never", "course", bounds=COUNT
    )
    log_iters: int = key(
        100, "steps between checkpoints (the publications' name)", "course", bounds=STEPS
    )
    keep_checkpoints: int = key(2, "resumable states kept", "course", bounds=COUNT)
    keep_exports: int | None = key(
        None, "folders of exported weights kept; null: all", "course", bounds=COUNT
    )
    export_safetensors: bool = key(
        False, "exports hold .safetensors beside the published model.pt", "course"
    )
    sample_every: int = key(
        0, "steps between sample videos; 0: none", "course", bounds=STEPS_OR_NONE
    )
    sample_prompts: list[str] = key(
        [], "of these prompts; []: the first four of the data", "course"
    )
    sample_latent_frames: int = key(21, "their length", "course", bounds=COUNT)
    sample_weights: Literal["ema", "live"] = key(
        "ema", "made with the average, once there is one, or with the weights as they are", "course"
    )
    metrics_every: int = key(
        1, "steps between lines of the log, which are means over these", "course", bounds=STEPS
    )
    heldout_every: int = key(
        0,
        "steps between measurements of the held-out loss; 0: none",
        "course",
        bounds=STEPS_OR_NONE,
    )
    heldout_videos: int = key(
        16, "of so many items, the first ones of `heldout_data_path`", "course", bounds=COUNT
    )
    resume: Resume = key(Resume, "what to do with a run that is there", "course")
    on_nonfinite: Literal["stop", "skip"] = key(
        "stop",
        "where a loss or a gradient is not finite; skip: the update is drawn anew",
        "course",
    )
    max_skips_in_a_row: int = key(3, "with skip, then the training ends", "course", bounds=COUNT)
    max_skips: int = key(30, "the same, of a whole training", "course", bounds=COUNT)

    lr: float = key(2e-6, "learning rate", "weights", section="training: optimisation", bounds=RATE)
    lr_critic: float = key(4e-7, "the critic's", "weights", bounds=RATE)
    lr_schedule: Literal["constant", "cosine"] = key(
        "constant", "cosine: to zero at `max_steps`", "weights"
    )
    lr_warmup_steps: int = key(0, "updates of linear warm-up", "weights", bounds=STEPS_OR_NONE)
    beta1: float = key(0.0, "of AdamW", "weights", bounds=DECAY)
    beta2: float = key(0.999, "of AdamW", "weights", bounds=DECAY)
    beta1_critic: float = key(0.0, "the critic's", "weights", bounds=DECAY)
    beta2_critic: float = key(0.999, "the critic's", "weights", bounds=DECAY)
    weight_decay: float = key(0.01, "of AdamW", "weights", bounds=SCALE)
    max_grad_norm: float = key(
        10.0, "longer gradients are shortened", "weights", bounds=Bounds(above=0, at_most=10**9)
    )
    ema_weight: float = key(
        0.99, "of the past in the average of the weights; 0: none", "weights", bounds=SHARE
    )
    ema_start_step: int = key(
        200, "step at which the average starts", "weights", bounds=STEPS_OR_NONE
    )
    lora: Lora | None = key(
        None, "low-rank adapters instead of full training; null: none", "weights"
    )

    mixed_precision: bool | None = key(
        True,
        "bf16 compute, fp32 master weights and reductions; null: where the device is fast at it",
        "weights",
        section="training: memory and speed",
    )
    gradient_checkpointing: bool = key(True, "compute activations twice instead of keeping them")
    selective_checkpointing: bool = key(
        False, "then, all but the outputs of attention, which are most of the operations"
    )
    replayed_backward: bool = key(
        False,
        "distillation: a rollout's graph is made in the backward pass, one window at a time, so "
        "`num_training_frames` costs no memory; the scored part runs once more",
    )
    reshard_after_forward: Literal["auto", "always", "never"] = key(
        "auto",
        "never: the network that is trained, or makes rollouts, stays gathered until all passes of "
        "the update are made, which takes the memory of its weights in bf16; auto: one of at most "
        "4 GiB does",
    )
    sharding_strategy: Strategy = key(
        "hybrid_full", "hybrid, hybrid_full: full within a node, copies across"
    )
    sharding: Sharding = key(Sharding, "per network; null: `sharding_strategy`")
    hybrid_shard_size: int | None = key(
        None, "ranks per copy; null: those of one node", bounds=COUNT
    )
    compile: bool = key(
        False, "torch.compile the transformer blocks, and on a GPU the decoder of the VAE"
    )
    collective_timeout: int = key(
        600, "seconds that a rank waits for the others before it ends", bounds=SECONDS
    )
    first_step_timeout: int = key(
        3600, "the same while weights are loaded and in the first step", bounds=SECONDS
    )

    wandb_host: str | None = key(None, "server of Weights & Biases", section="training: logs")
    wandb_key: str | None = key(None, "its secret, which is never written down")
    wandb_entity: str | None = key(None, "account")
    wandb_project: str | None = key(None, "null, like the others: no log there")

    @property
    def generator_shift(self) -> float:
        """Timestep shift of the student's levels."""
        shift = self.model_kwargs.timestep_shift
        return self.timestep_shift if shift is None else shift

    @property
    def distilled(self) -> bool:
        """Whether the student is sampled in the few levels it was distilled to."""
        return self.denoising_step_list is not None

    @property
    def num_levels(self) -> int:
        """T: the number of levels of a rollout."""
        return len(self.denoising_step_list) if self.denoising_step_list else self.sampling_steps

    @property
    def attention_frames(self) -> int:
        """Frames in one attention."""
        local = self.model_kwargs.local_attn_size
        return local if local > 0 else self.max_attention_frames


def _names(choose: Callable[[tuple[Role, ...]], bool]) -> frozenset[str]:
    return frozenset(name for name, each in declared(Config).items() if choose(each.decides))


VIDEO_KEYS = _names(lambda decides: "video" in decides)
"""Keys that make a video another one. The machine may move its last bits at most."""
ROUNDING_KEYS = _names(lambda decides: "rounding" in decides)
"""Keys that move the last bits of a video: a record says them, and a replay may have others."""
FREE_KEYS = _names(lambda decides: "course" in decides or "weights" not in decides)
"""Keys that may differ between one start of a training and the next."""
