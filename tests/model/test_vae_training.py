"""Training a VAE from scratch: the loss, and folding the latent statistics in."""

import pytest
import torch

from model.vae import Autoencoder, init_autoencoder, vae_loss
from wan.vae import WanVAE, decode_moments, encode_moments


def test_folded_statistics_leave_the_video_and_normalise_the_latents() -> None:
    vae = WanVAE.random(4, dim_mult=(1, 1, 1, 1), seed=1)
    for parameter in vae.model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    video = torch.rand(2, 9, 3, 32, 32) * 2 - 1
    before, _ = encode_moments(vae.model, video)
    channels = before.movedim(2, 0).flatten(1)
    mean, std = vae.latents_mean.view(-1, 1, 1), vae.latents_std.view(-1, 1, 1)
    rebuilt = vae.decode((before - mean) / std)
    vae.fold_statistics(channels.mean(1), channels.std(1))
    latents = vae.encode(video)
    normalised = latents.movedim(2, 0).flatten(1)
    torch.testing.assert_close(normalised.mean(1), torch.zeros(16), atol=1e-4, rtol=0)
    torch.testing.assert_close(normalised.std(1), torch.ones(16), atol=1e-4, rtol=0)
    torch.testing.assert_close(vae.decode(latents), rebuilt, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_reconstruction_is_learned() -> None:
    torch.manual_seed(0)
    autoencoder = Autoencoder(WanVAE.random(4, dim_mult=(1, 1, 1, 1)).model.requires_grad_(True))
    optimiser = torch.optim.AdamW(autoencoder.parameters(), 3e-3)
    video = torch.full((1, 5, 3, 16, 16), -0.8)
    video[..., 4:10, 4:10] = 0.8
    losses = []
    for _ in range(25):
        noise = torch.randn(1, *autoencoder.latent_shape(video))
        result = vae_loss(autoencoder, video, noise, kl_weight=1e-4, l1_weight=0.1, edge_weight=0.5)
        optimiser.zero_grad()
        result.loss.backward()
        optimiser.step()
        losses.append(result.loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_kl_is_zero_for_a_standard_normal_and_grows() -> None:
    class Fixed(torch.nn.Module):
        def __init__(self, mean: float) -> None:
            super().__init__()
            self.mean = mean

        def forward(self, video: torch.Tensor, noise: torch.Tensor) -> tuple:
            return video, torch.full_like(noise, self.mean), torch.zeros_like(noise)

    video, noise = torch.rand(1, 5, 3, 16, 16), torch.zeros(1, 2, 16, 2, 2)
    at_zero = vae_loss(Fixed(0.0), video, noise, kl_weight=1.0, l1_weight=1.0, edge_weight=1.0)
    at_two = vae_loss(Fixed(2.0), video, noise, kl_weight=1.0, l1_weight=1.0, edge_weight=1.0)
    assert at_zero.loss.item() == 0
    assert at_two.loss.item() == 2.0  # mu^2 / 2


def test_first_weights_treat_every_frame_alike() -> None:
    """Random taps in time made a VAE trained on images unstable on long clips."""
    vae = WanVAE.random(8, dim_mult=(1, 1, 1, 1))
    init_autoencoder(vae.model, seed=0)
    still = (torch.rand(1, 1, 3, 32, 32) * 2 - 1).expand(1, 33, -1, -1, -1)
    latents, log_variance = encode_moments(vae.model, still)
    assert log_variance.mean() < -4, "latents start out nearly free of noise"
    video = decode_moments(vae.model, latents)[0]
    assert video.std() > 0.3, "the decoder sees its input"
    torch.testing.assert_close(video, video[:, :1].expand_as(video), atol=1e-2, rtol=0)


def test_first_weights_keep_the_newest_frame_of_each_group() -> None:
    vae = WanVAE.random(8, dim_mult=(1, 1, 1, 1))
    init_autoencoder(vae.model, seed=0)
    clip = torch.rand(1, 9, 3, 32, 32) * 2 - 1
    video = decode_moments(vae.model, encode_moments(vae.model, clip)[0])[0]
    for frame, group in ((0, slice(0, 1)), (4, slice(1, 5)), (8, slice(5, 9))):
        image = decode_moments(vae.model, encode_moments(vae.model, clip[:, frame, None])[0])[0]
        shown = video[:, group]
        torch.testing.assert_close(shown, image.expand_as(shown), atol=1e-2, rtol=0)
