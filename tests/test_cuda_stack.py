"""Layers side by side on chunks of time, emulated: against float64, and the bits of one layer after another.

Every test runs under two schedules. The emulator runs what a side stream has no earlier than somebody waits for it, so
that a wait that is missing shows as NaN; or at once, so that a launch shows which needs what is only made after it.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import rnnkern
from rnnkern.cells import CELLS
from rnnkern.ops import cuda_stack
from rnnkern.ops.recurrence import recurrence
from tests.helpers import assert_as_accurate, assert_same_bits, make_layer, needs_emulator, setting
from tests.test_cuda_layer import EMULATED, past_the_end
from tests.test_recurrence import lengths_like, names

pytestmark = [needs_emulator, pytest.mark.usefixtures("no_tf32")]


@pytest.fixture(autouse=True, params=["late", "early"])
def _schedule(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the emulator's side streams run what they are given."""
    monkeypatch.setenv("RNNKERN_EMULATED_STREAMS", request.param)


CASES = [(engine, dtype) for engine in ("cluster", "grid") for dtype in (torch.float32, torch.bfloat16, torch.float16)]
every_engine = pytest.mark.parametrize(("engine", "dtype"), CASES, ids=names)
Outputs = tuple[Tensor, Tensor, Tensor | None]


def in_chunks(count: int) -> Any:
    """A wavefront of so many chunks of time."""
    return setting(lambda: cuda_stack.CHUNKS, lambda value: setattr(cuda_stack, "CHUNKS", value), count)


@dataclass
class Stack:
    """The arguments of a stack of layers, with the gradients of its outputs."""

    cell: str
    inputs: dict[str, Tensor]  # x [T, B, I], h0 and c0 [L, B, H], weights of each layer
    layers: int
    cotangents: tuple[Tensor, ...]  # of y, h_n, c_n
    lengths: Tensor | None = None
    resets: Tensor | None = None
    grad_clip: float = 0.0

    def weights(self, inputs: dict[str, Tensor]) -> list[tuple[Tensor | None, ...]]:
        each = ("w_ih", "w_hh", "b_ih", "b_hh")
        return [(*(inputs.get(f"{name}{l}") for name in each), *[None] * 4) for l in range(self.layers)]

    def by_stack(self, inputs: dict[str, Tensor]) -> Outputs:
        return cuda_stack.stack(
            *(self.cell, inputs["x"], inputs["h0"], inputs.get("c0"), self.weights(inputs)),
            lengths=self.lengths,
            resets=self.resets,
            grad_clip=self.grad_clip,
        )

    def by_layers(self, inputs: dict[str, Tensor]) -> Outputs:
        x, c0, h_n, c_n = inputs["x"], inputs.get("c0"), [], []
        for l, weights in enumerate(self.weights(inputs)):
            x, h, c, _ = recurrence(
                *(self.cell, x, inputs["h0"][l : l + 1], None if c0 is None else c0[l : l + 1], weights),
                lengths=self.lengths,
                resets=self.resets,
                grad_clip=self.grad_clip,
            )
            h_n.append(h)
            c_n.append(c)
        return x, torch.cat(h_n), None if c0 is None else torch.cat(c_n)

    def run(
        self, how: Callable[[dict[str, Tensor]], Outputs], backend: str, engine: str | None, dtype: Any = None
    ) -> dict[str, Tensor]:
        """Outputs and gradients by name; in another dtype, the same values converted."""
        inputs = {
            name: tensor.detach().to(dtype or tensor.dtype, copy=True).requires_grad_()
            for name, tensor in self.inputs.items()
        }
        with rnnkern.backend(backend, engine=engine):
            outputs = {name: out for name, out in zip(("y", "h_n", "c_n"), how(inputs)) if out is not None}
            pairs = [(out, g.to(out.dtype)) for out, g in zip(outputs.values(), self.cotangents)]
            gradients = torch.autograd.grad([o for o, _ in pairs], list(inputs.values()), [g for _, g in pairs])
        return {name: out.detach() for name, out in outputs.items()} | {
            f"d{name}": gradient for name, gradient in zip(inputs, gradients)
        }

    def wavefront(self, chunks: int, engine: str | None = None, backend: str = EMULATED) -> dict[str, Tensor]:
        with in_chunks(chunks):
            return self.run(self.by_stack, backend, engine)

    def infer(self, chunks: int, engine: str | None = None, backend: str = EMULATED) -> dict[str, Tensor]:
        with in_chunks(chunks), torch.no_grad(), rnnkern.backend(backend, engine=engine):
            return {n: o for n, o in zip(("y", "h_n", "c_n"), self.by_stack(self.inputs)) if o is not None}

    def check(self, actual: dict[str, Tensor]) -> None:
        """Accurate to the rules of the tests, the eager reference as the peer."""
        expected = self.run(self.by_layers, "eager", None, torch.float64)
        peer = self.run(self.by_layers, "eager", None)
        assert_as_accurate(actual, expected, peer, self.inputs["x"].dtype)


