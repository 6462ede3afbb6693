"""Whole files or none, in one sentence why not, and one run at a time in a folder."""

import errno
import multiprocessing
import os
import resource
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from utils.errors import UserError
from utils.files import (
    check_file,
    check_folder,
    is_temporary,
    locked,
    make_folder,
    remove_leftovers,
    write_json,
    write_tensors,
    write_text,
    write_torch,
    written,
    written_folder,
)

Write = Callable[[Path], None]


@pytest.fixture
def small_disk() -> Iterator[None]:
    """No file may become larger than 20 kB."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_whole_with_its_folders_and_the_usual_permissions(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.bin"
    with written(path, sync=True) as part:
        assert (part.parent, part.suffix) == (path.parent, ".bin")
        assert part.stem.endswith(".part")
        assert is_temporary(part)
        part.chmod(0o600)  # as safetensors does
        part.write_bytes(b"new")
        assert not path.exists()
    plain = tmp_path / "plain"
    plain.touch()
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)
    assert names(path.parent) == ["a.bin"]
    assert not is_temporary(path)


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), ValueError(), OSError(errno.ENOENT, "other")]
)
def test_an_error_leaves_the_older_file_and_nothing_else(tmp_path: Path, error: Exception) -> None:
    """Six of thirteen writers left a `.part` behind."""
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def fail() -> None:
        with written(path) as part:
            part.write_text("half")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert (path.read_text(), names(tmp_path)) == ("old", ["a.txt"])


def test_two_writers_of_one_file_never_share_it(tmp_path: Path) -> None:
    """Both wrote to `clip.part.mp4`: the file that the first renamed was cut by the second."""
    path = tmp_path / "clip.mp4"
    with ExitStack() as stack:
        first, second = (stack.enter_context(written(path)) for _ in range(2))
        assert first != second
        first.write_text("one")
        second.write_text("two")
    assert (path.read_text(), names(tmp_path)) == ("one", ["clip.mp4"])


def test_a_name_of_255_bytes_can_be_written(tmp_path: Path) -> None:
    """`.part` made it longer than a file name may be; cut at a character, not within one."""
    path = tmp_path / f"{'é' * 125}x.mp4"
    with written(path) as part:
        assert len(os.fsencode(part.name)) <= 255
        part.write_text("")
    assert names(tmp_path) == [path.name]


@pytest.mark.parametrize(
    "write",
    [
        lambda path: write_text(path, "x" * 100_000),
        lambda path: write_tensors(path, {"a": torch.zeros(30_000)}),
        lambda path: write_torch(path, {"a": torch.zeros(30_000)}),
    ],
)
def test_a_full_disk_ends_in_one_sentence(tmp_path: Path, small_disk: None, write: Write) -> None:
    """torch spoke of "unexpected pos 704 vs 598", safetensors of a SafetensorError."""
    with pytest.raises(UserError, match=r"^cannot write .*a\.x: the file would be too large"):
        write(tmp_path / "a.x")
    assert not names(tmp_path)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "no space left on device"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "permission denied"),
        (errno.EDQUOT, "quota"),
    ],
)
@pytest.mark.parametrize("manager", [written, written_folder])
def test_what_the_system_says_is_said_in_one_sentence(
    tmp_path: Path, number: int, words: str, manager: Callable
) -> None:
    with (
        pytest.raises(UserError, match=f"cannot write .*out: .*{words}"),
        manager(tmp_path / "out"),
    ):
        raise OSError(number, "…")
    assert not names(tmp_path)


def test_an_error_about_another_file_keeps_its_own_words(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), written(tmp_path / "out"):
        raise PermissionError(errno.EACCES, "…", "/elsewhere")
    with pytest.raises(UserError, match="the prompt"), written(tmp_path / "out"):
        raise UserError("the prompt is empty") from OSError(errno.ENOSPC, "…")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("file/out.json", "file is a file where a folder should be"),
        ("file/deeper/out.json", "file is a file where a folder should be"),
        ("folder", "it is a folder; give the name of a file"),
        (f"{'x' * 252}.json", "the name is too long"),
        (f"{'x' * 256}/out.json", "the name is too long"),
    ],
)
def test_an_impossible_name_is_known_before_the_work(tmp_path: Path, name: str, words: str) -> None:
    """Asked after an hour of work, each of these ended in a traceback."""
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for attempt in (check_file, lambda path: write_json(path, {})):
        with pytest.raises(UserError, match=words):
            attempt(tmp_path / name)
    assert names(tmp_path) == ["file", "folder"]


def test_a_possible_name_passes_and_leaves_nothing(tmp_path: Path) -> None:
    check_file(tmp_path / "new" / "deeper" / "out.json")
    check_folder(tmp_path / "new")
    assert not names(tmp_path)
    check_file("/dev/null")
    write_text("/dev/null", "goes where a device takes it")  # and is not renamed over it
    assert Path("/dev/null").is_char_device()
    with pytest.raises(UserError, match="no space left on device"):
        write_text("/dev/full", "ended in a traceback")


@pytest.mark.parametrize(
    "call", [check_folder, make_folder, lambda f: written_folder(f).__enter__()]
)
def test_a_file_where_a_folder_should_be(tmp_path: Path, call: Callable) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file is a file where a folder should be"):
        call(tmp_path / "file")
    assert names(tmp_path) == ["file"]


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    folder = tmp_path / "export"
    for content in ("old", "new"):
        with written_folder(folder) as partial:
            (partial / content).touch()
            assert is_temporary(partial)
    with pytest.raises(ValueError, match="half"), written_folder(folder):
        raise ValueError("half")
    assert (names(tmp_path), names(folder)) == (["export"], ["new"])


def test_leftovers_of_killed_writers_go_and_nothing_else(tmp_path: Path) -> None:
    """Only names that a writer here gives: a person's `notes.part.txt` stays."""
    for name in ("a.0123abcd.part.mp4", "a.0123abcd.part", "notes.part.txt", "a.mp4"):
        (tmp_path / name).touch()
    (tmp_path / "step_000001.0123abcd.partial" / "x").mkdir(parents=True)
    remove_leftovers(tmp_path)
    remove_leftovers(tmp_path / "missing")
    assert names(tmp_path) == ["a.mp4", "notes.part.txt"]


