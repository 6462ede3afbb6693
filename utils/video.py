"""Video and images where they enter and leave the program.

At the edges a video is uint8 `[frames, height, width, 3]` (RGB), inside it is float
`[frames, 3, height, width]` in [-1, 1]. What is returned is a torch tensor on the CPU; what is
taken may also be a numpy array.
"""

import hashlib
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from utils.errors import UserError
from utils.files import written
from utils.prompts import clip_utf8

Frames = torch.Tensor | np.ndarray

MAX_NAME_BYTES = 255  # of one file name, on every common file system
THUMBNAIL_WIDTHS = (128, 256)  # pixels: frames narrower than the first are doubled


@dataclass(frozen=True)
class VideoInfo:
    """What a video file holds: number of frames, frames per second, size in pixels."""

    frames: int
    fps: float
    height: int
    width: int


class VideoWriter:
    """Write an H.264 mp4 (yuv420p, BT.709) block by block, in constant memory.

    Use as a context manager. The file grows under a temporary name (`<stem>.part.mp4`, same
    folder) and takes its own name when the block is left normally; after an exception, or if no
    frame was written, nothing is left behind. An existing file is replaced at the end only.

    An odd height or width is padded by one row or column (the edge is repeated), since yuv420p
    needs even sizes: the file is then one pixel larger than the frames.

    Args:
        path: the file to make, ending in .mp4; missing folders are created.
        fps: frames per second.
        crf: quality, 0 (lossless luma and chroma, large) to 51 (worst).

    Raises:
        UserError: another file type, or the file cannot be written.
    """

    def __init__(self, path: str | Path, fps: float = 16, crf: int = 18) -> None:
        self.path = Path(path).absolute()
        self.fps = fps
        self.crf = crf
        self.frames_written = 0
        self._part = part_path(self.path)
        self._size: tuple[int, int] | None = None
        self._ffmpeg: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None
        if self.path.suffix.lower() != ".mp4":
            raise UserError(f"Videos are written as .mp4: rename the output {self.path}.")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()

    def write(self, frames: Frames) -> None:
        """Append frames: uint8 `[frames, height, width, 3]`, all blocks of one size.

        Raises:
            ValueError: another type, shape, or size than the first block.
            UserError: the file cannot be written (no space, no permission).
        """
        pixels = _as_numpy(frames)
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3:
            raise ValueError(f"need uint8 [F, H, W, 3], got {pixels.dtype} {list(pixels.shape)}")
        size = pixels.shape[1], pixels.shape[2]
        if self._size not in (None, size):
            raise ValueError(f"frames of {size} after frames of {self._size}")
        if len(pixels) == 0:
            return
        height, width = size
        pixels = np.pad(pixels, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        if self._ffmpeg is None:
            self._start(*pixels.shape[1:3])
        self._size = size
        assert self._ffmpeg is not None
        assert self._ffmpeg.stdin is not None
        try:
            self._ffmpeg.stdin.write(np.ascontiguousarray(pixels).data)
        except OSError as error:
            raise self._failure() from error
        self.frames_written += len(pixels)

    def close(self) -> None:
        """Finish the file and give it its name; raises UserError if that fails."""
        if self._ffmpeg is None:
            return
        with suppress(BrokenPipeError):
            assert self._ffmpeg.stdin is not None
            self._ffmpeg.stdin.close()
        if self._ffmpeg.wait() != 0:
            raise self._failure()
        self._release()
        self._part.replace(self.path)

    def discard(self) -> None:
        """Stop and remove what was written."""
        if self._ffmpeg is not None:
            self._ffmpeg.kill()
            self._ffmpeg.wait()
            with suppress(BrokenPipeError):
                assert self._ffmpeg.stdin is not None
                self._ffmpeg.stdin.close()
        self._release()
        with suppress(OSError):  # no such file, or no such folder
            self._part.unlink()

    def _start(self, height: int, width: int) -> None:
        from imageio_ffmpeg import get_ffmpeg_exe

        source = f"-f rawvideo -pix_fmt rgb24 -s {width}x{height} -r {self.fps} -i -"
        colour = (
            "-vf scale=out_color_matrix=bt709:out_range=tv:flags=accurate_rnd+full_chroma_int,"
            "setparams=colorspace=bt709:color_primaries=bt709:color_trc=bt709:range=tv"
        )
        codec = f"-an -c:v libx264 -crf {self.crf} -pix_fmt yuv420p -movflags +faststart -f mp4"
        options = f"-y -loglevel error {source} {colour} {codec}".split()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._part.touch()
        except OSError as error:
            raise UserError(f"Cannot write {self.path}: {error.strerror}.") from error
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed by _release)
        self._ffmpeg = subprocess.Popen(
            [get_ffmpeg_exe(), *options, str(self._part)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self._log,
            start_new_session=True,  # Ctrl-C is ours to handle
        )

    def _failure(self) -> UserError:
        """Remove what was written and say why ffmpeg gave up."""
        assert self._log is not None
        assert self._ffmpeg is not None
        self._ffmpeg.wait()
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        self.discard()
        reason = lines[-1] if lines else "ffmpeg stopped"
        return UserError(f"Cannot write {self.path}: {reason}.")

    def _release(self) -> None:
        self._ffmpeg = None
        if self._log is not None:
            self._log.close()


def part_path(path: Path) -> Path:
    """The temporary name of a file being written: `<stem>.part<suffix>` in the same folder.

    A stem too long for the file system is cut (at a character) and told apart by a hash.
    """
    tail = f".part{path.suffix}"
    stem = path.stem
    room = MAX_NAME_BYTES - len(os.fsencode(tail))
    if len(os.fsencode(stem)) > room:
        digest = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:8]
        stem = f"{clip_utf8(stem, room - 9)}-{digest}"
    return path.with_name(stem + tail)


