import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from shapes.world import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    KINDS,
    LANE,
    PHRASINGS,
    RUN_UP_SECONDS,
    SCALES,
    SHADES,
    SIZES,
    SPEEDS,
    START_SPREAD,
    TINTS,
    TOGETHER_SECONDS,
    WAVE_HEIGHT,
    WORLD,
    Attributes,
    Scene,
    Shape,
    ShapeAttributes,
    ShapesDataset,
    background_rows,
    caption,
    coverage,
    ground_colours,
    is_held_out,
    parse_caption,
    render,
    sample_scene,
    shade_of,
    token_classes,
    token_labels,
)
from utils.errors import UserError

EVERY_SHAPE = [
    Shape(kind, "red", size, speed, direction, position=(30.0, 32.0))
    for kind, size, speed, direction in itertools.product(KINDS, SIZES, SPEEDS, DIRECTIONS)
]


IN_BOTH_WORLDS = pytest.mark.parametrize("unsaid", [False, True])


def scenes(count, split="train", seed=3, unsaid=False):
    return [sample_scene(seed, index, split=split, unsaid=unsaid) for index in range(count)]


# The data set


def test_a_clip_is_a_function_of_seed_index_and_split():
    clip, again = (ShapesDataset(5, seed=1)[7] for _ in range(2))
    assert clip.caption == again.caption
    assert np.array_equal(clip.frames, again.frames)
    others = [ShapesDataset(5, seed=2)[7], ShapesDataset(5, seed=1)[8]]
    others += [ShapesDataset(5, seed=1, split="heldout")[7]]
    assert all(not np.array_equal(clip.frames, other.frames) for other in others)


def test_scenes_stay_what_they_were_in_earlier_versions():
    assert sample_scene(0, 0).caption == (
        "A gray background: a small green square glides to the upper right at a slow pace and "
        "further back a small cyan circle glides to the right at a fast pace."
    )


def test_the_data_set_iterates_in_the_order_of_its_index():
    dataset = ShapesDataset(2)
    for index, clip in enumerate(itertools.islice(dataset, 3)):
        assert np.array_equal(clip.frames, dataset[index].frames)


@pytest.mark.slow
def test_held_out_looks_never_occur_in_training():
    def looks(split):
        drawn = scenes(1500, split)
        return {(s.colour, s.kind, scene.background) for scene in drawn for s in scene.shapes}

    train, heldout = looks("train"), looks("heldout")
    assert not train & heldout
    assert len(heldout) == 4 * 6
    assert len(train) == 8 * 4 * 6 - 4 * 6


def test_every_pair_of_values_is_seen_in_training():
    """What is held out are combinations; any two of colour, kind, background are seen together."""
    train = {
        look
        for look in itertools.product(COLOURS, KINDS, BACKGROUNDS)
        if not is_held_out(ShapeAttributes(look[1], look[0], "small", "slow", "up"), look[2])
    }
    for first, second in itertools.combinations(range(3), 2):
        tables = [(COLOURS, KINDS, BACKGROUNDS)[axis] for axis in (first, second)]
        assert {(look[first], look[second]) for look in train} == set(itertools.product(*tables))


@pytest.mark.slow
def test_scenes_cover_every_attribute_and_keep_the_rules():
    drawn = scenes(600)
    shapes = [shape for scene in drawn for shape in scene.shapes]
    tables = {"kind": KINDS, "colour": COLOURS, "size": SIZES, "speed": SPEEDS}
    for field, table in {**tables, "direction": DIRECTIONS}.items():
        assert {getattr(shape, field) for shape in shapes} == set(table)
    assert {scene.background for scene in drawn} == set(BACKGROUNDS)
    for split, share in (("train", 3 / 4), ("heldout", 1 / 4)):
        pairs = np.mean([len(scene.shapes) == 2 for scene in scenes(600, split)])
        assert abs(pairs - share) < 0.05
    for scene in drawn:
        assert len({shape.colour for shape in scene.shapes}) == len(scene.shapes)
        radii = [shape.radius for shape in scene.shapes]
        assert radii == sorted(radii)  # the smaller in front


def test_an_unknown_split_is_refused():
    with pytest.raises(UserError, match="train, heldout"):
        sample_scene(0, 0, split="test")


# Motion


