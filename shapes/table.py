"""The page of the ablations from stored results: what is claimed, tables, what each row is."""

import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.intervals import UNKNOWN, Interval, difference, mean_interval
from evaluation.keeping import FORMULA_LABELS, FORMULAS
from evaluation.statistics import mean
from shapes.kept import ERRORS, PROPERTIES, told_apart
from shapes.stored import BESIDE, COLUMNS, POINTS, Measured, read_run
from shapes.variants import (
    BEGINNINGS,
    BLOCK_BARE,
    EQUAL_SINK,
    ROLLING,
    ROWS,
    Comparison,
    comparisons,
)
from utils.errors import UserError

logger = logging.getLogger(__name__)

MARKS = ("<!-- ablations -->", "<!-- /ablations -->")
COMMON = 10
"""The length, in training clips, that every row is told at."""
PLATEAU = 0.15
"""Of a property that drifts as much within the first clip, rows are shown and not compared."""
SPEED = "speed.json"
SPEED_TIMES = 2
"""Length, in training clips, of the videos whose frames per second are told."""

OF_GRATING = ("phase", "direction")

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Results:
    """What is stored: by row and beginning the videos, by row the settings of each training seed.

    `rates`: frames per second of each row, round by round, on `device`.
    """

    measured: Mapping[tuple[str, str], Measured]
    settings: Mapping[str, Sequence[Settings]]
    rates: Mapping[str, Sequence[float]]
    device: str

    def primary(self, key: str) -> Measured | None:
        """A row's videos that go on from a true prefix."""
        return self.measured.get((key, "true"))

    def loses_early(self, key: str, name: str) -> bool:
        """Whether a row is known not to keep a property within the first clip."""
        seen = self.primary(key)
        if seen is None:
            return False
        return bool(mean(seen.curve(name)[..., POINTS.index(1)].ravel()) >= PLATEAU)

    def lacks_grating(self, key: str, times: int = COMMON) -> bool:
        """Whether a row's grating is known to be less than half as high as the world's."""
        seen = self.primary(key)
        return seen is not None and bool(seen.interval("grating", POINTS.index(times)).mean < 0.5)


def read_results(folder: Path, of_today: Callable[[Path, str, Settings], bool]) -> Results | None:
    """Of each row the training seeds from the first on, as far as they are there, `of_today`, and
    of videos of one length; None if nothing is.
    """
    measured: dict[tuple[str, str], Measured] = {}
    settings: dict[str, list[Settings]] = {}
    for key, row in ROWS.items():
        for beginning in BEGINNINGS:
            runs: list[Any] = []
            for seed in row.seeds:
                path = folder / f"{key}-{seed}-{beginning}.json"
                run = read_run(path) if path.is_file() else None
                if run is None or not of_today(path, key, run["settings"]):
                    break
                if run["settings"]["times"] != (runs or [run])[0]["settings"]["times"]:
                    logger.warning("%s has another length than the seeds before: left out", path)
                    break
                runs.append(run)
            if runs:
                measured[key, beginning] = Measured([run["videos"] for run in runs])
                settings.setdefault(key, [run["settings"] for run in runs])
    if not measured:
        return None
    speed = read_speed(folder / SPEED)
    rates = {
        key: rounds
        for key, rounds in speed["frames_per_second"].items()
        if key in settings and speed["of"].get(key) == settings[key][0]["config_hash"]
    }
    return Results(measured, settings, rates, speed["device"])


def read_speed(path: Path) -> dict[str, Any]:
    """Frames per second of rows; none if they were not measured."""
    if not path.is_file():
        return {"of": {}, "device": "", "frames_per_second": {}}
    try:
        speed = json.loads(path.read_text(encoding="utf-8"))
        known = speed.keys() >= {"of", "device", "frames_per_second"}
    except (ValueError, AttributeError):
        known = False
    if not known:
        raise UserError(f"{path} holds no frames per second; delete it, and they are measured anew")
    return speed


def at(seen: Measured, name: str, times: int) -> Interval:
    """Interval of a property's drift, or of what stands beside it, at one of the points."""
    return seen.interval(name, POINTS.index(times))


