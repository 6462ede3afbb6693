"""Sample videos during training: fixed prompts, fixed seed, the student as it is."""

import logging
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch.distributed as dist

from pipeline.text_to_video import VideoPipeline
from trainer.sharding import World, agreed
from utils.errors import UserError
from utils.files import written
from utils.prompts import safe_stem
from utils.video import VideoWriter

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
        """`frames`: latent frames of a video. What `look`, before each block, raises ends it."""
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

        Nothing, if there is no prompt left for it, or its file fails: the other ranks need its
        share of every pass all the same.
        """
        number = first + self.world.ranks.rank
        wanted, video = number < len(self.prompts), b""
        prompt = self.prompts[number % len(self.prompts)]
        with (
            TemporaryDirectory() as folder,
            self.pipe.stream(prompt, num_latent_frames=self.frames) as stream,
        ):
            path = Path(folder) / "sample.mp4"
            try:
                with VideoWriter(path, self.pipe.setup.fps) as writer:
                    for block in stream:
                        self.look()
                        if wanted:
                            writer.write(block)
                video = path.read_bytes() if wanted else b""
            except UserError as error:
                logger.warning("no sample video: %s", error)
            for _ in stream:  # what is left of it after a failure
                self.look()
        return number, video

    def _gathered(self, made: tuple[int, bytes]) -> dict[int, bytes]:
        """The videos of all ranks, on the main rank."""
        found: list[tuple[int, bytes]] | None = None
        if self.world.is_main:
            found = [(0, b"")] * self.world.size
        dist.gather_object(made, found, dst=0)
        return {number: video for number, video in found or () if video}
