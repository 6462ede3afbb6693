"""What the published sizes cost on a GPU, counted without one: 832x480, 1.3B, bf16, one video.

Budgets are in docs/counts.yaml. More than a budget is a loss that was not meant, and a test
fails; much less is a gain, and the budget has to follow, so the table stays true.
"""

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
import yaml
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch import Tensor

from model.dmd import critic_loss, generator_loss, predict_scores
from model.self_rollout import BatchDraw, RolloutDraw, self_rollout
from pipeline import VideoPipeline
from pipeline.sampling import BlockNoise
from pipeline.setup import Setup
from pipeline.stream import Stream
from tests.fake_cuda import CUDA, GB, GIB, META, TERA, Counts, FakeCuda, fused, made_on
from utils.config import load_config
from wan.dit import Block, DiTConfig, WanDiT
from wan.flow import add_noise
from wan.vae import WanVAE
from wan.vae_layers import decode_clip

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"


class Budget(NamedTuple):
    """Kernels, 10^12 operations, GB moved by copies and elementwise kernels, GiB made and alive."""

    ops: int
    tflop: float
    moved: float
    peak: float


COUNTED = yaml.safe_load((ROOT / "docs" / "counts.yaml").read_text(encoding="utf-8"))
ROLLING = "rolling_forcing_dmd"
LAYERS = 30
AS_ON_CUDA = ["merge_clean_pass=false"]  # the default there


def check(counts: Counts, case: str, part: str) -> None:
    """Against the budget of a case."""
    budget = Budget(**COUNTED[case][part])
    found = Budget(counts.ops, counts.flop / TERA, counts.moved / GB, counts.peak / GIB)
    for name, measured, allowed in zip(Budget._fields, found, budget, strict=True):
        assert 0.95 * allowed <= measured <= 1.01 * allowed, f"{case}, {part}, {name}: {found}"


@pytest.fixture(scope="module")
def device() -> FakeCuda:
    return FakeCuda()


@pytest.fixture
def cuda(device: FakeCuda) -> Iterator[FakeCuda]:
    with device:
        yield device


@pytest.fixture(scope="module")
def vae(device: FakeCuda) -> WanVAE:
    with torch.device("meta"):
        model = AutoencoderKLWan(base_dim=96)
    with device:
        made_on(CUDA, model, torch.float32)
        for decoding in (model.post_quant_conv, model.decoder):
            made_on(CUDA, decoding, torch.bfloat16)
    return WanVAE(model)


@pytest.fixture(scope="module")
def dit(device: FakeCuda) -> WanDiT:
    with device:
        return made_dit("1.3B")


def made_dit(size: str, device: torch.device = CUDA, **changed: int) -> WanDiT:
    sizes = json.loads((CONFIGS / f"models/Wan2.1-T2V-{size}.json").read_text(encoding="utf-8"))
    with torch.device("meta"):
        dit = WanDiT(DiTConfig.from_dict(sizes | changed))
    made_on(device, dit, torch.bfloat16)
    return dit


@pytest.fixture(scope="module")
def past(device: FakeCuda, vae: WanVAE) -> dict[str, Tensor]:
    """State of a decoder that has seen two latent frames."""
    with device:
        decoder = vae.streaming_decoder()
        decoder.decode(torch.zeros(1, 2, 16, 60, 104, device=CUDA))
        return decoder.state_dict()


def opened(dit: WanDiT, vae: WanVAE, name: str, *, merged: bool = False) -> Stream:
    given = [f"merge_clean_pass={str(merged).lower()}"]  # false is the default on CUDA
    setup = Setup.of(load_config(CONFIGS / f"{name}.yaml", given), sizes=dit.config)
    text = torch.zeros(1, 512, dit.config.text_dim, dtype=torch.bfloat16, device=CUDA)
    return VideoPipeline(setup, dit, vae=vae).open_stream(text, seed=0)