def read_video(path: str | Path, first: int = 0, count: int | None = None) -> torch.Tensor:
    """Frames of a video file, uint8 `[frames, height, width, 3]`, at its own frame rate.

    All of them, or `count` from frame `first` on (fewer if the file ends before).

    Raises:
        UserError: the file is missing or holds no readable video there.
    """
    pixels = bytearray()
    with _open_video(path) as (meta, frames):
        for frame in islice(frames, first, None if count is None else first + count):
            pixels += frame
    width, height = meta["size"]
    if not pixels:
        raise UserError(f"{path} holds no video frame: give another file.")
    return torch.frombuffer(pixels, dtype=torch.uint8).view(-1, height, width, 3)


def read_video_chunks(path: str | Path, frames: int = 64) -> Iterator[torch.Tensor]:
    """A video file in pieces uint8 `[<= frames, height, width, 3]`, one in memory at a time.

    Raises:
        UserError: the file is missing or holds no readable video.
    """
    with _open_video(path) as (meta, source):
        width, height = meta["size"]
        while chunk := list(islice(source, frames)):
            pixels = bytearray(b"".join(chunk))
            yield torch.frombuffer(pixels, dtype=torch.uint8).view(-1, height, width, 3)


def spread_frames(path: str | Path, count: int) -> torch.Tensor:
    """`count` frames spread evenly over a video file: uint8 `[count, height, width, 3]`.

    The first and the last are always among them (one: the first); a file of fewer frames repeats
    some. Memory does not depend on the length of the video.

    Raises:
        UserError: the file is missing or holds no readable video.
    """
    chosen = np.linspace(0, probe_video(path).frames - 1, count).round().astype(int)
    kept: list[torch.Tensor] = []
    start = 0
    for chunk in read_video_chunks(path):
        inside = chosen[(chosen >= start) & (chosen < start + len(chunk))]
        kept.append(chunk[torch.from_numpy(inside - start)])
        start += len(chunk)
    return torch.cat(kept)


def frame_rate(path: str | Path) -> float:
    """Frames per second of a video file; UserError if it is missing or not readable."""
    with _open_video(path) as (meta, _):
        return float(meta["fps"])


def probe_video(path: str | Path) -> VideoInfo:
    """Number of frames, frame rate and size of a video file (decoded once, without keeping it).

    Raises:
        UserError: the file is missing or holds no readable video.
    """
    from imageio_ffmpeg import count_frames_and_secs

    with _open_video(path) as (meta, _):
        width, height = meta["size"]
        frames, _seconds = count_frames_and_secs(Path(path).absolute())
    return VideoInfo(frames=frames, fps=float(meta["fps"]), height=height, width=width)


@contextmanager
def _open_video(path: str | Path) -> Iterator[tuple[dict, Iterator[bytes]]]:
    from imageio_ffmpeg import read_frames

    _require_file(path)
    frames = read_frames(Path(path).absolute())
    try:
        yield next(frames), frames
    except (OSError, RuntimeError, KeyError, IndexError, ValueError, StopIteration) as error:
        raise UserError(f"Cannot read {path} as a video: is it complete?") from error
    finally:
        frames.close()


