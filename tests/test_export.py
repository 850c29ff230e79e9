"""torch.export, AOTInductor packages, torch.jit.trace and torch.fx: programs that serve other sizes than traced."""

import io
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import rnnkern
from rnnkern.seq2seq import Decoder, Encoder, Seq2Seq

I, H = 4, 5
T, B, S = Dim("T"), Dim("B"), Dim("S", min=3)
LAYERS = ["RNN", "LSTM", "GRU"]


def leaves(result: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


def states(b: int) -> tuple[Tensor, Tensor]:
    return torch.randn(4, b, H), torch.randn(4, b, H)


def a_layer(kind: str) -> tuple[Any, ...]:
    module = getattr(rnnkern.nn, kind)(I, H, num_layers=2, bidirectional=True)
    return module, lambda t, b: (torch.randn(t, b, I),), ({0: T, 1: B},)


class WithLengths(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = rnnkern.nn.LSTM(I, H, num_layers=2, bidirectional=True, batch_first=True)
        self.attention = rnnkern.nn.GeneralAttention(2 * H, 2 * H)

    def forward(self, x: Tensor, hx: Any, lengths: Tensor) -> Any:
        memory, _ = self.layers(x, hx, lengths=lengths)
        return self.attention(memory, memory, lengths=lengths, need_weights=True)


def with_lengths() -> tuple[Any, ...]:
    def inputs(t: int, b: int) -> tuple[Any, ...]:
        return torch.randn(b, t, I), states(b), torch.randint(0, t + 1, (b,))

    return WithLengths(), inputs, ({0: B, 1: T}, ({1: B}, {1: B}), {0: B})


def a_cell() -> tuple[Any, ...]:
    return rnnkern.nn.LSTMCell(I, H), lambda t, b: (torch.randn(b, I),), ({0: B},)


def a_translator() -> tuple[Any, ...]:
    encoder = Encoder(30, 8, 8)
    model = Seq2Seq(encoder, Decoder(40, 8, 8, encoder.memory_size, attention="additive"))

    def inputs(t: int, b: int) -> tuple[Any, ...]:
        return torch.randint(1, 30, (t, b)), torch.randint(1, 40, (t + 2, b)), torch.randint(0, t + 1, (b,))

    return model, inputs, ({0: T, 1: B}, {0: S, 1: B}, {0: B})


CASES = {**{kind: lambda kind=kind: a_layer(kind) for kind in LAYERS}, "LSTMCell": a_cell}
CASES |= {"with_lengths": with_lengths, "seq2seq": a_translator}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_export_with_dynamic_sizes(case: str, grad: bool) -> None:
    module, inputs, sizes = CASES[case]()
    module.eval()
    with torch.set_grad_enabled(grad):
        program = torch.export.export(module, inputs(6, 3), dynamic_shapes=sizes).module()
        for t, b in ((6, 3), (20, 2), (3, 7), (1, 1)):
            args = inputs(t, b)
            torch.testing.assert_close(leaves(program(*args)), leaves(module(*args)))


def test_export_by_dynamo_leaves_the_module_as_it_is() -> None:
    module, inputs, sizes = a_layer("GRU")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*side effects")
        program = torch.export.export(module, inputs(6, 3), dynamic_shapes=sizes, strict=True).module()
    args = inputs(20, 2)
    torch.testing.assert_close(program(*args), module(*args))


def test_export_saved_and_loaded(tmp_path: Path) -> None:
    module, inputs, sizes = with_lengths()
    torch.export.save(torch.export.export(module.eval(), inputs(6, 3), dynamic_shapes=sizes), tmp_path / "model.pt2")
    program, args = torch.export.load(tmp_path / "model.pt2").module(), inputs(9, 2)
    torch.testing.assert_close(program(*args), module(*args))


@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler")
def test_aot_inductor_package(tmp_path: Path) -> None:
    module, inputs, sizes = with_lengths()
    with torch.no_grad():
        program = torch.export.export(module.eval(), inputs(6, 3), dynamic_shapes=sizes)
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        run = torch._inductor.aoti_load_package(path)
        for t, b in ((6, 3), (20, 2), (1, 5)):
            args = inputs(t, b)
            torch.testing.assert_close(leaves(run(*args)), leaves(module(*args)))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("case", ["LSTM", "LSTMCell", "with_lengths"])
def test_traced_saved_and_loaded(case: str) -> None:
    module, inputs, _ = CASES[case]()
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(module.eval(), inputs(6, 3), check_trace=False), file)
    file.seek(0)
    traced = torch.jit.load(file)
    for t, b in ((6, 3), (20, 2), (1, 5)):
        args = inputs(t, b)
        torch.testing.assert_close(leaves(traced(*args)), leaves(module(*args)))


class Agent(nn.Module):
    """Episodes that start in the learned state: their number, which sizes follow from, is not that of the trace."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layers = getattr(rnnkern.nn, kind)(I, H, num_layers=2, bidirectional=True, learn_initial_state=True)
        for state in self.layers._initial_state():
            nn.init.uniform_(state)

    def forward(self, x: Tensor, hx: Any, resets: Tensor, lengths: Tensor) -> Any:
        return self.layers(x, hx, resets=resets, lengths=lengths)


def episodes(kind: str, t: int, b: int, often: float) -> tuple[Any, ...]:
    hx = states(b) if kind == "LSTM" else states(b)[0]
    return torch.randn(t, b, I), hx, torch.rand(t, b) < often, torch.randint(0, t + 1, (b,))


def assert_episodes_of_any_number(kind: str, program: Any, model: nn.Module) -> None:
    for t, b, often in ((6, 3, 0.3), (6, 3, 1.0), (20, 2, 0.1), (3, 7, 0.0), (1, 1, 1.0)):
        args = episodes(kind, t, b, often)
        torch.testing.assert_close(leaves(program(*args)), leaves(model(*args)))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_export_of_learned_states_with_resets(kind: str, strict: bool) -> None:
    model = Agent(kind)
    state = {1: B}
    sizes = ({0: T, 1: B}, (state, state) if kind == "LSTM" else state, {0: T, 1: B}, {0: B})
    exported = torch.export.export(model, episodes(kind, 6, 3, 0.3), dynamic_shapes=sizes, strict=strict)
    assert_episodes_of_any_number(kind, exported.module(), model)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("steps", "rows"), [(6, 3), (1, 3), (6, 1), (1, 1)])
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_trace_of_learned_states_with_resets(kind: str, steps: int, rows: int) -> None:
    model = Agent(kind)
    traced = torch.jit.trace(model, episodes(kind, steps, rows, 0.3), check_trace=False)
    assert_episodes_of_any_number(kind, traced, model)


class Model(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.first = nn.Linear(I, I)
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        output, *_ = self.part(self.first(x))
        return output.relu() if isinstance(output, Tensor) else output


PARTS = [
    rnnkern.nn.RNN(I, H),
    rnnkern.nn.LSTM(I, H),
    rnnkern.nn.GRU(I, H),
    rnnkern.nn.LSTMCell(I, H),
    rnnkern.nn.GRUCell(I, H),
    rnnkern.nn.AdditiveAttention(I, I, 3),
    rnnkern.nn.QuantizedGRU(I, H),
]


@pytest.mark.parametrize("part", PARTS, ids=lambda part: type(part).__name__)
def test_scripting_says_what_to_do(part: nn.Module) -> None:
    for model in (part, Model(part)):
        with pytest.raises(RuntimeError, match=rf"cannot compile {type(part).__name__}\. Use torch\.jit\.trace"):
            torch.jit.script(model)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_traced_module_in_a_scripted_one() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = torch.jit.trace(part, torch.randn(6, 3, I))

        def forward(self, x: Tensor) -> Tensor:
            return self.part(x)[0] if bool(x[0, 0, 0] > 0) else x

    part = rnnkern.nn.GRU(I, H)
    scripted, x = torch.jit.script(Branching()), torch.rand(9, 2, I)
    torch.testing.assert_close(scripted(x), part(x)[0])
    assert torch.equal(scripted(-x), -x)


class AttendingModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = rnnkern.nn.LSTM(I, H, batch_first=True)
        self.cell = rnnkern.nn.GRUCell(H, H)
        self.attention = rnnkern.nn.DotAttention()

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        memory, (h_n, _) = self.layers(x, lengths=lengths)
        context, _ = self.attention(self.cell(h_n[0]), memory, lengths=lengths)
        return context


def test_leaves_of_fx_graphs() -> None:
    model = AttendingModel()
    traced = torch.fx.symbolic_trace(model)
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == ["layers", "cell", "attention"]
    args = torch.randn(3, 6, I), torch.tensor([6, 0, 2])
    torch.testing.assert_close(traced(*args), model(*args), rtol=0, atol=0)


@pytest.mark.parametrize("part", PARTS, ids=lambda part: type(part).__name__)
def test_fx_does_not_trace_into_one(part: nn.Module) -> None:
    with pytest.raises(torch.fx.proxy.TraceError, match=f"cannot trace into {type(part).__name__}"):
        torch.fx.symbolic_trace(part)


def test_steps_in_fx_graphs() -> None:
    class Stepping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = rnnkern.nn.LSTM(I, H)
            self.cell = rnnkern.nn.GRUCell(H, H)

        def forward(self, x: Tensor, h: Tensor, c: Tensor, state: Tensor) -> Any:
            y, (h, c) = self.layers.step(x, (h, c))
            return h, c, self.cell.step(y, state, inplace=True)

    model = Stepping()
    traced = torch.fx.symbolic_trace(model)
    traced.graph.lint()
    assert [n.target for n in traced.graph.nodes if n.op == "call_method"] == ["step", "step"]
    x, h, c, state = torch.randn(3, I), torch.randn(1, 3, H), torch.randn(1, 3, H), torch.randn(3, H)
    with torch.no_grad():
        expected = model(x, h, c, state.clone())
        torch.testing.assert_close(traced(x, h, c, state), expected, rtol=0, atol=0)
    assert torch.equal(state, expected[-1])
