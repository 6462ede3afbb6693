"""Videos made to be measured: prompts and seeds through the stream, judged block by block."""

import json
import re
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from evaluation.meters import Judge, Meter, Result
from evaluation.results import write_json
from pipeline.batch import Outputs, model_settings
from pipeline.setup import Setup
from pipeline.text_to_video import VideoPipeline, load_generator
from utils.config import Config
from utils.devices import computed_dtype, device_name
from utils.files import MAX_NAME_BYTES
from utils.prompts import clip_utf8
from utils.video import VideoWriter
from wan.folders import find_checkpoint


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


def plan_trials(prompts: Sequence[str], seeds: int, first_seed: int) -> list[Trial]:
    """Every prompt with seeds `first_seed`, `first_seed + 1`, ...; all prompts of a seed first."""
    different = list(dict.fromkeys(prompts))
    return [Trial(p, first_seed + index, index) for index in range(seeds) for p in different]


class Evaluation:
    """Makes and measures trials, one at a time, in the memory of one block."""

    def __init__(
        self,
        config: Config,
        checkpoint: str | Path | None,
        *,
        use_ema: bool,
        seconds: float,
        export: Path | None = None,
        truth: Meter | None = None,
    ) -> None:
        """`export`: a folder that gets the videos too, as `{prompt}-{index}.mp4`; `truth`: see
        `Judge`.
        """
        self.config = config
        self.checkpoint = None if checkpoint is None else find_checkpoint(checkpoint)
        self.use_ema = use_ema
        self.export, self.truth = export, truth
        self.setup = Setup.of(config)
        self.shape = self.setup.shape
        length = Outputs(Path(), duration=seconds).length(self.shape, config.fps)
        self.latent_frames, self.video_frames = length
        self.first, self.block = map(self.setup.block_video_frames, (0, 1))
        self._pipe: VideoPipeline | None = None
        self._texts: dict[str, Tensor] = {}

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What the result of a trial depends on, besides the trial itself."""
        folder = self.setup.require_folder()
        model = model_settings(self.config, folder, self.checkpoint, use_ema=self.use_ema)
        computed_in = str(computed_dtype(self.config.dtype, self.config.device))
        return {**model, "video_frames": self.video_frames, "computed_in": computed_in}

    def export_path(self, trial: Trial) -> Path | None:
        """Where the video of a trial goes, if anywhere."""
        if self.export is None:
            return None
        return self.export / vbench_name(trial.prompt, trial.index)

    def is_there(self, trial: Trial) -> bool:
        """Whether the video that is to be kept of a trial is there, of these very settings."""
        path = self.export_path(trial)
        if path is None:
            return True
        try:
            record = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
            return path.is_file() and bool(record == self._record(trial))
        except (OSError, ValueError):
            return False

    def _record(self, trial: Trial) -> dict[str, Any]:
        """What stands in the JSON beside a video."""
        made = {"prompt": trial.prompt, "sample": trial.index, "seed": trial.seed}
        return {**made, "settings": self.settings}

    def load(self, trials: Sequence[Trial]) -> None:
        """Load all networks and encode the prompts; the text encoder is freed again."""
        pipe = load_generator(self.setup, self.checkpoint, use_ema=self.use_ema)
        pipe.load_vae()
        self._texts = pipe.encode_once(dict.fromkeys(trial.prompt for trial in trials))
        self._pipe = pipe

    def __call__(self, trial: Trial) -> Result:
        """Make and measure one video; `load` comes first."""
        assert self._pipe is not None
        pipe, path = self._pipe, self.export_path(trial)
        if path is not None:  # its record never tells of another video
            path.with_suffix(".json").unlink(missing_ok=True)
        judge = Judge(
            trial.prompt,
            fps=self.config.fps,
            truth=self.truth,
            first=self.first,
            block=self.block,
        )
        made, waited, first_frame = 0, 0.0, 0.0
        text = self._texts[trial.prompt].to(pipe.device)
        with ExitStack() as stack:
            start = time.perf_counter()
            stream = stack.enter_context(
                pipe.open_stream(text, seed=trial.seed, num_latent_frames=self.latent_frames)
            )
            writer = stack.enter_context(VideoWriter(path, self.config.fps)) if path else None
            while (frames := stream.next_block()) is not None:
                waited += time.perf_counter() - start
                first_frame = first_frame or waited
                kept = frames[: self.video_frames - made]
                made += len(kept)
                judge.add(kept.numpy())
                if writer is not None:
                    writer.write(kept)
                start = time.perf_counter()
        if path is not None:
            write_json(path.with_suffix(".json"), self._record(trial))
        return {
            "prompt": trial.prompt,
            "seed": trial.seed,
            "kind": judge.kind,
            "frames": made,
            "timings": {"fps": made / waited, "first_frame_s": first_frame},
            "device": device_name(self.config.device),
            "report": judge.report(),
        }


def vbench_name(prompt: str, index: int) -> str:
    """`{prompt}-{index}.mp4` with the exact prompt, as far as a file name can hold it.

    The `.json` beside the video has to fit, too.
    """
    tail = f"-{index}"
    stem = re.sub(r"[/\\\x00-\x1f]", "_", prompt)
    return f"{clip_utf8(stem, MAX_NAME_BYTES - len(f'{tail}.json'))}{tail}.mp4"
