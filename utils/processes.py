"""Running the project's own commands as processes: ranks, threads, signals, and how runs end."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from utils.config import ROOT, Config
from utils.errors import UserError

EXPORT_PREFIX = "checkpoint_model_"
POLL_SECONDS = 0.05
# glibc keeps what is freed instead of faulting it in anew at every step: for small images on a CPU
# a tenth of the time.
KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": str(2 * 10**9),
    "MALLOC_TOP_PAD_": str(100 * 10**6),
}


def default_processes() -> int:
    """How many processes share a job on this machine: one per GPU, else up to two of the cores."""
    import torch

    return torch.cuda.device_count() or min(2, usable_cores())


def usable_cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def script_command(script: str, arguments: Sequence[object], processes: int = 1) -> tuple[str, ...]:
    """The command of a script, by its path from the project's root; torchrun for several ranks."""
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return (*start, str(ROOT / script), *map(str, arguments))


def training_command(
    config: Config, path: Path, logdir: Path, overrides: Sequence[str], processes: int
) -> tuple[str, ...]:
    """`train.py` on at most `processes` ranks, with the same videos per update on any number.

    `config` is what `path` and `overrides` say.
    """
    ranks, batch = split_batch(config, processes)
    flags = ("--config_path", path, "--logdir", logdir, "--disable-wandb", "--no_visualize")
    sizes = (f"batch_size={batch}", f"global_batch_size={videos_per_update(config)}")
    return script_command("train.py", (*flags, *overrides, *sizes), ranks)


def split_batch(config: Config, processes: int) -> tuple[int, int]:
    """Ranks, and videos per rank and micro-batch: the most that divide an update evenly."""
    videos = videos_per_update(config)
    ranks = _largest_divisor(videos, processes)
    return ranks, _largest_divisor(videos // ranks, config.batch_size)


def videos_per_update(config: Config) -> int:
    """How many videos an update is made from when `training_command` trains."""
    wanted = config.global_batch_size or config.total_batch_size
    return wanted or config.batch_size * (config.gradient_accumulation_steps or 1)


def _largest_divisor(number: int, limit: int) -> int:
    return next(n for n in range(max(1, min(number, limit)), 0, -1) if number % n == 0)


def run_command(name: str, command: Sequence[str]) -> None:
    """Run a command to its end, and end it with us.

    Raises:
        UserError: it fails; its own message stands above.
    """
    run_together({name: command})


def run_together(commands: Mapping[str, Sequence[str]], *, at_most: int | None = None) -> None:
    """Run commands by name, `at_most` (all) of them side by side, and end them with us.

    Raises:
        UserError: one fails, which ends the others; its own message stands above.
    """
    width = len(commands) if at_most is None else min(len(commands), at_most)
    ranks = width * max(map(_number_of_ranks, commands.values()))
    threads = str(max(1, usable_cores() // ranks))
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**KEEP_MEMORY, "OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "passive", **os.environ}
    env["PYTHONPATH"] = path  # a script is a file in a folder: this finds the modules beside it
    waiting = list(commands.items())
    running: dict[str, subprocess.Popen[bytes]] = {}
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while waiting or running:
            while waiting and len(running) < width:
                name, command = waiting.pop(0)
                running[name] = subprocess.Popen(command, env=env)
            time.sleep(POLL_SECONDS)
            for name, child in list(running.items()):
                code = child.poll()
                if code is not None:
                    del running[name]
                    if code != 0:
                        raise UserError(f"{name} failed with exit code {code}; see above")
    finally:
        signal.signal(signal.SIGTERM, before)
        for child in running.values():
            child.terminate()
        for child in running.values():
            child.wait()


def _number_of_ranks(command: Sequence[str]) -> int:
    return next((int(w.partition("=")[2]) for w in command if w.startswith("--nproc_per")), 1)


def export_folder(logdir: Path, step: int) -> Path:
    """Where a run's weights of a step go."""
    return logdir / f"{EXPORT_PREFIX}{step:06d}"


def final_export(logdir: Path, steps: int) -> Path | None:
    """The folder of exported weights that a training of so many steps ended with, if it did."""
    numbers = [
        folder.name.removeprefix(EXPORT_PREFIX) for folder in logdir.glob(f"{EXPORT_PREFIX}*")
    ]
    last = max((number for number in numbers if number.isdigit()), default="0", key=int)
    return logdir / f"{EXPORT_PREFIX}{last}" if 0 < steps <= int(last) else None
