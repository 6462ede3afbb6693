"""What people hand to the Python API: taken where it is certain what is meant, else refused.

Every refusal is a UserError in one sentence that names the argument, before any work.
"""

import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from utils.errors import UserError
from utils.prompts import check_text
from wan.dit import DiTConfig

LARGEST_SEED = 2**64 - 1


def whole_number(value: Any, name: str, *, least: int = 0, most: int | None = None) -> int:
    """An int, also from numpy or a tensor of one; no float and no bool."""
    bounds = f"from {least} on" if most is None else f"from {least} to {most}"
    try:
        is_flag = isinstance(value, bool) or getattr(value, "dtype", None) == torch.bool
        number = None if is_flag else operator.index(value)
    except (TypeError, RuntimeError, ValueError):
        number = None
    if number is None or number < least or (most is not None and number > most):
        raise UserError(f"{name} must be a whole number {bounds}, not {_said(value)}")
    return number


def seed_of(seed: Any, default: int) -> int:
    """A seed, `default` for None."""
    return whole_number(default if seed is None else seed, "seed", most=LARGEST_SEED)


def texts(prompts: Any) -> list[str]:
    """A list of texts: a list, a tuple, or a numpy array of them."""
    if isinstance(prompts, str):
        raise UserError(f"prompts must be a list of texts: write ['{prompts[:20]}…']")
    if isinstance(prompts, np.ndarray):
        prompts = prompts.tolist()
    if not isinstance(prompts, list | tuple):
        raise UserError(f"prompts must be a list of texts, not {_said(prompts)}")
    if not prompts:
        raise UserError("there is no prompt to encode")
    return [text_of(prompt) for prompt in prompts]


def text_of(prompt: Any) -> str:
    """One text."""
    if not isinstance(prompt, str):
        raise UserError(f"a prompt must be a text, not {_said(prompt)}")
    check_text(prompt)
    return prompt


def embeddings(
    value: Any, sizes: DiTConfig, name: str = "text_embeddings", *, meta: bool = False
) -> Tensor:
    """Text embeddings `[B, L, text_dim]`, L <= text_len, of finite floats.

    `meta`: the network has no values either.
    """
    tensor, text_dim, text_len = tensor_of(value, name, meta=meta), sizes.text_dim, sizes.text_len
    shape = list(tensor.shape)
    if tensor.ndim != 3 or 0 in shape or shape[2] != text_dim or shape[1] > text_len:
        wanted = f"[B, L, {text_dim}] with B and L from 1 on and L up to {text_len}"
        raise UserError(f"{name} must be {wanted}, not {shape}")
    return tensor


def tensor_of(value: Any, name: str, *, meta: bool = False) -> Tensor:
    """A tensor of finite floats, also from numpy; one without values where `meta` allows it."""
    tensor = torch.from_numpy(value) if isinstance(value, np.ndarray) and _numeric(value) else value
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.is_sparse:
        raise UserError(f"{name} must be a tensor of floats, not {_said(value)}")
    if tensor.is_meta and meta:
        return tensor
    if tensor.is_meta:
        raise UserError(f"{name} is on the meta device, where tensors have no values")
    if not bool(tensor.float().isfinite().all()):  # float: of 8 bits, too
        raise UserError(f"{name} holds values that are no finite numbers")
    return tensor


def recorded_noise(
    noise: Sequence[Any],
    *,
    batch: int,
    latent: tuple[int, int, int],
    levels: int,
    blocks: int,
    block_frames: int,
) -> tuple[Tensor, Tensor]:
    """Noise given as (initial `[B, F, C, h, w]`, renoise `[blocks, levels, B, f, C, h, w]`).

    At least so many `blocks` are needed between levels, and `block_frames` of each.
    """
    if len(noise) != 2:
        raise UserError(f"noise must be a pair (initial, renoise), not {len(noise)} tensors")
    initial, renoise = (tensor_of(part, "noise") for part in noise)
    wanted = f"[{batch}, F, {', '.join(map(str, latent))}]"
    if initial.ndim != 5 or initial.shape[0] != batch or tuple(initial.shape[2:]) != latent:
        raise UserError(f"the initial noise must be {wanted}, not {list(initial.shape)}")
    ok = renoise.ndim == 7 and renoise.shape[2] == batch and tuple(renoise.shape[4:]) == latent
    enough = (blocks if levels else 0, levels, batch, block_frames)
    if not ok or any(has < least for has, least in zip(renoise.shape, enough, strict=False)):
        size = ", ".join(map(str, latent))
        raise UserError(
            f"the noise between levels must be [{blocks}, {levels}, {batch}, {block_frames}, "
            f"{size}] or longer, not {list(renoise.shape)}"
        )
    return initial, renoise


