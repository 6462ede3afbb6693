"""Encoder and decoder of the Wan2.1 VAE as pure functions, over the weights of a diffusers module.

A video goes through in clips. What a causal convolution must know of the clips before, the last
frames that it saw, enters and leaves as a tuple of tensors, in the order of the convolutions:

    video, past = decode_clip(model, latents, past)

The first clip is one frame, with `past` None; all later ones compute the same, so that a call for
them is one static graph. diffusers' own forward gives the same to rounding. It writes every input
of a convolution three times over (padding, past, activation) and computes norms in several float32
passes; here channels lie together in memory (`channels_last_3d`), a norm is one kernel, and an
activation writes the buffer that the convolution reads.
"""

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    AutoencoderKLWan,
    WanAttentionBlock,
    WanCausalConv3d,
    WanMidBlock,
    WanResample,
    WanResidualBlock,
    WanRMS_norm,
)
from einops import rearrange, repeat
from torch import Tensor, nn

Features = tuple[Tensor, ...]

_TOGETHER = torch.channels_last_3d
_EPSILON = 1e-24  # of a mean square: lengths below 1e-12 sqrt(C) are no longer normalised
_LEAST_CHANNELS = 16  # of fp32 in a vector of a CPU


def decode_clip(
    model: AutoencoderKLWan, latents: Tensor, past: Features | None
) -> tuple[Tensor, Features]:
    """Video `[B, 3, n, H, W]` of latents `[B, C, f, h, w]` that are not normalised; not clamped.

    `past`: of the clip before; None starts a video, with one latent frame.
    """
    decoder, memory = model.decoder, _Memory(past)
    x = _convolve(model.post_quant_conv, latents.contiguous(memory_format=_TOGETHER))
    x = _convolve(decoder.conv_in, memory.after(x))
    x = _middle(decoder.mid_block, x, memory)
    for block in decoder.up_blocks:
        for layer in block.resnets:
            x = _residual(layer, x, memory)
        for sampler in block.upsamplers or ():
            x = _upsample(sampler, x, memory)
    x = _normed(decoder.norm_out, x)
    x = memory.after(x, active=True)
    return _convolve(decoder.conv_out, x), memory.features()


def encode_clip(
    model: AutoencoderKLWan, video: Tensor, past: Features | None
) -> tuple[Tensor, Features]:
    """Mean and log-variance `[B, 2C, f, h, w]` of video `[B, 3, n, H, W]`, as in `decode_clip`.

    The first clip is one frame, every later one as many as the VAE makes one latent frame of.
    """
    encoder, memory = model.encoder, _Memory(past)
    x = video.contiguous(memory_format=_TOGETHER)
    x = _convolve(encoder.conv_in, memory.after(x))
    for layer in encoder.down_blocks:
        step = _downsample if isinstance(layer, WanResample) else _residual
        x = step(layer, x, memory)
    x = _middle(encoder.mid_block, x, memory)
    x = _normed(encoder.norm_out, x)
    x = memory.after(x, active=True)
    x = _convolve(encoder.conv_out, x)
    return _convolve(model.quant_conv, x), memory.features()


def past_channels(side: nn.Module) -> list[int]:
    """Channels of each of the `Features` that the encoder or decoder carries from clip to clip."""
    convolutions = (layer for layer in side.modules() if isinstance(layer, WanCausalConv3d))
    return [conv.in_channels for conv in convolutions if conv.kernel_size[0] > 1]


@torch.no_grad()
def put_channels_together(model: nn.Module) -> None:
    """Lay the weights of all convolutions out as cuDNN reads them, once for all."""
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Conv3d):
            order = _TOGETHER if layer.weight.ndim == 5 else torch.channels_last
            layer.weight.data = layer.weight.contiguous(memory_format=order)


class _Memory:
    """What each causal convolution saw last: taken in their order, and kept for the next clip."""

    def __init__(self, past: Features | None) -> None:
        self.starts = past is None
        self._past = past or ()
        self._kept: list[Tensor] = []

    def after(self, x: Tensor, *, active: bool = False, frames: int = 2) -> Tensor:
        """`x` `[B, C, F, H, W]`, its SiLU if it is `active`, after the `frames` before it.

        At the start of a video after nothing, which stands for zeros.
        """
        if self.starts:
            seen = F.silu(x) if active else x
            self.keep(F.pad(seen, (0, 0, 0, 0, frames - 1, 0)))
        else:
            seen = _joined(self._past[len(self._kept)], x, active=active)
            self.keep(seen[:, :, -frames:])
        return seen

    def keep(self, last: Tensor) -> None:
        """A copy of the last frames, for the next clip."""
        self._kept.append(last.clone(memory_format=_TOGETHER))

    def features(self) -> Features:
        """What was kept."""
        return tuple(self._kept)


