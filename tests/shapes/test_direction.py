"""Whether and when a change of prompt is followed: the measure on true clips, and the command."""

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from shapes import direction
from shapes.direction import Way, follows, main, pairs_of_scenes, seconds_until_right
from shapes.world import render
from utils.errors import UserError

MODEL = ["--config_path", "configs/shapes/rolling_forcing.yaml"]
MODEL += ["--checkpoint_path", "checkpoints/shapes_rolling_forcing.pt"]


def test_scenes_of_a_pair_differ_in_all_that_is_watched() -> None:
    for one, other in islice(pairs_of_scenes(), 20):
        (first,), (second,) = one.shapes, other.shapes
        assert one.background != other.background
        assert first.colour != second.colour
        assert first.kind != second.kind


@pytest.mark.slow
def test_a_true_change_is_seen_when_it_comes() -> None:
    """After a second of the old scene; one that comes back at the end is none."""
    before, after = next(pairs_of_scenes())
    old, new = render(before, 16), render(after, 40)
    assert seconds_until_right(np.concatenate([old, new]), after) == {
        "colour": 1.0,
        "background": 1.0,
        "kind": 1.0,
    }
    assert set(seconds_until_right(new, after).values()) == {0.0}
    assert set(seconds_until_right(np.concatenate([new, old]), after).values()) == {None}


def test_shares_count_what_follows_in_time() -> None:
    assert follows([1.0, None, 3.0, 9.5], 9.0) == (0.5, 2.0)
    assert follows([None], 9.0) == (0.0, None)


@pytest.mark.slow
def test_the_command_tells_each_policy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(direction, "WAYS", (Way("cut"), Way("keep", 2)))
    monkeypatch.setattr(direction, "BLOCKS_BEFORE", 1)
    out = tmp_path / "figures.json"
    assert main([*MODEL, "--changes", "1", "--seconds", "1", "--json", str(out)]) == 0
    assert "keep, blend 2" in capsys.readouterr().out
    followed = json.loads(out.read_text(encoding="utf-8"))["followed"]
    assert followed["cut"]["background"] == [1.0, 0.0]
    with pytest.raises(UserError, match="--changes"):
        main([*MODEL, "--changes", "0"])
    with pytest.raises(UserError, match="fps=8, and this is measured in videos of the world's 16"):
        main([*MODEL, "--changes", "1", "fps=8"])
