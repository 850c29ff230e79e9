"""What the fuzzer draws: plain data, so that the repr of a case is the code that makes it again."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers import ISAS

LAYERS = ("RNN", "LSTM", "GRU")
CELLS = ("RNNCell", "LSTMCell", "GRUCell")
SCORES = ("dot", "scaled_dot", "general", "additive")
LAYOUTS = ("plain", "reversed", "strided", "padded", "offset", "expanded", "overlapping")


@dataclass(frozen=True)
class Spec:
    """A tensor: every layout has values of its own, and NaN in what lies between and around them."""

    shape: tuple[int, ...]
    dtype: str = "float32"
    layout: str = "plain"
    grad: bool = False
    size: float = 1.0

    def make(self, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        shape, dtype, layout = self.shape, getattr(torch, self.dtype), self.layout if self.shape else "plain"
        values = torch.rand(shape, generator=generator, dtype=torch.float64) * (4 * self.size) - 2 * self.size
        values = values > 1 if dtype == torch.bool else values.to(dtype)
        hole = float("nan") if dtype.is_floating_point or dtype.is_complex else 1
        if layout == "reversed":
            order = tuple(reversed(range(len(shape))))
            values = values.permute(order).contiguous().permute(order)
        elif layout == "strided":
            values = torch.full((*shape[:-1], 2 * shape[-1]), hole, dtype=dtype)[..., ::2].copy_(values)
        elif layout == "padded":
            values = torch.full((*shape[:-1], shape[-1] + 3), hole, dtype=dtype)[..., : shape[-1]].copy_(values)
        elif layout == "offset":
            values = torch.full((values.numel() + 2,), hole, dtype=dtype)[1:-1].view(shape).copy_(values)
        elif layout == "expanded" and shape[0]:
            values = values[:1].expand(shape)
        elif layout == "overlapping" and len(shape) > 1 and values.numel():
            values = values.flatten().repeat(sum(shape))[: sum(shape)].clone().as_strided(shape, (1,) * len(shape))
        return values.requires_grad_(self.grad and (dtype.is_floating_point or dtype.is_complex))


@dataclass(frozen=True)
class Call:
    """One call of a module, and what is done to it before."""

    input: Spec
    hx: Any = None  # a Spec, or a tuple or list of them
    lengths: tuple[int, ...] | None = None  # the input is packed
    training: bool = True
    mode: str = "grad"  # or no_grad, inference
    change: str = ""
    seed: int = 0


@dataclass(frozen=True)
class ModuleCase:
    """A module of ours and torch's, built alike and called alike."""

    kind: str
    args: tuple[Any, ...]
    options: dict[str, Any] = field(default_factory=dict)
    calls: tuple[Call, ...] = ()
    threads: int = 1
    isa: str = ""


@dataclass(frozen=True)
class KeywordCase:
    """What torch's modules do not have, on the kernels and on the eager reference."""

    kind: str
    args: tuple[int, int]
    input: Spec
    options: dict[str, Any] = field(default_factory=dict)
    hx: Any = None
    lengths: Spec | tuple[int, ...] | None = None
    resets: Spec | None = None
    every_state: bool = False
    batch_sizes: tuple[int, ...] | None = None  # of a PackedSequence made by hand
    step: str | None = None  # "", "out", "inplace" or both: step is called, not the module
    out: Spec | None = None
    quantized: bool = False
    autocast: bool = False
    mode: str = "grad"
    calls: int = 1
    threads: int = 1
    isa: str = ""
    seed: int = 0


@dataclass(frozen=True)
class AttentionCase:
    """Attention on the kernels and on the eager reference, by a module or by the function."""

    score: str
    tensors: dict[
        str, Spec
    ]  # query, key and perhaps value, key_padding_mask and the function's parameters of the score
    lengths: tuple[int, ...] | Spec | None = None
    module: tuple[int, ...] | None = None  # its sizes; None: the function is called
    options: dict[str, Any] = field(default_factory=dict)  # of the module
    projected: bool = False  # the module has projected the keys before
    need_weights: bool = False
    nan: str = ""  # the tensor that has one in it, or "padding": keys and values where they are padding
    autocast: bool = False
    twice: bool = False  # a derivative of the gradients, too
    mode: str = "grad"
    calls: int = 1
    threads: int = 1
    isa: str = ""
    seed: int = 0


Case = ModuleCase | KeywordCase | AttentionCase


def mostly(usual: st.SearchStrategy[Any], *others: Any, one_in: int = 12) -> st.SearchStrategy[Any]:
    """The usual, and now and then one of the others."""
    return st.integers(0, one_in - 1).flatmap(lambda i: usual if i < one_in - 1 else st.sampled_from(others))