def _joined(past: Tensor, x: Tensor, *, active: bool) -> Tensor:
    """`[past, x]` along time, or `[past, silu(x)]`; written once."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return torch.cat([past, F.silu(x) if active else x], dim=2)  # one kernel when compiled
    batch, channels, frames, *space = x.shape
    before = past.shape[2]
    seen = torch.empty(
        (batch, channels, before + frames, *space),
        dtype=x.dtype,
        device=x.device,
        memory_format=_TOGETHER,
    )
    seen[:, :, :before] = past
    if active:
        torch.ops.aten.silu.out(x, out=seen[:, :, before:])
    else:
        seen[:, :, before:] = x
    return seen


# --- layers --------------------------------------------------------------------------------------


def _middle(block: WanMidBlock, x: Tensor, memory: _Memory) -> Tensor:
    x = _residual(block.resnets[0], x, memory)
    for attention, layer in zip(block.attentions, block.resnets[1:], strict=True):
        x = _residual(layer, _attention(attention, x), memory)
    return x


def _residual(block: WanResidualBlock, x: Tensor, memory: _Memory) -> Tensor:
    y = x
    for norm, conv in ((block.norm1, block.conv1), (block.norm2, block.conv2)):
        y = _normed(norm, y)
        y = memory.after(y, active=True)
        y = _convolve(conv, y)
    if isinstance(block.conv_shortcut, WanCausalConv3d):
        x = _convolve(block.conv_shortcut, x)
    return y.add_(x)


def _attention(block: WanAttentionBlock, x: Tensor) -> Tensor:
    """Every frame attends to itself, in one head: `[B, C, F, H, W]`."""
    tokens = _normed(block.norm, x).movedim(1, -1)  # [B, F, H, W, C]
    qkv = F.linear(tokens, block.to_qkv.weight[:, :, 0, 0], block.to_qkv.bias)
    q, k, v = qkv.flatten(2, 3).flatten(0, 1)[:, None].chunk(3, dim=-1)  # [B F, 1, H W, C] each
    seen = F.scaled_dot_product_attention(q, k, v).reshape(tokens.shape)
    out = F.linear(seen, block.proj.weight[:, :, 0, 0], block.proj.bias)
    return out.movedim(-1, 1).add_(x)


def _upsample(sampler: WanResample, x: Tensor, memory: _Memory) -> Tensor:
    """Twice the height and width, and but for the first frame of a video twice the frames."""
    batch, times = x.shape[0], 1
    if sampler.mode == "upsample3d" and memory.starts:
        memory.keep(torch.zeros_like(x).expand(-1, -1, 2, -1, -1))
    elif sampler.mode == "upsample3d":
        x, times = _convolve(sampler.time_conv, memory.after(x)), 2
    near = repeat(x.movedim(1, -1), "b f h w (n c) -> (b f n) (h y) (w x) c", n=times, y=2, x=2)
    return _over_time(sampler.resample[1](near.movedim(-1, 1)), batch)


def _downsample(sampler: WanResample, x: Tensor, memory: _Memory) -> Tensor:
    """Half the height and width, and but for the first frame of a video half the frames."""
    x = _over_time(sampler.resample(x.transpose(1, 2).flatten(0, 1)), x.shape[0])
    if sampler.mode != "downsample3d":
        return x
    seen = memory.after(x, frames=1)
    return seen if memory.starts else _convolve(sampler.time_conv, seen)


def _over_time(frames: Tensor, batch: int) -> Tensor:
    """`[B F, C, H, W]` -> `[B, C, F, H, W]`."""
    return frames.unflatten(0, (batch, -1)).transpose(1, 2)


def _normed(norm: WanRMS_norm, x: Tensor) -> Tensor:
    """`x / |x| * sqrt(C) * gamma` over axis 1, fp32 inside: `[B, C, F, H, W]` -> like x."""
    channels = x.shape[1]
    return F.rms_norm(x.movedim(1, -1), (channels,), norm.gamma.flatten(), _EPSILON).movedim(-1, 1)


def _convolve(conv: WanCausalConv3d, x: Tensor) -> Tensor:
    """The convolution of `x` with its past; taps in time for which there is none are left out."""
    left, _, top, _, _, _ = (int(side) for side in conv._padding)
    weight = conv.weight[:, :, -x.shape[2] :]
    run = _onednn if _by_onednn(x) else F.conv3d
    channels, _, taps = weight.shape[:3]
    if run is _onednn and taps > 1 and channels * taps <= _LEAST_CHANNELS and conv.stride[0] == 1:
        return _taps_apart(weight, conv.bias, x, (0, top, left))
    return run(x, weight, conv.bias, conv.stride, (0, top, left))


def _by_onednn(x: Tensor) -> bool:
    """Whether oneDNN is asked directly; that refuses bfloat16 on a CPU without AVX-512."""
    if x.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return x.dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _onednn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, ...],
    padding: tuple[int, int, int],
) -> Tensor:
    """By oneDNN, whatever the size.

    PyTorch's own choice on a CPU for many elements of one video is a loop without blocking, several
    times slower; channels that lie together save oneDNN most of its own reordering.
    """
    x = x.contiguous(memory_format=_TOGETHER)
    return torch.ops.aten.mkldnn_convolution(x, weight, bias, padding, stride, (1, 1, 1), 1)


def _taps_apart(
    weight: Tensor, bias: Tensor | None, x: Tensor, padding: tuple[int, int, int]
) -> Tensor:
    """Taps in time as channels of one convolution in space, which are added up.

    oneDNN computes `_LEAST_CHANNELS` channels even where there are only three (red, green, blue).
    """
    channels, _, taps = weight.shape[:3]
    apart = rearrange(weight, "o c t h w -> (t o) c 1 h w")
    each = _onednn(x, apart, None, (1, 1, 1), padding).split(channels, dim=1)
    frames = x.shape[2] - taps + 1
    out = each[0][:, :, :frames]
    for i, part in enumerate(each[1:], start=1):
        out = out + part[:, :, i : i + frames]
    return out if bias is None else out + bias.view(-1, 1, 1, 1)
