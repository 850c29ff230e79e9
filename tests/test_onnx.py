"""Models with our modules as ONNX files: standard operators, and the same results in ONNX Runtime at other sizes."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import rnnkern
from tests.helpers import BACKENDS

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

I, H = 4, 5
T, B = Dim("T"), Dim("B")
pytestmark = pytest.mark.filterwarnings("ignore:::torch.onnx", "ignore::FutureWarning", "ignore::DeprecationWarning")


def export(model: nn.Module, inputs: tuple[Any, ...], dynamic: tuple[Any, ...] | None) -> Any:
    program = torch.onnx.export(model.eval(), inputs, dynamo=True, dynamic_shapes=dynamic, verbose=False)
    assert program is not None
    onnx.checker.check_model(program.model_proto, full_check=True)
    return program.model_proto


def operators(model: Any) -> list[str]:
    assert not model.functions
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
    return [node.op_type for node in model.graph.node]


def check(model: nn.Module, exported: Any, *inputs: Any) -> None:
    """ONNX Runtime gives what the model gives."""
    session = onnxruntime.InferenceSession(exported.SerializeToString(), providers=["CPUExecutionProvider"])
    flat = torch.utils._pytree.tree_leaves(inputs)
    names = [value.name for value in session.get_inputs()]
    with torch.no_grad():
        expected = torch.utils._pytree.tree_leaves(model(*inputs))
    actual = session.run(None, {name: tensor.numpy() for name, tensor in zip(names, flat, strict=True)})
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(a), e, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("RNN", {"nonlinearity": "relu", "num_layers": 2, "bidirectional": True}),
        ("LSTM", {"bias": False}),
        ("LSTM", {"num_layers": 2, "bidirectional": True, "batch_first": True}),
        ("GRU", {"num_layers": 2, "bidirectional": True}),
        ("GRU", {"reset_after": False, "bidirectional": True}),
    ],
)
def test_layers(kind: str, options: dict[str, Any]) -> None:
    module = getattr(rnnkern.nn, kind)(I, H, **options)
    model = nn.Sequential(nn.Linear(I, I), module)
    first = options.get("batch_first", False)
    exported = export(model, (torch.randn(6, 3, I),), ({0: B, 1: T} if first else {0: T, 1: B},))
    assert operators(exported).count(kind) == module.num_layers
    for shape in ((6, 3), (11, 2), (40, 1), (1, 4)):
        check(model, exported, torch.randn(*shape, I))


class WithStatesAndLengths(nn.Module):
    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor, hx: Any, lengths: Tensor) -> Any:
        return self.layers(x, hx, lengths=lengths)


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_initial_states_and_lengths(kind: str) -> None:
    model = WithStatesAndLengths(getattr(rnnkern.nn, kind)(I, H, 2, bidirectional=True))

    def inputs(t: int, lengths: list[int]) -> tuple[Any, ...]:
        b = len(lengths)
        states = torch.randn(2, 4, b, H).unbind()
        return torch.randn(t, b, I), states if kind == "LSTM" else states[0], torch.tensor(lengths)

    state = {1: B}
    exported = export(model, inputs(6, [6, 2, 1]), ({0: T, 1: B}, (state, state) if kind == "LSTM" else state, {0: B}))
    assert operators(exported).count(kind) == 2
    check(model, exported, *inputs(6, [6, 2, 1]))
    check(model, exported, *inputs(9, [3, 9, 1, 4, 8]))
    check(model, exported, *inputs(9, [3, 0]))


@pytest.mark.parametrize("kind", ["RNNCell", "LSTMCell"])
def test_cells(kind: str) -> None:
    model = getattr(rnnkern.nn, kind)(I, H)
    exported = export(model, (torch.randn(3, I),), ({0: B},))
    assert operators(exported).count(kind.removesuffix("Cell")) == 1
    check(model, exported, torch.randn(7, I))


def test_int8_weights() -> None:
    model = rnnkern.nn.QuantizedGRU.from_float(rnnkern.nn.GRU(I, H))
    exported = export(model, (torch.randn(6, 3, I),), ({0: T, 1: B},))
    assert operators(exported).count("GRU") == 1
    check(model, exported, torch.randn(9, 2, I))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = rnnkern.nn.GRU(I, H, batch_first=True)
        self.attention = rnnkern.nn.AdditiveAttention(I, H, 3)

    def forward(self, query: Tensor, source: Tensor, lengths: Tensor) -> Any:
        keys, _ = self.encoder(source, lengths=lengths)
        return self.attention(query, keys, lengths=lengths, need_weights=True)


def test_attention() -> None:
    model = Attention()
    inputs = torch.randn(3, 2, I), torch.randn(3, 6, I), torch.tensor([6, 1, 3])
    exported = export(model, inputs, ({0: B, 1: Dim("Q")}, {0: B, 1: T}, {0: B}))
    operators(exported)
    check(model, exported, *inputs)
    check(model, exported, torch.randn(2, 5, I), torch.randn(2, 9, I), torch.tensor([0, 9]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_forced_backend_does_not_matter(backend: str) -> None:
    model, inputs = Attention(), (torch.randn(3, 2, I), torch.randn(3, 6, I), torch.tensor([6, 1, 3]))
    with rnnkern.backend(backend):
        exported = export(model, inputs, None)
    assert "GRU" in operators(exported)
    check(model, exported, *inputs)


def message(error: BaseException | None) -> str:
    """The exporter wraps what a module raises."""
    found = []
    while error is not None:
        found.append(str(error))
        error = error.__cause__
    return "\n".join(found)


class WithResets(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.layers = rnnkern.nn.GRU(I, H, **options)

    def forward(self, x: Tensor) -> Any:
        return self.layers(x, resets=x[:, :, 0] > 0)


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (rnnkern.nn.LSTM(I, H, proj_size=2), "proj_size"),
        (WithResets(), "resets="),
        (WithResets(learn_initial_state=True), "resets="),
    ],
)
def test_what_onnx_cannot_express_is_named(model: nn.Module, named: str) -> None:
    with pytest.raises(torch.onnx.OnnxExporterError) as caught:
        torch.onnx.export(model.eval(), (torch.randn(6, 3, I),), dynamo=True, verbose=False)
    assert f"{named} cannot be exported to ONNX" in message(caught.value)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (nn.Sequential(rnnkern.nn.GRU(I, H)), 1),
        (rnnkern.nn.GRU(I, H), 1),
        (rnnkern.nn.LSTM(I, H), 1),
        (rnnkern.nn.QuantizedGRU(I, H), 1),
        (rnnkern.nn.DotAttention(), 2),
    ],
    ids=["within a model", "GRU", "LSTM", "int8", "attention"],
)
def test_the_older_exporter_is_refused(model: nn.Module, inputs: int) -> None:
    with pytest.raises(RuntimeError, match="call it with dynamo=True"):
        torch.onnx.export(model.eval(), (torch.randn(6, 3, I),) * inputs, "unwritten.onnx", dynamo=False)
