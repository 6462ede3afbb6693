"""Attention maps of a real stream: what is recorded, what is drawn, and that nothing changes."""

import json

import pytest
import torch

from pipeline import load_pipeline
from pipeline.attention_maps import AttentionRecorder, group_names, group_table
from scripts.attention_maps import main
from utils.cli import run_main
from utils.video import read_image

PROMPT = "a red circle moves right"


def arguments(world, *more):
    given = ["--config_path", world.config, "--checkpoint_path", world.checkpoint]
    return [str(a) for a in (*given, "--prompt", PROMPT, "--device", "cpu", *more)]


def frames_of(pipe, count, recorder=None):
    blocks = []
    with pipe.stream(PROMPT, seed=3) as stream:
        stream.rollout.wrap_context = recorder
        while len(blocks) < count:
            blocks.append(next(stream))
    return torch.cat(blocks)


@pytest.fixture(scope="module")
def pipe(tiny_world):
    return load_pipeline(tiny_world.config, tiny_world.checkpoint, "cpu")


def test_the_video_is_the_same_bit_for_bit(pipe):
    recorder = AttentionRecorder(pipe.layout, blocks=[0, 2], levels=range(5), layers=[0, 1])
    assert torch.equal(frames_of(pipe, 3), frames_of(pipe, 3, recorder))
    assert recorder.complete


def test_maps_name_what_a_block_sees(pipe):
    recorder = AttentionRecorder(pipe.layout, blocks=[7], levels=[1, 4], layers=[1])
    frames_of(pipe, 8, recorder)
    early, late = recorder.maps
    assert (early.level, late.level) == (1, 4)
    assert early.window == tuple((block, 3) for block in range(4, 9))
    assert late.window == tuple((block, 3) for block in range(7, 12))
    assert early.sink == late.sink == 3
    assert early.past == (0, 1, 2, 9, 10, 11)
    assert late.past == (0, 1, 2, 18, 19, 20)
    for entry in recorder.maps:
        assert sum(entry.past_masses) + sum(entry.window_masses) == pytest.approx(1, abs=1e-5)
    names = group_names(recorder.maps)
    assert names == ["sink", "recent", -3, -2, -1, 0, 1, 2, 3, 4]
    shares = torch.tensor(group_table(recorder.maps, names))
    torch.testing.assert_close(shares.nansum(1), torch.ones(2))
    assert shares[0].isnan().tolist() == [False] * 7 + [True] * 3
    assert shares[1].isnan().tolist() == [False] * 2 + [True] * 3 + [False] * 5
    per_frame = torch.tensor(group_table(recorder.maps, names, per_frame=True))
    torch.testing.assert_close(per_frame, shares * 21 / 3, equal_nan=True)


def test_block_by_block_methods_have_no_window_around_them(tiny_world):
    pipe = load_pipeline(
        tiny_world.config, tiny_world.checkpoint, "cpu", ["method=infinite_forcing"]
    )
    recorder = AttentionRecorder(pipe.layout, blocks=[0, 9], levels=[0], layers=[0])
    with pipe.stream(PROMPT) as stream:
        stream.rollout.wrap_context = recorder
        while not recorder.complete:
            stream.rollout.step()
    first, later = recorder.maps
    assert first.groups == {0: (pytest.approx(1, abs=1e-5), 3)}
    assert list(later.groups) == ["sink", "recent", 0]


@pytest.mark.slow
def test_script_draws_and_writes_the_numbers(tiny_world, tmp_path, capsys):
    out, numbers = tmp_path / "maps.png", tmp_path / "maps.json"
    given = ["--blocks", "2,1", "--layers", "1", "--levels", "0,4", "--out", out, "--json", numbers]
    assert run_main(main, arguments(tiny_world, *given)) == 0
    assert capsys.readouterr().out.split() == [str(numbers), str(out)]
    picture = read_image(out)
    assert min(picture.shape[:2]) > 300
    assert picture.float().std() > 10
    content = json.loads(numbers.read_text())
    assert content["prompt"] == PROMPT
    seen = [(entry["block"], entry["layer"], entry["level"]) for entry in content["maps"]]
    assert sorted(seen) == [(1, 1, 0), (1, 1, 4), (2, 1, 0), (2, 1, 4)]
    for entry in content["maps"]:
        assert sum(share for share, _ in entry["groups"].values()) == pytest.approx(1, abs=1e-5)
    assert not list(tmp_path.glob("*.part*"))


def test_without_a_name_the_picture_goes_below_outputs(tiny_world, tmp_path, monkeypatch, capsys):
    """attention_maps.png landed in the working directory."""
    monkeypatch.chdir(tmp_path)
    given = ["--blocks", "0", "--layers", "1", "--levels", "0"]
    assert run_main(main, arguments(tiny_world, *given)) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["outputs"]
    assert capsys.readouterr().out.split() == ["outputs/attention_maps.png"]


def test_bad_input_is_one_sentence(tiny_world, tmp_path, capsys):
    (tmp_path / "file").touch()
    for more, message in [
        (["--layers", "2"], "--layers 2: they are numbered from 0 to 1"),
        (["--levels", "0,5"], "from 0 to 4"),
        (["--blocks", "all"], "--blocks all must be numbers such as 0,5"),
        (["--blocks", "-1"], "numbered from 0 on"),
        (["--out", tmp_path / "file" / "maps.png"], "is a file where a folder"),
        (["--out", tmp_path / "maps.jpg"], "must be the name of a .png file"),
        (["--prompt", " "], "the prompt is empty"),
        (["schedule=full"], "cannot stream"),
    ]:
        assert run_main(main, arguments(tiny_world, *more)) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
