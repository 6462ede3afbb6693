"""Whether a video keeps what it began with: the definition, on values whose answer is known."""

import json

import numpy as np
import pytest

from evaluation.keeping import FORMULAS, Property, drift_curve, keeping, spread_of, trace
from evaluation.meters import FRAMES, Judge
from evaluation.results import summarise, summary_text
from evaluation.statistics import to_json

FPS, SECONDS = 16, 20
STEP = np.array([3.0, 4.0])
LINE, ANGLE = Property("a line", 2.0), Property("an angle", np.pi / 2, circular=True)


def videos_of(later, known=LINE, count=40, given=0):
    """Videos with one thing each, whose first second is random and all later ones `later` of it."""
    rng = np.random.default_rng(0)
    first = rng.uniform(-3, 3, (count, 2))
    still = np.repeat(first[:, None], FPS, 1)
    moved = np.repeat(np.array([later(value, rng) for value in first])[:, None], 19 * FPS, 1)
    values = np.concatenate([still, moved], 1)
    return [[trace(value, known, fps=FPS, given=given)] for value in values]


@pytest.mark.parametrize("known", [LINE, ANGLE], ids=["line", "angle"])
def test_what_is_kept_has_no_drift_and_a_gain_of_one(known):
    kept = keeping(videos_of(lambda x, rng: x, known), known)
    assert len(kept.drift) == SECONDS
    assert np.allclose(kept.drift, 0)
    assert np.allclose(kept.gain, 1)


def test_what_is_amplified_forgotten_or_all_alike_is_told_apart():
    """By drift alone they could not be."""
    amplified = keeping(videos_of(lambda x, rng: 1.5 * x), LINE)
    forgotten = keeping(videos_of(lambda x, rng: rng.uniform(-3, 3, 2), count=400), LINE)
    alike = keeping(videos_of(lambda x, rng: np.zeros(2)), LINE)
    assert amplified.gain[-1] == pytest.approx(1.5)
    assert amplified.variety[-1] == pytest.approx(1.5 * amplified.variety[0])
    assert forgotten.gain[-1] == pytest.approx(0, abs=0.1)
    assert forgotten.drift[-1] == pytest.approx(forgotten.variety[0], rel=0.05)
    assert alike.gain[-1] == pytest.approx(0)
    assert alike.variety[-1] == pytest.approx(0)
    for kept in (amplified, forgotten, alike):
        assert kept.drift[0] == pytest.approx(0)


def test_videos_of_one_prompt_are_no_independent_ones():
    """Twenty seeds of four prompts gave the interval of eighty prompts."""
    rng = np.random.default_rng(0)
    of_prompt = rng.uniform(0, 2, 4)
    moves = iter(np.repeat(of_prompt, 20))
    videos = videos_of(lambda x, rng: x + next(moves), count=80)
    prompts = np.repeat(np.arange(4), 20).tolist()
    alone, grouped = (keeping(videos, LINE, 1.0, groups) for groups in (None, prompts))
    assert grouped.drift == pytest.approx(alone.drift)
    wide, narrow = (found.high[-1] - found.low[-1] for found in (grouped, alone))
    assert wide > 3 * narrow


def test_drift_is_a_distance_over_the_spread():
    (traces,) = videos_of(lambda x, rng: x + STEP, count=1)
    assert drift_curve(traces, LINE, 2.0)[1:] == pytest.approx(2.5)
    turned = videos_of(lambda x, rng: x + np.pi / 2 + 8 * np.pi, ANGLE)
    assert keeping(turned, ANGLE).drift[-1] == pytest.approx(1)
    assert keeping(turned, ANGLE).gain[-1] == pytest.approx(0)


def test_angles_are_averaged_as_directions():
    """Around half a turn, where their numbers jump."""
    values = np.pi + np.tile([[0.1], [-0.1]], (FPS, 1))
    seen = trace((values + np.pi) % (2 * np.pi) - np.pi, ANGLE, fps=FPS)
    assert np.abs(seen["first"]) == pytest.approx(np.pi)
    assert seen["first_last_5s"] == pytest.approx(0, abs=1e-9)


def test_the_frames_that_were_given_are_the_reference():
    (traces,) = videos_of(lambda x, rng: x + STEP, count=1, given=3 * FPS)
    assert drift_curve(traces, LINE, 2.0)[:2] == pytest.approx([2.5 * 2 / 3, 2.5 / 3])


def test_the_published_formulas_compare_the_ends():
    """A line of slope 1 a second over 20 s: the middles of the ends are 15 s, and 17 s apart."""
    values = np.arange(SECONDS * FPS)[:, None] / FPS
    seen = trace(values, LINE, fps=FPS)
    assert seen["first_last_5s"] == pytest.approx(15)
    assert seen["first_last_15_percent"] == pytest.approx(17)
    assert set(FORMULAS) <= set(seen)


