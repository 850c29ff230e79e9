"""torch's contract with its own recurrent modules, held to ours: every sample and malformed input of its database.

`torch.testing._internal.common_modules.module_db` ships with torch, the tests that read it do not: those here ask the
same of its entries, with our class in the place of torch's, and torch's module as a second opinion. An entry's
exceptions are not read: they are cuDNN's (no second derivatives, no derivatives under vmap, contiguous hx only).
"""

import copy
import io
import itertools
import pickle
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

import rnnkern
from tests.helpers import setting

pytest.importorskip("expecttest", reason="torch's module database imports it")

from torch.testing._internal.common_modules import ModuleErrorEnum, ModuleInfo, ModuleInput, module_db
from torch.testing._internal.common_utils import gradcheck, gradgradcheck, noncontiguous_like

LIBRARIES = (rnnkern.nn, torch.nn)
NAMES = ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell")
INFOS = [info for info in module_db if info.module_cls in [getattr(torch.nn, name) for name in NAMES]]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]

infos = pytest.mark.parametrize("info", INFOS, ids=lambda info: info.module_cls.__name__)
devices = pytest.mark.parametrize("device", DEVICES)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
swaps = pytest.mark.parametrize("swap", [False, True], ids=["in place", "swapped"])


def samples(info: ModuleInfo, device: str, dtype: torch.dtype, requires_grad: bool = False) -> list[ModuleInput]:
    """The database's calls; of layers with one state also packed ones."""
    packed = {"with_packed_sequence": True} if info.module_cls in (torch.nn.RNN, torch.nn.GRU) else {}
    return info.module_inputs_func(
        info, device=device, dtype=dtype, requires_grad=requires_grad, training=True, **packed
    )


def build(library: Any, info: ModuleInfo, sample: ModuleInput, **options: Any) -> torch.nn.Module:
    given = sample.constructor_input
    torch.manual_seed(0)
    return getattr(library, info.module_cls.__name__)(*given.args, **(given.kwargs | options))


def call(module: torch.nn.Module, sample: ModuleInput) -> Any:
    return module(*sample.forward_input.args, **sample.forward_input.kwargs)


def tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def assert_same_values(actual: Any, expected: Any, **tolerance: float) -> None:
    torch.testing.assert_close(tensors(actual), tensors(expected), **tolerance)


def swapping(swap: bool) -> AbstractContextManager[None]:
    """Conversions and loads swap parameters' contents (`torch.utils.swap_tensors`) instead of writing into them."""
    future = torch.__future__
    return setting(future.get_swap_module_params_on_conversion, future.set_swap_module_params_on_conversion, swap)


def test_the_database_has_every_module() -> None:
    assert {info.module_cls.__name__ for info in INFOS} == set(NAMES)


