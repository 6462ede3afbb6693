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

from evaluation.results import Judge, Result
from pipeline.batch import Outputs, model_settings
from pipeline.components import (
    ModelFiles,
    block_layout,
    choose_device,
    choose_dtype,
    device_name,
    video_shape,
)
from pipeline.schedule import BlockLayout
from pipeline.text_to_video import VideoPipeline, load_pipeline
from shapes.world import sample_scene
from utils.config import Config, find_file
from utils.files import write_json
from utils.prompts import clip_utf8
from utils.video import MAX_NAME_BYTES, VideoWriter
from wan.checkpoints import load_dit_config
from wan.geometry import VideoShape


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


def held_out_captions(count: int) -> list[str]:
    """Captions of the first `count` held-out scenes of the shapes world."""
    return [sample_scene(0, index, split="heldout").caption for index in range(count)]


def plan_trials(prompts: Sequence[str], seeds: int, first_seed: int) -> list[Trial]:
    """Every prompt with seeds `first_seed`, `first_seed + 1`, ...; all prompts of a seed first."""
    different = list(dict.fromkeys(prompts))
    return [Trial(p, first_seed + index, index) for index in range(seeds) for p in different]


def frames_per_block(layout: BlockLayout, shape: VideoShape) -> tuple[int, int]:
    """Video frames of the first block and of every later one."""
    return shape.video_frames(layout.frames(0)), shape.temporal_stride * layout.block_frames


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
    ) -> None:
        """`export`: a folder that gets the videos too, as `{prompt}-{index}.mp4`."""
        self.config = config
        self.checkpoint = None if checkpoint is None else find_file(checkpoint, "checkpoint")
        self.use_ema = use_ema
        self.export = export
        self.files = ModelFiles.find(config, config.generator_name)
        self.shape = video_shape(config, load_dit_config(self.files.folder))
        length = Outputs(Path(), duration=seconds).length(self.shape, config.fps)
        self.latent_frames, self.video_frames = length
        self.first, self.block = frames_per_block(block_layout(config), self.shape)
        self._pipe: VideoPipeline | None = None
        self._texts: dict[str, Tensor] = {}

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What the result of a trial depends on, besides the trial itself."""
        model = model_settings(self.config, self.checkpoint, use_ema=self.use_ema)
        dtype = choose_dtype(self.config.dtype, choose_device(self.config.device))
        return {**model, "video_frames": self.video_frames, "computed_in": str(dtype)}

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
        pipe = load_pipeline(self.config, self.checkpoint, use_ema=self.use_ema)
        pipe.load_vae()
        self._texts = pipe.encode_once(dict.fromkeys(trial.prompt for trial in trials))
        self._pipe = pipe

    def __call__(self, trial: Trial) -> Result:
        """Make and measure one video; `load` comes first."""
        assert self._pipe is not None
        pipe, path = self._pipe, self.export_path(trial)
        if path is not None:  # its record never tells of another video
            path.with_suffix(".json").unlink(missing_ok=True)
        judge = Judge(trial.prompt, fps=self.config.fps, first=self.first, block=self.block)
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
