"""Sample videos during training: fixed prompts, fixed seed, the student as it is."""

from pathlib import Path

from pipeline.text_to_video import VideoPipeline
from trainer.tasks import Task
from utils.prompts import safe_stem
from utils.video import VideoWriter


class SampleVideos:
    """Writes `logdir/samples/step_000100/<prompt>.mp4`.

    The ranks share out the prompts; each makes equally many, since a sharded network has to be run
    by all of them together.
    """

    def __init__(self, task: Task, logdir: Path, prompts: list[str]) -> None:
        self.task = task
        self.folder = logdir / "samples"
        self.prompts = prompts

    def __call__(self, step: int) -> dict[str, Path]:
        """Make the videos of this rank: `{name: path}`."""
        task, ranks = self.task, self.task.world.ranks
        pipe = VideoPipeline(
            task.config, task.generator, files=task.files, vae=task.vae, text=task.text
        )
        made = {}
        for turn in range(-(-len(self.prompts) // ranks.world)):
            number = turn * ranks.world + ranks.rank
            prompt = self.prompts[number % len(self.prompts)]
            name = f"{number:02d} {safe_stem(prompt, 60)}"
            path = self.folder / f"step_{step:06d}" / f"{name}.mp4"
            frames = task.config.sample_latent_frames
            with (
                pipe.stream(prompt, task.config.seed, frames) as stream,
                VideoWriter(path, task.config.fps) as writer,
            ):
                for block in stream:
                    if number < len(self.prompts):
                        writer.write(block)
            if number < len(self.prompts):
                made[name] = path
        task.vae = pipe.vae
        return made