def at_steady_state(stream: Stream, past: Mapping[str, Tensor] | None = None) -> Stream:
    """The stream, moved to where all blocks are alike."""
    rollout = stream.rollout
    plan, state = rollout.plan, rollout.state_dict()
    first = next(own for own in plan.passes(plan.first_repetition()) if own.stores is not None)
    latents = torch.zeros_like(rollout.noise(first.stores, 0))
    state["index"] = first.index
    state["cache"]["finished"] = rollout.layout.start(first.stores)
    state["unwritten"] = {first.stores: latents}
    window = next(plan.windows(first.index))
    state["in_flight"] = {block: latents for block, level in window if level > 0}
    rollout.load_state_dict(state)
    if past is not None:
        stream._decoder.load_state_dict(past)
    return stream


@contextmanager
def forwards(cuda: FakeCuda, dit: WanDiT) -> Iterator[list[tuple[str, Counts]]]:
    """The counts of every forward pass inside, and what kind of pass it was."""
    found: list[tuple[str, Counts]] = []
    inside: list[Any] = []

    def before(_: Any, arguments: tuple[Any, ...]) -> None:
        inside.append(cuda.measured())
        kind = "window" if arguments[3].destination is None else "clean"
        found.append((kind, inside[-1].__enter__()))

    def after(*_: Any) -> None:
        inside.pop().__exit__(None, None, None)

    hooks = [dit.register_forward_pre_hook(before), dit.register_forward_hook(after)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.slow
def test_a_steady_block(cuda: FakeCuda, dit: WanDiT, vae: WanVAE, past: dict[str, Tensor]) -> None:
    """From noise to uint8 frames in host memory, for which alone the host waits."""
    stream = at_steady_state(opened(dit, vae, ROLLING), past)
    with forwards(cuda, dit) as passes, cuda.measured() as block:
        frames = stream.next_block()
    assert frames is not None
    assert frames.shape == (12, 480, 832, 3)
    assert frames.is_contiguous()
    for kind, counts in (*passes, ("block", block)):
        check(counts, ROLLING, kind)
    assert block.waits == {"an event": 1}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [pytest.param("self_forcing_dmd", marks=pytest.mark.slow), "self_forcing_dmd_vsink1"],
)
def test_a_step_block_by_block(cuda: FakeCuda, dit: WanDiT, vae: WanVAE, name: str) -> None:
    """A clean pass and the first of a block's windows; the host waits for nothing."""
    rollout = at_steady_state(opened(dit, vae, name)).rollout
    with forwards(cuda, dit) as passes, cuda.measured() as step:
        rollout.step()
    for kind, counts in passes:
        check(counts, name, kind)
    assert not step.waits


@pytest.mark.parametrize(
    ("name", "merged"),
    [(ROLLING, False), (ROLLING, True), ("self_forcing_dmd", False)],
)
@pytest.mark.slow
def test_what_compiled_passes_move(cuda: FakeCuda, name: str, merged: bool) -> None:
    """GB of the copies and elementwise kernels that Inductor makes of all blocks of a step.

    All layers have the kernels of one; embedding and head (2 GB) stay eager and are not in it.
    """
    inputs: list[tuple[Any, ...]] = []

    def graph(*given: Any) -> Tensor:
        inputs.append(given)
        return given[1]

    dit = made_dit("1.3B", num_layers=1)
    with torch.device("meta"):
        vae = AutoencoderKLWan(base_dim=4)
    made_on(CUDA, vae, torch.bfloat16)
    stream = at_steady_state(opened(dit, WanVAE(vae), name, merged=merged))
    with patch.object(torch, "compile", return_value=graph) as compiled:
        dit.compile_blocks()
    options = compiled.call_args.kwargs["options"]
    stream.rollout.step()
    kinds = ["merged"] if merged else ["clean", "window"]
    for kind, given in zip(kinds, inputs, strict=True):
        with torch.no_grad():
            moved = LAYERS * fused(Block.compute, *given, options=options).moved / GB
        allowed = COUNTED["compiled"][name][kind]
        assert 0.95 * allowed <= moved <= 1.01 * allowed, f"{name}, {kind}: {moved}"


