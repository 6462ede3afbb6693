"""Self-rollouts: against the published training code, and against our own inference."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model.self_rollout import (
    BatchDraw,
    RolloutDraw,
    rollout_flops,
    scored_clip,
    self_rollout,
)
from pipeline.prefix import Prefix
from pipeline.sampling import BlockNoise
from pipeline.setup import Setup
from tests.golden_cases import Case, case_names, entries, load_case, load_weights
from tests.tiny_models import write_tiny_vae
from tests.tiny_pipeline import TINY_DIT, golden_pipeline, random_dit, write_config
from tests.tiny_training import drawn, layout_of
from trainer.tasks.base import rollout_recipe
from utils.config import Config, load_config
from utils.errors import UserError
from utils.noise import CounterNoise, RecordedNoise
from wan.dit import WanDiT
from wan.vae import WanVAE

ROLLING = {
    "method": "rolling_forcing",
    "denoising_step_list": [1000, 800, 600, 400, 200],
    "warp_denoising_step": True,
    "height": 32,
    "width": 48,
}


def rolled(config: Config, dit: WanDiT, *given: Any, **options: Any) -> Tensor:
    """A self-rollout of a config."""
    frames = config.image_or_video_shape[1]
    setup = Setup.of(config, sizes=dit.config)
    return self_rollout(setup, dit, *given, scored_frames=frames, **options)


def recorded_setting(case: Case, tmp_path: Path) -> tuple[Config, WanDiT]:
    block_frames = case.tensors["eps"].shape[3]
    meta = case.meta | {"num_frame_per_block": block_frames, "warp_denoising_step": True}
    pipe = golden_pipeline(
        Case(meta, case.tensors),
        tmp_path,
        method="rolling_forcing",
        max_attention_frames=meta["max_attention_frames"],
    )
    return load_config(tmp_path / "config.yaml"), pipe.dit.requires_grad_(True).train()


def runs() -> list[tuple[str, str]]:
    return [(name, run) for name in case_names("training_rollout") for run in entries(name, "runs")]


@pytest.mark.golden
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("name", "run"), runs())
def test_recorded_training_rollout(
    name: str, run: str, checkpointing: bool, tmp_path: Path
) -> None:
    case = load_case(name)
    config, dit = recorded_setting(case, tmp_path)
    dit.gradient_checkpointing = checkpointing
    recorded, facts = case.tensors, case.meta["runs"][run]
    frames = case.meta["frames"]
    blocks = frames // config.num_frame_per_block
    rolling = facts["inference"].endswith("rolling_forcing")
    plan = RolloutDraw("rolling" if rolling else "block", blocks, (facts["exit_flag"],) * blocks)
    starts = [block * config.num_frame_per_block for block in range(blocks + 1)]
    source = RecordedNoise(recorded["noise"], recorded["eps"], starts)
    noise = BlockNoise(source, range(len(recorded["noise"])), "cpu")
    text = dit.encode_text(recorded["prompt_embeds"])
    output = rolled(config, dit, text, noise, plan, grad=True)

    carrying = facts["frames_with_gradient"]
    tolerance = 1e-4 if rolling else 2e-2  # the published context pass re-noises at 0.00498
    torch.testing.assert_close(
        output[:, carrying], recorded[f"{run}.output"][:, carrying], atol=tolerance, rtol=0
    )
    assert not output[:, facts["frames_all_zero"]].eq(0).all(dim=(2, 3, 4)).any()

    (recorded["functional"] * output).sum().backward()
    named = dict(dit.named_parameters())
    check_gradients(facts, named, 1e-4 if rolling else 2e-2)
    leak_free = rolling and no_leak(facts)
    if leak_free:
        prefix = f"{run}.grad_checkpointing."
        tensors = {k.removeprefix(prefix): v for k, v in recorded.items() if k.startswith(prefix)}
        assert tensors
        for key, value in tensors.items():
            scale = value.abs().max().item()
            torch.testing.assert_close(named[key].grad, value, atol=1e-4 * scale, rtol=0)


def no_leak(facts: dict[str, Any]) -> bool:
    detached = facts["NOT_REFERENCE_grad_norm_if_kv_cache_detached_after_every_call"]
    return all(
        abs(facts["grad_norm_without_gradient_checkpointing"][key] - value) <= 1e-6 * value
        for key, value in detached.items()
    )


def check_gradients(
    facts: dict[str, Any], named: dict[str, torch.nn.Parameter], tolerance: float
) -> None:
    detached = facts["NOT_REFERENCE_grad_norm_if_kv_cache_detached_after_every_call"]
    for key, norm in detached.items():
        if "cross_attn" in key or key == "ALL_PARAMETERS":
            continue  # recorded without gradient to the text K/V, which ours has
        gradient = named[key].grad
        assert gradient is not None
        assert gradient.double().norm().item() == pytest.approx(norm, rel=tolerance), key
    for key, norm in facts["grad_norm_with_gradient_checkpointing"].items():
        if "cross_attn" in key:
            ours = named[key].grad
            assert ours is not None
            assert ours.norm().item() == pytest.approx(norm, rel=0.2)


@pytest.mark.golden
def test_recorded_scored_clip(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    case = load_case("run_generator")
    save_file(load_weights(case.meta["weights"]), tmp_path / "vae.safetensors")
    vae = WanVAE.from_official(tmp_path / "vae.safetensors")
    for key in [key for key in case.tensors if key.startswith("generated")]:
        size = key.removeprefix("generated")
        expected, mask = case.tensors[f"out{size}"], case.tensors[f"mask{size}"]
        hidden = int((~mask[0, :, 0, 0, 0]).sum()) if mask.numel() else 0
        clip, counts = scored_clip(
            case.tensors[key], vae, scored=expected.shape[1], block_frames=hidden
        )
        torch.testing.assert_close(clip, expected, atol=1e-4, rtol=0)
        if mask.numel():
            assert counts is not None
            assert torch.equal(counts, mask[0, :, 0, 0, 0])
        else:
            assert counts is None


@pytest.fixture
def rolling(tmp_path: Path) -> Config:
    return load_config(
        write_config(tmp_path / "c.yaml", **ROLLING, image_or_video_shape=[1, 21, 16, 4, 6])
    )


def seeded_noise(config: Config, dit: WanDiT, batch: int = 1) -> BlockNoise:
    latent = (dit.config.in_dim, config.height // 8, config.width // 8)
    return BlockNoise(CounterNoise(7, latent, config.num_frame_per_block), [0] * batch, "cpu")


def rollout_x0_by_window(
    config: Config, dit: WanDiT, text: Any, blocks: int, given: Tensor | None = None
) -> dict:
    """x_0 of every (window, block) of inference, which goes on from latents that are `given`."""
    from pipeline.text_to_video import VideoPipeline

    pipe = VideoPipeline(Setup.of(config, sizes=dit.config), dit)
    frames = blocks * config.num_frame_per_block
    stream = pipe._latent_stream(
        torch.zeros(1, 1, dit.config.text_dim),
        num_latent_frames=frames,
        seed=7,
        prefix=None if given is None else Prefix(given),
    )
    stream.rollout.text = text
    found = {}
    while (result := stream.rollout.step()) is not None:
        sizes = [config.num_frame_per_block] * len(result.window.levels)
        for block, x0 in zip(result.window.blocks, result.x0.split(sizes, 1), strict=True):
            found[result.window.index, block] = x0
    return found


@pytest.mark.parametrize("exit_level", range(5))
def test_rolling_training_gives_inference_latents_for_every_r(
    rolling: Config, exit_level: int
) -> None:
    dit = random_dit(3)
    text = dit.encode_text(torch.randn(1, 4, dit.config.text_dim))
    inference = rollout_x0_by_window(rolling, dit, text, 8)
    plan = RolloutDraw("rolling", 8, (exit_level,) * 8)
    output = rolled(rolling, dit, text, seeded_noise(rolling, dit), plan, grad=False)
    for block, x0 in enumerate(output.split(3, dim=1)):
        window = next(w for w in range(block, block + 5) if w % 5 == exit_level)
        assert torch.equal(x0, inference[window, block])


@pytest.mark.parametrize("blocks", [7, 9])
@pytest.mark.parametrize(("schedule", "exit_level"), [("rolling", 0), ("rolling", 3), ("block", 4)])
def test_a_rollout_goes_on_from_a_true_block_as_inference_does(
    schedule: Any, exit_level: int, blocks: int, rolling: Config
) -> None:
    """Also where its block has left the attention."""
    config = replace(rolling, method=None, schedule=schedule)
    dit = random_dit(3)
    torch.manual_seed(2)
    text, given = (
        dit.encode_text(torch.randn(1, 4, dit.config.text_dim)),
        torch.randn(1, 3, 16, 4, 6),
    )
    inference = rollout_x0_by_window(config, dit, text, blocks, given)
    plan = RolloutDraw(schedule, blocks, (exit_level,) * blocks, given_blocks=1)
    noise = seeded_noise(config, dit)
    output = rolled(config, dit, text, noise, plan, grad=False, prefix=given)
    first, *made = output.split(3, dim=1)
    assert torch.equal(first, given)
    for number, x0 in enumerate(made):
        window = 5 * number + exit_level
        if schedule == "rolling":
            window = next(w for w in range(number, number + 5) if w % 5 == exit_level)
        assert torch.equal(x0, inference[window, number + 1])


@pytest.mark.parametrize("exit_level", range(4))
def test_self_training_equals_inference_with_the_first_levels(
    exit_level: int, tmp_path: Path
) -> None:
    steps = [1000, 750, 500, 250]
    values = ROLLING | {"method": "self_forcing", "denoising_step_list": steps}
    values["image_or_video_shape"] = [1, 12, 16, 4, 6]
    config = load_config(write_config(tmp_path / "c.yaml", **values))
    short = load_config(
        write_config(
            tmp_path / "s.yaml", **values | {"denoising_step_list": steps[: exit_level + 1]}
        )
    )
    dit = random_dit(3)
    text = dit.encode_text(torch.randn(1, 4, dit.config.text_dim))
    inference = rollout_x0_by_window(short, dit, text, 4)
    plan = RolloutDraw("block", 4, (exit_level,) * 4)
    output = rolled(config, dit, text, seeded_noise(config, dit), plan, grad=False)
    for block, x0 in enumerate(output.split(3, dim=1)):
        assert torch.equal(x0, inference[block * (exit_level + 1) + exit_level, block])


def test_each_block_may_stop_at_its_own_level(tmp_path: Path) -> None:
    values = ROLLING | {"method": "self_forcing", "image_or_video_shape": [1, 12, 16, 4, 6]}
    config = load_config(write_config(tmp_path / "c.yaml", **values))
    dit = random_dit(3)
    text = dit.encode_text(torch.randn(1, 4, dit.config.text_dim))
    noise = seeded_noise(config, dit)
    mixed = rolled(config, dit, text, noise, RolloutDraw("block", 4, (2, 0, 4, 1)), grad=False)
    same = rolled(config, dit, text, noise, RolloutDraw("block", 4, (2, 2, 2, 2)), grad=False)
    assert torch.equal(mixed[:, :3], same[:, :3])
    assert not torch.equal(mixed[:, 3:6], same[:, 3:6])


SINKS: tuple[dict[str, Any], ...] = (
    {"model_kwargs": {"sink_size": 3}},
    {"model_kwargs": {"sink_size": 0}, "clean_pass_sees_sink": True},
    {"model_kwargs": {"sink_size": 1}, "sink_position": "original", "clean_pass_sees_sink": True},
)


@pytest.mark.parametrize(("longest", "rollouts"), [(21, 1), (24, 3)])
@pytest.mark.parametrize("schedule", ["rolling", "block"])
def test_a_sink_matters_only_where_a_rollout_drops_frames(
    schedule: Any, longest: int, rollouts: int, tmp_path: Path
) -> None:
    dit = random_dit(3)
    text = dit.encode_text(torch.randn(1, 4, dit.config.text_dim))
    seen = set()
    for sink in SINKS:
        values = {"image_or_video_shape": [1, 21, 16, 4, 6], "num_training_frames": longest}
        config = load_config(write_config(tmp_path / "c.yaml", **ROLLING | values | sink))
        assert rollout_recipe(config).longest_frames(layout_of(config)) == longest
        plan = RolloutDraw(schedule, longest // 3, (1,) * (longest // 3))
        noise = seeded_noise(config, dit)
        seen.add(rolled(config, dit, text, noise, plan, grad=False).numpy().tobytes())
    assert config.attention_frames == 21
    assert len(seen) == rollouts


def test_gradient_of_a_window_by_finite_differences(rolling: Config) -> None:
    """Only windows w = r (mod T) carry gradient, and there it is the true one."""
    torch.manual_seed(0)  # a draw with a small gradient would drown in float32 differences
    dit = random_dit(5).double().requires_grad_(True)
    text = dit.encode_text(torch.randn(1, 4, dit.config.text_dim).double())
    plan = RolloutDraw("rolling", 7, (0,) * 7)
    weight: Tensor = torch.randn(1, 3, 16, 4, 6)

    def first_block(bias: Tensor) -> Tensor:
        with torch.no_grad():
            dit.head.head.bias[3] = bias
        fixed = type(text)(*(tuple(x.detach() for x in part) for part in text))
        noise = seeded_noise(rolling, dit)
        return (rolled(rolling, dit, fixed, noise, plan, grad=True)[:, :3] * weight).sum()

    at = dit.head.head.bias[3].item()
    loss = first_block(torch.tensor(at))
    (gradient,) = torch.autograd.grad(loss, dit.head.head.bias)
    step = 1e-2
    numeric = (first_block(torch.tensor(at + step)) - first_block(torch.tensor(at - step))) / (
        2 * step
    )
    assert gradient[3].item() == pytest.approx(numeric.item(), rel=1e-3)


def test_checkpointed_rollout_recomputes_what_it_read(rolling: Config) -> None:
    """A cache that evicts would make recomputed windows read later frames."""
    gradients = []
    for checkpointing, selective in ((False, False), (True, False), (True, True)):
        dit = random_dit(5).requires_grad_(True)
        dit.gradient_checkpointing, dit.selective_checkpointing = checkpointing, selective
        text = dit.encode_text(torch.ones(1, 4, dit.config.text_dim))
        plan = RolloutDraw("rolling", 9, (2,) * 9)
        output = rolled(rolling, dit, text, seeded_noise(rolling, dit), plan, grad=True)
        output.square().sum().backward()
        gradients.append([p.grad for p in dit.parameters() if p.grad is not None])
    for plain, *others in zip(*gradients, strict=True):
        for again in others:
            torch.testing.assert_close(plain, again)


@pytest.mark.parametrize("kind", ["rolling", "block"])
def test_merged_clean_passes_change_no_output_and_no_gradient(rolling: Config, kind: Any) -> None:
    """They run alone, without gradient, before windows that have one."""
    plan = RolloutDraw(kind, 8, (2,) * 8)
    outputs, gradients, forwards = [], [], []
    for merged in (False, True):
        dit = random_dit(5).requires_grad_(True)
        passes: list[int] = []  # frames with gradient

        def look(_: Any, __: Any, flow: Tensor, seen: list[int] = passes) -> None:
            seen.append(flow.shape[1] if flow.requires_grad else 0)

        dit.register_forward_hook(look)
        text = dit.encode_text(torch.ones(1, 4, dit.config.text_dim))
        config = replace(rolling, merge_clean_pass=merged)
        output = rolled(config, dit, text, seeded_noise(config, dit), plan, grad=True)
        output.square().sum().backward()
        outputs.append(output.detach())
        gradients.append(
            torch.cat([p.grad.flatten() for p in dit.parameters() if p.grad is not None])
        )
        forwards.append((sum(passes), len(passes)))
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=0)
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)
    (with_gradient, all_alone), (with_gradient_merged, all_merged) = forwards
    assert with_gradient == with_gradient_merged
    assert all_merged < all_alone


OPTIONS: dict[str, Any] = {"sink_ema": 0.7, "window_attention": "block_causal"}
REPLAYED: dict[str, tuple[RolloutDraw, dict[str, Any]]] = {
    "rolling, longer than the clip": (RolloutDraw("rolling", 12, (3,) * 12), {}),
    "rolling, nothing stored before": (RolloutDraw("rolling", 7, (0,) * 7), {}),
    "block": (RolloutDraw("block", 11, (1,) * 11), {}),
    "block, levels of their own": (RolloutDraw("block", 9, (2, 0, 4, 1, 3, 3, 0, 2, 1)), {}),
    "block, merged": (RolloutDraw("block", 9, (2,) * 9), {"merge_clean_pass": True}),
    "rolling, merged": (RolloutDraw("rolling", 9, (1,) * 9), {"merge_clean_pass": True}),
    "rolling, sink at its distance": (RolloutDraw("rolling", 10, (4,) * 10), SINKS[2]),
    "rolling, averaged": (RolloutDraw("rolling", 10, (2,) * 10), OPTIONS),
    "block, averaged": (RolloutDraw("block", 11, (1,) * 11), OPTIONS),
    "rolling, from a true block": (RolloutDraw("rolling", 9, (3,) * 9, given_blocks=1), {}),
    "block, from a true block": (RolloutDraw("block", 4, (2,) * 4, given_blocks=1), {}),
}


@pytest.mark.parametrize("case", REPLAYED)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_replayed_gradients_are_those_of_one_graph(
    case: str, checkpointing: bool, tmp_path: Path
) -> None:
    """With a cache that evicts, and each window's graph gone before the next one is made."""
    plan, changes = REPLAYED[case]
    values = ROLLING | {"image_or_video_shape": [1, 9, 16, 4, 6], "max_attention_frames": 18}
    values |= {"merge_clean_pass": False} | changes
    config = load_config(write_config(tmp_path / "c.yaml", **values))
    videos, gradients = [], []
    for replayed in (False, True):
        dit = random_dit(5).double().requires_grad_(True)
        dit.gradient_checkpointing = checkpointing
        torch.manual_seed(1)
        text = dit.encode_text(torch.randn(1, 4, dit.config.text_dim))
        noise, true = seeded_noise(config, dit), torch.randn(1, 3, 16, 4, 6)
        options = {"prefix": true} if plan.given_blocks else {}
        video = rolled(config, dit, text, noise, plan, grad=True, replayed=replayed, **options)
        (video[:, -9:] * torch.randn(1, 9, 16, 4, 6)).sum().backward()
        videos.append(video.detach())
        gradients.append({name: p.grad for name, p in dit.named_parameters()})
    torch.testing.assert_close(*videos, atol=1e-6, rtol=0)
    for name, plain in gradients[0].items():
        assert plain is not None, name
        assert plain.any(), name
        torch.testing.assert_close(gradients[1][name], plain, atol=1e-9, rtol=1e-7, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("blocks", [5, 9])
@pytest.mark.parametrize("schedule", ["rolling", "block"])
def test_operations_of_a_replay_are_those_that_are_run(
    schedule: Any, blocks: int, tmp_path: Path
) -> None:
    """From where the first window with gradient begins; from the start if nothing is stored yet."""
    values = ROLLING | {"image_or_video_shape": [1, 9, 16, 4, 6], "max_attention_frames": 18}
    config = load_config(write_config(tmp_path / "c.yaml", **values, merge_clean_pass=False))
    dit = random_dit(5).requires_grad_(True)
    text = dit.encode_text(torch.randn(1, 4, dit.config.text_dim))
    fixed = type(text)(*(tuple(x.detach() for x in part) for part in text))
    plan = RolloutDraw(schedule, blocks, (1,) * blocks)
    ran, said = [], []
    for replayed in (False, True):
        noise = seeded_noise(config, dit)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            rolled(config, dit, fixed, noise, plan, grad=True, replayed=replayed).sum().backward()
        ran.append(counter.get_total_flops())
        said.append(
            rollout_flops(
                Setup.of(config, sizes=dit.config),
                dit.config,
                plan,
                scored_frames=9,
                grad=True,
                checkpointing=False,
                replayed=replayed,
            )
        )
    assert ran[1] - ran[0] == said[1] - said[0] > 0


OWN_LEVELS = {
    "rolling": [(2,) * 5, (0,) * 5, (4,) * 5],
    "block": [(2, 0, 4, 1, 3), (0, 0, 1, 2, 0), (3,) * 5],
}


@pytest.mark.parametrize("schedule", OWN_LEVELS)
@pytest.mark.parametrize("replayed", [False, True])
def test_videos_of_a_batch_stop_at_levels_of_their_own(
    schedule: Any, replayed: bool, tmp_path: Path
) -> None:
    """As each would alone, in values and gradients, whatever levels others make it pass through."""
    values = ROLLING | {"image_or_video_shape": [1, 9, 16, 4, 6], "max_attention_frames": 18}
    config = load_config(write_config(tmp_path / "c.yaml", **values))
    rows = tuple(RolloutDraw(schedule, 5, levels) for levels in OWN_LEVELS[schedule])
    every = tuple(RolloutDraw(schedule, 5, (level,) * 5) for level in range(5))
    torch.manual_seed(1)
    embeddings, weight = torch.randn(1, 4, TINY_DIT["text_dim"]), torch.randn(1, 9, 16, 4, 6)

    def run(drawn: Any, samples: list[int]) -> tuple[Tensor, Tensor]:
        dit = random_dit(5).double().requires_grad_(True)
        text = dit.encode_text(embeddings.expand(len(samples), -1, -1))
        noise = BlockNoise(CounterNoise(7, (16, 4, 6), 3), samples, "cpu")
        video = rolled(config, dit, text, noise, drawn, grad=True, replayed=replayed)
        (video[:, -9:] * weight).sum().backward()
        found = [p.grad.flatten() for p in dit.parameters() if p.grad is not None]
        return video.detach(), torch.cat(found)

    alone = [run(row, [sample]) for sample, row in enumerate(rows)]
    for together in (rows, every):
        video, gradient = run(BatchDraw(rows, together), [0, 1, 2])
        torch.testing.assert_close(video, torch.cat([own for own, _ in alone]), atol=1e-5, rtol=0)
        expected = torch.stack([own for _, own in alone]).sum(0)
        torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-5)


