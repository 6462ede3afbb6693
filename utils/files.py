"""Files and folders that are whole or not there, and that one run at a time may write to.

Whatever is written has a temporary name of its writer's own (`<stem>.<8 hex digits>.part<suffix>`,
a folder `<name>.<8 hex digits>.partial`) in the same folder, and takes its name when it is whole.
"""

import errno
import json
import logging
import os
import re
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.distributed import run_name
from utils.errors import UserError

if TYPE_CHECKING:
    from filelock import FileLock
    from torch import Tensor

logger = logging.getLogger(__name__)

MAX_NAME_BYTES = 255  # of one file name, on every common file system
LOCK = ".lock"
_TEMPORARY = re.compile(r"\.[0-9a-f]{8}\.(part(\.[^.]*)?|partial)$")
_OS_ERROR_TEXT = re.compile(r"\(os error (\d+)\)")  # of safetensors

_REASONS = {
    errno.ENOSPC: "no space left on device; make room, or write elsewhere",
    errno.EDQUOT: "your disk quota is used up; make room, or write elsewhere",
    errno.EFBIG: "the file would be too large for this place; write elsewhere",
    errno.EROFS: "the file system is read-only; write elsewhere",
    errno.EACCES: "permission denied; write elsewhere, or ask for the right to",
    errno.EPERM: "permission denied; write elsewhere, or ask for the right to",
    errno.ENAMETOOLONG: "the name is too long; give a shorter one",
    errno.EISDIR: "it is a folder; give the name of a file",
    errno.EIO: "the disk reports an error; write elsewhere",
}


@contextmanager
def written(path: str | Path, *, sync: bool = False) -> Iterator[Path]:
    """A temporary name to write to, which becomes `path` when the block is left normally.

    Missing folders are made. After any exception nothing is left and an older `path` stands
    unchanged. The file gets the permissions of any new one. What is no file (`/dev/stdout`, a pipe)
    is written to as it is. `sync`: on the disk, too, before it takes its name.

    Raises:
        UserError: `path` cannot be written; one sentence says why.
    """
    path = Path(path)
    if _kind(path) == "device":
        with told(path):
            yield path
        return
    _check_file_name(path)
    part = part_path(path)
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part.touch(exist_ok=False)
            permissions = part.stat().st_mode
        except OSError as error:
            raise cannot_write(path, error) from error
        with told(path):
            yield part
        try:
            part.chmod(permissions)  # safetensors makes files that only their owner can read
            if sync:
                with part.open("rb+") as file:
                    os.fsync(file.fileno())
            part.replace(path)
        except OSError as error:
            raise cannot_write(path, error) from error
    finally:
        with suppress(OSError):  # renamed, or never made
            part.unlink()


