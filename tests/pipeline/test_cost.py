"""What a steady stream may cost: copies and memory, counted. Waits: `tests/test_true_size.py`."""

import gc
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline import VideoPipeline
from pipeline.setup import Setup
from tests.tiny_pipeline import random_dit, write_config
from utils.config import load_config
from wan.rope import rotation
from wan.vae import WanVAE

aten = torch.ops.aten
COPIES = {
    aten.cat.default,
    aten.index_select.default,
    aten.index.Tensor,
    aten.gather.default,
    aten.clone.default,
    aten._to_copy.default,
    aten.copy_.default,
    aten.repeat.default,
}
STEADY = 9  # blocks after which every view has its full size, in all methods below
ROOT = Path(__file__).parents[2]


def tiny_pipeline(tmp_path, **values):
    settings = {
        "method": "rolling_forcing",
        "generator_name": "none",
        "height": 32,
        "width": 48,
        "denoising_step_list": [1000, 800, 600, 400, 200],
        **values,
    }
    config = load_config(write_config(tmp_path / "config.yaml", **settings))
    dit = random_dit()
    return VideoPipeline(Setup.of(config, sizes=dit.config), dit, vae=WanVAE.random(base_dim=4))


def text_of(pipe):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, 9, pipe.dit.config.text_dim, generator=generator)


def steady_stream(pipe):
    stream = pipe.open_stream(text_of(pipe), seed=0)
    while stream.next_index < STEADY:
        stream.next_block()
    return stream


class CacheTraffic(TorchDispatchMode):
    """Counts operators, and elements of per-head tensors `[..., heads, head_dim]` that are copied.

    Nothing but queries, keys and values has these last two axes.
    """

    def __init__(self, heads, head_dim):
        super().__init__()
        self.ending = (heads, head_dim)
        self.copied = 0
        self.written = 0
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls[func] += 1
        if func in COPIES and tuple(out.shape[-2:]) == self.ending:
            self.copied += out.numel()
        if func is aten.index_copy_.default and tuple(out.shape[-2:]) == self.ending:
            self.written += args[3].numel()
        return out


@pytest.fixture(
    scope="module",
    params=[
        {"method": "rolling_forcing"},
        {"method": "self_forcing", "model_kwargs": {"local_attn_size": 12, "sink_size": 3}},
        {"method": "infinite_forcing"},
    ],
    ids=lambda values: values["method"],
)
def pipe(request, tmp_path_factory):
    return tiny_pipeline(tmp_path_factory.mktemp("pipe"), **request.param)


@pytest.fixture(scope="module")
def steady(pipe):
    """A stream in its steady state, which the tests that only watch its blocks share."""
    return steady_stream(pipe)


def views_of(rollout):
    """Views of the passes that the next steps run, up to and with the next finished block.

    And the frames that go through the network in several parts.
    """
    views, joined, index = [], 0, rollout.index
    while True:
        own = rollout.plan.at(index)
        views += [part.view for part in own.parts]
        joined += sum(part.frames for part in own.parts) if len(own.parts) > 1 else 0
        index += 1
        if own.window is not None and rollout.plan.schedule.finishes(own.window):
            return views, joined


def test_a_steady_block_copies_of_the_cache_only_what_attention_reads(pipe):
    """Per layer and part: keys and values of the context once, and once joined with the queries'.

    What the parts of a pass have attended to is joined, too.
    The clean pass writes the block's own keys and values, and nothing else is written.
    """
    rollout = steady_stream(pipe).rollout
    config = pipe.dit.config
    frame = pipe.shape.tokens_per_frame * config.dim
    views, joined = views_of(rollout)
    expected = sum(len(view.frames) + len(view.positions) for view in views)
    with CacheTraffic(config.num_heads, config.head_dim) as traffic:
        while not rollout.step().finished:
            pass
    assert traffic.copied == config.num_layers * (2 * expected + joined) * frame
    assert traffic.written == 2 * config.num_layers * pipe.layout.block_frames * frame


def test_every_steady_block_runs_the_same_operators(steady):
    """With a contiguous sink positions never change either, so one captured graph would serve."""
    rotation.cache_clear()  # of what other tests left there
    steady.next_block()
    seen = []
    for _ in range(2):
        with CacheTraffic(0, 0) as traffic:
            steady.next_block()
        seen.append(traffic.calls)
    assert seen[0] == seen[1]


def test_the_cache_stays_where_it_is(steady):
    cache, layers = steady.rollout.cache, range(steady.rollout.dit.config.num_layers)

    def stored():
        parts = [cache._latents, *(t for number in layers for t in cache.layer(number))]
        return [part for part in parts if part is not None]

    before = [(t, t.data_ptr()) for t in stored()]
    for _ in range(8):
        steady.next_block()
    for tensor, (same, place) in zip(stored(), before, strict=True):
        assert tensor is same
        assert tensor.data_ptr() == place


def live():
    """Tensors alive, their bytes, and all objects that the collector knows."""
    gc.collect()
    objects = gc.get_objects()
    tensors = [o for o in objects if issubclass(type(o), torch.Tensor)]
    storages = {s._cdata: s.nbytes() for s in map(torch.Tensor.untyped_storage, tensors)}
    return len(tensors), sum(storages.values()), len(objects)


@pytest.mark.slow
def test_thirty_blocks_leave_nothing_behind(tmp_path):
    """Latents, decoder features, noise, views, rotations: nothing grows with the video."""
    stream = steady_stream(tiny_pipeline(tmp_path))
    for _ in range(5):
        stream.next_block()
        live()  # the first full collections change what the collector tracks
    tensors, size, objects = live()
    for _ in range(30):
        stream.next_block()
    tensors_after, size_after, objects_after = live()
    assert tensors_after == tensors
    assert size_after == size
    assert objects_after - objects < 10  # far below one for each block


def test_a_closed_stream_frees_its_cache(tmp_path):
    pipe = tiny_pipeline(tmp_path)
    steady_stream(pipe).close()  # rotations of this geometry stay, for the next stream
    before = live()[1]
    stream = steady_stream(pipe)
    assert live()[1] > before
    stream.close()
    del stream
    assert live()[1] == before


def test_the_text_is_encoded_once_in_a_stream(pipe, monkeypatch):
    calls = []
    encode = pipe.dit.encode_text
    monkeypatch.setattr(pipe.dit, "encode_text", lambda text: calls.append(1) or encode(text))
    for _ in range(2):
        stream = pipe.open_stream(text_of(pipe))
        for _ in range(3):
            stream.next_block()
    assert len(calls) == 2


RESIDENT = """
import ctypes, gc, json, sys, torch
from pathlib import Path
from tests.pipeline.test_cost import text_of, tiny_pipeline

torch.set_num_threads(1)
pipe = tiny_pipeline(Path(sys.argv[1]))
page, libc = 4096, ctypes.CDLL("libc.so.6")
sizes = {}
with pipe.open_stream(text_of(pipe)) as stream:
    for block in range(1, 401):
        stream.next_block()
        if block in (40, 400):
            gc.collect()
            libc.malloc_trim(0)
            sizes[block] = int(Path("/proc/self/statm").read_text().split()[1]) * page
print(json.dumps(sizes))
"""


@pytest.mark.long
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc, trims glibc's heap")
def test_resident_memory_at_block_400_is_that_of_block_40(tmp_path):
    """What the counts above cannot see: memory held outside Python."""
    result = subprocess.run(
        [sys.executable, "-c", RESIDENT, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    sizes = json.loads(result.stdout)
    assert abs(sizes["400"] - sizes["40"]) < 0.02 * sizes["40"]