def test_levels_of_their_own_are_functions_of_the_video(rolling: Config) -> None:
    """Of its index in the global batch, whatever else is in the batch, on one rank or several."""
    config = replace(rolling, same_step_across_videos=False)
    recipe, layout = rollout_recipe(config), layout_of(config)
    for update in range(4):
        all_rows = recipe.draw_batch(layout, update, range(64), alone=True)
        some = recipe.draw_batch(layout, update, [9, 33], alone=False)
        assert some.rows == (all_rows.rows[9], all_rows.rows[33])
        assert {row.exit_levels[0] for row in all_rows.rows} == set(range(5))
        assert [each.exit_levels[0] for each in some.together] == list(range(5))
        shared = {replace(row, exit_levels=(0,)) for row in (*all_rows.rows, *some.together)}
        assert shared == {replace(drawn(config, update), exit_levels=(0,))}
        assert some.shared.exit_levels == (4,) * some.shared.num_blocks
    one = replace(config, last_step_only=True)
    only = rollout_recipe(one).draw_batch(layout, 0, [1], alone=False)
    assert {each.exit_levels[0] for each in (*only.rows, *only.together)} == {4}


def test_a_clip_from_anywhere_is_what_a_longer_rollout_has_there(rolling: Config) -> None:
    """Its gradient stays in it, and what comes after it is not run."""
    config = replace(rolling, scored_clip="anywhere", num_training_frames=30)
    config.image_or_video_shape[1] = 12
    plans = [drawn(config, update) for update in range(200)]
    assert {plan.num_blocks for plan in plans} == {10}
    assert {plan.end for plan in plans} == set(range(4, 11))
    dit = random_dit(5).requires_grad_(True)
    text = dit.encode_text(torch.ones(1, 4, dit.config.text_dim))
    fixed = type(text)(*(tuple(x.detach() for x in part) for part in text))
    whole = RolloutDraw("rolling", 10, (1,) * 10)
    part = replace(whole, scored_end=5)
    passes: list[bool] = []
    dit.register_forward_hook(lambda _, __, flow: passes.append(flow.requires_grad))
    noise = seeded_noise(config, dit)
    expected = rolled(config, dit, fixed, noise, whole, grad=False)
    number = len(passes)
    found = rolled(config, dit, fixed, noise, part, grad=True)
    torch.testing.assert_close(found.detach(), expected[:, :15], atol=1e-5, rtol=0)
    assert len(passes) < 2 * number
    # with r = 1 the windows 1, 6, 11 hold blocks 0-1, 2-6, 7-9; the clip is blocks 1-4
    assert sum(passes[number:]) == 2


