"""Prompt schedules: the forms of their lines, and the blocks that their times mean."""

from pathlib import Path

import pytest

from pipeline.changes import Change, Timeline
from pipeline.prompt_schedule import TimedPrompt, read_prompt_schedule
from pipeline.schedule import BlockLayout
from utils.errors import UserError
from wan.geometry import VideoShape


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "schedule.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_forms_of_a_line(tmp_path: Path) -> None:
    schedule = read_prompt_schedule(
        written(
            tmp_path,
            "\ufeff# what happens\n0s: it's morning\n12.5s: a cat: black [white]! # no prompt\n"
            "4: [cut] noon\n1:05 [recache]: evening\n'70s': \"night: it's dark\"\n"
            "80 s: dusk [blend 4]\n90s [recache]: dawn [blend 2]\n100s: |\n  two\n  lines\n"
            "3.25s: [renoise] !!python/x\n",
        )
    )
    assert schedule.first == "it's morning"
    assert schedule.later == (
        TimedPrompt(3.25, "!!python/x", "renoise"),
        TimedPrompt(4, "noon", "cut"),
        TimedPrompt(12.5, "a cat: black [white]!"),
        TimedPrompt(65, "evening", "recache"),
        TimedPrompt(70, "night: it's dark"),
        TimedPrompt(80, "dusk", "keep", 4),
        TimedPrompt(90, "dawn", "recache", 2),
        TimedPrompt(100, "two\nlines"),
    )


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "holds no schedule"),
        ("just a prompt", "must hold `key: value` lines"),
        ("- a\n- b", "must hold `key: value` lines"),
        ("soon: a", "'soon' is no time"),
        ("-3s: a", "'-3s' is no time"),
        ("3s: a\n3.0: b", "two prompts for 3 s"),
        ("3s: a\n3s: b", "stands there twice"),
        ("3s: [fade] a", r"'\[fade\]' is neither"),
        ("3s: [blend x] a", r"'\[blend x\]' is neither"),
        ("3s: [cut] [blend 2] a", "a cut cannot blend"),
        ("3s: [blend 1001] a", r"'\[blend 1001\]' is longer than 1000 blocks"),
        ("3s: [cut]", "has no text"),
        ("3s: '' ", "the prompt at '3s' is empty"),
        ("3s: ", "has no text"),
        ("3s:\n  a: b", "has no text"),
        ("0s: [cut] a", "at 0 s there is nothing to cut"),
        ("3s: a\n${x}: b", "line 2"),
        ("3s: 'a", "line 1"),
    ],
)
def test_other_lines_are_refused_in_one_sentence(tmp_path: Path, text: str, word: str) -> None:
    with pytest.raises(UserError, match=word):
        read_prompt_schedule(written(tmp_path, text))


def test_a_time_means_the_first_block_that_begins_then_or_later(tmp_path: Path) -> None:
    """The 9 frames with which a scene begins are counted; blocks begin at 0, 9, 21, 33, 45 …"""
    path = written(tmp_path, "0.5s: a\n1.4s: [cut] b\n2.6s: c\n4.4s: [cut] d\n6s: e")
    schedule, timeline = read_prompt_schedule(path), Timeline(BlockLayout(3), VideoShape(32, 48))
    blocks = [change.block for change in schedule.changes(timeline, 16)]
    cut = timeline.with_cuts([Change(3, policy="cut")])
    assert blocks[:3] == [1, 3, 4]
    assert [cut.start(block) for block in (3, 4, 5)] == [33, 42, 54]
    twice = cut.with_cuts([Change(blocks[3], policy="cut")])
    assert twice.start(blocks[4] - 1) < 6 * 16 <= twice.start(blocks[4])
    later = schedule.changes(timeline, 16, first_block=2, hidden_frames=21)
    assert [change.block for change in later[:2]] == [3, 4]


def test_a_time_that_is_a_block_s_own_means_that_block(tmp_path: Path) -> None:
    """8.3 s times 30 is a hair above frame 249, and the prompt came a block late."""
    schedule = read_prompt_schedule(written(tmp_path, "8.3s: a"))
    timeline = Timeline(BlockLayout(3), VideoShape(32, 48))
    (change,) = schedule.changes(timeline, 30)
    assert timeline.start(change.block) == 249


def test_of_prompts_for_one_block_the_last_one_counts(tmp_path: Path) -> None:
    """A cut that another prompt replaced was counted as a scene, though there was none."""
    schedule = read_prompt_schedule(written(tmp_path, "0.6s: [cut] a\n1.2s: b\n2.1s: [cut] c"))
    timeline = Timeline(BlockLayout(3), VideoShape(32, 48))
    changes = schedule.changes(timeline, 16)
    assert [(c.block, c.prompt, c.policy) for c in changes] == [(2, "b", "keep"), (4, "c", "cut")]
