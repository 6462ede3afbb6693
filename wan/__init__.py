"""Wan2.1: the diffusion transformer, its attention and cache, the VAE, the text encoder."""
