"""What a video is held against: the truth where a package knows it, else its own beginning."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

from evaluation.keeping import Property, Traces, trace
from evaluation.statistics import (
    BLOCK_FRAMES,
    FIRST_FRAMES,
    VERSION,
    Frames,
    FrameStatistics,
    VideoMeter,
    VideoReport,
    report_statistics,
    to_json,
)
from utils.errors import UserError

Result = dict[str, Any]
"""One measured video as plain data, as it stands in JSON: `prompt`, `seed`, `kind` (the name of the
meter that measured it), `report`, and what else the maker adds."""


class Curve(NamedTuple):
    """How a measure is drawn, second by second; `share`: from 0 to 1."""

    title: str
    share: bool = False


class Measuring(Protocol):
    """One video that is being measured; its frames are not kept."""

    def add(self, frames: Frames) -> None:
        """The next frames, uint8 [n, H, W, 3]; UserError if they are not such frames."""

    def report(self, *, fps: float, first: int, block: int, given: int = 0) -> Any:
        """The video is over: what was measured, a dataclass or plain data with `seconds`,
        `per_second` and, of the meter's `properties`, `kept` (`keeping.Traces`). `first` and
        `block` are the frames of its first and of its later blocks, `given`, if there are any,
        those that were not generated.

        UserError if it had too few frames, in all or per second.
        """


class Meter(Protocol):
    """How the videos of a kind are measured, and what is made of many of them."""

    @property
    def name(self) -> str:
        """The kind of its results."""

    @property
    def version(self) -> int:
        """Raised when a measure is new or its formula another: two are never mixed."""

    @property
    def main_figures(self) -> Mapping[str, Sequence[str]]:
        """Title -> names of measures, for people."""

    @property
    def curves(self) -> Mapping[str, Curve]:
        """Those of `per_second` and of `extra_curves` to draw, by name."""

    @property
    def properties(self) -> Mapping[str, Property]:
        """What a video should keep as it began, by name."""

    @property
    def least_fps(self) -> float:
        """The frame rate below which it cannot measure."""

    def start(self, prompt: str, *, height: int, width: int) -> Measuring | None:
        """Begin a video of this prompt; None if this meter cannot measure such a one."""

    def extra_measures(self, result: Result) -> Mapping[str, float]:
        """What is made of a result besides the numbers of its report; NaN: not known."""

    def extra_curves(self, results: Sequence[Result]) -> Mapping[str, list[float]]:
        """Curves of all videos together, in whole seconds, by name."""

    def groups(self, results: Sequence[Result]) -> Mapping[str, list[Result]]:
        """Parts of the results that are summed up by themselves, too, by title."""


@dataclass(frozen=True)
class FrameMeter:
    """Any video against its own beginning, by the statistics of its frames."""

    name: str = "video"
    version: int = VERSION
    least_fps: float = 0.0
    main_figures: Mapping[str, Sequence[str]] = field(
        default_factory=lambda: {
            "drift, last 5 s - first 5 s": (
                "drift.mean",
                "drift.std",
                "drift.contrast",
                "drift.sharpness",
                "drift.motion",
            ),
            "motion": ("motion",),
            "flicker": ("flicker.ratio", "brightness_flicker.ratio"),
            "speed of making": ("fps", "first_frame_s"),
        }
    )
    curves: Mapping[str, Curve] = field(
        default_factory=lambda: {
            "brightness": Curve("brightness (grey levels)"),
            "contrast": Curve("contrast (grey levels)"),
            "sharpness": Curve("sharpness (variance of the Laplacian)"),
            "change": Curve("change between frames (grey levels)"),
        }
    )
    properties: Mapping[str, Property] = field(
        default_factory=lambda: {
            "colour": Property("mean colour"),
            "contrast": Property("standard deviation of each channel, as logarithm"),
            "sharpness": Property("variance of the luma's Laplacian, as logarithm"),
            "texture": Property("detail lost in halving the luma, three times, as logarithm"),
        }
    )

    def start(self, prompt: str, *, height: int, width: int) -> Measuring:
        """See `Meter`; it measures any video."""
        return _Statistics()

    def extra_measures(self, result: Result) -> Mapping[str, float]:
        """See `Meter`: none."""
        return {}

    def extra_curves(self, results: Sequence[Result]) -> Mapping[str, list[float]]:
        """See `Meter`: none."""
        return {}

    def groups(self, results: Sequence[Result]) -> Mapping[str, list[Result]]:
        """See `Meter`: none."""
        return {}


@dataclass(frozen=True)
class _Report(VideoReport):
    """What was measured of a video, and what it kept."""

    kept: Traces


class _Statistics(VideoMeter):
    """See `Measuring`."""

    def report(self, *, fps: float, first: int, block: int, given: int = 0) -> _Report:
        """See `Measuring`."""
        seen = self.statistics()
        report = report_statistics(seen, fps=fps, first=first, block=block)
        return _Report(**vars(report), kept=traces(seen, fps=fps, given=given))


FRAMES = FrameMeter()


def traces(seen: FrameStatistics, *, fps: float, given: int = 0) -> Traces:
    """Of the properties of `FRAMES`, in one video (`keeping.trace`).

    Logarithms make a half as far as the double; a grey level is added to each before.
    """
    values = {
        "colour": seen.mean,
        "contrast": np.log(seen.std + 1),
        "sharpness": np.log(seen.sharpness[:, None] + 1),
        "texture": np.log(seen.texture + 1),
    }
    known = FRAMES.properties
    return {n: [trace(values[n], known[n], fps=fps, given=given)] for n in known}


def meter_settings(truth: Meter | None) -> dict[str, Any]:
    """What results depend on besides the videos: which meters measured them."""
    return {"truth": truth and truth.name, "meter": (truth or FRAMES).version}


def meters_by_kind(truth: Meter | None) -> dict[str, Meter]:
    """Every meter that results may be from, by the kind of these."""
    return {meter.name: meter for meter in (FRAMES, truth) if meter is not None}


class Judge:
    """Measures one video while it is made; the frames are not kept.

    It is held against the `truth` if that knows its prompt and size, else against its beginning.
    """

    def __init__(
        self,
        prompt: str,
        *,
        truth: Meter | None = None,
        first: int = FIRST_FRAMES,
        block: int = BLOCK_FRAMES,
        given: int = 0,
    ) -> None:
        """`first` and `block`: frames of its first and later blocks, for the flicker; `given`:
        frames that it continues, which what it keeps is held against.
        """
        self.prompt = prompt
        self.kind = FRAMES.name
        self._truth, self._spans = truth, {"first": first, "block": block}
        if given:
            self._spans["given"] = given
        self._measuring: Measuring | None = None

    def add(self, frames: Frames) -> None:
        """The next frames, uint8 [n, H, W, 3]."""
        if self._measuring is None:
            self._measuring = self._start(frames)
        self._measuring.add(frames)

    def report(self, fps: float) -> dict[str, Any]:
        """The video is over, of that rate: its report as plain data; UserError as `Measuring`."""
        if self._measuring is None:
            raise UserError("A video without frames cannot be measured.")
        return to_json(self._measuring.report(fps=fps, **self._spans))

    def _start(self, frames: Frames) -> Measuring:
        if self._truth is not None and frames.ndim == 4:
            height, width = frames.shape[1:3]
            known = self._truth.start(self.prompt, height=height, width=width)
            if known is not None:
                self.kind = self._truth.name
                return known
        return FRAMES.start(self.prompt, height=0, width=0)
