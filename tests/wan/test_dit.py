"""The network against recorded numbers, against diffusers' Wan, and its own promises."""

import re
from collections import Counter
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils._python_dispatch import TorchDispatchMode

from tests.golden_cases import Case, entries, load_case, load_weights
from tests.tiny_pipeline import random_dit
from utils.errors import UserError
from wan.checkpoints import empty_dit, official_to_diffusers_names
from wan.context import MaskedContext, frame_mask
from wan.dit import DiTConfig, WanDiT

TOLERANCE = 1e-4
GRID = (2, 3)


def golden_dit(case: Case) -> WanDiT:
    dit = WanDiT(DiTConfig.from_dict(case.meta["dit"]))
    dit.load_state_dict(load_weights(case.meta["weights"]))
    return dit.requires_grad_(False).eval()


def channels_first(latents: Tensor) -> Tensor:
    return latents.transpose(1, 2)  # [B, F, C, H, W] <-> [B, C, F, H, W]


def assert_close(ours: Tensor, theirs: Tensor, atol: float = TOLERANCE) -> None:
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=0)


def some_inputs(dit: WanDiT, frames: int = 5, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, per-frame timesteps that all differ, and text."""
    generator = torch.Generator().manual_seed(1)
    config = dit.config
    size = (GRID[0] * config.patch_size[1], GRID[1] * config.patch_size[2])
    latents = torch.randn(batch, frames, config.in_dim, *size, generator=generator)
    timesteps = 1000 * torch.rand(batch, frames, generator=generator)
    text = torch.randn(batch, config.text_len, config.text_dim, generator=generator)
    return latents, timesteps, text


# --- recorded numbers ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bidirectional() -> tuple[Case, WanDiT]:
    case = load_case("wan_dit")
    return case, golden_dit(case)


def recorded_texts(case: Case) -> list[Tensor]:
    found = [name for name in case.tensors if re.fullmatch(r"text_\d+", name)]
    names = sorted(found, key=lambda name: int(name.removeprefix("text_")))
    return [case.tensors[name] for name in names]


@pytest.mark.golden
def test_full_attention_gives_the_recorded_flow(bidirectional: tuple[Case, WanDiT]) -> None:
    case, dit = bidirectional
    text = dit.encode_text(pad_sequence(recorded_texts(case), batch_first=True))
    runs = [name.removeprefix("t_") for name in case.tensors if name.startswith("t_")]
    assert len(runs) > 1
    for run in runs:
        flow = dit(channels_first(case.tensors["x"]), case.tensors[f"t_{run}"], text)
        assert_close(channels_first(flow), case.tensors[f"flow_{run}"])


@pytest.mark.golden
def test_each_sample_alone_gives_the_recorded_flow(bidirectional: tuple[Case, WanDiT]) -> None:
    case, dit = bidirectional
    for i, text in enumerate(recorded_texts(case)):
        latents = channels_first(case.tensors["x"][i : i + 1])
        flow = dit(latents, case.tensors["t_a"][i : i + 1], dit.encode_text(text[None]))
        assert_close(channels_first(flow), case.tensors["flow_a"][i : i + 1])


@pytest.mark.golden
def test_other_sizes_give_the_recorded_flow(bidirectional: tuple[Case, WanDiT]) -> None:
    case, dit = bidirectional
    found = [name for name in case.tensors if re.fullmatch(r"var_x_\d+", name)]
    assert found
    for name in found:
        i = int(name.removeprefix("var_x_"))
        text = dit.encode_text(recorded_texts(case)[i][None])
        flow = dit(channels_first(case.tensors[name][None]), case.tensors["t_a"][i : i + 1], text)
        assert_close(channels_first(flow)[0], case.tensors[f"var_flow_{i}"])


def recorded_mask(case: Case, variant: str) -> Tensor:
    settings = case.meta["variants"][variant]
    return frame_mask(
        settings["F"],
        case.meta["num_frame_per_block"],
        local_frames=settings.get("local"),
        independent_first_frame=settings.get("indep", False),
        teacher_forcing=settings.get("clean", False),
    )


VARIANTS = entries("causal_dit_train", "variants")


@pytest.mark.golden
@pytest.mark.parametrize("variant", VARIANTS)
def test_frame_mask_is_the_recorded_one(variant: str) -> None:
    case = load_case("causal_dit_train")
    assert torch.equal(recorded_mask(case, variant), case.tensors[f"{variant}.frame_mask"])


@pytest.mark.golden
@pytest.mark.parametrize("variant", VARIANTS)
def test_parallel_causal_forward_gives_the_recorded_flow(variant: str) -> None:
    case = load_case("causal_dit_train")
    dit = golden_dit(case)
    recorded = {name.split(".", 1)[1]: x for name, x in case.tensors.items() if _of(name, variant)}
    latents, timesteps = recorded["x"], recorded["timestep"]
    frames = latents.shape[1]
    positions = tuple(range(frames))
    if "clean_x" in recorded:
        clean_timesteps = recorded.get("aug_t", torch.zeros_like(timesteps))
        latents = torch.cat([recorded["clean_x"], latents], dim=1)
        timesteps = torch.cat([clean_timesteps, timesteps], dim=1)
        positions = positions * 2
    _, ph, pw = dit.config.patch_size
    grid = (latents.shape[3] // ph, latents.shape[4] // pw)
    context = MaskedContext(
        recorded_mask(case, variant), positions, grid, dit.config.head_dim, latents.device
    )
    flow = dit(latents, timesteps, dit.encode_text(recorded["prompt_embeds"]), context)
    assert_close(flow[:, -frames:], recorded["flow"])


def _of(name: str, variant: str) -> bool:
    return name.split(".", 1)[0] == variant


# --- an independent implementation --------------------------------------------------------------

SIZES = {
    "head_dim 24": {"dim": 48, "num_heads": 2, "num_layers": 2},
    "head_dim 16, four channels": {
        "dim": 80,
        "num_heads": 5,
        "num_layers": 3,
        "ffn_dim": 72,
        "in_dim": 4,
        "out_dim": 4,
        "freq_dim": 20,
        "text_dim": 12,
        "text_len": 7,
    },
}


def diffusers_twin(dit: WanDiT) -> WanTransformer3DModel:
    """Diffusers' network with the weights of ours."""
    config = dit.config
    twin = WanTransformer3DModel(
        patch_size=config.patch_size,
        num_attention_heads=config.num_heads,
        attention_head_dim=config.head_dim,
        in_channels=config.in_dim,
        out_channels=config.out_dim,
        text_dim=config.text_dim,
        freq_dim=config.freq_dim,
        ffn_dim=config.ffn_dim,
        num_layers=config.num_layers,
        cross_attn_norm=config.cross_attn_norm,
        eps=config.eps,
    )
    names = official_to_diffusers_names(dit.state_dict())
    twin.load_state_dict({names[key]: value for key, value in dit.state_dict().items()})
    return twin.requires_grad_(False).eval()


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("per_frame", [False, True], ids=["one timestep", "per frame"])
def test_agrees_with_diffusers(sizes: dict[str, int], per_frame: bool) -> None:
    dit = random_dit(**sizes)
    latents, timesteps, text = some_inputs(dit)
    if not per_frame:
        timesteps = timesteps[:, 0]
    tokens = GRID[0] * GRID[1]
    theirs = diffusers_twin(dit)(
        channels_first(latents),
        timesteps.repeat_interleave(tokens, dim=1) if per_frame else timesteps,
        text,
        return_dict=False,
    )[0]
    ours = dit(latents, timesteps, dit.encode_text(text))
    assert ours.std() > 0.05
    assert_close(channels_first(ours), theirs, atol=2e-5)


# --- promises -----------------------------------------------------------------------------------


def test_one_timestep_is_the_same_for_every_frame() -> None:
    dit = random_dit()
    latents, timesteps, embeddings = some_inputs(dit)
    text = dit.encode_text(embeddings)
    one = timesteps[:, 0]
    every = one[:, None].expand(-1, latents.shape[1])
    assert_close(dit(latents, one, text), dit(latents, every, text), atol=1e-6)


def test_each_frame_reads_its_own_timestep() -> None:
    """Guards against timesteps that are averaged or taken from the first frame.

    Under a mask in which a frame sees only itself, its flow depends on its own timestep alone.
    """
    dit = random_dit()
    latents, timesteps, embeddings = some_inputs(dit, frames=3)
    text = dit.encode_text(embeddings)
    alone = MaskedContext(
        torch.eye(3, dtype=torch.bool), (0, 1, 2), GRID, dit.config.head_dim, latents.device
    )
    changed = timesteps.clone()
    changed[:, 1] += 100
    moved = (dit(latents, timesteps, text, alone) - dit(latents, changed, text, alone)).abs()
    assert moved[:, [0, 2]].max() == 0
    assert moved[:, 1].max() > 1e-3


def test_shorter_text_is_padded_with_zeros() -> None:
    dit = random_dit()
    _, _, embeddings = some_inputs(dit)
    short = embeddings[:, :5]
    padded = torch.zeros_like(embeddings)
    padded[:, :5] = short
    for ours, theirs in zip(dit.encode_text(short), dit.encode_text(padded), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_longer_text_is_an_error() -> None:
    dit = random_dit()
    too_long = torch.zeros(1, dit.config.text_len + 1, dit.config.text_dim)
    with pytest.raises(ValueError, match=f"exceeds {dit.config.text_len}"):
        dit.encode_text(too_long)


def gradients_of(
    dit: WanDiT, checkpointing: bool, selective: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    dit.gradient_checkpointing, dit.selective_checkpointing = checkpointing, selective
    dit.zero_grad(set_to_none=True)
    latents, timesteps, embeddings = some_inputs(dit)
    context = MaskedContext(
        frame_mask(5, 2), tuple(range(5)), GRID, dit.config.head_dim, latents.device
    )
    flow = dit(latents, timesteps, dit.encode_text(embeddings), context)
    flow.square().mean().backward()
    grads = {name: p.grad for name, p in dit.named_parameters() if p.grad is not None}
    return flow.detach(), grads


def test_gradient_checkpointing_changes_nothing() -> None:
    dit = random_dit().requires_grad_(True)
    flow, grads = gradients_of(dit, checkpointing=False)
    flow_again, grads_again = gradients_of(dit, checkpointing=True)
    assert torch.equal(flow, flow_again)
    assert set(grads) == set(grads_again) == {name for name, _ in dit.named_parameters()}
    for name, grad in grads.items():
        assert_close(grads_again[name], grad, atol=1e-7)
        assert grad.abs().max() > 0, name


def test_gradient_checkpointing_recomputes_each_layer() -> None:
    """Guards against a switch that is read by nobody: a layer runs again in the backward pass."""
    dit = random_dit().requires_grad_(True)
    calls = []
    dit.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    gradients_of(dit, checkpointing=False)
    assert len(calls) == 1
    gradients_of(dit, checkpointing=True)
    assert len(calls) == 3


def test_selective_checkpointing_computes_all_but_attention_again() -> None:
    """The same gradients, in float64."""
    dit = random_dit().double().requires_grad_(True)
    _, grads = gradients_of(dit, checkpointing=False)
    made: list[Counter[str]] = []
    for selective in (False, True):
        with Calls() as calls:
            _, again = gradients_of(dit, checkpointing=True, selective=selective)
        made.append(calls.made)
        for name, grad in grads.items():
            assert_close(again[name], grad, atol=1e-12)
    assert made[0]["addmm"] == made[1]["addmm"]
    attention = "_scaled_dot_product_flash_attention_for_cpu"
    assert made[0][attention] == 2 * made[1][attention] == 4 * dit.config.num_layers


class Calls(TorchDispatchMode):
    """Counts the operations that are run."""

    def __init__(self) -> None:
        super().__init__()
        self.made: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.made[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_masked_backward_keeps_causality() -> None:
    """Runs the backward of the masked context (eager FlexAttention has none on a CPU).

    The first block's output has no gradient to later frames, the last one's has to all.
    """
    dit = random_dit()
    latents, timesteps, embeddings = some_inputs(dit, frames=4)
    text = dit.encode_text(embeddings)
    context = MaskedContext(
        frame_mask(4, 2), (0, 1, 2, 3), GRID, dit.config.head_dim, latents.device
    )
    latents.requires_grad_(True)
    flow = dit(latents, timesteps, text, context)
    (first,) = torch.autograd.grad(flow[:, :2].sum(), latents, retain_graph=True)
    (last,) = torch.autograd.grad(flow[:, 2:].sum(), latents)
    assert first[:, 2:].abs().max() == 0
    assert (first[:, :2].abs().amax((0, 2, 3, 4)) > 0).all()
    assert (last.abs().amax((0, 2, 3, 4)) > 0).all()


def test_bfloat16_is_close_to_float32() -> None:
    dit = random_dit()
    latents, timesteps, embeddings = some_inputs(dit)
    exact = dit(latents, timesteps, dit.encode_text(embeddings))
    rough_dit = random_dit().to(torch.bfloat16)
    rough = rough_dit(latents, timesteps, rough_dit.encode_text(embeddings))
    assert rough.dtype == latents.dtype
    assert (rough - exact).norm() / exact.norm() < 0.02


def test_unusable_sizes_are_refused() -> None:
    sizes = {"dim": 48, "ffn_dim": 96, "num_heads": 2, "num_layers": 1}
    with pytest.raises(UserError, match=r"lacks dim, num_layers"):
        DiTConfig.from_dict({"ffn_dim": 96, "num_heads": 2})
    with pytest.raises(UserError, match="text-to-video"):
        DiTConfig.from_dict(sizes | {"model_type": "i2v"})
    with pytest.raises(UserError, match="window_size"):
        DiTConfig.from_dict(sizes | {"window_size": [3, 3]})
    assert DiTConfig.from_dict(sizes | {"window_size": [-1, -1]}) == DiTConfig.from_dict(sizes)
    with pytest.raises(UserError, match="patch_size"):
        WanDiT(DiTConfig.from_dict(sizes | {"patch_size": [2, 2, 2]}))
    published = {"_class_name": "WanModel", "_diffusers_version": "0.30.0"}
    assert DiTConfig.from_dict(sizes | published).head_dim == 24


def test_first_weights_are_a_function_of_the_seed_alone() -> None:
    """Of all parameters, and whatever memory the network itself has, or none."""
    dit = random_dit()
    first, second = (dict(network.first_weights(3)) for network in (dit, empty_dit(dit.config)))
    assert first.keys() == dit.state_dict().keys()
    for name, value in first.items():
        assert value.isfinite().all(), name
        assert torch.equal(value, second[name]), name
