"""Video files where they enter and leave the program; images and frames are in `utils/images.py`.

One library (PyAV) reads and writes. A *frame* of a file is what its decoder gives out: all that is
counted, shown or cut here is counted in these. At a requested rate frames are chosen by their time
stamps.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from math import ceil, isfinite
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self, cast

import numpy as np
import torch
from cachetools import LRUCache

from utils.errors import UserError
from utils.files import cannot_write, written
from utils.images import (
    Frames,
    as_numpy,
    check_image,
    contact_sheet,
    fit_frames,
    read_image,
    require_file,
    thumbnails,
    to_float,
    to_uint8,
    write_png,
)

if TYPE_CHECKING:
    import av
    from av.container import InputContainer, OutputContainer
    from av.video.codeccontext import VideoCodecContext
    from av.video.stream import VideoStream

__all__ = [
    "VIDEO_SUFFIXES",
    "Frames",
    "VideoInfo",
    "VideoWriter",
    "check_image",
    "contact_sheet",
    "fit_frames",
    "frame_rate",
    "probe_video",
    "read_image",
    "read_video",
    "read_video_chunks",
    "say_rate",
    "spread_frames",
    "thumbnails",
    "to_float",
    "to_uint8",
    "write_png",
]

logger = logging.getLogger(__name__)

VIDEO_SUFFIXES = (".mp4", ".mov", ".m4v", ".webm", ".mkv", ".avi")
"""Of files that are taken for videos in a folder, in lower case."""

SAME_RATE = 0.005  # relative: 29.97 and 30 frames per second are one rate
PIXEL_ASPECTS = Fraction(1, 8), Fraction(8)  # a file that says more than this is mistaken
HD_SIZE = 576, 1280  # untagged video higher or wider than this is BT.709, as players have it
EBML_HEAD, EBML_SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"  # of Matroska and WebM
UNKNOWN_RIFF = 2**32 - 1  # the size in an AVI file that is longer than it can say


@dataclass(frozen=True)
class VideoInfo:
    """What a video file holds: number of frames, its own frames per second, size in pixels."""

    frames: int
    fps: float
    height: int
    width: int


# --- writing ------------------------------------------------------------------------------------


class VideoWriter:
    """Write an H.264 mp4 (yuv420p, BT.709) block by block, in constant memory.

    Use as a context manager. The file grows under a temporary name in the same folder and takes its
    own name when the block is left normally; after an exception, or if no frame was written,
    nothing is left behind. An existing file is replaced at the end only.

    An odd height or width is padded by one row or column (the edge is repeated), since yuv420p
    needs even sizes: the file is then one pixel larger than the frames.

    Args:
        path: the file to make, ending in .mp4; missing folders are created.
        fps: frames per second.
        crf: quality, 0 (lossless luma and chroma, large) to 51 (worst).

    Raises:
        UserError: another file type, an impossible rate, or the file cannot be written.
    """

    def __init__(self, path: str | Path, fps: float | Fraction = 16, crf: int = 18) -> None:
        self.path = Path(path).absolute()
        if self.path.suffix.lower() != ".mp4":
            raise UserError(f"Videos are written as .mp4: rename the output {self.path}.")
        self.fps = _rate(fps)
        self.crf = crf
        self.frames_written = 0
        self._size: tuple[int, int] | None = None
        self._open = ExitStack()
        self._encoder: _Encoder | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open.__exit__(kind, error, trace)

    def write(self, frames: Frames) -> None:
        """Append frames: uint8 `[frames, height, width, 3]`, all blocks of one size.

        Raises:
            ValueError: another type, shape, or size than the first block.
            UserError: the file cannot be written (no space, no permission).
        """
        pixels = as_numpy(frames)
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3:
            raise ValueError(f"need uint8 [F, H, W, 3], got {pixels.dtype} {list(pixels.shape)}")
        size = pixels.shape[1], pixels.shape[2]
        if self._size not in (None, size):
            raise ValueError(f"frames of {size} after frames of {self._size}")
        if len(pixels) == 0:
            return
        pixels = pad_to_even(pixels)
        if self._encoder is None:
            opened = _opened_encoder(self.path, pixels.shape[1:3], self.fps, self.crf)
            self._encoder = self._open.enter_context(opened)
        self._size = size
        with _write_errors(self.path):
            for frame in pixels:
                self._encoder.add(frame)
        self.frames_written += len(pixels)


def pad_to_even(pixels: np.ndarray) -> np.ndarray:
    """Frames uint8 `[F, H, W, 3]` with an even height and width: the edge is repeated, if need be.

    yuv420p needs even sizes.
    """
    height, width = pixels.shape[1:3]
    if height % 2 or width % 2:
        pixels = np.pad(pixels, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    return np.ascontiguousarray(pixels)


class YuvFrames:
    """RGB frames as yuv420p ones in the colours of BT.709, numbered from 0, for an encoder."""

    def __init__(self, context: "VideoCodecContext", fps: Fraction) -> None:
        """Tell the encoder `context` what it will be given."""
        from av.video.reformatter import ColorPrimaries, ColorRange, ColorTrc, VideoReformatter

        context.color_range, context.colorspace = ColorRange.MPEG, 1  # limited, matrix of BT.709
        context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        self._period, self._frames = 1 / fps, 0
        self._reformatter = VideoReformatter()

    def next(self, pixels: np.ndarray) -> "av.VideoFrame":
        """The next frame, of uint8 `[H, W, 3]`."""
        import av
        from av.video.reformatter import ColorRange, Colorspace, Interpolation

        rgb = av.VideoFrame.from_ndarray(pixels, format="rgb24")
        frame = self._reformatter.reformat(
            rgb,
            format="yuv420p",
            src_color_range=ColorRange.JPEG,
            dst_color_range=ColorRange.MPEG,
            dst_colorspace=Colorspace.ITU709,
            interpolation=Interpolation.BICUBIC
            | Interpolation.ACCURATE_RND
            | Interpolation.FULL_CHR_H_INT,
        )
        frame.pts, frame.time_base = self._frames, self._period
        self._frames += 1
        return frame


class _Encoder:
    """RGB frames into the one stream of an open mp4 file."""

    def __init__(
        self, file: "OutputContainer", size: Sequence[int], fps: Fraction, crf: int
    ) -> None:
        stream = file.add_stream("libx264", rate=fps, options={"crf": str(crf)})
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 0  # as many as there are cores
        self._frames = YuvFrames(stream.codec_context, fps)
        self._file, self._stream = file, stream

    def add(self, pixels: np.ndarray) -> None:
        """Append one frame uint8 `[H, W, 3]`."""
        self._file.mux(self._stream.encode(self._frames.next(pixels)))

    def finish(self) -> None:
        """Write what the encoder still holds, and the index."""
        self._file.mux(self._stream.encode(None))
        self._file.close()


@contextmanager
def _opened_encoder(path: Path, size: Sequence[int], fps: Fraction, crf: int) -> Iterator[_Encoder]:
    """An encoder whose file is whole, or not there, when the block is left."""
    import av

    with written(path) as part, _write_errors(path):
        file = av.open(str(part), "w", format="mp4", options={"movflags": "+faststart"})
        try:
            encoder = _Encoder(file, size, fps, crf)
            yield encoder
            encoder.finish()
        finally:
            with suppress(av.FFmpegError, OSError):
                file.close()


@contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    """What the library says of a file that it cannot write, as one UserError."""
    import av

    try:
        yield
    except (av.FFmpegError, OSError) as error:
        raise cannot_write(path, OSError(error.errno, error.strerror)) from error


def _rate(fps: float | Fraction) -> Fraction:
    """Frames per second as a fraction that time stamps can hold; UserError if it is no rate."""
    rate = Fraction(fps).limit_denominator(10_000) if isfinite(fps) else Fraction(0)
    if rate <= 0:
        raise UserError(f"{fps} frames per second are not possible: give a positive number.")
    return rate


# --- reading ------------------------------------------------------------------------------------


def read_video(
    path: str | Path,
    first: int = 0,
    count: int | None = None,
    *,
    fps: float | Fraction | None = None,
    size: tuple[int, int] | None = None,
) -> torch.Tensor:
    """Frames of a video file, uint8 `[frames, height, width, 3]`.

    Turned and scaled to square pixels as the file says, transparency laid on white.

    Args:
        path: any file that holds a video.
        first: the first frame to return.
        count: how many at most (fewer if the file ends before); None for all.
        fps: the rate that frames are wanted at, by their time stamps (`at_rate`), and that `first`
            and `count` count in; None for the file's own frames.
        size: (height, width) that each frame is fitted to (`fit_frames`) as it is decoded.

    Raises:
        UserError: the file is missing, damaged, or holds no video frame there.
    """
    pixels = bytearray()
    shape: Sequence[int] = ()
    to_rgb = _ToRgb(size)
    for picture in islice(_pictures(path, fps), first, None if count is None else first + count):
        rgb = to_rgb(picture)
        shape = rgb.shape
        pixels += rgb.numpy().data
    if not pixels:
        raise UserError(f"{path} holds no video frame: give another file.")
    return torch.frombuffer(pixels, dtype=torch.uint8).view(-1, *shape)


def read_video_chunks(path: str | Path, frames: int = 64) -> Iterator[torch.Tensor]:
    """A video file in pieces uint8 `[<= frames, height, width, 3]`, one in memory at a time.

    Raises:
        UserError: the file is missing, damaged, or holds no video.
    """
    to_rgb = _ToRgb()
    pictures = _pictures(path)
    while chunk := [to_rgb(picture) for picture in islice(pictures, frames)]:
        yield torch.stack(chunk)


def spread_frames(path: str | Path, count: int) -> torch.Tensor:
    """`count` frames spread evenly over a video file: uint8 `[count, height, width, 3]`.

    The first and the last are always among them (one: the first); a file of fewer frames repeats
    some. Memory does not depend on the length of the video.

    Raises:
        UserError: the file is missing, damaged, or holds no video.
    """
    chosen = np.linspace(0, probe_video(path).frames - 1, count).round().astype(int).tolist()
    to_rgb = _ToRgb()
    kept = {n: to_rgb(p) for n, p in enumerate(_pictures(path)) if n in chosen}
    return torch.stack([kept[n] for n in chosen])


def frame_rate(path: str | Path) -> float:
    """Mean frames per second of a video file; UserError as `probe_video`."""
    return probe_video(path).fps


def probe_video(path: str | Path, fps: float | Fraction | None = None) -> VideoInfo:
    """Number of frames (of its own, or at the rate `fps`), own frame rate and size of a video.

    A file is decoded to its end for it, unless that has been done, for whatever reason, since it
    changed.

    Raises:
        UserError: the file is missing, damaged, or holds no video.
    """
    require_file(path)
    known = _state(path)
    if known not in _measured:
        for _ in _decoded(path):
            pass
    found = _measured[known]
    frames = found.frames
    if fps is not None:
        period = 1 / _rate(fps)
        frames = ceil(_shown_until(found.end, found.last, period) / period)
    return VideoInfo(frames, found.fps, found.height, found.width)


def say_rate(path: str | Path, fps: float | Fraction) -> None:
    """Say in one line if a file's own rate is another than the one that it is read at."""
    own = probe_video(path).fps
    if abs(own / float(fps) - 1) > SAME_RATE:
        logger.info("%s is %.4g FPS: read at %.4g", Path(path).name, own, float(fps))


