"""Runs the example cell on its kernels against its eager reference; exits with an error if they differ."""

import itertools

import torch
from mgu_module import MGU

import rnnkern
from rnnkern import _library
from rnnkern.cells import CELLS

assert _library.extension is not None, _library.reason
SPEC = CELLS["mgu"]
assert _library.extension.cell_traits() == {
    "mgu": {
        "gates": len(SPEC.gates),
        "states": len(SPEC.states),
        "saved": len(SPEC.saved),
        "split_gates": len(SPEC.split_gates),
    }
}

for dtype, bidirectional, (T, B, I, H) in itertools.product(
    (torch.float32, torch.float64), (False, True), ((7, 3, 5, 17), (23, 18, 9, 33))
):
    torch.manual_seed(T)
    module = MGU(I, H, num_layers=2, bidirectional=bidirectional, dtype=dtype)
    x = torch.randn(T, B, I, dtype=dtype, requires_grad=True)
    lengths = torch.arange(B) % (T + 1)
    resets = torch.rand(T, B) < 0.1
    results = {}
    for backend in ("cpu", "eager"):
        with rnnkern.backend(backend):
            y, h_n = module(x, lengths=lengths, resets=resets)
            (y.square().sum() + h_n.sin().sum()).backward()
        results[backend] = [y.detach(), h_n.detach(), x.grad, *(p.grad for p in module.parameters())]
        x.grad = None
        module.zero_grad()
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-10}
    for actual, expected in zip(results["cpu"], results["eager"]):
        assert actual.abs().max() > 0
        torch.testing.assert_close(actual, expected, **tolerance)
print("mgu agrees with its reference")