def read_image(path: str | Path) -> torch.Tensor:
    """An image file as uint8 `[height, width, 3]`.

    Turned as its EXIF tag says, transparency laid on white, any colour mode made RGB.

    Raises:
        UserError: the file is missing or not a readable image.
    """
    _require_file(path)
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith("I;16"):
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image)
            return torch.from_numpy(np.array(image.convert("RGB")))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"Cannot read {path} as an image: give a PNG, JPEG or WebP.") from error


def check_image(path: str | Path) -> None:
    """Raise UserError unless the file is an image, as far as can be told without decoding it."""
    _require_file(path)
    try:
        with Image.open(path) as file:
            file.verify()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"Cannot read {path} as an image: give a PNG, JPEG or WebP.") from error


def fit_frames(frames: Frames, height: int, width: int) -> torch.Tensor:
    """Resize (antialiased, aspect kept) until the frame is covered, then crop the centre.

    uint8 `[frames, H, W, 3]` -> uint8 `[frames, height, width, 3]`.
    """
    video = torch.as_tensor(frames)
    old_height, old_width = video.shape[1:3]
    if (old_height, old_width) == (height, width):
        return video
    scale = max(height / old_height, width / old_width)
    size = max(height, round(old_height * scale)), max(width, round(old_width * scale))
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    fitted = torch.empty(len(video), height, width, 3, dtype=torch.uint8)
    for out, frame in zip(fitted, video, strict=True):  # one at a time: floats are large
        planes = frame.permute(2, 0, 1)[None].float()  # [1, 3, H, W]
        planes = F.interpolate(planes, size, mode="bicubic", antialias=True)
        crop = planes[0, :, top : top + height, left : left + width]
        out.copy_(crop.round().clamp(0, 255).permute(1, 2, 0))
    return fitted


def thumbnails(frames: Frames) -> torch.Tensor:
    """uint8 `[frames, H, W, 3]` at a size to look at: small frames doubled, large ones reduced.

    Doubling repeats pixels; frames wider than 256 pixels become 256 wide, with their aspect.
    """
    video = torch.as_tensor(frames)
    height, width = video.shape[1:3]
    small, large = THUMBNAIL_WIDTHS
    if width < small:
        return video.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
    if width > large:
        return fit_frames(video, round(height * large / width), large)
    return video


def to_float(frames: Frames) -> torch.Tensor:
    """uint8 `[frames, H, W, 3]` -> float32 `[frames, 3, H, W]` in [-1, 1]."""
    return torch.as_tensor(frames).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_uint8(video: torch.Tensor) -> torch.Tensor:
    """Float `[..., frames, 3, H, W]` in [-1, 1] -> uint8 `[..., frames, H, W, 3]`, same device.

    Rounded to the nearest level; values outside [-1, 1] are clamped.
    """
    levels = ((video.float() + 1) * 127.5).round().clamp(0, 255)
    return levels.to(torch.uint8).movedim(-3, -1)


def contact_sheet(videos: Frames | Sequence[Frames], columns: int = 8, gap: int = 2) -> np.ndarray:
    """One image of several videos: a row for each, `columns` frames spread evenly over it.

    The first and the last frame are always shown (one column: the first). A lone
    `[frames, H, W, 3]` is one video. All are uint8 and of one size.

    Returns:
        uint8 `[rows * (H + gap) - gap, columns * (W + gap) - gap, 3]`, the gaps white.
    """
    if isinstance(videos, torch.Tensor | np.ndarray) and videos.ndim == 4:
        videos = [videos]
    rows = [_as_numpy(video) for video in videos]
    height, width = rows[0].shape[1:3]
    shape = len(rows) * (height + gap) - gap, columns * (width + gap) - gap, 3
    sheet = np.full(shape, 255, dtype=np.uint8)
    for row, video in enumerate(rows):
        chosen = np.linspace(0, len(video) - 1, columns).round().astype(int)
        for column, index in enumerate(chosen):
            top, left = row * (height + gap), column * (width + gap)
            sheet[top : top + height, left : left + width] = video[index]
    return sheet


def write_png(path: str | Path, image: Frames) -> None:
    """Write uint8 `[H, W, 3]` as PNG, whole or not at all.

    Raises:
        UserError: the file cannot be written.
    """
    with written(path) as part:
        Image.fromarray(_as_numpy(image)).save(part, format="PNG")


def _as_numpy(frames: Frames) -> np.ndarray:
    return frames.detach().cpu().numpy() if isinstance(frames, torch.Tensor) else frames


def _require_file(path: str | Path) -> None:
    if not Path(path).is_file():
        what = "is a folder" if Path(path).is_dir() else "does not exist"
        raise UserError(f"{path} {what}: give a file.")
