"""Which card holds what: memory of the published 1.3B model under each profile.

    python scripts/cards.py

Computed from sizes (`pipeline/memory.py`; tests/test_small_cards.py holds it against what is
counted), never measured. The table is Markdown, of bfloat16. The last column is what is listed and
1.5 GiB for CUDA itself.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run by its path: the tree that it lies in comes first
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.cli import parse_command, run_main

MODEL = "configs/models/Wan2.1-T2V-1.3B.json"
CONFIG = "configs/rolling_forcing_dmd.yaml"


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--config_path", default=CONFIG, help=f"(default: {CONFIG})")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the config")
    return parser


def main(argv: Sequence[str]) -> int:
    """Parse, compute, print."""
    args = parse_command(build_parser(), argv)
    print(table(args.config_path, args.overrides))
    return 0


def table(config_path: str = CONFIG, overrides: Sequence[str] = ()) -> str:
    """The table of all profiles."""
    import torch

    from pipeline.memory import needed, phases, readable, with_profile
    from pipeline.random_weights import read_preset
    from pipeline.setup import Setup
    from utils.config import find_file, load_config
    from utils.profiles import PROFILES, overrides_of
    from wan.dit import DiTConfig

    preset = find_file(MODEL, "model preset")
    sizes = DiTConfig.from_dict(read_preset(preset), source=preset)
    config = load_config(config_path, overrides)
    rows = ["| profile | sets | to encode prompts | to make videos | a card needs |"]
    rows.append("|---|---|---:|---:|---:|")
    for name, profile in PROFILES.items():
        setup = with_profile(Setup.of(config, sizes=sizes), name)
        found = {p.doing: readable(p.total) for p in phases(setup, torch.bfloat16)}
        sets = ", ".join(f"`{item}`" for item in overrides_of(profile)) or "nothing"
        encoding = found.get("encode prompts", "on the CPU")
        rows.append(
            f"| `{name}` | {sets} | {encoding} | {found['make videos']} "
            f"| {readable(needed(setup, torch.bfloat16))} |"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(run_main(main))
