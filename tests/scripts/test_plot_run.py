"""The picture of a run: which panels it has, that it is there whole, and what it says if not."""

import json

import numpy as np
import pytest
from PIL import Image

from scripts.plot_run import PANELS, Run, main, moving_mean, run_names, short_names, stacked
from utils.cli import run_main


def write_run(folder, steps=12, **extra):
    folder.mkdir(parents=True)
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(steps):
            line = {
                "step": step,
                "time": 1.0,
                "critic/loss": 1 / (step + 1),
                "critic/by_timestep/0-100": 0.5,
                "critic/by_timestep/900-1000": None if step % 2 else 0.25,
                "seconds/rollout": 2.0,
                "seconds/step": 3.0,
                "generated/motion": 0.3,
                "verdict": "healthy",
                **extra,
            }
            if step % 5 == 0:
                line |= {"generator/loss": 0.5, "seconds/scores": 0.75}
            file.write(json.dumps(line) + "\n")
    return folder


def test_one_png_of_several_runs(tmp_path):
    pytest.importorskip("matplotlib")
    folders = [write_run(tmp_path / f"run{i}") for i in range(2)]
    out = tmp_path / "pictures" / "run.png"
    assert main([*map(str, folders), "--out", str(out), "--smooth", "3"]) == 0
    with Image.open(out) as image:
        assert min(image.size) > 500
        assert len(image.getcolors(image.width * image.height)) > 50
    assert [path.name for path in out.parent.iterdir()] == ["run.png"]


@pytest.mark.slow
def test_panels_without_numbers_are_left_out(tmp_path):
    pytest.importorskip("matplotlib")
    few = write_run(tmp_path / "few")
    more = write_run(
        tmp_path / "more",
        **dict.fromkeys(("memory_gib", "generator/lr", "critic/ratio", "tflops_per_second"), 3.0),
    )
    heights = []
    for folder in (few, more):
        main([str(folder), "--out", str(tmp_path / "out.png")])
        with Image.open(tmp_path / "out.png") as image:
            heights.append(image.size[1])
    assert heights[0] < heights[1]


def test_every_documented_number_has_a_panel():
    named = {
        "generator/loss", "critic/loss", "generator/grad_norm", "critic/grad_norm",
        "dmd/gradient_norm", "critic/by_timestep/0-100", "critic/ratio", "generated/std",
        "generated/mean", "generated/channel_std", "generated/motion", "seconds/rollout",
        "seconds/step", "tflops_per_second", "memory_gib", "generator/lr",
    }  # fmt: skip
    run = Run("run", {name: (np.zeros(1), np.ones(1)) for name in named})
    panels = {name: [p.title for p in PANELS if name in run.matching(p.patterns)] for name in named}
    assert all(len(titles) == 1 for titles in panels.values()), panels


def test_nulls_and_texts_are_no_points(tmp_path):
    curves = Run.read(write_run(tmp_path / "run"), "run").curves
    assert "verdict" not in curves
    assert "time" not in curves
    steps, values = curves["critic/by_timestep/900-1000"]
    assert steps.tolist() == [0, 2, 4, 6, 8, 10]
    assert set(values) == {0.25}


def test_seconds_that_no_phase_claims_are_the_rest(tmp_path):
    run = Run.read(write_run(tmp_path / "run"), "run")
    steps, (rollout, scores, rest) = stacked(
        run, ["seconds/rollout", "seconds/scores"], "seconds/step", 1
    )
    assert len(steps) == 12
    assert (rollout == 2).all()
    assert (scores[:6] == [0.75, 0, 0, 0, 0, 0.75]).all()
    assert (rest[:2] == [0.25, 1]).all()


def test_moving_mean_keeps_length_level_and_sum_of_neighbours():
    assert moving_mean(np.full(7, 3.0), 4).tolist() == [3.0] * 7
    assert moving_mean(np.array([0.0, 3, 6, 0]), 3).tolist() == [1.5, 3, 3, 3]
    assert moving_mean(np.array([1.0, 3, 5]), 10).tolist() == [2, 3, 4]


def test_names_tell_runs_and_metrics_apart(tmp_path):
    assert run_names([tmp_path / "a/run", tmp_path / "b/run"]) == ["a", "b"]  # metrics files
    for name in ("a", "b"):
        (tmp_path / name / "run").mkdir(parents=True)
    assert run_names([tmp_path / "a/run", tmp_path / "b/run"]) == ["a/run", "b/run"]
    assert short_names(["generator/loss", "critic/loss", "loss"]) == ["generator", "critic", "loss"]
    assert short_names(["generated/channel_std", "generated/std"]) == ["channel std", "std"]


@pytest.mark.parametrize(
    ("content", "options", "sentence"),
    [
        (None, [], "holds no metrics.jsonl"),
        ("", [], "holds no step yet"),
        ('{"step": 1, "mood": 3}\n', [], "none of the known metrics"),
        ('{"step": 1, "loss": 3}\n', ["--smooth", "0"], "--smooth must be at least 1"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, capsys, content, options, sentence):
    pytest.importorskip("matplotlib")
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    out = tmp_path / "out.png"
    assert run_main(main, [str(tmp_path), "--out", str(out), *options]) == 2
    assert sentence in capsys.readouterr().err
    assert not out.exists()
