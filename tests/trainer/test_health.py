"""Each verdict from made-up runs in which exactly one thing goes wrong."""

import json
import math

import pytest

from trainer.health import HealthMonitor, Rules, judge


def run(updates=60, **changes):
    """A healthy DMD run; `changes` give a metric as a function of the update."""
    healthy = {"std": lambda n: 1.0, "motion": lambda n: 0.3, "ratio": lambda n: 0.8} | changes
    return [
        {
            "generated/std": healthy["std"](n),
            "generated/motion": healthy["motion"](n),
            "critic/ratio": healthy["ratio"](n),
        }
        for n in range(updates)
    ]


def test_a_steady_run_is_healthy_and_says_its_numbers():
    verdict = judge(run())
    assert verdict.word == "healthy"
    assert "generated/std 1 (1 times that of the start)" in verdict.sentence
    assert "critic/ratio 0.8" in verdict.sentence


@pytest.mark.parametrize(
    ("end", "word"),
    [
        (0.49, "latents collapsing"),
        (0.51, "healthy"),
        (1.99, "healthy"),
        (2.01, "latents collapsing"),
    ],
)
def test_std_may_leave_its_start_by_a_factor_of_two_either_way(end, word):
    verdict = judge(run(std=lambda n: 0.9 if n < 30 else 0.9 * end))
    assert verdict.word == word
    if word != "healthy":
        assert f"{end:.2g} times" in verdict.sentence


@pytest.mark.parametrize("bad", [math.nan, math.inf, None])
def test_latents_that_are_not_finite_collapse_at_once(bad):
    assert judge(run(std=lambda n: bad if n == 59 else 1.0)).word == "latents collapsing"
    assert judge(run(std=lambda n: bad if n == 30 else 1.0)).word == "healthy"


@pytest.mark.parametrize(
    ("start", "end", "word"),
    [
        (0.1, 0.049, "static"),
        (0.1, 0.051, "healthy"),
        (0.4, 0.09, "static"),
        (0.4, 0.11, "healthy"),
        (0.02, 0.02, "static"),
    ],
)
def test_motion_is_judged_absolutely_and_against_its_start(start, end, word):
    assert judge(run(motion=lambda n: start if n < 30 else end)).word == word


@pytest.mark.parametrize(
    ("updates", "ratio", "word"),
    [(20, 1.1, "healthy"), (21, 1.1, "critic lags"), (60, 0.97, "healthy"), (60, 1, "critic lags")],
)
def test_the_critic_has_to_beat_the_teacher_after_the_grace_period(updates, ratio, word):
    assert judge(run(updates, ratio=lambda n: ratio)).word == word


def test_single_outliers_change_nothing():
    assert judge(run(ratio=lambda n: 9.0 if n % 3 == 0 else 0.8)).word == "healthy"
    assert judge(run(motion=lambda n: 0.0 if n % 3 == 0 else 0.3)).word == "healthy"


def test_precedence_is_collapsing_then_static_then_critic():
    bad_ratio, bad_motion = {"ratio": lambda n: 2.0}, {"motion": lambda n: 0.01}
    bad_std = {"std": lambda n: 1.0 if n < 10 else 0.1}
    assert judge(run(**bad_ratio)).word == "critic lags"
    assert judge(run(**bad_ratio, **bad_motion)).word == "static"
    assert judge(run(**bad_ratio, **bad_motion, **bad_std)).word == "latents collapsing"


def test_steps_that_log_nothing_of_it_do_not_count():
    """With one generator update in five steps, the grace period is 20 updates, not 20 steps."""
    bad = run(ratio=lambda n: 1.1)
    between = [{"critic/loss": 1.0}] * 4
    history = [step for update in bad for step in (update, *between)]
    assert judge(history[:100]).word == "healthy"
    assert judge(history[:101]).word == "critic lags"


def test_other_objectives_skip_the_rules_and_note_a_rising_loss():
    assert judge([]).sentence == "nothing to judge yet"
    falling = [{"loss": 1.0 / (n + 1)} for n in range(40)]
    verdict = judge(falling)
    assert verdict.word == "healthy"
    assert "minimum" not in verdict.sentence
    risen = judge(falling + [{"loss": 0.5}] * 10)
    assert risen.word == "healthy"
    assert "times its minimum" in risen.sentence


def test_thresholds_are_arguments():
    history = run(30, motion=lambda n: 0.04, ratio=lambda n: 1.5)
    assert judge(history).word == "static"
    assert judge(history, Rules(min_motion=0.03)).word == "critic lags"
    assert judge(history, Rules(min_motion=0.03, grace=30)).word == "healthy"


@pytest.mark.parametrize("cut", [2, 7, 25, 45])
def test_a_resumed_monitor_judges_as_one_that_never_stopped(cut):
    history = run(50, std=lambda n: 1.0 if n < 30 else 0.3, ratio=lambda n: 1.2 - 0.01 * n)
    whole = HealthMonitor()
    expected = [whole.update(metrics) for metrics in history]
    before, after = HealthMonitor(), HealthMonitor()
    for metrics in history[:cut]:
        before.update(metrics)
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert [after.update(metrics) for metrics in history[cut:]] == expected[cut:]
    assert len({verdict.word for verdict in expected}) > 1
