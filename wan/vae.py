"""The Wan2.1 video VAE: its files, its latents, and decoding a stream block by block.

Owns the weights, a diffusers `AutoencoderKLWan`, and what surrounds them: the official key names
and sizes, the latent statistics, and the features of the causal convolutions that a stream carries
from one latent frame to the next. What is computed is in `wan/vae_layers.py`. With mu the mean of
the encoder's distribution, and m, s the statistics per channel,

    latent = (mu - m) / s,        mu = latent * s + m.

Video is [B, F, 3, H, W] in [-1, 1], latents are [B, f, C, h, w]. The first latent frame is one
video frame, every later one is `temporal_stride` video frames.

Weights of any size load by the same code: sizes are read from tensor shapes. Inside, everything
speaks the official key names; diffusers' names are translated at the border (`official_vae_key`).
"""

import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from einops import rearrange
from torch import Tensor, nn

from utils.devices import to_device
from utils.errors import UserError
from wan.geometry import Strides
from wan.vae_layers import (
    Features,
    decode_clip,
    encode_clip,
    past_channels,
    put_channels_together,
)
from wan.weights import Shapes, StateDict, assign_weights, read_json, read_weights, save_weights

DecodeClip = Callable[[AutoencoderKLWan, Tensor, Features | None], tuple[Tensor, Features]]


