"""The video of a session: a file that grows by fragments, from which all clients are served."""

import base64
import io
import logging
import os
from array import array
from bisect import bisect_right
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import Any, Self

import av
import numpy as np
from PIL import Image

from server.fragments import FragmentEncoder, codec_string
from server.storage import Storage
from utils.errors import UserError
from utils.files import cannot_write, write_json, written

logger = logging.getLogger(__name__)

COPIED_AT_ONCE = 2**20
JPEG_QUALITY = 90
THUMBNAIL = (96, 96)  # pixels at most
THUMBNAIL_QUALITY = 60


class Recording:
    """Encoded frames on disk, and where each begins.

    One thread at a time adds frames; others may read meanwhile. What is written twice (the growing
    file and the mp4 that is made of it) is reserved twice.
    """

    def __init__(self, storage: Storage, name: str, size: tuple[int, int], fps: int) -> None:
        """`size`: (height, width). Raises UserError if there is no room, or no file can be made."""
        self.storage, self.name, self.size, self.fps = storage, name, size, fps
        self.path = storage.path(name, ".live.mp4")
        self._reserved, self._saved_frames = 0, 0
        self._lock = Lock()
        self._encoder: FragmentEncoder | None = FragmentEncoder(*size, fps)
        self.init = self._encoder.init
        self._starts = array("Q", [0])  # of every frame, and of the next one
        self._key_frames: list[int] = []
        self._file = -1
        try:
            self._file = self._create()
            self._write(self.init)
        except BaseException:
            self.discard()
            raise
        self._starts[0] = len(self.init)

    @classmethod
    def of_branch(cls, parent: "Recording", name: str, frames: int) -> Self:
        """A recording that begins with the first `frames` frames of another one.

        They end before a key frame. Raises UserError as `Recording` does.
        """
        new = cls(parent.storage, name, parent.size, parent.fps)
        try:
            start, end = len(parent.init), parent._starts[frames]
            while start < end:
                data = parent._read(start, min(COPIED_AT_ONCE, end - start))
                if not data:
                    raise UserError("the session to branch was closed meanwhile")
                new._write(data)
                start += len(data)
        except BaseException:
            new.discard()
            raise
        new._starts = parent._starts[: frames + 1]
        new._key_frames = [frame for frame in parent._key_frames if frame < frames]
        assert new._encoder is not None
        new._encoder.next_frame = frames
        return new

    @property
    def frames(self) -> int:
        """Frames that can be read."""
        return len(self._starts) - 1

    @property
    def codec(self) -> str:
        """See `FragmentEncoder.codec`."""
        return codec_string(self.init)

    def key_frame_before(self, seconds: float) -> int:
        """The last frame at or before this time that decoding can begin at; else the first one."""
        frame = int(min(seconds * self.fps + 1e-6, self.frames))
        return self._key_frames[max(0, bisect_right(self._key_frames, frame) - 1)] if frame else 0

    def add(self, frames: np.ndarray, told: Callable[[], None] = lambda: None) -> None:
        """Append the frames uint8 `[n, H, W, 3]` of a block; after each `told` is called.

        Raises UserError where the disk, or the limit of the storage, has no more room.
        """
        with self._lock:
            encoder = self._encoder
        if encoder is None:
            return
        for number, data in enumerate(encoder.encode(frames)):
            self._write(data)
            if number == 0:
                self._key_frames.append(self.frames)
            self._starts.append(self._starts[-1] + len(data))
            told()

    def read(self, first: int, end: int) -> bytes:
        """The fragments of the frames from `first` to `end`; nothing once this is closed."""
        start = self._starts[first]
        return self._read(start, self._starts[end] - start)

    def save(self) -> Path:
        """Write what there is as an mp4 with its index in front, unless that was done; its path."""
        target, frames = self.storage.path(self.name, ".mp4"), self.frames
        if frames and (frames != self._saved_frames or not target.is_file()):
            write_mp4(self.path, frames, target)
            self._saved_frames = frames
        return target

    def finish(self, record: dict[str, Any] | None) -> None:
        """Leave the mp4, and its record, instead of the growing file; nothing of an empty video.

        Where there is no room for the mp4 the growing file is left under its name: it plays, too.
        """
        try:
            if self.frames and self._file >= 0:
                self._leave(record)
        finally:
            self.discard()

    def _leave(self, record: dict[str, Any] | None) -> None:
        try:
            self.save()
        except (UserError, OSError, av.FFmpegError) as error:
            logger.warning("the video of %s is left as it grew: %s", self.name, error)
            os.ftruncate(self._file, self._starts[-1])
            self.path.replace(self.storage.path(self.name, ".mp4"))
        try:
            if record is not None:
                write_json(self.storage.path(self.name, ".json"), record)
        finally:
            self.storage.add_finished(self.name, self._reserved)
            self._reserved = 0

    def discard(self) -> None:
        """Free the encoder and remove the growing file; idempotent."""
        with self._lock:
            file, self._file = self._file, -1
            encoder, self._encoder = self._encoder, None
        if encoder is not None:
            encoder.close()
        if file >= 0:
            os.close(file)
            self.path.unlink(missing_ok=True)
            self.storage.reserve(-self._reserved)

    def _create(self) -> int:
        try:
            return os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        except OSError as error:
            raise cannot_write(self.path.name, error) from error

    def _read(self, start: int, size: int) -> bytes:
        """Bytes of the growing file; nothing once this is closed."""
        with self._lock:  # so that the number is not that of another file meanwhile
            return os.pread(self._file, size, start) if self._file >= 0 else b""

    def _write(self, data: bytes) -> None:
        self.storage.reserve(2 * len(data))
        self._reserved += 2 * len(data)
        try:
            written_bytes = os.write(self._file, data)
            if written_bytes < len(data):
                raise OSError(28, "No space left on device")
        except OSError as error:
            raise cannot_write(self.path.name, error) from error


