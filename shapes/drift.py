"""Does a model keep what its prompt leaves open? Videos that go on from true clips, for long.

    python -m shapes.drift --config_path configs/shapes/rolling_forcing.yaml \\
        --checkpoint_path checkpoints/shapes_rolling_forcing.pt --times 20 --json out.json

Each scene's first blocks are given as true frames, and the model goes on to `--times` the length of
its training clips. What captions leave open is read from the frames and held against its value in
the given ones (`evaluation/keeping.py`; docs/shapes.md has the formulas). `--given 0` starts from
noise, where a video is held against its own first second. The scenes are none that training or its
monitors ever draw. Results are kept one by one, so the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if not __package__:  # run by its path: the tree that it lies in comes first
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evaluation.keeping import drift_curve, keeping
from evaluation.meters import Judge, Result
from evaluation.results import ResultLog, summarise
from evaluation.statistics import Array, mean, to_json
from shapes.kept import ERRORS, PROPERTIES
from shapes.playing import add_model_flags, describe_model, open_model
from shapes.truth import ShapesTruth
from shapes.world import Scene, render, sample_scene
from utils.cli import check_outputs, parse_command, run_main, set_up_logging
from utils.config import fingerprint
from utils.errors import UserError
from utils.files import write_json

if TYPE_CHECKING:
    from pipeline import VideoPipeline

TRUTH = ShapesTruth(unsaid=True)
SCENE_SEED = 31_415
"""Of the scenes: no data set of a training, no prompt of an evaluation has it."""

COLUMNS = (1, 2, 5, 10, 20, 60)
BESIDE = ("late.right", "late.motion", "late.path", "background_flicker.ratio")
"""What is told beside what is kept: prompt, motion, path in the last five seconds, flicker."""


@dataclass(frozen=True)
class Protocol:
    """How long videos are made, and from what.

    given: blocks of true frames that a video goes on from; 0: from noise. times: its length over
    that of a training clip; clip: latent frames of the latter. batch: videos made together, which
    changes none of them.
    """

    scenes: int = 16
    given: int = 1
    times: int = 20
    clip: int = 21
    seed: int = 0
    batch: int = 8

    def scene(self, index: int) -> Scene:
        """Scene number `index`, with what its caption leaves open."""
        return sample_scene(SCENE_SEED, index, split="heldout", unsaid=True)


Keep = Callable[[int, Result], None]


def measure_drift(
    pipe: VideoPipeline, protocol: Protocol, keep: Keep, done: Sequence[int] = ()
) -> None:
    """Make and measure the scenes that are not done; `keep` gets the number of each and its result.

    UserError for a model whose videos the meter cannot measure.
    """
    left = [index for index in range(protocol.scenes) if index not in done]
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
    import torch

    from pipeline.prefix import Prefix

    scenes = [protocol.scene(number) for number in numbers]
    given = given_frames(pipe, protocol)
    prefix = None
    if given:
        clips = [torch.from_numpy(render(s, given, size=pipe.shape.height)) for s in scenes]
        parts = [pipe.encode_prefix(video=clip) for clip in clips]
        prefix = Prefix(torch.cat([part.latents for part in parts if part is not None]))
    first, block = map(pipe.setup.block_video_frames, (0, 1))
    judges = [Judge(s.caption, truth=TRUTH, first=first, block=block, given=given) for s in scenes]
    with pipe.open_stream(
        pipe.encode_prompts([scene.caption for scene in scenes]),
        seed=protocol.seed,
        num_latent_frames=whole_blocks(pipe, protocol),
        samples=list(numbers),
        prefix=prefix,
    ) as stream:
        while (frames := stream.next_batch()) is not None:
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


def whole_blocks(pipe: VideoPipeline, protocol: Protocol) -> int:
    """Latent frames of a video: as many as asked for, and no more than fill its last block."""
    return pipe.layout.start(pipe.layout.blocks_for(protocol.times * protocol.clip))


# --- what becomes of it --------------------------------------------------------------------------


def drift_rows(
    results: Sequence[Result], clip_seconds: float, given_seconds: float
) -> dict[str, dict[str, Any]]:
    """Of each property, what is kept at each of `COLUMNS` that the videos reach.

    `drift`, and half its 95 % interval over the videos `margin`, `gain`, `variety`: means over the
    seconds of the k-th clip that were generated. `error`: the meter's own.
    """
    rows: dict[str, dict[str, Any]] = {}
    for name, known in PROPERTIES.items():
        videos = [result["report"]["kept"][name] for result in results]
        kept = keeping(videos, known)
        curves = [drift_curve(v, known, known.spread or 1.0)[: len(kept.drift)] for v in videos]
        row: dict[str, Any] = {"error": ERRORS[name]}
        for times, span in spans(len(kept.drift), clip_seconds, given_seconds):
            each = np.array([mean(curve[span]) for curve in curves])
            row[f"{times}x"] = {
                "drift": float(mean(each)),
                "margin": margin(each),
                "gain": float(mean(kept.gain[span])),
                "variety": float(mean(kept.variety[span])),
            }
        rows[name] = row
    return rows


def spans(seconds: int, clip_seconds: float, given_seconds: float) -> Iterator[tuple[int, slice]]:
    """Of each of `COLUMNS` the whole seconds of that clip, without those that are the reference."""
    reference = int(np.ceil(max(given_seconds, 1.0)))
    for times in COLUMNS:
        start = max(reference, round((times - 1) * clip_seconds))
        end = min(seconds, round(times * clip_seconds))
        if end > start and times * clip_seconds <= seconds + 1:
            yield times, slice(start, end)


def margin(values: Array) -> float:
    """Half the 95 % interval of a mean, from its standard error; NaN for fewer than two values."""
    there = values[~np.isnan(values)]
    return float(1.96 * there.std(ddof=1) / len(there) ** 0.5) if len(there) > 1 else float("nan")


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The rows for people: drift ± margin (gain, variety) at each length."""
    columns = [name for name in next(iter(rows.values())) if name != "error"]
    lines = [f"{'drift ± 95 % (gain, variety)':<30}" + "".join(f"{c:>28}" for c in columns)]
    for name, row in rows.items():
        title = f"{name} (meter {row['error']:g})"
        lines.append(f"{title:<30}" + "".join(f"{_cell(row[c]):>28}" for c in columns))
    return "\n".join(lines)


