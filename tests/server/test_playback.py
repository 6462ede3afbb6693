"""How far ahead is made, by a clock that stands still."""

import pytest

from server.playback import SILENCE, Bucket, Pace, Playback

LEAD, BLOCK = 1.5, 0.75


def wants(player: Playback, made: float, *, takes: float = 0.0, now: float = 0.0) -> bool:
    return player.wants(made, block=BLOCK, takes=takes, lead=LEAD, now=now)


@pytest.mark.parametrize(
    ("made", "played", "takes", "wanted"),
    [
        (0.0, 0.0, 0.0, True),
        (0.75, 0.0, 0.0, True),  # to the full lead and not beyond
        (0.8, 0.0, 0.0, False),
        (0.8, 0.1, 0.0, True),
        (1.2, 0.0, 0.5, True),  # while it is made, half a second is played
        (1.3, 0.0, 0.5, False),
        (1.5, 0.0, 9.0, True),  # slower than real time: begun as early as the lead allows
        (1.6, 0.0, 9.0, False),
        (3600.0, 3599.3, 0.0, True),  # an hour later it is the same
        (3600.0, 3599.2, 0.0, False),
    ],
)
def test_lead(made, played, takes, wanted):
    assert wants(Playback(played, heard_at=0.0), made, takes=takes) is wanted


def test_a_block_longer_than_the_lead_is_made_when_nothing_is_left():
    player = Playback(2.0, heard_at=0.0)
    assert player.wants(2.0, block=3.0, takes=0.0, lead=LEAD, now=0.0)
    assert not player.wants(2.1, block=3.0, takes=0.0, lead=LEAD, now=0.0)


def test_a_fast_model_keeps_the_lead_over_an_hour():
    """The shapes model makes 70 frames a second and would run away from its viewer."""
    player, made, most = Playback(0.0, heard_at=0.0), 0.0, 0.0
    for tick in range(36000):
        now = tick / 10
        player.hear(min(made, now), sent=made, now=now)
        while wants(player, made, now=now):
            made += BLOCK
        most = max(most, made - player.played)
    assert most <= LEAD
    assert made > 3599


def test_playhead_is_held_between_its_last_value_and_what_was_sent():
    player = Playback(0.0, heard_at=0.0)
    player.hear(1.0, sent=2.0, now=1.0)
    player.hear(5.0, sent=2.0, now=2.0)
    assert player.played == 2.0
    with pytest.raises(ValueError, match="went back from 2 to 1 s"):
        player.hear(1.0, sent=3.0, now=3.0)
    assert (player.played, player.heard_at) == (2.0, 2.0)
    player.hear(2.5, sent=0.0, now=4.0)  # what was sent can only grow
    assert player.played == 2.0


def test_nobody_watches():
    player = Playback(0.0, heard_at=10.0)
    assert wants(player, 0.0, now=10.0 + SILENCE - 0.01)
    assert not wants(player, 0.0, now=10.0 + SILENCE)
    player.hear(0.0, sent=1.0, now=60.0)
    assert wants(player, 0.0, now=60.0)
    player.hidden = True
    assert not wants(player, 0.0, now=60.0)


def test_pace_is_a_mean():
    pace = Pace()
    pace.add(2.0, 12)
    assert (pace.seconds, pace.frames_per_second) == (2.0, 6.0)
    for _ in range(50):
        pace.add(0.5, 12)
    assert pace.seconds == pytest.approx(0.5)
    assert pace.frames_per_second == pytest.approx(24)


def test_bucket():
    bucket = Bucket(10.0, 5.0, now=0.0)
    assert sum(bucket.take(0.0) for _ in range(20)) == 5
    assert sum(bucket.take(0.35) for _ in range(20)) == 3
    assert sum(bucket.take(100.0) for _ in range(20)) == 5
    assert not bucket.take(0.0)  # a clock that goes back gives nothing
