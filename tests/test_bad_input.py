"""Malformed input of the recurrent modules: torch's exception type and words, the argument named, nothing written."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

import rnnkern
from tests.helpers import needs_kernels

T, B, I, H = 5, 2, 3, 4
KINDS = ["RNN", "LSTM", "GRU"]
CELLS = ["RNNCell", "LSTMCell", "GRUCell"]


def state(kind: str, *shape: int, **options: Any) -> Any:
    h = torch.zeros(*shape, **options)
    return (h, h.clone()) if kind.startswith("LSTM") else h


def refusal(run: Callable[[], Any]) -> tuple[type[BaseException], str]:
    with pytest.raises((RuntimeError, ValueError, TypeError, IndexError, AttributeError)) as caught:
        run()
    return type(caught.value), str(caught.value)


LIKE_TORCH: dict[str, Callable[[str], tuple[Any, ...]]] = {
    "rank 1": lambda kind: (torch.zeros(I),),
    "rank 4": lambda kind: (torch.zeros(1, T, B, I),),
    "input size": lambda kind: (torch.zeros(T, B, I + 1),),
    "input size, unbatched": lambda kind: (torch.zeros(T, I + 1),),
    "input dtype": lambda kind: (torch.zeros(T, B, I, dtype=torch.float64),),
    "integer input": lambda kind: (torch.zeros(T, B, I, dtype=torch.long),),
    "input on another device": lambda kind: (torch.zeros(T, B, I, device="meta"),),
    "hx batch": lambda kind: (torch.zeros(T, B, I), state(kind, 1, B + 1, H)),
    "hx layers": lambda kind: (torch.zeros(T, B, I), state(kind, 2, B, H)),
    "hx size": lambda kind: (torch.zeros(T, B, I), state(kind, 1, B, H + 1)),
    "hx rank": lambda kind: (torch.zeros(T, B, I), state(kind, B, H)),
    "hx rank, unbatched": lambda kind: (torch.zeros(T, I), state(kind, 1, 1, H)),
    "hx size, unbatched": lambda kind: (torch.zeros(T, I), state(kind, 1, H + 1)),
    "hx on another device": lambda kind: (torch.zeros(T, B, I), state(kind, 1, B, H, device="meta")),
    "rank before size": lambda kind: (torch.zeros(1, T, B, I + 1), state(kind, 9, 9, 9)),
    "hx rank before input size": lambda kind: (torch.zeros(T, B, I + 1), state(kind, B, H)),
    "input size before hx size": lambda kind: (torch.zeros(T, B, I + 1), state(kind, 9, 9, 9)),
    "dtype before input size": lambda kind: (torch.zeros(T, B, I + 1, dtype=torch.float64),),
    "hx size before no steps": lambda kind: (torch.zeros(0, B, I), state(kind, 9, 9, 9)),
}


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("case", LIKE_TORCH)
@pytest.mark.parametrize("kind", KINDS)
def test_layers_refuse_in_torchs_words(kind: str, case: str, batch_first: bool) -> None:
    args = LIKE_TORCH[case](kind)
    if batch_first and isinstance(args[0], Tensor) and args[0].dim() == 3:
        args = (args[0].transpose(0, 1), *args[1:])
    ours, peer = (getattr(lib, kind)(I, H, batch_first=batch_first) for lib in (rnnkern.nn, torch.nn))
    assert refusal(lambda: ours(*args)) == refusal(lambda: peer(*args))


@pytest.mark.parametrize("kind", ["RNN", "GRU"])  # torch.nn.LSTM leaves packed input to the matrix product
def test_packed_input_is_refused_in_torchs_words(kind: str) -> None:
    ours, peer = (getattr(lib, kind)(I, H) for lib in (rnnkern.nn, torch.nn))
    lengths = torch.tensor([2, T])
    fits = pack_padded_sequence(torch.zeros(T, B, I), lengths, enforce_sorted=False)
    wide = pack_padded_sequence(torch.zeros(T, B, I + 1), lengths, enforce_sorted=False)
    double = pack_padded_sequence(torch.zeros(T, B, I).double(), lengths, enforce_sorted=False)
    for args in ((wide,), (double,), (fits, torch.zeros(1, B, H + 1)), (fits, torch.zeros(2, B, H))):
        assert refusal(lambda args=args: ours(*args)) == refusal(lambda args=args: peer(*args))


def test_packed_input_of_an_lstm_is_checked_too() -> None:
    lstm = rnnkern.nn.LSTM(I, H)
    fits = pack_padded_sequence(torch.zeros(T, B, I), torch.tensor([2, T]), enforce_sorted=False)
    wide = pack_padded_sequence(torch.zeros(T, B, I + 1), torch.tensor([2, T]), enforce_sorted=False)
    with pytest.raises(RuntimeError, match=r"input.size\(-1\) must be equal to input_size. Expected 3, got 4"):
        lstm(wide)
    with pytest.raises(RuntimeError, match=r"Expected hidden\[1\] size \(1, 2, 4\), got \[1, 2, 5\]"):
        lstm(fits, (torch.zeros(1, B, H), torch.zeros(1, B, H + 1)))


@pytest.mark.parametrize("kind", KINDS)
def test_hx_of_another_dtype(kind: str) -> None:
    module = getattr(rnnkern.nn, kind)(I, H)
    with pytest.raises(
        RuntimeError, match=r"hx must have the dtype of input. Expected torch.float32, got torch.float64"
    ):
        module(torch.zeros(T, B, I), state(kind, 1, B, H, dtype=torch.float64))


def test_the_second_state_is_checked_like_the_first() -> None:
    ours, peer = (lib.LSTM(I, H) for lib in (rnnkern.nn, torch.nn))
    x, h = torch.zeros(T, B, I), torch.zeros(1, B, H)
    for c in (torch.zeros(1, B, H + 1), torch.zeros(B, H), torch.zeros(1, B, H, device="meta")):
        assert refusal(lambda c=c: ours(x, (h, c))) == refusal(lambda c=c: peer(x, (h, c)))
    assert refusal(lambda: ours(x, (h,)))[0] is refusal(lambda: peer(x, (h,)))[0]
    with pytest.raises(RuntimeError, match="hx must have the dtype of input"):
        ours(x, (h, h.double()))


@pytest.mark.parametrize(
    ("form", "hx"),
    [
        ("padded", lambda h: (h, h, h)),
        ("padded", lambda h: torch.stack([h, h])),
        ("padded", lambda h: (None, None)),
        ("padded", lambda h: [h, None]),
        ("unbatched", lambda h: (None, h[:, 0])),
        ("sorted", lambda h: (h, h, h)),
        ("sorted", lambda h: (h,)),
        ("sorted", lambda h: torch.stack([h, h])),
        ("sorted", lambda h: (None, None)),
        ("unsorted", lambda h: (h, None)),
    ],
)
def test_the_states_of_an_lstm_are_a_pair(form: str, hx: Callable[[Tensor], Any]) -> None:
    ours, peer = (lib.LSTM(I, H) for lib in (rnnkern.nn, torch.nn))
    x: Any = torch.zeros(T, B, I)
    if form == "unbatched":
        x = x[:, 0]
    elif form != "padded":
        lengths = torch.tensor([T, 2] if form == "sorted" else [2, T])
        x = pack_padded_sequence(x, lengths, enforce_sorted=form == "sorted")
    given = hx(torch.zeros(1, B, H))
    kind, message = refusal(lambda: ours(x, given))
    assert kind is refusal(lambda: peer(x, given))[0]
    assert message.startswith("hx must be a pair of tensors")


LENGTHS: dict[str, tuple[Any, str]] = {
    "too long": (torch.tensor([5, 6]), "lengths must be within 0 and the number of steps 5, got 6"),
    "negative": (torch.tensor([-1, 5]), "lengths must be within 0 and the number of steps 5, got -1"),
    "too many": (
        torch.tensor([1, 2, 3]),
        r"lengths must have one entry per row. Expected shape \[2\], got \[3\]",
    ),
    "rank": (torch.tensor([[1, 2]]), r"lengths must have one entry per row. Expected shape \[2\], got \[1, 2\]"),
    "scalar": (torch.tensor(1), r"lengths must have one entry per row. Expected shape \[2\], got \[\]"),
    "float": (torch.tensor([1.0, 2.0]), "lengths must be integers. Expected torch.int64, got torch.float32"),
    "bool": (torch.tensor([True, False]), "lengths must be integers. Expected torch.int64, got torch.bool"),
    "meta": (torch.zeros(B, dtype=torch.long, device="meta"), "lengths must hold values, got a tensor on the meta"),
}


@pytest.mark.parametrize("backend", ["eager", None])
@pytest.mark.parametrize("case", LENGTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_lengths(kind: str, case: str, backend: str | None) -> None:
    lengths, message = LENGTHS[case]
    module = getattr(rnnkern.nn, kind)(I, H, num_layers=2)
    for training in (True, False):
        with torch.set_grad_enabled(training), pytest.raises(RuntimeError, match=message):
            module(torch.zeros(T, B, I), lengths=lengths)


@needs_kernels
@pytest.mark.parametrize("training", [True, False])
def test_compiled_lengths(training: bool) -> None:
    run = torch.compile(rnnkern.nn.GRU(I, H), fullgraph=True, backend="aot_eager")
    x = torch.randn(T, B, I)
    with torch.set_grad_enabled(training):
        run(x, lengths=torch.tensor([T, 0]))
        with pytest.raises(RuntimeError, match=r"lengths must lie in 0\.\.5"):
            run(x, lengths=torch.tensor([9, -3]))


def test_lengths_must_be_a_tensor() -> None:
    with pytest.raises(TypeError, match="lengths must be a tensor, got list"):
        rnnkern.nn.GRU(I, H)(torch.zeros(T, B, I), lengths=[1, 2])


RESETS: dict[str, tuple[Tensor, str]] = {
    "shape": (torch.zeros(B, T, dtype=torch.bool), r"Expected shape \[5, 2\], got \[2, 5\]"),
    "rank": (torch.zeros(T, dtype=torch.bool), r"Expected shape \[5, 2\], got \[5\]"),
    "features": (torch.zeros(T, B, 1, dtype=torch.bool), r"Expected shape \[5, 2\], got \[5, 2, 1\]"),
    "dtype": (torch.zeros(T, B), "resets must be bool. Expected torch.bool, got torch.float32"),
    "device": (
        torch.zeros(T, B, dtype=torch.bool, device="meta"),
        "resets must be on the device of the weights. Expected cpu, got meta",
    ),
}


@pytest.mark.parametrize("case", RESETS)
def test_resets(case: str) -> None:
    resets, message = RESETS[case]
    with pytest.raises(RuntimeError, match=message):
        rnnkern.nn.GRU(I, H)(torch.zeros(T, B, I), resets=resets)


def test_resets_follow_the_layout_of_the_input() -> None:
    gru = rnnkern.nn.GRU(I, H, batch_first=True)
    with pytest.raises(RuntimeError, match=r"Expected shape \[2, 5\], got \[5, 2\]"):
        gru(torch.zeros(B, T, I), resets=torch.zeros(T, B, dtype=torch.bool))
    with pytest.raises(RuntimeError, match=r"Expected shape \[5\], got \[5, 1\]"):
        gru(torch.zeros(T, I), resets=torch.zeros(T, 1, dtype=torch.bool))
    with pytest.raises(TypeError, match="resets must be a tensor, got list"):
        gru(torch.zeros(T, I), resets=[False] * T)


@pytest.mark.parametrize("value", [torch.zeros(B, dtype=torch.long), [1, 2]], ids=["tensor", "list"])
@pytest.mark.parametrize("name", ["lengths", "resets"])
def test_keywords_of_padded_input_do_not_go_with_packed_input(name: str, value: Any) -> None:
    packed = pack_padded_sequence(torch.zeros(T, B, I), torch.tensor([T, 2]))
    with pytest.raises(
        ValueError, match=f"{name} must be None if input is a PackedSequence, got {type(value).__name__}"
    ):
        rnnkern.nn.GRU(I, H)(packed, **{name: value})


CELLS_LIKE_TORCH: dict[str, Callable[[str], tuple[Any, ...]]] = {
    "rank": lambda kind: (torch.zeros(1, B, I),),
    "scalar": lambda kind: (torch.tensor(1.0),),
    "input size": lambda kind: (torch.zeros(B, I + 1),),
    "hx rank": lambda kind: (torch.zeros(B, I), state(kind, 1, B, H)),
    "hx batch": lambda kind: (torch.zeros(B, I), state(kind, B + 1, H)),
    "hx size": lambda kind: (torch.zeros(B, I), state(kind, B, H + 1)),
    "hx without batch": lambda kind: (torch.zeros(B, I), state(kind, H)),
    "hx without batch, as long as the batch": lambda kind: (torch.zeros(H, I), state(kind, H)),
    "hx with batch": lambda kind: (torch.zeros(I), state(kind, 1, H)),
}


@pytest.mark.parametrize("case", CELLS_LIKE_TORCH)
@pytest.mark.parametrize("kind", CELLS)
def test_cells_refuse_in_torchs_words(kind: str, case: str) -> None:
    args = CELLS_LIKE_TORCH[case](kind)
    ours, peer = (getattr(lib, kind)(I, H) for lib in (rnnkern.nn, torch.nn))
    assert refusal(lambda: ours(*args)) == refusal(lambda: peer(*args))


@pytest.mark.parametrize("kind", CELLS)
def test_cells_refuse_mixed_dtypes_and_devices(kind: str) -> None:
    module = getattr(rnnkern.nn, kind)(I, H)
    x = torch.zeros(B, I)
    with pytest.raises(RuntimeError, match=r"input must have the dtype of the weights. Expected torch.float32"):
        module(x.double())
    with pytest.raises(RuntimeError, match=r"hidden0 must have the dtype of input. Expected torch.float32"):
        module(x, state(kind, B, H, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="hidden tensors are not at the same device"):
        module(x, state(kind, B, H, device="meta"))
    with pytest.raises(RuntimeError, match="parameter tensors are not at the same device"):
        module(x.to("meta"))


def test_odd_states_of_an_lstm_cell() -> None:
    cell, x, h = rnnkern.nn.LSTMCell(I, H), torch.zeros(B, I), torch.zeros(B, H)
    with pytest.raises(RuntimeError, match="hidden1 has inconsistent hidden_size: got 5, expected 4"):
        cell(x, (h, torch.zeros(B, H + 1)))
    with pytest.raises(RuntimeError, match="lstm_cell expects two hidden states"):
        cell(x, (h,))
    with pytest.raises(TypeError, match="must be a tuple of Tensors, not Tensor"):
        cell(x, torch.zeros(2, B, H))


def test_unknown_nonlinearity_of_a_cell() -> None:
    ours, peer = (lib.RNNCell(I, H, nonlinearity="step") for lib in (rnnkern.nn, torch.nn))
    assert refusal(lambda: ours(torch.zeros(B, I))) == refusal(lambda: peer(torch.zeros(B, I)))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("weight_hh_l0", torch.zeros(3 * H, H, dtype=torch.float64), "weight_hh must have the dtype of input"),
        ("weight_hh_l0", torch.zeros(3 * H, H + 1), r"weight_hh must have shape \[12, 4\], got \[12, 5\]"),
        ("bias_ih_l0", torch.zeros(H), r"bias_ih must have shape \[12\], got \[4\]"),
        (
            "weight_hh_l0",
            torch.zeros(3 * H, H, device="meta"),
            "Input and parameter tensors are not at the same device",
        ),
    ],
    ids=["dtype", "shape", "bias", "device"],
)
def test_weights_that_do_not_fit(name: str, value: Tensor, message: str, training: bool) -> None:
    gru = rnnkern.nn.GRU(I, H)
    setattr(gru, name, torch.nn.Parameter(value))
    with torch.set_grad_enabled(training):
        for _ in range(3):
            with pytest.raises(RuntimeError, match=message):
                gru(torch.zeros(1, B, I))


@needs_kernels
def test_a_refused_call_leaves_the_module_as_it_was() -> None:
    gru = rnnkern.nn.GRU(I, H).eval()
    x, h = torch.randn(1, B, I), torch.randn(1, B, H)
    with torch.no_grad():
        expected = gru(x, h)[0]
        for _ in range(2):  # noted, packed
            gru(x, h)
        packs = dict(gru._packs._entries)
        refused = (
            lambda: gru(x, h, lengths=torch.tensor([0, 2])),
            lambda: gru(x.double(), h),
            lambda: gru(x, h[:, :1]),
            lambda: torch.ops.rnnkern.layer_inference(
                *("gru", x, h, None, *gru._layer_weights(0)[0], torch.tensor([1, 9]), None, False, packs[0].packed)
            ),
        )
        for run in refused:
            refusal(run)
            assert gru._packs._entries[0].packed is packs[0].packed is not None
            assert torch.equal(gru(x, h)[0], expected)
