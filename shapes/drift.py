"""Does a model keep what its prompt leaves open? Videos that go on from true clips, for long.

    python -m shapes.drift --config_path configs/shapes/rolling_forcing.yaml \\
        --checkpoint_path checkpoints/shapes_rolling_forcing.pt --times 20 --json out.json

Each scene's first blocks are given as true frames, and the model goes on to `--times` the length of
its training clips. What captions leave open is read from the frames and held against its value in
the given ones (`evaluation/keeping.py`; docs/shapes.md has the formulas). `--given 0` starts from
noise, where a video is held against its own first second. The scenes are none that training or its
monitors ever draw. Results are kept batch by batch (`--batch`), so the same command goes on where
it was stopped; under torchrun the ranks share the scenes. `--against other.json`, the figures of
another model with the same scenes and noise, tells how the two differ, paired by scene.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # run by its path: the tree that it lies in comes first
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evaluation.intervals import Interval
from evaluation.meters import Judge, Result
from evaluation.results import ResultLog, summarise
from evaluation.statistics import to_json
from shapes.kept import ERRORS, PROPERTIES, told_apart
from shapes.playing import add_model_flags, describe_model, open_model
from shapes.stored import BESIDE, COLUMNS, POINTS, Measured, Video, sum_up
from shapes.truth import ShapesTruth
from shapes.world import Scene, render, sample_scene
from utils.cli import check_outputs, parse_command, run_main, set_up_logging
from utils.config import fingerprint
from utils.distributed import Ranks
from utils.errors import UserError
from utils.files import write_json

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline import VideoPipeline

TRUTH = ShapesTruth(unsaid=True)
SCENE_SEED, TEST_SEED = 31_415, 27_182
"""Of scenes to decide by, and of those of the ablations, which no decision has seen.

