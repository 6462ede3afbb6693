"""Batch runs: videos of many prompts, resumable, spread over ranks, watched block by block.

Beside a video stands a record, a JSON that says what made it. It is written when the video was
closed and decoded to its last frame, and the video takes its name after it: a killed run leaves
neither a video without its record nor one under a record of another.
"""

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor
from tqdm import tqdm

from pipeline.changes import BRANCH, Change, Timeline, check_change
from pipeline.prefix import whole_blocks
from pipeline.progress import VideoProgress
from pipeline.prompt_schedule import PromptSchedule
from pipeline.records import (
    Record,
    chained_hash,
    describe_difference,
    describe_video,
    file_hash,
    model_settings,
    read_record,
    video_settings_of,
)
from pipeline.setup import Setup
from pipeline.stream import PrefixFrames, directed
from pipeline.teamwork import Teamwork
from pipeline.text import TextSource
from pipeline.text_to_video import VideoPipeline, check_generator, load_checked, text_source
from utils.background import Background
from utils.config import find_file, looked_up, save_resolved
from utils.distributed import Ranks
from utils.errors import UserError
from utils.files import locked, remove_leftovers, written
from utils.prompts import (
    check_text,
    output_names,
    read_extended_prompts,
    read_image_prompts,
    read_prompts,
)
from utils.video import (
    VideoWriter,
    check_image,
    contact_sheet,
    probe_video,
    spread_frames,
    thumbnails,
    write_png,
)
from wan.folders import find_checkpoint
from wan.geometry import VideoShape

logger = logging.getLogger(__name__)

DEFAULT_LATENT_FRAMES = 21
SHEET_COLUMNS = 11  # of ten seconds: the first frame and one after each second
SHEET_GAP = 4
PROMPTS_AT_ONCE = 64
"""So many are encoded before their videos are made: the first one need not wait for thousands."""


@dataclass(frozen=True)
class Job:
    """One video to make: with the noise of `seed` and `sample`, under its published `name`.

    `prompt` is what the model reads. `number`: which of its prompt's videos it is.
    """

    prompt: str
    seed: int
    sample: int
    number: int
    name: str
    image: Path | None = None
    video: Path | None = None


class Watcher(Protocol):
    """Sees a video while it is made. Its time does not count as that of the making."""

    def add(self, frames: Tensor) -> None:
        """The next frames, uint8 `[n, H, W, 3]`."""
        ...

    def finish(self, record: Record) -> None:
        """The video is complete, and checked where it is kept."""
        ...


@dataclass(frozen=True)
class Outputs:
    """Where videos go (None: nowhere), and how long they are; 21 latent frames by default.

    `exact`: latent frames of the stream (None: without an end) and video frames kept, as recorded.
    `flag` is that of the folder on the command line, `keep_config` whether the config is kept there
    too.
    """

    folder: Path | None
    num_latent_frames: int | None = None
    duration: float | None = None
    exact: tuple[int | None, int] | None = None
    prefix_frames: PrefixFrames = "reconstructed"
    overwrite: bool = False
    flag: str = "--output_folder"
    keep_config: bool = True

    def length(self, shape: VideoShape, fps: int) -> tuple[int | None, int]:
        """(latent frames to generate, video frames to keep) of a video of one scene."""
        if self.exact is not None:
            return self.exact
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


