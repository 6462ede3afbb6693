"""The stage of the check of a GPU machine that trains in the shapes world."""

import json
from pathlib import Path

import pytest

from scripts import _gpu_stages as gpu_stages
from utils.cli import run_main


@pytest.mark.slow
def test_sharded_training_gives_figures(tmp_path: Path) -> None:
    """On the CPU both trainings are run as they are on a GPU."""
    file = tmp_path / "out.json"
    words = ["sharded", "--config_path", "configs/shapes/rolling_forcing.yaml", "--device", "cpu"]
    assert run_main(gpu_stages.main, [*words, "--json", str(file)]) == 0
    updates = json.loads(file.read_text())["updates"]
    assert {name: len(found) for name, found in updates.items()} == dict.fromkeys(
        ("dmd", "ode"), gpu_stages.UPDATES
    )
