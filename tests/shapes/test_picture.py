"""The one picture: frames of four methods at the seconds that are asked for, and their curves."""

import numpy as np
import pytest

from pipeline import load_pipeline
from shapes import picture
from shapes.drift import Protocol, play
from shapes.picture import ORDER, draw_drift, draw_picture, made, main
from shapes.table import read_results
from tests.shapes.tiny_results import write_core
from tests.tiny_pipeline import write_config
from utils.cli import run_main
from utils.images import read_image, write_png

DRIFTS = dict.fromkeys((row.key for row in ORDER), 0.5)


@pytest.mark.slow
def test_frames_are_those_of_the_video_so_long_after_the_prefix(tiny_world):
    from utils.config import load_config

    pipe = load_pipeline(load_config(tiny_world.config, ["width=32", "device=cpu"]))
    strip = made(pipe, 1, [0.0, 2.0])
    video = np.concatenate([block[0].numpy() for block in play(pipe, Protocol(times=1), [1])])
    assert np.array_equal(strip[:, :32], video[8])
    assert np.array_equal(strip[:, 32:], video[8 + 32])


@pytest.mark.slow
def test_the_picture_is_drawn_from_what_is_stored(tmp_path, monkeypatch, tiny_world):
    """Without weights too, where its frames were made before; other seconds are made anew."""
    for row in ORDER:
        values = {"base": str(tiny_world.config), "method": "rolling_forcing", "width": 32}
        write_config(tmp_path / f"{row.config}.yaml", **values, device="cpu", max_steps=2)
    results, out = tmp_path / "results", tmp_path / "out.png"
    write_core(results, **DRIFTS)
    asked = []

    def drawn(pipe, scene, seconds):
        asked.append(scene)
        return np.full((32, 32 * len(seconds), 3), 20 * len(asked), np.uint8)

    monkeypatch.setattr(picture, "made", drawn)
    weights = [tmp_path / f"shapes_{key}.pt" for key in ("causal_init", *DRIFTS)]
    for path in weights:
        path.write_bytes(tiny_world.checkpoint.read_bytes())
    given = ["--out", out, "--results", results, "--configs", tmp_path, "--checkpoints", tmp_path]
    given += ["--folder", tmp_path / "runs", "--scene", 3]

    def run(*more):
        return run_main(main, [str(word) for word in (*given, *more)])

    assert run("--seconds", 0, 5) == 0
    assert asked == [3] * 4
    assert run("--seconds", 0, 5) == 0
    assert asked == [3] * 4
    (results / f"frames-{ORDER[0].key}-3.json").write_text("cut o")
    assert run("--seconds", 0, 5) == 0
    assert asked == [3] * 5
    assert run("--seconds", 0, 5, "--scene", 4, "--out", tmp_path / "other.png") == 0
    assert asked == [3] * 5 + [4] * 4, "beside the frames of the other scene"
    for path in weights:
        path.unlink()
    assert run("--seconds", 0, 5) == 0
    assert run("--seconds", 0, 6) == 2
    assert min(read_image(out).shape[:2]) > 400


def test_wrong_flags_are_told_first(tmp_path, capsys):
    assert run_main(main, ["--out", str(tmp_path / "a.jpg")]) == 2
    assert run_main(main, ["--seconds", "nan"]) == 2
    assert "0 or more" in capsys.readouterr().err


@pytest.mark.slow
def test_pictures_are_small_and_show_every_row(tmp_path):
    write_core(tmp_path, **DRIFTS)
    results = read_results(tmp_path, lambda path, key, settings: True)
    noise = np.random.default_rng(0).integers(0, 255, (64, 5 * 64, 3), np.uint8)
    out = tmp_path / "picture.png"
    write_png(tmp_path / "noise.png", noise)
    draw_picture(dict.fromkeys(DRIFTS, noise), picture.SECONDS, results, out)
    assert out.stat().st_size < 500_000
    draw_drift(results, tmp_path / "curves.png")
    for path in (out, tmp_path / "curves.png"):
        colours = read_image(path).reshape(-1, 3).unique(dim=0).tolist()
        assert [0x1F, 0x6F, 0xB4] in colours
        assert [0xD2, 0x69, 0x1E] in colours
