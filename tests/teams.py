"""Teams of ranks for tests: this process leads, copies of it follow."""

import os
import signal
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.teamwork import Teamwork, in_team
from utils.distributed import Ranks
from wan.dit import WanDiT

SECONDS = 60  # that a team lives at most


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as held:
        return held.getsockname()[1]


@contextmanager
def leading(size: int, load: Callable[[], WanDiT]) -> Iterator[Teamwork]:
    """Lead a team of `size` gloo ranks, whose network `load` gives; all end normally after it."""
    followers: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MASTER_ADDR", "127.0.0.1")
        patch.setenv("MASTER_PORT", str(free_port()))
        for rank in range(1, size):
            followers.append(os.fork())
            if followers[-1] == 0:
                _follow(rank, size, load)
        try:
            with led(size) as teamwork:
                yield teamwork
            assert [ended(pid) for pid in followers] == [0] * len(followers)
            followers.clear()
        finally:
            for pid in followers:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


@contextmanager
def led(size: int) -> Iterator[Teamwork]:
    """The leader's side alone."""
    from utils.distributed import open_team

    with open_team(Ranks(0, size, 0), size, _cpu()) as team:
        assert team is not None
        teamwork = Teamwork(team)
        with teamwork.leading():
            yield teamwork


def _cpu() -> Any:
    import torch

    return torch.device("cpu")


def _follow(rank: int, size: int, load: Callable[[], WanDiT]) -> None:
    """In a copy of this process, which does not come back."""
    code = 1
    try:
        signal.alarm(SECONDS)
        in_team(
            Ranks(rank, size, rank),
            size,
            "cpu",
            lead=lambda _: None,
            load=lambda _: SimpleNamespace(dit=load()),  # type: ignore[arg-type, return-value]
        )
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def ended(pid: int) -> int:
    """The exit code of a follower that is about to end."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    raise TimeoutError(f"rank {pid} does not end")
