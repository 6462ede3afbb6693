"""Counter-based noise: pure, independent of batch and order, different wherever it should be."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.sampling import BlockNoise
from utils.noise import CounterNoise, RecordedNoise, philox

LATENT = (2, 3, 4)


def noise(seed: int = 0) -> CounterNoise:
    return CounterNoise(seed, LATENT, 3)


def test_noise_is_a_pure_function() -> None:
    """In any order and between other draws, also from the global generators."""
    source = noise()
    first = source(1, 2, 3)
    torch.manual_seed(7)
    torch.randn(5)
    source(0, 0, 0)
    assert torch.equal(source(1, 2, 3), first)
    assert torch.equal(noise()(1, 2, 3), first)
    assert first.shape == (3, *LATENT)
    assert first.dtype == torch.float32
    assert first.device.type == "cpu"


def test_drawing_touches_no_global_generator() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    noise()(0, 0, 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_noise_is_the_same_for_ever() -> None:
    """Pins the stream: another order of counters would change every published video."""
    drawn = philox(3, purpose=1, counter=(5, 6, 7)).standard_normal(4, dtype=np.float32)
    bits = np.random.Philox(
        key=np.array([3, 1], dtype=np.uint64), counter=np.array([0, 5, 6, 7], dtype=np.uint64)
    )
    expected = np.random.Generator(bits).standard_normal(4, dtype=np.float32)
    assert drawn.tolist() == expected.tolist()
    again = philox(9, counter=(4, 2, 1)).standard_normal((3, *LATENT), dtype=np.float32)
    assert noise(9)(sample=1, block=2, level=4).numpy().tolist() == again.tolist()


def test_every_index_gives_other_noise() -> None:
    """All pairs differ everywhere: no index may be dropped, swapped or added to another."""
    draws = {
        (seed, sample, block, level): noise(seed)(sample, block, level)
        for seed, sample, block, level in itertools.product(range(3), repeat=4)
    }
    flat = torch.stack([draw.flatten() for draw in draws.values()])
    assert len(torch.unique(flat, dim=0)) == len(draws) == 81
    correlation = torch.corrcoef(flat).fill_diagonal_(0)
    assert correlation.abs().max() < 0.6


@pytest.mark.parametrize("counters", [(0, 1, 2), (2**40, 0, 3)])
def test_counters_do_not_run_into_each_other(counters: tuple[int, int, int]) -> None:
    """A long draw never reaches the numbers of a neighbouring counter."""
    long = philox(0, counter=counters).standard_normal(100_000)
    for axis in range(3):
        moved = list(counters)
        moved[axis] += 1
        other = philox(0, counter=moved).standard_normal(8)
        assert not np.isin(other, long).any()


def test_purposes_and_seeds_differ() -> None:
    draws = {philox(s, p).integers(2**62) for s in range(20) for p in range(20)}
    assert len(draws) == 400


@pytest.mark.parametrize("seed", [0, 1, -1, -(2**31), 2**31, 2**32, 2**63, 2**64 - 2, 10**30])
def test_any_integer_is_a_seed(seed: int) -> None:
    ours = noise(seed)(0, 0, 0)
    assert torch.equal(ours, noise(seed)(0, 0, 0))
    assert not torch.equal(ours, noise(seed + 1)(0, 0, 0))
    assert torch.isfinite(ours).all()


def test_seeds_that_share_their_low_bits_differ() -> None:
    draws = [noise(seed)(0, 0, 0) for seed in (5, 5 + 2**32, -5, 5 + 2**63)]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(draws, 2))


def test_noise_is_standard_normal() -> None:
    sample = CounterNoise(1, (16, 32, 32), 3)
    values = torch.cat([sample(0, block, 0).flatten() for block in range(4)]).double()
    count = len(values)
    assert abs(values.mean()) < 5 / count**0.5
    assert abs(values.var() - 1) < 5 * (2 / count) ** 0.5
    assert abs((values**3).mean()) < 5 * (15 / count) ** 0.5
    assert abs((values**4).mean() - 3) < 5 * (96 / count) ** 0.5
    within = ((values.abs() < 1).double().mean() - 0.682689).abs()
    assert within < 5 * 0.5 / count**0.5


def test_first_block_may_be_shorter() -> None:
    source = CounterNoise(0, LATENT, 3, first_block_frames=1)
    assert source(0, 0, 0).shape == (1, *LATENT)
    assert source(0, 1, 0).shape == (3, *LATENT)
    assert torch.equal(source(0, 0, 2)[0], noise()(0, 0, 2)[0])


def test_a_row_does_not_know_its_batch() -> None:
    """Row i is the noise of its sample: two prompts in a batch get what each would get alone."""
    together = BlockNoise(noise(), [4, 0, 4], "cpu")(2, 1)
    for row, sample in enumerate([4, 0, 4]):
        alone = BlockNoise(noise(), [sample], "cpu")(2, 1)
        assert torch.equal(together[row : row + 1], alone)


def test_recorded_noise_is_addressed_by_block_and_level() -> None:
    generator = torch.Generator().manual_seed(0)
    initial = torch.randn(2, 5, *LATENT, generator=generator)
    renoise = torch.randn(2, 3, 2, 3, *LATENT, generator=generator)
    source = RecordedNoise(initial, renoise, block_starts=(0, 2, 5))

    def given(sample: int, block: int, level: int) -> Tensor:
        return source(sample, block, level)

    assert torch.equal(given(1, 0, 0), initial[1, :2])
    assert torch.equal(given(0, 1, 0), initial[0, 2:5])
    assert torch.equal(given(1, 1, 3), renoise[1, 2, 1])
    # a shorter block takes as many frames of what brings it to later levels
    assert torch.equal(given(1, 0, 1), renoise[0, 0, 1, :2])
