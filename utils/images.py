"""Images and frames: read, fitted, laid out, written.

Frames are uint8 `[frames, height, width, 3]` (RGB) at the edges of the program and float
`[frames, 3, height, width]` in [-1, 1] inside. What is returned is a torch tensor on the CPU; what
is taken may also be a numpy array.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageOps

from utils.errors import UserError
from utils.files import written

Frames = torch.Tensor | np.ndarray

THUMBNAIL_WIDTHS = (128, 256)  # pixels: frames narrower than the first are doubled


def read_image(path: str | Path) -> torch.Tensor:
    """An image file as uint8 `[height, width, 3]`; of an animation the first frame.

    Turned as its EXIF tag says, transparency laid on white, any colour mode made RGB. Grey values
    of more than 8 bits keep their scale: 0 to 65535 of 16 bits; those of 32 bits and of floats are
    taken as 0 to 1 (floats), 0 to 255 or 0 to 65535 (integers), whichever first holds them all,
    and are otherwise stretched so that the smallest is black and the largest white.

    Raises:
        UserError: the file is missing or not a readable image.
    """
    with _opened_image(path) as file:
        image = ImageOps.exif_transpose(file)
        if image.mode == "F" or image.mode.startswith("I"):
            image = Image.fromarray(_grey_levels(np.asarray(image)))
        if image.mode in ("La", "RGBa"):
            image = image.convert(image.mode.upper())
        if image.has_transparency_data:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
        return torch.from_numpy(np.array(image.convert("RGB")))


def check_image(path: str | Path) -> None:
    """Raise UserError unless the file is an image, as far as can be told without decoding it."""
    with _opened_image(path) as file:
        file.verify()


@contextmanager
def _opened_image(path: str | Path) -> Iterator[Image.Image]:
    require_file(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # large, but possible
            with Image.open(path) as file:
                yield file
    except Image.DecompressionBombError as error:
        raise UserError(f"{path} has too many pixels for an image: make it smaller.") from error
    except Exception as error:  # a damaged file can raise anything in Pillow's readers
        raise UserError(f"Cannot read {path} as an image: give a PNG, JPEG or WebP.") from error


def _grey_levels(values: np.ndarray) -> NDArray[np.uint8]:
    """Grey values of 16 or 32 bits, or floats, as 0 to 255; see `read_image` for the scale."""
    if values.dtype.itemsize == 2:
        return (values >> 8).astype(np.uint8)
    low, high = float(values.min()), float(values.max())
    if not np.isfinite([low, high]).all():
        raise ValueError("values that are not finite")
    if values.dtype.kind == "f" and low >= 0 and high <= 1:
        levels = values * 255.0
    elif low >= 0 and high <= 255:
        levels = values.astype(np.float64)
    elif values.dtype.kind != "f" and low >= 0 and high <= 65535:
        return (values >> 8).astype(np.uint8)
    else:
        levels = (values.astype(np.float64) - low) * (255 / (high - low) if high > low else 0)
    return levels.round().astype(np.uint8)


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
    rows = [as_numpy(video) for video in videos]
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
    """Write uint8 `[H, W, 3]` as PNG, under a temporary name until it is complete.

    Raises:
        UserError: the file cannot be written.
    """
    with written(path) as part:
        Image.fromarray(as_numpy(image)).save(part, format="PNG")


def as_numpy(frames: Frames) -> np.ndarray:
    """Frames as a numpy array on the CPU."""
    return frames.detach().cpu().numpy() if isinstance(frames, torch.Tensor) else frames


def require_file(path: str | Path) -> None:
    """UserError unless there is a file at `path`."""
    try:
        if Path(path).is_file():
            return
        what = "is a folder" if Path(path).is_dir() else "does not exist"
    except (OSError, ValueError) as error:  # a name too long, a folder closed to us, a zero byte
        raise UserError(f"{path} cannot be read: {error}") from error
    raise UserError(f"{path} {what}: give a file.")
