"""Stands in for `pipeline.session.Session` until it is there."""

from types import SimpleNamespace
from typing import Any


class ShimSession:
    """One stream."""

    def __init__(self, pipe: Any, prompt: str, seed: Any, seconds: Any, text: Any) -> None:
        shape = pipe.shape
        self.pipe = pipe
        self.frames_left = None if seconds is None else max(1, round(seconds * pipe.setup.fps))
        latent = None if seconds is None else shape.latent_frames(self.frames_left)
        self.stream = pipe.open_stream(text, seed=seed, num_latent_frames=latent)
        self.seed, self.prompt = self.stream.seed, prompt
        self.frames_made, self.num_bytes, self.branch_points = 0, 0, []
        self.seen = 0

    @property
    def timeline(self) -> Any:
        return self.stream.timeline

    def step(self) -> Any:
        if self.frames_left is not None and self.frames_made >= self.frames_left:
            return None
        index = self.stream.next_index
        frames = self.stream.next_block()
        if frames is None:
            return None
        if self.frames_left is not None:
            frames = frames[: self.frames_left - self.frames_made]
        first, self.frames_made = self.frames_made, self.frames_made + len(frames)
        applied = tuple(self.stream.changes[self.seen :])
        self.seen += len(applied)
        self.num_bytes = self.stream.rollout.cache.num_bytes
        return SimpleNamespace(index=index, frames=frames, first_frame=first, applied=applied)

    def set_prompt(
        self, prompt: Any, *, policy: str, blend_blocks: int, seed: Any, text: Any
    ) -> Any:
        return self.stream.set_prompt(prompt, policy, blend_blocks, seed=seed, text=text)

    def branch(self, point: Any, prompt: Any, seed: Any, text: Any) -> Any:
        raise NotImplementedError

    def record(self) -> dict[str, Any]:
        return {"seed": self.seed, "prompt": self.prompt}

    def view(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        self.stream.close()
