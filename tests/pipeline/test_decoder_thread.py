"""A VAE on a device of its own, where a thread decodes: the same video, made at the same places."""

from collections.abc import Iterator
from itertools import count
from threading import Event
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from pipeline import load_pipeline
from pipeline.changes import Change
from pipeline.session import Session
from pipeline.stream import Stream, directed
from pipeline.text_to_video import VideoPipeline
from tests.conftest import TinyWorld
from utils.errors import UserError
from wan.vae import WanVAE


class VAEApart(WanVAE):
    """On a device that is another one by its name alone."""

    @property
    def device(self) -> torch.device:
        """See `WanVAE`."""
        return torch.device("cpu:0")


@pytest.fixture(scope="module")
def near(tiny_world: TinyWorld) -> VideoPipeline:
    return load_pipeline(tiny_world.config, tiny_world.checkpoint, device="cpu")


@pytest.fixture(scope="module")
def apart(near: VideoPipeline) -> VideoPipeline:
    return VideoPipeline(near.setup, near.dit, vae=VAEApart(near.vae.model), text=near._text)


@pytest.fixture
def streams(near: VideoPipeline, apart: VideoPipeline) -> Iterator[list[Stream]]:
    """A stream of either kind."""
    opened = [pipe.stream("a red ball", seed=3) for pipe in (near, apart)]
    assert [stream.blocks_ahead for stream in opened] == [0, 1]
    yield opened
    for stream in opened:
        stream.close()


def blocks(stream: Stream, count: int) -> Tensor:
    made = [stream.next_block() for _ in range(count)]
    return torch.cat([frames for frames in made if frames is not None])


def test_a_block_is_handed_out_before_the_next_one_is_made(streams: list[Stream]) -> None:
    """So a change is heard by the next window, whichever device decodes."""
    made = []
    for stream in streams:
        first = blocks(stream, 2)
        assert stream.rollout.next_block == 2
        stream.set_prompt("a blue ball", "cut")
        made.append(torch.cat([first, blocks(stream, 2)]))
    assert torch.equal(*made)


@pytest.mark.parametrize("prefix_frames", ["reconstructed", "none"])
def test_a_block_is_made_while_the_one_before_is_decoded(
    near: VideoPipeline, apart: VideoPipeline, prefix_frames: Any
) -> None:
    """The decoder of block 2 waits for the pass of block 3, and there is no other order."""
    changes = [Change(3, "blue", "recache"), Change(5, "green", "cut")]
    image = torch.randint(256, (32, 48, 3), dtype=torch.uint8)
    made = []
    for pipe in (near, apart):
        with pipe.stream(
            "a", seed=3, num_latent_frames=18, image=image, prefix_frames=prefix_frames
        ) as stream:
            if pipe is apart:
                wait_for_the_next_block(stream)
            texts = {c.prompt: pipe.encode_prompts([c.prompt]) for c in changes}
            made.append(torch.cat(list(directed(stream, changes, texts.__getitem__))))
            assert [change.block for change in stream.changes] == [3, 5]
    assert torch.equal(*made)


def wait_for_the_next_block(stream: Stream) -> None:
    """The third call of the decoder, that of block 2, does."""
    passed, step, decode, calls = Event(), stream.rollout.step, stream._decoder.decode, count(1)

    def stepped() -> Any:
        result = step()
        if result is not None and 3 in result.finished:
            passed.set()
        return result

    def waiting(latents: Tensor) -> Tensor:
        if next(calls) == 3:
            assert passed.wait(10), "block 3 was not made meanwhile"
        return decode(latents)

    stream.rollout.step = stepped  # type: ignore[assignment, method-assign]
    stream._decoder.decode = waiting  # type: ignore[method-assign]


def test_a_state_between_is_exact(streams: list[Stream], near: VideoPipeline) -> None:
    """Taken while a block is still being decoded."""
    expected = blocks(streams[0], 4)
    started = [streams[1].start_block() for _ in range(2)]
    state = streams[1].state_dict()
    frames = [start() for start in started if start is not None]
    with near.stream("a", seed=3) as other:
        other.load_state_dict(state)
        assert torch.equal(torch.cat([*frames, blocks(other, 2)]), expected)


@pytest.mark.slow
def test_sessions_and_their_branches_are_the_same(
    near: VideoPipeline, apart: VideoPipeline
) -> None:
    sessions = [Session.start(pipe, "a", seed=1) for pipe in (near, apart)]
    for _ in range(4):
        first, second = (session.step() for session in sessions)
        assert first is not None
        assert second is not None
        assert torch.equal(first.frames, second.frames)
    branches = [s.branch(s.branch_points[2], "b", policy="recache") for s in sessions]
    made = [[branch.step() for _ in range(2)] for branch in branches]
    assert all(torch.equal(a.frames, b.frames) for a, b in zip(*made, strict=True))  # type: ignore[union-attr]


def test_an_error_of_decoding(streams: list[Stream], monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that waits for its frames can be asked for them again."""
    expected, stream = blocks(streams[0], 3), streams[1]
    frames = [blocks(stream, 1)]
    with monkeypatch.context() as patch:
        patch.setattr(stream._decoder, "decode", Mock(side_effect=MemoryError("full")))
        with pytest.raises(MemoryError):
            stream.next_block()
        assert stream.next_index == 1
    frames.append(blocks(stream, 1))
    with monkeypatch.context() as patch:
        nan = torch.full((1, 4, 3, 32, 48), torch.nan)
        patch.setattr(stream._decoder, "decode", lambda _: nan)
        start = stream.start_block()
        assert start is not None
        with pytest.raises(UserError, match="block 2 has frames that are not numbers"):
            start()
    assert torch.equal(torch.cat(frames), expected[:21])
    for follow in (stream.next_block, stream.state_dict):  # gave what lacks a block, and no error
        with pytest.raises(RuntimeError, match="closed"):
            follow()


def test_the_vae_is_loaded_where_it_is_asked_for(tiny_world: TinyWorld) -> None:
    pipe = load_pipeline(tiny_world.config, device="cpu", overrides=["vae_device=cpu"])
    assert pipe.vae.device == torch.device("cpu")
    with pytest.raises(UserError, match="vae_device must be auto, cpu, cuda or cuda:N, not 'gpu'"):
        load_pipeline(tiny_world.config, device="cpu", overrides=["vae_device=gpu"])
    with pytest.raises(UserError, match=r"device cuda:99 (was asked for|does not exist)"):
        load_pipeline(tiny_world.config, device="cpu", overrides=["vae_device=cuda:99"])