@modes
@dtypes
@devices
@infos
def test_forward(info: ModuleInfo, device: str, dtype: torch.dtype, training: bool) -> None:
    for sample in samples(info, device, dtype):
        ours, peer = (build(lib, info, sample, device=device, dtype=dtype).train(training) for lib in LIBRARIES)
        outputs = call(ours, sample)
        assert_same_values(outputs, call(peer, sample), rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            for _ in range(1 if training else 3):  # the third call goes past the dispatcher
                assert_same_values(call(ours, sample), outputs, rtol=0, atol=0)
        if not isinstance(sample.forward_input.args[0], PackedSequence):  # the reference knows padded input only
            expected = sample.reference_fn(ours, *sample.forward_input.args, **sample.forward_input.kwargs)
            assert_same_values(outputs, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", [*DEVICES, "meta"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@infos
def test_factory_arguments(info: ModuleInfo, device: str, dtype: torch.dtype) -> None:
    for sample in samples(info, "cpu", torch.float32):
        by_argument = build(rnnkern.nn, info, sample, device=device, dtype=dtype)
        with torch.device(device):
            by_context = build(rnnkern.nn, info, sample, dtype=dtype)
        for module in (by_argument, by_context):
            assert not list(module.buffers())
            for name, parameter in module.named_parameters():
                assert parameter.device.type == device, name
                assert parameter.dtype == dtype, name
                assert parameter.requires_grad, name


@infos
def test_repr(info: ModuleInfo) -> None:
    for sample in samples(info, "cpu", torch.float32):
        ours, peer = (build(lib, info, sample) for lib in LIBRARIES)
        assert repr(ours) == repr(peer)
        assert str(torch.nn.Sequential(ours)) == str(torch.nn.Sequential(peer))


@swaps
@devices
@infos
def test_save_and_load(info: ModuleInfo, device: str, swap: bool) -> None:
    for sample in samples(info, device, torch.float32):
        module, peer = (build(lib, info, sample, device=device) for lib in LIBRARIES)
        expected = call(module, sample)
        with swapping(swap):
            for source in (module, peer):
                file = io.BytesIO()
                torch.save(source.state_dict(), file)
                file.seek(0)
                state = torch.load(file)
                for assign in (False, True):
                    torch.manual_seed(1)
                    other = copy.deepcopy(module)
                    other.reset_parameters()
                    result = other.load_state_dict(state, strict=True, assign=assign)
                    assert not result.missing_keys
                    assert not result.unexpected_keys
                    assert_same_values(call(other, sample), expected, rtol=0, atol=0)


@modes
@devices
@infos
def test_pickle_and_deepcopy(info: ModuleInfo, device: str, training: bool) -> None:
    for sample in samples(info, device, torch.float32):
        module = build(rnnkern.nn, info, sample, device=device).train(training)
        with torch.no_grad():
            expected = [call(module, sample) for _ in range(3)][-1]
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        for other in (
            pickle.loads(pickle.dumps(module)),
            copy.deepcopy(module),
            copy.copy(module),
            torch.load(file, weights_only=False),
        ):
            assert other.training is training
            assert repr(other) == repr(module)
            with torch.no_grad():
                assert_same_values(call(other, sample), expected, rtol=0, atol=0)


@modes
@devices
@infos
def test_non_contiguous_tensors(info: ModuleInfo, device: str, training: bool) -> None:
    for sample in samples(info, device, torch.float64, requires_grad=True):
        module = build(rnnkern.nn, info, sample, device=device, dtype=torch.float64).train(training)
        peer = build(torch.nn, info, sample, device=device, dtype=torch.float64).train(training)
        expected = run_with_gradients(peer, sample, lambda t: t)
        for spread_inputs, spread_weights in itertools.product([False, True], repeat=2):
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.data = noncontiguous_like(parameter) if spread_weights else parameter.contiguous()
            change: Callable[[Tensor], Tensor] = noncontiguous_like if spread_inputs else lambda t: t
            actual = run_with_gradients(module, sample, change)
            torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


def run_with_gradients(module: torch.nn.Module, sample: ModuleInput, change: Callable[[Tensor], Tensor]) -> list[Any]:
    """Outputs, then gradients of every input and parameter, with inputs brought to another layout."""

    def leaf(tensor: Tensor) -> Tensor:
        tensor = change(tensor.detach()) if tensor.dim() and tensor.is_floating_point() else tensor
        return tensor.detach().requires_grad_(tensor.is_floating_point())

    args, kwargs = tree_map_only(Tensor, leaf, (sample.forward_input.args, sample.forward_input.kwargs))
    inputs = [t for t in tensors((args, kwargs)) if t.requires_grad]
    outputs = [t for t in tensors(module(*args, **kwargs)) if t.requires_grad]
    cotangents = [torch.linspace(-1, 1, t.numel(), dtype=t.dtype, device=t.device).view(t.shape) for t in outputs]
    gradients = torch.autograd.grad(outputs, [*inputs, *module.parameters()], [change(d) for d in cotangents])
    return [*(t.detach() for t in outputs), *gradients]


@pytest.mark.parametrize(("order", "training"), [(1, True), (1, False), (2, False)], ids=str)
@devices
@infos
def test_gradients(info: ModuleInfo, device: str, training: bool, order: int) -> None:
    """Against differences, of inputs and parameters, and the same by batches of cotangents under vmap."""
    for sample in samples(info, device, torch.float64, requires_grad=True):
        options = sample.constructor_input.kwargs
        if (order == 2 or not training) and (options.get("batch_first") or not options.get("bias", True)):
            continue  # neither matters to second derivatives or to the mode, and there are many
        if order == 2 and options.get("nonlinearity") == "relu" and options.get("bidirectional"):
            continue  # slow; tanh has them all
        module = build(rnnkern.nn, info, sample, device=device, dtype=torch.float64).train(training)
        leaves, spec = tree_flatten((sample.forward_input.args, sample.forward_input.kwargs))
        at = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
        parameters = list(module.parameters())

        def run(*values: Tensor) -> tuple[Tensor, ...]:
            given = list(leaves)  # noqa: B023, called within this turn of the loop
            for i, value in zip(at, values):  # noqa: B023
                given[i] = value
            args, kwargs = tree_unflatten(given, spec)  # noqa: B023
            return tuple(t for t in tensors(module(*args, **kwargs)) if t.is_floating_point())  # noqa: B023

        check = gradcheck if order == 1 else gradgradcheck
        assert check(run, (*(leaves[i] for i in at), *parameters))


@swaps
@devices
@infos
def test_conversions(info: ModuleInfo, device: str, swap: bool) -> None:
    for sample in samples(info, device, torch.float64):
        ours, peer = (build(lib, info, sample, device=device).eval() for lib in LIBRARIES)
        identities = [id(p) for p in ours.parameters()]
        with swapping(swap), torch.no_grad():
            for module in (ours, peer):
                module.double()
            assert [id(p) for p in ours.parameters()] == identities
            assert all(p.dtype == torch.float64 for p in ours.parameters())
            for _ in range(3):
                assert_same_values(call(ours, sample), call(peer, sample), rtol=1e-9, atol=1e-11)
            for dtype in (torch.float32, torch.bfloat16, torch.float64):
                ours.to(dtype)
                peer.to(dtype)
                assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), peer.parameters(), strict=True))
            assert_same_values(call(ours, sample), call(peer, sample), rtol=1e-9, atol=1e-11)


