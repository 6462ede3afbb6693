"""Train: distillation, ODE initialisation, flow matching, VAE, on one process or many.

    torchrun --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint 127.0.0.1:29500 \\
        train.py -- --config_path configs/rolling_forcing_dmd.yaml --logdir logs/rolling_forcing

The same command resumes a run that was stopped.
"""

import argparse
import logging
import math
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from utils.cli import INTERRUPTED, parse_command, run_main, set_up_logging
from utils.distributed import Ranks
from utils.errors import UserError
from utils.files import locked

logger = logging.getLogger(__name__)


def build_parser() -> argparse.ArgumentParser:
    """The command line: published flags first, then ours."""
    parser = argparse.ArgumentParser(prog="train.py", description=__doc__.split("\n")[0])
    parser.add_argument("--config_path", required=True, help="experiment file")
    parser.add_argument("--logdir", required=True, help="folder of the run; resumed if it has one")
    parser.add_argument("--no_save", action="store_true", help="write no checkpoints")
    parser.add_argument("--no_visualize", action="store_true", help="make no sample videos")
    parser.add_argument("--disable-wandb", action="store_true", help="log to files only")
    parser.add_argument("--wandb-save-dir", metavar="FOLDER", help="where W&B keeps its files")
    parser.add_argument(
        "--dry_run", action="store_true", help="check config and data, predict memory, and exit"
    )
    parser.add_argument("--world_size", type=int, help="ranks to estimate for, with --dry_run")
    parser.add_argument(
        "--tflops", type=float, help="TFLOP/s of a rank to compute hours from, with --dry_run"
    )
    parser.add_argument(
        "--gpu_gb", type=float, help="memory of a GPU, with --dry_run (default: 80 and 141)"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the config")
    return parser


def main(argv: Sequence[str]) -> int:
    """Parse, build, train."""
    args = parse_command(build_parser(), argv)
    ranks = Ranks.from_environment()
    set_up_logging(quiet=not ranks.is_main)
    from utils.config import load_config

    config = load_config(args.config_path, args.overrides)
    for flag in ("world_size", "tflops", "gpu_gb"):
        value = vars(args)[flag]
        if value is not None and not args.dry_run:
            raise UserError(f"--{flag} is of --dry_run; add that flag, or drop --{flag}")
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{flag} must be a number above 0, not {value}")
    from trainer.metrics import WandbSettings
    from trainer.sharding import open_world
    from trainer.trainer import Trainer
    from trainer.updates import NonFiniteError
    from trainer.watch import LostRanksError, end_alone

    if args.dry_run:
        from trainer.estimate import CARDS, TFLOPS, dry_run_report

        world, tflops = args.world_size or ranks.world, args.tflops or TFLOPS
        cards = (args.gpu_gb,) if args.gpu_gb else CARDS
        print(dry_run_report(config, world, tflops=tflops, cards=cards))
        return 0
    wandb = None
    if not args.disable_wandb:
        folder = Path(args.wandb_save_dir) if args.wandb_save_dir else None
        wandb = WandbSettings.from_config(config, folder)
        if wandb is None:
            logger.info("no W&B log: set wandb_project=… for one")
    logdir = Path(args.logdir)
    limit = max(config.first_step_timeout, config.collective_timeout)
    with (
        open_world(config.device, limit=limit) as world,
        locked(logdir, "use another --logdir", is_main=world.is_main),
    ):
        try:
            trainer = Trainer(
                config,
                world,
                logdir,
                wandb=wandb,
                save=not args.no_save,
                visualise=not args.no_visualize,
            )
            trainer.train()
        except NonFiniteError as error:
            if world.is_main:
                print(f"stopped: {error}", file=sys.stderr)
            return 1
        except LostRanksError as error:
            end_alone(f"stopped: {error}")
    return INTERRUPTED if trainer.stopped_by == signal.SIGINT else 0


if __name__ == "__main__":
    sys.exit(run_main(main))
