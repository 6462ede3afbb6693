"""The runs of `scripts/evaluate.py`: videos made or found, measured, summed up, kept, drawn."""

import argparse
import json
import platform
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from evaluation.curves import draw_curves
from evaluation.meters import (
    Judge,
    Meter,
    Result,
    meter_settings,
    meters_by_kind,
)
from evaluation.results import ResultLog, summarise, summary_text
from evaluation.statistics import BLOCK_FRAMES, FIRST_FRAMES
from evaluation.trials import Evaluation, list_trials, vbench_name
from pipeline.batch import Outputs
from pipeline.records import file_hash
from pipeline.setup import Setup
from utils.config import Config, fingerprint, looked_up
from utils.devices import choose_device
from utils.distributed import Ranks
from utils.errors import UserError
from utils.files import locked, whole_files, write_json, written
from utils.packages import offered, offers, split_name
from utils.prompts import read_prompts, safe_stem
from utils.video import frame_rate, read_video_chunks

VBENCH_SAMPLES = 5
VBENCH_DIMENSIONS = (  # those that VBench has for any video, without its own prompts
    "subject_consistency",
    "background_consistency",
    "motion_smoothness",
    "dynamic_degree",
    "aesthetic_quality",
    "imaging_quality",
)


def evaluate(args: argparse.Namespace, config: Config | None, ranks: Ranks, outputs: Path) -> None:
    """Make what is missing of what the command line asks for; when all is there, sum it up.

    `config`: of the model that makes the videos, or made them. `outputs`: where the figures go if
    nobody says.
    """
    if args.videos is not None:
        videos = given_videos(args, config, ranks)
    else:
        assert config is not None
        videos = generated_videos(args, config, ranks)
    args.json = args.json or outputs / default_name(args, videos)
    with locked(args.json, "give another --json", is_file=True, is_main=ranks.is_main):
        log = ResultLog(args.json, fingerprint(videos.identity), ranks.rank)
        left = videos.left(log.read())
        if left:
            videos.measure(left, log.append)
        kept = log.read()
        still = videos.left(kept)
        if still:
            print(f"{len(still)} of {len(videos.keys)} videos are still being made by other ranks")
        elif log.wrote_last() if left else ranks.is_main:  # the last to end, or nothing was to do
            finish(args, videos, [kept[key] for key in videos.keys], ranks)


def default_name(args: argparse.Namespace, videos: "VideoSet") -> str:
    """The name of the figures if nobody says: one for each thing that is measured."""
    what = args.videos or Path(args.checkpoint_path or args.config_path)
    name = safe_stem(what.absolute().stem or "videos")
    return f"{name}-{fingerprint({**videos.identity, **videos.settings})[:8]}.json"


# --- what is measured ----------------------------------------------------------------------------


Keep = Callable[[str, Result], None]


@dataclass(frozen=True)
class VideoSet:
    """Videos to measure, each by a key.

    `measure` makes and measures this rank's share of the keys that it gets, and keeps the results.
    `truth`: the meter of those whose truth is known. `own_identity` is what the results depend on
    beside the meter; `own_settings` describe them in the JSON file beside that.
    """

    keys: Sequence[str]
    measure: Callable[[Sequence[str], Keep], None]
    is_there: Callable[[str], bool]
    truth: Meter | None
    own_identity: Mapping[str, Any]
    own_settings: Mapping[str, Any]

    @property
    def identity(self) -> dict[str, Any]:
        """All that the results depend on."""
        return {**self.own_identity, **meter_settings(self.truth)}

    @property
    def settings(self) -> dict[str, Any]:
        """What the JSON file says of them."""
        return {**self.identity, **self.own_settings}

    def left(self, kept: Mapping[str, Result]) -> list[str]:
        """Keys of what has still to be made or measured."""
        return [key for key in self.keys if key not in kept or not self.is_there(key)]


def package_of(args: argparse.Namespace, config: Config | None) -> str | None:
    """The package that knows the truth: the one asked for, or else that of the config's data."""
    if args.meter is not None or config is None:
        return args.meter
    named = split_name(config.data_path or "")
    return named[0] if named and offers(named[0], "open_meter") else None


def truth_of(package: str | None) -> Meter | None:
    """The meter that a package offers; UserError if it has none."""
    return None if package is None else offered(package, "open_meter")()


