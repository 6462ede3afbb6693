"""Foundations that know nothing of networks: configuration, prompts, files, noise."""