def encode_moments(model: AutoencoderKLWan, video: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log-variance `[B, f, C, h, w]` of the latents of video `[B, F, 3, H, W]`.

    Not normalised; with gradient, if it is enabled. Pixels in uint8 become floats on the model's
    device clip by clip, so a long video is never whole in memory as such.
    """
    x = rearrange(video, "b f c h w -> b c f h w")
    past: Features | None = None
    moments = []  # [B, 2C, 1, h, w] each
    for clip in _clips(x, model.config["scale_factor_temporal"], start=True):
        made, past = encode_clip(model, _floats(clip, model), past)
        moments.append(made)
    mean, log_variance = torch.cat(moments, dim=2).chunk(2, dim=1)
    return mean.transpose(1, 2), log_variance.transpose(1, 2)


def decode_moments(
    model: AutoencoderKLWan,
    latents: Tensor,
    past: Features | None = None,
    *,
    pixels_at_once: int = 0,
    decode: DecodeClip = decode_clip,
) -> tuple[Tensor, Features]:
    """Video `[B, n, 3, H, W]` of latents `[B, f, C, h, w]` that are not normalised; not clamped.

    One latent frame after the other, or as many in one call of `decode` as have at most
    `pixels_at_once` latent pixels; the first of a video always alone. `past` is what the
    convolutions saw before, the second result what they saw now. None starts a video. With
    gradient, if it is enabled.
    """
    at_once = max(1, pixels_at_once // (latents.shape[-2] * latents.shape[-1]))
    x = rearrange(latents, "b f c h w -> b c f h w")
    frames = []  # [B, 3, n, H, W] each
    for clip in _clips(x, at_once, start=past is None):
        video, past = decode(model, clip, past)
        frames.append(video)
    assert past is not None
    return rearrange(torch.cat(frames, dim=2), "b c n h w -> b n c h w"), past


PIXELS_ON_CPU = 256
"""A block of 64x64 pixels. More at once do not fit the cache of a CPU, and take longer."""

PIXELS_ON_GPU = 20_000
"""A block of 832x480 pixels. With the published sizes its decoding makes 4.3 GiB in bfloat16, 2.6
with one latent frame after the other; larger videos are decoded with fewer latents at once."""


class WanVAE:
    """A Wan2.1 VAE for inference: video to normalised latents and back, without gradient.

    `model` is the diffusers module that holds the weights; code that trains a VAE uses it directly.
    `pixels_at_once`: see `decode_moments`; None leaves it to the device (`PIXELS_ON_GPU`).
    `frugal`: streams decode one latent frame after the other and keep nothing to go back to, which
    takes less memory; an error within a block closes their decoder.
    """

    def __init__(self, model: AutoencoderKLWan) -> None:
        self.model = model
        self.pixels_at_once: int | None = None
        self.frugal = False
        self.latents_mean = torch.tensor(model.config["latents_mean"])  # [C]
        self.latents_std = torch.tensor(model.config["latents_std"])  # [C]
        self._statistics = self.latents_mean.view(-1, 1, 1), self.latents_std.view(-1, 1, 1)
        self._compiled: tuple[int, DecodeClip] | None = None  # for clips of so many latent frames
        self._lay_out()

    @classmethod
    def from_official(
        cls,
        path: str | Path,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """Load `Wan2.1_VAE.pth`, a `.safetensors` file, or a diffusers folder `vae/`.

        Key names may be the official ones or diffusers'. The statistics of the latents are the
        official ones, unless a folder's `config.json` states its own.

        Raises:
            UserError: the file does not exist or does not hold a Wan2.1 VAE.
        """
        vae, weights = cls.open_official(path)
        names = vae.official_names
        assign_weights(vae.model, weights, path, names=names, device=device, dtype=dtype)
        return cls(vae.model)

    @classmethod
    def open_official(cls, path: str | Path) -> tuple[Self, StateDict]:
        """A VAE without memory, and the (memory-mapped) weights for it, by official names.

        Raises:
            UserError: as `from_official`, but for weights that do not fit.
        """
        weights = official_vae_weights(read_weights(path, "a VAE"))
        config = vae_config_from_shapes({key: value.shape for key, value in weights.items()}, path)
        config |= _recorded_statistics(Path(path), config["z_dim"])
        with torch.device("meta"):
            model = AutoencoderKLWan(**config)
        return cls(model.eval().requires_grad_(False)), weights

    @classmethod
    def random(
        cls,
        base_dim: int = 96,
        z_dim: int = 16,
        dim_mult: Sequence[int] = (1, 2, 4, 4),
        num_res_blocks: int = 2,
        temporal_downsample: Sequence[bool] = (False, True, True),
        seed: int = 0,
    ) -> Self:
        """Make an untrained VAE whose weights depend on `seed` alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoencoderKLWan(
                base_dim=base_dim,
                z_dim=z_dim,
                dim_mult=list(dim_mult),
                num_res_blocks=num_res_blocks,
                temperal_downsample=list(temporal_downsample),
                **_derived_config(z_dim, temporal_downsample),
            )
        return cls(model.eval())

    @classmethod
    def like(cls, model: AutoencoderKLWan, weights: Mapping[str, Tensor]) -> Self:
        """A copy of a model's architecture with other weights (diffusers' key names)."""
        with torch.device("meta"):
            copy = AutoencoderKLWan.from_config(model.config)
        copy.load_state_dict({k: v.detach().clone() for k, v in weights.items()}, assign=True)
        return cls(copy.eval().requires_grad_(False))

    @property
    def official_names(self) -> dict[str, str]:
        """Of every name in the model's state the official one."""
        blocks = self.model.config["num_res_blocks"]
        return {key: official_vae_key(key, blocks) for key in self.model.state_dict()}

    @property
    def spatial_stride(self) -> int:
        """Pixels per latent pixel along height and along width."""
        return self.model.config["scale_factor_spatial"]

    @property
    def temporal_stride(self) -> int:
        """Video frames per latent frame, except for the first, which is one video frame."""
        return self.model.config["scale_factor_temporal"]

    @property
    def strides(self) -> Strides:
        """Both strides."""
        return Strides(self.spatial_stride, self.temporal_stride)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the encoder's weights and of encoded latents."""
        return self.model.quant_conv.weight.dtype

    @property
    def decoded_dtype(self) -> torch.dtype:
        """Type of the decoder's weights and of decoded video."""
        return self.model.post_quant_conv.weight.dtype

    def decode_in(self, dtype: torch.dtype) -> Self:
        """Convert what decodes; what encodes stays as it is.

        In bfloat16 instead of float32 video is about 55 dB from it, with the shipped weights.
        """
        for part in (self.model.post_quant_conv, self.model.decoder):
            nn.Module.to(part, dtype)
        return self

    @property
    def device(self) -> torch.device:
        """Where the weights are, and where results appear."""
        return self.model.device

    def to(self, device: str | torch.device) -> Self:
        """Move the weights."""
        nn.Module.to(self.model, device)
        self._lay_out()
        return self

    def compile_decoder(self, frames: int, *, backend: str = "inductor") -> Self:
        """Compile the decoder for clips of `frames` latent frames that have a past; in place.

        These are the steady calls of a stream whose blocks have so many, as far as
        `pixels_at_once` lets them through together. It is one static graph; clips of other sizes
        are decoded eagerly. cuDNN then measures which of its kernels is fastest here.
        """
        self._compiled = frames, torch.compile(decode_clip, dynamic=False, backend=backend)
        return self

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Encode video [B, F, 3, H, W] in [-1, 1], or uint8, to normalised latents [B, f, C, h, w].

        F = 1 + temporal_stride * (f - 1); H and W are multiples of `spatial_stride`.

        Raises:
            ValueError: F, H or W is another number.
        """
        frames, height, width = video.shape[1], *video.shape[-2:]
        fills_space = height % self.spatial_stride == width % self.spatial_stride == 0
        if frames < 1 or (frames - 1) % self.temporal_stride or not fills_space:
            raise ValueError(
                f"the VAE encodes 1 + {self.temporal_stride}k frames with sides divisible by "
                f"{self.spatial_stride}, got {frames} frames of {height}x{width}"
            )
        if video.is_floating_point():
            video = video.to(self.device, self.dtype)
        mu, _ = encode_moments(self.model, video)
        mean, std = self.statistics()
        return ((mu.float() - mean) / std).to(self.dtype)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents [B, f, C, h, w] to video [B, 1 + temporal_stride * (f - 1), 3, H, W].

        The video is clamped to [-1, 1].
        """
        stream = self.streaming_decoder()
        video = stream.decode(latents)
        stream.close()
        return video

    def decode_last(self, latents: Tensor) -> Tensor:
        """The last frame of what `decode` gives, [B, 1, 3, H, W], in the memory of a few frames."""
        stream = self.streaming_decoder()
        frames = self.latents_at_once(*latents.shape[-2:])
        for clip in (latents[:, :1], *latents[:, 1:].split(frames, dim=1)):
            if clip.shape[1]:
                video = stream.decode(clip)
        stream.close()
        return video[:, -1:]

    def streaming_decoder(self) -> "StreamingDecoder":
        """Start a new stream; any number of them may be open at once."""
        return StreamingDecoder(self)

    def decode_next(self, latents: Tensor, past: Features | None) -> tuple[Tensor, Features]:
        """The next video `[B, n, 3, H, W]` of normalised latents `[B, f, C, h, w]`; not clamped.

        `past` and the second result as in `decode_moments`.
        """
        mean, std = self.statistics()
        mu = (latents.to(self.device).float() * std + mean).to(self.decoded_dtype)
        pixels = self._pixels()
        with self._fast_convolutions():
            return decode_moments(self.model, mu, past, pixels_at_once=pixels, decode=self._decode)

    def latents_at_once(self, height: int, width: int) -> int:
        """How many latent frames of this size go through the decoder together."""
        return max(1, self._pixels() // (height * width))

    def _pixels(self) -> int:
        """See `pixels_at_once`."""
        if self.pixels_at_once is not None:
            return self.pixels_at_once
        return PIXELS_ON_CPU if self.device.type == "cpu" else PIXELS_ON_GPU

    def _decode(
        self, model: AutoencoderKLWan, clip: Tensor, past: Features | None
    ) -> tuple[Tensor, Features]:
        if self._compiled is not None and past is not None:
            frames, compiled = self._compiled
            if clip.shape[2] == frames:
                return compiled(model, clip, past)
        return decode_clip(model, clip, past)

    @contextmanager
    def _fast_convolutions(self) -> Iterator[None]:
        """cuDNN measures its kernels while a compiled decoder runs.

        Without one it does not: which kernel wins differs from process to process, and with it the
        last bits of a video.
        """
        before = torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = before or self._compiled is not None
        try:
            yield
        finally:
            torch.backends.cudnn.benchmark = before

    def _lay_out(self) -> None:
        if self.device.type == "cuda":
            put_channels_together(self.model)

    @torch.no_grad()
    def fold_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Make latents whose means have these statistics `[C]` come out with the official ones.

        The encoder's last and the decoder's first 1x1x1 convolution take up
        mu' = (mu - mean) S / std + M and its inverse, so what is decoded does not change and the
        official constants M, S normalise this VAE's latents too.
        """
        gain = self.latents_std.to(std) / std  # [C]
        out, into = self.model.quant_conv, self.model.post_quant_conv
        assert out.bias is not None
        assert into.bias is not None
        channels = len(gain)
        offset = self.latents_mean.to(mean) - mean * gain
        out.bias[channels:] += 2 * gain.log()
        out.weight[:channels] *= gain.view(-1, 1, 1, 1, 1)
        out.bias[:channels] = out.bias[:channels] * gain + offset
        into.bias += into.weight[:, :, 0, 0, 0] @ (mean - self.latents_mean.to(mean) / gain)
        into.weight /= gain.view(1, -1, 1, 1, 1)

    def official_state_dict(self) -> dict[str, Tensor]:
        """The weights under the key names of `Wan2.1_VAE.pth`."""
        weights = {key: value.contiguous() for key, value in self.model.state_dict().items()}
        return official_vae_weights(weights)

    def save_official(self, path: str | Path) -> None:
        """Write the weights as `Wan2.1_VAE.pth` holds them."""
        save_weights(self.official_state_dict(), path)

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents, float32 [C, 1, 1] each."""
        mean, std = self._statistics
        if mean.device != self.device:
            mean, std = to_device(mean, self.device), to_device(std, self.device)
            self._statistics = mean, std
        return mean, std


class StreamingDecoder:
    """Decodes one stream of latents, any number of latent frames at a time.

    The causal convolutions find their past in `features`, the last two inputs of each. So the state
    has a constant size, whatever the length of the stream, and the result does not depend on how
    the stream is cut: to the last bit where every latent frame goes through the decoder on its own,
    to rounding (below 1e-4 in float32) where small ones go together (`pixels_at_once`). The same
    cuts give the same bits; a `Stream` cuts between blocks.
    """

    def __init__(self, vae: WanVAE) -> None:
        self._vae: WanVAE | None = vae
        self.device = vae.device
        self._features: Features | None = None

    @property
    def is_open(self) -> bool:
        """Whether it can decode."""
        return self._vae is not None

    @property
    def num_bytes(self) -> int:
        """Memory of the state."""
        return sum(feature.nbytes for feature in self._features or ())

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode the next latent frames [B, f, C, h, w] to video [B, n, 3, H, W] in [-1, 1].

        The first latent frame of the stream gives 1 video frame, each later `temporal_stride`.

        Raises:
            ValueError: no frame, or frames of another shape than the stream's.
            RuntimeError: the stream is closed.
        """
        vae = self._open()
        self._check(latents)
        frames = []
        for clip in latents.split(1 if vae.frugal else latents.shape[1], dim=1):
            video, self._features = vae.decode_next(clip, self._features)
            frames.append(video.clamp(-1, 1))
        return torch.cat(frames, dim=1) if len(frames) > 1 else frames[0]

    @contextmanager
    def undone_by_errors(self) -> Iterator[None]:
        """What is decoded within counts only if the block is left normally.

        A frugal VAE cannot go back: then an error closes this decoder.
        """
        frugal = self._open().frugal
        features = None if frugal else self._features
        try:
            yield
        except BaseException:
            if frugal:
                self.close()
            else:
                self._features = features
            raise

    def restart(self) -> None:
        """Forget what was decoded: the next latent frame is the first of a video."""
        self._open()
        self._features = None

    def state_dict(self) -> dict[str, Tensor]:
        """The state as a flat dict of tensors: `features.{i}`, the past of convolution i.

        At the start of a video it is empty.
        """
        self._open()
        past = self._features or ()
        return {f"features.{i}": feature.clone() for i, feature in enumerate(past)}

    def check_state(self, state: Mapping[str, Tensor]) -> None:
        """ValueError unless `load_state_dict` can take it over."""
        channels = past_channels(self._open().model.decoder)
        found = [state.get(f"features.{i}") for i in range(len(channels))]
        seen = [None if x is None or x.ndim != 5 else tuple(x.shape[1:3]) for x in found]
        if state and (len(state) != len(found) or seen != [(c, 2) for c in channels]):
            raise ValueError(
                "this state of a decoder is of another VAE, or of an earlier version of the "
                "program after one latent frame: start the stream again"
            )

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from where `state_dict` was taken, on the device of this decoder's VAE.

        Raises:
            ValueError: see `check_state`; nothing has changed then.
        """
        vae = self._open()
        self.check_state(state)
        past = (state[f"features.{i}"] for i in range(len(state)))
        moved = (feature.to(vae.device, copy=True) for feature in past)
        together = torch.channels_last_3d  # whatever file they went through
        features = tuple(feature.contiguous(memory_format=together) for feature in moved)
        self._features = features or None

    def close(self) -> None:
        """Free the state; decoding afterwards is an error."""
        self._vae, self._features = None, None

    def _open(self) -> WanVAE:
        if self._vae is None:
            raise RuntimeError("this decoder is closed; start another with vae.streaming_decoder()")
        return self._vae

    def _check(self, latents: Tensor) -> None:
        if latents.ndim != 5 or latents.shape[1] == 0:
            raise ValueError(f"expected latents [B, f, C, h, w], f > 0, got {list(latents.shape)}")
        if self._features is None:
            return
        past = self._features[0][:, :, 0]  # of the first convolution's input: [B, C, h, w]
        if past.shape != latents[:, 0].shape:
            raise ValueError(
                f"this stream has latent frames {list(past.shape)}, got {list(latents[:, 0].shape)}"
            )


def _floats(clip: Tensor, model: AutoencoderKLWan) -> Tensor:
    """Pixels in [-1, 1]; floats are so already."""
    if clip.is_floating_point():
        return clip
    return (to_device(clip, model.device).float() / 127.5 - 1).to(model.dtype)


def _clips(x: Tensor, frames: int, *, start: bool) -> Iterator[Tensor]:
    """Cut [B, C, F, H, W] into clips of so many frames, or what is left; at the start one frame."""
    if start:
        yield x[:, :, :1]
        x = x[:, :, 1:]
    yield from x.split(frames, dim=2) if x.shape[2] else ()


# --- key names and sizes -----------------------------------------------------------------------

_TOP_LEVEL = {"quant_conv": "conv1", "post_quant_conv": "conv2"}
_ENDS = {"conv_in": "conv1", "norm_out": "head.0", "conv_out": "head.2"}
_RESIDUAL = {
    "norm1": "residual.0",
    "conv1": "residual.2",
    "norm2": "residual.3",
    "conv2": "residual.6",
    "conv_shortcut": "shortcut",
}


def official_vae_key(key: str, num_res_blocks: int) -> str:
    """Translate diffusers' name of a VAE parameter to the official one.

    The official network numbers all layers of a side in one row: per stage of the decoder,
    `num_res_blocks + 1` residual blocks and one upsampling.
    """
    side, *path, parameter = key.split(".")
    if side in _TOP_LEVEL:
        return f"{_TOP_LEVEL[side]}.{parameter}"
    match path:
        case [end] if end in _ENDS:
            return f"{side}.{_ENDS[end]}.{parameter}"
        case ["down_blocks", index, *rest]:
            place = ["downsamples", index, *rest]
        case ["mid_block", "attentions", _, *rest]:
            place = ["middle", "1", *rest]
        case ["mid_block", "resnets", index, *rest]:
            place = ["middle", str(2 * int(index)), *rest]
        case ["up_blocks", stage, "resnets", index, *rest]:
            place = ["upsamples", str(int(stage) * (num_res_blocks + 2) + int(index)), *rest]
        case ["up_blocks", stage, "upsamplers", _, *rest]:
            place = ["upsamples", str((int(stage) + 1) * (num_res_blocks + 2) - 1), *rest]
        case _:
            return key
    return ".".join([side, *place[:-1], _RESIDUAL.get(place[-1], place[-1]), parameter])


def official_vae_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename diffusers' keys to the official ones; official keys stay as they are."""
    places = [re.match(r"decoder\.up_blocks\.\d+\.resnets\.(\d+)\.", key) for key in weights]
    num_res_blocks = max((int(place[1]) for place in places if place), default=None)
    if num_res_blocks is None:
        return dict(weights)
    return {official_vae_key(key, num_res_blocks): value for key, value in weights.items()}


def vae_config_from_shapes(shapes: Shapes, source: str | Path = "the file") -> dict[str, Any]:
    """Arguments of `AutoencoderKLWan` from the shapes of official weights.

    Raises:
        UserError: the shapes are not those of a Wan2.1 VAE (`source` is named in the message).
    """
    layers = {int(m[1]) for key in shapes if (m := re.match(r"encoder\.downsamples\.(\d+)\.", key))}
    last = max(layers, default=-1)
    row = "encoder.downsamples"
    samplers = [i for i in sorted(layers) if f"{row}.{i}.resample.1.weight" in shapes]
    stage_ends = [i - 1 for i in samplers] + [last]  # the last residual block of each stage
    try:
        base_dim = shapes["encoder.conv1.weight"][0]
        dim_mult = [shapes[f"{row}.{i}.residual.6.weight"][0] // base_dim for i in stage_ends]
        z_dim = shapes["conv2.weight"][0]
        config = {
            "base_dim": base_dim,
            "decoder_base_dim": shapes["decoder.head.0.gamma"][0] // dim_mult[0],
            "z_dim": z_dim,
            "dim_mult": dim_mult,
            "num_res_blocks": stage_ends[0] + 1,
            "in_channels": shapes["encoder.conv1.weight"][1],
            "out_channels": shapes["decoder.head.2.weight"][0],
        }
    except KeyError as error:
        raise UserError(f"{source} is not a Wan2.1 VAE: it has no key {error}.") from None
    except (IndexError, ZeroDivisionError):
        raise UserError(f"{source} is not a Wan2.1 VAE: its tensors have other shapes.") from None
    temporal = [f"{row}.{i}.time_conv.weight" in shapes for i in samplers]
    return config | {"temperal_downsample": temporal} | _derived_config(z_dim, temporal)


def read_strides(path: str | Path) -> Strides:
    """Strides of the VAE in a file or a diffusers folder, from the shapes of its weights.

    Raises:
        UserError: it does not hold a Wan2.1 VAE.
    """
    weights = official_vae_weights(read_weights(path, "a VAE"))
    config = vae_config_from_shapes({key: value.shape for key, value in weights.items()}, path)
    return Strides(config["scale_factor_spatial"], config["scale_factor_temporal"])


def _derived_config(z_dim: int, temporal_downsample: Sequence[bool]) -> dict[str, Any]:
    """Strides, and neutral statistics where the official ones have another number of channels."""
    config: dict[str, Any] = {
        "scale_factor_temporal": 2 ** sum(temporal_downsample),
        "scale_factor_spatial": 2 ** len(temporal_downsample),
    }
    official_mean = inspect.signature(AutoencoderKLWan).parameters["latents_mean"].default
    if z_dim != len(official_mean):
        config |= {"latents_mean": [0.0] * z_dim, "latents_std": [1.0] * z_dim}
    return config


def _recorded_statistics(path: Path, channels: int) -> dict[str, list[float]]:
    """The latent statistics that a diffusers folder states; nothing for a file."""
    config_file = path / "config.json"
    if not config_file.is_file():
        return {}
    config = read_json(config_file)
    stated: dict[str, Any] = {
        key: config[key] for key in ("latents_mean", "latents_std") if key in config
    }
    for key, values in stated.items():
        numbers = values if isinstance(values, list) else []
        right = len(numbers) == channels and all(
            type(n) in (int, float) and math.isfinite(n) and (n > 0 or key == "latents_mean")
            for n in numbers
        )
        if not right:
            raise UserError(
                f"{config_file} must state {key} as {channels} numbers (latents_std above 0); "
                "fetch it again"
            )
    return stated
