"""Batch inference: prompts to files, resumable, spread over ranks."""

import hashlib
import json
import logging
import math
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from pipeline.prefix import whole_blocks
from pipeline.progress import Progress
from pipeline.setup import Setup
from pipeline.stream import PrefixFrames
from pipeline.text_to_video import VideoPipeline, load_generator
from utils.config import VIDEO_KEYS, Config, find_file, fingerprint, save_config, to_dict
from utils.devices import computed_dtype, device_name
from utils.distributed import Ranks
from utils.errors import UserError
from utils.prompts import output_names, read_extended_prompts, read_image_prompts, read_prompts
from utils.video import (
    VideoWriter,
    check_image,
    contact_sheet,
    probe_video,
    spread_frames,
    thumbnails,
    write_png,
)
from wan.folders import ModelFolder, find_checkpoint
from wan.geometry import VideoShape

logger = logging.getLogger(__name__)

DEFAULT_LATENT_FRAMES = 21
SHEET_COLUMNS = 11  # of ten seconds: the first frame and one after each second
SHEET_GAP = 4
MIB = 2**20


@dataclass(frozen=True)
class Job:
    """One video to make. `prompt` is what the model reads, `name` the published file name."""

    prompt: str
    sample: int
    name: str
    image: Path | None = None
    video: Path | None = None


@dataclass(frozen=True)
class Outputs:
    """Where videos go and how long they are; 21 latent frames unless said otherwise."""

    folder: Path
    num_latent_frames: int | None = None
    duration: float | None = None
    prefix_frames: PrefixFrames = "reconstructed"
    overwrite: bool = False

    def length(self, shape: VideoShape, fps: int) -> tuple[int, int]:
        """(latent frames to generate, video frames to keep)."""
        if self.duration is not None:
            if not math.isfinite(self.duration):
                raise UserError(f"--duration {self.duration} must be a number of seconds")
            frames = round(self.duration * fps)
            if frames < 1:
                raise UserError(f"{self.duration:g} s are shorter than one frame")
            return shape.latent_frames(frames), frames
        latent = DEFAULT_LATENT_FRAMES if self.num_latent_frames is None else self.num_latent_frames
        if latent < 1:
            raise UserError(f"--num_output_frames {latent} must be at least 1")
        return latent, shape.video_frames(latent)


def plan_jobs(
    config: Config,
    *,
    data_path: str | None,
    extended_prompt_path: str | None,
    prompts: Sequence[str],
    image: str | None,
    video: str | None,
    with_index: bool,
    ema: bool,
) -> list[Job]:
    """All videos of a command, in order, with their published names."""
    if image and video:
        raise UserError("give --image or --video, not both")
    if bool(prompts) == bool(data_path):
        raise UserError('say what to generate: either --prompt "…" or --data_path FILE')
    images: list[Path | None]
    if config.i2v:
        if not data_path or image or video:
            raise UserError("--i2v takes its images from --data_path FOLDER, and nothing else")
        listed = read_image_prompts(data_path)
        titles, images = [item.prompt for item in listed], [item.image_path for item in listed]
    else:
        titles = list(prompts) or read_prompts(str(data_path))
        images = [find_file(image, "image") if image else None] * len(titles)
    if any(not title.strip() for title in titles):
        raise UserError("a prompt is empty; write what the video should show")
    texts = read_extended_prompts(extended_prompt_path, titles) if extended_prompt_path else titles
    names = output_names(titles, config.num_samples, with_index=with_index, ema=ema)
    clip = find_file(video, "video") if video else None
    return [
        Job(text, sample, name, picture, clip)
        for text, picture, row in zip(texts, images, names, strict=True)
        for sample, name in enumerate(row)
    ]


