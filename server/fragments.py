"""Frames as fragmented MP4: an init segment, then a fragment for each frame, at once.

The init segment is the library's. Its muxer holds a fragment back until the next frame comes, and
begins every file at time 0; so the fragments (ISO/IEC 14496-12, 8.8) are written here.
"""

import struct
from collections.abc import Iterator
from fractions import Fraction
from typing import Self

import av
import numpy as np
from av.video.frame import PictureType

from utils.video import YuvFrames, pad_to_even

TICKS = 1000
"""Units of time in a frame: the time scale of the track is this times the frame rate."""

_OPTIONS = {
    "profile": "baseline",
    "tune": "zerolatency",
    "preset": "ultrafast",
    "crf": "20",
    "forced-idr": "1",
    # key frames where they are asked for only; lengths, not start codes, before each unit
    "x264-params": "keyint=infinite:scenecut=0:annexb=0",
}
_TRACK = 1
_KEY_FRAME, _OTHER_FRAME = 0x02000000, 0x01010000  # needs no other; needs others, is no sync point
_BASE_IS_MOOF = 0x020000
_RUN_HAS = 0x000001 | 0x000100 | 0x000200 | 0x000400  # data offset; duration, size, flags of each


class FragmentEncoder:
    """H.264 (baseline, no latency) in fragments; frames are numbered from `first_frame` on.

    An odd height or width is padded by one row or column, as in `utils.video.VideoWriter`.
    """

    def __init__(self, height: int, width: int, fps: int, first_frame: int = 0) -> None:
        self.next_frame = first_frame
        options = {
            "movflags": "empty_moov+default_base_moof",
            "video_track_timescale": str(fps * TICKS),
        }
        sink = _Sink()
        self._file = av.open(sink, "w", format="mp4", options=options)
        self._stream = self._file.add_stream("libx264", rate=fps, options=_OPTIONS)
        self._stream.height, self._stream.width = height + height % 2, width + width % 2
        self._stream.pix_fmt = "yuv420p"
        self._stream.codec_context.thread_count = 1
        self._frames = YuvFrames(self._stream.codec_context, Fraction(fps))
        self._file.start_encoding()
        self.init = bytes(sink.written)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def codec(self) -> str:
        """What `video/mp4; codecs="…"` calls this stream: profile and level that were chosen."""
        return codec_string(self.init)

    def encode(self, frames: np.ndarray) -> Iterator[bytes]:
        """A fragment for each frame uint8 `[n, H, W, 3]`, the first one a key frame."""
        for number, pixels in enumerate(pad_to_even(frames)):
            picture = self._frames.next(pixels)
            picture.pict_type = PictureType.I if number == 0 else PictureType.NONE
            (packet,) = self._stream.encode(picture)
            yield fragment(self.next_frame, bytes(packet), is_key=packet.is_keyframe)
            self.next_frame += 1

    def close(self) -> None:
        """Free the encoder."""
        self._file.close()


class _Sink:
    """A file that cannot be sought in."""

    def __init__(self) -> None:
        self.written = bytearray()

    def write(self, data: bytes) -> int:
        """Append."""
        self.written += data
        return len(data)


def codec_string(init: bytes) -> str:
    """`avc1.` and the bytes profile, constraints and level of the avcC box (RFC 6381)."""
    start = init.index(b"avcC") + 5  # behind the name and the version
    return f"avc1.{init[start : start + 3].hex().upper()}"


def fragment(number: int, data: bytes, *, is_key: bool) -> bytes:
    """The boxes moof and mdat of frame `number`, whose H.264 units are `data`."""
    flags = _KEY_FRAME if is_key else _OTHER_FRAME
    head = _box(b"mfhd", struct.pack(">II", 0, number + 1))
    track = _box(b"tfhd", struct.pack(">II", _BASE_IS_MOOF, _TRACK))
    time = _box(b"tfdt", struct.pack(">IQ", 1 << 24, number * TICKS))

    def moof(data_offset: int) -> bytes:
        run = struct.pack(">IIiIII", _RUN_HAS, 1, data_offset, TICKS, len(data), flags)
        return _box(b"moof", head + _box(b"traf", track + time + _box(b"trun", run)))

    return moof(len(moof(0)) + 8) + _box(b"mdat", data)


def _box(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(content), name) + content
