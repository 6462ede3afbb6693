"""The flow's formulas against the recorded scheduler and against each other."""

import re
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from tests.golden_cases import Case, load_case
from tests.reference_flow import euler_step, flow_from_x0
from wan.flow import (
    add_noise,
    denoising_timesteps,
    shift_sigma,
    sigma_of,
    training_timesteps,
    training_weight,
    x0_from_flow,
)

ON_TABLE = 1e-4
OFF_TABLE = 4e-3  # of the largest value, per unit of time between a query and its table entry


class Recording(NamedTuple):
    """What the published scheduler gave with one shift."""

    shift: float
    tensors: dict[str, Tensor]


def recordings(case: Case) -> list[Recording]:
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in case.tensors.items():
        if match := re.fullmatch(r"shift([\d.]+?)\.(\D.*)", name):
            found.setdefault(match[1], {})[match[2]] = tensor
    return [Recording(float(shift), tensors) for shift, tensors in found.items()]


@pytest.fixture(scope="module")
def case() -> Case:
    return load_case("scheduler")


def assert_close(ours: Tensor, recorded: Tensor, atol: float = ON_TABLE) -> None:
    torch.testing.assert_close(ours, recorded, atol=atol, rtol=0)


@pytest.mark.golden
def test_tables_are_the_recorded_ones(case: Case) -> None:
    assert len(recordings(case)) > 1
    for shift, recorded in recordings(case):
        timesteps = training_timesteps(shift)
        assert_close(timesteps, recorded["timesteps"], atol=2e-4)  # of 1000
        assert_close(sigma_of(timesteps, timesteps), recorded["sigmas"], atol=1e-6)
        assert_close(training_weight(timesteps, shift), recorded["linear_timesteps_weights"])


@pytest.mark.golden
def test_warped_levels_are_the_recorded_ones(case: Case) -> None:
    """These are the timesteps that the released students were trained at."""
    lists = 0
    for shift, recorded in recordings(case):
        for name, warped in recorded.items():
            if name.startswith("warped_"):
                steps = [float(step) for step in name.removeprefix("warped_").split("_")]
                ours = denoising_timesteps(steps, shift, warp=True)
                assert_close(ours, warped, atol=2e-4)  # of 1000
                plain = denoising_timesteps(steps, shift, warp=False)
                assert plain.tolist() == steps
                lists += 1
    assert lists > 1


def next_entries(recorded: dict[str, Tensor]) -> Tensor:
    """Timesteps that the recorded `step` goes to: all zero if one query is at the last entry."""
    table, ids = recorded["timesteps"], recorded["nearest_id"]
    at_end = (ids + 1 >= len(table)).any()
    return torch.zeros(len(ids)) if at_end else table[ids + 1]


def formulas(case: Case, shift: float, t: Tensor, following: Tensor) -> dict[str, Tensor]:
    """Everything recorded at the queries, by our formulas at timesteps `t`."""
    clean, noise, flow = (case.tensors[name] for name in ("clean", "noise", "flow"))
    noisy = add_noise(clean, noise, t)
    return {
        "add_noise": noisy,
        "training_weight": training_weight(t, shift),
        "step": euler_step(clean, flow, t, following),
        "step_to_final": euler_step(clean, flow, t, torch.zeros_like(t)),
        "flow_to_x0": x0_from_flow(noisy, flow, t),
        "x0_to_flow": flow_from_x0(noisy, clean, t),
    }


@pytest.mark.golden
def test_formulas_agree_at_the_entry_that_the_recording_looked_up(case: Case) -> None:
    """Exact for every query, t = 0 among them: the recording maps it to its last entry."""
    for shift, recorded in recordings(case):
        looked_up = recorded["timesteps"][recorded["nearest_id"]]
        ours = formulas(case, shift, looked_up, next_entries(recorded))
        for name, values in ours.items():
            assert_close(values, recorded[name], atol=5e-4 if name == "x0_to_flow" else ON_TABLE)


@pytest.mark.golden
def test_formulas_agree_between_entries(case: Case) -> None:
    """At the queries themselves, which need not be in the table.

    Not below its last entry, where the recording takes a sigma that is not the query's (see
    `test_t_zero_is_clean`).
    """
    for shift, recorded in recordings(case):
        queries = case.tensors["t_query"]
        nearest = recorded["timesteps"][recorded["nearest_id"]]
        distance = (queries - nearest).abs()
        ours = formulas(case, shift, queries, next_entries(recorded))
        for i, query in enumerate(queries):
            if query < recorded["timesteps"][-1]:
                continue
            for name in ("add_noise", "training_weight", "step", "step_to_final", "flow_to_x0"):
                off_table = OFF_TABLE * recorded[name].abs().max() * distance[i]
                assert_close(ours[name][i], recorded[name][i], ON_TABLE + off_table.item())


def test_t_zero_is_clean() -> None:
    """The published lookup maps t = 0 to sigma 0.005, so clean frames carried noise."""
    clean, noise, flow = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0))
    zero = torch.zeros(2)
    assert torch.equal(add_noise(clean, noise, zero), clean)
    assert torch.equal(x0_from_flow(clean, flow, zero), clean)
    assert torch.equal(add_noise(clean, noise, torch.full((2,), 1000.0)), noise)


def test_conversions_invert_each_other() -> None:
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 4, 3, 2, 2, generator=generator)
    timesteps = torch.tensor([1000.0, 700.0, 300.0, 10.0])[:, None].expand(4, 3)
    noisy = add_noise(clean, noise, timesteps)
    assert_close(x0_from_flow(noisy, noise - clean, timesteps), clean, atol=1e-5)
    assert_close(flow_from_x0(noisy, clean, timesteps), noise - clean, atol=5e-5)
    earlier = timesteps / 2
    stepped = euler_step(noisy, noise - clean, timesteps, earlier)
    assert_close(stepped, add_noise(clean, noise, earlier), atol=1e-6)


@pytest.mark.parametrize("shift", [1.0, 3.0, 8.0])
def test_shift_keeps_the_ends_and_composes(shift: float) -> None:
    sigma = torch.linspace(0, 1, 11, dtype=torch.float64)
    shifted = shift_sigma(sigma, shift)
    assert shifted[0] == 0
    assert shifted[-1] == 1
    torch.testing.assert_close(shift_sigma(shifted, 1 / shift), sigma)
    assert (shifted >= sigma).all()


@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_training_weight_has_mean_one(shift: float) -> None:
    weights = training_weight(training_timesteps(shift), shift)
    assert weights.mean().item() == pytest.approx(1, abs=1e-5)
    assert weights.min() == 0


def test_a_single_timestep_stays_a_scalar() -> None:
    """Levels are kept on the CPU; with axes of its own one could not meet latents on a GPU."""
    latents = torch.zeros(1, 3, 4, 2, 2)
    assert sigma_of(torch.tensor(500.0), latents).ndim == 0
    assert sigma_of(torch.tensor([500.0]), latents).shape == (1, 1, 1, 1, 1)
