"""A page that shows video while it is generated, and changes its prompt on the way.

    python app.py
    python app.py --config_path configs/rolling_forcing_dmd.yaml \\
        --checkpoint_path checkpoints/rolling_forcing_dmd.pt
"""

import argparse
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import get_ident
from typing import TYPE_CHECKING

from utils.cli import parse_command, run_main, set_up_logging
from utils.config import Config, find_file
from utils.distributed import Ranks
from utils.errors import UserError
from utils.families import add_model_choice, family, fetched_checkpoint
from utils.files import locked
from utils.packages import offered, offers
from utils.profiles import add_profile_choice, load_with_profile
from utils.prompts import read_prompts

if TYPE_CHECKING:
    from pipeline import VideoPipeline
    from pipeline.teamwork import Teamwork

DEMO_PACKAGE = "shapes"  # its `open_demo` is the model without flags
DEFAULT_FOLDER = "videos/live"
RANDOM_CONFIG, RANDOM_SIZES = "configs/rolling_forcing_dmd.yaml", "configs/models/tiny.json"
GIB = 2**30
REACHED_HERE = "Only this machine reaches it; --server_name 0.0.0.0 opens it to others."
REACHED_BY_TOKEN = "Whoever has this address may use it."


def build_parser() -> argparse.ArgumentParser:
    """The command line: published flags first, then ours."""
    parser = argparse.ArgumentParser(
        prog="app.py",
        description="Serve a page that shows video while it is generated. Without --config_path "
        "the model that ships makes it.",
        epilog="key=value overrides of the config may follow the flags, e.g. height=320 width=576.",
        allow_abbrev=False,
    )
    model = parser.add_argument_group("model")
    add_model_choice(model)
    weights = model.add_mutually_exclusive_group()
    weights.add_argument(
        "--checkpoint_path", help="distilled weights: .pt, .safetensors or a diffusers folder"
    )
    weights.add_argument(
        "--random_weights", action="store_true", help="a small model that shows noise, no files"
    )
    model.add_argument(
        "--no_ema", action="store_true", help="its generator instead of generator_ema"
    )
    model.add_argument("--device", help="cpu, cuda, cuda:1 … (default: a GPU if there is one)")
    model.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    add_profile_choice(model)
    place = parser.add_argument_group("address")
    place.add_argument(
        "--server_name",
        default="127.0.0.1",
        help="address to listen on (default: 127.0.0.1, this machine alone; 0.0.0.0: every one)",
    )
    place.add_argument("--server_port", type=int, default=7860, help="(default: 7860)")
    place.add_argument(
        "--token",
        help="what clients have to show (default: none where this machine alone is let in, else a "
        "new one)",
    )
    place.add_argument(
        "--allowed_host",
        action="append",
        default=[],
        metavar="NAME",
        help="a name that a proxy on this machine gives the server; repeatable",
    )
    bounds = parser.add_argument_group("bounds")
    bounds.add_argument("--max_sessions", type=int, help="(default: as many as memory holds)")
    bounds.add_argument(
        "--lead",
        type=float,
        default=1.5,
        metavar="SECONDS",
        help="made ahead of what was played (default: 1.5)",
    )
    bounds.add_argument(
        "--idle_seconds",
        type=float,
        default=60.0,
        help="a session stays without page (default: 60)",
    )
    bounds.add_argument(
        "--output_dir", default=DEFAULT_FOLDER, help=f"of the videos (default: {DEFAULT_FOLDER})"
    )
    bounds.add_argument(
        "--disk_limit", type=float, default=20.0, metavar="GIB", help="of them all (default: 20)"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=argparse.SUPPRESS)
    return parser


def check(args: argparse.Namespace) -> None:
    """UserError for flags that make no sense."""
    if not 0 < args.server_port < 2**16:
        raise UserError(f"--server_port {args.server_port} must be from 1 to 65535")
    if args.max_sessions is not None and args.max_sessions < 1:
        raise UserError(f"--max_sessions {args.max_sessions} must be at least 1")
    for flag in ("lead", "idle_seconds", "disk_limit"):
        value = vars(args)[flag]
        if not 0 < value < float("inf"):
            raise UserError(f"--{flag} {value} must be above 0")
    if args.token is not None and not re.fullmatch(r"[\w.~-]{8,128}", args.token, re.ASCII):
        raise UserError("--token must be 8 to 128 letters, digits, or any of - _ . ~")


def fill_in_model(args: argparse.Namespace) -> Path:
    """Give config and checkpoint what the other flags say; the file of example prompts."""
    examples = "prompts/example_prompts.txt"
    if args.model is not None:
        chosen = family(args.model)
        args.config_path = chosen.config
        args.overrides = [*chosen.overrides, *args.overrides]
        args.checkpoint_path = args.checkpoint_path or fetched_checkpoint(args.model)
    elif args.random_weights:
        args.config_path = args.config_path or RANDOM_CONFIG
    elif args.config_path is None:
        if not offers(DEMO_PACKAGE, "open_demo"):
            raise UserError("this copy has no model: say with --config_path which one to use")
        demo = offered(DEMO_PACKAGE, "open_demo")()
        args.config_path = demo.CONFIG
        args.checkpoint_path = args.checkpoint_path or demo.LIVE_CHECKPOINT
        demo.require_model(read_config(args), args.checkpoint_path)
        examples = demo.PROMPTS
    return find_file(examples, "prompt file")


