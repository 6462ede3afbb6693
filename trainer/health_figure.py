"""The figure that goes with the verdict on a run: the numbers that it judges."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from trainer.health import LOSS, MOTION, RATIO, STD, Rules
from trainer.metrics import read_metrics
from utils.files import write_figure

FIGURE_FILE = "health.png"
RED = "#c0392b"


def draw_health(logdir: Path, sentence: str) -> Path | None:
    """Write `logdir/health.png` from the run's log; None without matplotlib, or without a number.

    A curve for each number that the verdict looks at; dashed, the values at which it changes.
    """
    if find_spec("matplotlib") is None:
        return None
    from matplotlib.figure import Figure

    history = read_metrics(logdir)
    found = {name: points(history, name) for name in (STD, MOTION, RATIO, LOSS)}
    shown = [name for name in found if found[name]]
    if not shown:
        return None
    figure = Figure(figsize=(4.6 * len(shown), 3.4), layout="constrained")
    figure.suptitle(sentence, fontsize=9, wrap=True)
    for axis, name in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        steps, values = zip(*found[name], strict=True)
        axis.plot(steps, values, lw=1.2, marker="o" if len(steps) == 1 else None)
        for level in limits(name, values[0], Rules()):
            axis.axhline(level, color=RED, lw=1, ls="--")
        axis.set_title(name)
        axis.set_xlabel("step")
        axis.grid(visible=True, color="#e6e8eb")
    path = logdir / FIGURE_FILE
    write_figure(path, figure)
    return path


def points(history: Sequence[Mapping[str, Any]], name: str) -> list[tuple[int, float]]:
    """Step and value of a number wherever it was logged and finite."""
    return [(line["step"], line[name]) for line in history if line.get(name) is not None]


def limits(name: str, start: float, rules: Rules) -> Sequence[float]:
    """The values at which the verdict changes, given the first one."""
    return {
        STD: tuple(start * ratio for ratio in rules.std_range),
        MOTION: (max(rules.min_motion, rules.min_motion_ratio * start),),
        RATIO: (rules.max_critic_ratio,),
    }.get(name, ())
