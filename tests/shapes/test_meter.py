import json
from dataclasses import asdict
from functools import cache

import numpy as np
import pytest

from evaluation.statistics import to_json
from shapes.meter import ShapeMeter, measure, observe, report
from shapes.world import COLOURS, KINDS, Attributes, Scene, Shape, caption, render, sample_scene
from utils.errors import UserError

FPS, NUM_FRAMES, HALF = 16, 96, 48  # six seconds: drift compares its halves


def shape(look, motion, x, y):
    size, colour, kind = look.split()
    speed, direction = motion.split(maxsplit=1)
    return Shape(kind, colour, size, speed, direction, position=(x, y))


# Colours that can be shifted by 24 levels without clipping, as they are named; shapes that come to
# overlap.
SCENES = (
    Scene("navy", (shape("large green circle", "slow right", 16.0, 30.0),), ""),
    Scene("gray", (shape("small blue star", "fast upper left", 42.0, 44.0),), ""),
    Scene(
        "maroon",
        (
            shape("small green triangle", "fast down", 22.0, 20.0),
            shape("large cyan square", "slow right", 20.0, 40.0),
        ),
        "",
    ),
)


def sums(frames, scene):
    """All that the report says of one video, as one flat dictionary."""
    result = report(measure(frames, scene.attributes, unsaid=False))
    seconds = {key: np.nanmean(np.array(v, float)) for key, v in result.per_second.items()}
    drift = {f"drift_{key}": value for key, value in asdict(result.drift).items()}
    flat = {**seconds, **drift, **asdict(result.accuracy)}
    flat |= {"path": result.path, "motion": result.motion}
    flat |= {"survived": result.survived_seconds}
    flat["background_flicker"] = result.background_flicker.ratio
    flat["brightness_flicker"] = result.brightness_flicker.ratio
    return flat


def mean_sums(corrupt):
    rng = np.random.default_rng(0)
    all_sums = [sums(corrupt(render(s, NUM_FRAMES), rng), s) for s in SCENES]
    return {key: np.mean([one[key] for one in all_sums]) for key in all_sums[0]}


@cache
def clean():
    return mean_sums(lambda frames, rng: frames)


# How far a measure may stray from its clean value under a corruption that is not its business.
STEADY = {
    **dict.fromkeys(("background_error", "colour_error"), 2.5),
    **dict.fromkeys(("drift_background_error", "drift_colour_error"), 0.3),
    **dict.fromkeys(
        ("background_right", "colour_right", "kind_right", "size_right", "right"), 0.01
    ),
    **dict.fromkeys(("background", "count", "colour", "kind", "size", "direction", "speed"), 0.0),
    **dict.fromkeys(("area_ratio", "drift_area_ratio", "sharpness", "drift_sharpness"), 0.02),
    **dict.fromkeys(("artefacts", "drift_artefacts"), 0.002),
    **dict.fromkeys(("path", "motion"), 0.03),
    **dict.fromkeys(("drift_right", "drift_path", "drift_motion"), 0.06),
    **dict.fromkeys(("background_flicker", "brightness_flicker"), 0.1),
    "survived": 0,
}


def blur(frames, rng, sigma=1.2):
    taps = np.exp(-(np.arange(-4, 5, dtype=np.float32) ** 2) / (2 * sigma**2))
    out = np.pad(frames.astype(np.float32), ((0, 0), (4, 4), (4, 4), (0, 0)), mode="edge")
    taps /= taps.sum()
    height, width = frames.shape[1:3]
    out = sum(w * out[:, i : i + height] for i, w in enumerate(taps))
    out = sum(w * out[:, :, i : i + width] for i, w in enumerate(taps))
    return (out + 0.5).astype(np.uint8)


def noise(frames, rng, sigma=8):
    return np.clip(frames + rng.normal(0, sigma, frames.shape) + 0.5, 0, 255).astype(np.uint8)


def hue_shift(frames, rng):
    """Red up, blue down, in step, from 0 to 24 levels: 24 * sqrt(2) = 34 at the end."""
    rise = np.linspace(0, 24, len(frames))[:, None, None, None] * np.array([1, 0, -1])
    dither = rng.random(frames.shape)  # or the steps of rounding would fall on the boundaries
    return np.clip(frames + rise + dither, 0, 255).astype(np.uint8)


