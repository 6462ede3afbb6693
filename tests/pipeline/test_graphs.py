"""Compiled rollouts: the steady state is a graph, all else is eager, and the video is the same.

`torch.compile` runs with `aot_eager`, which traces, takes apart and puts in place what a graph
writes, as for a GPU, and then calls the same kernels; Inductor itself is in one slow test.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice, product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler

from model.self_rollout import RolloutDraw, self_rollout
from pipeline import VideoPipeline, load_pipeline
from pipeline.changes import POLICIES, RESTARTING, Direction
from pipeline.passes import Plan
from pipeline.rollout import Rollout
from pipeline.sampling import BlockNoise
from pipeline.schedule import BlockLayout, Schedule
from pipeline.setup import Setup
from pipeline.stream import LatentStream
from tests.conftest import TinyWorld
from tests.tiny_pipeline import random_dit
from tests.tiny_rollout import GRID, new_rollout, run, some_text, tiny_method
from utils.config import load_config
from wan.context import AttentionContext, ForcedContext, FullContext, MaskedContext, frame_mask
from wan.dit import WanDiT
from wan.float8 import use_float8
from wan.kv_cache import ContextPolicy
from wan.recording import RecordingContext

METHODS = ("rolling", "self with sink", "infinite", "averaged")
FAST = (("rolling", True), ("averaged", False))
CLOSE = {"atol": 2e-6, "rtol": 0.0}


class Compiled:
    """A network of three layers, eager and compiled; `graphs` counts what is compiled."""

    def __init__(
        self, backend: str = "aot_eager", *, every_size: bool = False, in_float8: bool = False
    ) -> None:
        self.eager, self.dit = (random_dit(num_layers=3, seed=5) for _ in range(2))
        for dit in (self.eager, self.dit) if in_float8 else ():
            use_float8(dit.blocks)
        self.graphs = CompileCounterWithBackend(backend)
        self.dit.compile_blocks(every_size=every_size, backend=self.graphs)


@pytest.fixture(scope="module", autouse=True)
def afresh() -> Iterator[None]:
    """Nothing that other tests compiled."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def no_breaks() -> Iterator[None]:
    """No graph is broken."""
    counters.clear()
    yield
    assert not counters["graph_break"]


@pytest.fixture(scope="module")
def compiled(afresh: None) -> Compiled:
    """One network for the streams of all methods, as a server has it for those of one."""
    return Compiled()


@contextmanager
def no_recompilation(compiled: Compiled) -> Iterator[None]:
    graphs = compiled.graphs.frame_count
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    assert compiled.graphs.frame_count == graphs


def rollout_of(dit: WanDiT, name: str, merged: bool, blocks: int | None = None) -> Rollout:
    rollout = new_rollout(dit, tiny_method(name), blocks)
    rollout.plan = replace(rollout.plan, merged=merged)
    return rollout


def take(rollout: Rollout, blocks: int) -> list[Tensor]:
    """The next finished blocks."""
    found: list[Tensor] = []
    while len(found) < blocks:
        result = rollout.step()
        assert result is not None
        found += result.finished.values()
    return found


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    torch.testing.assert_close(torch.cat(found, dim=1), torch.cat(expected, dim=1), **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "merged"),
    [
        case if case in FAST else pytest.param(*case, marks=pytest.mark.slow)
        for case in product(METHODS, [False, True])
    ],
)
def test_a_stream_equals_eager_and_a_second_one_compiles_nothing(
    compiled: Compiled, name: str, merged: bool
) -> None:
    """All layers have the graphs of the first, and read and write what is their own.

    One call of the network was ten graphs, and that of the ramp, for all sizes, served for ever.
    Views of one buffer as inputs of a graph would give all layers the cache of the first.
    """
    expected = run(rollout_of(compiled.eager, name, merged, 12))
    before = compiled.graphs.frame_count
    rollout_of(compiled.dit, name, merged).rehearse()
    assert compiled.graphs.frame_count - before <= (
        1 if merged and name in ("rolling", "averaged") else 2
    )
    with no_recompilation(compiled):
        for blocks in (12, 11):
            found = run(rollout_of(compiled.dit, name, merged, blocks))
            kept = blocks - 3  # the last ones see the end
            assert_close([found[b] for b in range(kept)], [expected[b] for b in range(kept)])


@pytest.mark.slow
def test_eight_bits_equal_eager_in_one_graph() -> None:
    """Bytes that are read as values, and weights that are no parameters, break no graph."""
    both = Compiled(in_float8=True)
    found = []
    for dit in (both.eager, both.dit):
        rollout = new_rollout(dit, tiny_method("rolling"), 12, in_float8=True)
        rollout.plan = replace(rollout.plan, merged=True)
        found.append(list(run(rollout).values()))
    assert both.graphs.frame_count == 1
    assert_close(found[1], found[0])


