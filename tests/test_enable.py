"""torch's own operators on our kernels: what runs, what torch keeps, and that nothing is left when it is off."""

import doctest
import io
import itertools
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

import rnnkern
from rnnkern import _enable
from tests.helpers import needs_kernels

pytestmark = needs_kernels

T, B, I, H = 6, 3, 4, 5
LAYERS = [("RNN", {}), ("RNN", {"nonlinearity": "relu"}), ("LSTM", {}), ("GRU", {})]
CELLS = [("RNNCell", {}), ("RNNCell", {"nonlinearity": "relu"}), ("LSTMCell", {}), ("GRUCell", {})]
IDS = {"ids": lambda v: v if isinstance(v, str) else "-".join(map(str, v.values()))}
OPERATORS = [
    name
    for cell in ("rnn_tanh", "rnn_relu", "lstm", "gru")
    for name in (f"aten::{cell}.input", f"aten::{cell}.data", f"aten::{cell}_cell")
]


@pytest.fixture(autouse=True)
def _off_afterwards() -> Iterator[None]:
    yield
    rnnkern.disable()


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Who ran each call that reached `enable`'s kernels, "ours" or "torch"."""
    seen: list[str] = []
    known = {cell: (_enable._KnownWeights(), _enable._KnownWeights()) for cell in _enable._MODULES}
    watched, make_kernel = _enable._watched, _enable._make_kernel

    def make(operator: Any, run: Callable[..., Any]) -> Callable[..., Any]:
        def told(*args: Any) -> Any:
            result = run(*args)
            seen.append("torch" if result is None else "ours")
            return result

        return make_kernel(operator, told)

    def noted() -> bool:
        if watched():
            seen.append("torch")
        return watched()

    monkeypatch.setattr(_enable, "_make_kernel", make)
    monkeypatch.setattr(_enable, "_watched", noted)
    kernels = [kernel for cell in known for kernel in _enable._make_kernels(cell, *known[cell])]
    monkeypatch.setattr(_enable._switch, "_known", known)
    monkeypatch.setattr(_enable._switch, "_kernels", kernels)
    return seen


def tables() -> list[str]:
    return [torch._C._dispatch_dump(name) + torch._C._dispatch_dump_table(name) for name in OPERATORS]


def results(module: torch.nn.Module, x: Any, hx: Any = None) -> list[Tensor]:
    """Outputs and gradients of the input, hx and every parameter."""
    module.zero_grad()
    data = (x.data if isinstance(x, PackedSequence) else x).detach().clone().requires_grad_()
    state = None if hx is None else tree_map(lambda t: t.detach().clone().requires_grad_(), hx)
    torch.manual_seed(1)  # for dropout
    out = module(x._replace(data=data) if isinstance(x, PackedSequence) else data, state)
    outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    sum((leaf * torch.linspace(-1, 1, leaf.numel()).view(leaf.shape)).sum() for leaf in outputs).backward()
    gradients = [
        data.grad,
        *(s.grad for s in ([] if state is None else tree_leaves(state))),
        *(p.grad for p in module.parameters()),
    ]
    return [*outputs, *(gradient.clone() for gradient in gradients if gradient is not None)]


def assert_close(actual: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert a.shape == b.shape
        assert a.stride() == b.stride()
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def state_of(module: Any, batch: int) -> Any:
    rows = module.num_layers * (2 if module.bidirectional else 1)
    h = torch.randn(rows, batch, module.proj_size or H)
    return (h, torch.randn(rows, batch, H)) if module.mode == "LSTM" else h


@pytest.mark.parametrize(
    "flags", list(itertools.product([False, True], repeat=3)), ids=lambda f: "".join("ft"[v] for v in f)
)
@pytest.mark.parametrize(("kind", "more"), LAYERS, **IDS)
def test_layers(kind: str, more: dict[str, Any], flags: tuple[bool, bool, bool], ran: list[str]) -> None:
    bidirectional, bias, batch_first = flags
    module = getattr(torch.nn, kind)(
        I, H, 2, bias=bias, bidirectional=bidirectional, batch_first=batch_first, dropout=0.5, **more
    )
    x = torch.randn(B, T, I) if batch_first else torch.randn(T, B, I)
    hx = state_of(module, B)
    packed = pack_sequence([torch.randn(n, I) for n in (2, 6, 1)], enforce_sorted=False)
    cases = [(x, None), (x, hx), (x[0], None), (packed, None), (packed, hx)]
    expected = [results(module, *case) for case in cases]
    assert not ran
    with rnnkern.enable():
        for case, wanted in zip(cases, expected):
            assert_close(results(module, *case), wanted)
    assert ran == ["ours"] * len(cases)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("kind", "more"), CELLS, **IDS)
