"""A rank that waits for ever says for whom, and ends: a limit to what the others may take."""

import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from trainer.sharding import World

logger = logging.getLogger(__name__)

BEATS = 20  # of a rank within the time limit
LONGEST_BEAT = 5.0  # seconds
LOST = 1  # exit code
_OF_A_COLLECTIVE = re.compile(r"gloo|nccl|connection (was )?(closed|reset)", re.IGNORECASE)


class LostRanksError(RuntimeError):
    """A collective failed: another rank has died."""


def is_of_a_collective(error: BaseException) -> bool:
    """Whether an error is of ranks that no longer reach each other."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and bool(_OF_A_COLLECTIVE.search(str(error)))


def end_alone(sentence: str) -> NoReturn:
    """End this process at once: what it would clean up waits for ranks that do not answer."""
    sys.stderr.write(f"{sentence}\n")
    sys.stderr.flush()
    os._exit(LOST)


@dataclass(frozen=True)
class Place:
    """Where a rank is: how many places it has passed, and in words."""

    passed: int
    words: str

    @classmethod
    def parse(cls, text: str) -> "Place":
        """From what a rank told."""
        _, passed, words = text.split(" ", 2)
        return cls(int(passed), words)


class Watch:
    """Tells the other ranks where this one is, and ends it when it stands still for too long.

    A thread of its own, so that neither a GPU that waits for a dead one nor a blocked socket keeps
    it from speaking. `place` is asked for the rank's position; `otherwise` says what is left then.
    """

    def __init__(
        self, world: World, place: Callable[[], Place], otherwise: Callable[[], str]
    ) -> None:
        self._world = world
        self._place = place
        self._otherwise = otherwise
        self._ended = threading.Event()
        self._beats = 0

    def begin(self) -> None:
        """Watch from now on; with one rank there is nobody to wait for."""
        if self._world.size > 1:
            # a connection of its own: a wait on the shared one would keep others from it
            self._store = _get_default_store().clone()  # type: ignore[attr-defined]
            threading.Thread(target=self._run, name="watch", daemon=True).start()

    def end(self) -> None:
        """Watch no longer."""
        self._ended.set()

    def _run(self) -> None:
        last, since = self._place(), time.monotonic()
        try:
            while not self._ended.wait(self._beat):
                self._tell()
                place, now = self._place(), time.monotonic()
                if place != last:
                    last, since = place, now
                elif now - since > self._world.limit:
                    self._end(last, now - since)
        except dist.DistError as error:  # the main rank's machine is gone, or we are at the end
            if not self._ended.wait(self._beat):
                logger.warning("rank %d watches no longer: %s", self._world.ranks.rank, error)

    @property
    def _beat(self) -> float:
        return min(LONGEST_BEAT, self._world.limit / BEATS)

    def _tell(self) -> None:
        self._beats += 1
        place = self._place()
        self._store.set(
            f"place/{self._world.ranks.rank}", f"{self._beats} {place.passed} {place.words}"
        )

    def _end(self, place: Place, seconds: float) -> None:
        """Say who is missing and end this process: nothing else ends a collective."""
        first = self._heard()
        for _ in range(3):
            time.sleep(self._beat)
            self._tell()
        second = self._heard()
        who = missing(first, second, self._world.ranks.rank)
        end_alone(
            f"stopped: rank {self._world.ranks.rank} has stood in {place.words} for {seconds:.0f} s"
            f"{f', waiting for {who}' if who else ''}; {self._otherwise()} "
            "(collective_timeout gives the others more time)"
        )

    def _heard(self) -> dict[int, str]:
        """What every rank told last."""
        keys = {rank: f"place/{rank}" for rank in range(self._world.size)}
        told = {rank: key for rank, key in keys.items() if self._store.check([key])}
        return {rank: self._store.get(key).decode() for rank, key in told.items()}


def missing(first: dict[int, str], second: dict[int, str], own: int) -> str:
    """Which ranks the others wait for, in words: the silent ones, else those furthest behind."""
    silent = [rank for rank in second if rank != own and first.get(rank) == second[rank]]
    places = {rank: Place.parse(text) for rank, text in second.items()}
    if silent:
        return " and ".join(
            f"rank {rank}, silent since {places[rank].words}" for rank in sorted(silent)[:4]
        )
    fewest = min(place.passed for place in places.values())
    if fewest == places[own].passed:
        return ""
    behind = [rank for rank, place in sorted(places.items()) if place.passed == fewest]
    return " and ".join(f"rank {rank}, which is in {places[rank].words}" for rank in behind[:4])
