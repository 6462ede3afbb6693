"""The public pipeline: prompts in, video out, as a stream or whole."""

import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline import inputs
from pipeline.changes import Timeline
from pipeline.memory import memory_report, room_for_videos
from pipeline.prefix import Frames, Prefix, encode_prefix, image_clip, video_clip
from pipeline.records import ModelSource, model_settings
from pipeline.schedule import BlockLayout
from pipeline.setup import Setup
from pipeline.stream import NOT_FINITE, Beginning, LatentStream, PrefixFrames, Stream
from pipeline.teamwork import Teamwork, check_team
from pipeline.text import TextSource, encoder_dtype
from utils.config import Config, check_config, config_of, fingerprint, load_config
from utils.devices import (
    choose_decoding_dtype,
    choose_device,
    choose_dtype,
    release_memory,
)
from utils.errors import UserError
from utils.families import warn_of_other_settings
from utils.noise import NoiseSource, RecordedNoise
from wan.attention import Backend, check_backend
from wan.checkpoints import Network, check_dit, load_dit
from wan.dit import WanDiT
from wan.float8 import check_compiled_float8, use_float8
from wan.folders import find_checkpoint
from wan.geometry import VideoShape
from wan.vae import WanVAE

logger = logging.getLogger(__name__)

SAMPLED_VALUES = 256  # of each tensor, to tell weights from others
OF_NETWORKS = ("generator_name", "model_root", "text_embeddings", "negative_prompt")
"""Of the networks that are loaded, and of what the text encoder was asked."""
OF_A_STREAM = ("merge_clean_pass", "kv_cache_dtype")  # of the machine, but not of networks

Noise = NoiseSource | tuple[Tensor, Tensor]


def load_pipeline(
    config: str | Path | Config,
    checkpoint: str | Path | None = None,
    device: str | torch.device | None = None,
    overrides: Sequence[str] = (),
    *,
    use_ema: bool = False,
    teamwork: Teamwork | None = None,
) -> "VideoPipeline":
    """Load the networks of an experiment file and be ready to generate.

    `checkpoint`: a distilled `.pt` or `.safetensors`; `use_ema` chooses its `generator_ema`.
    Without one the model folder's own weights are used. Text encoder and VAE are loaded when they
    are first needed. `teamwork`: see `load_generator`. Raises UserError for anything wrong with the
    input.
    """
    if not isinstance(config, Config | str | Path):
        raise UserError("config must be the path of an experiment file, or a Config")
    if isinstance(overrides, str):
        raise UserError(f"overrides must be a list: write ['{overrides}']")
    if isinstance(device, torch.device):
        device = str(device)
    if not isinstance(config, Config):
        config = load_config(config, overrides)
    elif overrides:
        raise ValueError("overrides apply to a config file; change the Config instead")
    else:
        check_config(config)  # it may have been changed since it was loaded
    if device is not None:
        config = replace(config, device=device)
    return load_generator(Setup.of(config), checkpoint, use_ema=use_ema, teamwork=teamwork)


@dataclass(frozen=True)
class Checked:
    """Weights of a generator that are there and fit, where they go and how they run."""

    source: Path
    network: Network
    device: torch.device
    dtype: torch.dtype
    backend: Backend


def load_generator(
    setup: Setup,
    checkpoint: str | Path | None = None,
    *,
    use_ema: bool = False,
    teamwork: Teamwork | None = None,
) -> "VideoPipeline":
    """The pipeline of a setup with a model folder; the rest as in `load_pipeline`.

    `teamwork` of the ranks that make each stream together; they load while this one does.
    """
    checked = check_generator(setup, checkpoint, use_ema=use_ema, teamwork=teamwork)
    return load_checked(setup, checked, checkpoint, teamwork=teamwork)


def check_generator(
    setup: Setup,
    checkpoint: str | Path | None = None,
    *,
    use_ema: bool = False,
    teamwork: Teamwork | None = None,
) -> Checked:
    """Everything that can be wrong with a generator and its machine, before it takes memory."""
    folder = setup.require_folder()
    device, dtype, backend = check_machine(setup, teamwork)
    source = folder.path if checkpoint is None else find_checkpoint(checkpoint)
    network: Network = "generator_ema" if use_ema else "generator"
    check_dit(setup.sizes, source, network)
    logger.info(memory_report(setup, dtype))
    if checkpoint is not None:
        warn_of_other_settings(setup.resolved, source)
    elif setup.distilled:
        logger.warning("no checkpoint given: the weights in %s are not distilled", folder.path)
    return Checked(source, network, device, dtype, backend)


