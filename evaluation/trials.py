"""Videos made to be measured: prompts and seeds through the stream, judged block by block."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from evaluation.meters import Judge, Meter, Result
from pipeline.batch import BatchRun, Job, Outputs
from pipeline.records import Record
from pipeline.setup import Setup
from utils.distributed import ALONE, Ranks
from utils.files import MAX_NAME_BYTES
from utils.prompts import clip_utf8


@dataclass(frozen=True)
class Trial:
    """One video to make and measure: number `index` of its prompt's, with the noise of `seed`.

    It is the video that inference gives for this prompt and seed.
    """

    prompt: str
    seed: int
    index: int

    @property
    def key(self) -> str:
        """What tells it from all other trials of the same settings."""
        return f"{self.seed}: {self.prompt}"


def list_trials(prompts: Sequence[str], seeds: int, first_seed: int) -> list[Trial]:
    """Every prompt with seeds `first_seed`, `first_seed + 1`, ...; all prompts of a seed first."""
    different = list(dict.fromkeys(prompts))
    return [Trial(p, first_seed + index, index) for index in range(seeds) for p in different]


class Evaluation:
    """Makes and measures trials, one at a time, in the memory of one block."""

    def __init__(
        self,
        setup: Setup,
        checkpoint: str | Path | None,
        *,
        use_ema: bool,
        seconds: float,
        export: Outputs | None = None,
        ranks: Ranks = ALONE,
        truth: Meter | None = None,
    ) -> None:
        """`export`: where the videos are kept, too, as `{prompt}-{index}.mp4`; `truth`: see
        `Judge`.
        """
        outputs = replace(export or Outputs(None), duration=seconds, keep_config=False)
        self.truth = truth
        self.run = BatchRun(setup, checkpoint, outputs, use_ema=use_ema, ranks=ranks)
        self.shape = self.run.shape
        self.video_frames = self.run.video_frames
        self.first, self.block = map(self.run.setup.block_video_frames, (0, 1))

    @property
    def settings(self) -> dict[str, Any]:
        """What the result of a trial depends on, besides the trial itself."""
        return {**self.run.model_settings, "video_frames": self.video_frames}

    def job(self, trial: Trial) -> Job:
        """The trial as a video to make."""
        name = vbench_name(trial.prompt, trial.index)
        return Job(trial.prompt, trial.seed, sample=0, number=trial.index, name=name)

    def is_there(self, trial: Trial) -> bool:
        """Whether the video that is to be kept of a trial is there, of these very settings."""
        return self.run.is_done(self.job(trial))

    def __call__(
        self,
        trials: Sequence[Trial],
        keep: Callable[[Trial, Result], None],
        wanted: Callable[[Trial], bool] = lambda trial: True,
    ) -> None:
        """Make and measure this rank's share of the trials that are `wanted`; `keep` each result.

        Raises:
            UserError: as `BatchRun`.
        """
        of_job = {self.job(trial): trial for trial in trials}

        def watch(job: Job) -> list[ResultWatcher]:
            judge = Judge(job.prompt, truth=self.truth, first=self.first, block=self.block)
            fps = self.run.setup.fps
            return [ResultWatcher(judge, fps, lambda result: keep(of_job[job], result))]

        self.run(list(of_job), wanted=lambda job: wanted(of_job[job]), watch=watch)


class ResultWatcher:
    """Watches a video and makes its result."""

    def __init__(self, judge: Judge, fps: float, keep: Callable[[Result], None]) -> None:
        """`keep` gets the result when the video is complete."""
        self.judge = judge
        self.fps = fps
        self.keep = keep

    def add(self, frames: Tensor) -> None:
        """See `Watcher`."""
        self.judge.add(frames.numpy())

    def finish(self, record: Record) -> None:
        """See `Watcher`."""
        taken = {key: record[key] for key in ("prompt", "seed", "frames", "device")}
        timings = {key: record["timings"][key] for key in ("fps", "first_frame_s")}
        judged = {"kind": self.judge.kind, "report": self.judge.report(self.fps)}
        self.keep({**taken, **judged, "timings": timings})


def vbench_name(prompt: str, index: int) -> str:
    """`{prompt}-{index}.mp4` with the exact prompt, as far as a file name can hold it.

    The `.json` beside the video has to fit, too.
    """
    tail = f"-{index}"
    stem = re.sub(r"[/\\\x00-\x1f]", "_", prompt)
    return f"{clip_utf8(stem, MAX_NAME_BYTES - len(f'{tail}.json'))}{tail}.mp4"
