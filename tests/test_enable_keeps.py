"""What torch keeps while its operators run on our kernels: what is not ours, what is malformed, what is watched."""

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import rnnkern
from tests.helpers import needs_kernels
from tests.torch_operators import B, H, I, T

pytestmark = [needs_kernels, pytest.mark.usefixtures("disabled_afterwards")]


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


def test_vmap_calls_row_by_row(ran: list[str]) -> None:
    cell = torch.nn.GRUCell(I, H, bias=False)
    x, h = torch.randn(T, B, I), torch.randn(T, B, H)
    expected = torch.func.vmap(cell)(x, h)
    with rnnkern.enable():
        torch.testing.assert_close(torch.func.vmap(cell)(x, h), expected)
    assert ran == ["ours"] * T


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
    expected = _outcome(call, x, h)
    with rnnkern.enable():
        assert _same(_outcome(call, x, h), expected)


def _outcome(call: Callable[..., Any], *args: Any) -> Any:
    """The type and words of what it raises, or else its results."""
    try:
        return tree_leaves(call(*args))
    except Exception as error:
        return type(error), str(error)


def _same(found: Any, expected: Any) -> bool:
    if isinstance(expected, tuple):
        return found == expected
    return isinstance(found, list) and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    "call",
    [
        lambda x, h, w: torch.gru(x, h, [*w, w[3]], True, 1, 0.0, False, False, False),
        lambda x, h, w: torch.gru(x, h, w[:3], True, 1, 0.0, False, False, False),
        lambda x, h, w: torch.gru(x, h, w[:2], True, 1, 0.0, False, False, False),
        lambda x, h, w: torch.gru(x, h, w[:1], True, 1, 0.0, False, False, False),
        lambda x, h, w: torch.gru(x, h, w, False, 1, 0.0, False, False, False),
        lambda x, h, w: torch.gru(x, h, w, True, 2, 0.0, False, False, False),
        lambda x, h, w: torch.gru(x, h, [w[0], w[1], w[3], w[3].double()], True, 1, 0.0, False, False, False),
        lambda x, h, w: torch.gru(x[..., 1:], h, w, True, 1, 0.0, False, False, False),
        lambda x, h, w: torch.gru(x, h[:, 1:], w, True, 1, 0.0, False, False, False),
        lambda x, h, w: torch.gru(x, h.expand(2, B, H), w, True, 1, 0.0, False, False, False),
        lambda x, h, w: torch.gru(x[0], h, w, True, 1, 0.0, False, False, False),
        lambda x, h, w: torch.gru(x[:, 0], h[:, 0], w, True, 1, 0.0, False, False, False),
        lambda x, h, w: torch.gru_cell(x[0], h[0], *w[:3]),
        lambda x, h, w: torch.gru_cell(x[0], h[0], *w[:2], None, w[3]),
        lambda x, h, w: torch.gru_cell(x[0, 0], h[0, 0], *w),
        lambda x, h, w: torch.gru_cell(x[0], h[0, 1:], *w),
        lambda x, h, w: torch.gru_cell(x, h, *w),
    ],
)  # fmt: skip
def test_so_it_does_where_the_weights_are_packed(call: Callable[..., Any]) -> None:
    """A call past the dispatcher takes nothing that torch refuses."""
    x, h, w = torch.randn(T, B, I), torch.randn(1, B, H), [torch.randn_like(p) for p in _params()]
    with torch.no_grad():
        expected = _outcome(call, x, h, w)
        with rnnkern.enable():
            for _ in range(3):
                torch.gru(x, h, w, True, 1, 0.0, False, False, False)
                torch.gru_cell(x[0], h[0], *w)
            assert _same(_outcome(call, x, h, w), expected)


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


def test_below_autograd_nothing_is_recorded() -> None:
    gru, x = torch.nn.GRU(I, H), torch.randn(T, B, I)
    rnnkern.enable()
    with torch._C._AutoDispatchBelowAutograd():
        assert not gru(x)[0].requires_grad
    assert gru(x)[0].requires_grad
