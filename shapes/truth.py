"""The shapes world as the truth for `evaluation`: what it knows, and what is told of it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from evaluation.keeping import Property, Traces
from evaluation.meters import Curve, Result
from evaluation.statistics import mean, per_second
from shapes import kept, meter
from shapes.world import UNSAID, parse_caption
from utils.errors import UserError

SURVIVAL_SECONDS = (5, 60, 300)
GROUPS = {1: "one shape", 2: "two shapes"}


@dataclass(frozen=True)
class _Report(meter.ShapesReport):
    """A video summed up, and what it kept of what its caption leaves open."""

    kept: Traces


class _Measuring(meter.ShapeMeter):
    """See `evaluation.meters.Measuring`."""

    def report(self, *, fps: float, first: int, block: int, given: int = 0) -> meter.ShapesReport:
        """See `Measuring`; UserError if the frame rate is too low to see motion."""
        measures = self.measures(fps)
        report = meter.report(measures, first=first, block=block)
        if not self.unsaid:
            return report
        report.per_second["grating"] = per_second(kept.wave_height(measures), fps).tolist()
        return _Report(**vars(report), kept=kept.traces(measures, given=given))


@dataclass(frozen=True)
class ShapesTruth:
    """See `evaluation.meters.Meter`: square videos whose prompt is a caption of this world."""

    unsaid: bool = UNSAID
    name: str = "shapes"
    version: int = meter.METER_VERSION
    least_fps: float = meter.LEAST_FPS
    main_figures: Mapping[str, Sequence[str]] = field(
        default_factory=lambda: {
            "right in the first 5 s": (
                "accuracy.background",
                "accuracy.colour",
                "accuracy.kind",
                "accuracy.size",
                "accuracy.direction",
                "accuracy.speed",
            ),
            "right in the last 5 s": tuple(f"late.{name}" for name in meter.LATE),
            "drift, last 5 s - first 5 s": (
                "drift.background_error",
                "drift.colour_error",
                "drift.area_ratio",
                "drift.artefacts",
                "drift.sharpness",
                "drift.right",
                "drift.motion",
                "drift.path",
            ),
            "motion (1: as the truth)": ("motion", "path"),
            "flicker": ("background_flicker.ratio", "brightness_flicker.ratio"),
            "never wrong in": tuple(f"survival.{seconds}s" for seconds in SURVIVAL_SECONDS),
            "right at": tuple(f"right_at.{seconds}s" for seconds in SURVIVAL_SECONDS),
            "speed of making": ("fps", "first_frame_s"),
        }
    )
    curves: Mapping[str, Curve] = field(
        default_factory=lambda: {
            "right": Curve("colour and kind right (share of frames)", share=True),
            "background_right": Curve("background right (share of frames)", share=True),
            "colour_error": Curve("colour error (grey levels)"),
            "background_error": Curve("background error (grey levels)"),
            "motion": Curve("motion (speed / prompt's)"),
            "path": Curve("path (1: as the world's law)"),
            "sharpness": Curve("sharpness (1/unit)"),
            "area_ratio": Curve("area / prompt's"),
            "artefacts": Curve("artefacts (share of pixels)"),
            "survival": Curve("survival (share of videos)", share=True),
        }
    )

    @property
    def properties(self) -> Mapping[str, Property]:
        """See `Meter`: what captions leave open, if they do."""
        return kept.PROPERTIES if self.unsaid else {}

    def start(self, prompt: str, *, height: int, width: int) -> _Measuring | None:
        """See `Meter`."""
        square_caption = height == width and is_caption(prompt)
        return _Measuring(prompt, unsaid=self.unsaid) if square_caption else None

    def extra_measures(self, result: Result) -> Mapping[str, float]:
        """See `Meter`: for each N of `SURVIVAL_SECONDS` that the video is long enough for,
        `survival.Ns`, 1 if it was never wrong in N seconds, and `right_at.Ns`, 1 if that is so, or
        if most of what can be judged in the five seconds before is right; NaN if nothing can.
        """
        report = result["report"]
        extra: dict[str, float] = {}
        if "survived_seconds" not in report:
            return extra
        for seconds in SURVIVAL_SECONDS:
            if report["seconds"] >= seconds:
                survived = report["survived_seconds"] >= seconds
                before = report["per_second"]["right"][seconds - 5 : seconds]
                right = 1.0 if survived else float(mean(np.array(before, float)))
                extra[f"survival.{seconds}s"] = float(survived)
                extra[f"right_at.{seconds}s"] = right if math.isnan(right) else float(right > 0.5)
        return extra

    def extra_curves(self, results: Sequence[Result]) -> Mapping[str, list[float]]:
        """See `Meter`: `survival`, the share of the videos never wrong in 1, 2, ... seconds, up to
        the shortest video.
        """
        lasted = np.array([result["report"]["survived_seconds"] for result in results])
        shortest = int(min(result["report"]["seconds"] for result in results))
        return {"survival": (lasted[:, None] >= np.arange(1, shortest + 1)).mean(0).tolist()}

    def groups(self, results: Sequence[Result]) -> Mapping[str, list[Result]]:
        """See `Meter`: videos of one shape and of two, where there are both."""
        groups: dict[str, list[Result]] = {title: [] for title in GROUPS.values()}
        for result in results:
            groups[GROUPS[len(parse_caption(result["prompt"]).shapes)]].append(result)
        return groups if all(groups.values()) else {}


def is_caption(prompt: str) -> bool:
    """Whether a prompt is a caption of the shapes world, so that the truth is known."""
    try:
        parse_caption(prompt)
    except UserError:
        return False
    return True
