"""The engine of a real pipeline: which sinks a viewer may choose from, what full memory leaves."""

import gc
import weakref

import pytest
import torch
from torch import Tensor

from pipeline import load_pipeline
from server.engine import PipelineEngine, take_step
from tests.conftest import TinyWorld
from utils.errors import UserError
from wan.vae import StreamingDecoder


def test_a_viewer_may_leave_the_sink_out(tiny_world: TinyWorld) -> None:
    engine = PipelineEngine(load_pipeline(tiny_world.config, tiny_world.checkpoint, device="cpu"))
    assert engine.sinks == (3, 0)
    text = engine.encode("a")
    sizes = [
        session.pipe.setup.policy.sink_frames
        for session in (engine.start("a", 1, None, text, sink) for sink in (None, 3, 0))
    ]
    assert sizes == [3, 3, 0]
    with pytest.raises(UserError, match="sink must be one of 3, 0 latent frames"):
        engine.start("a", 1, None, text, 5)


def test_what_a_step_held_is_free_again(
    tiny_world: TinyWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error that was kept to be told had all tensors of the step in its traceback."""
    engine = PipelineEngine(load_pipeline(tiny_world.config, tiny_world.checkpoint, device="cpu"))
    session = engine.start("a", 1, None, engine.encode("a"))
    held: list[weakref.ref[object]] = [weakref.ref(session._stream.rollout.cache)]

    def full(decoder: StreamingDecoder, latents: Tensor) -> Tensor:
        large = torch.zeros(8)
        held.append(weakref.ref(large))
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(StreamingDecoder, "decode", full)
    step = take_step(session, [])
    assert isinstance(step.error, torch.OutOfMemoryError)
    assert held[1]() is None
    session.close()
    gc.collect()
    assert held[0]() is None