def make_stack(
    cell: str, T: int, B: int, I: int, H: int, L: int, *, dtype: torch.dtype = torch.float32, seed: int = 0, **more: Any
) -> Stack:
    bias = more.pop("bias", True)
    parts = [make_layer(cell, T, B, H if l else I, H, dtype=dtype, bias=bias, seed=seed + l) for l in range(L)]
    inputs = {"x": parts[0].x, "h0": torch.cat([part.h0 for part in parts])}
    if parts[0].c0 is not None:
        inputs["c0"] = torch.cat([part.c0 for part in parts if part.c0 is not None])
    for l, part in enumerate(parts):
        inputs |= {f"{name}{l}": part.inputs[name] for name in ("w_ih", "w_hh", "b_ih", "b_hh")[: 4 if bias else 2]}
    dy, *states = parts[-1].cotangents[:3]
    cotangents = (dy, *(torch.cat([part.cotangents[i] for part in parts]) for i in (1, 2)))
    assert len(states) == 2
    return Stack(cell, inputs, L, cotangents, **more)


def with_exact_products(stack: Stack) -> Stack:
    """W_ih puts x into one gate and leaves the others: no sum of more than one term, however many rows there are."""
    inputs = dict(stack.inputs)
    for l in range(stack.layers):
        inputs[f"w_ih{l}"] = torch.eye(*inputs[f"w_ih{l}"].shape, dtype=inputs["x"].dtype)
    return dataclasses.replace(stack, inputs=inputs)


@every_engine
@pytest.mark.parametrize(
    ("T", "B", "I", "H", "L", "chunks"),
    [(1, 1, 1, 1, 2, 1), (7, 3, 10, 17, 2, 3), (4, 9, 20, 40, 3, 2), (3, 2, 5, 100, 4, 3), (6, 2, 5, 8, 1, 0)],
)
@pytest.mark.parametrize("cell", CELLS)
def test_outputs_and_gradients(
    cell: str, T: int, B: int, I: int, H: int, L: int, chunks: int, engine: str, dtype: torch.dtype
) -> None:
    bias = H != 40 or dtype.itemsize == 2
    stack = make_stack(cell, T, B, I, H, L, dtype=dtype, bias=bias, seed=T * H, grad_clip=0.2 if L == 4 else 0.0)
    found = stack.wavefront(chunks, engine)
    stack.check(found)
    outputs = stack.infer(chunks, engine)
    assert_same_bits(outputs, {name: found[name] for name in outputs})


@every_engine
@pytest.mark.parametrize("resets", [False, True], ids=["", "resets"])
@pytest.mark.parametrize("pattern", ["none", "unsorted", "zeros", "all zero"])
@pytest.mark.parametrize("cell", CELLS)
def test_lengths_and_resets_to_the_last_bit(
    cell: str, pattern: str, resets: bool, engine: str, dtype: torch.dtype
) -> None:
    T, B = 5, 7
    lengths = lengths_like(pattern, T, B)
    stack = make_stack(
        cell, T, B, 11, 18, 3, dtype=dtype, lengths=lengths, resets=torch.rand(T, B) < 0.3 if resets else None
    )
    stack.inputs["x"].masked_fill_(past_the_end(lengths, T, B)[:, :, None], torch.nan)
    if pattern != "none":
        stack.check(stack.wavefront(3, engine))
    exact = with_exact_products(stack)
    expected = exact.run(exact.by_layers, EMULATED, engine)
    for chunks in (2, 5):
        assert_same_bits(exact.wavefront(chunks, engine), expected)