@pytest.mark.parametrize(
    "shape", EVERY_SHAPE[::7], ids=lambda s: f"{s.kind}-{s.speed}-{s.direction}"
)
def test_position_is_that_of_a_simulation_in_small_steps(shape):
    steps, fps = 64, 16
    position, velocity = np.array(shape.position), np.array(shape.velocity)
    low, high = shape.bounds
    simulated = []
    for step in range(20 * fps * steps):
        if step % steps == 0:
            simulated.append(position.copy())
        position = position + velocity / (fps * steps)
        velocity = np.where(position < low, abs(velocity), velocity)
        velocity = np.where(position > high, -abs(velocity), velocity)
    error = np.abs(shape.positions(20 * fps) - simulated).max()
    assert error < 2 * 20 * SPEEDS["fast"] / (fps * steps)  # one overshoot per bounce, 20 at most


@IN_BOTH_WORLDS
def test_the_direction_of_the_caption_lasts_for_the_run_up(unsaid):
    for scene in scenes(300, unsaid=unsaid):
        for shape in scene.shapes:
            frames = int(RUN_UP_SECONDS * 16) + 1
            straight = np.array(shape.position) + np.outer(
                np.arange(frames) / 16, np.array(shape.velocity)
            )
            np.testing.assert_allclose(shape.positions(frames), straight, atol=1e-9)


def middle_of_start(shape, lane):
    x, y = DIRECTIONS[shape.direction]
    low, high = shape.bounds
    at_the_wall = np.where(np.sign([x, y]) > 0, low + START_SPREAD, high - START_SPREAD)
    still = np.abs([x, y]) < 1e-9
    return np.where(still, (low + high) / 2, at_the_wall) + lane * np.array([-y, x])


@IN_BOTH_WORLDS
def test_shapes_start_at_the_wall_behind_them_side_by_side(unsaid):
    for scene in scenes(300, unsaid=unsaid):
        middles = [middle_of_start(scene.shapes[0], 0.0)]
        if len(scene.shapes) == 2:
            front, back = scene.shapes
            first = middle_of_start(front, -LANE)
            sides = [middle_of_start(back, lane) for lane in (LANE, -LANE)]
            middles = [first, max(sides, key=lambda place: math.dist(first, place))]
            assert math.dist(front.position, back.position) >= front.radius + back.radius
        for shape, middle in zip(scene.shapes, middles, strict=True):
            assert (np.abs(shape.position - middle) <= START_SPREAD + 1e-9).all()


@IN_BOTH_WORLDS
def test_opposite_ways_are_side_by_side(unsaid):
    pairs = [scene.shapes for scene in scenes(600, unsaid=unsaid) if len(scene.shapes) == 2]
    opposite = [
        abs(front.position[1] - back.position[1]) / back.radius
        for front, back in pairs
        if {front.direction, back.direction} == {"left", "right"}
    ]
    assert len(opposite) > 5
    assert min(opposite) > 1


@IN_BOTH_WORLDS
def test_no_shape_stays_over_another(unsaid):
    pairs = [scene.shapes for scene in scenes(400, unsaid=unsaid) if len(scene.shapes) == 2]
    longest = 0
    for front, back in pairs:
        ways = [shape.positions(300 * 8, fps=8) for shape in (front, back)]
        over = np.linalg.norm(ways[0] - ways[1], axis=1) < 0.75 * back.radius
        runs = [len(list(run)) for value, run in itertools.groupby(over) if value]
        longest = max(longest, *runs, 0)
    assert 2 < longest / 8 <= TOGETHER_SECONDS + 0.25


@IN_BOTH_WORLDS
def test_shapes_pass_over_each_other(unsaid):
    def nearest(scene):
        front, back = (shape.positions(160) for shape in scene.shapes)
        return np.linalg.norm(front - back, axis=1).min()

    pairs = [scene for scene in scenes(300, unsaid=unsaid) if len(scene.shapes) == 2]
    assert np.mean([nearest(scene) < scene.shapes[0].radius for scene in pairs]) > 0.4


def test_a_long_clip_continues_a_short_one():
    scene = sample_scene(0, 1)
    np.testing.assert_array_equal(render(scene, 40)[25:], render(scene, 15, start=25))


# Drawing


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_a_shape_has_its_area_everywhere_so_it_is_always_inside(kind, size):
    shape = Shape(kind, "red", size, "fast", "lower right", position=(30.0, 30.0))
    cover = coverage(kind, shape.radius, shape.positions(200), 64)
    expected = np.pi * shape.radius**2
    np.testing.assert_allclose(cover.sum((1, 2)), expected, rtol=0.015)


