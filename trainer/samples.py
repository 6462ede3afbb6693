"""Sample videos during training: fixed prompts, fixed seed, the student as it is."""

from pathlib import Path

from pipeline.text_to_video import VideoPipeline
from utils.distributed import Ranks
from utils.errors import UserError
from utils.prompts import safe_stem
from utils.video import VideoWriter


class SampleVideos:
    """Writes `logdir/samples/step_000100/<prompt>.mp4`.

    The ranks share out the prompts; each makes equally many, since a sharded network has to be run
    by all of them together.
    """

    def __init__(
        self, pipe: VideoPipeline, logdir: Path, prompts: list[str], frames: int, ranks: Ranks
    ) -> None:
        """`frames`: latent frames of a video."""
        self.pipe = pipe
        self.folder = logdir / "samples"
        self.prompts = prompts
        self.frames = frames
        self.ranks = ranks

    def __call__(self, step: int) -> dict[str, Path]:
        """Make the videos of this rank: `{name: path}`.

        Raises:
            UserError: a video cannot be written. It comes at the end: until then the other ranks
                need this one's share of every pass.
        """
        made: dict[str, Path] = {}
        failure: UserError | None = None
        for first in range(0, len(self.prompts), self.ranks.world):
            number = first + self.ranks.rank
            wanted = number < len(self.prompts)
            prompt = self.prompts[number % len(self.prompts)]
            name = f"{number:02d} {safe_stem(prompt, 60)}"
            path = self.folder / f"step_{step:06d}" / f"{name}.mp4"
            with self.pipe.stream(prompt, num_latent_frames=self.frames) as stream:
                try:
                    with VideoWriter(path, self.pipe.setup.fps) as writer:
                        for block in stream:
                            if wanted:
                                writer.write(block)
                except UserError as error:
                    failure = failure or error
                for _ in stream:  # what is left of it after a failure
                    pass
            if wanted:
                made[name] = path
        if failure is not None:
            raise failure
        return made
