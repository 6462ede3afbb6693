"""Draw where attention falls while a stream runs: on the sink, the recent frames, the window.

    python scripts/attention_maps.py --config_path configs/rolling_forcing_dmd.yaml \\
        --checkpoint_path checkpoints/rolling_forcing_dmd.pt --prompt "a sailing boat at dawn" \\
        --blocks 5,20 --layers 0,10,20,29 --levels all --out maps.png

A row is one layer at one level of a block, the columns what the queries of that block see; blocks
of the window are counted from it, so -1 is the cleaner block before it. Left the share of the
attention, right the share of each frame against even attention (1: as much as any other frame).
Values are means over heads, queries and samples of the batch. The video is not changed by it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # run by its path: the tree that it lies in comes first
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.cli import (
    check_picture,
    parse_command,
    require_matplotlib,
    run_main,
    set_up_logging,
)
from utils.errors import UserError
from utils.files import check_file, write_figure, write_text

if TYPE_CHECKING:
    from pipeline.attention_maps import AttentionMap


PICTURE = Path("outputs") / "attention_maps.png"
PRINTED_ROWS = 40  # up to here the numbers are written into their cells


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--config_path", required=True, help="experiment file")
    parser.add_argument("--checkpoint_path", help="distilled weights, .pt or .safetensors")
    parser.add_argument("--use_ema", action="store_true", help="use its generator_ema weights")
    parser.add_argument("--prompt", required=True, help="what the video shows")
    parser.add_argument("--blocks", default="5,20", help="blocks, from 0 on (default: %(default)s)")
    parser.add_argument("--layers", default="all", help="layers, as 0,5, or all (default)")
    parser.add_argument("--levels", default="all", help="levels, as 0,4, or all (default)")
    parser.add_argument("--seed", type=int, help="of the video (default: the config's)")
    parser.add_argument(
        "--out", type=Path, default=PICTURE, help="the picture (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, help="write the share of every frame to this file")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 … (default: a GPU if there is one)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the config")
    return parser


def main(argv: Sequence[str]) -> int:
    """Stream, record, draw."""
    args = parse_command(build_parser(), argv)
    set_up_logging()
    require_matplotlib()
    for path in (args.out, args.json):
        if path is not None:
            check_file(path)
    check_picture("--out", args.out)
    if not args.prompt.strip():
        raise UserError("the prompt is empty; write what the video should show")
    from utils.config import load_config

    config = load_config(args.config_path, args.overrides)
    levels = numbers(args.levels, config.num_levels, "--levels")
    blocks = numbers(args.blocks, None, "--blocks")
    from pipeline import load_pipeline
    from pipeline.attention_maps import AttentionRecorder

    pipe = load_pipeline(config, args.checkpoint_path, args.device, use_ema=args.use_ema)
    layers = numbers(args.layers, pipe.dit.config.num_layers, "--layers")
    recorder = AttentionRecorder(pipe.layout, blocks=blocks, levels=levels, layers=layers)
    with pipe.stream(args.prompt, args.seed) as stream:
        stream.rollout.wrap_context = recorder
        while not recorder.complete:
            stream.rollout.step()
    if args.json is not None:
        write_json(args.json, args.prompt, recorder.maps)
        print(args.json)
    draw(recorder.maps, args.out, args.prompt)
    print(args.out)
    return 0


def numbers(text: str, limit: int | None, flag: str) -> list[int]:
    """`0,5` as numbers below `limit`, or `all` of them; UserError naming the flag."""
    if text == "all" and limit is not None:
        return list(range(limit))
    try:
        chosen = sorted({int(part) for part in text.split(",")})
    except ValueError as error:
        everything = " or all" if limit is not None else ""
        raise UserError(f"{flag} {text} must be numbers such as 0,5{everything}") from error
    if chosen[0] < 0 or (limit is not None and chosen[-1] >= limit):
        most = f"to {limit - 1}" if limit is not None else "on"
        raise UserError(f"{flag} {text}: they are numbered from 0 {most}")
    return chosen


def write_json(path: Path, prompt: str, maps: Sequence[AttentionMap]) -> None:
    """Every map with its groups: `groups` holds [share, number of frames] by name."""
    entries = [asdict(entry) | {"groups": entry.groups} for entry in maps]
    text = json.dumps({"prompt": prompt, "maps": entries}, ensure_ascii=False)
    write_text(path, text)


def draw(maps: Sequence[AttentionMap], out: Path, prompt: str) -> None:
    """Write the PNG: a row of two heat maps for each block."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from pipeline.attention_maps import group_names

    blocks = sorted({entry.block for entry in maps})
    rows = max(sum(entry.block == block for entry in maps) for block in blocks)
    columns = max(len(group_names(maps)), 4)
    size = 2 * (0.62 * columns + 2.0), len(blocks) * (0.19 * max(rows, 6) + 1.3) + 0.6
    with mpl.rc_context({"font.size": 9, "axes.titlesize": 10, "axes.titlelocation": "left"}):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(len(blocks), 2, squeeze=False)
        figure.suptitle(f"Attention: {prompt if len(prompt) <= 90 else prompt[:89] + '…'}")
        for block, pair in zip(blocks, axes, strict=True):
            own = [entry for entry in maps if entry.block == block]
            own.sort(key=lambda entry: (entry.layer, entry.level))
            draw_table(pair[0], own, f"block {block}: share of attention", per_frame=False)
            draw_table(pair[1], own, f"block {block}: per frame, even = 1", per_frame=True)
        write_figure(out, figure)