# --- what is claimed -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """How two rows differ at the greatest length that both reach, by property and measure.

    Nothing is claimed of the properties that are `lost_early`, see `PLATEAU`, nor of those that are
    `of_little`: they tell where a grating is, and there is hardly one.
    """

    comparison: Comparison
    times: int
    differences: Mapping[str, Interval]
    lost_early: Sequence[str]
    of_little: Sequence[str]

    @property
    def seeds(self) -> int:
        """Training seeds that both have."""
        return next(iter(self.differences.values())).seeds

    def compares(self, name: str) -> bool:
        """Whether a difference is known, and of what both rows keep at first."""
        known = bool(np.isfinite(self.differences[name].mean))
        return known and name not in (*self.lost_early, *self.of_little)

    def told(self, name: str) -> bool:
        """Whether a difference is claimed."""
        return self.compares(name) and told_apart(name, self.differences[name])

    def less(self, names: Sequence[str]) -> list[str]:
        """Those of the names in which the first row has less."""
        return [n for n in names if self.told(n) and self.differences[n].mean < 0]

    def more(self, names: Sequence[str]) -> list[str]:
        """Those of the names in which it has more."""
        return [n for n in names if self.told(n) and self.differences[n].mean > 0]


def compare(results: Results, comparison: Comparison) -> Finding | None:
    """What there is to say of two rows that go on from true prefixes; None if one is missing."""
    one, other = results.primary(comparison.one), results.primary(comparison.other)
    if one is None or other is None:
        return None
    common = one.common(other)
    if not common:
        return None
    keys = (comparison.one, comparison.other)
    lost = [n for n in PROPERTIES if any(results.loses_early(key, n) for key in keys)]
    faint = any(results.lacks_grating(key, common[-1]) for key in keys)
    of_little = OF_GRATING if faint else ()
    return Finding(comparison, common[-1], one.minus(other, common[-1]), lost, of_little)


LOST_EARLY = f"a row loses {PLATEAU} or more within the first clip"


def verdict(results: Results) -> str:
    """Whether the rolling window keeps more than block by block, at equal sink, and of what this
    is not asked.
    """
    sentences, lost = [], dict[str, list[str]]()
    for comparison in EQUAL_SINK:
        where = comparison.title.rpartition(", ")[2]
        found = compare(results, comparison)
        if found is None:
            sentences.append(f"{where.capitalize()}, nothing is known yet: a row is missing.")
        elif len(found.lost_early) == len(PROPERTIES):
            sentences.append(f"{where.capitalize()}, nothing is compared: {LOST_EARLY}.")
        else:
            sentences.append(window_sentence(where, found))
            if found.lost_early:
                lost.setdefault(listed_words(found.lost_early), []).append(where)
    for names, places in lost.items():
        where = "" if len(places) == len(EQUAL_SINK) else f", {listed_words(places)}"
        sentences.append(f"Nothing is claimed of {names}{where}: {LOST_EARLY}.")
    return " ".join(sentences)


def window_sentence(where: str, found: Finding) -> str:
    """What the rolling window adds, without or with a sink."""
    names = [name for name in PROPERTIES if found.compares(name)]
    less, more = found.less(names), found.more(names)
    rest = [name for name in names if name not in (*less, *more)]
    if less and not more:
        start = f"rolling drifts less than block by block in {listed_words(less)}"
    else:
        start = "rolling does not beat block by block here in what it keeps"
    parts = [
        f"{word}: {listed(found, chosen)}"
        for word, chosen in (("less", less), ("more", more), ("not distinguished", rest))
        if chosen
    ]
    if beside := [name for name in BESIDE if found.told(name)]:
        parts.append(f"beside it: {listed(found, beside)}")
    seeds = counted(found.seeds, "training seed")
    told = f"at {found.times}x; {'; '.join(parts)}; {seeds}"
    return f"**{where.capitalize()}, {start}** ({told})."


def listed_words(words: Sequence[str]) -> str:
    """Words with commas, and an `and` before the last."""
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last


def listed(found: Finding, names: Sequence[str]) -> str:
    """Names with what they differ by."""
    return ", ".join(
        f"{BESIDE.get(name, name)} {found.differences[name].text(sign=True)}" for name in names
    )


# --- the page ------------------------------------------------------------------------------------


def make_page(results: Results) -> str:
    """Markdown: what is claimed, how it was measured, the tables, what each row is."""
    parts = [verdict(results), protocol_text(results)]
    for name, known in PROPERTIES.items():
        title = f"### Drift of {name}: {known.title}"
        note = f"Claimed are differences above {3 * ERRORS[name]:g}, three times the meter's error."
        parts += [title, note, property_table(results, name)]
    parts += ["### Beside it, from a true prefix", BESIDE_NOTE, beside_table(results)]
    parts += ["### Published formulas, from noise", formula_note(), formula_table(results)]
    parts += ["### What differs", difference_note(results), difference_table(results)]
    parts += ["### A fifth of the drift", fifth_text(results)]
    parts += ["### The rows", row_list(results)]
    return "\n\n".join(parts) + "\n"


BESIDE_NOTE = (
    "Right: share of the frames of that clip in which every shape has its colour and kind (and of "
    "those with the right background). Motion: speed over the prompt's. Path: 1 if each half "
    "second follows the world's law, 0 for a still picture. Height of the grating: over that of a "
    "true one. Flicker: change at block boundaries over that inside blocks, of the whole video. "
    "Frames/s: the median of rounds in which all rows took turns, one video at a time, of "
    f"{SPEED_TIMES} training clips, text and decoding included, with the least and the most."
)


def difference_note(results: Results) -> str:
    """What is compared, what is claimed, and how much of it chance may have made."""
    found = [finding for each in comparisons() if (finding := compare(results, each)) is not None]
    compared = [each.told(n) for each in found for n in each.differences if each.compares(n)]
    faint = ", nor what is marked ³, for a row has hardly a grating there"
    return (
        "The first row minus the second, paired by scene, noise and number of the training seed, "
        "at the greatest length that both reach. In bold what is claimed: the interval leaves out "
        "0, and the difference is above three times the meter's error. What is marked ² is not "
        "compared, for a row loses too much of it within the first clip"
        f"{faint * any(each.of_little for each in found)}. Everything else is not "
        f"distinguished. Of {len(compared)} differences that are compared {sum(compared)} are "
        "claimed; each interval may miss by itself once in twenty times, so those that only just "
        "leave out 0 are weak."
    )


def protocol_text(results: Results) -> str:
    """How everything was measured."""
    scenes = {len(videos) for seen in results.measured.values() for videos in seen.seeds}
    number = " or ".join(map(str, sorted(scenes)))
    clip = next(iter(results.settings.values()))[0]["clip_seconds"]
    lines = [
        f"{number} scenes of each row and training seed, none of which training, its monitors or "
        f"any decision saw. Videos go on from a true prefix of one block (and, where it says so, "
        f"start from noise); 1x is the length of a training clip, {clip:.1f} s, and 10x the tenth "
        "such stretch. Drift is the distance of a property from its value in the prefix (from "
        "noise: in the first second) over its spread over clips: 0 is kept, about 1 another "
        "clip's. Gain is the regression of the later value on the first: 1 kept, above 1 "
        "amplified, 0 forgotten; variety is the spread of the generated values over that of true "
        "clips. In brackets are 95 % intervals by a bootstrap over training seeds and scenes "
        "(`evaluation/intervals.py`); of rows with one training seed, marked ¹, over scenes alone, "
        "which says nothing of another training.",
        "All distillations took equally many operations, so their numbers of steps differ.",
    ]
    if any(results.loses_early(key, name) for key in rows_of(results) for name in PROPERTIES):
        lines.append(
            f"A property that a row does not keep within the first clip (drift of {PLATEAU} or "
            "more, marked ²) is shown, and nothing is claimed of it."
        )
    if any(results.lacks_grating(key) for key in rows_of(results)):
        lines.append(
            f"Where the grating is less than half as high as the world's at {COMMON}x (marked ³), "
            "its phase and direction are those of little."
        )
    return " ".join(lines)


def row_title(results: Results, key: str, seen: Measured | None) -> str:
    """A row's name, marked where what is told of it is of one training seed."""
    single = alone(seen) if seen is not None else len(results.settings[key]) == 1
    return ROWS[key].title + "¹" * single