@pytest.mark.parametrize("kind", KINDS)
def test_the_extents_of_a_kind_are_those_of_its_drawing(kind):
    rows = coverage(kind, 20.0, np.array([[32.0, 32.0]]), 256)[0] > 0.5
    height, width = (np.flatnonzero(rows.any(axis)) / 4 for axis in (1, 0))
    side, up, down = (20 * extent for extent in KINDS[kind].extents)
    assert [32 - width[0], 32 - height[0]] == pytest.approx([side, up], abs=0.8)
    assert [width[-1] - 32, height[-1] - 32] == pytest.approx([side, down], abs=0.8)


@pytest.mark.parametrize("kind", KINDS)
def test_position_is_the_centroid(kind):
    centres = np.random.default_rng(0).uniform(24, 40, (50, 2))
    cover = coverage(kind, 9.0, centres, 64)
    axis = np.arange(64) + 0.5
    total = cover.sum((1, 2))
    found = (
        np.stack([(cover.sum(1) * axis).sum(1), (cover.sum(2) * axis).sum(1)], 1) / total[:, None]
    )
    np.testing.assert_allclose(found, centres, atol=0.05)


def test_pixels_are_the_colours_of_the_tables_where_nothing_mixes():
    front = Shape("square", "red", "small", "slow", "right", position=(32.0, 32.0))
    behind = replace(front, kind="circle", colour="blue", size="large")
    frame = render(Scene("navy to maroon", (front, behind), ""), 1)[0]
    assert tuple(frame[32, 32]) == COLOURS["red"]
    assert tuple(frame[32, 41]) == COLOURS["blue"]
    expected = np.floor(background_rows("navy to maroon", 64) + 0.5)
    np.testing.assert_array_equal(frame[:, 0], expected)


@pytest.mark.parametrize("size", [32, 48, 128])
@pytest.mark.parametrize("unsaid", [False, True])
def test_other_sizes_show_the_same_scene(size, unsaid):
    scene = sample_scene(0, 3, unsaid=unsaid)
    frames = render(scene, 9, size=size)
    assert frames.shape == (9, size, size, 3)
    assert frames.mean((1, 2)) == pytest.approx(render(scene, 9).mean((1, 2)), abs=1.5)


def test_impossible_sizes_are_refused():
    with pytest.raises(UserError, match="1 or more"):
        render(sample_scene(0, 0), 0)


def test_the_colours_are_far_apart():
    """Even a half-covered pixel is not mistaken for another colour: mixes keep 60 grey levels."""
    palette = {name: np.array(rgb, float) for name, rgb in COLOURS.items()}
    for first, second in itertools.combinations(palette.values(), 2):
        assert np.linalg.norm(first - second) > 100
    for name, row in itertools.product(BACKGROUNDS, range(0, 64, 4)):
        behind = background_rows(name, 64)[row]
        for first, second in itertools.permutations(palette.values(), 2):
            assert np.linalg.norm(first - behind) > 95
            mixes = behind + np.linspace(0, 1, 21)[:, None] * (second - behind)
            assert np.linalg.norm(first - mixes, axis=1).min() > 60


# What captions leave open


def test_what_is_left_open_is_drawn_beside_the_scene_and_constant():
    """Drawing it must not change what the same index shows without it, nor any caption."""
    for plain, scene in zip(scenes(200), scenes(200, unsaid=True), strict=True):
        assert (scene.caption, scene.attributes) == (plain.caption, plain.attributes)
        assert plain.ground is None
        assert {(shape.shade, shape.scale) for shape in plain.shapes} == {(None, 1.0)}
    assert scene == scenes(200, unsaid=True)[-1]
    frames = ShapesDataset(5, seed=3, unsaid=True)[199].frames
    assert np.array_equal(frames, render(scene, 5))
    expected = np.floor(ground_colours(scene, 64) + 0.5)
    bare = coverage_of(scene, 5).max(0) == 0
    assert bare.mean() > 0.5
    assert (frames[:, bare] == expected[bare]).all()


def coverage_of(scene, frames):
    tracks = [(s, s.positions(frames)) for s in scene.shapes]
    return np.max([coverage(s.kind, s.radius, track, 64) for s, track in tracks], axis=0)


