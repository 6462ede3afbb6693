"""How fast the published sizes would be on one H200: predicted from counts, never measured.

    python scripts/predict.py

Operations and bytes are those of docs/counts.yaml (832x480, 1.3B, bf16, no merged clean pass), over
rates that others have measured on such a GPU. What is compiled moves the bytes that are counted
within the blocks of a pass. The table is Markdown. Its limit is the same work at the highest rate
of the matrix units, with all bytes moved meanwhile.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # run by its path: the tree that it lies in comes first
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.cli import parse_command, run_main

if TYPE_CHECKING:
    from pipeline.setup import Setup

TERA, GIGA = 10**12, 10**9
MODEL, COUNTS = "configs/models/Wan2.1-T2V-1.3B.json", "docs/counts.yaml"
METHODS = ("rolling_forcing_dmd", "self_forcing_dmd", "self_forcing_dmd_vsink1")


@dataclass(frozen=True)
class Rates:
    """Operations and bytes per second that a GPU keeps up."""

    matmul: float
    attention: float
    convolution: float
    moved: float
    to_host: float
    highest: float


EAGER = Rates(
    matmul=680 * TERA,
    attention=600 * TERA,
    convolution=450 * TERA,
    moved=3300 * GIGA,
    to_host=25 * GIGA,
    highest=790 * TERA,
)
COMPILED = replace(EAGER, moved=3800 * GIGA)
PASSES = ("window", "clean")


@dataclass(frozen=True)
class Predicted:
    """Seconds of the parts of a steady block, and of the same at the highest rate."""

    window: float
    clean: float
    decode: float
    copy: float
    windows: int
    dit_limit: float
    limit: float
    frames: int

    @property
    def dit(self) -> float:
        """All passes of a block."""
        return self.windows * self.window + self.clean

    @property
    def block(self) -> float:
        """From noise to frames in host memory."""
        return self.dit + self.decode + self.copy


def predict(
    setup: Setup, counts: dict[str, Any], decode: dict[str, Any], rates: Rates
) -> Predicted:
    """A steady block of a setup whose passes and decoding were counted."""
    from pipeline.timing import SteadyState
    from wan.flops import pass_attention_flops

    steady = SteadyState.of(setup.plan(setup.schedule(None)))
    tokens, windows, seconds = setup.shape.tokens_per_frame, 0, {}
    for own in steady.passes:
        (part,) = own.parts
        kind = "clean" if own.window is None else "window"
        windows += kind == "window"
        attended = pass_attention_flops(setup.sizes, part.view, tokens)
        multiplied = TERA * counts[kind]["tflop"] - attended
        seconds[kind] = (
            attended / rates.attention
            + multiplied / rates.matmul
            + GIGA * counts[kind]["moved"] / rates.moved
        )
    flop = TERA * (windows * counts["window"]["tflop"] + counts["clean"]["tflop"])
    convolved = TERA * decode["tflop"]
    frames = setup.layout.block_frames * setup.shape.strides.time
    pixels = 3 * frames * setup.shape.height * setup.shape.width
    return Predicted(
        **seconds,
        decode=convolved / rates.convolution + GIGA * decode["moved"] / rates.moved,
        copy=pixels / rates.to_host,
        windows=windows,
        dit_limit=flop / rates.highest,
        limit=(flop + convolved) / rates.highest,
        frames=frames,
    )


def table() -> str:
    """The predictions for all methods that were counted, as Markdown."""
    import yaml

    from pipeline.random_weights import read_preset
    from pipeline.setup import Setup
    from utils.config import find_file, load_config
    from wan.dit import DiTConfig

    counted = yaml.safe_load(find_file(COUNTS, "table of counts").read_text(encoding="utf-8"))
    sizes = DiTConfig.from_dict(read_preset(find_file(MODEL, "model preset")))
    lines = [
        "| predicted, one H200 | window ms | clean ms | DiT FPS | VAE ms | copy ms "
        "| end to end FPS | limit: DiT, end to end FPS |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    decode = counted["vae"]["decode"]
    for name in METHODS:
        config = load_config(f"configs/{name}.yaml", ["merge_clean_pass=false"])
        setup = Setup.of(config, sizes=sizes)
        lines.append(row(f"`{name}`", predict(setup, counted[name], decode, EAGER)))
        if name in counted["compiled"]:
            fused = counted["compiled"][name]
            passes = {kind: counted[name][kind] | {"moved": fused[kind]} for kind in PASSES}
            decoded = decode | {"moved": counted["vae"]["decode, compiled"]["moved"]}
            lines.append(row(f"`{name}`, compiled", predict(setup, passes, decoded, COMPILED)))
    return "\n".join(lines)


def row(name: str, found: Predicted) -> str:
    """A line of the table."""
    cells = [
        name,
        f"{found.windows} x {1000 * found.window:.0f}",
        *(f"{1000 * found.clean:.0f}", f"{found.frames / found.dit:.1f}"),
        *(f"{1000 * found.decode:.0f}", f"{1000 * found.copy:.1f}"),
        f"{found.frames / found.block:.1f}",
        f"{found.frames / found.dit_limit:.1f}, {found.frames / found.limit:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    return argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)


def main(argv: Sequence[str]) -> int:
    """Print the table."""
    parse_command(build_parser(), argv)
    print(table())
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