@contextmanager
def written_folder(folder: str | Path) -> Iterator[Path]:
    """A new empty folder to fill, which becomes `folder` when the block is left normally.

    An older `folder` is replaced as a whole, at the end only; otherwise as `written`.
    """
    folder = Path(folder)
    partial = partial_path(folder)
    try:
        try:
            if _kind(folder) in ("file", "device"):
                raise NotADirectoryError(errno.ENOTDIR, "")
            partial.mkdir(parents=True)
        except OSError as error:
            raise cannot_write(folder, error) from error
        with told(folder):
            yield partial
        try:
            replace_folder(partial, folder)
        except OSError as error:
            raise cannot_write(folder, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def replace_folder(partial: Path, folder: Path) -> None:
    """Rename a folder; an older one under that name is removed once the new one is there."""
    old = partial_path(folder)
    with suppress(FileNotFoundError):
        folder.rename(old)
    try:
        partial.rename(folder)
    except OSError:
        with suppress(OSError):
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text as `written` does."""
    with written(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write plain data as `written` does."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_tensors(
    path: str | Path, tensors: Mapping[str, "Tensor"], metadata: Mapping[str, str] | None = None
) -> None:
    """Write contiguous tensors as `.safetensors`, as `written` does."""
    from safetensors.torch import save_file

    with written(path) as part:
        save_file(dict(tensors), part, None if metadata is None else dict(metadata))


def write_torch(path: str | Path, value: Any) -> None:
    """Write what `torch.save` takes, as `written` does."""
    import torch

    # An open file, since torch alone does not tell why a write failed.
    with written(path) as part, part.open("wb") as file:
        torch.save(value, file)


def write_figure(path: str | Path, figure: Any) -> None:
    """Write a matplotlib figure as PNG, as `written` does."""
    with written(path) as part:
        figure.savefig(part, format="png", dpi=130)


def make_folder(folder: str | Path) -> Path:
    """Make a folder with its parents; UserError if that is impossible."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(folder, error) from error
    return folder


def check_file(path: str | Path) -> None:
    """UserError unless `path` can be written, so that no work is lost at its end."""
    path = Path(path)
    if _kind(path) == "device":
        return
    _check_file_name(path)
    check_folder(path.absolute().parent, path)


def check_folder(folder: str | Path, path: str | Path | None = None) -> None:
    """UserError (about `path`, or the folder) unless files can be written to a folder.

    It may have to be made first. Nothing stays behind.
    """
    path = Path(path or folder)
    there = Path(folder).absolute()
    _check_name(path)
    while not os.path.lexists(there):
        there = there.parent
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise cannot_write(path, error) from error


def require_space(folder: str | Path, size: int, what: str) -> None:
    """UserError, beginning with `what`, unless `size` bytes fit where `folder` is or will be."""
    free, place = free_space(folder)
    if size > free:
        raise UserError(f"{what}, and only {free / 2**20:.0f} MiB are free at {place}; make room")


def free_space(folder: str | Path) -> tuple[int, Path]:
    """Free bytes where `folder` is or will be, and the folder that is there."""
    place = Path(folder).absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free, place


@contextmanager
def told(path: str | Path) -> Iterator[None]:
    """Turn a failed write to `path` (or beside it, or in it) into one sentence, a UserError."""
    try:
        yield
    except Exception as error:
        if (reason := _reason_in(error, Path(path).parent)) is not None:
            raise cannot_write(path, reason) from error
        raise


def cannot_write(path: str | Path, error: OSError) -> UserError:
    """One sentence about a path that cannot be written."""
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        above = (place for place in (Path(path), *Path(path).parents) if _kind(place) == "file")
        reason = f"{next(above, path)} is a file where a folder should be; give another path"
    else:
        reason = _REASONS.get(error.errno or 0, (error.strerror or str(error)).lower())
    return UserError(f"cannot write {path}: {reason}")


def _reason_in(error: BaseException, folder: Path) -> OSError | None:
    """The failed write to `folder` that an exception stems from, if it is one."""
    if isinstance(error, UserError):
        return None
    seen: BaseException | None = error
    while seen is not None:
        if text := _OS_ERROR_TEXT.search(str(seen)):
            seen = OSError(int(text[1]), os.strerror(int(text[1])))
        if isinstance(seen, OSError) and (seen.errno in _REASONS or seen.errno == errno.ENOTDIR):
            ours = seen.filename is None or Path(os.fsdecode(seen.filename)).is_relative_to(folder)
            return seen if ours else None
        seen = seen.__cause__ or seen.__context__
    return None


def _check_file_name(path: Path) -> None:
    """UserError if no file can have this name: it is a folder's, or too long."""
    if _kind(path) == "folder":
        raise cannot_write(path, OSError(errno.EISDIR, ""))
    _check_name(path)


def _check_name(path: Path) -> None:
    """UserError if a part of a path is longer than file systems take."""
    if any(len(os.fsencode(part)) > MAX_NAME_BYTES for part in path.parts):
        raise cannot_write(path, OSError(errno.ENAMETOOLONG, ""))


def _kind(path: Path) -> str | None:
    """`file`, `folder`, `device` (and what else is neither), or None if none is to be seen."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return None
    return "file" if stat.S_ISREG(mode) else "folder" if stat.S_ISDIR(mode) else "device"


def part_path(path: Path) -> Path:
    """A new temporary name for a file: `<stem>.<8 hex digits>.part<suffix>` in the same folder."""
    suffix = path.suffix if len(path.suffix) < 20 else ""
    return path.with_name(_fitted(path.stem, f".{uuid.uuid4().hex[:8]}.part{suffix}"))


def partial_path(folder: Path) -> Path:
    """A new temporary name for a folder: `<name>.<8 hex digits>.partial` beside it."""
    return folder.with_name(_fitted(folder.name, f".{uuid.uuid4().hex[:8]}.partial"))


def _fitted(stem: str, tail: str) -> str:
    """`stem` and `tail`, the stem cut (at a character) to what a file name can hold."""
    room = MAX_NAME_BYTES - len(os.fsencode(tail))
    whole = os.fsencode(stem)
    return (stem if len(whole) <= room else whole[:room].decode("utf-8", "ignore")) + tail


def is_temporary(path: Path) -> bool:
    """Whether a file or folder has a name that `written` or `written_folder` gave it."""
    return _TEMPORARY.search(path.name) is not None


def whole_files(folder: Path, pattern: str) -> list[Path]:
    """The files of a folder with names of this pattern, sorted, but for those being written."""
    return sorted(path for path in folder.glob(pattern) if not is_temporary(path))


def remove_leftovers(folder: Path) -> None:
    """Remove what killed writers left in a folder; only while it is `locked`."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if is_temporary(path):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


@contextmanager
def locked(
    path: str | Path, otherwise: str, *, is_file: bool = False, is_main: bool = True
) -> Iterator[None]:
    """Keep other runs away from a folder (made if it is missing) or a file meanwhile.

    The ranks of one run share a place: its main rank holds the lock, the others one of their own
    beside it, since they may go on when it has ended. Locks end with their processes. Where the
    file system has none, nobody is kept out, and a warning says so.

    Args:
        path: the folder that is written to, or with `is_file` the file.
        otherwise: what else a person can do, for the error: "use another --logdir".
        is_file: the lock is `.<name>.lock` beside the file instead of `.lock` in the folder.
        is_main: whether this is the main rank.

    Raises:
        UserError: another run holds it, or it cannot be written.
    """
    path = Path(path)
    folder = make_folder(path.absolute().parent if is_file else path)
    run = run_name()
    mine = f".{run}.{uuid.uuid4().hex[:8]}"
    name = _fitted(f".{path.name}", LOCK + mine).removesuffix(mine) if is_file else LOCK
    mates = f"{name}.{run}."
    own = folder / (name if is_main else name + mine)
    refusal = UserError(f"another run is writing to {path}: wait for its end, or {otherwise}")
    lock = _acquired(own, refusal, path)
    try:
        ranks = [other for other in folder.iterdir() if other.name.startswith(f"{name}.")]
        for other in ranks if is_main else ():
            if not other.name.startswith(mates):  # of another run, or of one that was killed
                _acquired(other, refusal, path).release()
                other.unlink(missing_ok=True)
        yield
    finally:
        if lock.is_locked:
            own.unlink(missing_ok=True)
            lock.release()
        if not is_file:
            with suppress(OSError):
                folder.rmdir()  # only if nothing was written


def _acquired(file: Path, refusal: UserError, path: Path) -> "FileLock":
    """The lock that this file is, held if the file system can; `refusal` if another has it."""
    from filelock import FileLock, Timeout

    lock = FileLock(file, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise refusal from error
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno in _REASONS:
            raise cannot_write(path, error) from error
        logger.warning("%s cannot be locked: start no other run that writes there", path)
    return lock
