import json

import numpy as np
import pytest

from evaluation import statistics as video_meter
from utils.errors import UserError

FPS = 16


def walk(num_frames=320, seed=0):
    """A textured picture that slides one pixel per frame, its grey levels well inside the range."""
    rng = np.random.default_rng(seed)
    picture = rng.uniform(80, 160, (24, 32, 3)).astype(np.uint8)
    return np.stack([np.roll(picture, step, 1) for step in range(num_frames)])


def ramp(video, amount):
    """Add grey levels growing from 0 to `amount`."""
    rise = np.linspace(0, amount, len(video))[:, None, None, None]
    return (video + rise + 0.5).astype(np.uint8)


def test_a_steady_video_does_not_drift_and_does_not_flicker():
    result = video_meter.report(walk())
    drift = result.drift
    assert max(drift.mean, drift.std) < 1e-6
    assert max(abs(drift.contrast), abs(drift.motion)) < 1e-6
    assert abs(drift.sharpness) < 0.01  # the Laplacian leaves out the border
    assert result.flicker.ratio == pytest.approx(1, abs=1e-6)
    assert result.brightness_flicker.ratio == pytest.approx(1, abs=1e-6)
    assert result.motion > 20
    assert result.seconds == 20


def test_drift_is_the_last_five_seconds_minus_the_first_five():
    """20 s: the means of a ramp at 2.5 s and at 17.5 s differ by three quarters of its height."""
    drift = video_meter.report(ramp(walk(), 40)).drift
    assert drift.mean == pytest.approx(30 * np.sqrt(3), rel=0.02)
    assert drift.std < 0.1
    values = np.arange(20 * FPS) / FPS
    assert video_meter.drift(values, FPS) == pytest.approx(15)
    assert video_meter.drift(values[: 4 * FPS], FPS) == pytest.approx(2)  # halves of a short one


def test_drift_passes_over_frames_without_a_value():
    values = np.r_[np.full(80, 1.0), np.full(80, 3.0)]
    values[::2] = np.nan
    assert video_meter.drift(values, FPS) == pytest.approx(2)
    assert np.isnan(video_meter.drift(np.full(160, np.nan), FPS))


def test_losing_contrast_is_told_from_brightening():
    video = walk().astype(float)
    fade = np.linspace(1, 0.5, len(video))[:, None, None, None]
    faded = ((video - 120) * fade + 120.5).astype(np.uint8)
    drift = video_meter.report(faded).drift
    assert drift.contrast == pytest.approx(0.5625 / 0.9375 - 1, abs=0.02)
    assert drift.sharpness == pytest.approx((0.5625 / 0.9375) ** 2 - 1, abs=0.03)
    assert drift.motion == pytest.approx(0.5625 / 0.9375 - 1, abs=0.02)
    assert drift.mean < 1


def test_a_video_that_stops_loses_its_motion():
    video = walk()
    video[160:] = video[160]
    result = video_meter.report(video)
    assert result.drift.motion == pytest.approx(-1)
    assert result.per_second["change"][-1] == 0
    assert abs(result.drift.contrast) < 1e-6


def test_what_was_nothing_has_no_relative_drift():
    rng = np.random.default_rng(0)
    video = np.zeros((160, 16, 16, 3), np.uint8)
    video[80:] = rng.integers(0, 256, video[80:].shape)
    result = video_meter.report(video)
    assert result.drift.mean > 100
    assert np.isnan([result.drift.contrast, result.drift.sharpness, result.drift.motion]).all()


def test_the_first_frame_has_no_change():
    video = np.zeros((32, 16, 16, 3), np.uint8)
    video[::2] = 80
    curve = video_meter.report(video).per_second["change"]
    assert curve == [pytest.approx(80), pytest.approx(80)]


def test_flicker_sees_jumps_at_block_boundaries_only():
    video = np.repeat(walk(1), 105, 0)
    block = (np.arange(105) - 9) // 12 + 1
    result = video_meter.report(video + (3 * (block % 2))[:, None, None, None].astype(np.uint8))
    assert result.flicker.boundary == pytest.approx(3)
    assert result.flicker.inside == 0
    assert result.flicker.ratio == pytest.approx(3.5 / 0.5)
    assert result.brightness_flicker.ratio == pytest.approx(3.5 / 0.5, rel=1e-4)
    elsewhere = video + (3 * (np.arange(105) // 5 % 2))[:, None, None, None].astype(np.uint8)
    assert video_meter.report(elsewhere).flicker.ratio < 1.3


def test_boundaries_are_before_frame_9_and_every_twelfth_after_it():
    changes = np.zeros(44)  # change i is that of frame i + 1
    changes[[8, 20, 32]] = 1
    assert video_meter.flicker(changes).boundary == 1
    assert video_meter.flicker(changes).inside == 0
    assert video_meter.flicker(changes[:8]).ratio == 1
    changes = np.zeros(20)
    changes[[3, 7, 11, 15, 19]] = 1
    assert video_meter.flicker(changes, first=4, block=4).boundary == 1


@pytest.mark.parametrize("fps", [12.5, 16, 29.5, 0.4])
def test_a_second_is_a_second_at_any_rate(fps):
    frames = round(240 * fps)
    times = np.arange(frames) / fps
    curve = video_meter.per_second(np.floor(times + 1e-9), fps)
    assert len(curve) == 240
    known = ~np.isnan(curve)
    assert known.all() or fps < 1
    assert np.array_equal(curve[known], np.arange(240)[known])


def test_a_report_is_json():
    video = walk(20)
    loaded = json.loads(json.dumps(video_meter.to_json(video_meter.report(video)), allow_nan=False))
    assert loaded["drift"]["mean"] >= 0
    assert video_meter.to_json({"a": (np.float64("nan"), np.arange(2))}) == {"a": [None, [0, 1]]}


@pytest.mark.parametrize(
    "frames",
    [np.zeros((4, 8, 8, 3)), np.zeros((1, 8, 8, 3), np.uint8), np.zeros((4, 8, 8), np.uint8)],
)
def test_what_is_no_video_is_refused(frames):
    with pytest.raises(UserError, match="uint8 frames"):
        video_meter.report(frames)


def test_a_video_in_pieces_measures_as_the_whole():
    video = walk(50)
    meter = video_meter.VideoMeter()
    for first, last in [(0, 1), (1, 13), (13, 50)]:
        meter.add(video[first:last])
    pieces = video_meter.report_statistics(meter.statistics())
    assert video_meter.to_json(pieces) == video_meter.to_json(video_meter.report(video))
    with pytest.raises(UserError, match="at least 2 frames"):
        video_meter.VideoMeter().statistics()
