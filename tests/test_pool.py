"""The pool of large tensors' memory: bounded, given back on request, never shared by two tensors."""

import gc

import torch

import rnnkern
from rnnkern import _library
from tests.helpers import needs_kernels

pytestmark = needs_kernels


def test_unused_memory_is_bounded_and_given_back() -> None:
    assert _library.extension is not None
    rnnkern.empty_cache()
    gru = rnnkern.nn.GRU(64, 256)
    most = 0
    for T in (200, 31, 150, 77, 190, 12, 64, 200, 99):
        x = torch.randn(T, 16, 64, requires_grad=True)
        y, _ = gru(x)
        y.sum().backward()
        # What this step takes of the pool at least: r, z, n, gh_n of every unit.
        most = max(most, T * 16 * 256 * 4 * 4)
        del x, y
        gc.collect()
        assert _library.extension.unused_pool_bytes() < 3 * most
    assert _library.extension.unused_pool_bytes() > 0
    rnnkern.empty_cache()
    assert _library.extension.unused_pool_bytes() == 0


def test_gradients_outlive_the_cache() -> None:
    gru = rnnkern.nn.GRU(32, 512)
    x = torch.randn(20, 16, 32)

    def gradient(factor: float) -> torch.Tensor:
        return torch.autograd.grad(gru(x * factor)[0].sum(), gru.weight_hh_l0)[0]

    first = gradient(1)
    kept = first.clone()
    rnnkern.empty_cache()
    others = [gradient(factor) for factor in (2, 3)]
    assert torch.equal(first, kept)
    assert len({first.data_ptr(), *(other.data_ptr() for other in others)}) == 3


def test_outputs_can_be_resized() -> None:
    y, _ = rnnkern.nn.GRU(32, 256).eval()(torch.randn(100, 16, 32))
    assert y.detach().resize_(200, 16, 256).shape == (200, 16, 256)
