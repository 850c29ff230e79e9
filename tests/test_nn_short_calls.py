"""Calls past the dispatcher: made where nobody looks, and nowhere else."""

import copy
import re
import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import BaseTorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import rnnkern
from tests.helpers import ISAS, instruction_set, needs_kernels, poisoned_memory

pytestmark = needs_kernels
B, I, H = 2, 5, 20
KINDS = ["RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell"]


class Spy:
    """Stands before a module's ShortCall and counts what it answered and what it left to the ordinary route."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.real, self.answered, self.declined = module._packs.short, 0, 0
        module._packs.short = self

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> Any:
            result = getattr(self.real, name)(*args)
            self.answered += result is not None
            self.declined += result is None
            return result

        return call


def warm(kind: str, **options: Any) -> tuple[torch.nn.Module, Tensor, Spy]:
    module = getattr(rnnkern.nn, kind)(I, H, **options).eval()
    x = torch.randn(B, I) if kind.endswith("Cell") else torch.randn(1, B, I)
    with torch.no_grad():
        for _ in range(2):
            module(x)
    assert module._packs.short is not None
    return module, x, Spy(module)


@pytest.mark.parametrize("kind", KINDS)
def test_plain_calls_are_answered(kind: str) -> None:
    module, x, spy = warm(kind)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context, poisoned_memory():
            expected = tree_leaves(module(x))
        with torch.no_grad(), rnnkern.backend("cpu"):
            ordinary = tree_leaves(module(x))
        for a, b in zip(expected, ordinary, strict=True):
            assert torch.equal(a, b)
            assert a.stride() == b.stride()
    assert (spy.answered, spy.declined) == (2, 2)
    with torch.no_grad():
        storages = [leaf.untyped_storage().data_ptr() for leaf in tree_leaves(module(x))]
    assert len(set(storages)) == len(storages)


@pytest.mark.parametrize("T", [1, 3, 15])
@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_layouts(kind: str, T: int) -> None:
    for options in ({}, {"batch_first": True, "num_layers": 3}):
        module, _, spy = warm(kind, **options)
        wide = torch.randn(T, B, 2 * I)
        for x in (wide[:, :, :I], wide.transpose(0, 1)[:, :, I:], wide[:, 0, :I], wide[:, :1, :I].expand(T, B, I)):
            with torch.no_grad():
                result = module(x)
                with rnnkern.backend("cpu"):
                    expected = module(x)
            for a, b in zip(tree_leaves(result), tree_leaves(expected), strict=True):
                assert torch.equal(a, b)
                assert a.stride() == b.stride()
        assert spy.answered == 4
        with torch.no_grad():
            module(torch.randn(16, 16, I))
            module(torch.randn(T, B, I, 2)[..., 0])  # elements of a row apart: made contiguous first
        assert (spy.answered, spy.declined) == (4, 6)


class Subclass(Tensor):
    pass


class Mode(TorchDispatchMode):
    seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += "rnnkern" in str(func)
        return func(*args, **(kwargs or {}))


def in_subclass(module: torch.nn.Module, x: Tensor) -> Any:
    return module(x.as_subclass(Subclass))


def in_dispatch_mode(module: torch.nn.Module, x: Tensor) -> Any:
    with Mode() as mode:
        result = module(x)
    assert mode.seen == 1
    return result


def in_function_mode(module: torch.nn.Module, x: Tensor) -> Any:
    with BaseTorchFunctionMode():
        return module(x)


def in_forward_mode(module: torch.nn.Module, x: Tensor) -> Any:
    with forward_ad.dual_level():
        primal, tangent = forward_ad.unpack_dual(tree_leaves(module(forward_ad.make_dual(x, torch.ones_like(x))))[0])
        assert tangent.any()
        return primal


def in_vmap(module: torch.nn.Module, x: Tensor) -> Any:
    return torch.func.vmap(module, in_dims=-2, out_dims=-2)(x)


def in_explain(module: torch.nn.Module, x: Tensor) -> Any:
    results = []
    (note,) = rnnkern.explain(lambda: results.append(module(x))).layers
    assert note.backend == "cpu"
    return results


def negated(module: torch.nn.Module, x: Tensor) -> Any:
    return module(torch._neg_view(-x))


def with_gradients(module: torch.nn.Module, x: Tensor) -> Any:
    with torch.enable_grad():
        return module(x)


def in_training_mode(module: torch.nn.Module, x: Tensor) -> Any:
    return module.train()(x)


WATCHED = [
    in_subclass,
    in_dispatch_mode,
    in_function_mode,
    in_forward_mode,
    in_vmap,
    in_explain,
    negated,
    with_gradients,
    in_training_mode,
]


@pytest.mark.parametrize("run", WATCHED, ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", ["GRU", "LSTMCell"])
def test_who_looks_sees_the_operator(kind: str, run: Any) -> None:
    module, x, spy = warm(kind)
    with torch.no_grad():
        expected = tree_leaves(module(x))[0]
        result = tree_leaves(run(module, x))[0]
    torch.testing.assert_close(result.detach().as_subclass(Tensor), expected)
    assert spy.answered == 1


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_trace_holds_the_operator() -> None:
    module, x, _ = warm("GRU")
    with torch.no_grad():
        traced = torch.jit.trace(module, (x,))
        assert torch.equal(traced(-x)[0], module(-x)[0])
    assert "rnnkern::layer" in str(traced.inlined_graph)


def test_a_call_with_gradients_forgets() -> None:
    module, x, spy = warm("GRU")
    module(x)[0].sum().backward()
    assert module._packs.short is None
    assert spy.answered == 0


def test_another_nonlinearity_is_another_cell() -> None:
    module, x, spy = warm("RNNCell")
    module.nonlinearity = "relu"
    with torch.no_grad():
        assert (module(x) == 0).any()
    assert spy.answered == 0


@pytest.mark.parametrize("kind", ["LSTM", "GRUCell"])
def test_the_instruction_set_may_change(kind: str) -> None:
    module, x, spy = warm(kind)
    results = []
    for name in ISAS:
        with instruction_set(name), torch.no_grad():
            results.append(tree_leaves(module(x))[0])
    assert (spy.answered, spy.declined) == (1, len(ISAS) - 1)  # the packs are of one set; others must not read them
    for result in results:
        torch.testing.assert_close(result, results[0])


def test_wrong_input_still_gets_its_message() -> None:
    module, x, _ = warm("LSTM")
    cold = copy.deepcopy(module)
    with torch.no_grad():
        for arguments in ((x[..., 1:],), (x.double(),), (x, x), (x, (x, x, x)), (x[0, 0],), (x, (x, None))):
            with pytest.raises(Exception) as expected:  # noqa: PT011, whatever the ordinary route says
                cold(*arguments)
            with pytest.raises(type(expected.value), match=re.escape(str(expected.value))):
                module(*arguments)


def test_batch_first_is_read_at_every_call() -> None:
    module, _, _ = warm("GRU")
    x = torch.randn(3, 2, module.input_size)
    with torch.no_grad():
        expected = module(x.transpose(0, 1))[0].transpose(0, 1)
        module.batch_first = True
        assert torch.equal(module(x)[0], expected)


@pytest.mark.parametrize(
    ("name", "value"),
    [("mode", "RNN_RELU"), ("num_layers", 1), ("bias", False), ("bidirectional", True), ("hidden_size", H + 1)],
)
def test_attributes_that_change_are_seen(name: str, value: Any) -> None:
    """A warm module does what a cold one of these attributes does, by call and by step."""
    module, x, spy = warm("RNN", num_layers=2)
    cold = copy.deepcopy(module)
    setattr(module, name, value)
    setattr(cold, name, value)

    def outcome(call: Any) -> list[Tensor] | str:
        try:
            return tree_leaves(call())
        except (RuntimeError, ValueError, KeyError, IndexError) as error:
            return f"{type(error).__name__}: {error}"

    with torch.no_grad():
        for found, expected in (
            (outcome(lambda: module(x)), outcome(lambda: cold(x))),
            (outcome(lambda: module.step(x[0])), outcome(lambda: cold.step(x[0]))),
        ):
            assert type(found) is type(expected)
            if isinstance(expected, str):
                assert found == expected
            else:
                torch.testing.assert_close(found, expected)
    assert spy.answered == 0


def test_weights_replaced_by_another_thread() -> None:
    """A call that runs keeps the weights that it began with: freed under it they would crash it or give other bits."""
    module = rnnkern.nn.GRU(256, 512).eval()
    x = torch.randn(1, 8, 256)
    old = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    with torch.no_grad():
        expected = module(x)[0]
        stop = threading.Event()

        def replace() -> None:
            while not stop.is_set():
                for name, value in old.items():
                    setattr(module, name, torch.nn.Parameter(value.clone()))

        thread = threading.Thread(target=replace)
        thread.start()
        try:
            results = [module(x)[0] for _ in range(200)]
        finally:
            stop.set()
            thread.join()
    assert all(torch.equal(result, expected) for result in results)