class BatchRun:
    """Makes this rank's share of the videos that are not there yet."""

    def __init__(
        self,
        config: Config,
        checkpoint: str | None,
        outputs: Outputs,
        *,
        use_ema: bool,
        ranks: Ranks,
    ) -> None:
        self.config = config
        self.checkpoint = None if checkpoint is None else find_checkpoint(checkpoint)
        self.outputs = outputs
        self.use_ema = use_ema
        self.ranks = ranks
        self.setup = Setup.of(config)
        self.folder = self.setup.require_folder()
        self.shape = self.setup.shape
        self.latent_frames, self.video_frames = outputs.length(self.shape, config.fps)
        self._settings = self._common_settings()

    def __call__(self, jobs: Sequence[Job]) -> None:
        """Generate what is missing; what is there with the same settings is skipped."""
        share = self.ranks.share(jobs)
        missing = [job for job in share if self.outputs.overwrite or not self._is_done(job)]
        if len(missing) < len(share):
            done = len(share) - len(missing)
            logger.info("there already, --overwrite redoes: %d of %d videos", done, len(share))
        if not missing:
            return
        self._check_prefixes(missing)
        self.folder.require(self.folder.vae)
        if not self.config.text_embeddings:
            self.folder.require(self.folder.text_encoder, self.folder.tokenizer)
        folder = self.outputs.folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the output folder {folder}: {error.strerror}") from error
        pipe = load_generator(self.setup, self.checkpoint, use_ema=self.use_ema)
        prompts = list(dict.fromkeys(job.prompt for job in missing))
        shown = self.ranks.is_main and len(prompts) > 1
        texts = pipe.encode_once(tqdm(prompts, "encoding prompts", disable=not shown))
        pipe.load_vae()
        for index, job in enumerate(missing):
            title = f"{index + 1}/{len(missing)} {job.name}"
            self._make(pipe, job, texts[job.prompt], title)
            if index == 0 and self.ranks.is_main:
                save_config(self.config, folder / "config.yaml")

    def made(self, jobs: Sequence[Job]) -> dict[Path, dict[str, Any]]:
        """Path and record of those videos that are there, complete and with these settings.

        A record is what the JSON beside the video says: "prompt", "frames", "timings" and so on.
        """
        records = {self.outputs.folder / job.name: self._record(job) for job in jobs}
        return {path: record for path, record in records.items() if record is not None}

    def write_contact_sheet(self, videos: Sequence[Path], path: Path) -> None:
        """Draw `videos` into the PNG `path`: a row for each, its frames at equal distances."""
        rows = [thumbnails(spread_frames(video, SHEET_COLUMNS)) for video in videos]
        own = path.with_stem(f"{path.stem}.{self.ranks.rank}")  # ranks may end at the same time
        write_png(own, contact_sheet(rows, SHEET_COLUMNS, SHEET_GAP))
        own.replace(path)

    def _check_prefixes(self, jobs: Sequence[Job]) -> None:
        """Images and videos to continue have to be readable and leave something to generate."""
        layout = self.setup.layout
        given: dict[Path, int] = {}
        for path in {job.image for job in jobs if job.image is not None}:
            check_image(path)
            given[path] = 1
        for path in {job.video for job in jobs if job.video is not None}:
            given[path] = whole_blocks(
                probe_video(path, self.config.fps).frames, layout, self.shape
            )
        for path, blocks in given.items():
            frames = layout.start(blocks)
            latent_frames, _ = self._length_with(frames)
            if latent_frames <= frames:
                raise UserError(
                    f"{path} fills {frames} latent frames already; ask for more than "
                    f"{latent_frames} (--num_output_frames)"
                )

    def _make(self, pipe: VideoPipeline, job: Job, text: Tensor, title: str) -> None:
        path = self.outputs.folder / job.name
        self._record_path(job).unlink(missing_ok=True)  # it never tells of another video
        start = time.perf_counter()
        prefix = pipe.encode_prefix(image=job.image, video=job.video)
        given = 0 if prefix is None else prefix.latents.shape[1]
        latent_frames, video_frames = self._length_with(given)
        progress = Progress(
            title, video_frames, self.config.fps, start=start, shown=self.ranks.is_main
        )
        with (
            progress,
            pipe.open_stream(
                text.to(pipe.device),
                num_latent_frames=latent_frames,
                samples=[job.sample],
                prefix=prefix,
                prefix_frames=self.outputs.prefix_frames,
            ) as stream,
            VideoWriter(path, self.config.fps) as writer,
        ):
            for frames in stream:
                kept = frames[: video_frames - progress.frames]
                progress.add(len(kept))
                writer.write(kept)
        self._describe(job, progress.frames, progress.timings())

    def _length_with(self, prefix_frames: int) -> tuple[int, int]:
        """(latent frames to generate, video frames to write); a duration is that of the file."""
        if self.outputs.prefix_frames == "reconstructed":
            return self.latent_frames, self.video_frames
        hidden = self.shape.video_frames(prefix_frames)
        if self.outputs.duration is None:
            return self.latent_frames, self.video_frames - hidden
        return self.shape.latent_frames(hidden + self.video_frames), self.video_frames

    def _describe(self, job: Job, frames: int, timings: dict[str, float]) -> None:
        """Write the video's JSON: what made it, with what, how fast."""
        record = {
            "prompt": job.prompt,
            "sample": job.sample,
            "frames": frames,
            "settings": self._settings_of(job),
            "timings": {key: round(value, 4) for key, value in timings.items()},
            "device": device_name(self.config.device),
            "versions": {
                "python": platform.python_version(),
                **{name: version(name) for name in ("torch", "diffusers", "transformers")},
            },
        }
        path = self._record_path(job)
        partial = path.with_suffix(".part")
        partial.write_text(json.dumps(record, indent=1, ensure_ascii=False), encoding="utf-8")
        partial.rename(path)

    def _is_done(self, job: Job) -> bool:
        return self._record(job) is not None

    def _record(self, job: Job) -> dict[str, Any] | None:
        """What the JSON beside a video says; None unless both are there, with these settings."""
        path = self._record_path(job)
        if not (self.outputs.folder / job.name).is_file() or not path.is_file():
            return None
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            return record if record["settings"] == self._settings_of(job) else None
        except (ValueError, KeyError):
            return None

    def _record_path(self, job: Job) -> Path:
        return (self.outputs.folder / job.name).with_suffix(".json")

    def _common_settings(self) -> dict[str, Any]:
        return {
            "seed": self.config.seed,
            "latent_frames": self.latent_frames,
            "video_frames": self.video_frames,
            "prefix_frames": self.outputs.prefix_frames,
            **model_settings(self.config, self.folder, self.checkpoint, use_ema=self.use_ema),
        }

    def _settings_of(self, job: Job) -> dict[str, Any]:
        given = {"image": job.image, "video": job.video}
        prefix = {kind: file_hash(path) for kind, path in given.items() if path is not None}
        text = hashlib.sha256(job.prompt.encode()).hexdigest()[:16]
        return {**self._settings, **prefix, "text": text, "sample": job.sample}


