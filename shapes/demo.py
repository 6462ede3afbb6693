"""The model that ships: what a command without a config runs, and what it says at its end."""

import logging
import shlex
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.progress import speed
from shapes.world import parse_caption
from utils.config import ROOT, Config
from utils.errors import UserError

logger = logging.getLogger(__name__)

CONFIG = "configs/shapes/rolling_forcing.yaml"
CHECKPOINT = "checkpoints/shapes_rolling_forcing.pt"
LIVE_CHECKPOINT = "checkpoints/shapes_rolling_directed.pt"
"""The page's: a student that saw changes of prompt in training, and follows them."""
PROMPTS = "prompts/shapes_demo.txt"
FOLDER = "videos/demo"
SECONDS = 10.0
CONTACT_SHEET = "contact_sheet.png"

PUBLISHED_CONFIG = "configs/rolling_forcing_dmd.yaml"
PUBLISHED_CHECKPOINT = "checkpoints/rolling_forcing_dmd.pt"
PUBLISHED_PROMPTS = "prompts/example_prompts.txt"
DOWNLOADS = ("wan2.1-1.3b", "rolling-forcing")
ANOTHER_PROMPT = (
    "A gradient from black to gray: a small purple square glides upwards at a fast pace."
)


def require_model(config: Config, checkpoint: str) -> None:
    """UserError, with what to fetch instead, if the model that ships is not in this checkout."""
    parts = [Path(config.model_root) / config.generator_name]
    if checkpoint in (CHECKPOINT, LIVE_CHECKPOINT):
        parts.append(Path(checkpoint))
    missing = [str(part) for part in parts if not (part.exists() or (ROOT / part).exists())]
    if missing:
        raise UserError(
            f"the model that ships is not in this checkout ({', '.join(missing)} missing); fetch "
            f"the published one with `python scripts/download.py {' '.join(DOWNLOADS)}` and "
            f"give --config_path {PUBLISHED_CONFIG} --checkpoint_path {PUBLISHED_CHECKPOINT} "
            "--data_path PROMPTS"
        )


def warn_of_other_prompts(prompts: Sequence[str]) -> None:
    """Say which prompts the model that ships does not understand: it knows the shapes world only.

    A UserError of the parser tells what is wrong, and how a caption reads.
    """
    for prompt in dict.fromkeys(prompts):
        try:
            parse_caption(prompt)
        except UserError as error:
            logger.warning("expect nothing of this prompt, the model knows shapes only: %s", error)


def closing_text(
    videos: Mapping[Path, Mapping[str, Any]], sheet: Path, fps: float, model: Sequence[str]
) -> str:
    """Where the videos are, how fast they came, and what to try next.

    `videos`: path and record of each, at least one (see `BatchRun.made`); they play at `fps`.
    `sheet`: their contact sheet. `model`: as in `next_commands`.
    """
    lengths = {path: record["frames"] / fps for path, record in videos.items()}
    place = "" if Path.cwd() == ROOT else f" (in {ROOT})"
    lines = [
        "",
        "Videos:",
        *(f"  {path} ({seconds:g} s)" for path, seconds in lengths.items()),
        "",
        "Contact sheet, a row for each video:",
        f"  {sheet}",
        "",
        *(f"{line}." for line in measured(list(videos.values()), fps)),
        "",
        f"To try next{place}:",
    ]
    for title, commands in next_commands(next(iter(videos)).parent, model).items():
        lines += ["", f"  # {title}", *(f"  {shlex.join(command)}" for command in commands)]
    return "\n".join(lines)


def measured(records: Sequence[Mapping[str, Any]], fps: float) -> list[str]:
    """The speed of these videos, which play at `fps`, in words; from their own timings."""
    timings = [record["timings"] for record in records]
    first = statistics.median(timing["first_frame_s"] for timing in timings)
    rate = sum(record["frames"] for record in records) / sum(t["total_s"] for t in timings)
    devices = ", ".join(sorted({record["device"] for record in records}))
    return [
        f"First frame after {first:.2f} s{' (median)' if len(records) > 1 else ''}",
        f"End to end, VAE and mp4 included: {speed(rate, fps)}, on {devices}",
    ]


def next_commands(folder: Path, model: Sequence[str]) -> dict[str, list[list[str]]]:
    """Commands to type in the project's root, by what they are for.

    `folder`: where the videos of this run are. `model`: flags and overrides of the config that
    choose another model than the one that ships; none if it is that.
    """
    own_model = model if "--checkpoint_path" in model else ["--checkpoint_path", CHECKPOINT, *model]
    figures = str(from_root(folder / "evaluation.json"))
    python = python_command()
    return {
        "another prompt, a whole minute": [
            [
                *(python, "inference.py", "--prompt", ANOTHER_PROMPT, "--duration", "60"),
                *("--output_folder", "videos/minute", *model),
            ]
        ],
        "measure the model on captions that it was not trained on": [
            [
                *(python, "scripts/evaluate.py", "--prompts", "4", "--seconds", "30"),
                *("--json", figures, "--config_path", CONFIG, *own_model),
            ]
        ],
        "the published 1.3B model (more than 20 GB to fetch; wants a GPU)": [
            [python, "scripts/download.py", *DOWNLOADS],
            [
                *(python, "inference.py", "--config_path", PUBLISHED_CONFIG),
                *("--checkpoint_path", PUBLISHED_CHECKPOINT, "--use_ema"),
                *("--data_path", PUBLISHED_PROMPTS, "--duration", "30"),
                *("--output_folder", "videos/published"),
            ],
        ],
    }


def python_command() -> str:
    """What to type for the Python that runs this."""
    if shutil.which("python") == sys.executable:
        return "python"
    return str(from_root(Path(sys.executable)))


def from_root(path: Path) -> Path:
    """A path as it is written in the project's root."""
    path = path.absolute()
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
