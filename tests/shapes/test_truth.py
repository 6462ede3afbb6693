"""The truth about the shapes world in the evaluation: true clips are right, groups, fallbacks."""

import json
import math

import numpy as np
import pytest

from evaluation.results import summarise, summary_text
from scripts.evaluate import main
from shapes.truth import ShapesTruth
from shapes.world import render, sample_scene
from utils.cli import run_main
from utils.video import VideoWriter, read_image

TRUTH = ShapesTruth()


def evaluate(*arguments):
    return run_main(main, ["--meter", "shapes", *(str(argument) for argument in arguments)])


def write_clip(path, scene, frames, *, beside=None):
    with VideoWriter(path) as writer:
        writer.write(render(scene, frames))
    if beside is not None:
        path.with_suffix(".json").write_text(json.dumps(beside))


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Two scenes of one shape, by name; two of two shapes, whose captions stand beside them.

    Fast ones, beside whose way it is little what compression moves; of two sizes, so that no shape
    hides another; not yellow on orange, which a file's colours, of half the resolution, mix.
    """
    folder = tmp_path_factory.mktemp("clips")
    drawn = [sample_scene(0, index) for index in range(200)]
    scenes = [
        scene
        for scene in drawn
        if all(shape.speed == "fast" for shape in scene.shapes)
        and len({shape.size for shape in scene.shapes}) == len(scene.shapes)
        and {shape.colour for shape in scene.shapes} != {"yellow", "orange"}
    ]
    for scene in [s for s in scenes if len(s.shapes) == 1][:2]:
        write_clip(folder / f"{scene.caption}-0.mp4", scene, 96)
    for number, scene in enumerate([s for s in scenes if len(s.shapes) == 2][:2]):
        beside = {"prompt": scene.caption, "sample": 1}
        write_clip(folder / f"{number}-0_ema.mp4", scene, 96, beside=beside)
    return folder


@pytest.mark.slow
def test_true_clips_are_right(clips, tmp_path, capsys):
    out, plot = tmp_path / "out.json", tmp_path / "out.png"
    assert evaluate("--videos", clips, "--json", out, "--plot", plot) == 0
    content = json.loads(out.read_text())
    summary = content["summary"]["shapes"]
    assert (summary["videos"], summary["prompts"], summary["seeds"]) == (4, 4, 2)
    measures = {name: value["mean"] for name, value in summary["measures"].items()}
    for name in ("background", "colour", "kind", "size", "direction", "speed"):
        assert measures[f"accuracy.{name}"] == 1
    assert measures["late.right"] > 0.97
    assert measures["motion"] > 0.9
    assert measures["survival.5s"] == 1
    assert measures["right_at.5s"] == 1
    assert not {"survival.60s", "right_at.60s"} & set(measures)
    assert abs(measures["drift.colour_error"]) < 3
    assert summary["survival"] == [1.0] * 6
    assert len(summary["per_second"]["colour_error"]["mean"]) == 6
    assert min(read_image(plot).shape[:2]) > 300
    printed = capsys.readouterr().out
    assert "shapes: 4 videos, 4 prompts, 2 seeds" in printed
    assert "direction" in printed


def test_a_corrected_prompt_is_measured_again(tmp_path):
    scene = sample_scene(0, 0)
    write_clip(tmp_path / "x-0.mp4", scene, 20, beside={"prompt": "a boat"})
    out = tmp_path / "out.json"
    assert evaluate("--videos", tmp_path, "--json", out) == 0
    write_clip(tmp_path / "x-0.mp4", scene, 20, beside={"prompt": scene.caption})
    assert evaluate("--videos", tmp_path, "--json", out) == 0
    assert set(json.loads(out.read_text())["summary"]) == {"shapes"}


def test_a_wide_video_under_a_caption_is_none_of_this_world(tmp_path):
    scene = sample_scene(0, 0)
    wide = np.concatenate([render(scene, 20)] * 2, axis=2)
    with VideoWriter(tmp_path / f"{scene.caption}-0.mp4") as writer:
        writer.write(wide)
    assert evaluate("--videos", tmp_path, "--json", tmp_path / "out.json") == 0
    assert set(json.loads((tmp_path / "out.json").read_text())["summary"]) == {"video"}


@pytest.mark.parametrize(
    ("survived", "right", "at"),
    [
        (5, [0.0] * 5, 1),
        (5, [None] * 5, 1),
        (4, [1.0, 1.0, 0.6, None, 0.0], 1),
        (4, [1.0, 0.6, 0.4, None, 0.0], 0),
        (4, [None] * 5, None),
    ],
)
def test_what_was_never_wrong_is_right_then(survived, right, at):
    """Also where hardly a frame can be judged, or none."""
    report = {"seconds": 5.0, "survived_seconds": survived, "per_second": {"right": right}}
    known = TRUTH.extra_measures({"report": report})
    assert known["survival.5s"] == (survived == 5)
    assert (None if math.isnan(known["right_at.5s"]) else known["right_at.5s"]) == at


def test_one_shape_and_two_are_told_apart():
    def result(index, seed, motion, survived):
        report = {"seconds": 5.0, "motion": motion, "survived_seconds": survived}
        report["per_second"] = {"right": [1.0, 0.0, 0.75, None, 0.5 if motion else 0.25]}
        prompt = sample_scene(0, index).caption
        return {"prompt": prompt, "seed": seed, "kind": "shapes", "report": report}

    one, two = (
        next(i for i in range(99) if len(sample_scene(0, i).shapes) == count) for count in (1, 2)
    )
    results = [result(one, 0, 0.5, 5), result(two, 0, 0.0, 1), result(two, 1, 0.25, 5)]
    summary = summarise(results, TRUTH)
    parts = summary["groups"]
    assert [parts[name]["videos"] for name in ("one shape", "two shapes")] == [1, 2]
    assert parts["one shape"]["measures"]["motion"] == {"mean": 0.5, "spread": None}
    assert parts["two shapes"]["measures"]["motion"]["mean"] == 0.125
    assert parts["two shapes"]["measures"]["survival.5s"]["mean"] == 0.5
    assert [parts[n]["measures"]["right_at.5s"]["mean"] for n in ("one shape", "two shapes")] == [
        1,
        0.5,
    ]
    lines = [" ".join(line.split()) for line in summary_text(summary, TRUTH).splitlines()]
    assert lines[1] == "all one shape (1) two shapes (2)"
    assert "motion 0.250 ± 0.000 0.500 0.125 ± 0.177" in lines
    never, right = lines.index("never wrong in"), lines.index("right at")
    assert [lines[row + 1].split()[0] for row in (never, right)] == ["5s", "5s"]
    assert "groups" not in summarise(results[1:], TRUTH)
