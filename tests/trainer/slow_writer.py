"""train.py whose state of one step waits for ever before its metadata are written.

python slow_writer.py step_000004 -- --config_path …
"""

import sys
import time
from typing import Any

from torch.distributed.checkpoint import FileSystemWriter

import train
from utils.cli import run_main

if __name__ == "__main__":
    held_up = sys.argv.pop(1)
    finish = FileSystemWriter.finish

    def slow(self: Any, **given: Any) -> None:
        if held_up in str(self.path):
            time.sleep(600)
        finish(self, **given)

    FileSystemWriter.finish = slow  # type: ignore[method-assign]
    sys.exit(run_main(train.main))