def network_files(folder: Path) -> list[Path]:
    """The transformer's files of a model folder, in order."""
    return sorted(folder.glob("**/diffusion_pytorch_model*.safetensors"))


def weight_files(path: Path) -> list[Path]:
    """A weights file, or those of a diffusers folder; none if it is not there."""
    return [path] if path.is_file() else sorted(path.glob("*.safetensors"))


def video_settings(config: Config) -> dict[str, Any]:
    """The values that all videos of a config depend on: all but the seed, which each has its own.

    `dtype` is the one that is computed in: `auto` is another one on another machine.
    """
    values = {name: value for name, value in to_dict(config).items() if name in VIDEO_KEYS}
    del values["seed"]
    return {**values, "dtype": str(computed_dtype(config.dtype, config.device))}


def model_settings(
    config: Config, files: ModelFolder, checkpoint: Path | None, *, use_ema: bool
) -> dict[str, str]:
    """What all videos of a model depend on: its settings and weights, by their hashes."""
    text = [*weight_files(files.text_encoder), *sorted(files.tokenizer.glob("*.*"))]
    parts = {
        "sizes": sorted(files.path.glob("**/config.json")),
        "checkpoint": (
            [checkpoint]
            if checkpoint and checkpoint.is_file()
            else network_files(checkpoint or files.path)
        ),
        "vae": weight_files(files.vae),
        "text_encoder": [] if config.text_embeddings else text,
    }
    return {
        "config_hash": fingerprint(video_settings(config)),
        "network": "generator_ema" if use_ema else "generator",
        **{f"{name}_hash": "+".join(map(file_hash, paths)) for name, paths in parts.items()},
    }


def file_hash(path: Path) -> str:
    """A short SHA-256 of a file: of all of it up to 64 MiB, else of its size and 64 samples."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= 64 * MIB:
            digest.update(file.read())
        else:
            for part in range(64):
                file.seek(part * (size - MIB) // 63)
                digest.update(file.read(MIB))
    return digest.hexdigest()[:16]
