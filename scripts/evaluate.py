"""Measure a model, or videos that are there already.

    python scripts/evaluate.py --config_path configs/shapes/rolling_forcing.yaml \\
        --checkpoint_path checkpoints/shapes_rolling_forcing.pt \\
        --prompts 16 --seeds 3 --seconds 60 --json out.json --plot out.png
    python scripts/evaluate.py --videos videos --meter shapes --json out.json

Videos of the prompts in `--data_path` are streamed and measured block by block: against the truth
where `--meter` names a package that knows it of these prompts, else against their own beginning
(`evaluation/statistics.py`); docs/shapes.md has the formulas. By default the package is that of the
config's `data_path`, if it is one such as shapes:train, and its held-out prompts are those without
`--data_path`. Results are kept one by one beside the JSON file (below `outputs/evaluation` if none
is given), so the same command goes on where it was stopped. Under torchrun the ranks share the
videos, also several ranks on one GPU:

    torchrun --nproc_per_node 8 scripts/evaluate.py ...
"""

import argparse
import json
import math
import platform
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from evaluation.curves import draw_curves
from evaluation.meters import Judge, Meter, Result, meter_settings, meters_by_kind
from evaluation.results import ResultLog, summarise, summary_text
from evaluation.trials import Evaluation, plan_trials, vbench_name
from pipeline.batch import Outputs, file_hash
from pipeline.setup import Setup
from utils.cli import check_picture, parse_command, require_matplotlib, run_main, set_up_logging
from utils.config import Config, fingerprint, load_config
from utils.devices import choose_device
from utils.distributed import Ranks
from utils.errors import UserError
from utils.files import check_file, is_temporary, locked, write_json, written
from utils.packages import offered, offers, split_name
from utils.prompts import read_prompts, safe_stem
from utils.video import frame_rate, read_video_chunks

HELD_OUT_PROMPTS, SECONDS = 16, 60.0
OUTPUTS = Path("outputs") / "evaluation"
GENERATING_FLAGS = (
    *("data_path", "checkpoint_path", "prompts", "seeds", "seconds", "use_ema", "keep_videos"),
)
VBENCH_SAMPLES = 5
VBENCH_DIMENSIONS = (  # those that VBench has for any video, without its own prompts
    "subject_consistency",
    "background_consistency",
    "motion_smoothness",
    "dynamic_degree",
    "aesthetic_quality",
    "imaging_quality",
)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--config_path", help="experiment file")
    parser.add_argument("--checkpoint_path", help="distilled weights, .pt or .safetensors")
    parser.add_argument(
        "--use_ema", action="store_true", default=None, help="use its generator_ema weights"
    )
    parser.add_argument("--videos", type=Path, help="measure the mp4 files of this folder instead")
    parser.add_argument("--data_path", help="prompt file (default: held-out ones of the package)")
    parser.add_argument("--meter", metavar="PACKAGE", help="what knows the truth, such as shapes")
    parser.add_argument(
        "--prompts", type=int, help=f"the first so many (default: {HELD_OUT_PROMPTS}; a file: all)"
    )
    parser.add_argument("--seeds", type=int, help="videos per prompt (default: 1)")
    parser.add_argument("--seconds", type=float, help=f"length (default: {SECONDS:g})")
    parser.add_argument(
        "--json", type=Path, help=f"the figures (default: a file of its own in {OUTPUTS})"
    )
    parser.add_argument("--plot", type=Path, help="draw the per-second curves into this PNG")
    parser.add_argument("--vbench", type=Path, help="put the videos there, named as for VBench")
    parser.add_argument("--keep_videos", type=Path, help="keep the videos there, unjudged")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace videos there that were made otherwise"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1 … (default: a GPU if there is one)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the config")
    return parser


def main(argv: Sequence[str]) -> int:
    """Make what is missing; when all is there, sum it up."""
    args = parse_command(build_parser(), argv)
    ranks = Ranks.from_environment()
    set_up_logging(quiet=not ranks.is_main)
    check_flags(args)
    run = videos_run(args, ranks) if args.videos is not None else generated_run(args, ranks)
    args.json = args.json or default_json(args, run)
    with locked(args.json, "give another --json", is_file=True, is_main=ranks.is_main):
        log = ResultLog(args.json, fingerprint(run.identity), ranks.rank)
        left = run.left(log.read())
        if left:
            run.measure(left, log.append)
        kept = log.read()
        still = run.left(kept)
        if still:
            print(f"{len(still)} of {len(run.keys)} videos are still being made by other ranks")
        elif log.wrote_last() if left else ranks.is_main:  # the last to end, or nothing was to do
            finish(args, run, [kept[key] for key in run.keys], ranks)
    return 0


def default_json(args: argparse.Namespace, run: "Run") -> Path:
    """Where the figures go if nobody says: a file for each thing that is measured."""
    what = args.videos or Path(args.checkpoint_path or args.config_path)
    name = safe_stem(what.absolute().stem or "videos")
    return OUTPUTS / f"{name}-{fingerprint({**run.identity, **run.settings})[:8]}.json"


