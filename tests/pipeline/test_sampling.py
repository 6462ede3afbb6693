"""Noise of a batch, drawn when it is asked for or ahead of it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import pipeline.sampling
from pipeline.sampling import BlockNoise
from utils.noise import CounterNoise

LATENT = (2, 4, 6)


class Counted:
    """A source that remembers what was drawn."""

    def __init__(self, seed: int) -> None:
        self.source = CounterNoise(seed, LATENT, 3)
        self.drawn: list[tuple[int, int]] = []

    def __call__(self, sample: int, block: int, level: int) -> Tensor:
        self.drawn.append((block, level))
        return self.source(sample, block, level)


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[Counted], BlockNoise]:
    """Makes noise that takes its device for a GPU."""
    monkeypatch.setattr(pipeline.sampling, "to_device", lambda values, device: values)
    return lambda source: BlockNoise(source, [0], "cuda:0")


def test_noise_of_the_next_block_is_there_before_it_is_asked_for(
    on_gpu: Callable[[Counted], BlockNoise],
) -> None:
    """A steady block used to wait for the draws of its four blocks, with the GPU idle."""
    source = Counted(0)
    noise = on_gpu(source)
    for level in (0, 1):
        noise(0, level)
    noise.draw_ahead(None)
    assert sorted(source.drawn) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert torch.equal(noise(1, 1), source.source(0, 1, 1)[None])
    assert len(source.drawn) == 4
    assert torch.equal(noise(2, 1), source.source(0, 2, 1)[None])  # a surprise
    assert source.drawn[4:] == [(2, 1)]


def test_what_was_drawn_ahead_ends_with_the_video_and_with_its_source(
    on_gpu: Callable[[Counted], BlockNoise],
) -> None:
    source, other = Counted(0), Counted(1)
    noise = on_gpu(source)
    noise(0, 0)
    noise.draw_ahead(1)
    assert source.drawn == [(0, 0)]
    noise(0, 0)
    noise.draw_ahead(None)
    noise.change(other, 1)
    assert torch.equal(noise(1, 0), other.source(0, 1, 0)[None])


def test_a_state_that_is_gone_back_to_draws_from_its_own_sources(
    on_gpu: Callable[[Counted], BlockNoise],
) -> None:
    """What was drawn ahead was of the seed that was left."""
    source, other = Counted(0), Counted(1)
    noise = on_gpu(source)
    noise.change(other, 1)
    noise(1, 0)
    noise.draw_ahead(None)
    noise.restore([])
    assert torch.equal(noise(2, 0), source.source(0, 2, 0)[None])


def test_nothing_that_nobody_takes_is_kept(on_gpu: Callable[[Counted], BlockNoise]) -> None:
    noise = on_gpu(Counted(0))
    for block in range(0, 20, 2):
        noise(block, 0)
        noise.draw_ahead(None)
    assert list(noise._drawn) == [(19, 0)]


def test_on_a_cpu_nothing_is_drawn_ahead() -> None:
    source = Counted(0)
    noise = BlockNoise(source, [0], "cpu")
    noise(0, 0)
    noise.draw_ahead(None)
    assert source.drawn == [(0, 0)]