def alone(seen: Measured) -> bool:
    """Whether videos are of one training seed."""
    return len(seen.seeds) == 1


def rows_of(results: Results) -> list[str]:
    """Keys of the rows that are there, in order."""
    return [key for key in ROWS if any(key == there for there, _ in results.measured)]


def property_table(results: Results, name: str) -> str:
    """Of one property: drift over time from a true prefix, gain, variety, and drift from noise."""
    heads = [*(f"{times}x" for times in COLUMNS), f"gain, {COMMON}x", f"variety, {COMMON}x"]
    lines = head(["row", *heads, f"from noise, {COMMON}x"])
    if rows := [seen for key in rows_of(results) if (seen := results.primary(key))]:
        truth = number(rows[0].first_variety(name))
        lines.append(
            markdown_row(["the true prefixes", *[UNKNOWN] * (len(COLUMNS) + 1), truth, UNKNOWN])
        )
    for key in rows_of(results):
        true, noise = (results.measured.get((key, start)) for start in BEGINNINGS)
        cells = [shown_at(true, name, times) for times in COLUMNS]
        cells += [number(true.gain(name, COMMON)) if true else UNKNOWN]
        cells += [number(true.variety(name, COMMON)) if true else UNKNOWN]
        cells += [shown_at(noise, name, COMMON)]
        mark = " ²" * results.loses_early(key, name)
        mark += " ³" * (name in OF_GRATING and results.lacks_grating(key))
        if noise is not None and alone(noise) and true is not None and not alone(true):
            cells[-1] += "¹"
        title = row_title(results, key, true or noise)
        lines.append(markdown_row([title + mark, *cells]))
    return "\n".join(lines)


