"""The command line, on a synthetic model folder in the official layout."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

import inference
from inference import main
from pipeline import batch
from pipeline.stream import Stream
from pipeline.text import TextSource
from tests.conftest import TinyWorld
from tests.processes import in_a_copy, kill_this_process
from utils.cli import run_main
from utils.distributed import Ranks
from utils.errors import UserError
from utils.files import locked
from utils.video import VideoWriter, probe_video, read_video, write_png

ROOT = Path(__file__).resolve().parent.parent


def model_flags(world: TinyWorld) -> list[str]:
    return ["--config_path", str(world.config), "--checkpoint_path", str(world.checkpoint)]


def start(arguments: list[str], launcher: list[str] | None = None) -> subprocess.Popen[str]:
    command = [sys.executable, *(launcher or []), str(ROOT / "inference.py"), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        text=True,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


@pytest.mark.slow
def test_published_command_makes_playable_videos(tiny_world: TinyWorld, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("the red ball\n\nthe blue ball\n", encoding="utf-8")
    process = start(
        [
            *model_flags(tiny_world),
            *("--data_path", str(prompts), "--output_folder", str(tmp_path / "videos")),
            *("--num_output_frames", "7", "--use_ema", "--seed", "3", "--num_samples", "2"),
        ]
    )
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    videos = sorted((tmp_path / "videos").glob("*.mp4"))
    assert [video.name for video in videos] == [
        f"the {colour} ball-{i}.mp4" for colour in ("blue", "red") for i in (0, 1)
    ]
    info = probe_video(videos[0])
    assert (info.frames, info.height, info.width, info.fps) == (25, 32, 48, 16)
    record = json.loads(videos[0].with_suffix(".json").read_text(encoding="utf-8"))
    assert record["prompt"] == "the blue ball"
    assert record["settings"]["network"] == "generator_ema"
    assert "memory needed" in errors
    assert not torch.equal(read_video(videos[0]), read_video(videos[1])), "samples differ"


def test_killed_batch_goes_on_and_keeps_what_is_done(tiny_world: TinyWorld, tmp_path: Path) -> None:
    flags = [*model_flags(tiny_world), "--prompt", "a", "--prompt", "b"]
    flags += ["--num_output_frames", "6", "--output_folder", str(tmp_path)]
    first, second = tmp_path / "a-0.mp4", tmp_path / "b-0.mp4"

    def is_killed() -> None:
        write = VideoWriter.write

        def write_or_die(writer: VideoWriter, frames: torch.Tensor) -> None:
            write(writer, frames)
            if first.exists():
                kill_this_process()

        VideoWriter.write = write_or_die  # type: ignore[method-assign]
        run_main(main, flags)

    assert in_a_copy(is_killed) == -signal.SIGKILL
    assert list(tmp_path.glob("b-0.*.part.mp4"))
    assert not second.exists(), "a half-written video never has its final name"
    done = first.stat().st_mtime_ns

    assert run_main(main, flags) == 0
    assert first.stat().st_mtime_ns == done
    assert probe_video(second).frames == 1 + 4 * 5
    assert not list(tmp_path.glob("*.part*")), "what the killed run left is gone"


def make(world: TinyWorld, folder: Path, *flags: str) -> int:
    """One frame of the prompt `a`."""
    given = ["--prompt", "a", "--num_output_frames", "1", "--output_folder", str(folder)]
    return run_main(main, [*model_flags(world), *given, *flags])


@pytest.fixture(scope="module")
def made(tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one frame of the prompt `a`, to copy."""
    folder = tmp_path_factory.mktemp("made")
    assert make(tiny_world, folder) == 0
    return folder


def without_its_record(record: Path) -> None:
    record.unlink()


def cut_record(record: Path) -> None:
    record.write_bytes(record.read_bytes()[:-40])


def other_record(record: Path) -> None:
    record.write_text("[null]")


def other_video(record: Path) -> None:
    with record.with_suffix(".mp4").open("ab") as file:
        file.write(b"more")


