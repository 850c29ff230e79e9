"""Several mistakes in one call: the exception is torch's for the first of them that torch sees, in torch's words.

Where torch leaves a mistake to whatever stumbles over it (a matrix product, an attribute that is missing), the type is
torch's and the words are ours: they name the argument, what was expected and what was given.
"""

import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import rnnkern

T, B, I, H = 5, 2, 3, 4

# What torch says of a sequence of no steps, which is none of ours.
NO_STEPS = (RuntimeError, "Expected sequence length to be larger than 0 in RNN")

# Said in the place of torch's accidental words.
OWN_WORDS = re.compile(
    r"'?hx(\[\d\])? must be (a pair of tensors|a tensor|a tuple of Tensors)"
    r"|input must be a tensor"
    r"|(hx|hidden\d|input) must have the dtype of (input|the weights)\. Expected torch\.\w+, got torch\.\w+"
    r"|Input and (hidden|parameter) tensors are not at the same device, found input tensor at \w+ and \w+ tensor at \w+"
)

PADDED: dict[str, Callable[[], Any]] = {
    "fits": lambda: torch.zeros(T, B, I),
    "unbatched": lambda: torch.zeros(T, I),
    "scalar": lambda: torch.tensor(1.0),
    "rank 1": lambda: torch.zeros(I),
    "rank 4": lambda: torch.zeros(1, T, B, I),
    "wide": lambda: torch.zeros(T, B, I + 1),
    "unbatched, wide": lambda: torch.zeros(T, I + 1),
    "float64": lambda: torch.zeros(T, B, I).double(),
    "int64": lambda: torch.zeros(T, B, I).long(),
    "complex": lambda: torch.zeros(T, B, I).cfloat(),
    "no steps": lambda: torch.zeros(0, B, I),
    "no rows": lambda: torch.zeros(T, 0, I),
    "meta": lambda: torch.zeros(T, B, I, device="meta"),
    "None": lambda: None,
    "list": lambda: [torch.zeros(T, B, I)],
    "array": lambda: torch.zeros(T, B, I).numpy(),
}
PACKED: dict[str, Callable[[], Any]] = {
    "unsorted": lambda: pack_padded_sequence(torch.zeros(T, B, I), torch.tensor([2, T]), enforce_sorted=False),
    "sorted": lambda: pack_padded_sequence(torch.zeros(T, B, I), torch.tensor([T, 2])),
    "unsorted, wide": lambda: pack_padded_sequence(
        torch.zeros(T, B, I + 1), torch.tensor([2, T]), enforce_sorted=False
    ),
    "sorted, float64": lambda: pack_padded_sequence(torch.zeros(T, B, I).double(), torch.tensor([T, 2])),
    "data of rank 1": lambda: PackedSequence(torch.zeros(7), torch.tensor([2, 2, 1, 1, 1])),
    "data of rank 3": lambda: PackedSequence(torch.zeros(7, 1, I), torch.tensor([2, 2, 1, 1, 1])),
}
STEPS: dict[str, Callable[[], Any]] = {
    "fits": lambda: torch.zeros(B, I),
    "unbatched": lambda: torch.zeros(I),
    "scalar": lambda: torch.tensor(1.0),
    "rank 3": lambda: torch.zeros(1, B, I),
    "wide": lambda: torch.zeros(B, I + 1),
    "unbatched, wide": lambda: torch.zeros(I + 1),
    "float64": lambda: torch.zeros(B, I).double(),
    "int64": lambda: torch.zeros(B, I).long(),
    "no rows": lambda: torch.zeros(0, I),
    "meta": lambda: torch.zeros(B, I, device="meta"),
    "None": lambda: None,
    "list": lambda: [torch.zeros(B, I)],
}


