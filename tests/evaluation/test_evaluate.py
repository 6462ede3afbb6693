"""The evaluation: true clips are right, a killed run goes on, figures are those of the videos."""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from endless import held_out_prompts, open_meter

import evaluation.runs
import pipeline.batch
import utils.video
from evaluation.meters import FRAMES, Judge
from evaluation.results import ResultLog, mean_and_spread, numbers, summarise
from evaluation.trials import Evaluation, list_trials
from pipeline import VideoPipeline, load_pipeline
from pipeline.setup import Setup
from scripts.evaluate import main
from utils.cli import run_main
from utils.config import load_config
from utils.video import VideoWriter, read_image, read_video
from wan.vae import WanVAE

SQUARE = ["height=32", "width=32"]


def evaluate(*arguments):
    return run_main(main, [str(argument) for argument in arguments])


def model(world):
    given = ["--config_path", world.config, "--checkpoint_path", world.checkpoint]
    return [*given, "--meter", "endless", "--device", "cpu", *SQUARE]


def untimed(value):
    """A result without what differs from run to run."""
    if isinstance(value, dict):
        skipped = ("timings", "fps", "first_frame_s")
        return {k: untimed(v) for k, v in value.items() if k not in skipped}
    return [untimed(item) for item in value] if isinstance(value, list) else value