@pytest.mark.parametrize("is_file", [True, False])
def test_one_run_at_a_time_writes_to_a_place(tmp_path: Path, is_file: bool) -> None:
    path = tmp_path / "run" / "out"
    with locked(path, "use another name", is_file=is_file):
        with (
            pytest.raises(UserError, match=r"another run is writing to .*out: .* another name"),
            locked(path, "use another name", is_file=is_file),
        ):
            pass
        with locked(path, "", is_file=is_file, is_main=False):
            pass  # a rank of the same run
    with locked(path, "", is_file=is_file):
        pass
    assert not list(tmp_path.rglob("*out*"))


@pytest.mark.parametrize("is_file", [True, False])
@pytest.mark.parametrize("name", ["out", "é[" * 90])
def test_a_rank_that_goes_on_keeps_other_runs_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_file: bool, name: str
) -> None:
    """The main rank of a run may end first; what a killed run left keeps nobody away."""
    if not is_file:
        name = "out"
    path = tmp_path / name
    monkeypatch.setenv("MASTER_PORT", "29500")
    with locked(path, "", is_file=is_file, is_main=False):
        with locked(path, "", is_file=is_file):
            pass  # the main rank of the same run
        monkeypatch.setenv("MASTER_PORT", "29501")
        with pytest.raises(UserError, match="another run"), locked(path, "", is_file=is_file):
            pass
        (beside,) = (tmp_path if is_file else path).iterdir()
    beside.parent.mkdir(exist_ok=True)
    beside.touch()
    with locked(path, "", is_file=is_file):
        assert not beside.exists()


def _hold(path: Path) -> None:
    with locked(path, ""):
        os._exit(0)


def test_a_killed_run_leaves_no_lock(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=_hold, args=(tmp_path,))
    process.start()
    process.join()
    assert names(tmp_path) == [".lock"]
    with locked(tmp_path, ""):
        pass


def test_a_file_system_without_locks_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with locked(tmp_path, ""):
        pass
    assert "cannot be locked" in caplog.text
