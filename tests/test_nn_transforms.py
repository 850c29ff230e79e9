"""The recurrent modules under compilers, tracers, torch.func and activation checkpointing."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap
from torch.utils.checkpoint import checkpoint

import rnnkern

T, B, I, H = 6, 3, 4, 5
KINDS = ["RNN", "LSTM", "GRU"]


def module_and_input(kind: str, **options: Any) -> tuple[torch.nn.Module, Tensor]:
    module = getattr(rnnkern.nn, kind)(I, H, dtype=torch.float64, **options)
    return module, torch.randn(T, B, I, dtype=torch.float64)


def loss(module: torch.nn.Module, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    return functional_call(module, parameters, (x,))[0].pow(2).sum()


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_without_a_graph_break(kind: str) -> None:
    module, x = module_and_input(kind, num_layers=2, bidirectional=True, batch_first=True)
    x = x.transpose(0, 1).contiguous()
    run = torch.compile(module, fullgraph=True, backend="aot_eager")
    for training in (True, False):
        module.train(training)
        torch.testing.assert_close(run(x), module(x), rtol=0, atol=0)
        with torch.no_grad():
            torch.testing.assert_close(run(x), module(x), rtol=0, atol=0)
    lengths = torch.tensor([T, 0, 2])
    torch.testing.assert_close(run(x, lengths=lengths), module(x, lengths=lengths), rtol=0, atol=0)
    gradients = []
    for f in (run, module):
        module.zero_grad()
        f(x)[0].pow(2).sum().backward()
        gradients.append([p.grad for p in module.parameters()])
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_compiled_with_a_forced_backend() -> None:
    module, x = module_and_input("GRU")
    with rnnkern.backend("eager"):
        run = torch.compile(module, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(run(x), module(x))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_per_sample(kind: str) -> None:
    module, x = module_and_input(kind)
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    per_sample = vmap(grad(lambda p, row: loss(module, p, row)), in_dims=(None, 1))(parameters, x)
    for b in range(B):
        module.zero_grad()
        module(x[:, b])[0].pow(2).sum().backward()
        for name, p in module.named_parameters():
            torch.testing.assert_close(per_sample[name][b], p.grad)


@pytest.mark.parametrize("options", [{}, {"grad_clip_norm": 0.1}], ids=["", "grad_clip_norm"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_per_sample_of_a_padded_batch(kind: str, options: dict[str, Any]) -> None:
    module, x = module_and_input(kind, bidirectional=True, **options)
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    lengths = torch.tensor([T, 0, 2])

    def padded(parameters: dict[str, Tensor], row: Tensor, length: Tensor) -> Tensor:
        y, _ = functional_call(module, parameters, (row.unsqueeze(1),), {"lengths": length.unsqueeze(0)})
        return y.pow(2).sum()

    per_sample = vmap(grad(padded), in_dims=(None, 1, 0))
    found = per_sample(parameters, x, lengths)
    for b in range(B):
        module.zero_grad()
        module(x[:, b : b + 1], lengths=lengths[b : b + 1])[0].pow(2).sum().backward()
        for name, p in module.named_parameters():
            torch.testing.assert_close(found[name][b], p.grad)
    with pytest.raises(RuntimeError, match=f"lengths must be within 0 and the number of steps {T}, got {T + 1}"):
        per_sample(parameters, x, lengths + 1)


def test_what_vmap_cannot_do() -> None:
    """As docs/compatibility.md says."""
    module, x = module_and_input("GRU", learn_initial_state=True)
    with pytest.raises(RuntimeError, match="nonzero"):
        vmap(lambda row, resets: module(row, resets=resets)[0], in_dims=1)(x, torch.rand(T, B) < 0.3)


@pytest.mark.parametrize("kind", KINDS)
def test_forward_mode_agrees_with_reverse_mode(kind: str) -> None:
    module, x = module_and_input(kind)
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    direction = torch.randn_like(x)
    expected = (grad(lambda x: loss(module, parameters, x))(x) * direction).sum()
    _, tangent = jvp(lambda x: loss(module, parameters, x), (x,), (direction,))
    torch.testing.assert_close(tangent, expected)
    with forward_ad.dual_level():
        dual = module(forward_ad.make_dual(x, direction))[0].pow(2).sum()
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, expected)


def test_explain_tells_of_a_transform() -> None:
    module, x = module_and_input("GRU")
    told = []
    grad(lambda x: told.append(rnnkern.explain(module, x)) or module(x)[0].sum())(x)
    assert told[0].layers[0].backend == "eager"
    assert "torch.func" in str(told[0])


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # of the checks, which a trace need not repeat
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_traced(kind: str) -> None:
    module, x = module_and_input(kind, num_layers=2)
    for wanted in (True, False):
        with torch.set_grad_enabled(wanted):
            module(x)
            traced = torch.jit.trace(module, (x,))
            other = torch.randn(T, B, I, dtype=torch.float64)
            torch.testing.assert_close(traced(other), module(other), rtol=0, atol=0)
    with torch.no_grad():
        module.weight_hh_l0.mul_(0.5)  # the trace holds the weights, not what was packed from them
        torch.testing.assert_close(traced(other), module(other), rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_exported(kind: str) -> None:
    module, x = module_and_input(kind, num_layers=2)
    exported = torch.export.export(module.eval(), (x,)).module()
    torch.testing.assert_close(exported(x), module(x), rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_activation_checkpointing(kind: str) -> None:
    module, x = module_and_input(kind, num_layers=2, dropout=0.3)
    gradients = []
    for run in (module, lambda x: checkpoint(module, x, use_reentrant=False)):
        torch.manual_seed(0)
        module.zero_grad()
        run(x)[0].pow(2).sum().backward()
        gradients.append([p.grad for p in module.parameters()])
    torch.testing.assert_close(*gradients, rtol=0, atol=0)
