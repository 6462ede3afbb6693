"""The evaluation: true clips are right, a killed run goes on, figures are those of the videos."""

import json
import math
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import pipeline.batch
import scripts.evaluate
from evaluation.results import (
    Judge,
    ResultLog,
    extra_measures,
    mean_and_spread,
    numbers,
    summarise,
    table,
)
from evaluation.trials import Evaluation, held_out_captions, plan_trials
from pipeline import VideoPipeline, load_pipeline
from scripts.evaluate import main
from shapes.world import render, sample_scene
from utils.cli import run_main
from utils.config import load_config
from utils.video import VideoWriter, read_image, read_video
from wan.vae import WanVAE

SQUARE = ["height=32", "width=32"]


def evaluate(*arguments):
    return run_main(main, [str(argument) for argument in arguments])


def model(world):
    given = ["--config_path", world.config, "--checkpoint_path", world.checkpoint]
    return [*given, "--device", "cpu", *SQUARE]


def untimed(value):
    """A result without what differs from run to run."""
    if isinstance(value, dict):
        skipped = ("timings", "fps", "first_frame_s")
        return {k: untimed(v) for k, v in value.items() if k not in skipped}
    return [untimed(item) for item in value] if isinstance(value, list) else value


def write_clip(path, scene, frames, *, beside=None):
    with VideoWriter(path) as writer:
        writer.write(render(scene, frames))
    if beside is not None:
        path.with_suffix(".json").write_text(json.dumps(beside))


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Two scenes of one shape, by name; two of two shapes, whose captions stand beside them.

    Fast ones, beside whose way it is little what compression moves; of two sizes, so that no shape
    hides another.
    """
    folder = tmp_path_factory.mktemp("clips")
    drawn = [sample_scene(0, index) for index in range(200)]
    scenes = [
        scene
        for scene in drawn
        if all(shape.speed == "fast" for shape in scene.shapes)
        and len({shape.size for shape in scene.shapes}) == len(scene.shapes)
    ]
    for scene in [s for s in scenes if len(s.shapes) == 1][:2]:
        write_clip(folder / f"{scene.caption}-0.mp4", scene, 96)
    for number, scene in enumerate([s for s in scenes if len(s.shapes) == 2][:2]):
        beside = {"prompt": scene.caption, "sample": 1}
        write_clip(folder / f"{number}-0_ema.mp4", scene, 96, beside=beside)
    return folder


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


def test_other_videos_are_held_against_their_beginning(tmp_path):
    scene = sample_scene(0, 0)
    write_clip(tmp_path / "a boat at dawn-0.mp4", scene, 40)
    assert evaluate("--videos", tmp_path, "--json", tmp_path / "out.json") == 0
    content = json.loads((tmp_path / "out.json").read_text())
    (result,) = content["videos"]
    assert (result["prompt"], result["seed"], result["kind"]) == ("a boat at dawn", 0, "video")
    assert set(content["summary"]) == {"video"}
    assert content["summary"]["video"]["measures"]["motion"]["spread"] is None


def test_a_model_is_measured_and_the_file_says_how(tiny_world, tmp_path, capsys):
    out, videos = tmp_path / "out.json", tmp_path / "videos"
    given = ["--prompts", 1, "--seeds", 2, "--seconds", 1.5, "--json", out, "--vbench", videos]
    assert evaluate(*model(tiny_world), "seed=5", *given) == 0
    content = json.loads(out.read_text())
    settings = content["settings"]
    assert settings["seeds"] == [5, 6]
    assert settings["video_frames"] == 24
    assert len(settings["config_hash"]) == len(settings["checkpoint_hash"]) == 16
    assert content["versions"]["torch"] == torch.__version__
    (prompt,) = held_out_captions(1)
    assert [(r["prompt"], r["seed"], r["frames"]) for r in content["videos"]] == [
        (prompt, 5, 24),
        (prompt, 6, 24),
    ]
    measures = content["summary"]["shapes"]["measures"]
    assert measures["fps"]["mean"] > 0
    assert measures["motion"]["spread"] is not None
    # what was measured is what inference gives for this prompt and seed
    pipe = load_pipeline(tiny_world.config, tiny_world.checkpoint, "cpu", SQUARE)
    frames = pipe.generate([prompt], 7, seed=6)[0, :24]
    judge = Judge(prompt, fps=16)
    judge.add(frames.numpy())
    assert judge.report() == content["videos"][1]["report"]
    files = sorted(videos.glob("*.mp4"))
    assert [f.stem.rsplit("-", 1)[1] for f in files] == ["0", "1"]
    assert len(read_video(files[0])) == 24
    assert "VBench is not installed" in capsys.readouterr().out


def test_a_killed_run_goes_on_and_ends_as_an_uninterrupted_one(tiny_world, tmp_path, monkeypatch):
    given = [*model(tiny_world), "--prompts", 2, "--seeds", 2, "--seconds", 1, "--json"]
    assert evaluate(*given, tmp_path / "whole.json") == 0
    made, append = [], ResultLog.append

    def dies_after_two(log, key, result):
        append(log, key, result)
        made.append(key)
        if len(made) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(ResultLog, "append", dies_after_two)
    assert evaluate(*given, tmp_path / "part.json") == 130
    assert not (tmp_path / "part.json").exists()
    with (tmp_path / "part.videos.0.jsonl").open("a") as file:
        file.write('{"settings": "cut o')
    assert evaluate(*given, tmp_path / "part.json") == 0
    assert len(made) == len(set(made)) == 4
    whole, part = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("whole", "part"))
    assert untimed(whole) == untimed(part)
    assert len(whole["videos"]) == 4
    # the same command again makes nothing; another checkpoint's results are not mixed in
    assert evaluate(*given, tmp_path / "part.json") == 0
    assert len(made) == 4
    assert evaluate(*given, tmp_path / "part.json", "--use_ema") == 0
    assert len(made) == 8


def test_ranks_share_the_videos_and_the_last_one_sums_up(tiny_world, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out.json"
    given = [*model(tiny_world), "--prompts", 3, "--seconds", 0.5, "--json", out]
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert evaluate(*given) == 0
    assert not out.exists()
    assert "2 of 3 videos are still being made" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "0")
    assert evaluate(*given) == 0
    assert [r["prompt"] for r in json.loads(out.read_text())["videos"]] == held_out_captions(3)


def test_a_record_never_tells_of_another_video(tiny_world, tmp_path, monkeypatch):
    """A run that is stopped between a video and its record leaves the older ones."""
    given = [*model(tiny_world), "--prompts", 1, "--seconds", 0.5, "--keep_videos", tmp_path / "v"]
    assert evaluate(*given, "--json", tmp_path / "a.json") == 0
    assert len(list((tmp_path / "v").glob("*.json"))) == 1

    def dies(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline.batch.BatchRun, "_write_record", dies)
    before = {file: file.read_bytes() for file in (tmp_path / "v").iterdir()}
    other = [*given, "--use_ema", "--json", tmp_path / "b.json"]
    assert evaluate(*other) == 2, "it is not replaced unasked"
    assert evaluate(*other, "--overwrite") == 130
    assert {file: file.read_bytes() for file in (tmp_path / "v").iterdir()} == before


def test_of_ranks_that_end_together_one_sums_up(tmp_path):
    """Both once did, and VBench judged the same folder twice at a time."""
    logs = [ResultLog(tmp_path / "out.json", "same", rank) for rank in (0, 1)]
    assert [log.wrote_last() for log in logs] == [False, False]
    for rank, log in enumerate(logs):
        log.append(f"{rank}", {})
    assert [log.wrote_last() for log in logs].count(True) == 1
    os.utime(tmp_path / "out.videos.0.jsonl", (2e9, 2e9))
    assert [log.wrote_last() for log in logs] == [True, False]


def test_a_finished_command_ends_once_however_many_ranks_repeat_it(
    tiny_world, tmp_path, monkeypatch, capsys
):
    out, plot = tmp_path / "out.json", tmp_path / "out.png"
    given = [*model(tiny_world), "--prompts", 1, "--seconds", 0.5, "--json", out]
    assert evaluate(*given) == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    made = []
    for rank in (1, 0):
        capsys.readouterr()
        monkeypatch.setenv("RANK", str(rank))
        assert evaluate(*given, "--plot", plot) == 0
        made.append((plot.exists(), str(out) in capsys.readouterr().out))
    assert made == [(False, False), (True, True)]


def test_prompts_may_be_longer_than_a_file_name(tiny_world, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vbench", None)
    prompt = "a very " + "long " * 80 + "walk"
    (tmp_path / "prompts.txt").write_text(prompt)
    made, copied = tmp_path / "made", tmp_path / "copied"
    given = ["--data_path", tmp_path / "prompts.txt", "--seconds", 0.5, "--keep_videos", made]
    assert evaluate(*model(tiny_world), *given, "--json", tmp_path / "out.json") == 0
    again = ["--videos", made, "--json", tmp_path / "again.json", "--vbench", copied]
    assert evaluate(*again) == 0
    (result,) = json.loads((tmp_path / "again.json").read_text())["videos"]
    assert result["prompt"] == prompt
    (copy,) = copied.iterdir()
    assert copy.name.startswith("a very long long")
    assert copy.suffix == ".mp4"


def test_two_videos_of_one_vbench_name_are_refused(tmp_path, capsys):
    for name in ("a-0", "a_2-0"):
        write_clip(tmp_path / f"{name}.mp4", sample_scene(0, 0), 5, beside={"prompt": "a"})
    out = tmp_path / "out.json"
    assert evaluate("--videos", tmp_path, "--json", out, "--vbench", tmp_path / "named") == 2
    assert "a-0.mp4 and a_2-0.mp4 would both be" in capsys.readouterr().err
    assert evaluate("--videos", tmp_path, "--json", out) == 0


def test_results_of_another_meter_are_not_used(clips, tmp_path, monkeypatch):
    out = tmp_path / "out.json"
    assert evaluate("--videos", clips, "--json", out) == 0
    changed = {"motion": 7.0}
    before = Judge.report
    monkeypatch.setattr(Judge, "report", lambda self: before(self) | changed)
    assert evaluate("--videos", clips, "--json", out) == 0
    measures = json.loads(out.read_text())["summary"]["shapes"]["measures"]
    assert measures["motion"]["mean"] < 2, "kept"
    monkeypatch.setattr(scripts.evaluate, "METER_VERSION", scripts.evaluate.METER_VERSION + 1)
    assert evaluate("--videos", clips, "--json", out) == 0
    measures = json.loads(out.read_text())["summary"]["shapes"]["measures"]
    assert measures["motion"]["mean"] == 7


def test_vbench_is_called_where_it_is_installed(clips, tmp_path, monkeypatch):
    calls = []

    class FakeVBench:
        def __init__(self, device, full_info, output):
            self.output = output
            calls.append((str(device), full_info))

        def evaluate(self, **options):
            calls.append(options)
            folder = scripts.evaluate.Path(self.output)
            folder.mkdir(parents=True)
            (folder / "videos_eval_results.json").write_text('{"motion_smoothness": [0.9, []]}')

    package = SimpleNamespace(__file__="/x/vbench/__init__.py", VBench=FakeVBench)
    monkeypatch.setitem(sys.modules, "vbench", package)
    out, named = tmp_path / "out.json", tmp_path / "named"
    assert evaluate("--videos", clips, "--json", out, "--vbench", named, "--device", "cpu") == 0
    assert calls[0] == ("cpu", "/x/vbench/VBench_full_info.json")
    assert calls[1]["mode"] == "custom_input"
    assert calls[1]["videos_path"] == str(named)
    assert json.loads(out.read_text())["vbench"] == {"motion_smoothness": [0.9, []]}
    prompts = {r["prompt"]: r["seed"] for r in json.loads(out.read_text())["videos"]}
    assert {f.name for f in named.glob("*.mp4")} == {f"{p}-{i}.mp4" for p, i in prompts.items()}


def test_kept_videos_are_not_judged(tiny_world, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vbench", None)
    videos, out = tmp_path / "videos", tmp_path / "out.json"
    given = [*model(tiny_world), "--prompts", 1, "--seconds", 1, "--json", out]
    assert evaluate(*given, "--keep_videos", videos) == 0
    (prompt,) = held_out_captions(1)
    video = videos / f"{prompt}-0.mp4"
    assert set(videos.iterdir()) == {video, video.with_suffix(".json")}
    assert "vbench" not in json.loads(out.read_text())
    # a video of another model under the same name is made again if told, a finished one is not
    first = video.stat().st_mtime_ns
    assert evaluate(*given, "--keep_videos", videos) == 0
    assert video.stat().st_mtime_ns == first
    changed = [*model(tiny_world), "context_noise=100", *given[len(model(tiny_world)) :]]
    assert evaluate(*changed, "--keep_videos", videos, "--overwrite") == 0
    other = video.stat().st_mtime_ns
    assert evaluate(*given, "--keep_videos", videos, "--overwrite") == 0
    assert video.stat().st_mtime_ns > other > first


def test_the_first_stream_does_not_pay_for_loading(tiny_world, tmp_path, monkeypatch):
    events = []
    real, opened = WanVAE.from_official, VideoPipeline.open_stream
    monkeypatch.setattr(
        WanVAE, "from_official", lambda *a, **k: events.append("load") or real(*a, **k)
    )
    monkeypatch.setattr(
        VideoPipeline, "open_stream", lambda *a, **k: events.append("open") or opened(*a, **k)
    )
    config = load_config(tiny_world.config, [*SQUARE, "device=cpu"])
    evaluation = Evaluation(config, tiny_world.checkpoint, use_ema=False, seconds=0.5)
    evaluation(plan_trials(held_out_captions(1), 1, 0), lambda trial, result: None)
    assert events == ["load", "open"]


def test_without_a_place_for_figures_nothing_lands_here(clips, tmp_path, monkeypatch, capsys):
    """evaluation.json did; now what keeps a run resumable lies below outputs/."""
    monkeypatch.chdir(tmp_path)
    assert evaluate("--videos", clips) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"outputs"}
    out = next((tmp_path / "outputs" / "evaluation").glob("*.json"))
    assert str(out.relative_to(tmp_path)) in capsys.readouterr().out


@pytest.mark.parametrize("beside", [[], None, {"prompt": ["a"]}, {"prompt": "a", "sample": None}])
def test_a_record_of_another_form_is_refused(tmp_path, capsys, beside):
    write_clip(tmp_path / "a-0.mp4", sample_scene(0, 0), 5, beside=beside)
    (tmp_path / "a-0.json").write_text(json.dumps(beside))
    assert evaluate("--videos", tmp_path, "--json", tmp_path / "out.json") == 2
    assert "does not say which prompt a-0.mp4 shows" in capsys.readouterr().err


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


def test_spread_is_that_of_the_seeds_means():
    table = np.array([[0.0], [1.0], [2.0], [np.nan], [4.0]])
    mean, spread = mean_and_spread(table, [0, 0, 1, 1, 2])
    assert mean[0] == pytest.approx(7 / 4)
    assert spread[0] == pytest.approx(np.std([0.5, 2, 4], ddof=1))
    assert np.isnan(mean_and_spread(table, [0] * 5)[1][0])


def test_curves_of_unequal_length_count_while_they_last():
    def result(seed, curve):
        report = {"seconds": len(curve), "motion": None, "per_second": {"change": curve}}
        return {"prompt": "x", "seed": seed, "kind": "video", "report": report}

    summary = summarise([result(0, [1.0, 2.0]), result(1, [3.0, None, 5.0])])
    assert summary["per_second"]["change"]["mean"] == [2.0, 2.0, 5.0]
    assert summary["per_second"]["change"]["spread"] == [pytest.approx(2**0.5), None, None]
    assert summary["measures"]["motion"] == {"mean": None, "spread": None}
    assert numbers({"a": {"b": 1, "per_second": {}}, "c": True}) == {"a.b": 1.0, "c": 1.0}


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
    known = extra_measures({"report": report})
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
    summary = summarise(results)
    parts = summary["by_shapes"]
    assert [parts[name]["videos"] for name in ("1", "2")] == [1, 2]
    assert parts["1"]["measures"]["motion"] == {"mean": 0.5, "spread": None}
    assert parts["2"]["measures"]["motion"]["mean"] == 0.125
    assert parts["2"]["measures"]["survival.5s"]["mean"] == 0.5
    assert [parts[n]["measures"]["right_at.5s"]["mean"] for n in ("1", "2")] == [1, 0.5]
    lines = [" ".join(line.split()) for line in table("shapes", summary).splitlines()]
    assert lines[1] == "all one shape (1) two shapes (2)"
    assert "motion 0.250 ± 0.000 0.500 0.125 ± 0.177" in lines
    never, right = lines.index("never wrong in"), lines.index("right at")
    assert [lines[row + 1].split()[0] for row in (never, right)] == ["5s", "5s"]
    assert "by_shapes" not in summarise(results[1:])


def test_bad_input_is_one_sentence(tiny_world, clips, tmp_path, capsys):
    (tmp_path / "file").touch()
    wide = model(tiny_world)[:-2]
    short = ["--prompts", 1, "--seconds", 0.5, "--json", tmp_path / "out.json"]
    broken = tmp_path / "broken"
    write_clip(broken / "x-0.mp4", sample_scene(0, 0), 5, beside={"no": "prompt"})
    single = tmp_path / "single"
    write_clip(single / "x-0.mp4", sample_scene(0, 0), 1)
    for arguments, message in [
        ([], "say what to measure"),
        (["--videos", tmp_path / "none"], "is not a folder"),
        (["--videos", tmp_path], "holds no .mp4"),
        (["--videos", broken], "does not say which prompt"),
        (["--videos", clips, "--checkpoint_path", "x"], "leave out"),
        (["--videos", clips, "--keep_videos", tmp_path], "leave out --keep_videos"),
        (["--videos", clips, "--seconds", 5], "leave out --seconds"),
        (["--videos", clips, "--use_ema"], "leave out --use_ema"),
        (["--videos", clips, "sink_size=1"], "give --config_path too"),
        (["--videos", clips, "--vbench", clips], "holds other videos"),
        (["--videos", single, "--json", tmp_path / "out.json"], "x-0.mp4: A meter needs"),
        ([*model(tiny_world), "--json", tmp_path], "is a folder"),
        ([*model(tiny_world), "--plot", tmp_path], "is a folder"),
        ([*model(tiny_world), "--vbench", clips], "holds other videos"),
        ([*model(tiny_world), "--vbench", clips, "--keep_videos", tmp_path], "leave out --keep_"),
        ([*model(tiny_world), "--seeds", 0], "at least 1"),
        ([*model(tiny_world), "--seconds", "nan"], "--seconds nan"),
        ([*model(tiny_world), "--seconds", 0.001], "shorter than one frame"),
        (
            [*model(tiny_world), "--json", tmp_path / "file" / "out.json"],
            "is a file where a folder",
        ),
        ([*model(tiny_world), "--data_path", "none.txt"], "none.txt does not exist"),
        ([*wide, *short], "give prompts with --data_path"),
    ]:
        assert evaluate(*arguments) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