def test_a_compiled_block_moves_less_than_was_asked_for() -> None:
    """366 GB the transformer, 308 the VAE, before anything was fused; a pass block by block 126."""
    rolling, self_forcing = (COUNTED["compiled"][name] for name in (ROLLING, "self_forcing_dmd"))
    assert rolling["clean"] + rolling["window"] <= 130
    assert rolling["merged"] <= 130
    assert max(self_forcing.values()) <= rolling["clean"]
    assert COUNTED["vae"]["decode, compiled"]["moved"] <= COUNTED["vae"]["decode"]["moved"] <= 95


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "noise", "slots"),
    [
        (ROLLING, 5, 4),
        *(
            pytest.param(name, 4, 7, marks=pytest.mark.slow)
            for name in ("self_forcing_dmd", "self_forcing_dmd_vsink1")
        ),
    ],
)
def test_what_a_steady_block_sends_to_the_device(
    cuda: FakeCuda, name: str, noise: int, slots: int
) -> None:
    """Its noise, and for each pass the slots that it reads, writes and takes over; once.

    Levels, rotations and the statistics of the VAE are there from the start.
    """
    with torch.device("meta"):
        model = AutoencoderKLWan(base_dim=4)
    made_on(CUDA, model, torch.bfloat16)
    stream = at_steady_state(opened(made_dit("1.3B", num_layers=1), WanVAE(model), name))
    for _ in range(2):
        stream.next_block()
    with cuda.measured() as block:
        stream.next_block()
    assert block.sent == noise + slots
    assert block.waits == {"an event": 1}


def test_decoding_a_block(cuda: FakeCuda, vae: WanVAE, past: dict[str, Tensor]) -> None:
    decoder = vae.streaming_decoder()
    decoder.load_state_dict(past)
    with cuda.measured() as counts:
        video = decoder.decode(torch.zeros(1, 3, 16, 60, 104, device=CUDA))
    assert video.shape == (1, 12, 3, 480, 832)
    check(counts, "vae", "decode")


def test_decoding_a_block_in_small_memory(
    cuda: FakeCuda, vae: WanVAE, past: dict[str, Tensor]
) -> None:
    """One latent frame after the other."""
    alone = copy.copy(vae)
    alone.pixels_at_once = 0
    decoder = alone.streaming_decoder()
    decoder.load_state_dict(past)
    with cuda.measured() as counts:
        decoder.decode(torch.zeros(1, 3, 16, 60, 104, device=CUDA))
    check(counts, "vae", "decode, one by one")


@pytest.mark.slow
def test_decoding_a_block_compiled(cuda: FakeCuda, vae: WanVAE, past: dict[str, Tensor]) -> None:
    """One graph without a break."""
    latents = torch.zeros(1, 16, 3, 60, 104, device=CUDA, dtype=torch.bfloat16)
    with torch.no_grad():
        counts = fused(decode_clip, vae.model, latents, tuple(past.values()))
    check(counts, "vae", "decode, compiled")


@pytest.mark.slow
def test_encoding_a_prefix(cuda: FakeCuda, vae: WanVAE) -> None:
    """21 frames of a video to continue: six latent frames."""
    with cuda.measured() as counts:
        latents = vae.encode(torch.zeros(1, 21, 3, 480, 832, dtype=torch.uint8))
    assert latents.shape == (1, 6, 16, 60, 104)
    assert not counts.waits
    check(counts, "vae", "encode")


@pytest.mark.slow
def test_the_first_block(cuda: FakeCuda, dit: WanDiT, vae: WanVAE) -> None:
    """The ramp: windows of one to five blocks until the first block is there."""
    stream = opened(dit, vae, ROLLING)
    with cuda.measured() as counts:
        frames = stream.next_block()
    assert frames is not None
    assert frames.shape == (9, 480, 832, 3)
    check(counts, ROLLING, "first block")


@pytest.fixture
def meta() -> Iterator[FakeCuda]:
    with FakeCuda(META) as device:
        yield device


def trained(size: str, **changed: int) -> WanDiT:
    dit = made_dit(size, META, **changed).requires_grad_(True)
    dit.gradient_checkpointing = True
    return dit


def text_rows(rows: int, device: torch.device = META) -> Tensor:
    return torch.zeros(rows, 512, 4096, dtype=torch.bfloat16, device=device)