def freeze(frames, rng):
    return np.repeat(frames[:1], len(frames), 0)


def freeze_halfway(frames, rng):
    return np.concatenate([frames[:HALF], np.repeat(frames[HALF : HALF + 1], HALF, 0)])


def slow_down(frames, rng):
    return frames[np.arange(len(frames)) // 2]


def shuffle(frames, rng):
    return rng.permutation(frames)


def vanish(frames, rng):
    """From halfway on, background alone (the pixelwise median over time and then over a row)."""
    empty = np.median(frames[:, :, [0, 1, -1]], axis=(0, 2)).astype(np.uint8)
    out = frames.copy()
    out[HALF:] = empty[:, None]
    return out


def speckle(frames, rng):
    """Pure magenta on 5 % of the pixels, in the second half."""
    out = frames.copy()
    out[HALF:][rng.random((HALF, *frames.shape[1:3])) < 0.05] = (255, 0, 255)
    return out


def flash(frames, rng):
    """Every other block is 3 levels brighter."""
    block = (np.arange(len(frames)) - 9) // 12 + 1
    return frames + (3 * (block % 2))[:, None, None, None].astype(np.uint8)


UNKNOWN = (np.nan, 0)

# What each corruption must do to which measure: (value, error bar). All others must stay.
CORRUPTIONS = {
    blur: {
        "sharpness": (0.25, 0.02),
        "colour_error": (7, 3),
        "drift_colour_error": (0, 0.8),  # a shape half hidden has less flat inside
    },
    noise: {},
    hue_shift: {
        "background_error": (17, 1.5),
        "colour_error": (17, 1.5),
        "drift_background_error": (17, 1.5),
        "drift_colour_error": (17, 1.5),
    },
    freeze: {"path": (0, 0.01), "motion": (0, 0.01), "direction": (0, 0), "speed": (0, 0)},
    freeze_halfway: {
        "path": (0.5, 0.06),
        "motion": (0.5, 0.03),
        "drift_path": (-0.92, 0.05),
        "drift_motion": (-0.96, 0.05),
    },
    slow_down: {"path": (0.47, 0.06), "motion": (0.5, 0.02), "speed": (0, 0)},
    shuffle: {
        "path": (0, 0.05),
        "motion": (4.2, 0.2),
        "drift_motion": (0.15, 0.1),
        "direction": (0.5, 0.1),  # by chance
        "speed": (0, 0),
        "brightness_flicker": (1, 0.2),
    },
    vanish: {
        "survived": (3, 0),
        "colour_right": (0.5, 0.01),
        "kind_right": (0.5, 0.02),
        "size_right": (0.5, 0.02),
        "right": (0.5, 0.02),
        "path": (0.5, 0.06),
        "sharpness": (0.24, 0.03),
        "drift_sharpness": (-0.48, 0.06),
        "drift_right": (-1, 0.02),
        "drift_path": (-0.82, 0.05),  # the half second in which they vanish is lost
        "motion": (0.49, 0.03),
        "drift_motion": (-0.98, 0.03),
        **dict.fromkeys(("drift_colour_error", "drift_area_ratio"), UNKNOWN),
        "brightness_flicker": (0.92, 0.05),  # the jump is inside a block
    },
    speckle: {
        "artefacts": (0.025, 0.005),
        "drift_artefacts": (0.05, 0.01),
        "area_ratio": (0.975, 0.01),  # an artefact is no part of the shape
        "drift_area_ratio": (-0.05, 0.01),
        "brightness_flicker": (0.9, 0.2),
    },
    flash: {
        "background_flicker": (7, 0.5),
        "brightness_flicker": (6, 1),
        "background_error": (2.6, 0.3),  # half of the frames, by 3 * sqrt(3)
        "colour_error": (2.6, 0.3),
    },
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "corrupt",
    [
        pytest.param(c, marks=() if c in (blur, freeze, vanish) else pytest.mark.slow)
        for c in CORRUPTIONS
    ],
    ids=lambda c: c.__name__,
)
def test_a_corruption_moves_what_it_should_and_nothing_else(corrupt):
    expected = {name: (clean()[name], STEADY[name]) for name in clean()} | CORRUPTIONS[corrupt]
    found = mean_sums(corrupt)
    wrong = {
        name: f"{found[name]:.3f}, not {value:.3f} +- {bar}"
        for name, (value, bar) in expected.items()
        if not np.isclose(found[name], value, rtol=0, atol=bar + 1e-9, equal_nan=True)
    }
    assert not wrong


def test_a_true_clip_measures_as_true():
    truth = clean()
    for name in ("background", "count", "colour", "kind", "size", "direction", "speed"):
        assert truth[name] == 1
    assert truth["survived"] == 6
    assert truth["path"] > 0.95
    assert truth["motion"] == pytest.approx(0.97, abs=0.01)  # a turn at a wall is a shorter way
    assert truth["area_ratio"] == pytest.approx(1, abs=0.02)
    assert truth["sharpness"] == pytest.approx(0.48, abs=0.03)
    assert truth["artefacts"] < 1e-4
    assert max(truth["background_error"], truth["colour_error"]) < 0.5
    assert truth["background_flicker"] == pytest.approx(1, abs=0.05)


# Against the truth


def compare(scene, num_frames):
    """Errors of the meter on a clip of the world: rates of right answers, and distances."""
    measures = measure(render(scene, num_frames), scene.caption)
    accuracy = asdict(report(measures).accuracy)
    position, velocity, kind = [], [], []
    for true, track in zip(scene.shapes, measures.seen.shapes, strict=True):
        truth = true.positions(num_frames)
        position.append(np.abs(track.position - truth).max(1))
        velocity.append(np.abs(track.velocity - np.gradient(truth, 1 / FPS, axis=0)).max(1))
        kind.append(track.kind == list(KINDS).index(true.kind))
    seen = measures.seen
    return accuracy, np.concatenate(position), np.concatenate(velocity), np.concatenate(kind), seen


def check_against_truth(scenes, num_frames):
    accuracies, position, velocity, kind, seen = zip(
        *(compare(scene, num_frames) for scene in scenes), strict=True
    )
    for name in accuracies[0]:
        assert np.mean([accuracy[name] for accuracy in accuracies]) >= 0.99, name
    position, velocity = np.concatenate(position), np.concatenate(velocity)
    assert np.isnan(position).mean() < 0.004  # a shape wholly behind another
    assert (np.nanquantile(position, [0.5, 0.99]) < [0.1, 0.25]).all()
    assert np.nanmax(position) < 1.5
    assert (np.nanquantile(velocity, [0.5, 0.99]) < [0.8, 3.0]).all()
    assert np.concatenate(kind).mean() > 0.995
    assert np.mean(np.concatenate([s.artefacts for s in seen])) < 1e-4


@pytest.mark.slow
def test_the_meter_reads_true_clips():
    check_against_truth([sample_scene(5, index) for index in range(32)], 25)


@pytest.mark.long
def test_the_meter_reads_true_clips_for_a_minute():
    check_against_truth([sample_scene(6, index, split="heldout") for index in range(8)], 961)


@pytest.mark.slow
def test_the_meter_reads_blurred_and_noisy_clips():
    """About what a small VAE leaves: still the right kind, colour, size and place."""
    rng = np.random.default_rng(1)
    for scene in (sample_scene(7, index) for index in range(12)):
        frames = noise(blur(render(scene, 25), rng, sigma=1.0), rng, sigma=5)
        measures = measure(frames, scene.caption)
        accuracy = report(measures).accuracy
        assert min(asdict(accuracy).values()) == 1, scene.caption
        for true, track in zip(scene.shapes, measures.seen.shapes, strict=True):
            assert np.nanmedian(np.abs(track.position - true.positions(25))) < 0.3


@pytest.mark.parametrize("size", [32, 96])
def test_lengths_are_in_units_at_every_size(size):
    scene = SCENES[0]
    track = observe(render(scene, 9, size=size)).shapes[0]
    np.testing.assert_allclose(track.position, scene.shapes[0].positions(9), atol=0.3)
    np.testing.assert_allclose(track.area, np.pi * 11**2, rtol=0.04)


# Without a prompt, and with a wrong one


def test_a_video_is_read_without_its_prompt():
    seen = observe(render(SCENES[2], 9))
    found = {(list(COLOURS)[s.colour[0]], list(KINDS)[s.kind[0]]) for s in seen.shapes}
    assert found == {("cyan", "square"), ("green", "triangle")}
    assert (seen.count == 2).all()


@pytest.mark.slow
def test_another_prompt_is_told_in_what_it_differs():
    frames = render(SCENES[0], 33)
    (true,) = SCENES[0].attributes.shapes
    other = {"kind": "star", "colour": "red", "size": "small", "speed": "fast", "direction": "up"}
    for field, value in other.items():
        prompt = Attributes("navy", (type(true)(**{**asdict(true), field: value}),))
        wrong = [
            k for k, right in asdict(report(measure(frames, prompt)).accuracy).items() if not right
        ]
        assert wrong == [field]
    accuracy = report(measure(frames, Attributes("maroon", (true,)))).accuracy
    assert [k for k, right in asdict(accuracy).items() if not right] == ["background"]
    one_of_two = Attributes("maroon", SCENES[2].attributes.shapes[:1])
    accuracy = report(measure(render(SCENES[2], 33), one_of_two)).accuracy
    assert [k for k, right in asdict(accuracy).items() if not right] == ["count"]


def test_a_shape_that_turns_into_another_survives_until_then():
    square = Scene("navy", (shape("large green square", "slow right", 16.0, 30.0),), "")
    frames = np.concatenate([render(SCENES[0], 40), render(square, 56, start=40)])
    result = report(measure(frames, SCENES[0].attributes))
    assert result.survived_seconds == 2  # 40 frames: two seconds and a half
    assert result.accuracy.kind == 0
    assert result.accuracy.colour == 1


def test_a_shape_that_is_hidden_for_a_moment_moves_on():
    """What covers it is no fault of its motion; to be away for longer is."""
    front = shape("large red square", "slow right", 20.0, 32.0)
    hidden = shape("large blue square", "fast left", 50.0, 32.0)
    scene = Scene("gray", (front, hidden), "")
    whole = measure(render(scene, 48), scene.attributes)
    assert np.isnan(whole.seen.shapes[1].position[:, 0]).any(), "it was hidden"
    assert report(whole).path > 0.95
    frames = render(SCENES[0], 64)
    frames[20:36] = frames[20, 0, 0]
    assert report(measure(frames, SCENES[0].attributes)).path < 0.75


def hide_for(seconds):
    """A gray clip of 8 s in which a blue square comes, is away, and goes on; a red one stays."""
    red = shape("large red square", "slow right", 20.0, 32.0)
    blue = shape("large blue square", "slow right", 34.0, 32.0)
    scene = Scene("gray", (red, blue), "")
    shown = Scene("gray", (red,), "")
    gone = slice(40, 40 + round(16 * seconds))
    frames = render(scene, 128)
    frames[gone] = render(shown, 128)[gone]
    return measure(frames, scene.attributes)


@pytest.mark.slow
def test_what_is_hidden_is_not_wrong_for_as_long_as_the_world_hides_it():
    covered = hide_for(1.4)
    assert np.isnan(covered.right[40:60]).all()
    gone = hide_for(2)
    assert (gone.right[40:72] == 0).all()


@pytest.mark.parametrize(
    ("unsaid", "index", "until", "absent", "unclear"),
    [(False, 297, 2715, 15, 1), (False, 241, 2366, 0, 48), (True, 241, 2467, 0, 43)],
)
def test_true_shapes_that_hide_each_other_for_long_survive(unsaid, index, until, absent, unclear):
    """The longest times that scenes of the data set hide a shape (see `HIDDEN_SECONDS`)."""
    scene = sample_scene(0, index, split="heldout", unsaid=unsaid)
    frames = render(scene, 112, start=until - 80)
    measures = measure(frames, scene.caption, unsaid=unsaid)
    behind = measures.seen.shapes[1]
    assert np.sum(~behind.present) == absent
    assert np.sum(behind.visible[behind.present] < 0.5) >= unclear
    assert report(measures).survived_seconds == 7
    assert not (measures.right == 0).any()


def test_a_pair_that_is_one_shape_is_wrong_from_the_start():
    pair = SCENES[2]
    alone = Scene(pair.background, pair.shapes[:1], "")
    measures = measure(render(alone, 96), pair.attributes)
    assert (measures.right == 0).all()
    assert report(measures).survived_seconds == 0


@pytest.mark.slow
def test_an_unclear_shape_hides_no_wrong_one():
    front = shape("large red square", "slow right", 24.0, 32.0)
    back = shape("large blue star", "slow right", 28.0, 32.0)
    scene = Scene("gray", (front, back), "")
    frames = render(scene, 24)
    measures = measure(frames, scene.attributes)
    assert np.isnan(measures.right).all(), "too little of the star is visible to judge it"
    (square, star) = scene.attributes.shapes
    wrong = Attributes("gray", (type(square)(**{**asdict(square), "kind": "circle"}), star))
    measures = measure(frames, wrong)
    assert (measures.right == 0).all()
    assert report(measures).survived_seconds == 0
    frozen = np.repeat(frames[:1], 80, axis=0)
    assert (measure(frozen, scene.attributes).right == 0).all(), "unclear for too long"


def test_the_last_five_seconds_are_counted_in_frames():
    frames = np.concatenate([render(SCENES[0], 80), vanish(render(SCENES[0], 2), None)[-1:]])
    frames[-1] = frames[-1, 0, 0]
    result = report(measure(frames, SCENES[0].attributes))
    assert result.per_second["right"][-1] == 0
    assert result.late["right"] == pytest.approx(1 - 1 / 40)  # halves: the video is under 10 s


@pytest.mark.parametrize(
    ("frames", "fps", "message"),
    [
        (render(SCENES[0], 20), 1, "from 2 frames/s on, not at 1"),
        (render(SCENES[0], 20, size=8), 16, "from 16 pixels on, not 8"),
    ],
)
def test_what_is_too_coarse_to_measure_is_refused(frames, fps, message):
    with pytest.raises(UserError, match=message):
        measure(frames, SCENES[0].attributes, fps=fps)


def test_a_direction_that_cannot_be_seen_is_unknown():
    result = report(measure(render(SCENES[0], 20, fps=2.5), SCENES[0].attributes, fps=2.5))
    assert np.isnan(result.accuracy.direction)
    assert result.accuracy.kind == 1
    assert result.path > 0.9


# Whatever a network draws


@pytest.mark.parametrize("level", [0, 255, None], ids=["black", "white", "noise"])
def test_any_video_can_be_measured(level):
    rng = np.random.default_rng(0)
    frames = np.full((20, 64, 64, 3), level or 0, np.uint8)
    if level is None:
        frames = rng.integers(0, 256, frames.shape).astype(np.uint8)
    result = report(measure(frames, caption(SCENES[2].attributes, 0)))
    assert result.accuracy.direction == 0
    assert result.path < 0.1
    assert result.survived_seconds == 0
    json.dumps(to_json(result), allow_nan=False)
    observe(frames)


def test_what_is_no_square_video_is_refused():
    with pytest.raises(UserError, match="square"):
        observe(np.zeros((4, 32, 64, 3), np.uint8))
    with pytest.raises(UserError, match="uint8"):
        observe(np.zeros((4, 64, 64, 3)))
    with pytest.raises(UserError, match="shapes world"):
        measure(np.zeros((4, 64, 64, 3), np.uint8), "a dog")


@pytest.mark.slow
def test_a_video_in_pieces_measures_as_the_whole():
    scene = SCENES[2]
    frames = render(scene, NUM_FRAMES)
    whole = json.dumps(to_json(measure(frames, scene.attributes)))
    for lengths in ([9, 12], [1, 40], [64]):
        meter = ShapeMeter(scene.attributes)
        start = 0
        while start < NUM_FRAMES:
            length = lengths.pop(0) if len(lengths) > 1 else lengths[0]
            meter.add(frames[start : start + length])
            start += length
        assert json.dumps(to_json(meter.measures())) == whole


def test_a_video_in_pieces_needs_two_frames():
    meter = ShapeMeter(SCENES[0].attributes)
    meter.add(render(SCENES[0], 1))
    with pytest.raises(UserError, match="at least 2 frames"):
        meter.measures()
    with pytest.raises(UserError, match="from 2 frames/s on"):
        meter.measures(1.5)
    with pytest.raises(UserError, match="square"):
        meter.add(np.zeros((3, 8, 16, 3), np.uint8))
