"""Processes that are copies of this one: they start at once, with everything imported."""

import os
import signal
import socket
import time
import traceback
from collections.abc import Callable


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as held:
        return held.getsockname()[1]


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