def write_mp4(source: Path, frames: int, target: Path) -> None:
    """Copy the first `frames` frames of an mp4 into one with its index in front."""
    with written(target) as part, av.open(str(source)) as old:
        options = {"movflags": "+faststart"}
        with av.open(str(part), "w", format="mp4", options=options) as new:
            stream = new.add_stream_from_template(old.streams.video[0])
            packets = (packet for packet in old.demux(video=0) if packet.size)
            for packet in islice(packets, frames):
                packet.stream = stream
                new.mux(packet)


# --- readers -------------------------------------------------------------------------------------


class Mp4Reader:
    """What a client of fragmented MP4 is sent: the init segment, then fragments."""

    def __init__(self, recording: Recording, first_frame: int) -> None:
        """`first_frame`: a key frame."""
        self.recording, self.next_frame = recording, first_frame
        self._head = recording.init

    @property
    def ready(self) -> bool:
        """Whether there is something to read."""
        return bool(self._head) or self.next_frame < self.recording.frames

    def read(self, most: int) -> list[bytes]:
        """The next messages, of `most` frames at most."""
        if self._head:
            head, self._head = self._head, b""
            return [head]
        end = min(self.recording.frames, self.next_frame + most)
        data = self.recording.read(self.next_frame, end)
        self.next_frame = end
        return [data] if data else []


class JpegReader:
    """What a client without Media Source Extensions is sent: every frame as a JPEG."""

    def __init__(self, recording: Recording, first_frame: int) -> None:
        """`first_frame`: a key frame."""
        self.recording, self.next_frame = recording, first_frame
        self._decoder = av.CodecContext.create("h264", "r")
        self._decoder.extradata = _decoder_configuration(recording.init)
        self._decoder.thread_count = 1
        self._decoder.flags |= av.codec.context.Flags.low_delay

    @property
    def ready(self) -> bool:
        """Whether there is something to read."""
        return self.next_frame < self.recording.frames

    def read(self, most: int) -> list[bytes]:
        """The next messages, of `most` frames at most."""
        messages = []
        height, width = self.recording.size
        for number in range(self.next_frame, min(self.recording.frames, self.next_frame + most)):
            data = self.recording.read(number, number + 1)
            start = int.from_bytes(data[:4]) + 8  # behind moof and the head of mdat
            for frame in self._decoder.decode(av.Packet(data[start:])) if data else ():
                messages.append(jpeg(frame.to_ndarray(format="rgb24")[:height, :width]))
            self.next_frame = number + 1
        return messages


def _decoder_configuration(init: bytes) -> bytes:
    start = init.index(b"avcC")
    return init[start + 4 : start - 4 + int.from_bytes(init[start - 4 : start])]


def jpeg(pixels: np.ndarray, quality: int = JPEG_QUALITY) -> bytes:
    """A frame uint8 `[H, W, 3]` as JPEG."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    return file.getvalue()


def thumbnail(pixels: np.ndarray) -> str:
    """A small JPEG of a frame uint8 `[H, W, 3]`, as a data URL."""
    image = Image.fromarray(pixels)
    image.thumbnail(THUMBNAIL)
    data = base64.b64encode(jpeg(np.asarray(image), THUMBNAIL_QUALITY)).decode()
    return f"data:image/jpeg;base64,{data}"
