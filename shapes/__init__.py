"""The shapes world, in which everything in a video is known; reached by name (utils/packages.py).

Nothing imports it. What it offers to others stands here; each part is imported where it is used.
"""

from types import ModuleType
from typing import TYPE_CHECKING

from utils.errors import UserError

if TYPE_CHECKING:
    from shapes.dataset import ShapesVideos
    from shapes.truth import ShapesTruth
    from trainer.tasks import Task


def open_dataset(split: str, *, num_frames: int, height: int, width: int) -> "ShapesVideos":
    """Clips without end, drawn on demand: split `train` or `heldout`, height equal to width."""
    from shapes.dataset import ShapesVideos

    return ShapesVideos(split, num_frames, height, width)


def open_task(name: str) -> "type[Task]":
    """The training of its text encoder."""
    from shapes.text_encoder import TextEncoderTraining

    if name != "text_encoder":
        raise UserError(f"trainer: shapes:{name} is unknown: use shapes:text_encoder")
    return TextEncoderTraining


def open_meter() -> "ShapesTruth":
    """The truth about a video of its captions."""
    from shapes.truth import ShapesTruth

    return ShapesTruth()


def open_demo() -> ModuleType:
    """The model that ships: what a command without a config runs."""
    from shapes import demo

    return demo


def held_out_prompts(count: int) -> list[str]:
    """Captions of the first `count` held-out scenes."""
    from shapes.world import sample_scene

    return [sample_scene(0, index, split="heldout").caption for index in range(count)]
