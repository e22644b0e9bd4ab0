"""The GPU's depthwise kernels compute what float64 does, in Triton's interpreter: no GPU has run them yet."""

import importlib
import sys

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import liquiddiff

pytest.importorskip("triton", reason="no Triton on this platform: the GPU path is torch's")
CPU = torch.device("cpu")
depthwise = importlib.import_module("liquiddiff.depthwise")


@pytest.fixture(scope="module")
def kernels():
    """The module with its kernels interpreted, whoever imported it before."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.delitem(sys.modules, "liquiddiff.depthwise_triton", raising=False)
        yield importlib.import_module("liquiddiff.depthwise_triton")
    sys.modules.pop("liquiddiff.depthwise_triton", None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("k", [3, 7])
def test_outputs_and_gradients_equal_float64(kernels, k, dtype):
    bounds = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}  # of bf16 and fp16: one rounding
    assert max(kernels.errors(CPU, k, dtype, (1, 5, 2, 18))) < bounds[dtype]


def test_more_channels_rows_and_splits_than_one_program_has(kernels, monkeypatch):
    monkeypatch.setattr(kernels, "SPLITS", 3)
    assert max(kernels.errors(CPU, 3, torch.float32, (2, 33, 4, 2))) < 1e-5


def test_only_the_gradients_asked_for(kernels):
    x, w = torch.randn(1, 4, 3, 3), torch.randn(4, 1, 3, 3, requires_grad=True)
    kernels.Depthwise.apply(x, w, None).sum().backward()
    assert w.grad is not None and x.grad is None


def test_the_network_s_convolution_takes_them_in_the_dtype_of_autocast(kernels, monkeypatch):
    monkeypatch.setattr(kernels, "usable", lambda *_: True)
    monkeypatch.setattr(liquiddiff, "depthwise_triton", kernels, raising=False)
    x, w, b = torch.randn(1, 4, 3, 3), torch.randn(4, 1, 3, 3, requires_grad=True), torch.randn(4)
    with torch.autocast("cpu", torch.bfloat16):
        y = depthwise._on_gpu(x, w, b)
        want = depthwise.depthwise_reference(x, w, b)
    assert y.dtype is torch.bfloat16 and "Depthwise" in y.grad_fn.name()
    torch.testing.assert_close(y, want, rtol=0.02, atol=0.02)
    y.float().sum().backward()
    assert w.grad.dtype is torch.float32


def in_a_checkpoint(check):
    def f(x):
        check()
        return x.sin()

    x = torch.ones(1, requires_grad=True)
    checkpoint(f, x, use_reentrant=False).backward()
    torch.testing.assert_close(x.grad, torch.ones(1).cos())


def in_inference(check):
    with torch.inference_mode():
        check()


def in_autocast(check):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        check()


@pytest.mark.parametrize("where", [in_a_checkpoint, in_inference, in_autocast])
def test_the_first_use_may_be_anywhere(kernels, where):
    kernels.usable.cache_clear()
    real = kernels.errors

    def small(device, k, dtype):
        return real(device, k, dtype, (1, 3, 2, 4))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "errors", small)
        where(lambda: kernels.usable(CPU, 3, torch.float32))
        assert kernels.usable(CPU, 3, torch.float32)
    kernels.usable.cache_clear()


def test_what_fails_or_differs_is_left_to_torch(kernels, monkeypatch):
    monkeypatch.setattr(kernels, "errors", lambda *_: [0.0, 0.5])
    assert not kernels.usable(CPU, 3, torch.float32)

    def fail(*_):
        raise RuntimeError("no such device")

    monkeypatch.setattr(kernels, "errors", fail)
    assert not kernels.usable(CPU, 5, torch.float32)
