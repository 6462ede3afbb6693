"""Training of the causal video VAE: reconstruction, edges and KL (VAE, arXiv 1312.6114, eq. 10)."""

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch import Tensor, nn

from model.result import LossResult
from wan.vae import decode_moments, encode_moments

QUIET_LOG_VARIANCE = -6.0


class Autoencoder(nn.Module):
    """Encoder, sample, decoder as one forward pass, so that it can be sharded as one module."""

    def __init__(self, model: AutoencoderKLWan) -> None:
        super().__init__()
        self.model = model

    def forward(self, video: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Video `[B, F, 3, H, W]`, noise `[B, f, C, h, w]` -> (video, mean, log-variance).

        In the dtype of the weights, but for the moments and the sample, which are float32.
        """
        dtype = self.model.quant_conv.weight.dtype  # of the weights while they are gathered
        mean, log_variance = (part.float() for part in encode_moments(self.model, video.to(dtype)))
        sample = mean + (0.5 * log_variance).exp() * noise
        rebuilt, _ = decode_moments(self.model, sample.to(dtype))
        return rebuilt, mean, log_variance

    def latent_shape(self, video: Tensor) -> tuple[int, int, int, int]:
        """`(f, C, h, w)` of video `[B, F, 3, H, W]`."""
        config = self.model.config
        space, time = config["scale_factor_spatial"], config["scale_factor_temporal"]
        frames, _, height, width = video.shape[1:]
        return 1 + (frames - 1) // time, config["z_dim"], height // space, width // space


@torch.no_grad()
def init_autoencoder(model: AutoencoderKLWan, seed: int) -> None:
    """Weights to train from scratch; a pure function of `seed`.

    Convolutions keep the scale of what goes through them (LeCun normal, zero bias), and residual
    branches start at zero: with PyTorch's default a deep decoder starts out blind to its input. In
    time, convolutions start with the newest frame alone, and layers that change the frame rate with
    copies of it: a VAE trained on images then shows each latent frame's last image, on clips of any
    length. Latents start out nearly free of noise.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            times = module.weight.shape[2] if isinstance(module, nn.Conv3d) else 1
            std = (module.weight[0].numel() / times) ** -0.5
            nn.init.normal_(module.weight, std=std, generator=generator)
            if times > 1:
                module.weight[:, :, :-1] = 0
            if name.endswith(("conv2", "proj")):
                nn.init.zeros_(module.weight)
            if name.endswith("time_conv"):
                copies = module.out_channels // module.in_channels
                module.weight[:, :, -1, 0, 0] = torch.eye(module.in_channels).repeat(copies, 1)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    to_moments = model.quant_conv
    assert to_moments.bias is not None
    channels = to_moments.out_channels // 2
    to_moments.weight[channels:] *= 0.1
    to_moments.bias[channels:] = QUIET_LOG_VARIANCE


def vae_loss(
    autoencoder: nn.Module,
    video: Tensor,
    noise: Tensor,
    *,
    kl_weight: float,
    l1_weight: float,
    edge_weight: float,
) -> LossResult:
    """|e|^2 + l1_weight |e|_1 + edge_weight |de|^2 + kl_weight KL(q(z|x) || N(0, 1)), e = x' - x.

    Means over all elements; de are differences of neighbouring pixels, which keep outlines sharp.
    The square puts the learning where the error is large; |e|_1 takes over where it is small.
    """
    rebuilt, mean, log_variance = autoencoder(video, noise)
    error = rebuilt.float() - video
    edges = sum(torch.diff(error, dim=axis).square().mean() for axis in (-1, -2))
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    squares, sizes = error.square().mean(), error.abs().mean()
    loss = squares + l1_weight * sizes + edge_weight * edges + kl_weight * kl
    metrics = {"vae/l1": sizes.detach(), "vae/mse": squares.detach(), "vae/kl": kl.detach()}
    return LossResult(loss, metrics)
