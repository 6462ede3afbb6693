"""How video is made: schedules, the rollout engine, streams and whole videos."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.stream import Stream
    from pipeline.text_to_video import VideoPipeline, load_pipeline

__all__ = ["Stream", "VideoPipeline", "load_pipeline"]


def __getattr__(name: str) -> Any:
    """Import the public names when they are first used: PyTorch takes seconds."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pipeline.stream import Stream
    from pipeline.text_to_video import VideoPipeline, load_pipeline

    names = {"Stream": Stream, "VideoPipeline": VideoPipeline, "load_pipeline": load_pipeline}
    globals().update(names)
    return names[name]