def _cell(kept: Mapping[str, float]) -> str:
    drift, margin, gain, variety = (kept[n] for n in ("drift", "margin", "gain", "variety"))
    return f"{drift:.2f} ± {margin:.2f} ({gain:.2f}, {variety:.2f})"


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
    add_model_flags(parser)
    return parser


def main(argv: Sequence[str]) -> int:
    """Go on, measure, print a table."""
    args = parse_command(build_parser(), argv)
    set_up_logging(quiet=True)
    if min(args.scenes, args.times, args.clip, args.batch) < 1 or args.given < 0:
        raise UserError("--scenes, --times, --clip and --batch must be at least 1, --given 0")
    check_outputs(args.json)
    from tqdm import tqdm

    pipe = open_model(args)
    protocol = Protocol(**{field.name: vars(args)[field.name] for field in fields(Protocol)})
    if whole_blocks(pipe, protocol) <= pipe.layout.start(protocol.given):
        raise UserError(f"--given {args.given} leaves nothing of --times {args.times} to make")
    settings = {**asdict(protocol), **describe_model(args, pipe), "meter": TRUTH.version}
    of_each = {name: value for name, value in settings.items() if name not in ("scenes", "batch")}
    results: dict[int, Result] = {}
    log = None
    if args.json is not None:
        log = ResultLog(args.json, fingerprint(of_each), 0)
        results = {int(key): result for key, result in log.read().items()}
        results = {n: results[n] for n in results if n < protocol.scenes}
    progress = tqdm(total=protocol.scenes, initial=len(results), desc="scenes")

    def keep(number: int, result: Result) -> None:
        results[number] = result
        progress.update()
        if log is not None:
            log.append(str(number), result)

    measure_drift(pipe, protocol, keep, done=list(results))
    progress.close()
    fps, shape = pipe.setup.fps, pipe.shape
    given = given_frames(pipe, protocol)
    videos = [results[number] for number in sorted(results)]
    rows = drift_rows(videos, shape.video_frames(protocol.clip) / fps, given / fps)
    summary = summarise(videos, TRUTH)
    print(table(rows))
    for name in BESIDE:
        measure = summary["measures"][name]["mean"]
        print(f"{name:<30}" + (f"{'–':>8}" if measure is None else f"{measure:>8.2f}"))
    if args.json is not None:
        content = {"settings": settings, "rows": rows, "summary": summary, "videos": videos}
        write_json(args.json, to_json(content))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