def check_machine(
    setup: Setup, teamwork: Teamwork | None
) -> tuple[torch.device, torch.dtype, Backend]:
    """Where a generator runs, in what, with which kernels; UserError for what cannot be."""
    machine = setup.machine
    check_team(setup, teamwork)
    device = choose_device(machine.device)
    dtype = choose_dtype(machine.dtype, device)
    backend = check_backend(machine.attention_backend, device, dtype)
    choose_device(machine.vae_device)
    if machine.compile and machine.kv_cache_dtype == "float8":
        check_compiled_float8(device)
    return device, dtype, backend


def load_checked(
    setup: Setup,
    checked: Checked,
    checkpoint: str | Path | None,
    text: TextSource | None = None,
    *,
    teamwork: Teamwork | None = None,
) -> "VideoPipeline":
    """The pipeline of weights that were checked; `text`: where its embeddings come from."""
    if teamwork is not None and teamwork.leads:
        teamwork.load()
    source, device, dtype = checked.source, checked.device, checked.dtype
    dit = load_dit(setup.sizes, source, network=checked.network, device=device, dtype=dtype)
    own = ModelSource(None if checkpoint is None else source, checked.network == "generator_ema")
    return ready_pipeline(setup, dit, checked.backend, text=text, source=own, teamwork=teamwork)


def ready_pipeline(
    setup: Setup,
    dit: WanDiT,
    backend: Backend,
    *,
    vae: WanVAE | None = None,
    text: TextSource | None = None,
    source: ModelSource | None = None,
    teamwork: Teamwork | None = None,
) -> "VideoPipeline":
    """The pipeline of a generator that has its weights, which is made to run as the setup says."""
    dit.attention_backend = backend
    if setup.machine.linear_dtype == "float8":
        use_float8(dit.blocks)
    pipe = VideoPipeline(setup, dit, vae=vae, text=text, source=source, teamwork=teamwork)
    if setup.machine.compile:
        pipe.compile()
    return pipe


