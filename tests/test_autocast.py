"""torch.autocast: the dtypes that torch.nn gives, products in autocast's, finite gradients, GradScaler."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils._pytree import tree_map

import rnnkern
from rnnkern.nn._autocast import result_dtype
from rnnkern.ops.short import ShortCall
from tests.helpers import BACKENDS

T, B, I, H = 20, 3, 4, 5
LOW = [torch.bfloat16, torch.float16]
LAYERS = ["RNN", "LSTM", "GRU"]
CELLS = ["RNNCell", "LSTMCell", "GRUCell"]


def pair(kind: str, **options: Any) -> tuple[nn.Module, nn.Module]:
    """Ours, and torch's with the same weights."""
    ours, peer = getattr(rnnkern.nn, kind)(I, H, **options), getattr(nn, kind)(I, H, **options)
    peer.load_state_dict(ours.state_dict())
    return ours, peer


def tensors(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, PackedSequence):
        return [result.data]
    return [tensor for item in result for tensor in tensors(item)]


def state_of(kind: str, dtype: torch.dtype, size: int = H) -> Any:
    """A state of a layer [1, B, H], or of a cell [B, H]."""
    first = (1,) if kind in LAYERS else ()
    h = torch.rand(*first, B, size).to(dtype)
    return (h, torch.rand(*first, B, H).to(dtype)) if kind.startswith("LSTM") else h


@pytest.mark.parametrize("given", [torch.float32, "low"])
@pytest.mark.parametrize("state", [None, torch.float32, "low"])
@pytest.mark.parametrize("low", LOW)
@pytest.mark.parametrize("kind", LAYERS + CELLS)
def test_dtypes_are_those_of_torch(kind: str, low: torch.dtype, state: Any, given: Any) -> None:
    # Elsewhere torch's LSTM depends on the CPU, or has no kernel: ours has autocast's dtype, and the values of float32.
    comparable = kind != "LSTM" or (low, given) == (torch.bfloat16, torch.float32)
    ours, peer = pair(kind)
    x = torch.rand(B, I) if kind in CELLS else torch.rand(T, B, I)
    x = x.to(low if given == "low" else given)
    args = (x,) if state is None else (x, state_of(kind, low if state == "low" else state))
    with torch.autocast("cpu", low):
        actual = tensors(ours(*args))
        if comparable:
            expected = tensors(peer(*args))
    if not comparable:
        expected = [t.to(low) for t in tensors(peer(*tree_map(Tensor.float, args)))]
    assert [t.dtype for t in actual] == [t.dtype for t in expected]
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.float(), e.float(), rtol=0.03, atol=0.03)


@pytest.mark.parametrize("low", LOW)
@pytest.mark.parametrize("kind", LAYERS)
def test_packed_sequences(kind: str, low: torch.dtype) -> None:
    ours, peer = pair(kind, num_layers=2, bidirectional=True)
    packed = pack_sequence([torch.rand(t, I) for t in (5, 20, 1)], enforce_sorted=False)
    with torch.autocast("cpu", low):
        actual, expected = tensors(ours(packed)), tensors(peer(packed))
    assert [t.dtype for t in actual] == [t.dtype for t in expected]
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.float(), e.float(), rtol=0.03, atol=0.03)


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_a_projection() -> None:
    ours, peer = pair("LSTM", proj_size=3)
    hx = state_of("LSTM", torch.float32, 3)
    for x in (torch.rand(T, B, I), pack_sequence([torch.rand(t, I) for t in (8, 5, 1)])):
        with torch.autocast("cpu", torch.bfloat16):
            actual, expected = tensors(ours(x, hx)), tensors(peer(x, hx))
        assert [t.dtype for t in actual] == [t.dtype for t in expected]
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a.float(), e.float(), rtol=0.03, atol=0.03)


@pytest.mark.filterwarnings("ignore:CUDA is not available")
@pytest.mark.parametrize("kind", LAYERS + CELLS)
def test_float64_and_other_devices_are_left_alone(kind: str) -> None:
    ours, _ = pair(kind)
    x = torch.rand(T, I) if kind in CELLS else torch.rand(T, B, I)
    expected = tensors(ours(x))
    with torch.autocast("cuda", torch.bfloat16):
        torch.testing.assert_close(tensors(ours(x)), expected, rtol=0, atol=0)
    ours, x = ours.double(), x.double()
    expected = tensors(ours(x))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(tensors(ours(x)), expected, rtol=0, atol=0)