def test_cells(kind: str, more: dict[str, Any], bias: bool, ran: list[str]) -> None:
    module = getattr(torch.nn, kind)(I, H, bias=bias, **more)
    h = torch.randn(B, H)
    hx = (h, torch.randn(B, H)) if kind == "LSTMCell" else h
    cases = [(torch.randn(B, I), None), (torch.randn(B, I), hx), (torch.randn(I), None)]
    expected = [results(module, *case) for case in cases]
    with rnnkern.enable():
        for case, wanted in zip(cases, expected):
            assert_close(results(module, *case), wanted)
    assert ran == ["ours"] * len(cases)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(("kind", "more"), [*LAYERS, *CELLS], **IDS)
def test_short_calls_without_gradients(
    kind: str, more: dict[str, Any], mode: Any, ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The calls that go past the dispatcher, with weights that change between them."""
    module = getattr(torch.nn, kind)(I, H, **more, **({} if "Cell" in kind else {"batch_first": True})).eval()
    x = torch.randn(B, I) if "Cell" in kind else torch.randn(B, 2, I)
    with mode():
        for change in (None, "add", "swap", "data"):
            with torch.inference_mode(False), torch.no_grad():
                if change == "add":
                    module.state_dict()[next(iter(module.state_dict()))].add_(1)
                elif change == "swap":
                    name, weight = next(iter(module.named_parameters()))
                    setattr(module, name, torch.nn.Parameter(weight.detach() * 2))
                elif change == "data":
                    for parameter in module.parameters():
                        parameter.data = parameter.data / 2
            rnnkern.disable()
            expected = tree_leaves(module(x))
            rnnkern.enable()
            for _ in range(4):
                assert_close(tree_leaves(module(x)), expected)
    assert ran == ["ours"] * 16
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):  # a call past the dispatcher would not look at it
        ours = tree_leaves(module(x))
        rnnkern.disable()
        assert [leaf.dtype for leaf in ours] == [leaf.dtype for leaf in tree_leaves(module(x))]
    assert ran[16:] == ["torch"]


def test_weights_are_packed_between_short_calls() -> None:
    lstm = torch.nn.LSTM(I, H).eval()
    rnnkern.enable()
    known = _enable._switch._known["lstm"][0]
    with torch.no_grad():
        for _ in range(3):
            lstm(torch.randn(1, 1, I))
    (entry,) = known.values()
    assert entry.packs.short is not None
    lstm.train()(torch.randn(1, 1, I))  # an optimizer may follow, which changes weights without a trace
    assert next(iter(known.values())).packs.short is None
    del lstm, entry
    assert not known  # with the weights, what is known of them goes


def test_one_first_weight_in_different_company() -> None:
    """The same tensors with and without biases, as one layer or two, forward or both ways, in either layout."""
    x, h = torch.randn(4, 4, 4), torch.randn(1, 4, 4)
    w = [torch.randn(12, 4), torch.randn(12, 4), torch.randn(12), torch.randn(12)]
    two = [*w[:2], *w[:2]]
    calls = [
        (x, h, w, True, 1, 0.0, False, False, False),
        (x, h, w[:2], False, 1, 0.0, False, False, False),
        (x, h, w[:2], False, 1, 0.0, False, False, True),
        (x, torch.randn(2, 4, 4), two, False, 2, 0.0, False, False, False),
        (x, torch.randn(2, 4, 4), two, False, 1, 0.0, False, True, False),
    ]
    expected = [torch.gru(*call) for call in calls]
    with rnnkern.enable():
        for call, wanted in zip(calls, expected):
            for _ in range(3):
                assert_close(list(torch.gru(*call)), list(wanted))
    small = [torch.randn(4, 4), torch.randn(4, 4), torch.randn(4), torch.randn(4)]
    cells = [(torch.rnn_tanh_cell, small), (torch.rnn_relu_cell, small), (torch.rnn_tanh_cell, small[:2])]
    expected = [cell(x[0], x[1], *weights) for cell, weights in cells]
    with rnnkern.enable():
        for (cell, weights), wanted in zip(cells, expected):
            for _ in range(3):
                assert_close([cell(x[0], x[1], *weights)], [wanted])


def test_a_scripted_file(ran: list[str]) -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = torch.nn.LSTMCell(I, I)
            self.gru = torch.nn.GRU(I, H, 2, bidirectional=True)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.zeros(x.size(1), x.size(2))
            c = torch.zeros(x.size(1), x.size(2))
            steps = []
            for t in range(x.size(0)):
                h, c = self.cell(x[t], (h, c))
                steps.append(h)
            return self.gru(torch.stack(steps))[0]

    file = io.BytesIO()
    torch.jit.save(torch.jit.script(Model()), file)
    file.seek(0)
    module, x = torch.jit.load(file), torch.randn(T, B, I)
    expected = [module(x) for _ in range(4)]
    rnnkern.enable()
    for grad in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        for wanted in expected:
            with grad():
                torch.testing.assert_close(module(x), wanted)
    assert set(ran) == {"ours"}
    assert len(ran) == 12 * (T + 1)
    frozen = torch.jit.freeze(module.eval())
    torch.testing.assert_close(frozen(x), expected[0])


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


class _Tagged(Tensor):
    pass


def _lstm(**options: Any) -> torch.nn.LSTM:
    torch.manual_seed(3)
    return torch.nn.LSTM(I, H, **options)


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(lambda x: _lstm(proj_size=2)(x)[0], id="projection"),
        pytest.param(lambda x: torch.autocast("cpu", torch.bfloat16)(_lstm())(x)[0], id="autocast"),
        pytest.param(lambda x: _lstm()(x.as_subclass(_Tagged))[0], id="subclass"),
        pytest.param(lambda x: torch.func.grad(lambda v: _lstm()(v)[0].sum())(x), id="func-grad"),
        pytest.param(lambda x: torch.func.jvp(torch.nn.GRUCell(I, I), (x[0], x[1]), (x[1], x[0]))[1], id="jvp"),
        pytest.param(lambda x: _lstm(num_layers=2)(x[:, :0])[0], id="no-rows"),
    ],
)  # fmt: skip
def test_torch_keeps_what_is_not_ours(call: Callable[[Tensor], Tensor], ran: list[str]) -> None:
    """The same bits, type and dtype, or the same refusal."""
    x = torch.randn(T, B, I)
    found = []
    for context in (nullcontext, rnnkern.enable):
        with context(), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            torch.manual_seed(4)
            try:
                found.append(call(x))
            except RuntimeError as error:
                found.append(str(error))
    assert set(ran) == {"torch"}
    if isinstance(found[0], str):
        assert found[1] == found[0]
    else:
        assert type(found[1]) is type(found[0])
        assert found[1].dtype == found[0].dtype
        assert torch.equal(found[1], found[0])


def test_quantized_operators_are_not_touched(ran: list[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model = torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(_lstm()), {torch.nn.LSTM})
    x = torch.randn(T, B, I)
    expected = model(x)[0]
    with rnnkern.enable():
        assert torch.equal(model(x)[0], expected)
    assert not ran


def test_vmap_calls_row_by_row() -> None:
    cell = torch.nn.GRUCell(I, H, bias=False)
    x, h = torch.randn(T, B, I), torch.randn(T, B, H)
    expected = torch.func.vmap(cell)(x, h)
    with rnnkern.enable():
        torch.testing.assert_close(torch.func.vmap(cell)(x, h), expected)


def _params(count: int = 4, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.ones(3 * H, I), torch.ones(3 * H, H, dtype=dtype), torch.ones(3 * H), torch.ones(3 * H)][:count]


@pytest.mark.parametrize(
    "call",
    [
        lambda x, h: torch.gru(x, h[:, :1], _params(), True, 1, 0.0, False, False, False),
        lambda x, h: torch.gru(x, h.double(), _params(), True, 1, 0.0, False, False, False),
        lambda x, h: torch.gru(x, h, _params(dtype=torch.float64), True, 1, 0.0, False, False, False),
        lambda x, h: torch.gru(x, h, _params(3), True, 1, 0.0, False, False, False),
        lambda x, h: torch.gru(x, h, [], True, 1, 0.0, False, False, False),
        lambda x, h: torch.gru(x, h, _params(), True, 2, 0.0, False, False, False),
        lambda x, h: torch.gru(x[..., 1:], h, _params(), True, 1, 0.0, False, False, False),
        lambda x, h: torch.gru(x[:0], h, _params(), True, 1, 0.0, False, False, False),
        lambda x, h: torch.lstm(x, [h], _params(), True, 1, 0.0, False, False, False),
        lambda x, h: torch.gru(x[0], torch.tensor([1, 2]), h, _params(), True, 1, 0.0, False, False),
        lambda x, h: torch.gru(x[0], torch.tensor([]), h, _params(), True, 1, 0.0, False, False),
        lambda x, h: torch.gru_cell(x[0], h[0, 0], *_params()),
        lambda x, h: torch.gru_cell(x[0], h[0, 1:], *_params()),
        lambda x, h: torch.gru_cell(x[0], h[0], *_params(3)),
        lambda x, h: torch.lstm_cell(x[0], [h[0]], *_params()),
    ],
)
def test_torch_refuses_what_is_malformed(call: Callable[[Tensor, Tensor], Any]) -> None:
    """In its own words; or gives what it gives."""
    x, h = torch.randn(T, B, I), torch.randn(1, B, H)
    found: list[Any] = []
    for context in (nullcontext, rnnkern.enable):
        with context():
            try:
                found.append(tree_leaves(call(x, h)))
            except Exception as error:
                found.append((type(error), str(error)))
    if isinstance(found[0], tuple):
        assert found[1] == found[0]
    else:
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def _nodes(function: Callable[..., Any], *args: Any) -> list[str]:
    return [str(node.target) for node in make_fx(function)(*args).graph.nodes]


@pytest.mark.parametrize("dispatcher", [False, True])
def test_traced_graphs_are_those_of_torch(dispatcher: bool) -> None:
    lstm, cell, x = torch.nn.LSTM(I, H), torch.nn.GRUCell(I, H), torch.randn(T, B, I)

    def trace() -> list[str]:
        with torch._dispatch.python.enable_python_dispatcher() if dispatcher else nullcontext():
            return _nodes(lambda v: (lstm(v)[0], cell(v[0])), x)

    before = trace()
    with rnnkern.enable():
        assert trace() == before
    assert trace() == before


def test_jit_trace_and_modes_see_torchs_operators() -> None:
    gru, x = torch.nn.GRU(I, H), torch.randn(T, B, I)
    with FlopCounterMode(display=False) as before:
        gru(x)
    rnnkern.enable()
    with FlopCounterMode(display=False) as after:
        gru(x)
    assert after.get_flop_counts() == before.get_flop_counts()
    traced = torch.jit.trace(gru, x)
    assert "aten::gru" in [node.kind() for node in traced.inlined_graph.nodes()]
    rnnkern.disable()
    torch.testing.assert_close(traced(x)[0], gru(x)[0])


def test_function_modes_see_as_much_as_before(ran: list[str]) -> None:
    class Seen(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    lists = []
    gru, x = torch.nn.GRU(I, H), torch.randn(T, B, I)
    for context in (nullcontext, rnnkern.enable):
        seen: list[str] = []
        with context(), Seen():
            gru(x)
        lists.append(seen)
    assert lists[1] == lists[0]
    assert ran == ["ours"]


def test_compiled_cells_do_not_change() -> None:
    cell, x = torch.nn.GRUCell(I, H), torch.randn(B, I)
    graphs: list[list[str]] = []

    def look(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph.forward

    from torch._dynamo.backends.common import aot_autograd

    for context in (nullcontext, rnnkern.enable):
        with context():
            torch._dynamo.reset()
            torch.testing.assert_close(torch.compile(cell, backend=aot_autograd(fw_compiler=look))(x), cell(x))
    assert graphs[: len(graphs) // 2] == graphs[len(graphs) // 2 :]
    assert graphs


def test_exported_programs_do_not_change() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru, self.cell = torch.nn.GRU(I, I), torch.nn.GRUCell(I, H)

        def forward(self, x: Tensor) -> Tensor:
            return self.cell(self.gru(x)[0][-1])

    programs = []
    for context in (nullcontext, rnnkern.enable):
        with context():
            exported = torch.export.export(Model(), (torch.randn(T, B, I),), strict=False)
            programs.append([str(node.target) for node in exported.graph.nodes])
            programs.append([str(node.target) for node in exported.run_decompositions().graph.nodes])
    assert programs[:2] == programs[2:]


def test_double_backward_and_weight_norm(ran: list[str]) -> None:
    """Weights that are no parameters, and derivatives of derivatives."""
    gru = torch.nn.utils.parametrizations.weight_norm(torch.nn.GRU(I, H, dtype=torch.float64), "weight_hh_l0")
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)

    def second() -> tuple[Tensor, ...]:
        (first,) = torch.autograd.grad(gru(x)[0].pow(2).sum(), x, create_graph=True)
        return torch.autograd.grad(first.pow(2).sum(), [x, *gru.parameters()])

    outputs, expected = gru(x)[0].detach(), second()
    with rnnkern.enable():
        torch.testing.assert_close(second(), expected)
        with torch.no_grad():
            for _ in range(4):
                torch.testing.assert_close(gru(x)[0], outputs)
    assert "torch" not in ran


def test_short_calls_with_weights_of_inference_mode_stay_torchs() -> None:
    """They have no version: packs of them could not be kept."""
    with torch.inference_mode(), rnnkern.enable():
        cell, x = torch.nn.LSTMCell(I, H), torch.randn(B, I)
        assert [note.backend for note in rnnkern.explain(cell, x).layers] == ["torch"]


def test_inference_tensors_and_strided_weights(ran: list[str]) -> None:
    with torch.inference_mode():
        gru, x = torch.nn.GRU(I, H), torch.randn(T, B, I)
        expected = gru(x)[0]
        with rnnkern.enable():
            assert gru(x)[0].is_inference()
            torch.testing.assert_close(gru(x)[0], expected)
    weights = [torch.randn(I, 3 * H).t(), torch.randn(H, 3 * H).t()]
    args = torch.randn(I, B).t(), torch.randn(H, B).t(), *weights
    expected = torch.gru_cell(*args)
    with rnnkern.enable():
        torch.testing.assert_close(torch.gru_cell(*args), expected)
    assert set(ran) == {"ours"}


def test_below_autograd_nothing_is_recorded() -> None:
    gru, x = torch.nn.GRU(I, H), torch.randn(T, B, I)
    rnnkern.enable()
    with torch._C._AutoDispatchBelowAutograd():
        assert not gru(x)[0].requires_grad
    assert gru(x)[0].requires_grad


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


def test_environment_variable_and_missing_kernels() -> None:
    """In processes of their own."""
    program = """
import pathlib, sys, warnings
if sys.argv[1] == "missing":
    exists = pathlib.Path.exists
    pathlib.Path.exists = lambda self: self.name != "librnnkern.so" and exists(self)
import torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import rnnkern
gru, x = torch.nn.GRU(3, 4), torch.ones(5, 2, 3)
print([note.backend for note in rnnkern.explain(gru, x).layers], [str(w.message)[:32] for w in caught])
"""

    def run(value: str, kernels: str) -> str:
        environment = os.environ | {"RNNKERN_ENABLE": value}
        command = [sys.executable, "-c", program, kernels]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    assert run("1", "present") == "['cpu'] []\n"
    assert run("1", "missing") == "['torch'] ['rnnkern.enable() changes nothing']\n"


def test_examples_run() -> None:
    result = doctest.testmod(sys.modules["rnnkern._enable"])
    assert result.attempted > 0
    assert result.failed == 0


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


def test_weights_may_be_swapped() -> None:
    """torch.utils.swap_tensors refuses tensors with weak references."""
    cell, other, x = torch.nn.LSTMCell(I, H).eval(), torch.nn.LSTMCell(I, H), torch.randn(B, I)
    expected = other(x)
    rnnkern.enable()
    with torch.no_grad():
        for _ in range(3):
            cell(x)
    for ours, theirs in zip(cell.parameters(), other.parameters()):
        torch.utils.swap_tensors(ours, theirs)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(cell(x), expected)


def test_explain_tells_why_it_saw_nothing() -> None:
    told = str(rnnkern.explain(torch.nn.GRU(I, H), torch.randn(T, B, I)))
    assert "unless rnnkern.accelerate(model) or rnnkern.enable() was called" in told