def directed(dit: WanDiT, name: str, merged: bool) -> Iterator[Tensor]:
    """Blocks of a stream whose prompt changes in the steady state, under every policy."""
    direction = Direction(rollout_of(dit, name, merged), some_text(dit))
    latents = LatentStream(direction, num_latent_frames=None)
    for number, policy in enumerate(POLICIES):
        for blend in (0, 2)[: 1 if policy in RESTARTING else 2]:
            yield from (latents_of for _, latents_of in islice(latents, 6))
            direction.add(some_text(dit, [number]), policy=policy, blend_blocks=blend)
    yield from (latents_of for _, latents_of in islice(latents, 6))


@pytest.mark.slow
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_changes_of_prompt_equal_eager_and_compile_nothing(
    compiled: Compiled, name: str, merged: bool
) -> None:
    """What is recached, and what ramps up again, runs eager."""
    expected = list(directed(compiled.eager, name, merged))
    rollout_of(compiled.dit, name, merged).rehearse()
    with no_recompilation(compiled):
        assert_close(list(directed(compiled.dit, name, merged)), expected)


@pytest.mark.slow
@pytest.mark.parametrize("latents_only", [False, True])
@pytest.mark.parametrize("merged", [False, True])
def test_a_stream_goes_on_from_a_state(
    compiled: Compiled, merged: bool, latents_only: bool
) -> None:
    """Saved and resumed; or as a branch, whose keys and values are made anew."""
    expected = rollout_of(compiled.eager, "rolling", merged)
    take(expected, 9)
    rollout_of(compiled.dit, "rolling", merged).rehearse()
    with no_recompilation(compiled):
        first, second = (rollout_of(compiled.dit, "rolling", merged) for _ in range(2))
        take(first, 9)
        second.load_state_dict(first.state_dict(latents_only=latents_only))
        if latents_only:
            expected.load_state_dict(expected.state_dict(latents_only=True))
        assert_close(take(second, 4), take(expected, 4))


@pytest.mark.slow
def test_what_is_recorded_runs_eager_and_changes_nothing(compiled: Compiled) -> None:
    expected = take(rollout_of(compiled.eager, "rolling", False), 9)
    rollout = rollout_of(compiled.dit, "rolling", False)
    rollout.rehearse()
    sums: list[Tensor] = []
    with no_recompilation(compiled):
        found = take(rollout, 7)
        rollout.wrap_context = lambda context, window: RecordingContext(
            context,
            [2] * (1 if window is None else len(window.levels)),
            {1},
            lambda _, masses: sums.append(masses.sum(1)),
        )
        found += take(rollout, 2)
    assert_close(found, expected)
    torch.testing.assert_close(torch.cat(sums), torch.ones(sum(map(len, sums))))


# --- training ------------------------------------------------------------------------------------