@contextmanager
def autocast_of(device: str) -> Iterator[None]:
    """bfloat16 for this device, also where it is absent, for which torch.autocast does nothing."""
    before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    torch.set_autocast_enabled(device, True)
    torch.set_autocast_dtype(device, torch.bfloat16)
    try:
        yield
    finally:
        torch.set_autocast_enabled(device, before[0])
        torch.set_autocast_dtype(device, before[1])


def outcome(module: nn.Module, *args: Any) -> Any:
    """The dtypes of the results, or the type of the exception."""
    try:
        return [t.dtype for t in tensors(module(*args))]
    except Exception as error:
        return type(error)


@pytest.mark.parametrize("weights", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(
    ("kind", "packed"),
    [(kind, packed) for kind in LAYERS + CELLS for packed in (False, True) if not (packed and kind in CELLS)],
)
def test_what_autocast_does_not_cast_is_refused_as_by_torch(
    kind: str, device: str, weights: torch.dtype, packed: bool
) -> None:
    """float64 and integers; all that lies on another device than autocast's."""
    ours, peer = pair(kind, dtype=weights)
    dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.int64]
    refused = 0
    for given, state in itertools.product(dtypes, [None, *dtypes]):
        x = torch.ones(B, I, dtype=given) if kind in CELLS else torch.ones(T, B, I, dtype=given)
        args = (x if not packed else pack_sequence([x[:t, 0] for t in (9, 5, 1)]),)
        if state is not None:
            args = (*args, state_of(kind, state))
        with autocast_of(device):
            actual, expected = outcome(ours, *args), outcome(peer, *args)
        assert actual == expected, (given, state)
        refused += expected is RuntimeError
    assert refused >= 10


@pytest.mark.parametrize("kind", ["LSTM", "LSTMCell"])
def test_what_is_refused_is_named(kind: str) -> None:
    """Of an LSTM's c too, though torch promotes it where it has no kernel for the layer."""
    ours, _ = pair(kind)
    x = torch.rand(B, I) if kind in CELLS else torch.rand(T, B, I)
    h, c = state_of(kind, torch.float32)
    names = ("hx", "hx") if kind in LAYERS else ("hidden0", "hidden1")
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(RuntimeError, match=r"input must have .* Expected torch.bfloat16, got torch.float64"):
            ours(x.double(), (h, c))
        for name, hx in zip(names, ((h.double(), c), (h, c.double()))):
            with pytest.raises(RuntimeError, match=f"{name} must have .* Expected torch.float32, got torch.float64"):
                ours(x, hx)


def test_layers_of_int8_weights_take_what_autocast_casts() -> None:
    layer = rnnkern.quantize_dynamic(nn.Sequential(nn.LSTM(I, H)))[0]
    x, state = torch.rand(T, B, I), state_of("LSTM", torch.float32)
    expected = tensors(layer(x.bfloat16().float(), state))
    with autocast_of("cpu"):
        torch.testing.assert_close(tensors(layer(x.bfloat16(), state)), expected, rtol=0, atol=0)
        for wrong in (x.double(), x.long()):
            with pytest.raises(ValueError, match=r"input must have dtype torch.float32"):
                layer(wrong)
        with pytest.raises(RuntimeError, match=r"hx must have .* got torch.float64"):
            layer(x, tree_map(Tensor.double, state))
    with autocast_of("cuda"), pytest.raises(ValueError, match=r"input must have dtype torch.float32"):
        layer(x.bfloat16())


def test_off_the_cpu_results_are_in_autocasts_dtype() -> None:
    """As torch casts all that enters its kernels there; there is no such device here."""
    state = torch.empty(B, H, device="meta")
    for mode in ("RNN_TANH", "LSTM", "GRU"):
        assert result_dtype(mode, state, torch.float16, fused=False) == torch.float16


