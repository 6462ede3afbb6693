"""The public pipeline: prompts in, video out, as a stream or whole."""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline import inputs
from pipeline.components import (
    ModelFiles,
    block_layout,
    choose_device,
    choose_dtype,
    context_policy,
    memory_report,
    new_cache,
    new_schedule,
    step_rule,
    video_shape,
)
from pipeline.prefix import Frames, Prefix, encode_prefix, image_clip, video_clip
from pipeline.rollout import Rollout
from pipeline.sampling import BlockNoise
from pipeline.stream import LatentStream, PrefixFrames, Stream
from pipeline.text import TextSource
from utils.config import Config, find_file, load_config
from utils.embeddings import pad_batch
from utils.errors import UserError
from utils.noise import CounterNoise, NoiseSource, RecordedNoise
from wan.attention import check_backend
from wan.checkpoints import Network, load_dit, load_dit_config
from wan.dit import WanDiT
from wan.vae import WanVAE

logger = logging.getLogger(__name__)

Noise = NoiseSource | tuple[Tensor, Tensor]


def load_pipeline(
    config: str | Path | Config,
    checkpoint: str | Path | None = None,
    device: str | torch.device | None = None,
    overrides: Sequence[str] = (),
    *,
    use_ema: bool = False,
) -> "VideoPipeline":
    """Load the networks of an experiment file and be ready to generate.

    `checkpoint`: a distilled `.pt` or `.safetensors`; `use_ema` chooses its `generator_ema`.
    Without one the model folder's own weights are used. Text encoder and VAE are loaded when they
    are first needed. Raises UserError for anything wrong with the input.
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
    on = choose_device(device or config.device)
    dtype = choose_dtype(config.dtype, on)
    backend = check_backend(config.attention_backend, on, dtype)
    files = ModelFiles.find(config, config.generator_name)
    source = files.folder if checkpoint is None else find_file(checkpoint, "checkpoint")
    sizes = load_dit_config(files.folder)
    video_shape(config, sizes)
    logger.info(memory_report(config, files, dtype))
    if checkpoint is None and config.distilled:
        logger.warning("no checkpoint given: the weights in %s are not distilled", files.folder)
    network: Network = "generator_ema" if use_ema else "generator"
    dit = load_dit(sizes, source, network=network, device=on, dtype=dtype)
    dit.attention_backend = backend
    if config.compile:
        dit.compile_blocks()
    return VideoPipeline(config, dit, files=files)


class VideoPipeline:
    """A generator with everything around it: text encoder, VAE, noise, schedule.

    Holds no state of any one video: streams are independent of each other.
    """

    def __init__(
        self,
        config: Config,
        dit: WanDiT,
        *,
        files: ModelFiles | None = None,
        vae: WanVAE | None = None,
        text: TextSource | None = None,
    ) -> None:
        """`vae` and the text encoder are loaded from `files` when needed, unless given."""
        self.config = config
        self.dit = dit
        self.files = files
        self.shape = video_shape(config, dit.config)
        self.layout = block_layout(config)
        self.policy = context_policy(config)
        self._vae = vae
        self._text = text or TextSource(
            config,
            files,
            text_len=dit.config.text_len,
            dtype=torch.bfloat16 if dit.dtype == torch.bfloat16 else torch.float32,
            device=self.device,
        )

    @property
    def device(self) -> torch.device:
        """Where the generator runs."""
        return self.dit.device

    @property
    def vae(self) -> WanVAE:
        """The VAE, loaded at its first use, in the dtype of the generator."""
        return self.load_vae()

    def load_vae(self) -> WanVAE:
        """The VAE; an early call keeps its loading out of the time of the first stream."""
        if self._vae is None:
            files = self._require_files()
            self._vae = WanVAE.from_official(files.vae, device=self.device, dtype=self.dit.dtype)
        return self._vae

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
        seed = inputs.seed_of(seed, self.config.seed)
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
    ) -> Tensor:
        """Clean latents `[B, F, C, h, w]`, float32, of text embeddings `[B, L, text_dim]`.

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
        return torch.cat([latents for _, latents in stream], dim=1)

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
    ) -> Stream:
        """A stream of a batch, from text embeddings `[B, L, text_dim]`; see `stream`."""
        inputs.check_prefix(None, None, prefix_frames)
        seed = inputs.seed_of(seed, self.config.seed)
        skipped = 0
        if prefix is not None and prefix_frames == "none":
            skipped = len(prefix.blocks(self.layout))
        latents = self._latent_stream(
            text_embeddings,
            num_latent_frames=num_latent_frames,
            seed=seed,
            samples=samples,
            prefix=prefix,
        )
        return Stream(latents, self.vae.streaming_decoder(), seed=seed, first_emitted_block=skipped)

    # --- inputs ---------------------------------------------------------------------------------

    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Text embeddings `[B, L, text_dim]`, zeros behind each prompt's tokens, L <= text_len."""
        return self._text(inputs.texts(prompts))

    def encode_once(self, prompts: Iterable[str]) -> dict[str, Tensor]:
        """Text embeddings `[1, L, text_dim]` by prompt, on the CPU; the text encoder is then freed.

        The negative prompt of a model that needs one is remembered.
        """
        texts = {prompt: self.encode_prompts([prompt]).cpu() for prompt in prompts}
        if not self.config.distilled:
            self.encode_prompts([self.config.negative_prompt])
        self.free_text_encoder()
        return texts

    def free_text_encoder(self) -> None:
        """Drop the text encoder from memory; it is loaded again when it is needed."""
        self._text.free()

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
            return encode_prefix(video_clip(video, self.layout, self.shape), self.vae)
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
    ) -> LatentStream:
        text_embeddings = self._checked_text(text_embeddings)
        config, batch = self.config, len(text_embeddings)
        seed, num_latent_frames, samples = self._check(seed, num_latent_frames, samples, batch)
        if prefix is not None and not isinstance(prefix, Prefix):
            raise UserError("prefix must be what encode_prefix gave")
        blocks = prefix.blocks(self.layout) if prefix is not None else []
        blocks = [block.expand(batch, -1, -1, -1, -1) for block in blocks]
        schedule = new_schedule(config, self._num_blocks(num_latent_frames, blocks), len(blocks))
        guidance = None if config.distilled else config.sampling_guidance_scale
        if guidance is not None:
            negative = (
                self._negative(batch)
                if negative_embeddings is None
                else self._checked_text(negative_embeddings, "negative_embeddings")
            )
            if len(negative) != batch:
                raise UserError(f"negative_embeddings must be {batch} rows, not {len(negative)}")
            text_embeddings = pad_batch([*text_embeddings, *negative.to(text_embeddings)])
        block_noise = self._block_noise(noise, seed, samples, batch)
        self._say_what_is_dropped(num_latent_frames)
        text = self.dit.encode_text(text_embeddings.to(self.device))
        rollout = Rollout(
            self.dit,
            schedule=schedule,
            layout=self.layout,
            policy=self.policy,
            cache=new_cache(
                config,
                self.dit.config,
                batch=batch if guidance is None else 2 * batch,
                dtype=text.keys[0].dtype,
                device=self.device,
            ),
            grid=self.shape.grid,
            rule=step_rule(config, block_noise, self.device),
            noise=block_noise,
            text=text,
            guidance_scale=guidance,
            context_noise=config.context_noise,
            prefix=blocks,
        )
        return LatentStream(rollout, prefix=blocks, num_latent_frames=num_latent_frames)

    def _check(
        self, seed: int | None, num_latent_frames: int | None, samples: Any, batch: int
    ) -> tuple[int, int | None, list[int]]:
        """Seed, length and samples as plain numbers; UserError where they are none."""
        if num_latent_frames is not None:
            num_latent_frames = inputs.whole_number(num_latent_frames, "num_latent_frames", least=1)
        numbers = inputs.sample_numbers(samples, batch)
        return inputs.seed_of(seed, self.config.seed), num_latent_frames, numbers

    def _checked_text(self, value: Any, name: str = "text_embeddings") -> Tensor:
        sizes = self.dit.config
        return inputs.embeddings(value, sizes.text_dim, sizes.text_len, name)

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

    def _block_noise(
        self,
        noise: Noise | None,
        seed: int | None,
        samples: Sequence[int] | None,
        batch: int,
    ) -> BlockNoise:
        if isinstance(noise, tuple | list):
            initial, renoise = inputs.recorded_noise(
                noise, batch=batch, latent=self.shape.latent, levels=self.config.num_levels
            )
            count = self.layout.blocks_for(initial.shape[1])
            starts = [self.layout.start(block) for block in range(count + 1)]
            if initial.shape[1] != starts[-1]:
                raise UserError(
                    f"the given noise has {initial.shape[1]} latent frames, which is no whole "
                    f"number of blocks; give {starts[-1]}"
                )
            return BlockNoise(RecordedNoise(initial, renoise, starts), range(batch), self.device)
        if noise is None:
            noise = CounterNoise(
                self.config.seed if seed is None else seed,
                self.shape.latent,
                self.layout.block_frames,
                self.layout.frames(0),
            )
        return BlockNoise(noise, samples or [0] * batch, self.device)

    def _negative(self, batch: int) -> Tensor:
        negative = self.encode_prompts([self.config.negative_prompt])
        return negative.expand(batch, -1, -1)

    def _say_what_is_dropped(self, num_latent_frames: int | None) -> None:
        unlimited = self.config.method == "self_forcing" and (
            self.config.model_kwargs.local_attn_size == -1
        )
        limit = self.config.attention_frames
        if unlimited and (num_latent_frames is None or num_latent_frames > limit):
            logger.info("attention holds %d latent frames; older ones drop out of view", limit)

    def _require_files(self) -> ModelFiles:
        if self.files is None:
            raise UserError("this pipeline was built without a model folder; give its parts")
        return self.files