def beside_table(results: Results) -> str:
    """Prompt, motion, path and flicker, frames per second, what training took."""
    last = COLUMNS[-1]
    heads = [f"{title}, {COMMON}x" for title in BESIDE.values()]
    heads += [f"{BESIDE[name]}, {last}x" for name in ("right", "motion")]
    lines = head(["row", *heads, "flicker", "frames/s", "steps", "TFLOP of training"])
    for key in rows_of(results):
        seen = results.primary(key)
        cells = [shown_at(seen, name, COMMON) for name in BESIDE]
        cells += [shown_at(seen, name, last) for name in ("right", "motion")]
        cells.append(mean_interval(seen.flicker()).within(0).text() if seen else UNKNOWN)
        cells.append(rate(results.rates.get(key, ())))
        settings = results.settings[key][0]
        distilled = "steps" in settings
        cells.append(f"{settings['steps']:,}" if distilled else UNKNOWN)
        cells.append(f"{settings['operations'] / 1e12:.1f}" if distilled else UNKNOWN)
        lines.append(markdown_row([row_title(results, key, seen), *cells]))
    device = f"\n\nFrames/s on {results.device}." if results.device else ""
    return "\n".join(lines) + device


def formula_table(results: Results) -> str:
    """Each property by the published formulas, over whole videos from noise."""
    lines = head(
        ["row", *(f"{n}, {label}" for n in PROPERTIES for label in FORMULA_LABELS.values())]
    )
    for key in rows_of(results):
        seen = results.measured.get((key, "noise"))
        cells = [
            mean_interval(seen.formula(name, formula)).within(0).text() if seen else UNKNOWN
            for name in PROPERTIES
            for formula in FORMULAS
        ]
        lines.append(markdown_row([row_title(results, key, seen), *cells]))
    return "\n".join(lines)


def formula_note() -> str:
    """Where the formulas are from."""
    told = "; ".join(FORMULAS.values())
    return f"Distance over the spread, as drift is: {told}."


def difference_table(results: Results) -> str:
    """Every comparison of rows that are there."""
    lines = head(["what differs", "at", "seeds", *PROPERTIES, *BESIDE.values()])
    for comparison in comparisons():
        found = compare(results, comparison)
        if found is None:
            continue
        cells = [claim(found, name) for name in found.differences]
        start = [comparison.title, f"{found.times}x", str(found.seeds)]
        lines.append(markdown_row([*start, *cells]))
    return "\n".join(lines)