def place_of_vae(
    setup: Setup, device: torch.device, dtype: torch.dtype
) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of the VAE beside a generator that has these."""
    if setup.machine.vae_device == "auto":
        return device, dtype
    own = choose_device(setup.machine.vae_device)
    return own, dtype if own.type == device.type else choose_dtype("auto", own)


def prepared_vae(vae: WanVAE, setup: Setup, dtype: torch.dtype) -> WanVAE:
    """The VAE as the setup wants it to decode beside a generator of this dtype; in place."""
    vae.decode_in(choose_decoding_dtype(setup.machine.vae_dtype, dtype, vae.device))
    vae.frugal = setup.machine.vae_frugal
    if setup.machine.compile and vae.device.type == "cuda":
        together = vae.latents_at_once(*setup.shape.latent[-2:])
        frames = 1 if setup.machine.vae_frugal else min(setup.layout.block_frames, together)
        vae.compile_decoder(frames)
        decoder = vae.streaming_decoder()  # its graph is there before the first stream
        for _ in range(2):
            decoder.decode(torch.zeros(1, frames, *setup.shape.latent, device=vae.device))
    return vae


def text_source(setup: Setup, device: torch.device, dtype: torch.dtype, room: int) -> TextSource:
    """Embeddings for a generator; `room`: see `TextSource`."""
    return TextSource(
        setup,
        text_len=setup.sizes.text_len,
        dtype=encoder_dtype(dtype),
        device=device,
        room=room,
    )


class VideoPipeline:
    """A generator with everything around it: text encoder, VAE, noise, schedule.

    Holds no state of any one video: streams are independent of each other.
    """

    def __init__(
        self,
        setup: Setup,
        dit: WanDiT,
        *,
        vae: WanVAE | None = None,
        text: TextSource | None = None,
        source: ModelSource | None = None,
        teamwork: Teamwork | None = None,
    ) -> None:
        """`vae` and the text encoder are loaded from the setup's folder when needed, unless given.

        `source`: where the generator is from, None for weights that are in no file. `teamwork`: of
        the ranks that make each stream together; None where this one makes them alone.

        Raises UserError for a VAE of other strides than the setup's.
        """
        if vae is not None and vae.strides != setup.shape.strides:
            raise UserError(
                f"the VAE's strides (space, time) are {tuple(vae.strides)}, the setup's "
                f"{tuple(setup.shape.strides)}: make the setup for this VAE"
            )
        self.setup = setup
        self.dit = dit
        self.source = source
        self.teamwork = teamwork
        if teamwork is not None:
            dit.share = teamwork.share
        self._vae = vae
        if text is None:
            room = 0 if setup.folder is None else room_for_videos(setup, dit.dtype)
            text = text_source(setup, self.device, dit.dtype, room)
        self._text = text

    def variant(self, overrides: Sequence[str]) -> "VideoPipeline":
        """The same networks under other settings: `key=value`, such as `model_kwargs.sink_size=0`.

        Raises UserError for a key that there is not, or a value that it cannot have, or that is of
        the networks.
        """
        setup = self.setup.under(config_of(self.setup.resolved, "this pipeline", overrides))
        check_team(setup, self.teamwork)
        own, wish = asdict(self.setup.machine), asdict(setup.machine)
        of_networks = [key for key in own if own[key] != wish[key] and key not in OF_A_STREAM]
        before, now = self.setup.resolved, setup.resolved
        of_networks += [key for key in OF_NETWORKS if before[key] != now[key]]
        if of_networks:
            raise UserError(
                f"{', '.join(of_networks)}: networks that are loaded keep theirs; load them again"
            )
        return VideoPipeline(
            setup,
            self.dit,
            vae=self._vae,
            text=self._text,
            source=self.source,
            teamwork=self.teamwork,
        )

    def compile(self) -> None:
        """Compile the generator for the steady state, and make the graphs of one video's stream.

        All other passes (while a stream ramps up, over a prefix, after a change of scene, at the
        end) run eager. A batch has graphs of its own, made when its steady state begins. Ranks of a
        team make theirs together, as the leader's streams do.
        """
        begin = time.perf_counter()
        self.dit.compile_blocks()
        if self.setup.kind != "full" and (self.teamwork is None or self.teamwork.leads):
            size = self.dit.config
            text = torch.zeros(1, size.text_len, size.text_dim)
            guided = None if self.setup.distilled else text
            self._latent_stream(
                text, num_latent_frames=None, seed=0, negative_embeddings=guided
            ).rehearse()
        logger.info("compiled the generator in %.0f s", time.perf_counter() - begin)

    @property
    def shape(self) -> VideoShape:
        """Geometry of the videos."""
        return self.setup.shape

    @property
    def layout(self) -> BlockLayout:
        """How latent frames fall into blocks."""
        return self.setup.layout

    @property
    def device(self) -> torch.device:
        """Where the generator runs."""
        return self.dit.device

    @property
    def vae(self) -> WanVAE:
        """The VAE, loaded at its first use: it encodes in float32, and decodes in `vae_dtype`.

        It is where the generator is, or on `vae_device`.
        """
        return self.load_vae()

    def load_vae(self) -> WanVAE:
        """The VAE; an early call keeps its loading out of the time of the first stream."""
        if self._vae is None:
            folder = self.setup.require_folder()
            device, dtype = place_of_vae(self.setup, self.device, self.dit.dtype)
            vae = WanVAE.from_official(folder.vae, device=device)  # it encodes in float32
            self._vae = prepared_vae(vae, self.setup, dtype)
        return self._vae

    @cached_property
    def weights_name(self) -> str:
        """16 hex digits that tell these weights, in this dtype, from others: of samples of all."""
        digest = hashlib.sha256()
        for module in (self.dit, self.vae.model):
            for name, value in module.state_dict().items():
                step = max(1, value.numel() // SAMPLED_VALUES)
                sampled = value.flatten()[::step].double().sum().cpu()
                digest.update(f"{name} {value.dtype} {list(value.shape)} {sampled}".encode())
        return digest.hexdigest()[:16]

    @cached_property
    def model_settings(self) -> dict[str, str]:
        """What all its videos depend on (see the function); of weights in no file their name."""
        if self.source is None:
            settings = fingerprint(self.setup.video_settings())
            return {"config_hash": settings, "weights_hash": self.weights_name}
        return model_settings(self.setup, self.source.checkpoint, use_ema=self.source.use_ema)

    # --- whole videos ---------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[str],
        num_latent_frames: int,
        seed: int | None = None,
        *,
        image: Frames | None = None,
        video: Frames | None = None,
    ) -> Tensor:
        """Videos of all prompts in one batch: uint8 `[B, n, H, W, 3]` on the CPU.

        n is the number of video frames of `num_latent_frames` latent frames. Each video equals the
        one its prompt would give alone.
        """
        num_latent_frames = inputs.whole_number(num_latent_frames, "num_latent_frames", least=1)
        seed = inputs.seed_of(seed, self.setup.seed)
        prompts = inputs.texts(prompts)
        prefix = self.encode_prefix(image=image, video=video)
        text = self.encode_prompts(prompts)
        out: Tensor | None = None
        start = 0
        total = self.shape.video_frames(num_latent_frames)
        with self.open_stream(
            text, seed=seed, num_latent_frames=num_latent_frames, prefix=prefix
        ) as stream:
            while (frames := stream.next_batch()) is not None:
                if out is None:
                    out = frames.new_empty(frames.shape[0], total, *frames.shape[2:])
                out[:, start : start + frames.shape[1]] = frames
                start += frames.shape[1]
        assert out is not None
        return out

    def generate_latents(
        self,
        text_embeddings: Tensor,
        num_latent_frames: int,
        noise: Noise | None = None,
        *,
        seed: int | None = None,
        prefix: Prefix | None = None,
        negative_embeddings: Tensor | None = None,
        look: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """Clean latents `[B, F, C, h, w]`, float32, of text embeddings `[B, L, text_dim]`.

        `look` is called behind each window; what it raises ends the work. UserError for latents
        that are not finite, when all of them are made.

        `noise`: a NoiseSource (every row is sample 0), or `(initial [B, F, C, h, w], renoise
        [blocks, T-1, B, f, C, h, w])`; None draws it from `seed` (default: the config's).
        """
        stream = self._latent_stream(
            text_embeddings,
            num_latent_frames=num_latent_frames,
            seed=seed,
            noise=noise,
            prefix=prefix,
            negative_embeddings=negative_embeddings,
        )
        made = []
        while (item := stream.peek(look)) is not None:
            made.append(item[1])
            stream.take()
        latents = torch.cat(made, dim=1)
        if not latents.is_meta and not latents.isfinite().all():  # meta tensors have no values
            raise UserError(f"the model made latents that are not numbers {NOT_FINITE}")
        return latents

    # --- streams --------------------------------------------------------------------------------

    def stream(
        self,
        prompt: str,
        seed: int | None = None,
        num_latent_frames: int | None = None,
        *,
        sample: int = 0,
        image: Frames | None = None,
        video: Frames | None = None,
        prefix_frames: PrefixFrames = "reconstructed",
    ) -> Stream:
        """Stream one video; without `num_latent_frames` it goes on until it is closed.

        `sample` is the index among the videos of this prompt and seed. With `image` or `video`
        (a path, or uint8 frames) the video continues it; `prefix_frames="none"` leaves those
        frames out of what is handed out. `num_latent_frames` counts them.
        """
        self._check(seed, num_latent_frames, [sample], 1)
        inputs.check_prefix(image, video, prefix_frames)
        return self.open_stream(
            self.encode_prompts([prompt]),
            seed=seed,
            num_latent_frames=num_latent_frames,
            samples=[sample],
            prefix=self.encode_prefix(image=image, video=video),
            prefix_frames=prefix_frames,
        )

    def open_stream(
        self,
        text_embeddings: Tensor,
        *,
        seed: int | None = None,
        num_latent_frames: int | None = None,
        samples: Sequence[int] | None = None,
        prefix: Prefix | None = None,
        prefix_frames: PrefixFrames = "reconstructed",
        repeatable: bool = False,
    ) -> Stream:
        """A stream of a batch, from text embeddings `[B, L, text_dim]`; see `stream`.

        `repeatable`: whatever fails within a step, the same step can be tried again. It costs the
        memory of one more block in the cache.
        """
        inputs.check_prefix(None, None, prefix_frames)
        seed = inputs.seed_of(seed, self.setup.seed)
        skipped = 0
        if prefix is not None and prefix_frames == "none":
            skipped = len(prefix.blocks(self.layout))
        latents = self._latent_stream(
            text_embeddings,
            num_latent_frames=num_latent_frames,
            seed=seed,
            samples=samples,
            prefix=prefix,
            recent_frames=self._room_for_another() if repeatable else None,
        )
        return Stream(
            latents,
            self.vae.streaming_decoder(),
            Timeline(self.layout, self.shape),
            seed=seed,
            encode=lambda prompt: self.encode_prompts([prompt]),
            weights=lambda: self.weights_name,
            first_emitted_block=skipped,
        )

    # --- inputs ---------------------------------------------------------------------------------

    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Text embeddings `[B, L, text_dim]`, zeros behind each prompt's tokens, L <= text_len."""
        return self._text(inputs.texts(prompts))

    def encode_once(self, prompts: Iterable[str]) -> dict[str, Tensor]:
        """Text embeddings `[1, L, text_dim]` by prompt, on the CPU; the text encoder is then freed.

        The negative prompt of a model that needs one is remembered. The networks give way
        meanwhile where a GPU would have to hold all of them.
        """
        with self._aside():
            return self._text.encode_once(map(inputs.text_of, prompts))

    def encode_negative(self) -> None:
        """Encode the negative prompt now, if there is one, and not when a stream is opened."""
        if not self.setup.distilled:
            self._text.negative()

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """The networks are on the CPU meanwhile, if the text encoder needs their GPU."""
        device = self.device
        encodes = not self.setup.text_embeddings
        if device.type != "cuda" or not encodes or self._text.place() != device:
            yield
            return
        vae = self._vae if self._vae is not None and self._vae.device == device else None
        try:
            self._move(vae, torch.device("cpu"))
            yield
        finally:
            self._move(vae, device)

    def _move(self, vae: WanVAE | None, device: torch.device) -> None:
        nn.Module.to(self.dit, device)
        if vae is not None:
            vae.to(device)
        release_memory()

    def encode_prefix(
        self, *, image: Frames | None = None, video: Frames | None = None
    ) -> Prefix | None:
        """Latents of an image or a video to continue: a path, PIL, or uint8 `[(n,) H, W, 3]`."""
        inputs.check_prefix(image, video)
        if image is not None:
            image = inputs.image_of(image)
            return encode_prefix(image_clip(image, self.layout, self.shape), self.vae)
        if video is not None:
            video = inputs.video_of(video)
            clip = video_clip(video, self.layout, self.shape, self.setup.fps)
            return encode_prefix(clip, self.vae)
        return None

    # --- the engine's parts ---------------------------------------------------------------------

    @torch.no_grad()
    def _latent_stream(
        self,
        text_embeddings: Tensor,
        *,
        num_latent_frames: int | None,
        seed: int | None,
        noise: Noise | None = None,
        samples: Sequence[int] | None = None,
        prefix: Prefix | None = None,
        negative_embeddings: Tensor | None = None,
        recent_frames: int | None = None,
    ) -> LatentStream:
        text_embeddings = self._checked_text(text_embeddings)
        batch = len(text_embeddings)
        seed, num_latent_frames, samples = self._check(seed, num_latent_frames, samples, batch)
        blocks = [] if prefix is None else self._given_blocks(prefix, batch)
        blocks = [block.to(self.device).expand(batch, -1, -1, -1, -1) for block in blocks]
        negative = None
        if self.setup.guidance_scale is not None:
            negative = (
                self._negative(batch)
                if negative_embeddings is None
                else self._checked_text(negative_embeddings, "negative_embeddings")
            )
            if len(negative) != batch:
                raise UserError(f"negative_embeddings must be {batch} rows, not {len(negative)}")
        self._say_what_is_dropped(num_latent_frames)
        num_blocks = self._num_blocks(num_latent_frames, blocks)
        begin = Beginning(
            text_embeddings,
            negative,
            self._noise_source(noise, seed, batch, num_blocks),
            tuple(range(batch) if isinstance(noise, tuple | list) else samples),
            tuple(blocks),
            num_latent_frames,
            num_blocks,
            recent_frames,
        )
        if self.teamwork is not None:
            return self.teamwork.led(self.setup, self.dit, begin)
        return LatentStream.open(self.setup, self.dit, begin)

    def _given_blocks(self, prefix: Any, batch: int) -> list[Tensor]:
        """The blocks of a prefix; UserError for one that is not of this model and batch."""
        if not isinstance(prefix, Prefix):
            raise UserError("prefix must be what encode_prefix gave")
        latents = inputs.tensor_of(prefix.latents, "the prefix", meta=self.device.type == "meta")
        shape = list(latents.shape)
        rows_fit = latents.ndim == 5 and shape[0] in (1, batch)
        if not rows_fit or tuple(shape[2:]) != self.shape.latent:
            wanted = f"[1 or {batch}, F, {', '.join(map(str, self.shape.latent))}]"
            raise UserError(f"the latents of the prefix must be {wanted}, not {shape}")
        self.layout.require_full_blocks(shape[1])
        return prefix.blocks(self.layout)

    def _room_for_another(self) -> int:
        """Recent frames of a cache whose clean passes overwrite nothing that they read."""
        block = self.layout.block_frames
        return self.setup.policy.recent_capacity(block) + block

    def _check(
        self, seed: int | None, num_latent_frames: int | None, samples: Any, batch: int
    ) -> tuple[int, int | None, list[int]]:
        """Seed, length and samples as plain numbers; UserError where they are none."""
        if num_latent_frames is not None:
            num_latent_frames = inputs.whole_number(num_latent_frames, "num_latent_frames", least=1)
        numbers = inputs.sample_numbers(samples, batch)
        return inputs.seed_of(seed, self.setup.seed), num_latent_frames, numbers

    def _checked_text(self, value: Any, name: str = "text_embeddings") -> Tensor:
        return inputs.embeddings(value, self.dit.config, name, meta=self.device.type == "meta")

    def _num_blocks(self, num_latent_frames: int | None, prefix: Sequence[Tensor]) -> int | None:
        if num_latent_frames is None:
            return None
        given = self.layout.start(len(prefix))
        if num_latent_frames <= given and prefix:
            raise UserError(
                f"the image or video to continue fills {given} latent frames already; "
                f"ask for more than {num_latent_frames}"
            )
        return self.layout.blocks_for(num_latent_frames)

    def _noise_source(
        self, noise: Noise | None, seed: int | None, batch: int, num_blocks: int | None
    ) -> NoiseSource:
        if isinstance(noise, tuple | list):
            blocks = num_blocks or 0
            again = self.setup.levels.num - 1 + (self.setup.context_noise > 0)
            initial, renoise = inputs.recorded_noise(
                noise,
                batch=batch,
                latent=self.shape.latent,
                levels=again,
                blocks=blocks,
                block_frames=self.layout.block_frames,
            )
            count = self.layout.blocks_for(initial.shape[1])
            starts = [self.layout.start(block) for block in range(count + 1)]
            if initial.shape[1] != starts[-1]:
                raise UserError(
                    f"the given noise has {initial.shape[1]} latent frames, which is no whole "
                    f"number of blocks; give {starts[-1]}"
                )
            if count < blocks:
                raise UserError(
                    f"the given noise has {starts[-1]} latent frames, "
                    f"but {self.layout.start(blocks)} are needed"
                )
            return RecordedNoise(initial.cpu(), renoise.cpu(), starts)
        return self.setup.counter_noise(seed) if noise is None else noise

    def _negative(self, batch: int) -> Tensor:
        return self._text.negative().expand(batch, -1, -1)

    def _say_what_is_dropped(self, num_latent_frames: int | None) -> None:
        limit = self.setup.policy.max_frames
        longer = num_latent_frames is None or num_latent_frames > limit
        if self.setup.says_what_drops and longer:
            logger.info("attention holds %d latent frames; older ones drop out of view", limit)