@dataclass(frozen=True)
class Picture:
    """A decoded frame, when it is shown (seconds from the file's first one), and how."""

    start: Fraction
    length: Fraction
    frame: "av.VideoFrame"
    aspect: Fraction = Fraction(1)  # of a pixel, width : height

    @property
    def square(self) -> tuple[int, int]:
        """(height, width) with square pixels, before it is turned; enlarged, never reduced."""
        height, width = self.frame.height, self.frame.width
        if self.aspect > 1:
            return height, round(width * self.aspect)
        return round(height / self.aspect), width

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) as shown."""
        height, width = self.square
        return (width, height) if _turns(self.frame)[0] else (height, width)


def at_rate(pictures: Iterable[Picture], fps: float | Fraction) -> Iterator[Picture]:
    """What is seen at 0, 1/fps, 2/fps, … seconds; a picture may come several times, or never.

    A picture takes over half its distance to the one before it early, but at most half of 1/fps, so
    that time stamps which waver (milliseconds of webm, the clock of a phone) neither drop nor
    double a frame, and frames of the rate itself come unchanged.
    """
    period = 1 / _rate(fps)
    shown: Picture | None = None
    count = 0
    for picture in pictures:
        if shown is not None:
            until = _shown_until(picture.start, shown.start, period)
            while count * period < until:
                yield shown
                count += 1
        shown = picture
    if shown is not None:
        end = shown.start + shown.length
        while count * period < _shown_until(end, shown.start, period):
            yield shown
            count += 1


def _shown_until(following: Fraction, start: Fraction, period: Fraction) -> Fraction:
    """When a picture that starts at `start` gives way to the one at `following` (or to the end)."""
    return following - min(following - start, period) / 2


@dataclass(frozen=True)
class _Measured:
    """What one decoding of a file found: `last` and `end` of its last frame in seconds."""

    frames: int
    fps: float
    height: int
    width: int
    last: Fraction
    end: Fraction


_measured: LRUCache[tuple[Path, int, int], _Measured] = LRUCache(2**16)  # by `_state`


def _state(path: str | Path) -> tuple[Path, int, int]:
    """What is another when a file has changed."""
    about = Path(path).absolute()
    try:
        state = about.stat()
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.") from error
    return about, state.st_mtime_ns, state.st_size


class _ToRgb:
    """Decoded frames to uint8 `[height, width, 3]`: what is shown, fitted to a size if wanted.

    The same frame again is not converted again.
    """

    def __init__(self, size: tuple[int, int] | None = None) -> None:
        from av.video.reformatter import VideoReformatter

        self._size = size
        self._reformatter = VideoReformatter()
        self._last: tuple[av.VideoFrame, torch.Tensor] | None = None

    def __call__(self, picture: Picture) -> torch.Tensor:
        if self._last is None or self._last[0] is not picture.frame:
            rgb = torch.from_numpy(self._convert(picture))
            if self._size is not None:
                rgb = fit_frames(rgb[None], *self._size)[0]
            self._last = picture.frame, rgb
        return self._last[1]

    def _convert(self, picture: Picture) -> np.ndarray:
        from av.video.reformatter import Colorspace, Interpolation

        frame = picture.frame
        has_alpha = any(part.is_alpha for part in frame.format.components)
        untagged = frame.colorspace == 2 and not frame.format.is_rgb
        is_hd = frame.height > HD_SIZE[0] or frame.width >= HD_SIZE[1]
        height, width = picture.square
        pixels = self._reformatter.reformat(
            frame,
            height=height,
            width=width,
            format="rgba" if has_alpha else "rgb24",
            src_colorspace=Colorspace.ITU709 if untagged and is_hd else None,
            interpolation=Interpolation.BICUBIC,
        ).to_ndarray()
        if has_alpha:
            opacity = pixels[..., 3:].astype(np.float32) / 255
            pixels = (255 + (pixels[..., :3] - 255.0) * opacity).round().astype(np.uint8)
        transposed, flipped_down, flipped_across = _turns(frame)
        pixels = pixels.swapaxes(0, 1) if transposed else pixels
        pixels = pixels[::-1] if flipped_down else pixels
        pixels = pixels[:, ::-1] if flipped_across else pixels
        return np.ascontiguousarray(pixels)


def _turns(frame: "av.VideoFrame") -> tuple[bool, bool, bool]:
    """How a frame is turned to be shown: rows and columns exchanged, then upside down, mirrored."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return False, False, False
    # x' = a x + c y, y' = b x + d y
    a, b, _, c, d = np.frombuffer(cast("bytes", matrix), np.int32)[:5].tolist()
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return False, d < 0, a < 0
    return True, b < 0, c < 0