def sample_numbers(samples: Any, batch: int) -> list[int]:
    """The index of each row's video among those of its prompt; None: 0 for all."""
    if samples is None:
        return [0] * batch
    if isinstance(samples, np.ndarray | Tensor):
        samples = samples.tolist()
    if not isinstance(samples, list | tuple | range) or len(samples) != batch:
        raise UserError(f"samples must be {batch} whole numbers, not {_said(samples)}")
    return [whole_number(sample, "sample") for sample in samples]


def image_of(value: Any) -> Tensor | str | Path:
    """A picture to continue: a path, a PIL image, or uint8 `[H, W, 3]` (or `[1, H, W, 3]`)."""
    if isinstance(value, str | Path):
        return value
    pixels = _pixels(value, "image")
    if isinstance(pixels, Tensor) and pixels.ndim == 4 and len(pixels) == 1:
        pixels = pixels[0]
    return _checked(pixels, 3, "image")


def video_of(value: Any) -> Tensor | str | Path:
    """A video to continue: a path, uint8 `[n, H, W, 3]`, or a list of frames, PIL or arrays."""
    if isinstance(value, str | Path):
        return value
    if isinstance(value, list | tuple):
        if not value:
            raise UserError("the video has no frame; give at least one block of frames")
        frames = [_checked(_pixels(frame, "frame"), 3, "frame") for frame in value]
        if len({frame.shape for frame in frames}) > 1:
            raise UserError("the frames of the video are not of one size; give them in one size")
        return torch.stack(frames)
    return _checked(_pixels(value, "video"), 4, "video")


def check_prefix(image: Any, video: Any, prefix_frames: Any = "reconstructed") -> None:
    """UserError for both, or another way to hand out what is continued than there is."""
    if image is not None and video is not None:
        raise UserError("give an image or a video to continue, not both")
    if not isinstance(prefix_frames, str) or prefix_frames not in ("reconstructed", "none"):
        raise UserError(f'prefix_frames must be "reconstructed" or "none", not {prefix_frames!r}')


def _pixels(value: Any, name: str) -> Any:
    if isinstance(value, Image.Image):
        value = ImageOps.exif_transpose(value)  # upright, as one that is read from its file
        if value.has_transparency_data:
            white = Image.new("RGBA", value.size, "white")
            value = Image.alpha_composite(white, value.convert("RGBA"))
        elif value.mode not in ("RGB", "L", "P", "1", "CMYK", "YCbCr", "LAB", "HSV"):
            raise UserError(f"the {name} has the colour mode {value.mode}; convert it to RGB")
        return torch.from_numpy(np.array(value.convert("RGB")))
    if isinstance(value, np.ndarray) and value.dtype == np.uint8:
        return torch.from_numpy(np.ascontiguousarray(value))
    return value


def _checked(pixels: Any, axes: int, name: str) -> Tensor:
    wanted = "[n, H, W, 3]" if axes == 4 else "[H, W, 3]"
    good = isinstance(pixels, Tensor) and pixels.dtype == torch.uint8 and pixels.ndim == axes
    if not good or pixels.shape[-1] != 3 or 0 in pixels.shape:
        raise UserError(f"give the {name} as a path, PIL or uint8 {wanted}, not {_said(pixels)}")
    return pixels.cpu()


def _numeric(value: np.ndarray) -> bool:
    return value.dtype in (np.float16, np.float32, np.float64)


def _said(value: Any) -> str:
    """A value in a message: numbers and texts as they are, arrays by dtype and shape."""
    if isinstance(value, Tensor | np.ndarray):
        return f"{value.dtype} {list(value.shape)}"
    return repr(value) if isinstance(value, int | float | None) else type(value).__name__