def rolled_out(
    generator: WanDiT, schedule: Any = "rolling", blocks: int = 7, rows: int = 1, **options: bool
) -> Tensor:
    """The clean latents of a rollout, by default a rolling one of 21 frames.

    Each of `rows` videos stops at a level of its own.
    """
    setup = Setup.of(load_config(CONFIGS / f"{ROLLING}.yaml", AS_ON_CUDA), sizes=generator.config)
    noise = BlockNoise(setup.counter_noise(0), range(rows), generator.device)
    each = tuple(RolloutDraw(schedule, blocks, (2 + row,) * blocks) for row in range(rows))
    drawn = BatchDraw(each, each)
    with torch.set_grad_enabled(options["grad"]):
        text = generator.encode_text(text_rows(rows, generator.device))
        scored = min(21, setup.layout.start(blocks))
        return self_rollout(setup, generator, text, noise, drawn, scored_frames=scored, **options)


@pytest.mark.slow
def test_a_generator_step(meta: FakeCuda) -> None:
    """A rollout with gradient, the scores of a 14B teacher and a 1.3B critic, backward."""
    generator, critic, teacher = trained("1.3B"), trained("1.3B"), made_dit("14B", META)
    with meta.measured() as counts:
        clip = rolled_out(generator, grad=True)
        timesteps = torch.full(clip.shape[:2], 500.0, device=META)
        with torch.no_grad():
            scores = predict_scores(
                teacher,
                critic,
                add_noise(clip.detach(), torch.zeros_like(clip), timesteps),
                timesteps,
                real_text=teacher.encode_text(text_rows(2)),
                fake_text=critic.encode_text(text_rows(1)),
                guidance_scale=3.0,
            )
        generator_loss(clip, scores).loss.backward()
    assert all(p.grad is not None for p in generator.blocks.parameters())
    assert all(p.grad is None for dit in (critic, teacher) for p in dit.parameters())
    check(counts, "dmd", "generator")


@pytest.mark.long
@pytest.mark.parametrize("schedule", ["rolling", "block"])
def test_memory_of_a_replayed_rollout_does_not_grow(meta: FakeCuda, schedule: str) -> None:
    """A rollout with gradient kept all its frames: 81 took 14 GiB more than the published 27.

    Of the 30 layers, which are alike, three are enough.
    """
    generator = trained("1.3B", num_layers=3)

    def peak(blocks: int, *, replayed: bool) -> float:
        with meta.measured() as counts:
            video = rolled_out(generator, schedule, blocks, grad=True, replayed=replayed)
            video.sum().backward()
        generator.zero_grad()
        return counts.peak / GIB

    short, long = (peak(blocks, replayed=True) for blocks in (9, 27))
    plain, plain_long = (peak(blocks, replayed=False) for blocks in (9, 27))
    assert long < 1.02 * short  # a table of rotations more is held
    assert plain_long > plain + 1


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["rolling", "block"])
def test_the_host_waits_for_nothing_in_a_training_rollout(cuda: FakeCuda, schedule: str) -> None:
    """Nor where videos stop at levels of their own, of which it writes down a mask."""
    generator = made_dit("1.3B", CUDA, num_layers=1)
    with cuda.measured() as counts:
        rolled_out(generator, schedule, blocks=3, rows=2, grad=False)
    assert counts.sent > 0
    assert not counts.waits


@pytest.mark.long
def test_a_critic_step(meta: FakeCuda) -> None:
    """The same rollout without gradient, and a step of the critic on it."""
    generator, critic = trained("1.3B"), trained("1.3B")
    with meta.measured() as counts:
        clip = rolled_out(generator, grad=False)
        timesteps = torch.full(clip.shape[:2], 500.0, device=META)
        text = critic.encode_text(text_rows(1))
        critic_loss(critic, clip, torch.zeros_like(clip), timesteps, text).loss.backward()
    assert all(p.grad is not None for p in critic.blocks.parameters())
    assert all(p.grad is None for p in generator.parameters())
    check(counts, "dmd", "critic")