def draw_table(axis: Any, maps: Sequence[AttentionMap], title: str, *, per_frame: bool) -> None:
    """One heat map with its scale, layers set apart by lines."""
    import numpy as np
    from matplotlib.colors import CenteredNorm, Normalize

    from pipeline.attention_maps import group_names, group_table

    names = group_names(maps)
    values = np.array(group_table(maps, names, per_frame=per_frame))
    shown = np.log2(np.maximum(values, 2**-6)) if per_frame else values
    farthest = max(1.0, float(np.nanmax(np.abs(shown))))
    norm = CenteredNorm(0, farthest) if per_frame else Normalize(0, np.nanmax(values))
    axis.set_facecolor("#e9ebee")  # where nothing is in view
    image = axis.imshow(shown, norm=norm, cmap="RdBu_r" if per_frame else "viridis", aspect="auto")
    axis.set_title(title, fontweight="bold")
    axis.set_xticks(range(len(names)), [column_label(name) for name in names])
    axis.tick_params(length=0)
    label_rows(axis, maps)
    for number, entry in enumerate(maps):
        if number and maps[number - 1].layer != entry.layer:
            axis.axhline(number - 0.5, color="white", lw=1.5)
    if len(maps) <= PRINTED_ROWS:
        for (row, column), value in np.ndenumerate(values):
            if not np.isnan(value):
                place = norm(shown[row, column])
                dark = not 0.2 < place < 0.8 if per_frame else place < 0.6
                ink = "white" if dark else "black"
                text = f"{value:.2f}"
                axis.text(column, row, text, ha="center", va="center", color=ink, fontsize=6.5)
    bar = axis.figure.colorbar(image, ax=axis, pad=0.02, aspect=25)
    bar.outline.set_visible(False)
    if per_frame:
        ticks = [tick for tick in range(-6, 7) if abs(tick) <= farthest]
        bar.set_ticks(ticks, labels=[f"{2.0**tick:g}" for tick in ticks])


def label_rows(axis: Any, maps: Sequence[AttentionMap]) -> None:
    """`layer 3 · level 0` for each row; with many rows each layer once, in its middle."""
    if len(maps) <= PRINTED_ROWS:
        labels = [f"layer {entry.layer} · level {entry.level}" for entry in maps]
        axis.set_yticks(range(len(maps)), labels)
        return
    layers = sorted({entry.layer for entry in maps})
    middles = [
        sum(rows) / len(rows)
        for layer in layers
        if (rows := [row for row, entry in enumerate(maps) if entry.layer == layer])
    ]
    axis.set_yticks(middles, [f"layer {layer}" for layer in layers])
    levels = sorted({entry.level for entry in maps})
    axis.set_ylabel(f"in each layer from top to bottom: levels {levels[0]} to {levels[-1]}")


def column_label(name: str | int) -> str:
    """A group's name as it stands below its column."""
    if isinstance(name, str):
        return name
    return "itself" if name == 0 else f"{name:+d}"


if __name__ == "__main__":
    sys.exit(run_main(main))
