"""How far a client has played, and whether the next block may be made: plain arithmetic on times.

All times are in seconds: of the video (`played`, `sent`, `made`), or of a clock that is passed in.
"""

from dataclasses import dataclass

SILENCE = 5.0
"""A client that says nothing of its playhead for so long does not watch any more."""


@dataclass
class Playback:
    """What is known of one client's player; a client that (re)attaches gets a new one.

    `heard_at`: the clock when the client last said where it is (at first: when it came).
    """

    played: float
    heard_at: float
    hidden: bool = False

    def hear(self, seconds: float, *, sent: float, now: float) -> None:
        """The client has played up to `seconds`; ValueError where that is behind what it said.

        More than was `sent` to it cannot have been played and is cut to that.
        """
        if seconds < self.played:
            raise ValueError(f"the playhead went back from {self.played:g} to {seconds:g} s")
        self.played = max(self.played, min(seconds, sent))
        self.heard_at = now

    def watches(self, now: float) -> bool:
        """Whether somebody is looking."""
        return not self.hidden and now - self.heard_at < SILENCE

    def wants(self, made: float, *, block: float, takes: float, lead: float, now: float) -> bool:
        """Whether to begin a block of `block` seconds that `takes` so long to make.

        When it is there, and was played meanwhile, no more than `lead` lies ahead of the player;
        one block always may.
        """
        ahead = made - self.played
        return self.watches(now) and (ahead + block - min(takes, block) <= lead or ahead <= 0)


@dataclass
class Pace:
    """How long a block takes from the wish for it to its frames: a running mean."""

    seconds: float = 0.0
    frames_per_second: float = 0.0

    def add(self, seconds: float, frames: int) -> None:
        """One more block of so many frames."""
        rate = frames / max(seconds, 1e-6)
        first = self.frames_per_second == 0
        self.seconds = seconds if first else 0.7 * self.seconds + 0.3 * seconds
        self.frames_per_second = rate if first else 0.7 * self.frames_per_second + 0.3 * rate


class Bucket:
    """A rate that is kept on average: `rate` tokens a second, `size` saved at most."""

    def __init__(self, rate: float, size: float, now: float) -> None:
        self.rate, self.size = rate, size
        self._tokens, self._at = size, now

    def take(self, now: float) -> bool:
        """Whether there was a token."""
        self._tokens = min(self.size, self._tokens + self.rate * max(0.0, now - self._at))
        self._at = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True
