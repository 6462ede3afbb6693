"""Teams of ranks for tests: this process leads, copies of it follow."""

import json
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from pipeline.teamwork import Teamwork, in_team
from tests.processes import store_of_ranks
from utils.distributed import Ranks, open_team
from wan.dit import WanDiT

SECONDS = 100  # that a follower lives at most


@contextmanager
def team_of(size: int, load: Callable[[], WanDiT]) -> Iterator[Teamwork]:
    """Lead `size` ranks, the others with the network that `load` gives; all of them end after it.

    Whether they ended normally is in `ends`, an attribute of what is given.
    """
    # Copied before the store opens: a lock that its new thread holds would stay held in the copy.
    followers = dict(_start(rank, size, load) for rank in range(1, size))
    with pytest.MonkeyPatch.context() as patch, store_of_ranks() as address:
        for name, value in address.items():
            patch.setenv(name, value)
        for told in followers.values():
            with os.fdopen(told, "w") as file:
                print(json.dumps(address), file=file)
        try:
            with open_team(Ranks(0, size, 0), size, torch.device("cpu")) as team:
                assert team is not None
                teamwork = Teamwork(team)
                teamwork.ends = lambda: [ended(pid) for pid in followers]  # type: ignore[attr-defined]
                with teamwork.leading():
                    yield teamwork
        finally:
            for pid in followers:
                ended(pid)


def _start(rank: int, size: int, load: Callable[[], WanDiT]) -> tuple[int, int]:
    """A follower, and where it has to be told the address of the store."""
    told, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(tell)
        _follow(rank, size, load, told)
    os.close(told)
    return pid, tell


def _follow(rank: int, size: int, load: Callable[[], WanDiT], told: int) -> None:
    """In a copy of this process, which does not come back."""
    code = 1
    try:
        signal.alarm(SECONDS)
        with os.fdopen(told) as file:
            os.environ.update(json.loads(file.readline()))  # later copies hold its other end
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


_CODES: dict[int, int] = {}


def ended(pid: int) -> int:
    """The exit code of a follower that is about to end; it is made to, if it does not."""
    deadline = time.monotonic() + 10
    while pid not in _CODES:
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            _CODES[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return _CODES[pid]
