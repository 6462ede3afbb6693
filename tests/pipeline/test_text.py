"""Prompts to embeddings: what was asked last is kept, as much as fits."""

import pytest
import torch

from pipeline import text
from pipeline.setup import Setup
from pipeline.text import TextSource
from tests.conftest import TinyWorld
from utils.config import load_config


def test_the_newest_embeddings_are_kept(
    tiny_world: TinyWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(tiny_world.config, ["device=cpu"])
    cpu = torch.device("cpu")
    source = TextSource(Setup.of(config), text_len=16, dtype=torch.float32, device=cpu)
    prompts = ["a red ball", "a blue cat", "the cat jumps"]
    once = [source([prompt]) for prompt in prompts]
    encoder = source.encoder()
    encode, asked = encoder.encode, []
    monkeypatch.setattr(encoder, "encode", lambda p: asked.append(*p) or encode(p))
    assert all(torch.equal(source([p]), e) for p, e in zip(prompts, once, strict=True))
    assert asked == [], "all fit"
    # room for two: what was asked longest ago goes
    budget = once[0].nbytes + max(once[1].nbytes, once[2].nbytes)
    monkeypatch.setattr(text, "REMEMBERED_BYTES", budget)
    source = TextSource(Setup.of(config), text_len=16, dtype=torch.float32, device=cpu)
    monkeypatch.setattr(source, "encoder", lambda: encoder)
    for prompt in (prompts[1], prompts[0], "the blue ball"):
        source([prompt])
    asked.clear()
    source([prompts[0]])
    assert asked == []
    source([prompts[1]])
    assert asked == [prompts[1]]