def test_plan_is_a_function_of_seed_and_update(rolling: Config) -> None:
    plans = [drawn(rolling, update) for update in range(400)]
    assert plans == [drawn(rolling, update) for update in range(400)]
    share = sum(plan.schedule == "rolling" for plan in plans) / len(plans)
    assert 0.4 < share < 0.6
    assert {plan.num_blocks for plan in plans} == {7, 8, 9}
    assert {plan.exit_levels[0] for plan in plans} == set(range(5))
    assert all(len(set(plan.exit_levels)) == 1 for plan in plans)


def test_a_share_of_the_rollouts_goes_on_from_true_blocks(rolling: Config) -> None:
    """All else is drawn as without; a clip of one block alone would have nothing to score."""
    layout, shares = layout_of(rolling), (0.0, 0.4, 1.0)
    plans = []
    for share in shares:
        recipe = rollout_recipe(replace(rolling, true_prefix_probability=share))
        plans.append([recipe.draw(layout, update) for update in range(400)])
    for share, made in zip(shares, plans, strict=True):
        assert [replace(plan, given_blocks=0) for plan in made] == plans[0]
        assert np.mean([plan.given_blocks for plan in made]) == pytest.approx(share, abs=0.06)
    one_block = replace(rolling, true_prefix_probability=0.5, image_or_video_shape=[1, 3, 16, 4, 6])
    with pytest.raises(UserError, match="true_prefix_probability needs more"):
        rollout_recipe(one_block).draw(layout, 0)


