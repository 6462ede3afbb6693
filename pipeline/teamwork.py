"""Streams that several ranks make together: the first rank leads, the others do as it says.

Whoever makes videos (a batch, a server) runs on the leader alone, with text encoder, VAE and files,
and knows nothing of the others. They hold the generator and their part of each stream's cache, and
`follow`: what changes a `LatentStream` of the leader is told to them before it is done there. All
ranks draw the same noise and run the same passes, so that nothing else has to be sent.
"""

import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from itertools import count
from threading import RLock
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from pipeline.changes import Change
from pipeline.setup import Setup
from pipeline.stream import Beginning, LatentStream
from utils.devices import choose_device
from utils.distributed import Ranks, open_team
from utils.errors import UserError
from wan.dit import WanDiT
from wan.kv_cache import LayerStore
from wan.parallel import Exchange, Share

if TYPE_CHECKING:
    from pipeline.text_to_video import VideoPipeline

HEADS = LayerStore._fields  # of the state of a cache


class Team(Exchange, Protocol):
    """Ranks that make one stream (see `utils.distributed.Team`)."""

    @property
    def leads(self) -> bool:
        """Whether this rank says what is done."""
        ...

    def tell(self, word: Any) -> None:
        """Of the leader: plain values and tensors on the CPU, for the others to `hear`."""
        ...

    def hear(self) -> Any:
        """Of the others: what the leader tells next."""
        ...

    def answered(self) -> AbstractContextManager[None]:
        """UserError where another rank does not take part within."""
        ...


class Word(NamedTuple):
    """What the leader tells: a verb of one of its streams; streams that it has let go of."""

    verb: str
    stream: int
    arguments: tuple[Any, ...]
    named: dict[str, Any]
    dropped: tuple[int, ...]


class Teamwork:
    """What a rank does in its team. On the leader any thread may use it, one at a time.

    An error within common work leaves the ranks at different places: it ends the team, and
    `when_lost` is called.
    """

    def __init__(self, team: Team) -> None:
        self.team = team
        self.share = Share(team)
        self.lost = False
        self.when_lost: Callable[[], object] = lambda: None
        self._numbers = count()
        self._dropped: deque[int] = deque()
        self._lock = RLock()

    @property
    def leads(self) -> bool:
        """Whether this rank says what is done."""
        return self.team.leads

    # --- the leader ------------------------------------------------------------------------------

    def load(self) -> None:
        """The others load their networks now, too."""
        with self.together("load"):
            pass

    def led(self, setup: Setup, dit: WanDiT, begin: Beginning) -> "LedStream":
        """A stream that all ranks of the team make."""
        number = next(self._numbers)
        stream = LedStream.open(setup, dit, begin)
        stream.together = partial(self.together, stream=number)
        with self.together("open", setup, begin, stream=number):
            weakref.finalize(stream, self._dropped.append, number)
        return stream

    @contextmanager
    def together(
        self, verb: str, *arguments: Any, stream: int = -1, **named: Any
    ) -> Iterator[None]:
        """Tell the others to do what is done within; UserError once a rank does not answer."""
        with self._lock:
            if self.lost:
                raise UserError("the ranks of this stream have ended: start again")
            try:
                with self.team.answered():
                    dropped = tuple(self._dropped.popleft() for _ in range(len(self._dropped)))
                    self.team.tell(
                        Word(verb, stream, _moved(arguments, "cpu"), _moved(named, "cpu"), dropped)
                    )
                    yield
            except BaseException:
                self.lost = True
                self.when_lost()
                raise

    def end(self) -> None:
        """Let the others go, if they are still there."""
        with self._lock:
            if not self.lost:
                with self.together("end"):
                    self.lost = True

    @contextmanager
    def leading(self) -> Iterator[None]:
        """Lead within, then let the others go."""
        try:
            yield
        except BaseException:
            with suppress(UserError):
                self.end()
            raise
        self.end()

    # --- the others ------------------------------------------------------------------------------

    def follow(self, load: Callable[[], "VideoPipeline"]) -> None:
        """Do what the leader says until it ends; `load` gives the networks.

        UserError if the leader ends without a word.
        """
        dit: WanDiT | None = None
        streams: dict[int, LatentStream] = {}
        with self.team.answered():
            while (word := self._heard()).verb != "end":
                for number in word.dropped:
                    del streams[number]
                if dit is None:
                    dit = load().dit
                    dit.share = self.share
                arguments, named = _moved((word.arguments, word.named), dit.device)
                if word.verb == "open":
                    setup, begin = arguments
                    streams[word.stream] = LatentStream.open(setup, dit, begin)
                elif word.verb != "load":
                    getattr(streams[word.stream], word.verb)(*arguments, **named)

    def _heard(self) -> Word:
        word = self.team.hear()
        assert isinstance(word, Word)
        return word


class LedStream(LatentStream):
    """The leader's own part of a stream: what changes it is done by all ranks."""

    together: Callable[..., AbstractContextManager[None]]
    """See `Teamwork`, of this stream."""

    def advance(self) -> dict[int, Tensor] | None:
        """See `LatentStream`."""
        with self.together("advance"):
            return super().advance()

    def rehearse(self) -> None:
        """See `LatentStream`."""
        with self.together("rehearse"):
            super().rehearse()

    def add(self, text: Tensor | None, **change: Any) -> Change:
        """See `LatentStream`; what is refused here is not told."""
        added = super().add(text, **change)
        with self.together("add", text, **change):
            return added

    def rebuild(self) -> None:
        """See `LatentStream`."""
        with self.together("rebuild"):
            super().rebuild()

    def state_dict(self, *, latents_only: bool = False) -> dict[str, Any]:
        """See `LatentStream`: that of one rank alone. What is latents only is here already."""
        if latents_only:
            return super().state_dict(latents_only=True)
        with self.together("state_dict"):
            return super().state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `LatentStream`; keys and values go to whom their heads belong."""
        self.rollout.check_state(state["rollout"])
        cache = {
            name: None if name in HEADS else x for name, x in state["rollout"]["cache"].items()
        }
        told = {**state, "rollout": {**state["rollout"], "cache": cache}}
        with self.together("load_state_dict", told):
            super().load_state_dict(state)


def _moved(value: Any, device: torch.device | str) -> Any:
    """The same with all tensors on `device`."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [_moved(item, device) for item in value]
        return Beginning(*items) if isinstance(value, Beginning) else type(value)(items)
    return value


def in_team(
    ranks: Ranks,
    size: int,
    device: str,
    lead: Callable[[Teamwork | None], object],
    load: Callable[[Teamwork], "VideoPipeline"],
) -> None:
    """Run `lead` on the first rank of each team of `size`; the others follow it.

    `load` gives their networks. With teams of one every rank leads none.
    """
    with open_team(ranks, size, choose_device(device)) as team:
        if team is None:
            lead(None)
            return
        teamwork = Teamwork(team)
        if not team.leads:
            teamwork.follow(partial(load, teamwork))
            return
        with teamwork.leading():
            lead(teamwork)


def check_team(setup: Setup, teamwork: Teamwork | None) -> None:
    """UserError for a setup whose streams are to be made by more ranks than there are."""
    wanted = setup.machine.sequence_parallel
    if wanted != (1 if teamwork is None else teamwork.share.size):
        raise UserError(
            f"sequence_parallel={wanted} is for inference.py and app.py under torchrun "
            f"--nproc_per_node={wanted}; set it to 1 here"
        )
