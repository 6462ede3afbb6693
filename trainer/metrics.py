"""What a training run measures and where the numbers go.

One flat dict per step, with names such as `critic/loss`, in `metrics.jsonl`, TensorBoard and W&B.
`docs/training_health.md` explains every number.
"""

import io
import json
import logging
import math
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from utils.config import Config, to_dict
from utils.errors import UserError
from utils.files import make_folder, told, write_text
from utils.video import frame_rate, read_video_chunks

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
RUN_ID_FILE = "wandb_run_id.txt"
GIF_WIDTH = 320  # pixels; TensorBoard keeps videos as GIF, which grows fast with the width
GIF_STEP = 2  # every second frame


@dataclass(frozen=True)
class WandbSettings:
    """Where a run is shown on Weights & Biases; without a key, W&B looks for its own login."""

    project: str | None = None
    entity: str | None = None
    host: str | None = None
    key: str | None = field(default=None, repr=False)
    save_dir: Path | None = None
    config: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def from_config(cls, config: Config, save_dir: Path | None = None) -> "WandbSettings | None":
        """The `wandb_*` keys of an experiment; None if all of them are empty."""
        values = to_dict(config)
        given = {name: values.pop(f"wandb_{name}") for name in ("project", "entity", "host", "key")}
        given["key"] = config.wandb_key  # left out of the plain values
        return cls(**given, save_dir=save_dir, config=values) if any(given.values()) else None


class MetricsLog:
    """Writes one dict per step to `logdir/metrics.jsonl`, and to TensorBoard and W&B if wanted.

    No step is ever in the file twice: a run that goes on at step n drops what an earlier one wrote
    from n on. All methods do nothing unless `is_main`. A missing `tensorboard` or `wandb` package
    is one warning, never an error.

    Args:
        logdir: folder of the run, made if it is missing.
        wandb: None for no W&B.
        tensorboard: whether to write `logdir/tensorboard`.
        is_main: whether this rank writes.
    """

    def __init__(
        self, logdir: Path, *, wandb: WandbSettings | None, tensorboard: bool, is_main: bool
    ) -> None:
        self._logdir = Path(logdir)
        self._wandb = wandb
        self._tensorboard = tensorboard
        self._is_main = is_main
        self._file: IO[str] | None = None
        self._sinks: list[_Sink] = []
        self._last_step = -1

    def resume(self, step: int) -> None:
        """Open the log to go on at `step`; what it holds from `step` on is dropped.

        Implied by the first `write`, with its step.
        """
        if not self._is_main:
            return
        self.close()
        path = self._logdir / METRICS_FILE
        kept = [line for line in _read_lines(path) if line["step"] < step]
        write_text(path, "".join(map(_as_line, kept)))
        with told(path):
            self._file = path.open("a", encoding="utf-8")
        self._last_step = step - 1
        self._sinks = self._open_sinks(step, continues=bool(kept))

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write numbers (also nested, also 0-d tensors, which are read here) and texts of a step.

        What is not finite becomes null in the file and is left out elsewhere.

        Raises:
            ValueError: `step` is not above the last one.
        """
        if not self._is_main:
            return
        if self._file is None:
            self.resume(step)
        assert self._file is not None
        if step <= self._last_step:
            raise ValueError(f"step {step} was written already (the last is {self._last_step})")
        self._last_step = step
        values = {name: _plain(value) for name, value in flatten(metrics).items()}
        with told(self._logdir / METRICS_FILE):
            self._file.write(_as_line({"step": step, "time": round(time.time(), 3), **values}))
            self._file.flush()
        numbers = {k: v for k, v in values.items() if isinstance(v, int | float)}
        self._to_sinks(lambda sink: sink.write(step, numbers))

    def video(self, step: int, name: str, path: Path, caption: str = "") -> None:
        """Show the video file `path` under `name` in TensorBoard (as a GIF) and W&B."""
        self._show(step, lambda sink: sink.video(step, name, path, caption))

    def figure(self, step: int, name: str, path: Path, caption: str = "") -> None:
        """Show the PNG file `path` under `name` in TensorBoard and W&B."""
        self._show(step, lambda sink: sink.figure(step, name, path, caption))

    def close(self) -> None:
        """Finish all files; a later `write` opens them again."""
        file, self._file = self._file, None
        self._to_sinks(lambda sink: sink.close())
        self._sinks = []
        if file is not None:
            with told(self._logdir / METRICS_FILE):
                file.close()

    def _show(self, step: int, call: "Callable[[_Sink], None]") -> None:
        if self._is_main and self._file is None:
            self.resume(step)
        self._to_sinks(call)

    def _to_sinks(self, call: "Callable[[_Sink], None]") -> None:
        """A sink that fails is left out from then on, with one warning: training goes on."""
        for sink in list(self._sinks):
            try:
                call(sink)
            except Exception as error:  # whatever the libraries raise
                self._sinks.remove(sink)
                logger.warning("no %s log from here on: %s", sink.name, _first_line(error))

    def _open_sinks(self, step: int, *, continues: bool) -> list["_Sink"]:
        sinks: list[_Sink] = []
        if self._tensorboard:
            try:
                sinks.append(_TensorBoard(self._logdir / "tensorboard", step))
            except ImportError:
                logger.warning("no TensorBoard log: pip install tensorboard")
            except Exception as error:  # whatever the library raises
                logger.warning("no TensorBoard log: %s", _first_line(error))
        if self._wandb is not None:
            try:
                sinks.append(_Wandb(self._wandb, self._logdir, continues=continues))
            except ImportError:
                logger.warning("no W&B log: pip install wandb (or train with --disable-wandb)")
            except Exception as error:  # whatever the library raises
                logger.warning("no W&B log: %s", _first_line(error))
        return sinks


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All steps of a run, oldest first, from its folder or its `metrics.jsonl`.

    A last line cut off by a crash is left out.

    Raises:
        UserError: there is no such file, or no step in it.
    """
    file = path / METRICS_FILE if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"{path} holds no {METRICS_FILE}; give the --logdir of a training run")
    lines = _read_lines(file)
    if not lines:
        raise UserError(f"{file} holds no step yet; wait for the first one")
    return lines