@swaps
@devices
@infos
def test_to_empty(info: ModuleInfo, device: str, swap: bool) -> None:
    for sample in samples(info, device, torch.float32):
        source = build(rnnkern.nn, info, sample, device=device)
        module = build(rnnkern.nn, info, sample, device="meta")
        with swapping(swap):
            module.to_empty(device=device)
            module.load_state_dict(source.state_dict())
        assert_same_values(call(module, sample), call(source, sample), rtol=0, atol=0)


@modes
@infos
def test_meta_device(info: ModuleInfo, training: bool) -> None:
    for sample in samples(info, "meta", torch.float32):
        ours, peer = (build(lib, info, sample, device="meta").train(training) for lib in LIBRARIES)
        for a, b in zip(tensors(call(ours, sample)), tensors(call(peer, sample)), strict=True):
            assert (a.device, a.dtype, a.shape, a.stride()) == (b.device, b.dtype, b.shape, b.stride())


@devices
@infos
def test_training_mode_changes_nothing_without_dropout(info: ModuleInfo, device: str) -> None:
    for sample in samples(info, device, torch.float32):
        module = build(rnnkern.nn, info, sample, device=device)
        results = [call(module.train(training), sample) for training in (True, False)]
        assert_same_values(*results, rtol=0, atol=0)


@dtypes
@devices
@infos
def test_errors(info: ModuleInfo, device: str, dtype: torch.dtype) -> None:
    """The exception and the words that the database expects, which are torch's to the letter."""
    errors = info.module_error_inputs_func(info, device=device, dtype=dtype, requires_grad=False, training=True)
    assert errors
    for error in errors:
        sample = error.module_error_input
        messages = []
        for library in LIBRARIES:
            if error.error_on == ModuleErrorEnum.CONSTRUCTION_ERROR:
                with pytest.raises(error.error_type, match=error.error_regex) as caught:
                    build(library, info, sample)
            else:
                # The database gives cells a nonlinearity where bias belongs: torch takes any value there.
                module = build(library, info, sample).to(device, dtype)
                assert error.error_on == ModuleErrorEnum.FORWARD_ERROR
                with pytest.raises(error.error_type, match=error.error_regex) as caught:
                    call(module, sample)
            messages.append((type(caught.value), str(caught.value)))
        assert messages[0] == messages[1], re.escape(messages[0][1])