def fifth_text(results: Results) -> str:
    """Whether the method drifts at most a fifth as far as block by block without a sink, and what
    becomes of the prompt and of motion.
    """
    found = compare(results, Comparison("both", ROLLING.key, BLOCK_BARE.key))
    if found is None:
        return "A row is missing."
    one, other = (results.measured[row.key, "true"] for row in (ROLLING, BLOCK_BARE))
    point, cells = POINTS.index(found.times), []
    for name in PROPERTIES:
        over = difference(one.curve(name)[..., point], other.curve(name)[..., point] / 5)
        cells.append(f"{name} {over.text(sign=True)}{' ²' * (name in found.lost_early)}")
    right, motion = found.differences["right"], at(one, "motion", found.times)
    return (
        f"Drift of {ROLLING.title} minus a fifth of that of {BLOCK_BARE.title}, at {found.times}x: "
        f"{', '.join(cells)}. Where the whole interval is below 0 it drifts less than a fifth as "
        f"far. Colours and kinds right: {right.text(sign=True)} against it. "
        f"Motion: {motion.text()}."
    )


def claim(found: Finding, name: str) -> str:
    """A difference, in bold if it is claimed, marked if nothing can be."""
    text = found.differences[name].text(sign=True)
    if text == UNKNOWN:
        return text
    if name in found.lost_early:
        return f"{text} ²"
    if name in found.of_little:
        return f"{text} ³"
    mean, space, ends = text.partition(" ")
    return f"**{mean}**{space}{ends}" if found.told(name) else f"not distinguished, {text}"


def row_list(results: Results) -> str:
    """What each row is, and what it is made of."""
    lines = []
    for key in rows_of(results):
        row, settings = ROWS[key], results.settings[key][0]
        changes = "".join(f", {change}" for change in settings["overrides"])
        weights = f"{'trained' if settings['trained'] else 'weights'} `{settings['weights']}`"
        parts = f"`{settings['config']}`{changes}, {weights}"
        hashes = ", ".join(each["checkpoint_hash"][:8] for each in results.settings[key])
        lines.append(f"- **{row.title}** ({parts}, {hashes}): {row.why}.")
    missing = [f"{row.title} (`{key}`)" for key, row in ROWS.items() if key not in results.settings]
    if missing:
        lines += ["", f"Not measured, or of other weights or configs: {', '.join(missing)}."]
    return "\n".join(lines)


# --- cells ---------------------------------------------------------------------------------------


def shown_at(seen: Measured | None, name: str, times: int) -> str:
    """`mean [low, high]` at a length; unknown where the videos are shorter, or there are none."""
    return UNKNOWN if seen is None else at(seen, name, times).text()


def number(value: float) -> str:
    """A number; unknown where there is none."""
    return UNKNOWN if np.isnan(value) else f"{value:.2f}"


def rate(rounds: Sequence[float]) -> str:
    """The median of some rounds, and their ends."""
    if not rounds:
        return UNKNOWN
    return f"{np.median(rounds):.0f} [{min(rounds):.0f}, {max(rounds):.0f}]"


def counted(number: int, noun: str) -> str:
    """A number of things, in words."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def head(titles: Sequence[str]) -> list[str]:
    """The first two lines of a table: all but the first column to the right."""
    return [markdown_row(titles), markdown_row(["---", *("---:" for _ in titles[1:])])]


def markdown_row(cells: Sequence[str]) -> str:
    """One line of a table."""
    return f"| {' | '.join(cells)} |"


def split_page(page: Path) -> tuple[str, str]:
    """What stands before and after the marks; UserError if they are not there once."""
    try:
        text = page.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"Cannot read {page}: {error.strerror}.") from error
    pattern = f"(?s)(.*){re.escape(MARKS[0])}.*{re.escape(MARKS[1])}(.*)"
    found = re.fullmatch(pattern, text)
    if found is None or any(text.count(mark) != 1 for mark in MARKS):
        raise UserError(f"{page} needs one {MARKS[0]} and one {MARKS[1]} after it")
    return found[1], found[2]