@every_engine
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_packed_rows(cell: str, engine: str, dtype: torch.dtype) -> None:
    lengths = torch.tensor([6, 3, 3, 1, 0])
    padded = with_exact_products(make_stack(cell, 6, 5, 6, 18, 3, dtype=dtype, lengths=lengths))
    present = ~past_the_end(lengths, 6, 5)
    dy, *states = padded.cotangents
    packed = dataclasses.replace(
        padded, inputs={**padded.inputs, "x": padded.inputs["x"][present]}, cotangents=(dy[present], *states)
    )
    expected = packed.run(packed.by_layers, EMULATED, engine)
    for chunks in (2, 4):
        found = packed.wavefront(chunks, engine)
        assert_same_bits(found, expected)
        of_padded = padded.infer(chunks, engine)
        of_padded["y"] = of_padded["y"][present]
        assert_same_bits(of_padded, {name: found[name] for name in of_padded})
    packed.check(packed.wavefront(0, engine))


@pytest.mark.parametrize("p", [0.4, 1.0])
@pytest.mark.parametrize("chunks", [0, 3])
def test_dropout(chunks: int, p: float) -> None:
    """By one draw of torch's for all layers; the same in forward and backward."""
    stack = make_stack("gru", 5, 4, 6, 12, 3)
    kept: list[Tensor] = []

    def by_stack(inputs: dict[str, Tensor]) -> Outputs:
        torch.manual_seed(3)
        arguments = ("gru", inputs["x"], inputs["h0"], None, stack.weights(inputs))
        return cuda_stack.stack(*arguments, dropout=p)

    def by_layers(inputs: dict[str, Tensor]) -> Outputs:
        x, h_n = inputs["x"], []
        for l, weights in enumerate(stack.weights(inputs)):
            x, h, _, _ = recurrence("gru", x, inputs["h0"][l : l + 1], None, weights)
            h_n.append(h)
            if l < 2:
                x = x * kept[0][l] / (1 - p) if p < 1 else x * 0
        return x, torch.cat(h_n), None

    torch.manual_seed(3)
    kept.append(torch.empty(2, 5, 4, 12, dtype=torch.bool).bernoulli_(1 - p))
    with in_chunks(chunks):
        found = stack.run(by_stack, EMULATED, None)
    expected, peer = (stack.run(by_layers, "eager", None, dtype) for dtype in (torch.float64, torch.float32))
    assert_as_accurate(found, expected, peer, torch.float32)


def test_runs_repeat_bit_by_bit() -> None:
    stack = make_stack("lstm", 5, 9, 4, 40, 3)
    first = stack.wavefront(3)
    for _ in range(3):
        assert_same_bits(stack.wavefront(3), first)


@pytest.mark.parametrize("chunks", [0, 2])
@pytest.mark.parametrize("wanted", ["x", "h0", "c0", "w_hh1", "b_ih0"])
def test_some_gradients_alone(wanted: str, chunks: int) -> None:
    stack = make_stack("lstm", 4, 2, 3, 6, 2)
    inputs = {name: t.detach().requires_grad_(name == wanted) for name, t in stack.inputs.items()}
    found = []
    for backend in ("eager", EMULATED):
        with rnnkern.backend(backend), in_chunks(chunks):
            y, _, _ = stack.by_layers(inputs) if backend == "eager" else stack.by_stack(inputs)
            found.append(torch.autograd.grad(y.sin().sum(), inputs[wanted])[0])
    torch.testing.assert_close(*found)


def test_gradients_of_one_output_alone() -> None:
    stack = make_stack("lstm", 4, 2, 3, 6, 2)
    inputs = {name: t.detach().requires_grad_() for name, t in stack.inputs.items()}
    for which in range(3):
        found = []
        for backend in ("eager", EMULATED):
            with rnnkern.backend(backend), in_chunks(2):
                out = (stack.by_layers if backend == "eager" else stack.by_stack)(inputs)[which]
                assert out is not None
                found.append(torch.autograd.grad(out.sin().sum(), list(inputs.values())))
        for actual, expected in zip(found[1], found[0]):
            torch.testing.assert_close(actual, expected)


