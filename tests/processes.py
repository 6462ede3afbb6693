"""Processes that are copies of this one: they start at once, with everything imported."""

import os
import signal
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as held:
        return held.getsockname()[1]


@contextmanager
def store_of_ranks() -> Iterator[dict[str, str]]:
    """Environment variables by which ranks meet at a store of this process, as at torchrun's.

    For them a free port would not do: it may be another test's by the time they listen on it.
    """
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    yield {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    del store


def in_a_copy(work: Callable[[], object], timeout: float = 120) -> int:
    """The exit code of a copy of this process that does `work`: 0, 1 after an error, -9 if killed.

    What it says goes where this process says it; nothing that it changes in memory comes back.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    deadline = time.monotonic() + timeout
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.005)


def kill_this_process() -> None:
    """As the system does, at any moment: nothing is cleaned up."""
    os.kill(os.getpid(), signal.SIGKILL)
