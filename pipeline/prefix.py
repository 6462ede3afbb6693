"""Prefixes: an image or a video that a generated video continues."""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pipeline.schedule import BlockLayout
from utils.errors import UserError
from utils.video import fit_frames, probe_video, read_image, read_video, say_rate
from wan.geometry import VideoShape
from wan.vae import WanVAE

logger = logging.getLogger(__name__)

Frames = Tensor | str | Path


@dataclass(frozen=True)
class Prefix:
    """Clean latents that a video starts with: `[1, F, C, h, w]`, a whole number of blocks."""

    latents: Tensor

    def blocks(self, layout: BlockLayout) -> list[Tensor]:
        """One tensor per block."""
        return by_block(self.latents, layout)


def by_block(latents: Tensor, layout: BlockLayout) -> list[Tensor]:
    """Latents `[B, F, C, h, w]` of whole blocks, one tensor per block."""
    count = layout.blocks_for(latents.shape[1])
    return list(latents.split([layout.frames(block) for block in range(count)], dim=1))


def prefix_frames(blocks: int, layout: BlockLayout, shape: VideoShape) -> int:
    """Video frames that exactly fill the first `blocks` blocks."""
    return shape.video_frames(layout.start(blocks))


def image_clip(image: Frames, layout: BlockLayout, shape: VideoShape) -> Tensor:
    """An image as a still clip of one block: uint8 `[n, H, W, 3]`.

    One frame if the model's first frame is a block of its own.
    """
    pixels = read_image(image) if isinstance(image, str | Path) else image
    pixels = _pixels(pixels[0] if pixels.ndim == 4 else pixels, 3)
    still = fit_frames(pixels[None], shape.height, shape.width)
    return still.expand(prefix_frames(1, layout, shape), -1, -1, -1)


def video_clip(video: Frames, layout: BlockLayout, shape: VideoShape, fps: float) -> Tensor:
    """The last frames of a video that fill whole blocks: uint8 `[n, H, W, 3]`.

    A file is read at `fps` by its time stamps, and what is kept of it is held at the model's size
    only; frames are taken to be of that rate. Another rate, and what is cut off in front, is said
    in one line; UserError if not even one block is filled.
    """
    size = shape.height, shape.width
    if not isinstance(video, str | Path):
        kept = _whole_blocks_of(len(_pixels(video, 4)), layout, shape)
        return fit_frames(video[-kept:], *size)
    say_rate(video, fps)
    count = probe_video(video, fps).frames
    kept = _whole_blocks_of(count, layout, shape)
    return read_video(video, count - kept, kept, fps=fps, size=size)


def _whole_blocks_of(count: int, layout: BlockLayout, shape: VideoShape) -> int:
    """How many of `count` frames fill whole blocks; said in one line if it is not all."""
    kept = prefix_frames(whole_blocks(count, layout, shape), layout, shape)
    if kept < count:
        logger.info("continuing the last %d of %d frames (whole blocks)", kept, count)
    return kept


def whole_blocks(frames: int, layout: BlockLayout, shape: VideoShape) -> int:
    """Blocks that `frames` video frames fill; UserError if it is not even one."""
    blocks = 0
    while prefix_frames(blocks + 1, layout, shape) <= frames:
        blocks += 1
    if blocks == 0:
        raise UserError(
            f"the video to continue has {frames} frames; at least "
            f"{prefix_frames(1, layout, shape)} are needed"
        )
    return blocks


def _pixels(frames: Tensor, axes: int) -> Tensor:
    """`frames` if they are pixels, uint8 `[(n,) H, W, 3]`."""
    if frames.dtype != torch.uint8 or frames.ndim != axes or frames.shape[-1] != 3:
        wanted = "[n, H, W, 3]" if axes == 4 else "[H, W, 3]"
        raise UserError(f"give frames as uint8 {wanted}, not {frames.dtype} {list(frames.shape)}")
    return frames


def encode_prefix(clip: Tensor, vae: WanVAE) -> Prefix:
    """Latents of a clip uint8 `[n, H, W, 3]`, float32."""
    with torch.no_grad():
        return Prefix(vae.encode(clip.permute(0, 3, 1, 2)[None]).float())
