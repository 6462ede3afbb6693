"""The gate of what is not exact: it measures what is lost, and does not let everything through."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline.quality import Limits, Made, Quality, compare, exact, measure
from pipeline.setup import Setup
from pipeline.text_to_video import VideoPipeline, load_generator
from scripts import quality
from tests.conftest import TinyWorld
from utils.cli import run_main
from utils.config import load_config
from utils.errors import UserError
from wan import float8

LIMITS = ((0.1, 25), (0.6, 59), (0.6, 61), (0.4, 61))
BOTH = ("linear_dtype=float8", "kv_cache_dtype=float8")


def setup_of(world: TinyWorld, *overrides: str) -> Setup:
    return Setup.of(load_config(world.config, ["device=cpu", *overrides]))


def loaded(world: TinyWorld, setup: Setup) -> VideoPipeline:
    return load_generator(setup, world.checkpoint)


def measured(world: TinyWorld, *overrides: str) -> Quality:
    return measure(
        setup_of(world, *overrides),
        lambda setup: loaded(world, setup),
        lambda pipe: [pipe.encode_prompts([prompt]) for prompt in ("a", "b")],
        blocks=3,
    )


@pytest.mark.slow
def test_what_eight_bits_lose(tiny_world: TinyWorld) -> None:
    """A cache in float8 loses nothing before it is read; linear layers lose from the start."""
    cache, linear = (measured(tiny_world, own) for own in BOTH[::-1])
    assert cache.first_window == cache.latents[0] == 0
    assert cache.decibels[0] == 100
    assert 0 < cache.latents[1] < 0.05
    assert 0.001 < linear.first_window < 0.1
    assert all(0.001 < found < 0.1 for found in linear.latents)
    assert not cache.faults()
    assert not linear.faults()


@pytest.mark.slow
def test_a_wrong_scale_does_not_pass(
    tiny_world: TinyWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scaled for another range, weights are of the right form and mean another network."""
    scaled_rows = float8.scaled_rows

    def wrong(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scaled, largest = scaled_rows(x)
        return scaled, largest * (448 / 256)

    monkeypatch.setattr(float8, "scaled_rows", wrong)
    assert any("first window" in why for why in measured(tiny_world, BOTH[0]).faults())


def test_figures_by_hand(tiny_world: TinyWorld) -> None:
    pipe = loaded(tiny_world, setup_of(tiny_world))
    ones = Made(torch.ones(1, 4), torch.ones(1, 6, 1, 1, 1), torch.zeros(1, 21, 3, 2, 2))
    other = Made(torch.full((1, 4), 1.5), ones.latents.clone(), ones.video.clone())
    other.latents[:, 3:] = 0.75
    other.video[:, 9:] = 0.2
    found = compare([other], [ones], pipe)
    assert found.first_window == pytest.approx(0.5)
    assert found.latents == pytest.approx((0, 0.25))
    assert found.decibels == pytest.approx((100, 20))
    faults = [len(replace(found, limits=Limits(*own)).faults()) for own in LIMITS]
    assert faults == [1, 0, 1, 2]


def test_nothing_to_compare(tiny_world: TinyWorld) -> None:
    with pytest.raises(UserError, match="is exact already"):
        exact(setup_of(tiny_world))
    plain = exact(setup_of(tiny_world, *BOTH, "vae_dtype=bfloat16"))
    assert plain.resolved == setup_of(tiny_world).resolved


@pytest.mark.parametrize(
    ("limit", "code", "words"),
    [("0.1", 0, "good enough"), ("0.0001", 1, "not good enough: the first window's error")],
)
def test_the_command(
    tiny_world: TinyWorld,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    limit: str,
    code: int,
    words: str,
) -> None:
    flags = [
        "--config_path",
        str(tiny_world.config),
        "--checkpoint_path",
        str(tiny_world.checkpoint),
    ]
    flags += ["--blocks", "1", "--prompts", "1", "--device", "cpu", "--most_error", limit, BOTH[0]]
    assert run_main(quality.main, [*flags, "--json", str(tmp_path / "q.json")]) == code
    assert words in capsys.readouterr().out
    assert (tmp_path / "q.json").is_file()
