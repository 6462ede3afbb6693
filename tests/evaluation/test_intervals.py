"""Intervals of means and of differences: known answers on data whose truth is known."""

import numpy as np
import pytest

from evaluation.intervals import difference, mean_interval, student


def drawn(trial, *, seeds=3, videos=16, of_seed=1.0, of_video=1.0, rest=1.0):
    """Values [seeds, videos] around 0, with effects of the seed, of the scene, and of neither."""
    draw = np.random.default_rng(trial)
    return (
        of_seed * draw.normal(size=(seeds, 1))
        + of_video * draw.normal(size=(1, videos))
        + rest * draw.normal(size=(seeds, videos))
    )


@pytest.mark.parametrize(
    "world",
    [
        {"of_video": 0.0},
        {"of_seed": 0.1, "rest": 0.3},
        {"seeds": 1, "of_seed": 0.0},
        {"of_seed": 0.0, "of_video": 0.0},
    ],
    ids=["seeds differ", "scenes differ", "one seed", "neither does"],
)
def test_an_interval_holds_the_truth_as_often_as_it_says_and_is_no_wider_than_that_takes(world):
    """Three seeds drawn anew as they are hold it in 78 of 100 where seeds differ.

    The width is held against that of Student's t, of the fewer of seeds and scenes.
    """
    trials, seeds = 200, world.get("seeds", 3)
    found = [mean_interval(drawn(trial, **world)) for trial in range(trials)]
    inside = sum(bool(each.low < 0 < each.high) for each in found)
    assert 0.91 * trials < inside
    assert {each.seeds for each in found} == {seeds}
    effects = {"of_seed": seeds, "of_video": 16, "rest": 16 * seeds}
    error = sum(world.get(name, 1.0) ** 2 / number for name, number in effects.items()) ** 0.5
    few = student((seeds if seeds > 1 else 16) - 1)
    width = np.mean([each.high - each.low for each in found])
    assert width < 1.15 * 2 * few * error


def test_videos_of_one_seed_are_judged_as_a_mean_of_many_is():
    """The usual interval of a mean: 1.96 standard errors for many videos."""
    values = np.random.default_rng(0).normal(2, 1, (1, 400))
    found = mean_interval(values)
    assert found.mean == pytest.approx(values.mean())
    assert found.high - found.mean == pytest.approx(1.96 / 20, rel=0.1)
    assert found.seeds == 1


def test_pairs_tell_what_means_do_not():
    """A small shift of the same scenes, far below what scenes and seeds differ by."""
    one = drawn(7, rest=0.05)
    other = one - 0.2 + 0.05 * np.random.default_rng(1).normal(size=one.shape)
    paired, apart = difference(one, other), mean_interval(one)
    assert paired.mean == pytest.approx(0.2, abs=0.05)
    assert paired.leaves_out_zero()
    assert paired.high - paired.low < 0.1 * (apart.high - apart.low)
    assert not difference(one, one).leaves_out_zero()
    lone = difference(one, other[:1])
    assert lone.seeds == 1
    assert lone.mean == pytest.approx((one - other)[0].mean())


def test_the_same_values_give_the_same_interval_and_columns_their_own():
    values = np.stack([drawn(1), drawn(2)], -1)
    both = mean_interval(values)
    assert [float(v) for v in both.low] == [float(v) for v in mean_interval(values).low]
    for column in range(2):
        alone = mean_interval(values[..., column])
        assert both.high[column] == pytest.approx(float(alone.high))


def test_what_is_not_known_does_not_count():
    values = drawn(3)
    values[0, :5] = np.nan
    found = mean_interval(values)
    assert found.mean == pytest.approx(float(np.nanmean(values)))
    assert found.low < found.mean < found.high
    nothing = mean_interval(np.full((2, 3), np.nan))
    assert np.isnan(nothing.mean)
    assert not nothing.leaves_out_zero()
    assert np.isnan(mean_interval(values[:1, 5:6]).low)


def test_student_is_that_of_the_tables():
    known = {1: 12.706, 2: 4.303, 5: 2.571, 15: 2.131, 47: 2.012}
    assert {n: student(n) for n in known} == pytest.approx(known, abs=0.03)