def test_what_is_left_open_fills_its_ranges_and_keeps_the_rules():
    drawn = scenes(600, unsaid=True)
    shapes = [shape for scene in drawn for shape in scene.shapes]
    for values, (low, high) in (
        ([shape.shade for shape in shapes], (0, 1)),
        ([shape.scale for shape in shapes], SCALES),
        ([scene.ground.direction for scene in drawn], (0, math.pi)),
        ([scene.ground.phase for scene in drawn], (0, 2 * math.pi)),
    ):
        assert low <= min(values) < max(values) < high
        assert np.histogram(values, 4, (low, high))[0].min() > 0.15 * len(values)
    for name, (low, high) in TINTS.items():
        ends = [(s.background.split(" to "), s.ground) for s in drawn]
        tints = [g.top for names, g in ends if names[0] == name]
        tints += [g.bottom for names, g in ends if names[-1] == name]
        assert np.ptp(tints, axis=0) == pytest.approx(np.subtract(high, low), rel=0.15)
        assert (np.array(tints) >= low).all()
        assert (np.array(tints) <= high).all()
    for scene in drawn:
        assert (scene.ground.top == scene.ground.bottom) == (" to " not in scene.background)
        radii = [shape.radius for shape in scene.shapes]
        assert radii == sorted(radii)
        for shape in scene.shapes:
            run_up = np.array(shape.position) + np.array(shape.velocity) * RUN_UP_SECONDS
            low, high = shape.bounds
            assert (np.minimum(shape.position, run_up) >= low - 1e-9).all()
            assert (np.maximum(shape.position, run_up) <= high + 1e-9).all()
        if len(radii) == 2:
            assert math.dist(*(shape.position for shape in scene.shapes)) >= sum(radii)


def corners(low, high):
    return np.array(list(itertools.product(*zip(low, high, strict=True))), float)  # [8, 3]


def every_ground():
    """All extreme colours [n, 3] of each background, crests and troughs of its grating included.

    What it can show lies between them: mixes of top and bottom, of tints, of wave heights.
    """
    boxes = {name: corners(*ends) for name, ends in TINTS.items()}
    for name in BACKGROUNDS:
        tints = np.concatenate([boxes[edge] for edge in name.split(" to ")])
        yield name, np.concatenate([tints + WAVE_HEIGHT, tints - WAVE_HEIGHT])


def gap(one, other):
    """A distance that any two mixes of the points [n, 3] and [m, 3] keep.

    Along the line between the nearest two mixes (Gilbert's algorithm), no two corners are nearer.
    """
    corners = (one[:, None] - other[None]).reshape(-1, 3)
    nearest = corners.mean(0)
    for _ in range(2000):
        step = corners[(corners @ nearest).argmin()] - nearest
        nearest = nearest + step * np.clip(-(step @ nearest) / max(step @ step, 1e-12), 0, 1)
    return (corners @ nearest).min() / np.linalg.norm(nearest)


@pytest.mark.slow
def test_colours_stay_apart_under_all_shades_and_tints():
    shades = {name: np.array(ends, float) for name, ends in SHADES.items()}
    assert list(shades) == list(COLOURS)
    for first, second in itertools.combinations(shades.values(), 2):
        assert gap(first, second) > 75
    for name, ground in every_ground():
        assert ground.min() >= 0, name
        for shade in shades.values():
            assert shade.max() <= 255
            assert gap(shade, ground) > 60, name
    boxes = [corners(*ends) for ends in TINTS.values()]
    for first, second in itertools.combinations(boxes, 2):
        assert gap(first, second) > 60


def test_the_gap_of_corners_is_the_distance_of_the_nearest_mixes():
    """Corners are far apart here, and the lines between them all but cross."""
    line, across = np.array([[0, 0, 0], [10, 0, 0]]), np.array([[5, -7, 3], [5, 7, 3]])
    assert gap(line, across) == pytest.approx(3, abs=1e-3)
    assert gap(line, across - (0, 0, 2.9)) < 0.11


def test_sizes_stay_apart_and_shades_are_what_their_ends_say():
    small, large = (radius * np.array(SCALES) for radius in SIZES.values())
    assert small.max() < math.sqrt(math.prod(SIZES.values())) < large.min()
    assert shade_of("red", 0.0) == SHADES["red"][0]
    assert shade_of("red", 0.5) == pytest.approx(np.mean(SHADES["red"], axis=0))