def states(kind: str) -> dict[str, Callable[[], Any]]:
    lead = () if kind.endswith("Cell") else (1,)
    one: dict[str, Callable[[], Tensor | None]] = {
        "fits": lambda: torch.zeros(*lead, B, H),
        "unbatched": lambda: torch.zeros(*lead, H),
        "rank + 1": lambda: torch.zeros(1, *lead, B, H),
        "B + 1": lambda: torch.zeros(*lead, B + 1, H),
        "H + 1": lambda: torch.zeros(*lead, B, H + 1),
        "two layers": lambda: torch.zeros(2, B, H),
        "float64": lambda: torch.zeros(*lead, B, H).double(),
        "meta": lambda: torch.zeros(*lead, B, H, device="meta"),
        "scalar": lambda: torch.tensor(0.0),
        "None": lambda: None,
    }
    odd: dict[str, Callable[[], Any]] = {
        "left out": lambda: None,
        "tuple of one": lambda: (torch.zeros(*lead, B, H),),
        "list of one": lambda: [torch.zeros(*lead, B, H)],
        "empty": lambda: (),
        "dict": dict,
        "dict of two": lambda: {0: torch.zeros(*lead, B, H), 1: torch.zeros(*lead, B, H)},
        "float": lambda: 1.0,
        "string": lambda: "ab",
        "False": lambda: False,
        "object": object,
        "set": lambda: {1, 2},
        "tensor": lambda: torch.zeros(*lead, B, H),
        "stacked": lambda: torch.zeros(2, *lead, B, H),
    }
    if not kind.startswith("LSTM"):
        return {name: value for name, value in one.items() if name != "None"} | odd
    pairs: dict[str, Callable[[], Any]] = {}
    for h, c in itertools.product(one, repeat=2):
        if h == c or "fits" in (h, c):
            pairs[f"({h}, {c})"] = lambda h=h, c=c: (one[h](), one[c]())
    three = {"three": lambda: (one["fits"](),) * 3, "list": lambda: [one["fits"](), one["fits"]()]}
    return pairs | three | odd


def outcome(module: torch.nn.Module, *args: Any) -> tuple[type[BaseException] | None, str]:
    try:
        module(*args)
    except Exception as error:
        return type(error), str(error)
    return None, ""


# torch.nn.LSTM does not check packed input: it reads and writes past the end of a state that does not fit.
CHECKED_BY_NOBODY = ("H", "B", "rank", "unbatched", "scalar", "layers", "meta", "three")


def comparable(kind: str, x: str, hx: str) -> bool:
    if kind == "LSTM" and x in PACKED:
        return x in ("unsorted", "sorted") and not any(word in hx for word in CHECKED_BY_NOBODY)
    # torch's LSTMCell mixes dtypes of h and c where nothing multiplies c.
    return not (kind == "LSTMCell" and hx == "(fits, float64)")


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell"])
def test_the_first_mistake_is_told(kind: str) -> None:
    ours, peer = (getattr(library, kind)(I, H) for library in (rnnkern.nn, torch.nn))
    inputs = STEPS if kind.endswith("Cell") else PADDED | PACKED
    refused, own = 0, 0
    for (x_name, x), (hx_name, hx) in itertools.product(inputs.items(), states(kind).items()):
        if not comparable(kind, x_name, hx_name):
            continue
        actual, expected = outcome(ours, x(), hx()), outcome(peer, x(), hx())
        if expected == NO_STEPS and actual[0] is None:
            continue
        assert actual[0] is expected[0], (x_name, hx_name, actual, expected)
        if actual != expected:
            assert OWN_WORDS.match(actual[1]), (x_name, hx_name, actual, expected)
            own += 1
        refused += actual[0] is not None
    assert refused > own > 0


@pytest.mark.parametrize("x", PACKED)
def test_packed_input_of_an_lstm_is_refused_where_torch_reads_past_the_end(x: str) -> None:
    module = rnnkern.nn.LSTM(I, H)
    for name, hx in states("LSTM").items():
        # Of an unsorted sequence's state, torch's permutation takes the first two items and the rows of the batch.
        fine = x == "unsorted" and (name == "three" or "B + 1" in name)
        if any(word in name for word in CHECKED_BY_NOBODY) and not fine:
            with pytest.raises((RuntimeError, ValueError, IndexError, AttributeError)):
                module(PACKED[x](), hx())


