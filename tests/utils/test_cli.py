"""Command lines, the environment of ranks, and how soon a mistake is told."""

import argparse
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from utils.cli import UNREAD, parse_command, run_main
from utils.config import ROOT
from utils.distributed import Ranks
from utils.errors import UserError


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(allow_abbrev=False)
    made.add_argument("--seed", type=int)
    made.add_argument("--only", nargs="+")
    made.add_argument("overrides", nargs="*")
    return made


@pytest.mark.parametrize(
    "words",
    [
        ["a=1", "--seed", "2", "b=3"],
        ["--", "--seed", "2", "a=1", "b=3"],
        ["a=1", "b=3", "--", "--seed", "2"],
        ["--", "a=1", "--seed", "2", "b=3"],
        ["--seed", "2", "--", "a=1", "b=3"],
    ],
)
def test_overrides_stand_between_flags(words: list[str]) -> None:
    """`a=1 --seed 2 b=3` was told "unrecognized arguments: b=3"."""
    args = parse_command(parser(), words)
    assert (args.seed, args.overrides) == (2, ["a=1", "b=3"])


def test_a_separator_ends_a_flag_of_several_words() -> None:
    args = parse_command(parser(), ["--only", "x", "y", "--", "a=1"])
    assert (args.only, args.overrides) == (["x", "y"], ["a=1"])
    assert parse_command(parser(), []).overrides == []


def test_an_unknown_flag_is_named_without_the_overrides(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_command(parser(), ["a=1", "--sed=2", "b=3"])
    assert capsys.readouterr().err.endswith("unrecognized arguments: --sed=2\n")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 1, 0)),
        ({"WORLD_SIZE": "1"}, (0, 1, 0)),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, (1, 2, 1)),
        ({"WORLD_SIZE": "2"}, "no number as RANK: start several ranks with torchrun"),
        ({"RANK": "0"}, "no number as WORLD_SIZE"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "no number as RANK"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 is not below WORLD_SIZE=2"),
    ],
)
def test_ranks_of_an_environment(
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    expected: tuple[int, int, int] | str,
) -> None:
    """WORLD_SIZE=2 without torchrun ended in a traceback, or in two runs that were one."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            Ranks.from_environment()
    else:
        assert Ranks.from_environment() == Ranks(*expected)


def test_a_configuration_is_read_without_torch() -> None:
    """What takes seconds to import is no part of refusing a wrong key."""
    program = (
        "import sys, utils.config\n"
        "try: utils.config.load_config('configs/rolling_forcing_dmd.yaml', ['heigth=3'])\n"
        "except utils.config.UserError as error: print('torch' in sys.modules, error)"
    )
    said = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert said.startswith("False rolling_forcing_dmd.yaml: unknown key 'heigth'")


@pytest.mark.parametrize("lines", [1, 100_000], ids=["at_the_end", "on_the_way"])
def test_a_reader_that_has_gone_is_no_mistake(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], lines: int
) -> None:
    """`download.py --list | head -1` ended in a traceback."""
    reader, writer = os.pipe()
    os.close(reader)
    with io.TextIOWrapper(os.fdopen(writer, "wb")) as unread:
        monkeypatch.setattr(sys, "stdout", unread)
        assert run_main(lambda argv: sys.stdout.write("line\n" * lines), []) == UNREAD
    assert capfd.readouterr().err == ""


def test_what_the_system_refuses_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    """A name too long, a working directory that has gone, a full disk behind stdout."""
    assert run_main(lambda argv: len(Path("x" * 300).read_text()), []) == 2
    assert capsys.readouterr().err == f"error: {'x' * 300}: file name too long\n"
    with pytest.raises(OSError, match="of a library"):
        run_main(lambda argv: (_ for _ in ()).throw(OSError("of a library")), [])