SIZES = st.one_of(st.integers(1, 9), st.sampled_from([15, 16, 17, 31, 32, 33, 48, 64, 65, 100]))
LENGTHS = st.one_of(st.integers(1, 6), st.sampled_from([15, 16, 17, 40]))
BATCHES = st.one_of(st.integers(1, 5), st.sampled_from([15, 16, 17, 18, 33]))
DTYPES = st.sampled_from(["float32"] * 4 + ["float64", "bfloat16", "float16"])
MODES = st.sampled_from(["grad", "grad", "no_grad", "inference"])
CHANGES = mostly(st.just(""), "neg_", "data", "load", "replace", "transpose", "freeze", "tie", "double", one_in=4)
ISA = st.sampled_from(["", *ISAS])
THREADS = st.sampled_from([1, 1, 2, 3])


@st.composite
def specs(draw: Any, shape: tuple[int, ...], dtype: str, written: bool = False) -> Spec:
    """Of about this shape and dtype; mostly such as may be written in place, if that is asked for."""
    wrong = draw(mostly(st.just(""), "size", "rank", "dtype", "more", one_in=40))
    if wrong == "size" and shape:
        at = draw(st.integers(0, len(shape) - 1))
        shape = (*shape[:at], max(0, shape[at] + draw(st.sampled_from([-1, 1, 7]))), *shape[at + 1 :])
    elif wrong == "rank":
        shape = shape[1:]
    elif wrong == "more":
        shape = (1, *shape)
    elif wrong == "dtype":
        dtype = draw(st.sampled_from(["float64", "float32", "float16", "int64", "bool", "complex64"]))
    layouts, grads = st.sampled_from(LAYOUTS), st.booleans()
    if written and draw(st.integers(0, 9)):
        layouts, grads = st.sampled_from(["plain", "offset"]), st.just(False)
    return Spec(shape, dtype, draw(st.one_of(st.just("plain"), layouts)), draw(grads))


@st.composite
def states(draw: Any, kind: str, shapes: tuple[tuple[int, ...], ...], dtype: str, written: bool = False) -> Any:
    """An hx: none, rarely if it is to be written in place, or one of about these shapes of h and c."""
    if draw(mostly(st.just(False), True, one_in=20) if written else st.booleans()):
        return None
    h, c = (specs(shape, dtype, written) for shape in shapes)
    if not kind.startswith("LSTM"):
        return draw(mostly(h, (Spec(shapes[0], dtype),), one_in=40))
    pair = draw(h), draw(c)
    return draw(mostly(st.just(pair), list(pair), pair[0], pair[:1], (*pair, pair[0]), (), one_in=12))


@st.composite
def options(draw: Any, kind: str, dtype: str) -> dict[str, Any]:
    """Arguments of a constructor besides the sizes, few of them wrong."""
    chosen: dict[str, Any] = {}
    if dtype != "float32":
        chosen["dtype"] = dtype
    if draw(st.booleans()):
        chosen["bias"] = draw(mostly(st.booleans(), None, 0, "no", one_in=40))
    if kind.startswith("RNN") and draw(st.booleans()):
        chosen["nonlinearity"] = draw(mostly(st.sampled_from(["tanh", "relu"]), "step", None, one_in=20))
    if kind in CELLS:
        return chosen | draw(mostly(st.just({}), {"num_layers": 2}, {"device": "nowhere"}, one_in=60))
    if draw(st.booleans()):
        chosen["num_layers"] = draw(mostly(st.integers(1, 3), 0, -1, 1.0, "2", None, one_in=20))
    for name in ("batch_first", "bidirectional"):
        if draw(st.booleans()):
            chosen[name] = draw(mostly(st.booleans(), 1, None, one_in=40))
    if draw(st.integers(0, 3)) == 0:
        chosen["dropout"] = draw(mostly(st.sampled_from([0, 0.0, 0.5, 1.0]), -0.1, 1.5, True, "1", None, one_in=8))
    if (kind == "LSTM" and draw(st.integers(0, 3)) == 0) or draw(st.integers(0, 60)) == 0:
        chosen["proj_size"] = draw(mostly(st.integers(0, 4), -1, 1000, 1.0, one_in=12))
    return chosen | draw(mostly(st.just({}), {"mode": "GRU"}, {"device": "nowhere"}, one_in=60))


def whole(value: Any, default: int) -> int:
    return value if type(value) is int and 0 <= value < 1000 else default