def check_flags(args: argparse.Namespace) -> None:
    """UserError for what can be known to be wrong before anything is loaded."""
    if args.videos is None and args.config_path is None:
        raise UserError("say what to measure: --config_path (and --checkpoint_path), or --videos")
    if args.videos is not None:
        for flag in GENERATING_FLAGS:
            if vars(args)[flag] is not None:
                raise UserError(f"--videos measures what is there; leave out --{flag}")
        if args.overrides and args.config_path is None:
            raise UserError(f"{args.overrides[0]} changes a config; give --config_path too")
    if args.keep_videos is not None and args.vbench is not None:
        raise UserError("--vbench keeps the videos already; leave out --keep_videos")
    if any(number is not None and number < 1 for number in (args.prompts, args.seeds)):
        raise UserError("--prompts and --seeds must be at least 1")
    if args.seconds is not None and not (math.isfinite(args.seconds) and args.seconds > 0):
        raise UserError(f"--seconds {args.seconds:g} must be a length above 0")
    for path in (args.json, args.plot):
        if path is not None:
            check_file(path)
    check_picture("--plot", args.plot)
    if args.plot is not None:
        require_matplotlib()


# --- what is measured ----------------------------------------------------------------------------


Keep = Callable[[str, Result], None]


@dataclass(frozen=True)
class Run:
    """Videos to measure, each by a key.

    `measure` makes and measures this rank's share of the keys that it gets, and keeps the results.
    `truth`: the meter of those whose truth is known. `own_identity` is what the results depend on
    beside the meter; `own_settings` describe the run in the JSON file beside that.
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
        """The run in the JSON file."""
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


def generated_run(args: argparse.Namespace, ranks: Ranks) -> Run:
    """Videos that a model makes."""
    config = load_config(args.config_path, args.overrides)
    config.device = str(choose_device(ranks.device_name(args.device or config.device)))
    package = package_of(args, config)
    truth = truth_of(package)
    if args.data_path is None:
        if package is None:
            raise UserError("say with --data_path what the videos show: a file of prompts")
        prompts = offered(package, "held_out_prompts")(args.prompts or HELD_OUT_PROMPTS)
    else:
        prompts = read_prompts(args.data_path)[: args.prompts]
    seconds = SECONDS if args.seconds is None else args.seconds
    folder, flag = (args.vbench, "--vbench") if args.vbench else (args.keep_videos, "--keep_videos")
    evaluation = Evaluation(
        Setup.of(config),
        args.checkpoint_path,
        use_ema=bool(args.use_ema),
        seconds=seconds,
        export=None if folder is None else Outputs(folder, overwrite=args.overwrite, flag=flag),
        ranks=ranks,
        truth=truth,
    )
    if args.data_path is None and truth is not None:
        size = {"height": evaluation.shape.height, "width": evaluation.shape.width}
        if truth.start(prompts[0], fps=config.fps, **size) is None:
            raise UserError(
                f"{args.config_path} makes no videos that {package} can measure; give prompts "
                "with --data_path, or a config of its size"
            )
    trials = {t.key: t for t in plan_trials(prompts, args.seeds or 1, config.seed)}
    names = {key: vbench_name(t.prompt, t.index) for key, t in trials.items()}
    check_exports(names, folder, judged=args.vbench is not None)

    def measure(left: Sequence[str], keep: Keep) -> None:
        wanted = set(left)
        evaluation(
            list(trials.values()),
            lambda trial, result: keep(trial.key, result),
            wanted=lambda trial: trial.key in wanted,
        )

    return Run(
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
            "seconds": seconds,
            "seeds": sorted({trial.seed for trial in trials.values()}),
        },
    )


def videos_run(args: argparse.Namespace, ranks: Ranks) -> Run:
    """Files of a folder; with a config its blocks are used for the flicker."""
    if not args.videos.is_dir():
        raise UserError(f"--videos {args.videos} is not a folder")
    found = sorted(args.videos.glob("*.mp4"))
    files = {video_key(f): f for f in found if not is_temporary(f)}
    if not files:
        raise UserError(f"--videos {args.videos} holds no .mp4 file")
    exported = {key: vbench_name(*prompt_of(file)) for key, file in files.items()}
    names = {files[key].name: name for key, name in exported.items()}
    check_exports(names, args.vbench, judged=True)
    first, block = 9, 12
    config = load_config(args.config_path, args.overrides) if args.config_path else None
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

    return Run(
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
        judge = Judge(prompt, fps=frame_rate(path), truth=truth, first=first, block=block)
        for chunk in read_video_chunks(path):
            judge.add(chunk.numpy())
            frames += len(chunk)
        report = judge.report()
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
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


def finish(args: argparse.Namespace, run: Run, results: Sequence[Result], ranks: Ranks) -> None:
    """Sum up, write, print, draw, and let VBench judge if that is wanted."""
    kinds = sorted({result["kind"] for result in results})
    meters = meters_by_kind(run.truth)
    summary = {
        kind: summarise([r for r in results if r["kind"] == kind], meters[kind]) for kind in kinds
    }
    devices = sorted({result["device"] for result in results if "device" in result})
    made_on = {"device": ", ".join(devices)} if devices else {}
    content = {
        "settings": {**run.settings, **made_on},
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
            draw_curves({args.json.stem: summary[kind]}, name, meters[kind].curves)
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
    other = {path.name for path in folder.glob("*.mp4")} - set(names.values())
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


if __name__ == "__main__":
    sys.exit(run_main(main))
