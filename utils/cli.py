"""What all entry points share: one sentence and exit code 2 for a person's mistake."""

import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from utils.distributed import Ranks
from utils.errors import BAD_INPUT, UserError
from utils.files import check_file

INTERRUPTED = 130  # exit code of a person's Ctrl-C, as shells have it


def run_main(main: Callable[[Sequence[str]], int], argv: Sequence[str] | None = None) -> int:
    """Run `main(argv)`; turn UserError into one sentence on stderr and exit code 2."""
    try:
        return main(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return BAD_INPUT
    except KeyboardInterrupt:
        if Ranks.from_environment().is_main:
            sys.stderr.write("interrupted\n")
        return INTERRUPTED


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
    try:
        import matplotlib as mpl  # noqa: F401
    except ImportError as error:
        raise UserError("plots need matplotlib: pip install matplotlib") from error


def set_up_logging(*, quiet: bool = False) -> None:
    """Messages of the library go to stderr, one plain line each; only warnings if `quiet`."""
    logging.basicConfig(
        level=logging.WARNING if quiet else logging.INFO, format="%(message)s", stream=sys.stderr
    )
    for chatty in ("httpx", "urllib3", "diffusers", "transformers", "PIL"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