def contexts(dit: WanDiT) -> dict[str, tuple[AttentionContext, int]]:
    """Contexts of parallel training, and the frames that they are for."""
    head_dim, cpu = dit.config.head_dim, torch.device("cpu")
    mask = frame_mask(6, 2)
    blocks = [range(b, b + 2) for b in range(0, 6, 2)]
    policy = ContextPolicy(2, 6)
    return {
        "full": (FullContext(6, GRID, head_dim, cpu), 6),
        "masked": (MaskedContext(mask, tuple(range(6)), GRID, head_dim, cpu), 6),
        "forced": (ForcedContext(policy, blocks, [range(6)], GRID, head_dim, cpu), 12),
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "backend", "checkpointing", "selective"),
    [
        ("masked", "eager", True, True),
        pytest.param("full", "eager", False, False, marks=pytest.mark.slow),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in (
                *(("full", "eager", True, selective) for selective in (False, True)),
                *(("masked", "eager", kept, False) for kept in (False, True)),
                *(("forced", "eager", kept, kept) for kept in (False, True)),
                ("forced", "eager", True, False),
                *(("full", "aot_eager", kept, False) for kept in (False, True)),
            )
        ),
    ],
)
def test_gradients_of_compiled_training_equal_eager(
    kind: str, backend: str, checkpointing: bool, selective: bool
) -> None:
    """`eager` traces alone; what is taken apart for all sizes takes half a minute."""
    compiled = Compiled(backend, every_size=True)
    grads: list[list[Tensor]] = []
    for dit in (compiled.eager, compiled.dit):
        dit.requires_grad_(True)
        dit.gradient_checkpointing, dit.selective_checkpointing = checkpointing, selective
        context, frames = contexts(dit)[kind]
        for batch in (1, 2):
            latents = torch.linspace(-1, 1, batch * frames * 16 * 24).view(batch, frames, 16, 4, 6)
            text = dit.encode_text(some_text(dit, range(batch)))
            flow = dit(latents, torch.full((batch, frames), 500.0), text, context)
            flow.square().sum().backward()
        grads.append([p.grad for p in dit.parameters() if p.grad is not None])
    assert compiled.graphs.frame_count > 0
    for found, expected in zip(*reversed(grads), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rolling", pytest.param("block", marks=pytest.mark.long)])
def test_self_rollouts_of_any_length_share_their_graphs(tiny_world: TinyWorld, kind: Any) -> None:
    """The forwards of a rollout have many sizes, which graphs for all sizes serve."""
    compiled = Compiled("eager", every_size=True)
    setup = Setup.of(load_config(tiny_world.config), sizes=compiled.dit.config)
    videos: list[Tensor] = []
    graphs: list[int] = []
    for dit in (compiled.eager, compiled.dit):
        dit.requires_grad_(True)
        dit.gradient_checkpointing = True
        for blocks in (5, 6):
            noise = BlockNoise(setup.counter_noise(0), [0], "cpu")
            drawn = RolloutDraw(kind, blocks, (1,) * blocks)
            text = dit.encode_text(some_text(dit))
            clip = self_rollout(setup, dit, text, noise, drawn, scored_frames=9, grad=True)
            clip.square().sum().backward()
            videos.append(clip.detach())
            graphs.append(compiled.graphs.frame_count)
    assert 0 < graphs[2] == graphs[3]
    for expected, found in zip(videos[:2], videos[2:], strict=True):
        torch.testing.assert_close(found, expected, **CLOSE)


# --- which passes are steady ---------------------------------------------------------------------


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_steady_passes_are_those_that_come_back_with_every_block(name: str, merged: bool) -> None:
    method = tiny_method(name)
    endless = Plan(
        Schedule(method.kind, method.levels), method.layout, method.policy, merged=merged
    )
    start = endless.first_repetition()
    assert all(endless.is_steady(own.parts) for own in map(endless.at, range(start, start + 9)))
    assert not endless.is_steady(endless.at(0).parts)
    later = endless.restarted(10**6, stored=10**6)
    assert later.is_steady(later.at(start + 9).parts)


def test_all_passes_over_a_whole_video_are_alike() -> None:
    plan = Plan(Schedule("full", 4, 3), BlockLayout(2), ContextPolicy(0, 6))
    assert all(plan.is_steady(own.parts) for own in plan)


# --- pipelines -----------------------------------------------------------------------------------


def has_compiler() -> bool:
    try:
        return bool(get_cpp_compiler())
    except InvalidCxxCompiler:
        return False


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> CompileCounterWithBackend:
    """`torch.compile` that is done at once; what it has compiled."""
    graphs = CompileCounterWithBackend("aot_eager")
    compile_with = torch.compile
    monkeypatch.setattr(
        torch,
        "compile",
        lambda f, **options: compile_with(f, dynamic=options["dynamic"], backend=graphs),
    )
    return graphs


def loaded(world: TinyWorld, *overrides: str) -> VideoPipeline:
    return load_pipeline(world.config, world.checkpoint, device="cpu", overrides=overrides)


@pytest.mark.slow
def test_a_pipeline_compiles_when_it_is_loaded(
    tiny_world: TinyWorld, short: CompileCounterWithBackend
) -> None:
    """The first stream met the compiler in its steady state, blocks after its start."""
    pipe, eager = loaded(tiny_world, "compile=true"), loaded(tiny_world)
    assert short.frame_count > 0
    text = pipe.encode_prompts(["a ball"])
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = pipe.generate_latents(text, 30, seed=0)
        for repeatable in (False, True):  # its cache has more slots
            with pipe.open_stream(text, seed=0, repeatable=repeatable) as stream:
                for _ in range(8):
                    next(stream)
    torch.testing.assert_close(found, eager.generate_latents(text, 30, seed=0), **CLOSE)


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler(), reason="Inductor needs a C++ compiler")
def test_inductor_changes_only_rounding(tiny_world: TinyWorld) -> None:
    eager, fast = (loaded(tiny_world, *given) for given in ([], ["compile=true"]))
    text = eager.encode_prompts(["a ball"])
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = fast.generate_latents(text, 30, seed=0)
    torch.testing.assert_close(found, eager.generate_latents(text, 30, seed=0), atol=1e-4, rtol=0)