def test_what_has_no_value_does_not_count():
    values = np.ones((2 * FPS, 1))
    values[FPS:] = np.nan
    gone = trace(values, LINE, fps=FPS)
    still = trace(np.ones((2 * FPS, 1)), LINE, fps=FPS)
    assert np.isnan(drift_curve([gone], LINE, 2.0)[1])
    assert drift_curve([gone, still], LINE, 2.0)[1] == 0
    kept = keeping([[to_json(gone)], [still]], LINE)
    assert np.isnan(kept.gain[1])
    assert np.isnan(kept.variety[1])


def test_an_unknown_spread_is_that_of_the_first_seconds():
    unknown = LINE._replace(spread=None)
    ends = [[trace(np.full((FPS, 1), value), unknown, fps=FPS)] for value in (0.0, 3.0, 6.0)]
    assert spread_of(ends, unknown) == pytest.approx(4)
    assert spread_of(ends, LINE) == 2
    assert np.isnan(spread_of(ends[:1], unknown))
    assert np.isnan(spread_of([ends[0], ends[0]], unknown))


def picture(seed, frames=4 * FPS):
    rng = np.random.default_rng(seed)
    shown = rng.uniform(60, 180, 3) + rng.normal(0, 10 + 10 * seed, (24, 32, 3))
    return np.repeat(np.clip(shown, 0, 255).astype(np.uint8)[None], frames, 0)


def result_of(frames, seed):
    judge = Judge("any prompt")
    judge.add(frames)
    return {"prompt": str(seed), "seed": 0, "kind": "video", "report": judge.report(FPS)}


def test_real_videos_are_held_against_their_first_second():
    """Other colours half way: the colour is another video's, the texture is kept."""
    still = [result_of(picture(seed), seed) for seed in range(4)]
    turned = []
    for seed in range(4):
        frames = picture(seed)
        frames[2 * FPS :] = frames[2 * FPS :, ..., ::-1]
        turned.append(result_of(frames, seed))
    kept, lost = (summarise(results, FRAMES)["kept"] for results in (still, turned))
    assert set(kept) == set(FRAMES.properties)
    for name in kept:
        assert kept[name]["drift"][-1] == pytest.approx(0, abs=1e-9)
        assert kept[name]["gain"][-1] == pytest.approx(1)
        assert kept[name]["variety"] == pytest.approx([1] * 4)
    assert lost["colour"]["drift"][:2] == pytest.approx([0, 0], abs=1e-9)
    assert lost["colour"]["drift"][-1] > 0.5
    assert lost["colour"]["first_last_5s"] == pytest.approx(lost["colour"]["drift"][-1])
    assert lost["texture"]["drift"][-1] < 0.25
    summary = summarise(turned, FRAMES)
    json.dumps(summary, allow_nan=False)
    assert "kept, in second 4" in summary_text(summary, FRAMES)


def test_a_second_that_has_begun_is_none():
    """Its one frame is no mean over a second; and a video of a second has nothing to keep."""
    ends = [result_of(picture(seed, frames=5 * FPS + 1), seed) for seed in range(3)]
    for seed in range(3):
        first = ends[seed]["report"]["kept"]["colour"][0]
        assert (len(first["seconds"]), first["whole"]) == (6, 5)
    short = [result_of(picture(seed, frames=2 * FPS - 1), seed) for seed in range(3, 5)]
    both = summarise([*ends, *short], FRAMES)
    assert both["kept"] == summarise(ends, FRAMES)["kept"]
    assert [len(kept["drift"]) for kept in both["kept"].values()] == [5] * 4
    told = summary_text(both, FRAMES)
    assert "what is kept is not told of 2, which have no whole second after their first" in told
    assert "kept, in second 5" in told
    alone = summarise(short, FRAMES)
    assert alone["kept"] == {}
    assert "kept, in" not in summary_text(alone, FRAMES)


def test_the_interval_is_over_the_videos():
    """Half keep it, half go three spreads away."""
    videos = videos_of(lambda x, rng: x, count=20) + videos_of(lambda x, rng: x + 1.2 * STEP)[:20]
    kept = keeping(videos, LINE)
    assert kept.drift[-1] == pytest.approx(1.5)
    assert 0.7 < kept.low[-1] < 1.1
    assert 1.9 < kept.high[-1] < 2.3
    assert kept.low[0] == kept.high[0] == pytest.approx(0)


def test_of_videos_that_are_alike_it_says_why_nothing_is_known():
    summary = summarise([result_of(picture(0), 0)], FRAMES)
    told = summary_text(summary, FRAMES)
    assert "(distances are over those of two videos, and here are no two that differ)" in told
    assert "colour" in told


def test_texture_is_told_by_its_scale():
    """Stripes of one pixel are detail of the finest kind, those of four of the third."""
    for width, band in ((1, 0), (2, 1), (4, 2)):
        row = np.where(np.arange(32) // width % 2, 200, 50).astype(np.uint8)
        frames = np.broadcast_to(row[None, None, :, None], (2, 32, 32, 3)).copy()
        judge = Judge("any")
        judge.add(frames)
        texture = judge.report(FPS)["kept"]["texture"][0]["first"]
        assert np.argmax(texture) == band
        assert texture[band] == pytest.approx(np.log(76))
        assert np.sum(texture) == pytest.approx(texture[band])
