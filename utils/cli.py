"""What all entry points share: one sentence and exit code 2 for a person's mistake."""

import logging
import sys
from collections.abc import Callable, Sequence

from utils.errors import UserError

BAD_INPUT = 2


def run_main(main: Callable[[Sequence[str]], int], argv: Sequence[str] | None = None) -> int:
    """Run `main(argv)`; turn UserError into one sentence on stderr and exit code 2."""
    try:
        return main(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return BAD_INPUT
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130


def set_up_logging(*, quiet: bool = False) -> None:
    """Messages of the library go to stderr, one plain line each; only warnings if `quiet`."""
    logging.basicConfig(
        level=logging.WARNING if quiet else logging.INFO, format="%(message)s", stream=sys.stderr
    )
    for chatty in ("httpx", "urllib3", "diffusers", "transformers", "PIL"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