def generated_videos(args: argparse.Namespace, config: Config, ranks: Ranks) -> VideoSet:
    """Videos that a model makes."""
    device = str(choose_device(ranks.device_name(args.device or config.device)))
    config = replace(config, device=device)
    package = package_of(args, config)
    truth = truth_of(package)
    if args.data_path is None:
        if package is None:
            raise UserError("say with --data_path what the videos show: a file of prompts")
        prompts = offered(package, "held_out_prompts")(args.prompts)
    else:
        prompts = read_prompts(looked_up(args.data_path))[: args.prompts]
    folder, flag = (args.vbench, "--vbench") if args.vbench else (args.keep_videos, "--keep_videos")
    evaluation = Evaluation(
        Setup.of(config),
        args.checkpoint_path,
        use_ema=bool(args.use_ema),
        seconds=args.seconds,
        export=None if folder is None else Outputs(folder, overwrite=args.overwrite, flag=flag),
        ranks=ranks,
        truth=truth,
    )
    if args.data_path is None and truth is not None:
        shape = evaluation.shape
        known = truth.start(prompts[0], height=shape.height, width=shape.width) is not None
        if not known or config.fps < truth.least_fps:
            raise UserError(
                f"{args.config_path} makes no videos that {package} can measure; give prompts "
                "with --data_path, or a config of its size and frame rate"
            )
    trials = {t.key: t for t in list_trials(prompts, args.seeds or 1, config.seed)}
    names = {key: vbench_name(t.prompt, t.index) for key, t in trials.items()}
    check_exports(names, folder, judged=args.vbench is not None)

    def measure(left: Sequence[str], keep: Keep) -> None:
        wanted = set(left)
        evaluation(
            list(trials.values()),
            lambda trial, result: keep(trial.key, result),
            wanted=lambda trial: trial.key in wanted,
        )

    return VideoSet(
        list(trials),
        measure,
        is_there=lambda key: evaluation.is_there(trials[key]),
        truth=truth,
        own_identity=evaluation.settings,
        own_settings={
            "config": args.config_path,
            "overrides": args.overrides,
            "checkpoint": args.checkpoint_path,
            "prompts": args.data_path or f"held-out prompts of {package}",
            "seconds": args.seconds,
            "seeds": sorted({trial.seed for trial in trials.values()}),
        },
    )


def given_videos(args: argparse.Namespace, config: Config | None, ranks: Ranks) -> VideoSet:
    """Files of a folder; with a config its blocks are used for the flicker."""
    if not args.videos.is_dir():
        raise UserError(f"--videos {args.videos} is not a folder")
    files = {video_key(file): file for file in whole_files(args.videos, "*.mp4")}
    if not files:
        raise UserError(f"--videos {args.videos} holds no .mp4 file")
    exported = {key: vbench_name(*prompt_of(file)) for key, file in files.items()}
    names = {files[key].name: name for key, name in exported.items()}
    check_exports(names, args.vbench, judged=True)
    first, block = FIRST_FRAMES, BLOCK_FRAMES
    truth = truth_of(package_of(args, config))
    if config is not None:
        first, block = map(Setup.of(config).block_video_frames, (0, 1))

    def measure(left: Sequence[str], keep: Keep) -> None:
        missing = [key for key in ranks.share(list(files)) if key in set(left)]
        with tqdm(missing, "videos", disable=not ranks.is_main) as bar:
            for key in bar:
                result = measure_file(files[key], first, block, truth)
                if args.vbench is not None:
                    export(files[key], args.vbench / exported[key])
                keep(key, result)

    def is_there(key: str) -> bool:
        if args.vbench is None:
            return True
        copy = args.vbench / exported[key]
        return copy.is_file() and file_hash(copy) == file_hash(files[key])

    return VideoSet(
        list(files),
        measure,
        is_there=is_there,
        truth=truth,
        own_identity={"frames_in_first_block": first, "frames_per_block": block},
        own_settings={"videos": str(args.videos)},
    )


def video_key(path: Path) -> str:
    """What the result of a file depends on: what it shows, its name, and its prompt."""
    return f"{file_hash(path)} {path.name}: {prompt_of(path)[0]}"