def test_gradients_of_any_order() -> None:
    lstm = rnnkern.nn.LSTM(2, 3, num_layers=2).double()
    x = torch.randn(3, 2, 2, dtype=torch.double, requires_grad=True)
    with rnnkern.backend(EMULATED):
        assert torch.autograd.gradcheck(lambda x: lstm(x)[0], x)
        assert torch.autograd.gradgradcheck(lambda x: lstm(x)[0].sin(), x)


def test_double_backward_of_a_wavefront() -> None:
    gru = rnnkern.nn.GRU(2, 3, num_layers=2)
    x = torch.randn(4, 2, 2, requires_grad=True)
    found = []
    for backend in ("eager", EMULATED):
        with rnnkern.backend(backend), in_chunks(2):
            (dx,) = torch.autograd.grad(gru(x)[0].sin().sum(), x, create_graph=True)
            found.append(torch.autograd.grad(dx.square().sum(), [x, *gru.parameters()]))
    for actual, expected in zip(found[1], found[0]):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("name", ["cuda_stack", "cuda_stack_inference", "cuda_stack_backward"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_opcheck(cell: str, name: str) -> None:
    stack = make_stack(cell, 3, 2, 4, 5, 2)
    x, h0, c0 = (stack.inputs.get(name) for name in ("x", "h0", "c0"))
    weights = [w for own in stack.weights(stack.inputs) for w in own if w is not None]
    masks = torch.rand(1, 3, 2, 5) < 0.5
    inputs = (cell, x, h0, c0, weights, None, None, masks, 2.0)
    how = "", False, 2
    if name == "cuda_stack_inference":
        arguments: tuple[object, ...] = (*inputs, *how)
    elif name == "cuda_stack":
        for t in (x, h0, c0, *weights):
            if t is not None:
                t.requires_grad_()
        arguments = (*inputs, 0.0, *how)
    else:
        y, _, _, hidden, saved = torch.ops.rnnkern.cuda_stack(*inputs, 0.0, *how)
        dy, dh_n, dc_n = stack.cotangents
        out = (dy, dh_n, dc_n if cell == "lstm" else None)
        arguments = (cell, *out, *inputs[1:], y, hidden, saved, True, True, True, 0.0, *how)
    torch.library.opcheck(getattr(torch.ops.rnnkern, name).default, arguments)


@pytest.mark.parametrize(("T", "B", "I"), [(0, 3, 4), (5, 0, 4), (5, 3, 0)])
@pytest.mark.parametrize("cell", CELLS)
def test_nothing_to_do(cell: str, T: int, B: int, I: int) -> None:
    stack = make_stack(cell, T, B, I, 6, 2)
    stack.check(stack.wavefront(2))


def test_flops_are_those_of_the_layers() -> None:
    stack = make_stack("gru", 4, 3, 5, 6, 3)
    counts = []
    for how in (stack.by_stack, stack.by_layers):
        with FlopCounterMode(display=False) as counter, in_chunks(2):
            stack.run(how, EMULATED, None)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("shape", [(), (2, 5)])
def test_a_state_of_other_dimensions(shape: tuple[int, ...]) -> None:
    x, h0 = torch.zeros(3, 2, 4), torch.zeros(shape)
    with pytest.raises(RuntimeError, match=r"h0 must be \[L, B, H\]"):
        torch.ops.rnnkern.cuda_stack_inference("gru", x, h0, None, [], None, None, None, 1.0, "", False, 0)
    with pytest.raises(RuntimeError, match=r"takes h0 \[D, B, H\]"):
        torch.ops.rnnkern.cuda_stack_plan("gru", x, h0, None, "", False, 0, False)


def test_a_weight_that_does_not_fit() -> None:
    stack = make_stack("gru", 3, 2, 4, 5, 2)
    stack.inputs["w_hh1"] = torch.zeros(15, 4)
    with rnnkern.backend(EMULATED), pytest.raises(RuntimeError, match=r"weight_hh must have shape \[15, 5\]"):
        stack.by_stack(stack.inputs)