def test_true_frames_do_not_count() -> None:
    """Of a clip that is the end of a longer rollout those alone that are left in it."""
    latents = torch.arange(12.0).view(1, 12, 1, 1, 1)
    for given, scored, counting in ((3, 12, 9), (6, 12, 6), (6, 11, 6), (6, 9, 6), (3, 9, 6)):
        clip, counts = scored_clip(latents, None, scored=scored, block_frames=3, given_frames=given)
        assert torch.equal(clip, latents[:, -scored:])
        assert counts is not None
        assert counts.tolist() == [False] * (scored - counting) + [True] * counting


def test_a_prefix_is_what_was_drawn(rolling: Config) -> None:
    dit = random_dit(3)
    text, noise = dit.encode_text(torch.ones(1, 4, dit.config.text_dim)), seeded_noise(rolling, dit)
    for given, prefix in ((1, None), (0, torch.zeros(1, 3, 16, 4, 6))):
        plan = RolloutDraw("rolling", 7, (0,) * 7, given_blocks=given)
        with pytest.raises(ValueError, match=f"blocks are given, not {given}"):
            rolled(rolling, dit, text, noise, plan, grad=False, prefix=prefix)


@pytest.mark.parametrize("longest", [24, 25, 26])
def test_no_rollout_is_longer_than_asked_for(rolling: Config, longest: int) -> None:
    """A length that is no whole number of blocks was rounded up."""
    config = replace(rolling, num_training_frames=longest)
    assert {drawn(config, update).num_blocks for update in range(50)} == {7, 8}


def test_scored_clip_without_reencoding_keeps_the_frame(tmp_path: Path) -> None:
    latents = torch.randn(1, 9, 16, 4, 6)
    clip, counts = scored_clip(latents, None, scored=7, block_frames=3)
    assert torch.equal(clip, latents[:, 2:])
    assert counts is not None
    assert counts.tolist() == [False] * 3 + [True] * 4
    write_tiny_vae(tmp_path / "v.pth")
    again, _ = scored_clip(
        latents, WanVAE.from_official(tmp_path / "v.pth"), scored=7, block_frames=3
    )
    assert torch.equal(again[:, 1:], clip[:, 1:])
    assert not torch.equal(again[:, :1], clip[:, :1])
