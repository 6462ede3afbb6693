"""Is this training healthy? One word and one sentence, from the metrics of the last updates.

In order of precedence (numbers are the defaults of `Rules`; every value is the median over the last
10 updates that logged it, a reference its first value: the student before it was updated):

- *latents collapsing*: `generated/std` is not within 0.5 to 2 times its reference, or not finite.
- *static*: `generated/motion` is below 0.05, or below 0.25 times its reference.
- *critic lags*: `critic/ratio`, the error of the critic's x_0 on noised samples of the student over
  that of the teacher's, is above 0.99 after 20 generator updates. A critic that has seen the
  student's samples must predict them better than a teacher that has not.

A metric that an objective does not log skips its rule.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean, median
from typing import Any, Literal

Word = Literal["healthy", "critic lags", "latents collapsing", "static"]

STD, MOTION, RATIO, LOSS = "generated/std", "generated/motion", "critic/ratio", "loss"


@dataclass(frozen=True)
class Rules:
    """Thresholds and spans; spans count the updates that logged the metric in question."""

    window: int = 10
    reference: int = 1
    grace: int = 20
    std_range: tuple[float, float] = (0.5, 2.0)
    min_motion: float = 0.05
    min_motion_ratio: float = 0.25
    max_critic_ratio: float = 0.99
    max_loss_ratio: float = 2.0


@dataclass(frozen=True)
class Verdict:
    """`word` for the progress line; `sentence` with the numbers, and what to try."""

    word: Word
    sentence: str

    def __str__(self) -> str:
        return f"{self.word}: {self.sentence}"


@dataclass
class Series:
    """What is kept of one metric: its first and its last finite values."""

    first: list[float] = field(default_factory=list)
    recent: list[float] = field(default_factory=list)
    count: int = 0
    finite: bool = True
    lowest: float | None = None

    def add(self, value: float | None, rules: Rules) -> None:
        """Take in the newest value; None (a null of the log) is a value that is not finite."""
        self.finite = value is not None and math.isfinite(value)
        if value is None or not self.finite:
            return
        self.count += 1
        self.first = [*self.first, value][: rules.reference]
        self.recent = [*self.recent, value][-rules.window :]
        if self.count >= rules.window:
            self.lowest = min(self.now, math.inf if self.lowest is None else self.lowest)

    @property
    def now(self) -> float:
        """Median of the recent values."""
        return median(self.recent)

    def relative(self, rules: Rules) -> float | None:
        """`now` over the mean of the first values; None while there are too few."""
        if self.count < rules.reference or not fmean(self.first):
            return None
        return self.now / fmean(self.first)


def collapsing(std: Series, rules: Rules) -> str | None:
    """Why the latents count as collapsing, or None."""
    if not std.finite:
        return "std of generated latents is not finite; go back to a checkpoint and lower lr"
    relative = std.relative(rules)
    low, high = rules.std_range
    if relative is None or low <= relative <= high:
        return None
    return (
        f"std of generated latents {std.now:.3g} is {relative:.2g} times that of the start "
        f"(healthy: {low:g} to {high:g}); go back to a checkpoint, then lower lr or raise "
        "dfake_gen_update_ratio"
    )


def static(motion: Series, rules: Rules) -> str | None:
    """Why the videos count as static, or None."""
    if not motion.count:
        return None
    relative = motion.relative(rules)
    if motion.now < rules.min_motion:
        why = f"below {rules.min_motion:g}"
    elif relative is not None and relative < rules.min_motion_ratio:
        why = f"{relative:.2g} times that of the start (healthy: from {rules.min_motion_ratio:g})"
    else:
        return None
    return (
        f"motion of generated latents {motion.now:.3g} is {why}; look at a sample, then try "
        "prompts with more motion, a smaller sink_size or a lower guidance_scale"
    )


def critic_lags(ratio: Series, rules: Rules) -> str | None:
    """Why the critic counts as lagging, or None."""
    if ratio.count <= rules.grace or ratio.now <= rules.max_critic_ratio:
        return None
    return (
        f"the critic's error on the student's samples is {ratio.now:.3g} times the teacher's "
        f"(healthy: up to {rules.max_critic_ratio:g}); raise dfake_gen_update_ratio or lr_critic"
    )


def judge(history: Sequence[Mapping[str, Any]], rules: Rules | None = None) -> Verdict:
    """The verdict after a whole list of metric dicts, such as `read_metrics` gives."""
    monitor = HealthMonitor(rules)
    for metrics in history:
        monitor.take(metrics)
    return monitor.verdict()


class HealthMonitor:
    """Follows a run step by step; its state is plain values and belongs into checkpoints."""

    def __init__(self, rules: Rules | None = None) -> None:
        self._rules = rules or Rules()
        self._series = {name: Series() for name in (STD, MOTION, RATIO, LOSS)}

    def update(self, metrics: Mapping[str, Any]) -> Verdict:
        """Take in the metrics of one step (flat names, plain numbers) and judge."""
        self.take(metrics)
        return self.verdict()

    def take(self, metrics: Mapping[str, Any]) -> None:
        """Take in the metrics of one step."""
        for name, series in self._series.items():
            if name in metrics:
                series.add(metrics[name], self._rules)

    def verdict(self) -> Verdict:
        """Judge what was taken in so far."""
        words: tuple[tuple[Word, str | None], ...] = (
            ("latents collapsing", collapsing(self._series[STD], self._rules)),
            ("static", static(self._series[MOTION], self._rules)),
            ("critic lags", critic_lags(self._series[RATIO], self._rules)),
        )
        for word, why in words:
            if why is not None:
                return Verdict(word, why)
        return Verdict("healthy", self._describe())

    def state_dict(self) -> dict[str, Any]:
        """All that later verdicts depend on."""
        return {name: asdict(series) for name, series in self._series.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self._series = {name: Series(**state[name]) for name in self._series}

    def _describe(self) -> str:
        """The judged numbers, where no rule fires."""
        parts = []
        for name, series in self._series.items():
            if series.count:
                relative = series.relative(self._rules)
                start = "" if relative is None else f" ({relative:.2g} times that of the start)"
                parts.append(f"{name} {series.now:.3g}{start if name in (STD, MOTION) else ''}")
        loss = self._series[LOSS]
        if loss.lowest and loss.now > self._rules.max_loss_ratio * loss.lowest:
            parts.append(f"the loss is {loss.now / loss.lowest:.2g} times its minimum: lower lr")
        return ", ".join(parts) or "nothing to judge yet"