@pytest.mark.parametrize("low", LOW)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", LAYERS)
def test_it_computes_in_autocasts_dtype(kind: str, backend: str, low: torch.dtype) -> None:
    """To the last bit what a module of that dtype gives."""
    module = getattr(rnnkern.nn, kind)(I, H, num_layers=2)
    x = torch.rand(T, B, I)
    with rnnkern.backend(backend):
        with torch.autocast("cpu", low):
            output, _ = module(x)
        expected, _ = module.to(low)(x.to(low))
    torch.testing.assert_close(output.to(low), expected, rtol=0, atol=0)


@pytest.mark.parametrize("low", LOW)
@pytest.mark.parametrize("kind", LAYERS + CELLS)
def test_short_calls(kind: str, low: torch.dtype) -> None:
    """Those that go past the dispatcher, too, whether weights were packed before or change meanwhile."""
    module = getattr(rnnkern.nn, kind)(I, H).eval()
    x = torch.rand(1, I) if kind in CELLS else torch.rand(1, 1, I)
    with torch.no_grad():
        for _ in range(2):
            for _ in range(3):  # the last of which go past the dispatcher
                plain = tensors(module(x))
            assert ShortCall is None or module._packs.short is not None
            with torch.autocast("cpu", low):
                actual = tensors(module(x))
            low_module = getattr(rnnkern.nn, kind)(I, H, dtype=low)
            low_module.load_state_dict(module.state_dict())
            expected = tensors(low_module(x.to(low)))
            torch.testing.assert_close([t.to(low) for t in actual], expected, rtol=0, atol=0)
            torch.testing.assert_close(tensors(module(x)), plain, rtol=0, atol=0)
            for parameter in module.parameters():
                parameter.mul_(0.5)


@pytest.mark.parametrize("kind", LAYERS)
def test_steps(kind: str) -> None:
    module = getattr(rnnkern.nn, kind)(I, H).eval()
    x = torch.rand(T, B, I)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected, state = module(x)[0], None
        for t in range(T):
            y, state = module.step(x[t], state)
            torch.testing.assert_close(y.float(), expected[t].float(), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("low", LOW)
@pytest.mark.parametrize("kind", LAYERS + CELLS)
def test_gradients(kind: str, low: torch.dtype) -> None:
    module, _ = pair(kind)
    x = torch.rand(B, I) if kind in CELLS else torch.rand(T, B, I)
    state, results = state_of(kind, torch.float32), []
    for enabled in (False, True):
        given = x.clone().requires_grad_()
        module.zero_grad()
        with torch.autocast("cpu", low, enabled=enabled):
            out = module(given, state)
        sum(t.float().pow(2).sum() for t in tensors(out)).backward()
        results.append([given.grad, *(p.grad for p in module.parameters())])
    for exact, found in zip(*results, strict=True):
        assert found.dtype == torch.float32
        assert found.isfinite().all()
        assert (found - exact).abs().max() < 0.05 * max(1, exact.abs().max())


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "LSTMCell"])
def test_training_with_a_gradient_scaler(kind: str) -> None:
    module = getattr(rnnkern.nn, kind)(I, H)
    optimizer, scaler = torch.optim.SGD(module.parameters(), lr=0.1), torch.amp.GradScaler("cpu", init_scale=2.0**20)
    x = torch.rand(B, I) if kind in CELLS else torch.rand(T, B, I)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            output = tensors(module(x))[0]
            loss = (output.float() - 0.2).pow(2).mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert 0 < scaler.get_scale() <= 2.0**20
    assert losses[-1] < losses[0]
    assert all(p.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("kind", ["LSTM", "GRUCell"])
def test_compiled(kind: str) -> None:
    module, _ = pair(kind)
    x = torch.rand(B, I) if kind in CELLS else torch.rand(T, B, I)
    run = torch.compile(module, fullgraph=True, backend="aot_eager")
    for low in LOW:
        with torch.autocast("cpu", low):
            torch.testing.assert_close(tensors(run(x)), tensors(module(x)), rtol=0, atol=0)
    torch.testing.assert_close(tensors(run(x)), tensors(module(x)), rtol=0, atol=0)
