"""Sample videos during training: fixed prompts, fixed seed, the student as it is."""

import logging
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch.distributed as dist
from torch import Tensor

from pipeline.text_to_video import VideoPipeline
from trainer.sharding import World, agreed
from utils.errors import UserError
from utils.files import written
from utils.prompts import safe_stem
from utils.video import VideoWriter, to_uint8

logger = logging.getLogger(__name__)


class SampleVideos:
    """Writes `logdir/samples/step_000100/<prompt>.mp4`.

    The ranks share out the prompts; each makes equally many, since a sharded network has to be run
    by all of them together. The main rank writes all of them.
    """

    def __init__(
        self,
        pipe: VideoPipeline,
        logdir: Path,
        prompts: list[str],
        frames: int,
        world: World,
        look: Callable[[], None],
    ) -> None:
        """`frames`: latent frames of a video. What `look`, behind each window, raises ends it."""
        self.pipe = pipe
        self.folder = logdir / "samples"
        self.prompts = prompts
        self.frames = frames
        self.world = world
        self.look = look

    def path(self, step: int, number: int) -> Path:
        """Where the video of a prompt goes."""
        name = f"{number:02d} {safe_stem(self.prompts[number], 60)}.mp4"
        return self.folder / f"step_{step:06d}" / name

    def are_there(self, step: int) -> bool:
        """Whether all videos of a step have been written."""
        return all(self.path(step, number).is_file() for number in range(len(self.prompts)))

    def __call__(self, step: int) -> list[tuple[str, Path]]:
        """Make all videos; on the main rank, each prompt with its path.

        One that cannot be written is told, and ends nothing.
        """
        there: list[tuple[str, Path]] = []
        with agreed():
            for first in range(0, len(self.prompts), self.world.size):
                for number, video in self._gathered(self._made(first)).items():
                    path = self.path(step, number)
                    try:
                        with written(path) as part:
                            part.write_bytes(video)
                        there.append((self.prompts[number], path))
                    except UserError as error:
                        logger.warning("no sample video: %s", error)
        return there

    def _made(self, first: int) -> tuple[int, bytes]:
        """The number of this rank's prompt among those from `first` on, and its video file.

        Nothing, if there is no prompt left for it, its latents are not finite, or its file fails:
        the other ranks need its share of every pass all the same, so all of them come first.
        """
        number = first + self.world.ranks.rank
        text = self.pipe.encode_prompts([self.prompts[number % len(self.prompts)]])
        try:
            latents = self.pipe.generate_latents(text, self.frames, look=self.look)
            return number, self._file(latents) if number < len(self.prompts) else b""
        except UserError as error:
            logger.warning("no sample video: %s", error)
            return number, b""

    def _file(self, latents: Tensor) -> bytes:
        """The video file of latents `[1, F, C, h, w]`, decoded block by block, as a stream does."""
        layout, decoder = self.pipe.layout, self.pipe.vae.streaming_decoder()
        with TemporaryDirectory() as folder:
            path = Path(folder) / "sample.mp4"
            with VideoWriter(path, self.pipe.setup.fps) as writer:
                for block in range(layout.blocks_for(latents.shape[1])):
                    part = latents[:, layout.start(block) : layout.start(block + 1)]
                    (frames,) = to_uint8(decoder.decode(part)).cpu()
                    writer.write(frames)
            return path.read_bytes()

    def _gathered(self, made: tuple[int, bytes]) -> dict[int, bytes]:
        """The videos of all ranks, on the main rank."""
        found: list[tuple[int, bytes]] | None = None
        if self.world.is_main:
            found = [(0, b"")] * self.world.size
        dist.gather_object(made, found, dst=0)
        return {number: video for number, video in found or () if video}