def _pictures(path: str | Path, fps: float | Fraction | None = None) -> Iterator[Picture]:
    return _decoded(path) if fps is None else at_rate(_decoded(path), fps)


def _decoded(path: str | Path) -> Iterator[Picture]:
    """All frames of a file in the order that they are shown in; at the end it is `_measured`.

    Raises:
        UserError: no readable video, or (at the place, or at the end) one that is not whole.
    """
    import av

    require_file(path)
    try:
        if _promised_bytes(Path(path)) > Path(path).stat().st_size:
            raise _DamagedError("its end is missing")
        known, count, last = _state(path), 0, None
        with av.open(str(known[0]), metadata_errors="replace") as file:
            for last in _timed(_whole_frames(file, _video_stream(file)), _video_stream(file)):
                count += 1
                yield last
        assert last is not None  # `_timed` has seen to it
        end = last.start + last.length
        _measured[known] = _Measured(count, float(count / end), *last.size, last.start, end)
    except _NoVideoError as error:
        raise UserError(f"{path} {error}: give another file.") from error
    except _DamagedError as error:
        raise UserError(f"Cannot read {path} as a video: {error}. Is it complete?") from error
    except (av.FFmpegError, OSError, ValueError) as error:
        reason = str(getattr(error, "strerror", None) or error).lower()
        raise UserError(f"Cannot read {path} as a video: {reason}. Is it complete?") from error


