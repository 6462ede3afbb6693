"""Ranks for tests: copies of this process, which meet on one machine as on several nodes."""

import os
import pickle
import signal
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch.distributed as dist

from trainer.sharding import World, open_world

SECONDS = 60  # that a rank lives at most


def on_ranks(size: int, work: Callable[[World], Any], *, nodes: int = 1) -> list[Any]:
    """What `work` gives on each of `size` ranks, or what it raises there.

    None where a rank has not ended in time: it is killed. Autograd does not work in a copy of a
    process that has used it, so `work` trains nothing.
    """
    # Served here, as by torchrun: a port that is only chosen may be another test's by then.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with TemporaryDirectory() as folder:
        files = [Path(folder) / str(rank) for rank in range(size)]
        children = []
        for rank, file in enumerate(files):
            children.append(os.fork())
            if children[-1] == 0:
                local = size // nodes
                os.environ |= {
                    "RANK": str(rank),
                    "WORLD_SIZE": str(size),
                    "LOCAL_RANK": str(rank % local),
                    "LOCAL_WORLD_SIZE": str(local),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(store.port),
                    "TORCHELASTIC_USE_AGENT_STORE": "True",
                    "TORCHELASTIC_RESTART_COUNT": "0",
                }
                _be_a_rank(work, file)
        for child in children:
            os.waitpid(child, 0)
        return [pickle.loads(file.read_bytes()) if file.exists() else None for file in files]


def _be_a_rank(work: Callable[[World], Any], file: Path) -> None:
    """In a copy of this process, which does not come back."""
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # a handler in Python would wait, too
        signal.alarm(SECONDS)
        with open_world("cpu") as world:
            try:
                given = work(world)
            except BaseException as error:
                given = error
            file.write_bytes(pickle.dumps(given))
    finally:
        os._exit(0)
