"""The engine of a real pipeline: which sinks a viewer may choose from."""

import pytest

from pipeline import load_pipeline
from server.engine import PipelineEngine
from tests.conftest import TinyWorld
from utils.errors import UserError


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