def read_config(args: argparse.Namespace) -> Config:
    """The experiment file with the flags and overrides on top."""
    given = [f"{key}={vars(args)[key]}" for key in ("device", "dtype") if vars(args)[key]]
    small = ["height=64", "width=96"] if args.random_weights else []
    overrides = [*small, *args.overrides, *given]
    return load_with_profile(args.config_path, overrides, args.profile)


def read_ranks(config: Config) -> Ranks:
    """This rank, which gets its own GPU; UserError unless all ranks make each session together."""
    ranks = Ranks.from_environment()
    if ranks.world != config.sequence_parallel:
        raise UserError(
            f"app.py runs on {ranks.world} ranks, and sequence_parallel={config.sequence_parallel} "
            "of them make a session together: start as many with torchrun --nproc_per_node"
        )
    if ranks.world > 1:
        config.device = ranks.device_name(config.device)
    return ranks


def open_pipeline(
    args: argparse.Namespace, config: Config, teamwork: "Teamwork | None"
) -> "VideoPipeline":
    """The model of the command line."""
    from server.models import open_model, open_random_model

    if args.random_weights:
        preset = find_file(RANDOM_SIZES, "model preset")
        return open_random_model(config, preset, teamwork=teamwork)
    use_ema = not args.no_ema
    return open_model(config, args.checkpoint_path, use_ema=use_ema, teamwork=teamwork)


def address_of(args: argparse.Namespace, token: str | None) -> str:
    """What to open in a browser."""
    name = args.server_name
    if name in ("0.0.0.0", "::"):
        import socket

        name = socket.gethostname()
    name = f"[{name}]" if ":" in name else name
    query = "" if token is None else f"?token={token}"
    return f"http://{name}:{args.server_port}/{query}"


def main(argv: Sequence[str]) -> int:
    """Parse, open the model, serve until somebody ends it."""
    args = parse_command(build_parser(), argv)
    set_up_logging(quiet=not Ranks.from_environment().is_main)
    check(args)
    prompts = fill_in_model(args)
    config = read_config(args)
    ranks = read_ranks(config)

    from pipeline.teamwork import Teamwork, in_team

    def lead(teamwork: Teamwork | None) -> None:
        with locked(args.output_dir, "use another --output_dir"):
            serve(args, config, prompts, teamwork)

    def load(teamwork: Teamwork) -> "VideoPipeline":
        return open_pipeline(args, config, teamwork)

    in_team(ranks, config.sequence_parallel, config.device, lead, load)
    return 0


def serve(
    args: argparse.Namespace, config: Config, prompts: Path, teamwork: "Teamwork | None"
) -> None:
    """Open everything and answer until somebody ends it, or another rank of the team has ended."""
    from pipeline.memory import step_bytes
    from server.access import Access, is_loopback, new_token
    from server.app import AppOptions, about_model, build_app
    from server.engine import PipelineEngine
    from server.listen import listen, run
    from server.models import places, read_composer, warm_up
    from server.pool import SESSIONS_PER_ADDRESS, PoolOptions, SessionPool
    from server.storage import Storage

    storage = Storage(Path(args.output_dir), int(args.disk_limit * GIB))
    with listen(args.server_name, args.server_port) as listener:
        pipe = open_pipeline(args, config, teamwork)
        engine = PipelineEngine(pipe)
        session_bytes = warm_up(engine)
        most = args.max_sessions or places(
            session_bytes, step_bytes(pipe.setup, pipe.dit.dtype), pipe.device
        )
        own = is_loopback(args.server_name) and not args.allowed_host  # else a proxy is in front
        token = args.token or (None if own else new_token())
        options = AppOptions(
            Access.of(args.server_name, args.server_port, token, args.allowed_host),
            about=about_model(
                title="Rolling Forcing",
                model="random weights" if args.random_weights else config.generator_name,
                in_flight=pipe.setup.levels.num - 1 if pipe.setup.kind == "rolling" else 0,
                sinks=engine.sinks,
                examples=read_prompts(prompts),
                composer=read_composer(pipe.setup),
            ),
        )
        pool_options = PoolOptions(
            most,
            most if own else SESSIONS_PER_ADDRESS,
            lead=args.lead,
            idle_seconds=args.idle_seconds,
        )
        app = build_app(SessionPool(engine, storage, pool_options), options)
        print(f"Open {address_of(args, token)}")
        print(REACHED_HERE if own else REACHED_BY_TOKEN, flush=True)
        with ended_with(teamwork):
            run(app, listener, proxied=bool(args.allowed_host))


@contextmanager
def ended_with(teamwork: "Teamwork | None") -> Iterator[None]:
    """End what runs within once the team is lost, with a sentence."""
    if teamwork is None:
        yield
        return
    here = get_ident()
    teamwork.when_lost = lambda: signal.pthread_kill(here, signal.SIGINT)
    # A command that a script starts in the background ignores this signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        if not teamwork.lost:
            raise
    finally:
        signal.signal(signal.SIGINT, before)
    if teamwork.lost:
        raise UserError("a rank has ended, and the sessions with it: start again")


if __name__ == "__main__":
    sys.exit(run_main(main))
