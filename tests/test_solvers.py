"""Solvers: their order, the field's own implementations, and samples that do not depend on their batch."""

import math

import pytest
import torch

from liquiddiff.solvers import TABLEAUX, integrate

ORDER = {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4, "dopri5": 5}


def decay(x, t):
    """dx/dt = x cos(2 t): x(0) = x(1) exp(-sin(2) / 2)."""
    return x * torch.cos(2 * t)[:, None, None, None]


@pytest.mark.parametrize("solver", TABLEAUX)
def test_error_falls_at_the_solver_s_order(solver):
    x1 = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    exact = math.exp(-math.sin(2) / 2)
    stages = len(TABLEAUX[solver][1])
    errors = [abs(integrate(decay, x1, stages * steps, solver)[0].item() - exact) for steps in (16, 32)]
    assert math.log2(errors[0] / errors[1]) > ORDER[solver] - 0.35
    assert errors[1] < 10 ** -ORDER[solver]


@pytest.mark.parametrize("solver", TABLEAUX)
def test_nfe_is_counted_and_never_exceeded(solver):
    calls = []

    def velocity(x, t):
        calls.append(t[0].item())
        return torch.zeros_like(x)

    _, used = integrate(velocity, torch.zeros(2, 1, 2, 2), 13, solver)
    assert used == len(calls) <= 13
    assert calls[0] == 1.0 and min(calls) >= 0.0
    with pytest.raises(ValueError, match="needs nfe >="):
        integrate(velocity, torch.zeros(2, 1, 2, 2), len(TABLEAUX[solver][1]) - 1, solver)


def test_straight_paths_need_one_step():
    x0, noise = torch.randn(3, 1, 4, 4), torch.randn(3, 1, 4, 4)
    x, _ = integrate(lambda x, t: noise - x0, noise, 1)
    torch.testing.assert_close(x, x0)


def test_seed_s_own_euler_loop():
    net = lambda x, t: torch.tanh(x) * t[:, None, None, None]  # noqa: E731
    z = torch.randn(2, 3, 4, 4)
    mine, _ = integrate(net, z, 25)
    for i in range(25, 0, -1):
        t = torch.full((2,), i / 25)
        z = z - net(z, t) / 25
    torch.testing.assert_close(mine, z)


def small_net():
    from liquiddiff.config import Model
    from liquiddiff.seeding import initialise
    from liquiddiff.unet import LiquidDiffusionUNet, ZeroConv2d

    net = LiquidDiffusionUNet(Model("test", [8, 16], [1, 1]), in_channels=3, resolution=8)
    initialise(net, 0)
    for module in net.modules():
        if isinstance(module, ZeroConv2d):
            torch.nn.init.normal_(module.weight, std=0.1, generator=torch.Generator().manual_seed(1))
    return net.eval()


@torch.no_grad()
def test_euler_equals_diffusers():
    from diffusers import FlowMatchEulerDiscreteScheduler

    net, noise = small_net(), torch.randn(4, 3, 8, 8)
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[i / 10 for i in range(10, 0, -1)])
    x = noise
    for timestep, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        x = scheduler.step(net(x, sigma.expand(4)), timestep, x).prev_sample
    torch.testing.assert_close(integrate(net, noise, 10)[0], x, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("solver", "theirs"), [("heun", "heun2"), ("midpoint", "midpoint"), ("euler", "euler")])
def test_second_order_solvers_equal_flow_matching(solver, theirs):
    from flow_matching.solver import ODESolver

    net, noise = small_net(), torch.randn(4, 3, 8, 8)
    # flow_matching runs from 0 (noise) to 1 (data): u = 1 - t turns the velocity's sign.
    field = ODESolver(velocity_model=lambda x, t, **_: -net(x, (1 - t).expand(len(x))))
    x = field.sample(x_init=noise, method=theirs, step_size=1 / 8)
    steps = 8 * len(TABLEAUX[solver][1])
    torch.testing.assert_close(integrate(net, noise, steps, solver)[0], x, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_sample_k_is_the_same_in_any_batch():
    net, noise = small_net(), torch.randn(6, 3, 8, 8)
    for solver in TABLEAUX:
        whole = integrate(net, noise, 12, solver)[0]
        torch.testing.assert_close(integrate(net, noise[4:5], 12, solver)[0], whole[4:5], rtol=1e-5, atol=1e-5)


def test_shift_spends_steps_near_the_noise():
    seen = []
    integrate(lambda x, t: seen.append(t[0].item()) or x, torch.ones(1, 1, 1, 1), 4, shift=3.0)
    assert seen == pytest.approx([1.0, 0.9, 0.75, 0.5])
