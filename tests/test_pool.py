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
        # What this step takes at least: y, and r, z, n, gh_n of every unit.
        most = max(most, T * 16 * 256 * 5 * 4)
        del x, y
        gc.collect()
        assert _library.extension.unused_pool_bytes() < 3 * most
    assert _library.extension.unused_pool_bytes() > 0
    rnnkern.empty_cache()
    assert _library.extension.unused_pool_bytes() == 0


def test_tensors_outlive_the_cache() -> None:
    gru = rnnkern.nn.GRU(32, 256).eval()
    x = torch.randn(100, 16, 32)
    with torch.no_grad():
        y = gru(x)[0]
        kept = y.clone()
        rnnkern.empty_cache()
        others = [gru(x * factor)[0] for factor in (2, 3)]
    assert torch.equal(y, kept)
    assert len({y.data_ptr(), *(other.data_ptr() for other in others)}) == 3
