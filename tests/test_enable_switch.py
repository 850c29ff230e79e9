"""Turning torch's operators over to our kernels and back: blocks, threads, the environment, what `explain` tells."""

import importlib
import threading
from collections.abc import AsyncIterator, Iterator

import pytest
import torch

import rnnkern
from rnnkern import _enable
from tests.helpers import needs_kernels
from tests.torch_operators import LAYERS, B, H, I, T, results, tables

pytestmark = [needs_kernels, pytest.mark.usefixtures("disabled_afterwards")]


def test_disable_restores_torch() -> None:
    before = tables()
    modules = [getattr(torch.nn, kind)(I, H, **more) for kind, more in LAYERS]
    x = torch.randn(T, B, I)
    bits = [results(module, x) for module in modules]
    rnnkern.enable()
    assert all(ours != theirs for ours, theirs in zip(tables(), before))
    for module in modules:
        results(module, x)
    rnnkern.disable()
    assert tables() == before
    for module, wanted in zip(modules, bits):
        for a, b in zip(results(module, x), wanted, strict=True):
            assert torch.equal(a, b)
    assert not any(len(known) for pair in _enable._switch._known.values() for known in pair)
    rnnkern.disable()


def test_blocks_nest() -> None:
    before = tables()

    def on() -> bool:
        return tables() != before

    with rnnkern.enable() as block:
        with rnnkern.enable():
            assert on()
        assert on()
        block.__exit__(None, None, None)  # leaving twice counts once
        with rnnkern.enable():
            pass
    assert not on()
    rnnkern.enable()
    with rnnkern.enable():
        pass
    assert on()
    with rnnkern.enable():
        rnnkern.disable()
        assert not on()
    assert not on()
    with pytest.raises(KeyError), rnnkern.enable():
        raise KeyError
    assert not on()


def test_a_handle_undoes_its_own_call_alone() -> None:
    x, gru = torch.randn(5, 2, 3), torch.nn.GRU(3, 4)
    before = rnnkern.enable()
    rnnkern.disable()
    with rnnkern.enable():
        with before:
            pass
        assert rnnkern.explain(gru, x).layers
    with rnnkern.enable():
        rnnkern.disable()
        rnnkern.enable()
    assert rnnkern.explain(gru, x).layers
    rnnkern.disable()
    assert not rnnkern.explain(gru, x).layers


def test_a_handle_may_be_entered_again_and_decorate() -> None:
    before = tables()

    def on() -> bool:
        return tables() != before

    block = rnnkern.enable()
    for _ in range(2):
        with block, block:
            assert on()
        assert not on()
    block.__exit__(None, None, None)
    with rnnkern.enable():
        block.__exit__(None, None, None)  # nothing of its own is left
        assert on()

    @rnnkern.enable()
    def depth(n: int) -> int:
        """Calls itself."""
        assert on()
        return 1 + depth(n - 1) if n else 0

    assert not on()
    assert depth(2) == 2
    assert (depth.__name__, depth.__doc__) == ("depth", "Calls itself.")
    assert not on()


def test_a_stored_handle_switches_on_whenever_it_is_off() -> None:
    before = tables()
    block = rnnkern.enable()
    rnnkern.disable()
    for _ in range(2):
        with block:
            assert tables() != before
        assert tables() == before
    with block:
        rnnkern.disable()
        with block:
            assert tables() != before
        assert tables() == before


def test_generators_hold_it_while_they_run() -> None:
    before = tables()

    @rnnkern.enable
    def switched() -> Iterator[bool]:
        for _ in range(2):
            yield tables() != before

    assert tables() == before
    for on in switched():
        assert on
        assert tables() == before
    assert tables() == before


def test_what_cannot_be_decorated() -> None:
    async def coroutine() -> None: ...

    async def generator() -> AsyncIterator[None]:
        yield

    before = tables()
    for function, words in ((coroutine, "coroutine, which is async"), (generator, "async"), (3, "functions, got int")):
        for decorator in (rnnkern.enable, rnnkern.enable()):
            with pytest.raises(TypeError, match=words):
                decorator(function)
        rnnkern.disable()
    assert tables() == before


def test_a_decorator_needs_no_parentheses() -> None:
    before = tables()

    @rnnkern.enable
    def on() -> bool:
        return tables() != before

    assert tables() == before
    assert on()
    assert tables() == before


def test_other_threads_call_meanwhile() -> None:
    gru, x = torch.nn.GRU(I, H), torch.randn(T, B, I)
    expected, failures, done = gru(x)[0], [], threading.Event()

    def work() -> None:
        try:
            while not done.is_set():
                torch.testing.assert_close(gru(x)[0], expected)
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    for _ in range(200):
        with rnnkern.enable():
            gru(x)
    done.set()
    for worker in workers:
        worker.join()
    assert not failures


def test_explain_and_forced_backends() -> None:
    model, x = torch.nn.Sequential(torch.nn.LSTM(I, H, proj_size=2)), torch.randn(T, B, I)
    gru = torch.nn.GRU(I, H)
    with rnnkern.enable():
        (note,) = rnnkern.explain(model, x).layers
        assert (note.backend, note.why) == ("torch", "proj_size is not supported by cpu kernels")
        with torch.autocast("cpu", torch.bfloat16):
            assert rnnkern.explain(gru, x).layers[0].why == "torch.autocast is enabled"
        assert str(rnnkern.explain(gru, x).layers[0]) == "gru T=6 B=3 I=4 H=5 D=1 float32 cpu: cpu"
        with rnnkern.backend("eager"):
            assert rnnkern.explain(gru, x).layers[0].backend == "eager"
        with rnnkern.backend("cpu"), pytest.raises(rnnkern.BackendUnavailable, match="proj_size"):
            model(x)


def test_explain_tells_why_it_saw_nothing() -> None:
    told = str(rnnkern.explain(torch.nn.GRU(I, H), torch.randn(T, B, I)))
    assert "unless rnnkern.accelerate(model) or rnnkern.enable() was called" in told


def test_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is read when rnnkern is imported."""
    before = tables()
    for value in ("0", "1"):
        monkeypatch.setenv("RNNKERN_ENABLE", value)
        importlib.reload(rnnkern)
        assert (tables() != before) == (value == "1")