def flatten(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts and lists as one dict: `{"a": {"b": [1]}}` -> `{"a/b/0": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in metrics.items():
        inner: Any = dict(enumerate(value)) if isinstance(value, list | tuple) else value
        if isinstance(inner, Mapping):
            flat |= flatten(inner, f"{prefix}{key}/")
        else:
            flat[f"{prefix}{key}"] = inner
    return flat


def mean_over_ranks(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics, flattened, as plain numbers, each the mean over all ranks.

    0-d tensors are read in one transfer and reduced in one `all_reduce`. Every rank must give the
    same names. Texts stay this rank's own. Without a process group it only reads.
    """
    flat = flatten(metrics)
    tensors = {k: v.detach() for k, v in flat.items() if isinstance(v, Tensor)}
    numbers = {k: float(v) for k, v in flat.items() if isinstance(v, int | float)}
    values = torch.tensor(
        [*_read_tensors([*tensors.values()]), *numbers.values()], dtype=torch.float64
    )
    total = _sum_over_ranks(values)
    means = (total / _world()).tolist()
    return flat | dict(zip([*tensors, *numbers], means, strict=True))


class Means:
    """Means of metrics over the updates between two lines of the log, each over those that had it.

    What is added stays on its device, which nothing waits for, and on its rank until `read`.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor | float] = {}
        self._counts: dict[str, int] = {}
        self._reduced: dict[str, tuple[float, int]] = {}  # sums over updates of means over ranks

    def add(self, metrics: Mapping[str, Tensor | float]) -> None:
        """Count one update's numbers; every rank has to add the same names."""
        for name, value in metrics.items():
            own = value.detach().double() if isinstance(value, Tensor) else float(value)
            self._sums[name] = self._sums[name] + own if name in self._sums else own
            self._counts[name] = self._counts.get(name, 0) + 1

    def read(self) -> dict[str, float]:
        """The means over updates and ranks since the last `read`: every rank has to call it."""
        self._reduce()
        means = {name: total / count for name, (total, count) in self._reduced.items()}
        self._reduced = {}
        return means

    def state_dict(self) -> dict[str, list[float]]:
        """What `read` would count, as plain values: every rank has to call it."""
        self._reduce()
        return {name: [total, count] for name, (total, count) in self._reduced.items()}

    def load_state_dict(self, state: Mapping[str, Sequence[float]]) -> None:
        """Go on where `state_dict` was taken."""
        self._sums, self._counts = {}, {}
        self._reduced = {name: (total, int(count)) for name, (total, count) in state.items()}

    def _reduce(self) -> None:
        for name, total in mean_over_ranks(self._sums).items():
            before, count = self._reduced.get(name, (0.0, 0))
            self._reduced[name] = (before + total, count + self._counts[name])
        self._sums, self._counts = {}, {}


@torch.no_grad()
def latent_statistics(latents: Tensor) -> dict[str, Tensor]:
    """What collapse and stillness show in: 0-d tensors of latents `[B, F, C, H, W]`.

    mean and std of all elements; channel_std, the std of the per-channel means; motion =
    mean |x[t+1] - x[t]| / std (NaN for a single frame). Nothing waits for the device.
    """
    x = latents.float()
    std = x.std(correction=0)
    return {
        "mean": x.mean(),
        "std": std,
        "channel_std": x.mean(dim=(0, 1, 3, 4)).std(correction=0),
        "motion": x.diff(dim=1).abs().mean() / std.clamp(min=1e-8),
    }


class TimestepBuckets:
    """Mean loss by timestep; accumulated on the device, which nothing waits for until `read`."""

    def __init__(self, buckets: int = 10, highest: float = 1000.0) -> None:
        self._buckets = buckets
        self._width = highest / buckets
        self._totals: Tensor | None = None  # [2, buckets]: sums of losses, counts; of this rank
        self._reduced = torch.zeros(2, buckets, dtype=torch.float64)  # the same of all ranks

    @torch.no_grad()
    def add(self, timesteps: Tensor, losses: Tensor) -> None:
        """Count losses at these timesteps; both of one shape, any."""
        if timesteps.shape != losses.shape:
            raise ValueError(f"{timesteps.shape} timesteps but {losses.shape} losses")
        if self._totals is None:
            self._totals = torch.zeros_like(self._reduced, device=losses.device)
        bucket = (timesteps.flatten() / self._width).long().clamp(0, self._buckets - 1)
        loss = losses.flatten().double()
        self._totals.index_add_(1, bucket, torch.stack([loss, torch.ones_like(loss)]))

    def read(self) -> dict[str, float]:
        """The mean loss of each bucket since the last `read`, as `{"0-100": …}`; NaN if empty.

        Over the losses of all ranks, each with equal weight: every rank has to call it.
        """
        self._reduce()
        sums, counts = self._reduced
        self._reduced = torch.zeros_like(self._reduced)
        edges = [round(i * self._width) for i in range(self._buckets + 1)]
        names = [f"{low}-{high}" for low, high in pairwise(edges)]
        return dict(zip(names, (sums / counts).tolist(), strict=True))

    def state_dict(self) -> list[list[float]]:
        """What `read` would count, as plain values: every rank has to call it."""
        self._reduce()
        return self._reduced.tolist()

    def load_state_dict(self, state: Sequence[Sequence[float]] | None) -> None:
        """Go on where `state_dict` was taken; without one, from nothing."""
        empty = torch.zeros_like(self._reduced)
        self._totals = None
        self._reduced = empty if state is None else torch.tensor(state, dtype=torch.float64)

    def _reduce(self) -> None:
        totals = torch.zeros(2, self._buckets) if self._totals is None else self._totals
        self._reduced = self._reduced + _sum_over_ranks(totals.cpu().double())
        self._totals = None


class Timer:
    """Seconds per named phase: `with timer.phase("rollout"): …`.

    Of nested phases only the innermost counts, so that phases add up to at most the step. Waits
    for the GPU at the edges of a phase if `device` is one.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self._seconds: dict[str, float] = {}
        self._open: list[str] = []
        self.entered = 0  # phases so far
        self._left_in = ""  # the innermost phase that an error left
        self._whole = False
        self._started = self._since = time.perf_counter()

    @contextmanager
    def phase(self, name: str, *, whole: bool = False) -> Iterator[None]:
        """Count the time inside as `name`; with `whole` that of the phases inside, too."""
        self._charge()
        outside = self._whole
        self.entered += 1
        self._open.append(self._open[-1] if outside else name)
        self._whole = outside or whole
        try:
            yield
        except BaseException:
            self._left_in = self._left_in or self._open[-1]
            raise
        finally:
            self._charge()
            self._open.pop()
            self._whole = outside

    @property
    def now(self) -> str:
        """The innermost phase that is open, or that an error left; another thread may ask."""
        return self._left_in or next(reversed(self._open[:]), "between phases")

    def read(self) -> dict[str, float]:
        """Seconds of each phase since the last `read`, and of everything as `step`."""
        self._charge()
        seconds = {**self._seconds, "step": self._since - self._started}
        self._seconds, self._started = {}, self._since
        return seconds

    def _charge(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        if self._open:
            name = self._open[-1]
            self._seconds[name] = self._seconds.get(name, 0.0) + now - self._since
        self._since = now


class TrainingProgress:
    """A line with steps done, rate, time left, the newest losses and the health verdict."""

    def __init__(self, total: int | None, start: int = 0, *, enabled: bool = True) -> None:
        seconds = 0.5 if sys.stderr.isatty() else 30.0  # a log file gets few lines
        self._losses: dict[str, float] = {}
        self._bar = tqdm(
            total=total,
            initial=start,
            disable=not enabled,
            desc="training",
            unit="step",
            mininterval=seconds,
            dynamic_ncols=True,
        )

    def update(self, metrics: Mapping[str, Any], verdict: str = "") -> None:
        """One step is done; of `metrics` every `<network>/loss` is shown."""
        for name, value in metrics.items():
            if name.endswith("/loss"):
                self._losses[name.removesuffix("/loss")] = float(value)
        shown = [f"{name} {value:.4g}" for name, value in self._losses.items()]
        self._bar.set_postfix_str(", ".join([*shown, verdict] if verdict else shown), refresh=False)
        self._bar.update(1)

    def close(self) -> None:
        """Leave the last line standing."""
        self._bar.close()


class _Sink(Protocol):
    """A second place for the numbers of a run."""

    name: str

    def write(self, step: int, numbers: Mapping[str, float]) -> None: ...

    def video(self, step: int, name: str, path: Path, caption: str) -> None: ...

    def figure(self, step: int, name: str, path: Path, caption: str) -> None: ...

    def close(self) -> None: ...


class _TensorBoard:
    """Event files; on resume, events from `step` on are hidden."""

    name = "TensorBoard"

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(folder, purge_step=step)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def video(self, step: int, name: str, path: Path, caption: str) -> None:
        self._picture(step, name, caption, *_as_gif(path))

    def figure(self, step: int, name: str, path: Path, caption: str) -> None:
        from PIL import Image

        with Image.open(path) as image:
            self._picture(step, name, caption, path.read_bytes(), image.height, image.width)

    def _picture(
        self, step: int, name: str, caption: str, data: bytes, height: int, width: int
    ) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata

        image = Summary.Image(encoded_image_string=data, height=height, width=width, colorspace=3)
        told = SummaryMetadata(display_name=name, summary_description=caption)
        value = Summary.Value(tag=name, image=image, metadata=told)
        self._writer._get_file_writer().add_summary(Summary(value=[value]), step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """A W&B run whose id stays in `logdir`, so that a resumed training goes on in the same run.

    Without a login, which is never asked for (the other ranks would wait), or if it fails, the run
    is kept offline for `wandb sync`.
    """

    name = "W&B"

    def __init__(self, settings: WandbSettings, logdir: Path, *, continues: bool) -> None:
        import wandb

        self._wandb = wandb
        id_file = logdir / RUN_ID_FILE
        known = continues and id_file.is_file()
        run_id = id_file.read_text(encoding="utf-8").strip() if known else uuid.uuid4().hex
        folder = settings.save_dir or logdir
        make_folder(folder)
        options: dict[str, Any] = {
            "project": settings.project or "rolling-forcing",
            "entity": settings.entity,
            "name": logdir.name,
            "id": run_id,
            "resume": "allow",
            "dir": str(folder),
            "config": dict(settings.config),
        }
        try:
            if not settings.key and not wandb.login(host=settings.host, prompt=False, verify=False):
                raise ValueError("no login found")
            account: dict[str, Any] = {"base_url": settings.host, "api_key": settings.key}
            given = {name: value for name, value in account.items() if value}
            self._run = wandb.init(**options, settings=wandb.Settings(**given))
        except (wandb.errors.Error, ValueError, TypeError) as error:
            reason = _first_line(error)
            logger.warning("W&B: %s; the run is kept offline in %s/wandb", reason, folder)
            wandb.teardown()  # the failed start still holds the run's id
            self._run = wandb.init(**options, mode="offline")
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        write_text(id_file, f"{run_id}\n")

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log({"step": step, **numbers})

    def video(self, step: int, name: str, path: Path, caption: str) -> None:
        video = self._wandb.Video(str(path), caption=caption, format="mp4")
        self._run.log({"step": step, name: video})

    def figure(self, step: int, name: str, path: Path, caption: str) -> None:
        self._run.log({"step": step, name: self._wandb.Image(str(path), caption=caption)})

    def close(self) -> None:
        self._run.finish()


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The steps in a file; lines that are none (cut off by a crash) are left out and counted."""
    texts = path.read_bytes().splitlines() if path.is_file() else []
    lines = []
    for text in texts:
        try:
            line = json.loads(text)
            lines.append({"step": int(line["step"]), **line})
        except (ValueError, KeyError, TypeError):
            continue
    if len(lines) < len(texts):
        logger.warning("%s: left out %d broken lines", path, len(texts) - len(lines))
    return lines


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _as_line(values: Mapping[str, Any]) -> str:
    return json.dumps(values, ensure_ascii=False, allow_nan=False) + "\n"


def _plain(value: Any) -> str | int | float | None:
    """What JSON can hold: a text, a finite number, or None."""
    if value is None or isinstance(value, str | int):
        return value
    number = float(value)
    return number if math.isfinite(number) else None


def _read_tensors(tensors: list[Tensor]) -> list[float]:
    """The values of 0-d tensors; those of an accelerator in one transfer."""
    far = [t.device for t in tensors if t.device.type != "cpu"]
    device = far[0] if far else "cpu"
    return torch.stack([t.double().to(device) for t in tensors]).tolist() if tensors else []


def _world() -> int:
    there = dist.is_available() and dist.is_initialized()
    return dist.get_world_size() if there else 1


def _sum_over_ranks(values: Tensor) -> Tensor:
    """`values` of the CPU, summed over all ranks, on the CPU."""
    if _world() == 1:
        return values
    total = values.clone()
    dist.all_reduce(total)
    return total


def _as_gif(path: Path) -> tuple[bytes, int, int]:
    """A video file as an animated GIF of every second frame; its height and width."""
    from PIL import Image

    frames = []
    for chunk in read_video_chunks(path, GIF_STEP):
        frames.append(Image.fromarray(chunk[0].numpy()))
        frames[-1].thumbnail((GIF_WIDTH, GIF_WIDTH))
    first, *others = frames
    data, milliseconds = io.BytesIO(), round(1000 * GIF_STEP / frame_rate(path))
    first.save(data, "GIF", save_all=True, append_images=others, duration=milliseconds, loop=0)
    return data.getvalue(), first.height, first.width
