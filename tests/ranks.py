"""Ranks for tests: new processes, which meet on one machine as on several nodes."""

import faulthandler
import multiprocessing
import os
import pickle
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from tests.processes import store_of_ranks
from trainer.sharding import World, open_world

SECONDS = 60  # that a rank lives at most

# Not copies of this process: what other tests left in it (threads, groups) would end or hang them.
_SERVER: ForkServerContext = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["tests.ranks", "tests.tiny_training"])


def on_ranks(size: int, work: Callable[[World], Any], *, nodes: int = 1) -> list[Any]:
    """What `work`, which can be pickled, gives on each of `size` ranks, or what it raises there.

    ChildProcessError, with exit codes and where ranks were, if one has not ended in time.
    """
    with TemporaryDirectory() as folder, store_of_ranks() as address:
        files = [Path(folder) / str(rank) for rank in range(size)]
        local = size // nodes
        ranks = []
        for rank, file in enumerate(files):
            variables = {
                "RANK": str(rank),
                "WORLD_SIZE": str(size),
                "LOCAL_RANK": str(rank % local),
                "LOCAL_WORLD_SIZE": str(local),
            }
            ranks.append(_SERVER.Process(target=_be_a_rank, args=(work, variables | address, file)))
            ranks[-1].start()
        for process in ranks:
            process.join(SECONDS + 30)
            process.kill()
            process.join()
        if not all(file.exists() for file in files):
            texts = [file.with_suffix(".txt") for file in files]
            places = [text.read_text(encoding="utf-8") for text in texts if text.exists()]
            raise ChildProcessError("\n".join([str([p.exitcode for p in ranks]), *places]))
        return [pickle.loads(file.read_bytes()) for file in files]


def _be_a_rank(work: Callable[[World], Any], variables: dict[str, str], file: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= variables
    with file.with_suffix(".txt").open("w", encoding="utf-8") as places:
        faulthandler.dump_traceback_later(SECONDS, exit=True, file=places)
        try:
            with open_world("cpu") as world:
                given = pickle.dumps(work(world))
        except BaseException as error:
            given = pickle.dumps(error)
        file.write_bytes(given)
        faulthandler.cancel_dump_traceback_later()
