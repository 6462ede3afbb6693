"""What all entry points share: one sentence and exit code 2 for a person's mistake."""

import argparse
import io
import logging
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from utils.distributed import Ranks
from utils.errors import BAD_INPUT, UserError
from utils.files import check_file

INTERRUPTED = 130  # exit code of a person's Ctrl-C, as shells have it
UNREAD = 141  # exit code if nobody reads the output any more (`| head`), as shells have it

TOO_LITTLE_MEMORY = (
    "there is too little memory for this; close other programs, or ask for less at once: a smaller "
    "resolution or batch"
)


def run_main(main: Callable[[Sequence[str]], int], argv: Sequence[str] | None = None) -> int:
    """Run `main(argv)`; turn UserError into one sentence on stderr and exit code 2.

    So is what the system says of a file that nobody asked for before (OSError), and the end of
    memory.
    `main` imports what is heavy itself, so that an interruption meanwhile is met here, too. What a
    console cannot show (an accent where it is not UTF-8) becomes a question mark.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        code = main(sys.argv[1:] if argv is None else argv)
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        _drop_output()
        return UNREAD
    except (UserError, OSError) as error:
        if isinstance(error, OSError) and error.errno is None:  # of a library, not of the system
            raise
        close_progress_bars()
        sys.stderr.write(f"error: {' '.join(_sentence(error).split())}\n")
        _drop_output()
        return BAD_INPUT
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        close_progress_bars()
        sys.stderr.write(f"error: {TOO_LITTLE_MEMORY}\n")
        _drop_output()
        return BAD_INPUT
    except KeyboardInterrupt:
        close_progress_bars()
        if Ranks.from_environment().is_main:
            sys.stderr.write("interrupted\n")
        return INTERRUPTED
    return code


def _is_out_of_memory(error: RuntimeError | MemoryError) -> bool:
    """See `utils.devices`, which is not imported where PyTorch is not there yet."""
    if "torch" not in sys.modules:
        return isinstance(error, MemoryError)
    from utils.devices import is_out_of_memory

    return is_out_of_memory(error)


def _sentence(error: UserError | OSError) -> str:
    """What went wrong, in one sentence."""
    if isinstance(error, UserError):
        return str(error)
    about = "" if error.filename is None else f"{error.filename}: "
    return f"{about}{str(error.strerror).lower()}"


def _drop_output() -> None:
    """Write what stdout still holds, or nothing more, so that closing it at the end is silent."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        with suppress(OSError), Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())


def parse_command(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """The command line, in which `key=value` overrides may stand between the flags.

    A `--` before flags is what torchrun wants and means nothing; behind a flag that takes several
    words it ends them.
    """
    following = [*argv, "-"][1:]
    words = [
        word
        for place, word in enumerate(argv)
        if word != "--" or not (place == 0 or following[place].startswith("-"))
    ]
    args, unknown = parser.parse_known_intermixed_args(words)
    if unknown:
        flags = [word for word in unknown if word.startswith("-")]
        parser.error(f"unrecognized arguments: {' '.join(flags or unknown)}")
    return args


def close_progress_bars() -> None:
    """End the lines of progress that an error left open, so that its text has one of its own."""
    if "tqdm" in sys.modules:
        from tqdm import tqdm

        for bar in list(tqdm._instances):
            bar.close()


class LinesAboveBars(logging.StreamHandler):
    """Messages on stderr, each on a line of its own above the line of progress, if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler`."""
        if "tqdm" not in sys.modules:
            super().emit(record)
            return
        from tqdm import tqdm

        with tqdm.external_write_mode(file=self.stream):
            super().emit(record)


def check_outputs(*paths: Path | None) -> None:
    """UserError unless each path can become a file, so that no work is lost at its end."""
    for path in paths:
        if path is not None:
            check_file(path)


def check_picture(flag: str, path: str | Path | None) -> None:
    """UserError now, not when all work is done, for a name that no PNG can have."""
    if path is None:
        return
    if Path(path).suffix.lower() != ".png":
        raise UserError(f"{flag} {path} must be the name of a .png file")
    check_file(path)


def require_matplotlib() -> None:
    """UserError if it is not installed, before the work that is to be drawn."""
    if find_spec("matplotlib") is None:
        raise UserError("plots need matplotlib: pip install matplotlib")


def set_up_logging(*, quiet: bool = False) -> None:
    """Messages of the library go to stderr, one plain line each; only warnings if `quiet`."""
    level = logging.WARNING if quiet else logging.INFO
    logging.basicConfig(level=level, format="%(message)s", handlers=[LinesAboveBars(sys.stderr)])
    for chatty in ("httpx", "urllib3", "diffusers", "transformers", "PIL"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
