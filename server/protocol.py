"""The messages: what a client may say, checked by type and bounds; what it is told.

docs/live.md has the table of both. Unknown fields are ignored, unknown types are an error.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from pipeline.changes import POLICIES, Policy
from utils.errors import UserError
from utils.prompts import check_text

Format = Literal["mp4", "jpeg"]
FORMATS: tuple[Format, ...] = get_args(Format)

LARGEST_MESSAGE = 2**16  # characters
LARGEST_SEED = 2**64 - 1
LARGEST_SINK = 1000
LARGEST_BLEND = 64  # blocks
LARGEST_ID = 64  # characters of a client's own id
LARGEST_NUMBER = 1e12
LONGEST = 24 * 3600.0  # seconds of a bounded video


class ProtocolError(Exception):
    """A message that cannot be obeyed; the client is told, and nothing else happens."""

    def __init__(self, code: str, message: str, id: str | None = None) -> None:
        super().__init__(message)
        self.code, self.id = code, id

    def reply(self) -> dict[str, Any]:
        """The `error` message."""
        own = {} if self.id is None else {"id": self.id}
        return {"type": "error", "code": self.code, "message": str(self), **own}


@dataclass(frozen=True)
class Start:
    """`session.start`: a new session, controlled by this socket."""

    prompt: str
    seed: int | None
    seconds: float | None
    format: Format | None
    policy: Policy
    sink: int | None = None


@dataclass(frozen=True)
class Attach:
    """`session.attach`: this socket takes over a session."""

    id: str
    from_seconds: float | None


@dataclass(frozen=True)
class Update:
    """`session.prompt_update`: another prompt, or seed, or both, from the next window on.

    `id` is the client's own; `policy` None: the one that the session was started with.
    """

    id: str
    prompt: str | None
    seed: int | None
    policy: Policy | None
    blend_blocks: int


@dataclass(frozen=True)
class Branch:
    """`session.branch`: a new session from a snapshot of this one."""

    snapshot: int
    prompt: str | None
    seed: int | None
    policy: Policy | None


@dataclass(frozen=True)
class Verb:
    """`session.pause`, `session.resume`, `session.stop`."""

    name: Literal["pause", "resume", "stop"]


@dataclass(frozen=True)
class Playhead:
    """`playhead`: how far the client has played."""

    seconds: float


@dataclass(frozen=True)
class Hidden:
    """`hidden`: whether the page is out of sight."""

    hidden: bool


Message = Start | Attach | Update | Branch | Verb | Playhead | Hidden


@dataclass(frozen=True)
class Limits:
    """Bounds of what a client may ask for."""

    max_prompt: int = 2000
    max_seconds: float | None = None


def parse(text: str, limits: Limits) -> Message:
    """The message in a JSON text; ProtocolError for anything else."""
    fields = _Fields(_read_object(text))
    kind = fields.values.get("type")
    if not isinstance(kind, str) or kind not in _READERS:
        shown = repr(kind)[:40]
        raise ProtocolError("unknown_type", f"there is no message {shown}", fields.own_id())
    return _READERS[kind](fields, limits)


def _read_object(text: str) -> Mapping[str, Any]:
    if len(text) > LARGEST_MESSAGE:
        raise ProtocolError(
            "too_large", f"a message may have {LARGEST_MESSAGE} characters, not {len(text)}"
        )
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ProtocolError("bad_json", "this is no JSON: send one object per message") from error
    if not isinstance(value, dict):
        raise ProtocolError("bad_json", "a message must be a JSON object with a type")
    return value


class _Fields:
    """The fields of a message, each read with its type."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values

    def own_id(self) -> str | None:
        """The message's id, for an error about it, if it has a sane one."""
        value = self.values.get("id")
        return value if isinstance(value, str) and 0 < len(value) <= LARGEST_ID else None

    def error(self, name: str, wanted: str) -> ProtocolError:
        """What is wrong with a field."""
        return ProtocolError("bad_field", f"{name} must be {wanted}", self.own_id())

    def number(self, name: str) -> float:
        """A finite number."""
        value = self.values.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(name, "a number")
        if not abs(value) < LARGEST_NUMBER:  # nor NaN; isfinite refuses large whole numbers
            raise self.error(name, "a finite number")
        return float(value)

    def whole(self, name: str, most: int) -> int:
        """A whole number from 0 on; also as a float without fraction, as JavaScript may have it."""
        value = self.values.get(name)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
            raise self.error(name, f"a whole number from 0 to {most}")
        return value

    def flag(self, name: str) -> bool:
        """True or false."""
        value = self.values.get(name)
        if not isinstance(value, bool):
            raise self.error(name, "true or false")
        return value

    def choice(self, name: str, words: tuple[Any, ...]) -> Any:
        """One of some words."""
        value = self.values.get(name)
        if not isinstance(value, str) or value not in words:
            raise self.error(name, f"one of {', '.join(words)}")
        return value

    def id(self) -> str:
        """An id."""
        if (own := self.own_id()) is None:
            raise self.error("id", f"a text of 1 to {LARGEST_ID} characters")
        return own

    def prompt(self, limits: Limits) -> str:
        """A text that can be encoded."""
        value = self.values.get("prompt")
        if not isinstance(value, str) or not value.strip():
            raise self.error("prompt", "a text that says what the video should show")
        if len(value) > limits.max_prompt:
            text = f"a prompt may have {limits.max_prompt} characters, not {len(value)}"
            raise ProtocolError("prompt_too_long", text, self.own_id())
        try:
            check_text(value)
        except UserError as error:
            raise ProtocolError("bad_field", str(error), self.own_id()) from error
        return value.strip()

    def maybe(self, name: str, read: Callable[[], Any]) -> Any:
        """What `read` gives, or None for a field that is missing or null."""
        return None if self.values.get(name) is None else read()

    def seed(self) -> int | None:
        """A seed, if there is one."""
        return self.maybe("seed", lambda: self.whole("seed", LARGEST_SEED))

    def policy(self) -> Policy | None:
        """A policy, if there is one."""
        return self.maybe("policy", lambda: self.choice("policy", POLICIES))