class _NoVideoError(Exception):
    """What a file holds instead of a video."""


class _DamagedError(Exception):
    """What is missing of a video."""


def _video_stream(file: "InputContainer") -> "VideoStream":
    from av.stream import Disposition

    if not len(file.streams):
        raise _DamagedError("nothing is found in it")
    stream = file.streams.best("video")
    if stream is None or stream.disposition & Disposition.attached_pic:
        raise _NoVideoError("holds no video" + (", only sound" if file.streams.audio else ""))
    if stream.codec_context is None:
        raise _NoVideoError("holds a video in a form that cannot be decoded")
    return cast("VideoStream", stream)


def _whole_frames(file: "InputContainer", stream: "VideoStream") -> Iterator["av.VideoFrame"]:
    """Decode a stream; what is missing, or was only guessed by the decoder, is an error.

    Sure signs: a packet that ends early, a decoder that complains, fewer packets than the index of
    an mp4 or mov lists.
    """
    stream.thread_type = "AUTO"
    stream.codec_context.options = {"err_detect": "explode"}
    packets = 0
    size: tuple[int, int] | None = None
    for packet in file.demux(stream):
        packets += packet.size > 0
        if packet.is_corrupt:
            raise _DamagedError("it ends in the middle of a frame")
        for frame in packet.decode():
            if frame.is_corrupt:
                raise _DamagedError("a frame is damaged")
            if size not in (None, (frame.height, frame.width)):
                raise _DamagedError("its frames change their size")
            size = frame.height, frame.width
            yield frame
    if "mov" in file.format.name and packets < len(stream.index_entries):
        raise _DamagedError(f"{packets} of {len(stream.index_entries)} frames are there")


