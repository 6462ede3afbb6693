"""Formulas of the flow that the tests hold others against."""

from torch import Tensor

from wan.flow import sigma_of


def flow_from_x0(noisy: Tensor, clean: Tensor, timesteps: Tensor) -> Tensor:
    """v = (x_t - x_0) / s; undefined at t = 0."""
    return (noisy - clean) / sigma_of(timesteps, noisy)


def euler_step(noisy: Tensor, flow: Tensor, timesteps: Tensor, next_timesteps: Tensor) -> Tensor:
    """x_{t'} = x_t + (s' - s) v: one Euler step of the flow's ODE."""
    return noisy + (sigma_of(next_timesteps, noisy) - sigma_of(timesteps, noisy)) * flow
