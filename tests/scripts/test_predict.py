"""Predictions from counts, against the same arithmetic by hand."""

import pytest

from pipeline.setup import Setup
from scripts.predict import TERA, Rates, main, predict
from tests.tiny_pipeline import TINY_DIT, write_config
from utils.cli import run_main
from utils.config import load_config
from wan.dit import DiTConfig

RATES = Rates(
    matmul=2 * TERA,
    attention=TERA,
    convolution=TERA,
    moved=10**9,
    to_host=1000,
    highest=4 * TERA,
)


def test_a_block_is_the_sum_of_its_parts(tmp_path):
    """Self Forcing with two levels: two windows, a clean pass, a block of video."""
    config = write_config(
        tmp_path / "config.yaml",
        method="self_forcing",
        height=32,
        width=32,
        denoising_step_list=[1000, 500],
    )
    setup = Setup.of(
        load_config(config, ["merge_clean_pass=false"]), sizes=DiTConfig.from_dict(TINY_DIT)
    )
    counts = {"window": {"tflop": 4, "moved": 1}, "clean": {"tflop": 2, "moved": 2}}
    found = predict(setup, counts, {"tflop": 3, "moved": 1}, RATES)
    assert found.windows == 2
    assert found.window == pytest.approx(3, rel=1e-3)  # attention of tiny sizes is next to nothing
    assert found.clean == pytest.approx(3, rel=1e-3)
    assert found.decode == pytest.approx(4)
    assert found.frames == 12
    assert found.copy == pytest.approx(12 * 32 * 32 * 3 / 1000)
    assert found.block == pytest.approx(found.dit + found.decode + found.copy)
    assert (found.dit_limit, found.limit) == pytest.approx((2.5, 3.25))


def test_the_table_names_itself_predicted(capsys):
    assert run_main(main, []) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("| predicted, one H200 |")
    assert {line.count("|") for line in said} == {9}
    assert len(said) >= 5
    assert any(", compiled |" in line for line in said)
