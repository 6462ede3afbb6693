"""The folder of videos: what lies there by id, and how much may."""

import re
from pathlib import Path
from threading import Lock

from pipeline.memory import readable
from utils.errors import UserError
from utils.files import make_folder

_ID = re.compile(r"[0-9a-f]{32}")


class Storage:
    """Videos (`<id>.mp4`), their records (`<id>.json`) and growing files (`<id>.live.mp4`).

    Everything counts to the limit, also what an earlier server left. Nothing is ever deleted to
    make room. May be used from several threads.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        """`limit`: bytes, of all files together. Raises UserError if the folder cannot be made."""
        self.folder = make_folder(folder)
        self.limit = limit
        self._lock = Lock()
        files = [path for path in self.folder.iterdir() if path.is_file()]
        self._sizes = {path: path.stat().st_size for path in files}  # of all that grow no more
        self._used = sum(self._sizes.values())
        self._finished = {path.stem for path in files if _ID.fullmatch(path.stem)}

    @property
    def used(self) -> int:
        """Bytes that are there or reserved."""
        return self._used

    def reserve(self, size: int) -> None:
        """Take room of `size` bytes, or give it back if negative; UserError if there is none."""
        with self._lock:
            if self._has_no_room(size):
                self._forget_removed()
            if self._has_no_room(size):
                raise UserError(
                    f"the videos fill their limit of {readable(self.limit)}: remove some, or "
                    "start the server with a larger --disk_limit"
                )
            self._used += size

    def path(self, name: str, suffix: str) -> Path:
        """Where a file of the session `name`, an id that was made here, is."""
        return self.folder / f"{name}{suffix}"

    def add_finished(self, name: str, reserved: int) -> None:
        """The video and the record of a session are complete; they take the room it reserved."""
        paths = (self.path(name, suffix) for suffix in (".mp4", ".json"))
        with self._lock:
            sizes = {path: path.stat().st_size for path in paths if path.is_file()}
            self._sizes |= sizes
            self._used += sum(sizes.values()) - reserved
            self._finished.add(name)

    def _has_no_room(self, size: int) -> bool:
        return size > 0 and self._used + size > self.limit

    def _forget_removed(self) -> None:
        """Give back the room of files that somebody has removed."""
        for path in [path for path in self._sizes if not path.exists()]:
            self._used -= self._sizes.pop(path)

    def finished(self, name: str, suffix: str) -> Path | None:
        """A file of a session that was finished, now or by an earlier server."""
        path = self.path(name, suffix) if name in self._finished else None
        return path if path is not None and path.is_file() else None