def list_jobs(
    *,
    i2v: bool,
    num_samples: int,
    seed: int,
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
    if i2v:
        if not data_path or image or video:
            raise UserError("--i2v takes its images from --data_path FOLDER, and nothing else")
        listed = read_image_prompts(looked_up(data_path))
        titles, images = [item.prompt for item in listed], [item.image_path for item in listed]
    else:
        titles = list(prompts) or read_prompts(looked_up(str(data_path)))
        images = [find_file(image, "image") if image else None] * len(titles)
    if any(not title.strip() for title in titles):
        raise UserError("a prompt is empty; write what the video should show")
    for title in titles:
        check_text(title)
    texts: Sequence[str] = titles
    if extended_prompt_path:
        texts = read_extended_prompts(looked_up(extended_prompt_path), titles)
    names = output_names(titles, num_samples, with_index=with_index, ema=ema)
    clip = find_file(video, "video") if video else None
    return [
        Job(text, seed, sample, sample, name, picture, clip)
        for text, picture, row in zip(texts, images, names, strict=True)
        for sample, name in enumerate(row)
    ]


class Course(NamedTuple):
    """Length and changes of one video; `latent_frames` None cuts it from a stream without an end.

    `latent_frames` include those of an image or video to continue, `video_frames` are those kept.
    """

    latent_frames: int | None
    video_frames: int
    changes: tuple[Change, ...]


class BatchRun:
    """Makes this rank's share of the videos that are not there yet."""

    def __init__(
        self,
        setup: Setup,
        checkpoint: str | Path | None,
        outputs: Outputs,
        *,
        use_ema: bool,
        ranks: Ranks,
        changes: PromptSchedule | Sequence[Change] = (),
        teamwork: Teamwork | None = None,
    ) -> None:
        """`changes` of prompt, the same in every video: by time, or by block as recorded.

        With `teamwork` this rank leads a team, and `ranks` are the teams.
        """
        self.changes = changes
        self.checkpoint = None if checkpoint is None else find_checkpoint(checkpoint)
        self.outputs = outputs
        self.use_ema = use_ema
        self.ranks = ranks
        self.teamwork = teamwork
        self.setup = setup
        self.folder = setup.require_folder()
        self.shape = self.setup.shape
        self.latent_frames, self.video_frames = outputs.length(self.shape, setup.fps)
        self._hashes: dict[Path, str] = {}

    def __call__(
        self,
        jobs: Sequence[Job],
        *,
        wanted: Callable[[Job], bool] | None = None,
        watch: Callable[[Job], Sequence[Watcher]] = lambda job: (),
    ) -> None:
        """Make this rank's share of those jobs that are `wanted`, each under its own watchers.

        By default what is not there with the same settings is wanted, and with `overwrite` all.

        Raises:
            UserError: before anything is made, also where a video stands under a job's name that
                was made otherwise, or nobody knows how, unless `overwrite` is set; or where another
                run is writing to the folder.
        """
        with self._alone():
            self._check_names(jobs)
            share = self.ranks.share(jobs)
            if wanted is None:
                missing = [job for job in share if self.outputs.overwrite or not self.is_done(job)]
                if len(missing) < len(share):
                    done = len(share) - len(missing)
                    logger.info("there already, --overwrite redoes: %d of %d", done, len(share))
            else:
                missing = [job for job in share if wanted(job)]
            if missing:
                self._make_all(missing, watch)

    @cached_property
    def model_settings(self) -> dict[str, str]:
        """What all videos of this model depend on."""
        return model_settings(self.setup, self.checkpoint, use_ema=self.use_ema)

    def is_done(self, job: Job) -> bool:
        """Whether the video of a job is there, with these settings; so without a folder, too."""
        return self.outputs.folder is None or (
            self._path(job).is_file() and self._differs(job) is None
        )

    def made(self, jobs: Sequence[Job]) -> dict[Path, Record]:
        """Path and record of those videos that are there, complete and with these settings.

        A record is what the JSON beside the video says: "prompt", "frames", "timings" and so on.
        """
        done = [self._path(job) for job in jobs if self.is_done(job)]
        return {path: record for path in done if (record := read_record(path)) is not None}

    def write_contact_sheet(self, videos: Sequence[Path], path: Path) -> None:
        """Draw `videos` into the PNG `path`: a row for each, its frames at equal distances."""
        rows = [thumbnails(spread_frames(video, SHEET_COLUMNS)) for video in videos]
        write_png(path, contact_sheet(rows, SHEET_COLUMNS, SHEET_GAP))

    # --- before anything is made ----------------------------------------------------------------

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """No other run writes to the folder meanwhile, and what killed ones left there is gone."""
        folder = self.outputs.folder
        if folder is None:
            yield
            return
        otherwise = f"give another {self.outputs.flag}"
        with locked(folder, otherwise, is_main=self.ranks.is_main):
            if self.ranks.world == 1:  # else a rank may be writing already
                remove_leftovers(folder)
            yield

    def _check_names(self, jobs: Sequence[Job]) -> None:
        """UserError if a video that is not the job's would be replaced without being told to."""
        if self.outputs.folder is None or self.outputs.overwrite:
            return
        others = {}
        for job in jobs:
            path = self._path(job)
            if path.exists() and (difference := self._differs(job)) is not None:
                others[path] = difference
        if others:
            path, difference = next(iter(others.items()))
            more = f" (and {len(others) - 1} others)" if len(others) > 1 else ""
            raise UserError(
                f"{path} is there already{more}, {difference}: give another {self.outputs.flag}, "
                "or --overwrite to replace it"
            )

    def _differs(self, job: Job) -> str | None:
        """In what a video that is there differs from that of the job; None if it is that."""
        path = self._path(job)
        if not path.is_file():
            return "and no file"
        record = read_record(path)
        if record is None:
            return "without a readable record of how it was made"
        if record.get("bytes", size := path.stat().st_size) != size:
            return "but was changed after it was made"
        return describe_difference(record["settings"], self.settings_of(job))

    def _check_prefixes(self, jobs: Sequence[Job]) -> None:
        """Images and videos to continue have to be readable and leave something to generate."""
        given: dict[Path, int] = {}
        for path in {job.image for job in jobs if job.image is not None}:
            check_image(path)
            given[path] = 1
        for path in {job.video for job in jobs if job.video is not None}:
            frames = probe_video(path, self.setup.fps).frames
            given[path] = whole_blocks(frames, self.setup.layout, self.shape)
        for path, blocks in given.items():
            frames = self.setup.layout.start(blocks)
            latent_frames = self._course(blocks).latent_frames
            if latent_frames is not None and latent_frames <= frames:
                raise UserError(
                    f"{path} fills {frames} latent frames already; ask for more than "
                    f"{latent_frames} (--num_output_frames)"
                )

    def _check_changes(self) -> None:
        """Every change has to be one that a video of this model can make."""
        changes = self.changes
        for change in changes.later if isinstance(changes, PromptSchedule) else changes:
            if change.policy != BRANCH:
                check_change(
                    self.setup.kind,
                    self.setup.layout,
                    change.policy,
                    change.blend_blocks,
                    has_text=change.prompt is not None,
                )

    # --- making ---------------------------------------------------------------------------------

    def _make_all(self, jobs: Sequence[Job], watch: Callable[[Job], Sequence[Watcher]]) -> None:
        """Encode the prompts of a group of videos and make these, group by group."""
        self._check_prefixes(jobs)
        self._check_changes()
        self.folder.require(self.folder.vae)
        if not self.setup.text_embeddings:
            self.folder.require(self.folder.text_encoder, self.folder.tokenizer)
        checked = check_generator(
            self.setup, self.checkpoint, use_ema=self.use_ema, teamwork=self.teamwork
        )
        text = text_source(self.setup, checked.device, checked.dtype, room=0)
        pipe, index = None, 0
        for group in groups_of_prompts(jobs, PROMPTS_AT_ONCE):
            texts = self._encode(text if pipe is None else pipe, group)
            if pipe is None:  # not before: the text encoder had its memory
                pipe = load_checked(
                    self.setup, checked, self.checkpoint, text, teamwork=self.teamwork
                )
            pipe.load_vae()  # not in the time of the first video
            for job in group:
                index += 1
                self._make(pipe, job, texts, f"{index}/{len(jobs)} {job.name}", watch)
                if index == 1 and self.ranks.is_main and self.outputs.keep_config:
                    save_resolved(self.setup.resolved, self._folder / "config.yaml")

    def _encode(
        self, encoder: TextSource | VideoPipeline, jobs: Sequence[Job]
    ) -> dict[str, Tensor]:
        """The text embeddings of some jobs; the text encoder is freed again."""
        prompts = list(dict.fromkeys([*(job.prompt for job in jobs), *self._later_prompts]))
        shown = self.ranks.is_main and len(prompts) > 1
        with tqdm(prompts, "encoding prompts", disable=not shown, leave=False) as bar:
            return encoder.encode_once(bar)

    def _make(
        self,
        pipe: VideoPipeline,
        job: Job,
        texts: Mapping[str, Tensor],
        title: str,
        watch: Callable[[Job], Sequence[Watcher]],
    ) -> None:
        """One video under its watchers, written and described if it is kept."""
        start = time.perf_counter()
        prefix = pipe.encode_prefix(image=job.image, video=job.video)
        given = 0 if prefix is None else len(prefix.blocks(self.setup.layout))
        course = self._course(given)
        watchers = watch(job)
        with ExitStack() as stack:
            part = None
            if self.outputs.folder is not None:
                part = stack.enter_context(written(self._path(job)))
            with (
                VideoProgress(
                    title,
                    course.video_frames,
                    self.setup.fps,
                    start=start,
                    shown=self.ranks.is_main,
                ) as progress,
                pipe.open_stream(
                    texts[job.prompt].to(pipe.device),
                    seed=job.seed,
                    num_latent_frames=course.latent_frames,
                    samples=[job.sample],
                    prefix=prefix,
                    prefix_frames=self.outputs.prefix_frames,
                ) as stream,
                VideoWriter(part, self.setup.fps) if part else nullcontext() as writer,
                Background() as beside,
            ):
                keeping = Keeping(writer)
                for frames in directed(stream, course.changes, texts.__getitem__):
                    kept = frames[: course.video_frames - progress.frames]
                    beside.do(partial(keeping.add, kept))
                    progress.add(len(kept))
                    with progress.paused():
                        for watcher in watchers:
                            watcher.add(kept)
                    if progress.frames == course.video_frames:
                        break
                made = stream.changes
                if late := [c for c in course.changes if c.block >= stream.next_index]:
                    logger.warning("changes of prompt that come after the end: %d", len(late))
            record = describe_video(
                self.setup,
                pipe.source,
                prompt=job.prompt,
                seed=job.seed,
                number=job.number,
                frames=progress.frames,
                latent_frames=course.latent_frames,
                frames_hash=keeping.hash,
                settings=self.settings_of(job),
                changes=made,
                timings=progress.timings(),
            )
            if part is not None:
                check_video(part, progress.frames, self._path(job))
                self._write_record(job, record | {"bytes": part.stat().st_size})
        for watcher in watchers:
            watcher.finish(record)

    def _course(self, given: int) -> Course:
        """Length and changes of a video that continues `given` blocks."""
        layout, outputs = self.setup.layout, self.outputs
        timeline = Timeline(layout, self.shape)
        hidden = timeline.start(given) if outputs.prefix_frames == "none" else 0
        if isinstance(self.changes, PromptSchedule):
            changes = self.changes.changes(
                timeline, self.setup.fps, first_block=given, hidden_frames=hidden
            )
        else:
            changes = tuple(self.changes)
        timeline = timeline.with_cuts(changes)
        if outputs.exact is not None or self.latent_frames is None:
            return Course(self.latent_frames, self.video_frames, changes)
        if outputs.duration is None:
            frames = timeline.video_frames(self.latent_frames) - hidden
            return Course(self.latent_frames, frames, changes)
        latent_frames = timeline.latent_frames(hidden + self.video_frames)
        return Course(latent_frames, self.video_frames, changes)

    @property
    def _later_prompts(self) -> list[str]:
        """The prompts that videos change to."""
        if isinstance(self.changes, PromptSchedule):
            return self.changes.prompts
        return [change.prompt for change in self.changes if change.prompt is not None]

    def _write_record(self, job: Job, record: Record) -> None:
        """Put the record in its place, where no video stands until the new one takes its name."""
        path = self._path(job)
        with written(path.with_suffix(".json")) as part:
            text = json.dumps(record, indent=1, ensure_ascii=False)
            part.write_text(text, encoding="utf-8")
            path.unlink(missing_ok=True)  # a record never tells of another video

    def settings_of(self, job: Job) -> dict[str, Any]:
        """What the video of a job depends on."""
        given = {"image": job.image, "video": job.video}
        prefix = {kind: self._hash(path) for kind, path in given.items() if path is not None}
        if isinstance(self.changes, PromptSchedule):
            changes = [asdict(timed) for timed in self.changes.later]
        else:
            changes = [change.record() for change in self.changes]
        return video_settings_of(
            self.model_settings,
            prompt=job.prompt,
            seed=job.seed,
            sample=job.sample,
            latent_frames=self.latent_frames,
            video_frames=self.video_frames,
            prefix_frames=self.outputs.prefix_frames,
            prefix=prefix,
            changes=changes,
        )

    def _hash(self, path: Path) -> str:
        if path not in self._hashes:
            self._hashes[path] = file_hash(path)
        return self._hashes[path]

    @property
    def _folder(self) -> Path:
        assert self.outputs.folder is not None
        return self.outputs.folder

    def _path(self, job: Job) -> Path:
        return self._folder / job.name


class Keeping:
    """What becomes of a video's frames: `hash` (see `chained_hash`), and the file, if any."""

    def __init__(self, writer: VideoWriter | None) -> None:
        self.hash = ""
        self._writer = writer

    def add(self, frames: Tensor) -> None:
        """The next frames, uint8 `[n, H, W, 3]`, which nobody changes afterwards."""
        self.hash = chained_hash(self.hash, frames)
        if self._writer is not None:
            self._writer.write(frames)


def groups_of_prompts(jobs: Sequence[Job], size: int) -> Iterator[list[Job]]:
    """The jobs in order, in groups of at most `size` different prompts."""
    group: list[Job] = []
    prompts: set[str] = set()
    for job in jobs:
        if job.prompt not in prompts and len(prompts) == size:
            yield group
            group, prompts = [], set()
        group.append(job)
        prompts.add(job.prompt)
    if group:
        yield group


def check_video(part: Path, frames: int, path: Path) -> None:
    """Decode a file to its end; UserError, naming `path`, unless it has so many frames."""
    found = probe_video(part).frames
    if found != frames:
        raise UserError(
            f"{path} was written with {frames} frames but {found} can be read; look for a full or "
            "damaged disk, and repeat the command"
        )
