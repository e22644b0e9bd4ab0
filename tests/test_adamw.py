"""Clipping, AdamW and the EMA in one call do what torch's do one after the other."""

import copy
import shutil

import pytest
import torch
from torch import nn

from liquiddiff import RectifiedFlowTrainer, adamw
from liquiddiff.config import Model, Optim
from liquiddiff.depthwise import literal
from liquiddiff.ema import EMA
from liquiddiff.unet import LiquidDiffusionUNet

COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C compiler: torch, rightly")


class Fit:
    """A network of odd sizes, of which one weight takes several pieces; gradients come from the number of the step."""

    def __init__(self, clip=1.0, dtype=torch.float32, **options):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 40, 3), nn.Conv2d(40, 1, 1), nn.Linear(130, 301), nn.BatchNorm1d(1))
        self.net = net.to(memory_format=torch.channels_last).to(dtype)
        self.ema, self.clip, self.step = EMA(self.net, 40), clip, 0
        self.optimizer = torch.optim.AdamW(
            self.net.parameters(), 1e-2, (0.9, 0.95), weight_decay=0.1, fused=True, **options
        )
        self.update = adamw.Update(self.optimizer, self.ema.weights)

    def gradients(self):
        rng = torch.Generator().manual_seed(self.step)
        for weight in self.net.parameters():
            drawn = torch.randn(weight.shape, generator=rng) * 10.0 ** -(self.step % 4)  # clipped or not
            weight.grad = torch.empty_like(weight).copy_(drawn)

    def run(self, steps, fast=True):
        """Tells which steps were made at once."""
        done = []
        for _ in range(steps):
            self.gradients()
            decay = self.ema.decay(16 * (self.step + 1), 16)
            done.append(fast and self.update(self.clip, decay))
            if not done[-1]:
                if self.clip:
                    nn.utils.clip_grad_norm_(self.net.parameters(), self.clip)
                self.optimizer.step()
            self.ema.update(decay, weights=not done[-1])
            self.step += 1
        return done

    def tensors(self):
        state = [value for entry in self.optimizer.state.values() for value in entry.values()]
        return [*self.net.state_dict().values(), *self.ema.net.state_dict().values(), *state]


def assert_equal(one, two):
    assert all(torch.equal(a, b) for a, b in zip(one.tensors(), two.tensors(), strict=True))


@pytest.mark.parametrize("clip", [1.0, 0.0])
def test_equals_torch_in_float64(clip):
    fast, exact = Fit(clip), Fit(clip, torch.float64)
    done = fast.run(12)
    exact.run(12, fast=False)
    if COMPILER:
        assert done == [False] + [True] * 11  # the first makes the state
    for a, b in zip(fast.tensors(), exact.tensors(), strict=True):
        assert (a.double() - b.double()).abs().max() <= 1e-5 * b.abs().max()


@needs_compiler
def test_a_trainer_uses_it_with_the_gradients_that_it_has(monkeypatch):
    model = Model("test", [32, 64], [1, 1])
    fitted = RectifiedFlowTrainer(LiquidDiffusionUNet(model, in_channels=1, resolution=8), optim=Optim())
    fitted.train_step(torch.randn(2, 1, 8, 8))
    monkeypatch.setattr(fitted, "_clip_and_step", lambda: pytest.fail("by torch"))
    fitted.train_step(torch.randn(2, 1, 8, 8))


@needs_compiler
def test_bits_do_not_depend_on_threads():
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(Fit())
            found[-1].run(5)
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert_equal(other, found[0])


@needs_compiler
def test_without_averages_the_weights_are_the_same():
    fit, alone = Fit(), Fit()
    alone.update = adamw.Update(alone.optimizer)
    assert fit.run(4) == alone.run(4) == [False, True, True, True]
    assert all(torch.equal(a, b) for a, b in zip(fit.net.parameters(), alone.net.parameters(), strict=True))
    alone.update = adamw.Update(alone.optimizer, alone.ema.weights[1:])
    with pytest.raises(ValueError, match="7 averages of 8 weights"):
        alone.run(1)


