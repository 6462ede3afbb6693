"""Ranks that fit every recipe; runs side by side, and how they end."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from utils import processes
from utils.config import ROOT, load_config
from utils.errors import UserError
from utils.processes import (
    final_export,
    run_together,
    script_command,
    split_batch,
    training_command,
)

SIXTEEN = ["total_batch_size=16"]


def test_a_batch_of_the_user_stays_where_it_fits() -> None:
    path = ROOT / "configs" / "teacher_finetune.yaml"
    config = load_config(path, [*SIXTEEN, "batch_size=4"])
    assert split_batch(config, 2) == (2, 4)
    assert split_batch(config, 3) == (2, 4)
    assert split_batch(config, 16) == (16, 1)
    command = training_command(config, path, Path("logs"), ["batch_size=4", "lr=1"], 2)
    assert command[-4:] == ("batch_size=4", "lr=1", "batch_size=4", "global_batch_size=16")
    assert "--nproc_per_node=2" in command


def test_accumulation_alone_makes_the_same_update_on_any_number_of_processes() -> None:
    path = ROOT / "configs" / "teacher_finetune.yaml"
    given = ["total_batch_size=null", "batch_size=4", "gradient_accumulation_steps=4"]
    config = load_config(path, given)
    for count in (1, 2):
        assert training_command(config, path, Path("logs"), given, count)[-1] == (
            "global_batch_size=16"
        )


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
    """Each waits for the other's file: one after the other they would fail."""
    script = (
        "import pathlib, sys, time\n"
        "mine, other = map(pathlib.Path, sys.argv[1:])\n"
        "mine.touch()\n"
        "end = time.monotonic() + 60\n"
        "while not other.exists():\n"
        "    time.sleep(0.01)\n"
        "    if time.monotonic() > end: raise SystemExit(4)\n"
    )
    one, two = tmp_path / "one", tmp_path / "two"
    wait = [sys.executable, "-c", script]
    run_together({"a": [*wait, str(one), str(two)], "b": [*wait, str(two), str(one)]})
    never, begun = [*wait, str(tmp_path / "c"), str(tmp_path / "never")], time.monotonic()
    commands = {"counting": [sys.executable, "-c", "raise SystemExit(3)"], "never": never}
    for order in (1, -1):
        with pytest.raises(UserError, match="counting failed with exit code 3"):
            run_together({name: commands[name] for name in list(commands)[::order]})
    assert time.monotonic() - begun < 50


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


def test_each_has_its_share_of_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(processes, "usable_cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    script = "import os, sys; open(sys.argv[1], 'w').write(os.environ['OMP_NUM_THREADS'])"

    def shares(count: int, **options: int) -> list[str]:
        paths = [tmp_path / str(number) for number in range(count)]
        words = [sys.executable, "-c", script]
        run_together({p.name: [*words, str(p)] for p in paths}, **options)
        return [path.read_text() for path in paths]

    assert shares(1) == ["8"]
    assert shares(3) == ["2"] * 3
    assert shares(3, at_most=2) == ["4"] * 3


def test_who_asks_us_to_end_asks_the_commands(tmp_path: Path):
    """A training saves its state when it is asked to end, so it has to hear of it."""
    script = (
        "import pathlib, signal, sys, time\n"
        "ready, ended = map(pathlib.Path, sys.argv[1:])\n"
        "signal.signal(signal.SIGTERM, lambda *_: (ended.touch(), sys.exit(0)))\n"
        "ready.touch()\n"
        "time.sleep(60)\n"
    )
    ready, ended = ([tmp_path / f"{what}{i}" for i in range(2)] for what in ("ready", "ended"))
    before = signal.getsignal(signal.SIGTERM)
    over = threading.Event()

    def ask() -> None:
        while not all(path.exists() for path in ready) and not over.wait(0.01):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    asking = threading.Thread(target=ask)
    asking.start()
    start = [sys.executable, "-c", script]
    try:
        with pytest.raises(KeyboardInterrupt):
            run_together(
                {r.name: [*start, str(r), str(e)] for r, e in zip(ready, ended, strict=True)}
            )
    finally:
        over.set()
        asking.join()
    assert all(path.exists() for path in ended)
    assert signal.getsignal(signal.SIGTERM) is before