def test_a_grating_is_a_wave_across_its_direction():
    """Down here, so rows are even; in all channels alike."""
    scene = next(s for s in scenes(50, unsaid=True) if s.background == "gray")
    ground = replace(scene.ground, direction=math.pi / 2, phase=0.0)
    wave = ground_colours(replace(scene, ground=ground), 64) - np.array(ground.top)
    assert np.ptp(wave, axis=(1, 2)).max() < 1e-3
    rows = np.arange(64) + 0.5 - 32
    expected = WAVE_HEIGHT * np.cos(2 * math.pi * rows / 40)
    np.testing.assert_allclose(wave[:, 0, 0], expected, atol=1e-3)


# Captions


@pytest.mark.parametrize("phrasing", range(len(PHRASINGS)))
def test_a_caption_says_every_attribute(phrasing):
    for scene in scenes(300) + scenes(100, "heldout"):
        text = caption(scene.attributes, phrasing)
        assert parse_caption(text) == scene.attributes
        assert parse_caption(f"  {text.upper()[:-1]} ") == scene.attributes


def test_scenes_are_captioned_in_every_phrasing():
    used = {
        phrasing
        for scene in scenes(100)
        for phrasing in range(len(PHRASINGS))
        if caption(scene.attributes, phrasing) == scene.caption
    }
    assert used == set(range(len(PHRASINGS)))


def test_a_caption_reads_as_promised():
    shape = ShapeAttributes("circle", "red", "small", "slow", "upper left")
    assert caption(Attributes("navy", (shape,)), 0) == (
        "A small red circle drifts slowly to the upper left over a navy background."
    )


def test_a_foreign_caption_is_refused_with_an_example():
    with pytest.raises(UserError, match="Write it like this"):
        parse_caption("a cat on a beach")


def test_two_shapes_of_one_colour_are_refused():
    two = next(scene for scene in scenes(20) if len(scene.shapes) == 2).attributes
    front, back = two.shapes
    twins = Attributes(two.background, (front, replace(back, colour=front.colour)))
    for phrasing in range(len(PHRASINGS)):
        for read in (parse_caption, lambda text: token_labels(text, len)):
            with pytest.raises(UserError, match="told apart"):
                read(caption(twins, phrasing))


@pytest.mark.parametrize("phrasing", range(len(PHRASINGS)))
def test_every_word_is_labelled_with_what_it_speaks_of(phrasing):
    tables = [list(table) for table in (KINDS, COLOURS, SIZES, DIRECTIONS, SPEEDS)]
    for scene in scenes(50):
        text = caption(scene.attributes, phrasing)
        words = text.lower().rstrip(".").split()
        labels = token_labels(text, lambda beginning: len(beginning.split()))
        assert len(labels) == len(words)
        assert {label[0] for label in labels} == {list(BACKGROUNDS).index(scene.background)}
        assert {label[1] for label in labels} == {len(scene.shapes) - 1}
        for place, shape in enumerate(scene.shapes):
            own = {tuple(label[3:]) for label in labels if label[2] == place}
            names = (shape.kind, shape.colour, shape.size, shape.direction, shape.speed)
            assert own == {tuple(map(list.index, tables, names))}
            about = {
                word.strip(",;:")
                for word, label in zip(words, labels, strict=True)
                if label[2] == place
            }
            assert {shape.kind, shape.colour, shape.size} <= about
            assert not about & {"and", "behind", "front", "background", "over", "all"}
        rest = [label for label in labels if label[2] == -1]
        assert rest
        assert all(label[2:] == [-1] * 6 for label in rest)


def test_labels_of_words_are_within_their_classes():
    for scene in scenes(50):
        labels = token_labels(scene.caption, lambda beginning: len(beginning.split()))
        assert len(labels[0]) == len(token_classes())
        assert (np.max(labels, axis=0) < token_classes()).all()


def test_every_shape_has_room_for_its_run_up_in_every_direction():
    for shape in [replace(shape, scale=scale) for shape in EVERY_SHAPE for scale in (1.0, *SCALES)]:
        low, high = shape.bounds
        assert (high - low > np.abs(shape.velocity) * RUN_UP_SECONDS).all()
        assert (low > 0).all()
        assert (high < WORLD).all()