def _promised_bytes(path: Path) -> int:
    """How many bytes the head of a Matroska, WebM or AVI file promises; 0 if it does not say."""
    with path.open("rb") as file:
        head = file.read(4096)
    if head[:4] == b"RIFF":
        size = int.from_bytes(head[4:8], "little")
        return 8 + size if size < UNKNOWN_RIFF else 0
    place = head.find(EBML_SEGMENT) + 4
    if head[:4] != EBML_HEAD or place < 4 or not head[place:]:
        return 0
    length = 9 - head[place].bit_length()  # the leading zeros of a number say how long it is
    size = int.from_bytes(head[place : place + length], "big") & (2 ** (7 * length) - 1)
    return place + length + size if size < 2 ** (7 * length) - 1 else 0


def _timed(frames: Iterable["av.VideoFrame"], stream: "VideoStream") -> Iterator[Picture]:
    """Frames with their times; those without a time stamp of use follow at the stream's rate."""
    rate = stream.guessed_rate or stream.average_rate
    step = 1 / rate if rate else Fraction(1, 25)
    aspect = stream.sample_aspect_ratio or Fraction(1)
    if not PIXEL_ASPECTS[0] <= aspect <= PIXEL_ASPECTS[1]:
        aspect = Fraction(1)
    origin, last = Fraction(0), None
    for frame in frames:
        tick = frame.time_base or Fraction(0)
        start = Fraction(-1) if frame.pts is None else frame.pts * tick - origin
        if last is None:
            origin, start = max(start, Fraction(0)), Fraction(0)
        elif start <= last:
            start = last + step
        length = frame.duration * tick
        if length < step / 2:  # missing, or one tick of the clock
            length = step if last is None else start - last
        last = start
        yield Picture(start, length, frame, aspect)
    if last is None:
        raise _NoVideoError("holds no video frame")