@pytest.mark.parametrize(
    ("kind", "hx", "words"),
    [
        ("GRU", {}, "hx must be a tensor, got dict"),
        ("RNNCell", {}, "hx must be a tensor, got dict"),
        ("GRU", [1, 2], "hx must be a tensor, got list of 2"),
        ("LSTM", {}, "hx must be a pair of tensors, got dict"),
        ("LSTM", "ab", "hx must be a pair of tensors, got str"),
        ("LSTM", (torch.zeros(1, B, H),), "hx must be a pair of tensors, got tuple of 1"),
        ("LSTM", (torch.zeros(1, B, H), None), "hx must be a pair of tensors, got Tensor and NoneType"),
        ("LSTMCell", (torch.zeros(B, H), None), r"hx\[1\] must be a tensor, got NoneType"),
        ("LSTMCell", torch.zeros(2, B, H), "Expected hx|hx must be a tuple of Tensors, not Tensor"),
    ],
    ids=str,
)
def test_what_is_not_a_state(kind: str, hx: Any, words: str) -> None:
    x = torch.zeros(B, I) if kind.endswith("Cell") else torch.zeros(T, B, I)
    with pytest.raises((AttributeError, TypeError, KeyError, IndexError), match=words):
        getattr(rnnkern.nn, kind)(I, H)(x, hx)


@pytest.mark.parametrize(
    ("kind", "words"), [("GRU", "a tensor or a PackedSequence, got NoneType"), ("LSTMCell", "a tensor, got NoneType")]
)
def test_what_is_not_an_input(kind: str, words: str) -> None:
    with pytest.raises(AttributeError, match=f"^input must be {words}$"):
        getattr(rnnkern.nn, kind)(I, H)(None)


@pytest.mark.parametrize("kind", ["GRU", "LSTM", "QuantizedGRU", "GRUCell", "LSTMCell"])
def test_what_is_not_an_input_of_a_step(kind: str) -> None:
    with pytest.raises(TypeError, match=r"^input must be a tensor, got NoneType$"):
        getattr(rnnkern.nn, kind)(I, H).eval().step(None)


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell", "QuantizedGRU"])
def test_pythons_own_words_name_the_public_class(kind: str) -> None:
    module = getattr(rnnkern.nn, kind)(I, H)
    with pytest.raises(TypeError, match=rf"^{kind}.forward\(\) missing 1 required positional argument: 'input'$"):
        module()
    with pytest.raises(TypeError, match=rf"^{kind}.step\(\) missing 1 required positional argument: 'input'$"):
        module.step()
    assert module.step.__doc__


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged, torch.sparse_coo, torch.sparse_csr], ids=str)
def test_an_input_that_is_not_dense(layout: torch.layout, batch_first: bool) -> None:
    if layout in (torch.strided, torch.jagged):
        x = torch.nested.nested_tensor([torch.randn(5, I), torch.randn(2, I)], layout=layout)
    else:
        x = torch.randn(5, 2, I).to_sparse(layout=layout)
    kind = "a nested tensor" if x.is_nested else f"layout {layout}"
    with pytest.raises(RuntimeError, match=rf"^input must be a dense tensor .*, got {kind}$"):
        rnnkern.nn.GRU(I, H, batch_first=batch_first)(x)


@pytest.mark.parametrize("warm", [False, True], ids=["ordinary route", "short call"])
def test_what_a_step_cannot_write(warm: bool) -> None:
    lstm, cell = rnnkern.nn.LSTM(I, H).eval(), rnnkern.nn.LSTMCell(I, H).eval()
    x = torch.randn(I)
    with torch.no_grad():
        for _ in range(3 if warm else 0):
            lstm.step(x)
            cell.step(x)
        for module, stacked in ((lstm, torch.ones(2, 1, H)), (cell, torch.ones(2, H))):
            for hx in (stacked, {0: stacked[0], 1: stacked[1]}, (*stacked, stacked[0])):
                if not (module is cell and isinstance(hx, dict)):
                    with pytest.raises(
                        TypeError, match="inplace=True writes into hx: it must be a pair of tensors, got "
                    ):
                        module.step(x, hx, inplace=True)
                    assert (stacked == 1).all()
        with pytest.raises(TypeError, match="out must be a tensor, got list"):
            lstm.step(x, out=[1])