@needs_compiler
def test_goes_on_from_a_loaded_state_and_from_moved_weights():
    whole, fit, other = Fit(), Fit(), Fit()
    whole.run(6)
    fit.run(3)
    other.run(2)  # knows tensors that are others after loading
    other.net.load_state_dict(fit.net.state_dict())
    other.ema.net.load_state_dict(fit.ema.net.state_dict())
    other.optimizer.load_state_dict(copy.deepcopy(fit.optimizer.state_dict()))
    other.step = 3
    assert other.run(3) == [True] * 3
    assert_equal(other, whole)
    for weight in (*fit.net.parameters(), *fit.ema.net.parameters()):
        weight.data = weight.data.clone()
    assert fit.run(3) == [True] * 3
    assert_equal(fit, whole)


def forget(fit):
    fit.optimizer.state.clear()


def put_other_moments(fit):
    for entry in fit.optimizer.state.values():
        entry |= {key: torch.zeros_like(value) for key, value in entry.items()}


def put_another_weight(fit):
    weight = nn.Parameter(fit.net[0].weight.detach().clone())
    fit.optimizer.state[weight] = fit.optimizer.state.pop(fit.net[0].weight)
    fit.net[0].weight = fit.optimizer.param_groups[0]["params"][0] = weight


@needs_compiler
@pytest.mark.parametrize("change", [forget, put_other_moments, put_another_weight])
def test_what_was_exchanged_between_steps_is_what_is_used(change):
    fit, plain = Fit(), Fit()
    for one, fast in ((fit, True), (plain, False)):
        one.run(3, fast)
        change(one)
        last = one.run(2, fast)
        assert last[-1] is fast
    for a, b in zip(fit.net.parameters(), plain.net.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    for a, b in zip(fit.optimizer.state.values(), plain.optimizer.state.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@needs_compiler
def test_what_it_cannot_take_is_left_to_torch():
    fit = Fit()
    fit.run(2)
    fit.gradients()
    before = [tensor.clone() for tensor in fit.tensors()]
    with literal():
        assert not fit.update(1.0, 0.9)
    weight = fit.net[0].weight
    for gradient in (None, weight.grad.contiguous()):
        weight.grad = gradient
        assert not fit.update(1.0, 0.9)
    if hasattr(weight, "grad_dtype"):  # newer torch has gradients of another dtype
        weight.grad, weight.grad_dtype = None, torch.float64
        weight.grad = torch.empty_like(weight, dtype=torch.float64)
        assert not fit.update(1.0, 0.9)
        weight.grad, weight.grad_dtype = None, torch.float32
    fit.net[0].to(memory_format=torch.contiguous_format)  # unlike its moments
    fit.gradients()
    assert not fit.update(1.0, 0.9)
    assert all(torch.equal(a, b) for a, b in zip(before, fit.tensors(), strict=True))
    for options in ({"amsgrad": True}, {"maximize": True}):
        assert Fit(**options).run(3) == [False] * 3
    fit = Fit()
    fit.run(2)
    fit.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    fit.gradients()
    assert not fit.update(1.0, 0.9)
    double = Fit(dtype=torch.float64)
    assert double.run(3) == [False] * 3


@needs_compiler
def test_a_copy_has_its_own_and_a_graph_that_is_out_of_date_is_told():
    fit, whole = Fit(), Fit()
    fit.run(3)
    whole.run(5)
    other = copy.deepcopy(fit)
    assert other.run(2) == [True] * 2
    assert_equal(other, whole)
    loss = other.net[0].weight.square().sum()
    other.run(1)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


@needs_compiler
def test_a_gradient_that_is_no_number_spoils_all_weights_as_in_torch():
    fit = Fit()
    fit.run(2)
    fit.gradients()
    fit.net[2].weight.grad[300, 129] = torch.inf
    assert fit.update(1.0, 0.9)
    assert fit.net[2].weight[300, 129].isnan()
    fit.gradients()
    fit.net[2].weight.grad[0, 0] = torch.nan
    assert fit.update(1.0, 0.9)
    assert all(weight.isnan().all() for weight in fit.net.parameters())
