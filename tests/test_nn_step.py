"""`step` of modules and cells: one time step at a time, on request without allocating anything."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import rnnkern
from tests.helpers import DTYPES, poisoned_memory

T, B, I, H = 7, 3, 4, 17
KINDS = ["RNN", "LSTM", "GRU"]


def make(kind: str, **options: Any) -> torch.nn.Module:
    return getattr(rnnkern.nn, kind)(I, H, **options).eval()


def zero_state(kind: str, *shape: int, dtype: torch.dtype = torch.float32) -> Any:
    states = tuple(torch.zeros(*shape, H, dtype=dtype) for _ in range(2))
    return states if kind.startswith("LSTM") else states[0]


def clone(state: Any) -> Any:
    return tuple(s.clone() for s in state) if isinstance(state, tuple) else state.clone()


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("batch", [(1,), (B,), ()], ids=str)
@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize(
    ("kind", "dtype"),  # an LSTM in low precision rounds c between calls: the next test is about it
    [(kind, dtype) for kind in KINDS for dtype in DTYPES if kind != "LSTM" or dtype in (torch.float32, torch.float64)],
)
def test_steps_equal_the_whole_sequence(
    kind: str, dtype: torch.dtype, num_layers: int, batch: tuple[int, ...], batch_first: bool
) -> None:
    module = make(kind, num_layers=num_layers, batch_first=batch_first, dtype=dtype)
    x = torch.randn(T, *batch, I, dtype=dtype)
    with torch.no_grad(), poisoned_memory():
        y, state = module(x.transpose(0, 1) if batch_first and batch else x)
        expected = y.transpose(0, 1) if batch_first and batch else y
        for inplace in (False, True):
            hx = zero_state(kind, num_layers, *batch, dtype=dtype) if inplace else None
            for t in range(T):
                out = torch.full((*batch, H), torch.nan, dtype=dtype) if t % 2 else None
                before = hx
                result, hx = module.step(x[t], hx, out=out, inplace=inplace)
                assert torch.equal(result, expected[t])
                assert out is None or result is out
                assert not inplace or hx is before
            assert all(torch.equal(a, b) for a, b in zip(tree_leaves(hx), tree_leaves(state), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_steps_of_an_lstm_in_low_precision_equal_its_calls(dtype: torch.dtype) -> None:
    module, x = make("LSTM", num_layers=2, dtype=dtype), torch.randn(T, B, I, dtype=dtype)
    state = zero_state("LSTM", 2, B, dtype=dtype)
    with torch.no_grad():
        for frame in x:
            expected, expected_state = module(frame[None], clone(state))
            y, _ = module.step(frame, state, inplace=True)
            for a, b in zip((y, *state), (expected[0], *expected_state)):
                assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["RNNCell", "LSTMCell", "GRUCell"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [(1,), (B,), ()], ids=str)
def test_steps_of_a_cell_equal_its_calls(kind: str, dtype: torch.dtype, batch: tuple[int, ...]) -> None:
    cell = make(kind, dtype=dtype)
    x = torch.randn(T, *batch, I, dtype=dtype)
    with torch.no_grad(), poisoned_memory():
        expected, state, written = None, None, zero_state(kind, *batch, dtype=dtype)
        for frame in x:
            with rnnkern.backend("cpu") if rnnkern._library.available else torch.no_grad():
                expected = cell(frame, expected)  # the override keeps this one on the operator's route
            state = cell.step(frame, state)
            assert cell.step(frame, written, inplace=True) is written
            for leaves in zip(*map(tree_leaves, (expected, state, written)), strict=True):
                assert torch.equal(leaves[0], leaves[1])
                assert torch.equal(leaves[0], leaves[2])


@pytest.mark.parametrize("kind", KINDS)
def test_many_steps_in_a_row_equal_the_whole_sequence(kind: str) -> None:
    """Those that follow each other without a pause for long are divided among threads, the first ones are not."""
    steps, size = 400, 400
    module = getattr(rnnkern.nn, kind)(I, size, num_layers=2).eval()
    x = torch.randn(steps, 2, I)
    before = torch.get_num_threads()
    try:
        with torch.no_grad(), poisoned_memory():
            expected, _ = module(x)
            for threads in (1, 2, 4):
                torch.set_num_threads(threads)
                for inplace in (False, True):
                    states = tuple(torch.zeros(2, 2, size) for _ in range(2))
                    hx: Any = states if kind == "LSTM" else states[0]
                    for t in range(steps):
                        y, hx = module.step(x[t], hx, inplace=inplace)
                        assert torch.equal(y, expected[t]), (threads, inplace, t)
    finally:
        torch.set_num_threads(before)


def test_a_stack_with_other_inputs_and_without_biases() -> None:
    module = rnnkern.nn.LSTM(33, 5, num_layers=2, bias=False).eval()
    x = torch.randn(T, 1, 33)
    with torch.no_grad():
        expected, state = module(x)[0], None
        for t in range(T):
            y, state = module.step(x[t], state)
            assert torch.equal(y, expected[t])


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_flow_through_steps(kind: str) -> None:
    module = make(kind, num_layers=2, dtype=torch.float64)
    x = torch.randn(T, B, I, dtype=torch.float64)
    gradients = []
    for streaming in (False, True):
        module.zero_grad()
        if streaming:
            state, total = None, torch.zeros((), dtype=torch.float64)
            for frame in x:
                y, state = module.step(frame, state)
                total = total + y.pow(2).sum()
        else:
            total = module(x)[0].pow(2).sum()
        total.backward()
        gradients.append([p.grad for p in module.parameters()])
    torch.testing.assert_close(*gradients)


def test_a_written_state_is_known_to_autograd() -> None:
    module, h, x = make("GRU"), torch.zeros(1, B, H), torch.randn(B, I)
    with torch.no_grad():
        for _ in range(4):
            module.step(x, h, inplace=True)
    w = torch.ones(1, B, H, requires_grad=True)
    loss = (w * h).sum()  # saves h
    with torch.no_grad():
        module.step(x, h, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_state_made_in_inference_mode_may_be_written_outside() -> None:
    for kind in ("LSTM", "LSTMCell"):
        module, x = make(kind), torch.randn(B, I)
        shape = (1, B, H) if kind == "LSTM" else (B, H)
        with torch.inference_mode():
            state = torch.zeros(shape), torch.zeros(shape)
        with torch.no_grad():
            for _ in range(4):
                module.step(x, state, inplace=True)
        assert state[0].any()


REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "no state": (lambda x, h, o: (x, None, None), ValueError, "inplace=True needs a state"),
    "rank": (lambda x, h, o: (x[None], h, None), ValueError, "Expected input to be 1D or 2D, got 3D"),
    "input size": (lambda x, h, o: (x[:, 1:], h, None), RuntimeError, "must be equal to input_size|input_size"),
    "state size": (lambda x, h, o: (x, h[:, 1:].contiguous(), None), RuntimeError, "Expected hidden size"),
    "state dtype": (lambda x, h, o: (x, h.double(), None), RuntimeError, "hx must have the dtype of input"),
    "state strides": (lambda x, h, o: (x, h.mT.contiguous().mT, None), RuntimeError, "hx must be contiguous"),
    "state with grad": (lambda x, h, o: (x, h.requires_grad_(), None), RuntimeError, "hx requires grad"),
    "state is input": (lambda x, h, o: (h[0, :, :I], h, None), RuntimeError, "hx cannot .* shares memory with input"),
    "out is state": (lambda x, h, o: (x, h, h[0]), RuntimeError, "out cannot .* shares memory with hx"),
    "out shape": (lambda x, h, o: (x, h, o[1:]), RuntimeError, r"out must have shape \[3, 17\], got \[2, 17\]"),
    "out dtype": (lambda x, h, o: (x, h, o.double()), RuntimeError, "out must have the dtype of the result"),
    "out on another device": (lambda x, h, o: (x, h, o.to("meta")), RuntimeError, "out must be on the device of the"),
    "out with grad": (lambda x, h, o: (x, h, o.requires_grad_()), RuntimeError, "out requires grad"),
}


@pytest.mark.parametrize("warm", [False, True], ids=["ordinary route", "short call"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_written_is_refused(name: str, warm: bool) -> None:
    module = make("GRU")
    x, h, out = torch.randn(B, I), torch.randn(1, B, H), torch.randn(B, H)
    with torch.no_grad():
        for _ in range(3 if warm else 0):
            module.step(x, h.clone())
        change, exception, message = REFUSED[name]
        arguments = change(x, h, out)
        before = [a.detach().clone() for a in arguments[:2] if a is not None]
        with pytest.raises(exception, match=message):
            module.step(*arguments[:2], out=arguments[2], inplace=True)
        assert all(torch.equal(a, b) for a, b in zip(arguments[:2], before) if a is not None)


@pytest.mark.parametrize("warm", [False, True], ids=["ordinary route", "short call"])
@pytest.mark.parametrize("kind", ["GRU", "GRUCell", "QuantizedRNN", "QuantizedGRU"])
def test_a_weight_is_not_written_over(kind: str, warm: bool) -> None:
    module, x = make(kind), torch.randn(1, I)
    weights = [w for w in (*module.parameters(), *module.buffers()) if w.dtype == torch.float32]
    assert len(weights) == 4  # int8 weights have scales
    with torch.no_grad():
        for _ in range(3 if warm else 0):
            module.step(x)
        for weight in weights:
            before, part = weight.clone(), weight.detach().view(-1)[:H].view(1, H)
            arguments: dict[str, Any] = {"hx": part, "inplace": True} if kind == "GRUCell" else {"out": part}
            with pytest.raises(RuntimeError, match=r"(hx|out) cannot be .*: it shares memory with (weight|bias)_[ih]h"):
                module.step(x, **arguments)
            assert torch.equal(weight, before)


@pytest.mark.parametrize("kind", ["GRU", "QuantizedGRU"])
def test_a_state_may_be_a_buffer_of_the_module(kind: str) -> None:
    module, x = make(kind), torch.randn(B, I)
    module.register_buffer("state", torch.ones(1, B, H))
    with torch.no_grad():
        for _ in range(4):
            expected = module.step(x, module.state.clone())[1]
            module.step(x, module.state, inplace=True)
            assert torch.equal(module.state, expected)


@pytest.mark.parametrize("kind", ["GRU", "LSTMCell"])
def test_writing_in_place_is_refused_while_gradients_are_wanted(kind: str) -> None:
    module, x = make(kind), torch.randn(B, I)
    state = zero_state(kind, *((1, B) if kind == "GRU" else (B,)))
    with pytest.raises(RuntimeError, match=r"cannot be written in place while gradients are wanted.*no_grad"):
        module.step(x, state, inplace=True)
    assert not any(s.any() for s in tree_leaves(state))
    if kind == "GRU":
        with pytest.raises(RuntimeError, match="out cannot be written in place while gradients are wanted"):
            module.step(x, state, out=torch.empty(B, H))


def test_what_has_no_step() -> None:
    with pytest.raises(ValueError, match=r"GRU\.step: the reverse direction needs the whole sequence"):
        rnnkern.nn.GRU(I, H, bidirectional=True).step(torch.randn(B, I))
    packed = torch.nn.utils.rnn.pack_sequence([torch.randn(2, I)])
    with pytest.raises(TypeError, match="input must be a tensor, got PackedSequence"):
        make("GRU").step(packed)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["GRU", "LSTM"])
def test_a_state_of_another_rank_is_refused(kind: str, training: bool) -> None:
    module, one = make(kind).train(training), "hx" if kind == "GRU" else "hx and cx"
    for shape, expected, wrong in (
        ((B, I), r"batched 2-D input, {} should be 3-D \[L, B, H\]", (B, H)),
        ((I,), r"unbatched 1-D input, {} should be 2-D \[L, H\]", (1, 1, H)),
    ):
        for _ in range(3):
            module.step(torch.randn(shape))
            state = torch.zeros(wrong)
            with pytest.raises(RuntimeError, match="For " + expected.format(one)):
                module.step(torch.randn(shape), state if kind == "GRU" else (state, state))


def test_projections_and_dropout_take_the_ordinary_route() -> None:
    module = rnnkern.nn.LSTM(I, H, 2, proj_size=5).eval()
    x = torch.randn(T, B, I)
    state = torch.zeros(2, B, 5), torch.zeros(2, B, H)
    with torch.no_grad():
        expected = module(x)[0]
        for t in range(T):
            torch.testing.assert_close(module.step(x[t], state, inplace=True)[0], expected[t])


@pytest.mark.parametrize("kind", ["GRU", "LSTMCell", "QuantizedGRU"])
def test_compiled_without_a_graph_break(kind: str) -> None:
    module = make(kind)
    run = torch.compile(module.step, fullgraph=True, backend="aot_eager")
    x = torch.randn(B, I)
    state = zero_state(kind, *((B,) if kind == "LSTMCell" else (1, B)))
    with torch.no_grad():
        for _ in range(3):
            module.step(x, state)
        expected = clone(state)
        module.step(x, expected, inplace=True)
        run(x, state, inplace=True)
    assert all(torch.equal(a, b) for a, b in zip(tree_leaves(state), tree_leaves(expected), strict=True))


@pytest.mark.parametrize("kind", ["GRU", "GRUCell"])
def test_changed_weights_are_seen(kind: str) -> None:
    module, x = make(kind), torch.randn(1, I)
    h = torch.zeros(1, 1, H) if kind == "GRU" else torch.zeros(1, H)

    def run() -> Tensor:
        return tree_leaves(module.step(x, h))[0]

    with torch.no_grad():
        for change in ("in place", "data", "parameter", "state_dict"):
            for _ in range(3):
                before = run()
            parameters = dict(module.named_parameters())
            if change == "in place":
                next(iter(parameters.values()))[0, 0] += 1
            elif change == "data":
                next(iter(parameters.values())).data = torch.randn(3 * H, I)
            elif change == "parameter":
                name = next(iter(parameters))
                setattr(module, name, torch.nn.Parameter(torch.randn(3 * H, I)))
            else:
                module.load_state_dict({name: torch.randn_like(p) for name, p in parameters.items()})
            after = run()
            assert not torch.equal(after, before)
            with rnnkern.backend("eager"):
                torch.testing.assert_close(after, run())
