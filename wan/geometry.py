"""Pixels -> latents -> tokens: the one owner of a video's geometry."""

from dataclasses import dataclass
from typing import NamedTuple

from utils.errors import UserError


class Strides(NamedTuple):
    """Pixels per latent pixel along height and width; video frames per latent frame."""

    space: int
    time: int

    def video_frames(self, latent_frames: int) -> int:
        """Video frames of the first `latent_frames` latent frames of a video (0 for none)."""
        return 1 + self.time * (latent_frames - 1) if latent_frames else 0


WAN_STRIDES = Strides(space=8, time=4)
"""Of Wan2.1's own VAE, for where there are no weights to read them from."""


@dataclass(frozen=True)
class VideoShape:
    """Size of one video frame in pixels, latents and tokens.

    The first latent frame of a video is one video frame, every later one is `strides.time`.
    """

    height: int
    width: int
    channels: int = 16
    strides: Strides = WAN_STRIDES
    patch_size: tuple[int, int, int] = (1, 2, 2)

    def __post_init__(self) -> None:
        multiple_h = self.strides.space * self.patch_size[1]
        multiple_w = self.strides.space * self.patch_size[2]
        if self.height < 1 or self.width < 1 or self.height % multiple_h or self.width % multiple_w:
            raise UserError(
                f"resolution {self.width}x{self.height} is not possible: the width must be a "
                f"multiple of {multiple_w} and the height of {multiple_h}"
            )

    @property
    def latent(self) -> tuple[int, int, int]:
        """One latent frame: `(channels, height, width)`."""
        return self.channels, self.height // self.strides.space, self.width // self.strides.space

    @property
    def grid(self) -> tuple[int, int]:
        """Tokens of one latent frame: `(rows, columns)`."""
        _, rows, columns = self.latent
        return rows // self.patch_size[1], columns // self.patch_size[2]

    @property
    def tokens_per_frame(self) -> int:
        """Tokens of one latent frame."""
        rows, columns = self.grid
        return rows * columns

    def video_frames(self, latent_frames: int) -> int:
        """Video frames of the first `latent_frames` latent frames of a video (0 for none)."""
        return self.strides.video_frames(latent_frames)

    def latent_frames(self, video_frames: int) -> int:
        """Latent frames needed to hold `video_frames` video frames."""
        return 1 + -(-(video_frames - 1) // self.strides.time) if video_frames else 0