No data set of a training, no prompt of an evaluation has either.
"""

TOLD = ("late.right", "late.motion", "late.path", "background_flicker.ratio")
"""What is told beside what is kept: prompt, motion, path in the last five seconds, flicker."""


@dataclass(frozen=True)
class Protocol:
    """How long videos are made, and from what.

    given: blocks of true frames that a video goes on from; 0: from noise. times: its length over
    that of a training clip; clip: latent frames of the latter. batch: videos made together, which
    changes none of them. scene_seed: of what the scenes are drawn from.
    """

    scenes: int = 16
    given: int = 1
    times: int = 20
    clip: int = 21
    seed: int = 0
    batch: int = 8
    scene_seed: int = SCENE_SEED

    def scene(self, index: int) -> Scene:
        """Scene number `index`, with what its caption leaves open."""
        return sample_scene(self.scene_seed, index, split="heldout", unsaid=True)


Keep = Callable[[int, Result], None]


def measure_drift(pipe: VideoPipeline, protocol: Protocol, keep: Keep, left: Sequence[int]) -> None:
    """Make and measure these scenes; `keep` gets the number of each and its result.

    UserError for a model whose videos the meter cannot measure.
    """
    for start in range(0, len(left), protocol.batch):
        part = left[start : start + protocol.batch]
        results = continued(pipe, protocol, part)
        for index, result in zip(part, results, strict=True):
            keep(index, result)


def given_frames(pipe: VideoPipeline, protocol: Protocol) -> int:
    """Video frames that a video goes on from; 0: from noise."""
    return pipe.shape.video_frames(pipe.layout.start(protocol.given))


def continued(pipe: VideoPipeline, protocol: Protocol, numbers: Sequence[int]) -> list[Result]:
    """Results of these scenes, made in one batch; their frames are not kept."""
    scenes = [protocol.scene(number) for number in numbers]
    given = given_frames(pipe, protocol)
    first, block = map(pipe.setup.block_video_frames, (0, 1))
    judges = [Judge(s.caption, truth=TRUTH, first=first, block=block, given=given) for s in scenes]
    for frames in play(pipe, protocol, numbers):
        for judge, shown in zip(judges, frames.numpy(), strict=True):
            judge.add(shown)
    return [
        {
            "prompt": s.caption,
            "seed": protocol.seed,
            "kind": j.kind,
            "report": j.report(pipe.setup.fps),
        }
        for s, j in zip(scenes, judges, strict=True)
    ]


def play(pipe: VideoPipeline, protocol: Protocol, numbers: Sequence[int]) -> Iterator[Tensor]:
    """Videos of these scenes in one batch, a block at a time: uint8 `[B, n, S, S, 3]`."""
    import torch

    from pipeline.prefix import Prefix

    scenes = [protocol.scene(number) for number in numbers]
    given, fps, prefix = given_frames(pipe, protocol), pipe.setup.fps, None
    if given:
        clips = (render(scene, given, size=pipe.shape.height, fps=fps) for scene in scenes)
        parts = [pipe.encode_prefix(video=torch.from_numpy(clip)) for clip in clips]
        prefix = Prefix(torch.cat([part.latents for part in parts if part is not None]))
    with pipe.open_stream(
        pipe.encode_prompts([scene.caption for scene in scenes]),
        seed=protocol.seed,
        num_latent_frames=whole_blocks(pipe, protocol),
        samples=list(numbers),
        prefix=prefix,
    ) as stream:
        while (frames := stream.next_batch()) is not None:
            yield frames


def whole_blocks(pipe: VideoPipeline, protocol: Protocol) -> int:
    """Latent frames of a video: as many as asked for, and no more than fill its last block."""
    return pipe.layout.start(pipe.layout.blocks_for(protocol.times * protocol.clip))


# --- what becomes of it --------------------------------------------------------------------------


def drift_rows(videos: Sequence[Video]) -> dict[str, dict[str, Any]]:
    """Of each property, what is kept at each of `COLUMNS` that the videos reach.

    `drift`, and the ends of its 95 % interval over the videos `low` and `high`, `gain`, `variety`:
    means over the seconds of the k-th clip that were generated. `error`: the meter's own.
    """
    measured = Measured([videos])
    rows: dict[str, dict[str, Any]] = {}
    for name in PROPERTIES:
        found = measured.interval(name)
        row: dict[str, Any] = {"error": ERRORS[name]}
        for times in filter(measured.reaches, COLUMNS):
            at = POINTS.index(times)
            row[f"{times}x"] = {
                "drift": float(found.mean[at]),
                "low": float(found.low[at]),
                "high": float(found.high[at]),
                "gain": measured.gain(name, times),
                "variety": measured.variety(name, times),
            }
        rows[name] = row
    return rows


def difference_lines(found: Mapping[int, Mapping[str, Interval]]) -> str:
    """Differences by length for people, with a star where they may be claimed (`told_apart`)."""
    lines = [f"{'difference [95 %]':<30}" + "".join(f"{f'{times}x':>34}" for times in found)]
    for name in (*PROPERTIES, *BESIDE):
        cells = (
            at[name].text(sign=True, digits=3) + (" *" if told_apart(name, at[name]) else "  ")
            for at in found.values()
        )
        lines.append(f"{name:<30}" + "".join(f"{cell:>34}" for cell in cells))
    return "\n".join([*lines, "* not by chance, and more than three times the meter's error"])


@dataclass(frozen=True)
class Other:
    """The figures of `--against`: of the same scenes and noise."""

    path: Path
    settings: Mapping[str, Any]
    videos: Sequence[Video]

    @classmethod
    def read(cls, path: Path) -> Other:
        """UserError for another file."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            told = content["settings"]
            seconds = told["clip_seconds"], told["given_seconds"]
            videos = [
                sum_up(each, number, *seconds) for number, each in enumerate(content["videos"])
            ]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"--against {path} holds no figures of this command") from error
        return cls(path, told, videos)

    def check(self, settings: Mapping[str, Any]) -> None:
        """UserError unless its videos can be paired with those of these settings."""
        names = ("given", "clip", "seed", "scene_seed", "meter", "clip_seconds", "given_seconds")
        for name in names:
            if self.settings.get(name) != settings[name]:
                raise UserError(
                    f"--against {self.path} has {name}={self.settings.get(name)}, not "
                    f"{settings[name]}: no pairs"
                )

    def differences(self, videos: Sequence[Video]) -> dict[int, dict[str, Interval]]:
        """Of these videos, minus its own: by length (`Measured.minus`)."""
        one, other = Measured([videos]), Measured([self.videos])
        return {times: one.minus(other, times) for times in one.common(other)}


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The rows for people: drift [95 % interval] (gain, variety) at each length."""
    columns = [name for name in next(iter(rows.values())) if name != "error"]
    lines = [f"{'drift [95 %] (gain, variety)':<30}" + "".join(f"{c:>34}" for c in columns)]
    for name, row in rows.items():
        title = f"{name} (meter {row['error']:g})"
        lines.append(f"{title:<30}" + "".join(f"{_cell(row[c]):>34}" for c in columns))
    return "\n".join(lines)


def _cell(kept: Mapping[str, float]) -> str:
    drift, low, high, gain, variety = (kept[n] for n in ("drift", "low", "high", "gain", "variety"))
    return f"{drift:.2f} [{low:.2f}, {high:.2f}] ({gain:.2f}, {variety:.2f})"


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add, usual = parser.add_argument, Protocol()
    add("--scenes", type=int, default=usual.scenes, help="how many (%(default)s)")
    add("--given", type=int, default=usual.given, help="blocks of true frames (%(default)s)")
    add("--times", type=int, default=usual.times, help="length, in training clips (%(default)s)")
    add("--clip", type=int, default=usual.clip, help="latent frames of one (%(default)s)")
    add("--seed", type=int, default=usual.seed, help="of the noise (%(default)s)")
    add("--batch", type=int, default=usual.batch, help="videos made together (%(default)s)")
    what = f"of the scenes (%(default)s; {TEST_SEED}: those of the ablations, not to decide by)"
    add("--scene_seed", type=int, default=usual.scene_seed, help=what)
    add("--against", type=Path, metavar="JSON", help="tell differences from these figures, too")
    add_model_flags(parser)
    return parser


def main(argv: Sequence[str]) -> int:
    """Go on, measure, print a table."""
    args = parse_command(build_parser(), argv)
    set_up_logging(quiet=True)
    if min(args.scenes, args.times, args.clip, args.batch) < 1 or args.given < 0:
        raise UserError("--scenes, --times, --clip and --batch must be at least 1, --given 0")
    check_outputs(args.json)
    other = None if args.against is None else Other.read(args.against)
    ranks = Ranks.from_environment()
    if ranks.world > 1 and args.json is None:
        raise UserError("several processes share their results beside --json FILE; give one")
    pipe = open_model(args, ranks)
    protocol = Protocol(**{field.name: vars(args)[field.name] for field in fields(Protocol)})
    if whole_blocks(pipe, protocol) <= pipe.layout.start(protocol.given):
        raise UserError(f"--given {args.given} leaves nothing of --times {args.times} to make")
    settings = {**asdict(protocol), **describe_model(args, pipe), "meter": TRUTH.version}
    of_each = {name: value for name, value in settings.items() if name not in ("scenes", "batch")}
    log = ResultLog(args.json, fingerprint(of_each), ranks.rank) if args.json is not None else None
    clip, given = pipe.shape.video_frames(protocol.clip), given_frames(pipe, protocol)
    settings |= {"clip_seconds": clip / pipe.setup.fps, "given_seconds": given / pipe.setup.fps}
    if other is not None:
        other.check(settings)
    results = measure_left(pipe, protocol, log, ranks)
    if results is not None:
        finish(args, settings, results, other)
    return 0


def measure_left(
    pipe: VideoPipeline, protocol: Protocol, log: ResultLog | None, ranks: Ranks
) -> list[Result] | None:
    """Make and measure this rank's share of what the log does not have; the results of all scenes
    if it is for this rank to sum them up.
    """
    from tqdm import tqdm

    def read() -> dict[int, Result]:
        return {} if log is None else {int(key): found for key, found in log.read().items()}

    scenes, results = range(protocol.scenes), read()
    # Of all, not of what is left: by now another rank may have done some of it, or not.
    mine = [number for number in ranks.share(scenes) if number not in results]
    progress = tqdm(total=len(mine), desc="scenes", disable=not ranks.is_main)

    def keep(number: int, result: Result) -> None:
        results[number] = result
        progress.update()
        if log is not None:
            log.append(str(number), result)

    measure_drift(pipe, protocol, keep, mine)
    progress.close()
    results |= read()
    if not all(number in results for number in scenes):
        print("the other scenes are still being made by other ranks")
        return None
    sums_up = ranks.is_main if log is None or not mine else log.wrote_last()
    return [results[number] for number in scenes] if sums_up else None


def finish(
    args: argparse.Namespace,
    settings: Mapping[str, Any],
    results: Sequence[Result],
    other: Other | None,
) -> None:
    """Sum up, print, and write all if that is wanted."""
    seconds = settings["clip_seconds"], settings["given_seconds"]
    videos = [sum_up(result, number, *seconds) for number, result in enumerate(results)]
    rows = drift_rows(videos)
    summary = summarise(results, TRUTH)
    print(table(rows))
    for name in TOLD:
        measure = summary["measures"][name]["mean"]
        print(f"{name:<30}" + (f"{'–':>8}" if measure is None else f"{measure:>8.2f}"))
    content: dict[str, Any] = {"settings": settings, "rows": rows, "summary": summary}
    if other is not None:
        found = other.differences(videos)
        print(f"\nminus {other.path}", difference_lines(found), sep="\n")
        told = {f"{times}x": row for times, row in found.items()}
        content["against"] = {"path": str(other.path), "differences": told}
    if args.json is not None:
        write_json(args.json, to_json({**content, "videos": results}))


if __name__ == "__main__":
    sys.exit(run_main(main))