def state_shapes(kind: str, H: int, chosen: dict[str, Any], batch: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Of h and c."""
    P = whole(chosen.get("proj_size"), 0) or H
    rows = () if kind in CELLS else (whole(chosen.get("num_layers"), 1) * (2 if chosen.get("bidirectional") else 1),)
    return (*rows, *batch, P), (*rows, *batch, H)


@st.composite
def module_cases(draw: Any) -> ModuleCase:
    kind = draw(st.sampled_from(LAYERS * 2 + CELLS))
    I, H = draw(SIZES), draw(SIZES)
    dtype = draw(mostly(DTYPES, "complex64", "int32", one_in=60))
    chosen = draw(options(kind, dtype))
    args = draw(mostly(st.just((I, H)), (I,), (0, H), (I, 0), (I, -1), (-1, H), (I, 2.0), (I, "4"), (), one_in=30))
    calls = []
    for _ in range(draw(st.integers(1, 5))):
        batched = draw(mostly(st.just(True), False, one_in=5))
        batch = (draw(mostly(BATCHES, 0, one_in=20)),) if batched else ()
        time = () if kind in CELLS else (draw(mostly(LENGTHS, 0, one_in=30)),)
        packed = kind in LAYERS and batched and batch[0] and time[0] and draw(mostly(st.just(False), True, one_in=4))
        lengths = tuple(draw(st.integers(1, time[0])) for _ in range(batch[0])) if packed else None
        first = chosen.get("batch_first") and batched
        calls.append(
            Call(
                draw(specs((*batch, *time, I) if first else (*time, *batch, I), dtype)),
                draw(states(kind, state_shapes(kind, H, chosen, batch), dtype)),
                lengths,
                draw(st.booleans()),
                draw(MODES),
                draw(CHANGES),
                draw(st.integers(0, 9)),
            )
        )
    if draw(st.booleans()):  # a call again: then its weights are packed
        calls += [calls[-1]] * 2
    return ModuleCase(kind, args, chosen, tuple(calls), draw(THREADS), draw(ISA))


@st.composite
def own_options(draw: Any, kind: str) -> dict[str, Any]:
    """Of what constructors take besides torch's arguments, some."""
    choices: dict[str, st.SearchStrategy[Any]] = {}
    if kind.startswith("GRU"):
        choices["reset_after"] = st.booleans()
    if kind in LAYERS:
        limits = st.sampled_from([0.01, 0.3, 1e6])
        choices |= {"grad_clip": limits, "grad_clip_norm": limits}
        choices |= {"learn_initial_state": st.booleans(), "checkpoint_every": st.integers(1, 20)}
    return {name: draw(values) for name, values in choices.items() if draw(st.integers(0, 4)) == 0}


@st.composite
def keyword_cases(draw: Any) -> KeywordCase:
    kind = draw(st.sampled_from(LAYERS * 3 + CELLS))
    I, H, T, B = draw(SIZES), draw(SIZES), draw(LENGTHS), draw(mostly(BATCHES, 0, one_in=20))
    quantized = kind in LAYERS and draw(mostly(st.just(False), True, one_in=4))
    dtype = "float32" if quantized else draw(DTYPES)
    chosen: dict[str, Any] = {"bias": draw(st.booleans())}
    if dtype != "float32":
        chosen["dtype"] = dtype
    if kind.startswith("RNN"):
        chosen["nonlinearity"] = draw(st.sampled_from(["tanh", "relu"]))
    if kind in LAYERS:
        chosen["num_layers"] = draw(st.integers(1, 2))
        chosen["batch_first"] = draw(st.booleans())
    steps = st.sampled_from(["", "out", "inplace", "out inplace"])
    step = draw(steps) if kind in CELLS or draw(st.booleans()) else None
    if kind in LAYERS:
        chosen["bidirectional"] = draw(mostly(st.just(False), True, one_in=3 if step is None else 20))
    if kind == "LSTM" and not quantized and draw(st.integers(0, 5)) == 0:
        chosen["proj_size"] = 1 + H // 2 if H > 2 else 0
    if not quantized:
        chosen |= draw(own_options(kind))
    batched = draw(mostly(st.just(True), False, one_in=6))
    batch = (B,) if batched else ()
    time = () if step is not None else (T,)
    shape = (*batch, *time, I) if chosen.get("batch_first") and batched else (*time, *batch, I)
    case = KeywordCase(
        kind,
        (I, H),
        draw(specs(shape, dtype)),
        chosen,
        draw(states(kind, state_shapes(kind, H, chosen, batch), dtype, "inplace" in (step or ""))),
        step=step,
        quantized=bool(quantized),
        autocast=not quantized and kind in LAYERS and draw(mostly(st.just(False), True, one_in=8)),
        mode=draw(mostly(st.sampled_from(["no_grad", "inference"]), "grad", one_in=10) if quantized or step else MODES),
        calls=draw(st.sampled_from([1, 1, 3])),
        threads=draw(THREADS),
        isa=draw(ISA),
        seed=draw(st.integers(0, 9)),
    )
    if step is not None:
        out = draw(specs((*batch, H), dtype, written=True)) if "out" in step and kind in LAYERS else None
        return KeywordCase(**vars(case) | {"out": out})
    more: dict[str, Any] = {"every_state": draw(st.booleans())}
    if draw(st.booleans()):
        more["lengths"] = tuple(draw(st.integers(0, T)) for _ in range(B))
        wrong = (Spec((B,), "float32"), Spec((B, 1), "int64"), (T + 1,) * B, (-1,) * B, (2**62,) * B, (T,) * (B + 1))
        more["lengths"] = draw(mostly(st.just(more["lengths"]), *wrong, one_in=10))
    if draw(st.booleans()):
        right = Spec(shape[:-1], "bool", draw(st.sampled_from(LAYOUTS)))
        more["resets"] = draw(mostly(st.just(right), Spec(shape[:-1], "int64"), Spec((T + 1,), "bool"), one_in=10))
    if batched and draw(st.integers(0, 5)) == 0:
        more |= draw(mostly(st.just({"lengths": None, "resets": None}), {}, one_in=10))
        more["batch_sizes"] = tuple(draw(st.lists(st.integers(0, 6), min_size=draw(mostly(st.just(1), 0)), max_size=6)))
        if draw(mostly(st.just(True), False, one_in=4)):
            more["batch_sizes"] = tuple(sorted(more["batch_sizes"], reverse=True))
        rows = sum(more["batch_sizes"]) + draw(mostly(st.just(0), -1, 1, 5, one_in=8))
        more["input"] = Spec((max(rows, 0), I), dtype, case.input.layout, case.input.grad)
    return KeywordCase(**vars(case) | more)


@st.composite
def attention_cases(draw: Any) -> AttentionCase:
    score = draw(st.sampled_from(SCORES))
    Tk = draw(mostly(st.one_of(LENGTHS, SIZES), 0, 257, one_in=12))
    Tq, B = draw(mostly(LENGTHS, 0, one_in=15)), draw(mostly(BATCHES, 0, one_in=15))
    Dq, Dk, Dv, A = (draw(mostly(SIZES, 0, one_in=15)) for _ in range(4))
    if score in ("dot", "scaled_dot"):
        Dk = Dq
    dtype = draw(mostly(DTYPES, "complex64", "int32", one_in=60))
    shapes: dict[str, tuple[int, ...]] = {"query": draw(st.sampled_from([(B, Tq, Dq)] * 3 + [(B, Dq)]))}
    shapes["key"] = (B, Tk, Dk)
    if draw(st.booleans()):
        shapes["value"] = (B, Tk, Dv)
    sizes, chosen = None, {}
    if draw(st.booleans()):
        sizes = {"general": (Dq, Dk), "additive": (Dq, Dk, A)}.get(score, ())
        chosen = {"dtype": dtype} if dtype not in ("float32", "int32") and sizes else {}
        if score == "additive" and draw(st.booleans()):
            chosen["bias"] = draw(st.booleans())
    elif score == "general":
        shapes["weight"] = (Dq, Dk)
    elif score == "additive":
        shapes["vector"] = (A,)
        for name, weight, operand in (("query_weight", (A, Dq), "query"), ("key_weight", (A, Dk), "key")):
            if draw(st.booleans()):
                shapes[name] = weight
            else:  # it is projected already
                shapes[operand] = (*shapes[operand][:-1], A)
        if draw(st.booleans()):
            shapes["bias"] = (A,)
    tensors = {name: draw(specs(shape, dtype)) for name, shape in shapes.items()}
    if score == "additive":  # past 10, kernels compute another way
        tensors["query"] = replace(tensors["query"], size=draw(mostly(st.just(1.0), 0.0, 10.0, 1000.0, one_in=6)))
    lengths: Any = None
    padding = draw(st.sampled_from(["", "lengths", "mask"]))
    if padding == "lengths":
        right = tuple(draw(st.lists(st.integers(0, Tk), min_size=B, max_size=B)))
        wrong = (Spec((B,), "float32"), Spec((B, 1), "int64"), (Tk + 1,) * B, (-1,) * B, (2**62,) * B, (Tk,) * (B + 1))
        lengths = draw(mostly(st.just(right), *wrong, one_in=12))
    if padding == "mask" or draw(st.integers(0, 60)) == 0:
        tensors["key_padding_mask"] = draw(specs((B, Tk), "bool"))
    nan = draw(mostly(st.just(""), "padding", "padding", "query", "key", one_in=5))
    return AttentionCase(
        score,
        tensors,
        lengths,
        sizes,
        chosen,
        projected=sizes is not None and nan != "padding" and draw(st.booleans()),
        need_weights=draw(st.booleans()),
        nan=nan,
        autocast=draw(mostly(st.just(False), True, one_in=6)),
        twice=dtype in ("float32", "float64") and draw(mostly(st.just(False), True, one_in=4)),
        mode=draw(MODES),
        calls=draw(st.sampled_from([1, 1, 3])),
        threads=draw(THREADS),
        isa=draw(ISA),
        seed=draw(st.integers(0, 9)),
    )
