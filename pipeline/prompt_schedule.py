"""Prompt schedules: files that say which prompt a video has from which second on."""

import re
from dataclasses import dataclass
from pathlib import Path

from pipeline.changes import LONGEST_BLEND, POLICIES, RESTARTING, Change, Policy, Timeline
from utils.config import find_file
from utils.errors import UserError
from utils.prompts import check_text
from utils.strict_yaml import read_yaml

FORM = "write lines like `12.5s: a new prompt`, with [cut], [recache] or [blend 4] if wanted"
_MARKS = r"(?:\s*\[[^\[\]\n]*\])*"
_TIME = re.compile(r"(?:(?P<minutes>\d{1,6}):)?(?P<seconds>\d{1,9}(?:\.\d*)?)\s*s?", re.ASCII)
_LINE = re.compile(
    rf"^({_TIME.pattern}{_MARKS})\s*:[ \t]+({_MARKS})[ \t]*(?P<text>\S.*?)?(?P<end>[ \t]+\#.*)?$",
    re.ASCII | re.M,
)
_KEY = re.compile(rf"(?P<time>{_TIME.pattern})(?P<marks>{_MARKS})\s*", re.ASCII)
_MARK = re.compile(r"\[\s*([^\[\]]*?)\s*\]")
_TRAILING = re.compile(rf"({_MARKS})\s*$")


@dataclass(frozen=True)
class TimedPrompt:
    """A prompt from a second of the video on."""

    seconds: float
    prompt: str
    policy: Policy = "keep"
    blend_blocks: int = 0


@dataclass(frozen=True)
class PromptSchedule:
    """Prompts in the order of time; `first` is that of the start, if the file says it."""

    first: str | None
    later: tuple[TimedPrompt, ...]

    @property
    def prompts(self) -> list[str]:
        """The prompts that come after the first."""
        return [timed.prompt for timed in self.later]

    def changes(
        self, timeline: Timeline, fps: float, *, first_block: int = 0, hidden_frames: int = 0
    ) -> tuple[Change, ...]:
        """Each prompt as a change before the first block that begins at or after its time.

        Of prompts that mean the same block the last one counts.

        Scenes that cuts begin are counted as they are, `timeline` being that of a video without
        any. `first_block`: the first that is generated; `hidden_frames` come before time 0.
        """
        changes: list[Change] = []
        for timed in self.later:
            frame = round(timed.seconds * fps, 6) + hidden_frames  # 8.3 s times 30 are 249.00…03
            block = max(timeline.with_cuts(changes).block_from(frame), first_block)
            if changes and changes[-1].block == block:
                del changes[-1]
            changes.append(Change(block, timed.prompt, timed.policy, timed.blend_blocks))
        return tuple(changes)


def read_prompt_schedule(path: str | Path) -> PromptSchedule:
    """Read a YAML file of lines `12.5s: a new prompt`; UserError names what is wrong.

    Times are seconds (`12.5s`, `12.5`) or minutes and seconds (`1:05`). Marks in brackets, before
    or behind the prompt or behind the time, choose the policy and the blend.
    """
    path = find_file(path, "prompt schedule")
    values = read_yaml(path, _as_yaml)
    if not values:
        raise UserError(f"{path} holds no schedule: {FORM}")
    timed = [_timed(path, key, value) for key, value in values.items()]
    times = [item.seconds for item in timed]
    for time in times:
        if times.count(time) > 1:
            raise UserError(f"{path} gives two prompts for {time:g} s; remove one")
    timed.sort(key=lambda item: item.seconds)
    if timed[0].seconds > 0:
        return PromptSchedule(None, tuple(timed))
    if timed[0].policy != "keep" or timed[0].blend_blocks:
        raise UserError(f"{path}: at 0 s there is nothing to {timed[0].policy} yet")
    return PromptSchedule(timed[0].prompt, tuple(timed[1:]))


def _timed(path: Path, key: str, value: object) -> TimedPrompt:
    """One line of a schedule."""
    if not isinstance(value, str):
        raise UserError(f"{path}: '{key}' has no text for a prompt: {FORM}")
    found = _KEY.fullmatch(key.strip())
    if found is None:
        raise UserError(f"{path}: '{key}' is no time: {FORM}")
    behind = _TRAILING.search(value)
    prompt = value[: behind.start()].strip() if behind else value.strip()
    policy: Policy = "keep"
    blend = 0
    for mark in _MARK.findall(found["marks"] + (behind[1] if behind else "")):
        word, _, number = mark.partition(" ")
        if word == "blend" and re.fullmatch(r"\s*[0-9]{1,6}\s*", number):
            blend = int(number)
            if blend > LONGEST_BLEND:
                raise UserError(f"{path}: '[{mark}]' is longer than {LONGEST_BLEND} blocks")
        elif mark in POLICIES:
            policy = mark
        else:
            raise UserError(f"{path}: '[{mark}]' is neither {', '.join(POLICIES)} nor 'blend 4'")
    if blend and policy in RESTARTING:
        raise UserError(f"{path}: '{key}': a {policy} cannot blend")
    check_text(prompt, f"the prompt at {key} of {path}")
    if not prompt:
        raise UserError(f"{path}: the prompt at '{key}' is empty")
    seconds = 60 * int(found["minutes"] or 0) + float(found["seconds"])
    return TimedPrompt(seconds, prompt, policy, blend)


def _as_yaml(text: str) -> str:
    """The file as YAML: in front of a text a mark would begin a list, and a colon in it a mapping.

    `12.5: [cut] a prompt: red` becomes `'12.5 [cut]': 'a prompt: red'`.
    """

    def rewritten(line: re.Match[str]) -> str:
        prompt = line["text"] or ""
        if prompt and prompt[0] not in "\"'|>":
            prompt = "'" + prompt.replace("'", "''") + "'"
        return f"'{line[1]}{line[4]}': {prompt}{line['end'] or ''}"

    return _LINE.sub(rewritten, text.removeprefix("\ufeff"))
