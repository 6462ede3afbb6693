"""The demo: the command line without a config, on a random model in place of the one that ships."""

import json
import re
import shlex
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import inference
from pipeline.batch import SHEET_COLUMNS, SHEET_GAP
from pipeline.progress import VideoProgress
from scripts import download, evaluate
from shapes import demo
from shapes import init as shapes_init
from shapes.world import PHRASINGS, caption, is_held_out, parse_caption
from tests.conftest import TinyWorld
from tests.tiny_models import write_tiny_vae
from tests.tiny_pipeline import random_dit
from utils.cli import run_main
from utils.config import ROOT, find_file, load_config
from utils.prompts import output_names, read_prompts
from utils.video import probe_video, read_image, read_video

FRAMES = 21  # of 6 latent frames
SECONDS = FRAMES / 16


@dataclass(frozen=True)
class Demo:
    """The flags that point the demo to a small model and a folder of its own."""

    folder: Path
    model: list[str]

    @property
    def videos(self) -> list[Path]:
        prompts = read_prompts(ROOT / demo.PROMPTS)
        rows = output_names(prompts, 1, with_index=False, ema=False)
        return [self.folder / name for row in rows for name in row]

    @property
    def sheet(self) -> Path:
        return self.folder / "contact_sheet.png"

    def run(self, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
        """What it says at its end."""
        length = ["--num_output_frames", "6", "--output_folder", str(self.folder)]
        code = run_main(inference.main, [*length, *flags, *self.model])
        said = capsys.readouterr()
        assert code == 0, said.err
        return said.out


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("shapes")
    folder = root / "models" / "Shapes"
    assert shapes_init.main(["--folder", str(folder)]) == 0
    write_tiny_vae(folder / "Wan2.1_VAE.pth")
    sizes = shapes_init.DIT | {"num_layers": 1}
    (folder / "config.json").write_text(json.dumps(sizes), encoding="utf-8")
    weights = random_dit(seed=1, **sizes).state_dict()
    student = {"generator": {f"model.{key}": value for key, value in weights.items()}}
    torch.save(student, root / "student.pt")
    return ["--checkpoint_path", str(root / "student.pt"), f"model_root={root / 'models'}"]


@pytest.fixture
def tiny_demo(model: list[str], tmp_path: Path) -> Demo:
    return Demo(tmp_path / "demo", model)


def test_the_prompts_show_what_the_world_has() -> None:
    prompts = read_prompts(ROOT / demo.PROMPTS)
    scenes = [parse_caption(prompt) for prompt in prompts]
    said = [[caption(scene, k) for k in range(len(PHRASINGS))] for scene in scenes]
    assert len({words.index(p) for p, words in zip(prompts, said, strict=True)}) == len(prompts)
    assert {len(scene.shapes) for scene in scenes} == {1, 2}
    assert {shape.speed for scene in scenes for shape in scene.shapes} == {"slow", "fast"}
    assert {shape.kind for scene in scenes for shape in scene.shapes} >= {"star", "triangle"}
    assert any(" to " in scene.background for scene in scenes)
    assert any(is_held_out(s, scene.background) for scene in scenes for s in scene.shapes)
    parse_caption(demo.ANOTHER_PROMPT)


@pytest.mark.parametrize(
    ("flags", "changed"),
    [
        ([], {}),
        (["--prompt", "a"], {"data_path": None, "prompt": ["a"]}),
        (["--data_path", "mine.txt"], {"data_path": "mine.txt"}),
        (["--duration", "3"], {"duration": 3.0}),
        (["--num_output_frames", "6"], {"duration": None, "num_output_frames": 6}),
        (["--output_folder", "x"], {"output_folder": "x", "contact_sheet": "x/contact_sheet.png"}),
        (["--contact_sheet", "y.png"], {"contact_sheet": "y.png"}),
        (["--checkpoint_path", "k.pt"], {"checkpoint_path": "k.pt"}),
        (["--seed", "3"], {"seed": 3}),
    ],
)
def test_a_flag_replaces_its_own_default_only(flags: list[str], changed: dict[str, object]) -> None:
    args = inference.build_parser().parse_args(flags)
    inference.fill_in_demo(args, demo)
    defaults = {
        "config_path": "configs/shapes/rolling_forcing.yaml",
        "checkpoint_path": "checkpoints/shapes_rolling_forcing.pt",
        "data_path": str(find_file("prompts/shapes_demo.txt", "prompts")),
        "prompt": [],
        "duration": 10.0,
        "num_output_frames": None,
        "seed": None,
        "output_folder": "videos/demo",
        "contact_sheet": "videos/demo/contact_sheet.png",
        "overwrite": False,
    }
    assert {key: vars(args)[key] for key in defaults} == defaults | changed


@pytest.mark.slow
def test_it_makes_the_videos_and_their_contact_sheet(
    tiny_demo: Demo, capsys: pytest.CaptureFixture[str]
) -> None:
    said = tiny_demo.run(capsys)
    assert sorted(tiny_demo.folder.glob("*.mp4")) == sorted(tiny_demo.videos)
    videos = [read_video(path) for path in tiny_demo.videos]
    assert all(video.shape == (FRAMES, 64, 64, 3) for video in videos)

    sheet = read_image(tiny_demo.sheet)
    cell = 2 * 64 + SHEET_GAP
    assert sheet.shape == (len(videos) * cell - SHEET_GAP, SHEET_COLUMNS * cell - SHEET_GAP, 3)
    for row, video in enumerate(videos):
        assert not torch.equal(video, videos[row - 1]), "else no row could be told from another"
        for column in range(SHEET_COLUMNS):
            top, left = row * cell, column * cell
            shown = sheet[top : top + 128, left : left + 128]
            frame = video[2 * column]  # 11 of 21 frames
            assert torch.equal(shown[::2, ::2], frame)
            assert torch.equal(shown[1::2, 1::2], frame)

    named = [Path(name) for name in re.findall(r"^  (.+\.mp4) \(1\.3125 s\)$", said, re.MULTILINE)]
    assert named == tiny_demo.videos
    assert f"\n  {tiny_demo.sheet}\n" in said
    records = [json.loads(path.with_suffix(".json").read_text()) for path in named]
    first = statistics.median(record["timings"]["first_frame_s"] for record in records)
    total = sum(record["timings"]["total_s"] for record in records)
    assert f"First frame after {first:.2f} s" in said
    assert f"{4 * FRAMES / total:.1f} FPS, {4 * SECONDS / total:.2f}x real time" in said


@pytest.mark.slow
def test_the_next_commands_are_right(
    tiny_demo: Demo, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = tiny_demo.run(capsys, "--prompt", "one prompt is enough here")
    start = f"  {demo.python_command()} "
    commands = [shlex.split(line)[1:] for line in said.splitlines() if line.startswith(start)]
    another, measure, fetch, published = commands

    assert [command[0] for command in commands] == [
        *("inference.py", "scripts/evaluate.py", "scripts/download.py", "inference.py")
    ]
    assert all((ROOT / command[0]).is_file() for command in commands)

    args = inference.build_parser().parse_args(another[1:])
    assert args.duration == 60
    shorter = another[1:]
    shorter[shorter.index("--duration") + 1] = "0.5"
    shorter[shorter.index("--output_folder") + 1] = str(tmp_path / "other")
    assert run_main(inference.main, shorter) == 0
    (video,) = (tmp_path / "other").glob("*.mp4")
    assert probe_video(video).frames == 8

    args = evaluate.build_parser().parse_args(measure[1:])
    evaluate.check_flags(args)
    assert args.json == tiny_demo.folder / "evaluation.json"
    assert args.checkpoint_path == tiny_demo.model[1]
    assert f"model_root={load_config(args.config_path, args.overrides).model_root}" in measure

    downloads = download.chosen_downloads(fetch[1:]).values()
    args = inference.build_parser().parse_args(published[1:])
    config = load_config(args.config_path, args.overrides)
    assert f"{config.model_root}/{config.generator_name}" in {d.folder for d in downloads}
    assert args.checkpoint_path in {name for d in downloads for name in d.files}
    assert read_prompts(ROOT / args.data_path)


def test_the_next_commands_use_the_model_that_ships() -> None:
    another, measure = (c[0] for c in list(demo.next_commands(Path("x"), []).values())[:2])
    args = inference.build_parser().parse_args(another[2:])
    assert (args.config_path, args.checkpoint_path) == (None, None)
    args = evaluate.build_parser().parse_args(measure[2:])
    assert (args.config_path, args.checkpoint_path) == (demo.CONFIG, demo.CHECKPOINT)


@pytest.mark.slow
def test_repeated_it_says_where_everything_is_and_overwrites_if_told(
    tiny_demo: Demo, capsys: pytest.CaptureFixture[str]
) -> None:
    first = tiny_demo.run(capsys)
    times = [path.stat().st_mtime_ns for path in tiny_demo.videos]
    tiny_demo.sheet.unlink()
    assert tiny_demo.run(capsys) == first
    assert [path.stat().st_mtime_ns for path in tiny_demo.videos] == times
    assert tiny_demo.sheet.is_file()
    assert str(tiny_demo.sheet) in tiny_demo.run(capsys, "--overwrite")
    assert all(p.stat().st_mtime_ns > t for p, t in zip(tiny_demo.videos, times, strict=True))


@pytest.mark.slow
def test_of_several_ranks_the_last_to_end_shows_the_videos(
    tiny_demo: Demo, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert tiny_demo.run(capsys) == ""
    assert not tiny_demo.sheet.exists()
    monkeypatch.setenv("RANK", "1")
    said = tiny_demo.run(capsys)
    assert all(str(path) in said for path in tiny_demo.videos)
    assert [path.name for path in tiny_demo.folder.glob("*.png")] == [tiny_demo.sheet.name]


@pytest.mark.slow
def test_of_prompts_that_its_model_does_not_know_it_says_so(
    tiny_demo: Demo, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    tiny_demo.run(capsys, "--prompt", demo.ANOTHER_PROMPT, "--prompt", "a red fox in the snow")
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warned) == 1
    assert "the model knows shapes only" in warned[0]
    assert '"a red fox in the snow". Write it like this: "' in warned[0]


def test_an_image_needs_a_prompt(
    tiny_demo: Demo, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """It once became each of the demo's prompts."""
    flags = ["--output_folder", str(tmp_path / "out"), "--image", "picture.png", *tiny_demo.model]
    assert run_main(inference.main, flags) == 2
    assert "--prompt" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_its_model_it_says_what_to_fetch(
    model: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(inference.main, ["model_root=nowhere"]) == 2
    said = capsys.readouterr().err
    assert "nowhere/Shapes" in said
    assert "scripts/download.py wan2.1-1.3b rolling-forcing" in said
    assert run_main(inference.main, ["--checkpoint_path", "gone.pt", *model[2:]]) == 2
    assert "checkpoint gone.pt does not exist" in capsys.readouterr().err


def test_any_command_draws_a_contact_sheet(
    tiny_world: TinyWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--config_path", str(tiny_world.config), "--prompt", "a", "--num_output_frames", "1"]
    flags += ["--checkpoint_path", str(tiny_world.checkpoint), "--output_folder", str(tmp_path)]
    sheet = tmp_path / "new" / "sheet.png"
    assert run_main(inference.main, [*flags, "--contact_sheet", str(sheet)]) == 0
    assert capsys.readouterr().out == "", "the closing text is the demo's"
    (frame,) = read_video(tmp_path / "a-0.mp4")
    image = read_image(sheet)
    assert image.shape == (64, SHEET_COLUMNS * (96 + SHEET_GAP) - SHEET_GAP, 3)
    assert torch.equal(image[::2, -96::2], frame), "the only frame, again and again"


def test_progress_shows_seconds_of_video_and_speed(capsys: pytest.CaptureFixture[str]) -> None:
    start = time.perf_counter() - 100
    with VideoProgress("a title " * 9, 1600, 16, start=start, shown=True) as progress:
        progress.add(400)
        time.sleep(0.05)
        progress.add(400)
    said = capsys.readouterr().err
    assert said.split("\r")[-1].startswith("a title a title a title |")
    assert "| 50.0/100.0 s, 8.0 FPS, 0.50x real time" in said
    timings = progress.timings()
    assert progress.frames == 800
    assert 100 <= timings["first_frame_s"] <= timings["total_s"] - 0.05 < 110
    assert timings["fps"] == pytest.approx(8, rel=0.1)
