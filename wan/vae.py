"""The Wan2.1 video VAE: its files, its latents, and decoding a stream block by block.

Owns a diffusers `AutoencoderKLWan` and what surrounds it: the official key names and sizes, the
latent statistics, and the causal-convolution features that a stream carries from one latent frame
to the next. With mu the mean of the encoder's distribution, and m, s the statistics per channel,

    latent = (mu - m) / s,        mu = latent * s + m.

Video is [B, F, 3, H, W] in [-1, 1], latents are [B, f, C, h, w]. The first latent frame is one
video frame, every later one is `temporal_stride` video frames.

Weights of any size load by the same code: sizes are read from tensor shapes. Inside, everything
speaks the official key names; diffusers' names are translated at the border (`official_vae_key`).
"""

import inspect
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    AutoencoderKLWan,
    WanCausalConv3d,
    WanRMS_norm,
)
from einops import rearrange
from torch import Tensor, nn

from utils.devices import to_device
from utils.errors import UserError
from wan.geometry import Strides
from wan.weights import Shapes, assign_weights, read_json, read_weights, save_weights


def encode_moments(model: AutoencoderKLWan, video: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log-variance `[B, f, C, h, w]` of the latents of video `[B, F, 3, H, W]`.

    Not normalised; with gradient, if it is enabled. Pixels in uint8 become floats on the model's
    device clip by clip, so a long video is never whole in memory as such.
    """
    x = rearrange(video, "b f c h w -> b c f h w")
    features = _empty_features(model.encoder)
    moments = [  # [B, 2C, 1, h, w] each
        model.quant_conv(model.encoder(_floats(clip, model), feat_cache=features, feat_idx=[0]))
        for clip in _clips(x, model.config["scale_factor_temporal"])
    ]
    mean, log_variance = torch.cat(moments, dim=2).chunk(2, dim=1)
    return mean.transpose(1, 2), log_variance.transpose(1, 2)


def decode_moments(
    model: AutoencoderKLWan,
    latents: Tensor,
    features: list[Any] | None = None,
    *,
    pixels_at_once: int = 0,
) -> Tensor:
    """Video `[B, n, 3, H, W]` of latents `[B, f, C, h, w]` that are not normalised; not clamped.

    One latent frame after the other, or as many in one call of the decoder as have at most
    `pixels_at_once` latent pixels; the first of a video always alone. `features` hold what the
    convolutions saw before, and move on. None starts a video. With gradient, if it is enabled.
    """
    features = _empty_features(model.decoder) if features is None else features
    at_once = max(1, pixels_at_once // (latents.shape[-2] * latents.shape[-1]))
    x = rearrange(latents, "b f c h w -> b c f h w")
    frames = []
    for clip in _clips(x, at_once) if features[0] is None else x.split(at_once, dim=2):
        first = features[0] is None
        video = model.post_quant_conv(clip)  # [B, C, 1 or more, h, w]
        video = model.decoder(video, feat_cache=features, feat_idx=[0], first_chunk=first)
        frames.append(rearrange(video, "b c n h w -> b n c h w"))
    return torch.cat(frames, dim=1)


PIXELS_AT_ONCE = 256
"""A block of 64x64 pixels. More at once do not fit the cache of a CPU, and take longer."""


class WanVAE:
    """A Wan2.1 VAE for inference: video to normalised latents and back, without gradient.

    `model` is the diffusers module, with layers that are faster on a CPU; code that trains a VAE
    uses it directly. `pixels_at_once`: see `decode_moments`.
    """

    def __init__(self, model: AutoencoderKLWan) -> None:
        self.model = _with_cpu_kernels(model)
        self.pixels_at_once = PIXELS_AT_ONCE
        self.latents_mean = torch.tensor(model.config["latents_mean"])  # [C]
        self.latents_std = torch.tensor(model.config["latents_std"])  # [C]
        self._statistics = self.latents_mean.view(-1, 1, 1), self.latents_std.view(-1, 1, 1)

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
        weights = official_vae_weights(read_weights(path, "a VAE"))
        config = vae_config_from_shapes({key: value.shape for key, value in weights.items()}, path)
        config |= _recorded_statistics(Path(path), config["z_dim"])
        with torch.device("meta"):
            model = AutoencoderKLWan(**config)
        names = {key: official_vae_key(key, config["num_res_blocks"]) for key in model.state_dict()}
        assign_weights(model, weights, path, names=names, device=device, dtype=dtype)
        return cls(model.eval().requires_grad_(False))

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
        return self.model.dtype

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

    def streaming_decoder(self) -> "StreamingDecoder":
        """Start a new stream; any number of them may be open at once."""
        return StreamingDecoder(self)

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
        return official_vae_weights(self.model.state_dict())

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
        self._features = _empty_features(vae.model.decoder)

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
        mean, std = vae.statistics()
        mu = latents.to(vae.device).float() * std + mean
        features = list(self._features)  # after an error the stream stands where it stood
        video = decode_moments(
            vae.model, mu.to(vae.decoded_dtype), features, pixels_at_once=vae.pixels_at_once
        ).clamp(-1, 1)
        self._features = features
        return video

    @contextmanager
    def undone_by_errors(self) -> Iterator[None]:
        """What is decoded within counts only if the block is left normally."""
        features = self._features
        try:
            yield
        except BaseException:
            self._features = features
            raise

    def restart(self) -> None:
        """Forget what was decoded: the next latent frame is the first of a video."""
        self._features = _empty_features(self._open().model.decoder)

    def state_dict(self) -> dict[str, Tensor]:
        """The state as a flat dict of tensors: `features.{i}`, the past of convolution i.

        An empty tensor stands for diffusers' mark of a convolution that has seen one frame and
        must take zeros for its past; a convolution without a past is left out.
        """
        self._open()
        return {
            f"features.{i}": torch.empty(0) if isinstance(feature, str) else feature.clone()
            for i, feature in enumerate(self._features)
            if feature is not None
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from where `state_dict` was taken, on the device of this decoder's VAE."""
        vae = self._open()
        features = _empty_features(vae.model.decoder)
        for key, value in state.items():
            feature = value.to(vae.device, copy=True) if value.numel() else _ZEROS_BEFORE
            features[int(key.removeprefix("features."))] = feature
        self._features = features

    def close(self) -> None:
        """Free the state; decoding afterwards is an error."""
        self._vae, self._features = None, []

    def _open(self) -> WanVAE:
        if self._vae is None:
            raise RuntimeError("this decoder is closed; start another with vae.streaming_decoder()")
        return self._vae

    def _check(self, latents: Tensor) -> None:
        if latents.ndim != 5 or latents.shape[1] == 0:
            raise ValueError(f"expected latents [B, f, C, h, w], f > 0, got {list(latents.shape)}")
        past = self._features[0]  # the first convolution's input: [B, C, 1 or 2, h, w]
        if past is not None and past[:, :, 0].shape != latents[:, 0].shape:
            raise ValueError(
                f"this stream has latent frames {list(past[:, :, 0].shape)}, "
                f"got {list(latents[:, 0].shape)}"
            )


class _CausalConv3d(WanCausalConv3d):
    """The same convolution by oneDNN on a CPU, without padding and taps that would be zeros alone.

    PyTorch's own choice for inputs of this many elements and one video is a loop without blocking,
    several times slower; channels that lie together save oneDNN most of its own reordering. At the
    start of a video two of three taps in time have nothing to see. It computes `_LEAST_CHANNELS`
    channels even where there are only three (red, green, blue): there the taps in time are channels
    of one convolution in space, and are added up.
    """

    def forward(self, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
        """`x` `[B, C, F, H, W]` after the frames `cache_x` `[B, C, 0 to 2, H, W]` before it."""
        if x.device.type != "cpu" or not torch.backends.mkldnn.is_available():
            return super().forward(x, cache_x)
        left, _, top, _, before, _ = (int(side) for side in self._padding)
        missing = before - (0 if cache_x is None else cache_x.shape[2])  # frames before the start
        seen = x if cache_x is None else torch.cat([cache_x, x], dim=2)
        weight = self.weight
        if missing > 0 and x.shape[2] == 1:
            weight = weight[:, :, missing:]
        elif missing > 0:
            seen = F.pad(seen, (0, 0, 0, 0, missing, 0))
        seen = seen.contiguous(memory_format=torch.channels_last_3d)  # as it is after one layer
        channels, taps = weight.shape[0], weight.shape[2]
        if taps > 1 and channels * taps <= _LEAST_CHANNELS and self.stride[0] == 1:
            apart = rearrange(weight, "o c t h w -> (t o) c 1 h w")
            each = self._convolve(seen, apart, None, top, left).split(channels, dim=1)
            frames = seen.shape[2] - taps + 1
            out = each[0][:, :, :frames]
            for i, part in enumerate(each[1:], start=1):
                out = out + part[:, :, i : i + frames]
            return out if self.bias is None else out + self.bias.view(-1, 1, 1, 1)
        return self._convolve(seen, weight, self.bias, top, left)

    def _convolve(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, top: int, left: int
    ) -> Tensor:
        return torch.ops.aten.mkldnn_convolution(
            x, weight, bias, (0, top, left), self.stride, self.dilation, self.groups
        )


class _ChannelNorm(WanRMS_norm):
    """The same norm on a CPU without `vector_norm`, whose loop over channels is not vectorised."""

    def forward(self, x: Tensor) -> Tensor:
        """`x / |x| * sqrt(C) * gamma` over axis 1, fp32 inside: `[B, C, ...]` -> like x."""
        if x.device.type != "cpu":
            return super().forward(x)
        wide = x.float()
        length = wide.square().sum(1, keepdim=True).sqrt().clamp_min(_SMALLEST_LENGTH)
        return (wide * (self.scale / length)).to(x.dtype) * self.gamma


_LEAST_CHANNELS = 16  # of fp32 in a vector of a CPU
_SMALLEST_LENGTH = 1e-12  # as in `torch.nn.functional.normalize`
_CPU_KERNELS: dict[type, type] = {WanCausalConv3d: _CausalConv3d, WanRMS_norm: _ChannelNorm}


def _with_cpu_kernels(model: AutoencoderKLWan) -> AutoencoderKLWan:
    """Exchange the classes of `model`'s layers in place; weights and names stay."""
    for module in model.modules():
        module.__class__ = _CPU_KERNELS.get(type(module), type(module))
    return model


_ZEROS_BEFORE = "Rep"  # diffusers' mark in the features of a temporal upsampling convolution


def _empty_features(module: nn.Module) -> list[Any]:
    """One place per causal convolution: None, a tensor [B, C, 1 or 2, h, w], or a mark."""
    return [None] * sum(isinstance(m, WanCausalConv3d) for m in module.modules())


def _floats(clip: Tensor, model: AutoencoderKLWan) -> Tensor:
    """Pixels in [-1, 1]; floats are so already."""
    if clip.is_floating_point():
        return clip
    return (to_device(clip, model.device).float() / 127.5 - 1).to(model.dtype)


def _clips(x: Tensor, stride: int) -> Iterator[Tensor]:
    """Cut [B, C, F, H, W] into the first frame and clips of `stride` frames, or what is left."""
    yield x[:, :, :1]
    yield from x[:, :, 1:].split(stride, dim=2) if x.shape[2] > 1 else ()


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
