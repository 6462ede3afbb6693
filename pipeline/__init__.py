"""How video is made: schedules, the rollout engine, streams and whole videos."""

from pipeline.stream import Stream
from pipeline.text_to_video import VideoPipeline, load_pipeline

__all__ = ["Stream", "VideoPipeline", "load_pipeline"]
