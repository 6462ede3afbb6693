"""Ranks that fit every recipe; how runs end. Signals: tests of the scripts that use it."""

import sys
import time
from pathlib import Path

import pytest

from utils.config import ROOT, load_config
from utils.errors import UserError
from utils.launch import final_export, run_together, script_command, split_batch, training_command

TRAINED = [
    path for path in sorted((ROOT / "configs" / "shapes").glob("*.yaml")) if path.stem != "base"
]


@pytest.mark.parametrize("processes", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("path", TRAINED, ids=lambda path: path.stem)
def test_the_videos_per_update_are_the_same_on_any_number_of_processes(
    path: Path, processes: int
) -> None:
    config = load_config(path, ())
    ranks, batch = split_batch(config, processes)
    assert 1 <= ranks <= processes
    assert 1 <= batch <= config.batch_size
    assert config.total_batch_size is not None
    assert config.total_batch_size % (ranks * batch) == 0


def test_a_batch_of_the_user_stays_where_it_fits() -> None:
    path = ROOT / "configs" / "shapes" / "teacher.yaml"
    config = load_config(path, ["batch_size=4"])
    assert split_batch(config, 2) == (2, 4)
    assert split_batch(config, 3) == (2, 4)
    assert split_batch(config, 16) == (16, 1)
    command = training_command(config, path, Path("logs"), ["batch_size=4", "lr=1"], 2)
    assert command[-3:] == ("batch_size=4", "lr=1", "batch_size=4")
    assert "--nproc_per_node=2" in command


def test_one_process_needs_no_torchrun() -> None:
    assert script_command("train.py", ["a", 1])[1:] == (str(ROOT / "train.py"), "a", "1")


def test_a_run_has_ended_where_its_last_export_says_so(tmp_path: Path) -> None:
    assert final_export(tmp_path, 10) is None
    for name in ("checkpoint_model_000009", "checkpoint_model_000010.partial"):
        (tmp_path / name).mkdir()
    assert final_export(tmp_path, 10) is None
    (tmp_path / "checkpoint_model_000012").mkdir()
    assert final_export(tmp_path, 10) == tmp_path / "checkpoint_model_000012"


def test_of_commands_side_by_side_one_that_fails_ends_the_others(tmp_path: Path):
    """Each waits for the other's file: one after the other they would never end."""
    script = (
        "import pathlib, sys, time\n"
        "mine, other = map(pathlib.Path, sys.argv[1:])\n"
        "mine.touch()\n"
        "while not other.exists(): time.sleep(0.01)\n"
    )
    one, two = tmp_path / "one", tmp_path / "two"
    wait = [sys.executable, "-c", script]
    run_together({"a": [*wait, str(one), str(two)], "b": [*wait, str(two), str(one)]})
    never, begun = [*wait, str(tmp_path / "c"), str(tmp_path / "never")], time.monotonic()
    commands = {"counting": [sys.executable, "-c", "raise SystemExit(3)"], "never": never}
    for order in (1, -1):
        with pytest.raises(UserError, match="counting failed with exit code 3"):
            run_together({name: commands[name] for name in list(commands)[::order]})
    assert time.monotonic() - begun < 30


def test_no_more_commands_at_once_than_asked_for(tmp_path: Path):
    """Each fails if it finds another at work."""
    script = (
        "import pathlib, sys, time\n"
        "lock = pathlib.Path(sys.argv[1])\n"
        "lock.mkdir()\n"
        "time.sleep(0.1)\n"
        "lock.rmdir()\n"
        "pathlib.Path(sys.argv[2]).touch()\n"
    )
    one = [sys.executable, "-c", script, str(tmp_path / "lock")]
    run_together({name: [*one, str(tmp_path / name)] for name in "abc"}, at_most=1)
    assert all((tmp_path / name).exists() for name in "abc")