def write_clip(path, level, frames, *, beside=None):
    with VideoWriter(path) as writer:
        writer.write(np.full((frames, 64, 64, 3), level, np.uint8))
    if beside is not None:
        path.with_suffix(".json").write_text(json.dumps(beside))


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A dark clip and a light one by name, one of each whose prompt stands beside it."""
    folder = tmp_path_factory.mktemp("clips")
    for level in (40, 180):
        write_clip(folder / f"grey {level}-0.mp4", level, 16)
        beside = {"prompt": f"grey {level + 10}", "sample": 1}
        write_clip(folder / f"{level}-0_ema.mp4", level, 16, beside=beside)
    return folder


@pytest.mark.slow
def test_videos_are_held_against_the_truth_of_a_package(clips, tmp_path, capsys):
    """Its own figures, curves and groups; without it the same files are any videos."""
    out, plot = tmp_path / "out.json", tmp_path / "out.png"
    given = ["--videos", clips, "--json", out]
    assert evaluate(*given, "--meter", "endless", "--plot", plot) == 0
    content = json.loads(out.read_text())
    assert (content["settings"]["truth"], content["settings"]["meter"]) == ("endless", 1)
    summary = content["summary"]["endless"]
    errors = [result["report"]["error"] for result in content["videos"]]
    assert errors == pytest.approx([10, 10, 0, 0], abs=3)
    assert summary["measures"]["error"]["mean"] == pytest.approx(np.mean(errors))
    assert summary["share"] == [1, 1]
    assert [group["videos"] for group in summary["groups"].values()] == [2, 2]
    assert min(read_image(plot).shape[:2]) > 300
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[:2] == [
        "endless: 4 videos, 4 prompts, 2 seeds (mean ± standard deviation of the seeds' means)",
        "all dark (2) light (2)",
    ]
    assert evaluate(*given) == 0
    assert set(json.loads(out.read_text())["summary"]) == {"video"}, "nothing was kept"


def test_other_videos_are_held_against_their_beginning(tmp_path, monkeypatch):
    """Each is decoded once: it was twice, to learn its frame rate first."""
    write_clip(tmp_path / "a boat at dawn-0.mp4", 90, 40)
    decoded, whole_frames = [], utils.video._whole_frames
    monkeypatch.setattr(
        utils.video, "_whole_frames", lambda *given: decoded.append(1) or whole_frames(*given)
    )
    assert evaluate("--videos", tmp_path, "--json", tmp_path / "out.json") == 0
    content = json.loads((tmp_path / "out.json").read_text())
    (result,) = content["videos"]
    assert (result["prompt"], result["seed"], result["kind"]) == ("a boat at dawn", 0, "video")
    assert set(content["summary"]) == {"video"}
    assert content["summary"]["video"]["measures"]["motion"]["spread"] is None
    assert result["report"]["seconds"] == 40 / 16
    assert decoded == [1]


@pytest.mark.slow
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
    (prompt,) = held_out_prompts(1)
    assert [(r["prompt"], r["seed"], r["frames"]) for r in content["videos"]] == [
        (prompt, 5, 24),
        (prompt, 6, 24),
    ]
    measures = content["summary"]["endless"]["measures"]
    assert measures["fps"]["mean"] > 0
    assert measures["error"]["spread"] is not None
    # what was measured is what inference gives for this prompt and seed
    pipe = load_pipeline(tiny_world.config, tiny_world.checkpoint, "cpu", SQUARE)
    frames = pipe.generate([prompt], 7, seed=6)[0, :24]
    judge = Judge(prompt, truth=open_meter())
    judge.add(frames.numpy())
    assert judge.report(16) == content["videos"][1]["report"]
    files = sorted(videos.glob("*.mp4"))
    assert [f.stem.rsplit("-", 1)[1] for f in files] == ["0", "1"]
    assert len(read_video(files[0])) == 24
    assert "VBench is not installed" in capsys.readouterr().out


@pytest.mark.slow
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


@pytest.mark.slow
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
    assert [r["prompt"] for r in json.loads(out.read_text())["videos"]] == held_out_prompts(3)


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


@pytest.mark.slow
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
        write_clip(tmp_path / f"{name}.mp4", 90, 5, beside={"prompt": "a"})
    out = tmp_path / "out.json"
    assert evaluate("--videos", tmp_path, "--json", out, "--vbench", tmp_path / "named") == 2
    assert "a-0.mp4 and a_2-0.mp4 would both be" in capsys.readouterr().err
    assert evaluate("--videos", tmp_path, "--json", out) == 0


def test_results_of_another_meter_are_not_used(clips, tmp_path, monkeypatch):
    out = tmp_path / "out.json"
    assert evaluate("--videos", clips, "--json", out) == 0
    changed = {"motion": 7.0}
    before = Judge.report
    monkeypatch.setattr(Judge, "report", lambda self, fps: before(self, fps) | changed)
    assert evaluate("--videos", clips, "--json", out) == 0
    measures = json.loads(out.read_text())["summary"]["video"]["measures"]
    assert measures["motion"]["mean"] < 2, "kept"
    newer = {"truth": None, "meter": FRAMES.version + 1}
    monkeypatch.setattr(evaluation.runs, "meter_settings", lambda truth: newer)
    assert evaluate("--videos", clips, "--json", out) == 0
    measures = json.loads(out.read_text())["summary"]["video"]["measures"]
    assert measures["motion"]["mean"] == 7


def test_vbench_is_called_where_it_is_installed(clips, tmp_path, monkeypatch):
    calls = []

    class FakeVBench:
        def __init__(self, device, full_info, output):
            self.output = output
            calls.append((str(device), full_info))

        def evaluate(self, **options):
            calls.append(options)
            folder = Path(self.output)
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


@pytest.mark.slow
def test_kept_videos_are_not_judged(tiny_world, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vbench", None)
    videos, out = tmp_path / "videos", tmp_path / "out.json"
    given = [*model(tiny_world), "--prompts", 1, "--seconds", 1, "--json", out]
    assert evaluate(*given, "--keep_videos", videos) == 0
    (prompt,) = held_out_prompts(1)
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
    evaluation = Evaluation(Setup.of(config), tiny_world.checkpoint, use_ema=False, seconds=0.5)
    evaluation(list_trials(held_out_prompts(1), 1, 0), lambda trial, result: None)
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
    write_clip(tmp_path / "a-0.mp4", 90, 5)
    (tmp_path / "a-0.json").write_text(json.dumps(beside))
    assert evaluate("--videos", tmp_path, "--json", tmp_path / "out.json") == 2
    assert "does not say which prompt a-0.mp4 shows" in capsys.readouterr().err


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

    summary = summarise([result(0, [1.0, 2.0]), result(1, [3.0, None, 5.0])], FRAMES)
    assert summary["per_second"]["change"]["mean"] == [2.0, 2.0, 5.0]
    assert summary["per_second"]["change"]["spread"] == [pytest.approx(2**0.5), None, None]
    assert summary["measures"]["motion"] == {"mean": None, "spread": None}
    assert numbers({"a": {"b": 1, "per_second": {}}, "c": True}) == {"a.b": 1.0, "c": 1.0}


def test_bad_input_is_one_sentence(tiny_world, clips, tmp_path, capsys):
    (tmp_path / "file").touch()
    wide = model(tiny_world)[: -len(SQUARE)]
    short = ["--prompts", 1, "--seconds", 0.5, "--json", tmp_path / "out.json"]
    broken = tmp_path / "broken"
    write_clip(broken / "x-0.mp4", 90, 5, beside={"no": "prompt"})
    single = tmp_path / "single"
    write_clip(single / "x-0.mp4", 90, 1)
    for arguments, message in [
        ([], "say what to measure"),
        (["--videos", tmp_path / "none"], "is not a folder"),
        (["--videos", tmp_path], "holds no .mp4"),
        (["--videos", broken], "does not say which prompt"),
        (["--videos", clips, "--checkpoint_path", "x"], "leave out"),
        (["--videos", clips, "--keep_videos", tmp_path], "leave out --keep_videos"),
        (["--videos", clips, "--seconds", 5], "leave out --seconds"),
        (["--videos", clips, "--use_ema"], "leave out --use_ema"),
        (["--videos", clips, "--overwrite"], "give --vbench or --keep_videos"),
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
