"""Checkpoints by name bring the settings that they were made for."""

import logging
from pathlib import Path

import pytest

import inference
from tests.golden_cases import load_json
from utils.config import Config, load_config, to_dict
from utils.errors import UserError
from utils.families import FAMILIES, fetched_checkpoint, warn_of_other_settings

LEVELS = {4: [1000, 750, 500, 250], 5: [1000, 800, 600, 400, 200]}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_its_levels_and_blocks(name: str) -> None:
    config = FAMILIES[name].load_config()
    assert config.denoising_step_list == LEVELS[5 if name == "rolling-forcing" else 4]
    assert (config.num_frame_per_block, config.warp_denoising_step) == (3, True)
    assert config.generator_shift == 5.0
    assert FAMILIES[name].sources


@pytest.mark.golden
def test_families_agree_with_the_published_files() -> None:
    published = load_json("published_configs")
    names = {"rolling-forcing": "rolling_forcing_dmd", "self-forcing": "self_forcing_dmd"}
    names["infinite-forcing"] = "self_forcing_dmd_vsink1"
    for name, file in names.items():
        config, values = FAMILIES[name].load_config(), published[file]["file"]
        for key in ("denoising_step_list", "warp_denoising_step", "num_frame_per_block"):
            assert vars(config)[key] == values[key]
        kwargs = {**vars(config.model_kwargs), "timestep_shift": config.generator_shift}
        assert kwargs.items() >= values["model_kwargs"].items()


def warned(caplog: pytest.LogCaptureFixture, config: Config, checkpoint: str) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        warn_of_other_settings(to_dict(config), Path(checkpoint))
    return caplog.messages


def test_weights_under_another_familys_levels_are_said(caplog: pytest.LogCaptureFixture) -> None:
    """A 4-step checkpoint under a 5-step config played badly without a word."""
    rolling = load_config("configs/rolling_forcing_dmd.yaml")
    (line,) = warned(caplog, rolling, "somewhere/self_forcing_dmd.pt")
    assert "1000.0, 750.0, 500.0, 250.0" in line
    assert line.endswith("use --model self-forcing")
    assert len(warned(caplog, rolling, "checkpoints/chunkwise/causal_forcing.pt")) == 1
    assert warned(caplog, rolling, "checkpoints/rolling_forcing_dmd.pt") == []
    assert warned(caplog, rolling, "checkpoints/my_student.pt") == []


def test_model_flag_gives_config_and_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["--model", "self-forcing", "height=320"]
    args = inference.build_parser().parse_args(flags)
    with pytest.raises(
        UserError, match=r"fetch it with `python scripts/download\.py self-forcing`"
    ):
        inference.fill_in_model(args)
    Path("checkpoints").mkdir()
    Path("checkpoints/self_forcing_dmd.pt").touch()
    inference.fill_in_model(args)
    assert args.config_path == "configs/self_forcing_dmd.yaml"
    assert args.checkpoint_path == "checkpoints/self_forcing_dmd.pt"
    assert args.overrides == ["height=320"]


def test_what_has_no_one_file_or_no_name() -> None:
    with pytest.raises(UserError, match="give one as --checkpoint_path"):
        fetched_checkpoint("infinite-forcing")
    with pytest.raises(UserError, match="known are rolling-forcing"):
        fetched_checkpoint("deep-forcing")