def measure_file(path: Path, first: int, block: int, truth: Meter | None) -> Result:
    """One video file; its prompt says against what. UserError, naming it, if it is unreadable."""
    prompt, sample = prompt_of(path)
    frames = 0
    try:
        judge = Judge(prompt, truth=truth, first=first, block=block)
        for chunk in read_video_chunks(path):
            judge.add(chunk.numpy())
            frames += len(chunk)
        report = judge.report(frame_rate(path))
    except UserError as error:
        raise error if str(path) in str(error) else UserError(f"{path}: {error}") from error
    return {
        "file": path.name,
        "prompt": prompt,
        "seed": sample,
        "kind": judge.kind,
        "frames": frames,
        "report": report,
    }


def prompt_of(path: Path) -> tuple[str, int]:
    """Prompt and sample of a video: from the JSON beside it, else from its name."""
    match = re.fullmatch(r"(?s)(.*)-(\d+)(?:_ema|_regular)?", path.stem)
    prompt, sample = (match[1], int(match[2])) if match else (path.stem, 0)
    beside = path.with_suffix(".json")
    if not beside.is_file():
        return prompt, sample
    try:
        record = json.loads(beside.read_text(encoding="utf-8"))
        prompt, sample = record["prompt"], record.get("sample", sample)
        if not isinstance(prompt, str) or type(sample) is not int:
            raise TypeError(prompt, sample)
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{beside} does not say which prompt {path.name} shows") from error
    return prompt, sample


# --- what becomes of it --------------------------------------------------------------------------


def finish(
    args: argparse.Namespace, videos: VideoSet, results: Sequence[Result], ranks: Ranks
) -> None:
    """Sum up, write, print, draw, and let VBench judge if that is wanted."""
    kinds = sorted({result["kind"] for result in results})
    meters = meters_by_kind(videos.truth)
    summary = {
        kind: summarise([r for r in results if r["kind"] == kind], meters[kind]) for kind in kinds
    }
    devices = sorted({result["device"] for result in results if "device" in result})
    made_on = {"device": ", ".join(devices)} if devices else {}
    content = {
        "settings": {**videos.settings, **made_on},
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "diffusers", "transformers", "numpy")},
        },
        "summary": summary,
        "videos": list(results),
    }
    write_json(args.json, content)
    for kind in kinds:
        print(summary_text(summary[kind], meters[kind]))
    if args.plot is not None:
        for kind in kinds:
            name = args.plot if len(kinds) == 1 else args.plot.with_stem(f"{args.plot.stem}_{kind}")
            draw_curves(summary[kind], name, meters[kind].curves)
            print(name)
    print(args.json)
    if args.vbench is not None:
        content["vbench"] = run_vbench(args.vbench, results, args.device)
        write_json(args.json, content)


def export(source: Path, target: Path) -> None:
    """Copy a video under VBench's name."""
    with written(target) as part:
        shutil.copyfile(source, part)


def check_exports(names: Mapping[str, str], folder: Path | None, *, judged: bool) -> None:
    """UserError if two videos would have one name in the folder, or strangers be `judged` there."""
    if folder is None:
        return
    first: dict[str, str] = {}
    for video, name in names.items():
        if name in first:
            raise UserError(
                f"{first[name]} and {video} would both be {folder / name}; leave one of them out"
            )
        first[name] = video
    other = {path.name for path in whole_files(folder, "*.mp4")} - set(names.values())
    if judged and other:  # VBench scores all that it finds
        raise UserError(f"{folder} holds other videos, as {min(other)}; give an empty folder")


def run_vbench(folder: Path, results: Sequence[Result], device: str | None) -> Any:
    """VBench's scores of the folder, or None, with a sentence, where it is not installed."""
    samples: dict[str, int] = {}
    for result in results:
        samples[result["prompt"]] = samples.get(result["prompt"], 0) + 1
    few = sum(count < VBENCH_SAMPLES for count in samples.values())
    if few:
        print(f"{few} prompts have fewer than the {VBENCH_SAMPLES} videos of VBench's protocol")
    try:
        import vbench
    except ImportError:
        print(
            f"VBench is not installed: the videos lie in {folder}, named for it; to score them, "
            "pip install vbench and repeat this command"
        )
        return None
    scores = folder / "vbench_results"
    info = Path(vbench.__file__).parent / "VBench_full_info.json"
    judge = vbench.VBench(choose_device(device or "auto"), str(info), str(scores))
    judge.evaluate(
        videos_path=str(folder),
        name="videos",
        dimension_list=list(VBENCH_DIMENSIONS),
        mode="custom_input",
    )
    return json.loads((scores / "videos_eval_results.json").read_text(encoding="utf-8"))