@pytest.mark.parametrize(
    ("change", "flags", "words"),
    [
        (None, ["--seed", "7"], "made with another seed (0, now 7)"),
        (None, ["context_noise=9"], "made with another config"),
        (without_its_record, [], "without a readable record"),
        (cut_record, [], "without a readable record"),
        (other_record, [], "without a readable record"),
        (other_video, [], "changed after it was made"),
    ],
)
def test_videos_made_otherwise_are_not_replaced_unasked(
    tiny_world: TinyWorld,
    made: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[Path], None] | None,
    flags: list[str],
    words: str,
) -> None:
    """They were, in silence; and a record that holds a list ended in a traceback."""
    video = tmp_path / "a-0.mp4"
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    if change is not None:
        change(video.with_suffix(".json"))
    before = video.stat().st_mtime_ns
    more = ["--prompt", "b"]
    assert make(tiny_world, tmp_path, *flags, *more) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"{video} is there already" in said
    assert words in said
    assert "--overwrite" in said
    assert video.stat().st_mtime_ns == before
    assert not (tmp_path / "b-0.mp4").exists(), "before anything is made"
    assert make(tiny_world, tmp_path, *flags, *more, "--overwrite") == 0
    assert make(tiny_world, tmp_path, *flags, *more) == 0


def test_a_second_run_into_the_folder_is_refused(
    tiny_world: TinyWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first video ended corrupt, and its record said done."""
    with locked(tmp_path, "wait"):
        assert make(tiny_world, tmp_path) == 2
    assert "another run is writing" in capsys.readouterr().err


def test_a_block_does_not_wait_for_the_file_of_the_one_before(
    tiny_world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each block was hashed and encoded before the next one was begun: 70 ms at 832x480."""
    asked: list[Stream] = []
    again = threading.Event()
    in_time: list[bool] = []
    write, next_block = VideoWriter.write, Stream.next_block

    def write_late(writer: VideoWriter, frames: torch.Tensor) -> None:
        in_time.append(again.wait(20))
        write(writer, frames)

    def next_one(stream: Stream) -> torch.Tensor | None:
        asked.append(stream)
        if len(asked) > 1:
            again.set()
        return next_block(stream)

    monkeypatch.setattr(VideoWriter, "write", write_late)
    monkeypatch.setattr(Stream, "next_block", next_one)
    assert make(tiny_world, tmp_path, "--num_output_frames", "6") == 0
    assert in_time == [True, True]


def test_a_record_tells_only_of_a_file_that_can_be_read_to_its_end(
    tiny_world: TinyWorld,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write = VideoWriter.write
    monkeypatch.setattr(VideoWriter, "write", lambda self, frames: write(self, frames[1:]))
    assert make(tiny_world, tmp_path, "--num_output_frames", "3") == 2
    assert "was written with 9 frames but 8 can be read" in capsys.readouterr().err
    assert list(tmp_path.glob("*")) == []


def test_the_first_video_does_not_wait_for_all_prompts(
    tiny_world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten thousand prompts were all encoded, and kept, before the first video.

    And the generator was in memory beside the text encoder, which is four times its size.
    """
    events: list[str] = []
    once, write, load = TextSource.encode_once, batch.BatchRun._write_record, batch.load_checked
    monkeypatch.setattr(batch, "PROMPTS_AT_ONCE", 2)
    monkeypatch.setattr(
        TextSource, "encode_once", lambda self, p: events.append("encode") or once(self, p)
    )
    monkeypatch.setattr(
        batch, "load_checked", lambda *a, **kw: events.append("load") or load(*a, **kw)
    )
    monkeypatch.setattr(
        batch.BatchRun,
        "_write_record",
        lambda self, job, record: events.append(job.prompt) or write(self, job, record),
    )
    flags = [word for prompt in ("b", "c") for word in ("--prompt", prompt)]
    assert make(tiny_world, tmp_path, *flags, "--num_samples", "2") == 0
    assert events == ["encode", "load", "a", "a", "b", "b", "encode", "c", "c"]


def test_what_a_console_cannot_show_does_not_end_in_a_traceback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown = io.BytesIO()
    console = io.TextIOWrapper(shown, encoding="ascii", write_through=True)
    monkeypatch.setattr("sys.stdout", console)
    assert run_main(lambda argv: min(0, sys.stdout.write("café \udcff\n")), []) == 0
    assert shown.getvalue() == b"caf? ?\n"


def test_an_error_has_a_line_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    """It was printed at the end of the line of progress."""

    def fails(argv: object) -> int:
        for _ in tqdm(range(3)):
            raise UserError("no")
        return 0

    assert run_main(fails, []) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: no"


@pytest.mark.slow
def test_torchrun_spreads_prompts_over_ranks(tiny_world: TinyWorld, tmp_path: Path) -> None:
    names = ["one", "two", "three"]
    flags = [*model_flags(tiny_world), "--num_output_frames", "4"]
    for name in names:
        flags += ["--prompt", name]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    process = start([*flags, "--output_folder", str(tmp_path / "two")], launcher)
    _, errors = process.communicate(timeout=180)
    assert process.returncode == 0, errors
    assert run_main(main, [*flags, "--output_folder", str(tmp_path / "one")]) == 0
    for name in names:
        videos = [read_video(tmp_path / ranks / f"{name}-0.mp4") for ranks in ("one", "two")]
        assert torch.equal(*videos), "a video does not depend on the number of ranks"
    assert errors.count("memory needed") == 1, "only the first rank speaks"


def test_lengths_names_and_overrides(tiny_world: TinyWorld, tmp_path: Path) -> None:
    flags = [*model_flags(tiny_world), "--output_folder", str(tmp_path)]
    long = "a/b\n" + "x" * 300
    assert run_main(main, [*flags, "--prompt", long, "--duration", "1.5", "--fps", "8"]) == 0
    assert run_main(main, ["--", *flags, "--prompt", "x", "--save_with_index", "height=16"]) == 0
    made = {path.name: probe_video(path) for path in tmp_path.glob("*.mp4")}
    assert made["0-0_regular.mp4"].frames == 81
    assert made["0-0_regular.mp4"].height == 16
    other = next(info for name, info in made.items() if name != "0-0_regular.mp4")
    assert (other.frames, other.fps) == (12, 8)


def test_image_to_video_folder(tiny_world: TinyWorld, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    image = torch.full((32, 48, 3), 90, dtype=torch.uint8)
    write_png(folder / "cat.png", image)
    (folder / "cat.txt").write_text("a cat", encoding="utf-8")
    flags = [*model_flags(tiny_world), "--i2v", "--data_path", str(folder)]
    flags += ["--num_output_frames", "6"]
    for prefix, frames in (("reconstructed", 21), ("none", 12)):
        out = tmp_path / prefix
        arguments = [*flags, "--output_folder", str(out), "--prefix_frames", prefix]
        assert run_main(main, arguments) == 0
        assert probe_video(out / "a cat-0.mp4").frames == frames


def test_duration_is_that_of_the_file_without_its_prefix(
    tiny_world: TinyWorld, tmp_path: Path
) -> None:
    """The frames of the prefix that are not written were taken off the duration."""
    write_png(tmp_path / "dot.png", torch.zeros(1, 1, 3, dtype=torch.uint8))
    flags = [*model_flags(tiny_world), "--prompt", "a", "--image", str(tmp_path / "dot.png")]
    flags += ["--prefix_frames", "none", "--duration", "1", "--output_folder", str(tmp_path)]
    assert run_main(main, flags) == 0
    assert probe_video(tmp_path / "a-0.mp4").frames == 16


def test_more_samples_keep_the_ones_that_are_there(tiny_world: TinyWorld, tmp_path: Path) -> None:
    flags = [*model_flags(tiny_world), "--prompt", "a", "--num_output_frames", "1"]
    flags += ["--output_folder", str(tmp_path), "--num_samples"]
    assert run_main(main, [*flags, "1"]) == 0
    made = (tmp_path / "a-0.mp4").stat().st_mtime_ns
    assert run_main(main, [*flags, "2"]) == 0
    assert (tmp_path / "a-0.mp4").stat().st_mtime_ns == made
    assert (tmp_path / "a-1.mp4").is_file()


BAD_INPUT = {
    "no_prompt": ([], "say what to generate"),
    "missing_prompt_file": (["--data_path", "nowhere.txt"], "nowhere.txt"),
    "empty_prompt_file": (["--data_path", "{tmp}/empty.txt"], "empty.txt"),
    "prompt_file_not_utf8": (["--data_path", "{tmp}/latin.txt"], "UTF-8"),
    "empty_prompt": (["--prompt", " "], "empty"),
    "folder_for_prompt_file": (["--data_path", "{tmp}"], "--i2v"),
    "frames_below_one": (["--prompt", "x", "--num_output_frames", "0"], "at least 1"),
    "duration_not_a_number": (["--prompt", "x", "--duration", "nan"], "number of seconds"),
    "duration_without_end": (["--prompt", "x", "--duration", "inf"], "number of seconds"),
    "resolution": (["--prompt", "x", "height=100"], "multiple of 16"),
    "unknown_key": (["--prompt", "x", "hight=96"], "'height'"),
    "no_gpu": (["--prompt", "x", "--device", "cuda"], "no GPU"),
    "other_device": (["--prompt", "x", "--device", "meta"], "use cpu, cuda"),
    "float16_on_a_cpu": (["--prompt", "x", "--dtype", "float16"], "float16 needs a GPU"),
    "output_folder_is_a_file": (["--prompt", "x", "--output_folder", "{tmp}/empty.txt"], "folder"),
    "contact_sheet_is_no_png": (["--prompt", "x", "--contact_sheet", "sheet.jpg"], ".png"),
    "image_fills_the_video": (
        ["--prompt", "x", "--image", "{tmp}/dot.png", "--num_output_frames", "3"],
        "fills 3 latent frames",
    ),
    "missing_image": (["--prompt", "x", "--image", "nowhere.png"], "nowhere.png"),
    "half_a_character": (["--prompt", "half \udcff"], "holds half a character"),
    "image_and_video": (["--prompt", "x", "--image", "a", "--video", "b"], "not both"),
    "missing_model": (["--prompt", "x", "generator_name=Nothing"], "download.py"),
    "no_ema": (["--prompt", "x", "--checkpoint_path", "{tmp}/plain.pt", "--use_ema"], "ema"),
    "wrong_checkpoint": (["--prompt", "x", "--checkpoint_path", "{tmp}/vae.pt"], "VAE"),
    "cut_checkpoint": (["--prompt", "x", "--checkpoint_path", "{tmp}/cut.pt"], "cut.pt"),
    "missing_checkpoint": (["--prompt", "x", "--checkpoint_path", "gone.pt"], "gone.pt"),
    "missing_config": (["--prompt", "x", "--config_path", "gone.yaml"], "gone.yaml"),
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="one case needs a machine without a GPU")
@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_sentence_and_exit_code_2(
    case: str, tiny_world: TinyWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.txt").write_text("\n \n", encoding="utf-8")
    (tmp_path / "latin.txt").write_bytes("café\n".encode("latin-1"))
    torch.save({"generator": {"x": torch.zeros(1)}}, tmp_path / "plain.pt")
    torch.save({"decoder.conv1.weight": torch.zeros(1)}, tmp_path / "vae.pt")
    (tmp_path / "cut.pt").write_bytes(tiny_world.checkpoint.read_bytes()[:20_000])
    write_png(tmp_path / "dot.png", torch.zeros(1, 1, 3, dtype=torch.uint8))
    arguments, words = BAD_INPUT[case]
    out = tmp_path / "out"
    code = run_main(
        main,
        [
            *model_flags(tiny_world),
            *("--output_folder", str(out)),
            *(argument.format(tmp=tmp_path) for argument in arguments),
        ],
    )
    said = capsys.readouterr().err.splitlines()[-1]
    assert code == 2
    assert said.startswith("error: ")
    assert words in said
    assert not list(out.glob("*")), "nothing is left behind"


def test_prompts_of_the_project_are_found_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = {"i2v": False, "num_samples": 1, "seed": 0, "extended_prompt_path": None}
    given |= {"prompts": [], "image": None, "video": None, "with_index": False, "ema": False}
    (first, *_) = batch.list_jobs(data_path="prompts/shapes_demo.txt", **given)
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "shapes_demo.txt").write_text("mine")
    assert first.prompt != "mine"
    assert batch.list_jobs(data_path="prompts/shapes_demo.txt", **given)[0].prompt == "mine"


def test_without_flags_it_says_what_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference, "DEMO_PACKAGE", "nowhere")
    assert run_main(main, []) == 2
    assert "this copy has no demo: say with --config_path" in capsys.readouterr().err


def test_of_the_ranks_of_one_run_exactly_one_ends_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that ended together each printed the closing text."""
    store = torch.distributed.HashStore()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setattr(
        torch.distributed, "rendezvous", lambda url, rank, world: iter([(store, rank, world)])
    )
    assert [Ranks(rank, 3, rank).ends_last() for rank in (2, 0, 1)] == [False, False, True]
