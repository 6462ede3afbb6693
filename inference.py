"""Videos from prompts, block by block, of any length; without flags, a demo.

    python inference.py --config_path configs/rolling_forcing_dmd.yaml \\
        --checkpoint_path checkpoints/rolling_forcing_dmd.pt \\
        --data_path prompts/example_prompts.txt --output_folder videos --num_output_frames 126
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.cli import check_picture, parse_command, run_main, set_up_logging
from utils.config import Config, find_file
from utils.distributed import Ranks
from utils.errors import UserError
from utils.families import add_model_choice, family, fetched_checkpoint
from utils.packages import offered, offers
from utils.profiles import add_profile_choice, load_with_profile

if TYPE_CHECKING:
    from pipeline.batch import BatchRun, Job
    from pipeline.prompt_schedule import PromptSchedule
    from pipeline.setup import Setup
    from pipeline.teamwork import Teamwork
    from pipeline.text_to_video import VideoPipeline

DEFAULT_FOLDER = "videos"
REPLAY_FOLDER = "videos/replay"
DEMO_PACKAGE = "shapes"  # its `open_demo` is what runs without flags


def build_parser() -> argparse.ArgumentParser:
    """The command line: published flags first, then ours."""
    parser = argparse.ArgumentParser(
        prog="inference.py",
        description="Turn prompts into videos of any length, written while they are generated. "
        "Without --config_path the model that ships makes them; what else is left out then is as "
        "in the demo: its prompts, ten seconds each, a contact sheet.",
        epilog="key=value overrides of the config may follow the flags, e.g. height=320 width=576.",
        allow_abbrev=False,
    )
    model = parser.add_argument_group("model")
    add_model_choice(model)
    model.add_argument(
        "--checkpoint_path", help="distilled weights: .pt, .safetensors or a diffusers folder"
    )
    model.add_argument("--use_ema", action="store_true", help="use its generator_ema weights")
    source = parser.add_argument_group("what to generate")
    source.add_argument(
        "--data_path", help="prompts: lines of text, JSON, CSV …; with --i2v a folder"
    )
    source.add_argument(
        "--extended_prompt_path", help="longer prompts, line by line, for the model"
    )
    source.add_argument("--prompt", action="append", default=[], help="a prompt; repeatable")
    source.add_argument("--i2v", action="store_true", help="--data_path holds images and captions")
    source.add_argument("--image", help="an image that every video starts from")
    source.add_argument("--video", help="a video that every video continues")
    source.add_argument(
        "--prefix_frames",
        choices=("reconstructed", "none"),
        default="reconstructed",
        help="whether the output begins with the image or video it continues",
    )
    source.add_argument(
        "--prompt_schedule",
        metavar="FILE",
        help="prompts from a second of the video on: lines such as `12.5s: a new prompt`, with "
        "[cut], [recache], [renoise] or [blend 4]",
    )
    source.add_argument(
        "--replay",
        metavar="FILE.json",
        help="make the video that this JSON stands beside once more, frame for frame",
    )
    length = source.add_mutually_exclusive_group()
    length.add_argument(
        "--num_output_frames", type=int, help="length in latent frames, any number (default: 21)"
    )
    length.add_argument("--duration", type=float, metavar="SECONDS", help="length in seconds")
    source.add_argument("--num_samples", type=int, help="videos per prompt")
    source.add_argument("--seed", type=int, help="the same seed gives the same videos")
    output = parser.add_argument_group("output")
    output.add_argument(
        "--output_folder", help=f"(default: {DEFAULT_FOLDER}; of the demo videos/demo)"
    )
    output.add_argument(
        "--contact_sheet", metavar="FILE.png", help="draw frames of all videos into one image"
    )
    output.add_argument("--save_with_index", action="store_true", help="name files by number")
    output.add_argument("--overwrite", action="store_true", help="redo videos that are there")
    output.add_argument("--fps", type=int, help="frames per second of the files")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", help="cpu, cuda, cuda:1 … (default: a GPU if there is one)")
    machine.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    add_profile_choice(machine)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=argparse.SUPPRESS)
    return parser


REPLAY_FLAGS = (
    *("replay", "checkpoint_path", "image", "video", "output_folder", "contact_sheet"),
    *("save_with_index", "overwrite", "device", "dtype", "overrides"),
)


def fill_in_model(args: argparse.Namespace) -> None:
    """Give config, overrides and checkpoint what `--model` says; the flags come first."""
    chosen = family(args.model)
    args.config_path = chosen.config
    args.overrides = [*chosen.overrides, *args.overrides]
    args.checkpoint_path = args.checkpoint_path or fetched_checkpoint(args.model)


def fill_in_schedule(args: argparse.Namespace) -> "PromptSchedule | tuple[()]":
    """What `--prompt_schedule` says; its first prompt is that of the video."""
    if args.prompt_schedule is None:
        return ()
    from pipeline.prompt_schedule import read_prompt_schedule

    schedule = read_prompt_schedule(args.prompt_schedule)
    if schedule.first is not None:
        if args.prompt or args.data_path:
            raise UserError(
                f"{args.prompt_schedule} says the prompt at 0 s: leave --prompt and --data_path out"
            )
        args.prompt = [schedule.first]
    return schedule


def open_demo() -> Any:
    """The demo of the package that ships with its model; UserError if it is not here."""
    if not offers(DEMO_PACKAGE, "open_demo"):
        raise UserError("this copy has no demo: say with --config_path which model to use")
    return offered(DEMO_PACKAGE, "open_demo")()


def fill_in_demo(args: argparse.Namespace, demo: Any) -> None:
    """Give the flags that are left out their values in the demo."""
    args.config_path = demo.CONFIG
    args.checkpoint_path = args.checkpoint_path or demo.CHECKPOINT
    args.output_folder = args.output_folder or demo.FOLDER
    if not (args.prompt or args.data_path or args.i2v):
        if args.image or args.video:
            raise UserError("say with --prompt what the image or video becomes")
        args.data_path = str(find_file(demo.PROMPTS, "prompt file"))
    if args.duration is None and args.num_output_frames is None:
        args.duration = demo.SECONDS
    if args.contact_sheet is None:
        args.contact_sheet = str(Path(args.output_folder) / demo.CONTACT_SHEET)


def read_config(args: argparse.Namespace, ranks: Ranks) -> Config:
    """The experiment file with the flags and overrides on top."""
    overrides = list(args.overrides)
    for key in ("seed", "num_samples", "fps", "dtype"):
        if (value := vars(args)[key]) is not None:
            overrides.append(f"{key}={value}")
    config = load_with_profile(args.config_path, overrides, args.profile)
    config.device = ranks.device_name(args.device or config.device)
    config.i2v = config.i2v or args.i2v
    return config


def model_flags(args: argparse.Namespace, demo: Any) -> list[str]:
    """The flags that made the demo use another model than the one that ships."""
    flags = []
    if args.checkpoint_path != demo.CHECKPOINT:
        flags += ["--checkpoint_path", str(demo.from_root(Path(args.checkpoint_path)))]
    if args.use_ema:
        flags.append("--use_ema")
    return flags + args.overrides


def main(argv: Sequence[str]) -> int:
    """Parse, plan, generate, show."""
    args = parse_command(build_parser(), argv)
    ranks = Ranks.from_environment()
    set_up_logging(quiet=not ranks.is_main)
    if args.replay is not None:
        return replay(args, ranks)
    if args.model is not None:
        fill_in_model(args)
    changes = fill_in_schedule(args)
    demo = open_demo() if args.config_path is None else None
    if demo:
        fill_in_demo(args, demo)
    check_picture("--contact_sheet", args.contact_sheet)
    config = read_config(args, ranks)

    from pipeline.batch import BatchRun, Outputs, list_jobs
    from pipeline.memory import fitted, memory_in_words
    from pipeline.setup import Setup

    if demo:
        demo.require_model(config, args.checkpoint_path)
    jobs = list_jobs(
        i2v=config.i2v,
        num_samples=config.num_samples,
        seed=config.seed,
        data_path=args.data_path,
        extended_prompt_path=args.extended_prompt_path,
        prompts=args.prompt,
        image=args.image,
        video=args.video,
        with_index=args.save_with_index,
        ema=args.use_ema,
    )
    if demo:
        demo.warn_of_other_prompts([job.prompt for job in jobs])
    outputs = Outputs(
        Path(args.output_folder or DEFAULT_FOLDER),
        num_latent_frames=args.num_output_frames,
        duration=args.duration,
        prefix_frames=args.prefix_frames,
        overwrite=args.overwrite,
    )
    setup = fitted(Setup.of(config))

    def lead(teamwork: "Teamwork | None") -> None:
        run = BatchRun(
            setup,
            args.checkpoint_path,
            outputs,
            use_ema=args.use_ema,
            ranks=ranks.teams(config.sequence_parallel),
            changes=changes,
            teamwork=teamwork,
        )
        with memory_in_words(setup):
            run(jobs)
        show(run, jobs, args, demo)

    make_videos(setup, ranks, lead, args.checkpoint_path, use_ema=args.use_ema)
    return 0


def make_videos(
    setup: "Setup",
    ranks: Ranks,
    lead: "Callable[[Teamwork | None], None]",
    checkpoint: str | None,
    *,
    use_ema: bool,
) -> None:
    """Run `lead` on every rank, or on the first one of each team."""
    from pipeline.memory import memory_in_words
    from pipeline.teamwork import in_team
    from pipeline.text_to_video import load_generator

    def load(teamwork: "Teamwork") -> "VideoPipeline":
        with memory_in_words(setup):
            return load_generator(setup, checkpoint, use_ema=use_ema, teamwork=teamwork)

    in_team(ranks, setup.machine.sequence_parallel, setup.machine.device, lead, load)


def replay(args: argparse.Namespace, ranks: Ranks) -> int:
    """Make a recorded video again, and say whether its frames are the same."""
    from pipeline.replay import read_replay

    check_picture("--contact_sheet", args.contact_sheet)
    given = build_parser().parse_args([])
    for flag, value in vars(args).items():
        if flag not in REPLAY_FLAGS and value != vars(given)[flag]:
            raise UserError(f"--replay takes all from the record: leave --{flag} out")
    told = read_replay(args.replay)
    overrides = [*args.overrides, *([f"dtype={args.dtype}"] if args.dtype else [])]
    config = told.read_config(args.replay, overrides)
    config.device = ranks.device_name(args.device or config.device)
    checkpoint = told.find_checkpoint(args.checkpoint_path)

    from pipeline.batch import BatchRun, Job, Outputs
    from pipeline.memory import fitted, memory_in_words
    from pipeline.setup import Setup

    image, video = (
        Path(find_file(path, what)) if path else None
        for path, what in ((args.image, "image"), (args.video, "video"))
    )
    name = f"{Path(args.replay).stem}.mp4"
    job = Job(told.prompt, told.seed, told.sample, told.number, name, image, video)
    outputs = Outputs(
        Path(args.output_folder or REPLAY_FOLDER),
        exact=(told.latent_frames, told.video_frames),
        prefix_frames=told.prefix_frames,
        overwrite=args.overwrite,
    )
    setup = fitted(Setup.of(config))

    def lead(teamwork: "Teamwork | None") -> None:
        run = BatchRun(
            setup,
            checkpoint,
            outputs,
            use_ema=told.use_ema,
            ranks=ranks.teams(config.sequence_parallel),
            changes=told.changes,
            teamwork=teamwork,
        )
        told.check(run.settings_of(job))
        with memory_in_words(setup):
            run([job])
        show(run, [job], args, None)
        for path, record in run.made([job]).items():
            print(f"{path}: {told.compared(record)}")

    make_videos(setup, ranks, lead, checkpoint, use_ema=told.use_ema)
    return 0


def show(run: "BatchRun", jobs: "Sequence[Job]", args: argparse.Namespace, demo: Any) -> None:
    """Draw the contact sheet, close the demo; of several ranks the last to end does it."""
    last = run.ranks.ends_last()
    videos = run.made(jobs)
    if not last or args.contact_sheet is None or len(videos) < len(jobs):
        return
    sheet = Path(args.contact_sheet)
    run.write_contact_sheet(list(videos), sheet)
    if demo:
        print(demo.closing_text(videos, sheet, run.setup.fps, model_flags(args, demo)))


if __name__ == "__main__":
    sys.exit(run_main(main))