def _start(fields: _Fields, limits: Limits) -> Start:
    seconds = fields.maybe("seconds", lambda: fields.number("seconds"))
    longest = limits.max_seconds or LONGEST
    if seconds is not None and not 0 < seconds <= longest:
        raise fields.error("seconds", f"above 0 and at most {longest:g}, or null for no end")
    return Start(
        fields.prompt(limits),
        fields.seed(),
        limits.max_seconds if seconds is None else seconds,
        fields.maybe("format", lambda: fields.choice("format", FORMATS)),
        fields.policy() or "keep",
        fields.maybe("sink", lambda: fields.whole("sink", LARGEST_SINK)),
    )


def _attach(fields: _Fields, limits: Limits) -> Attach:
    seconds = fields.maybe("from_seconds", lambda: fields.number("from_seconds"))
    if seconds is not None and seconds < 0:
        raise fields.error("from_seconds", "0 or more")
    return Attach(fields.id(), seconds)


def _update(fields: _Fields, limits: Limits) -> Update:
    blend = "transition_duration_chunks"
    update = Update(
        fields.id(),
        fields.maybe("prompt", lambda: fields.prompt(limits)),
        fields.seed(),
        fields.policy(),
        fields.maybe(blend, lambda: fields.whole(blend, LARGEST_BLEND)) or 0,
    )
    if update.prompt is None and update.seed is None:
        raise fields.error("prompt", "given, or a seed")
    return update


def _branch(fields: _Fields, limits: Limits) -> Branch:
    prompt = fields.maybe("prompt", lambda: fields.prompt(limits))
    return Branch(fields.whole("snapshot", 2**53), prompt, fields.seed(), fields.policy())


_READERS: dict[str, Callable[[_Fields, Limits], Message]] = {
    "session.start": _start,
    "session.attach": _attach,
    "session.prompt_update": _update,
    "session.branch": _branch,
    "session.pause": lambda fields, limits: Verb("pause"),
    "session.resume": lambda fields, limits: Verb("resume"),
    "session.stop": lambda fields, limits: Verb("stop"),
    "playhead": lambda fields, limits: Playhead(fields.number("seconds")),
    "hidden": lambda fields, limits: Hidden(fields.flag("hidden")),
}
