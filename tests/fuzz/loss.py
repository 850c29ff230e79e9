"""The fuzzer's cases of `linear_cross_entropy`, and what must hold of them: torch's two functions in float64."""

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from rnnkern.functional import linear_cross_entropy
from rnnkern.ops import cross_entropy
from rnnkern.ops import linear_cross_entropy as loss_ops
from tests.fuzz.cases import DTYPES, LAYOUTS, MODES, SIZES, THREADS, Spec, mostly
from tests.fuzz.checks import (
    CHECKS,
    assert_same,
    backward,
    backward_twice,
    brief,
    guarded,
    tolerances,
)


@dataclass(frozen=True)
class LossCase:
    """`linear_cross_entropy`, and torch's two functions in float64."""

    tensors: dict[str, Spec]  # input, linear_weight and perhaps linear_bias
    target: Spec  # its values are random classes
    ignored: str = ""  # of the rows: "", "some" or "all"
    options: dict[str, Any] = field(default_factory=dict)  # reduction, ignore_index, label_smoothing
    rows: int = 0  # of a chunk, by force; 0: what the library chooses
    block: int = 2**20  # logits of a block of the CPU's softmax
    wrong: str = ""  # what is wrong about it: the function is to raise
    autocast: bool = False
    twice: bool = False  # a derivative of the gradients, too
    mode: str = "grad"
    threads: int = 1
    isa: str = ""
    seed: int = 0


@st.composite
def loss_cases(draw: Any) -> LossCase:
    N, D, V = draw(mostly(SIZES, 0, 300, one_in=12)), draw(mostly(SIZES, 0, one_in=15)), draw(SIZES)
    if draw(st.integers(0, 80)) == 0:  # more than the reference is left
        N, V = 300, draw(st.sampled_from([4000, 15000]))
    batch = draw(st.sampled_from([(N,)] * 3 + [(1, N), (N, 2), ()]))
    dtype = draw(DTYPES)
    shapes = {"input": (*batch, D), "linear_weight": (V, D), "linear_bias": (V,)}
    target, more = batch, {}
    wrong = draw(mostly(st.just(""), *shapes, "target", "classes", "dtype", "label_smoothing", "class", one_in=10))
    if wrong in shapes:
        shapes[wrong] = draw(
            st.sampled_from([(*shapes[wrong][:-1], shapes[wrong][-1] + 1), (2, *shapes[wrong], 3), ()])
        )
    elif wrong == "target":
        target = draw(st.sampled_from([(*batch, 2), (*batch[:-1], N + 1)]))
    elif wrong == "label_smoothing":
        more = {"label_smoothing": draw(st.sampled_from([-0.1, 1.5]))}
    dtypes = dict.fromkeys(shapes, dtype)
    if wrong == "dtype":
        dtypes[draw(st.sampled_from(sorted(shapes)))] = "float64" if dtype != "float64" else "float32"
    if not wrong and draw(st.booleans()):
        del shapes["linear_bias"]
    layouts = st.one_of(st.just("plain"), st.sampled_from(LAYOUTS))
    specs = {name: Spec(shape, dtypes[name], draw(layouts), draw(st.booleans())) for name, shape in shapes.items()}
    options = {"reduction": draw(st.sampled_from(["mean", "sum", "none"]))}
    options["label_smoothing"] = draw(st.sampled_from([0.0, 0.0, 0.1, 1.0]))
    if draw(st.booleans()):
        options["ignore_index"] = draw(st.sampled_from([0, V - 1, -1, V]))
    rows = draw(st.one_of(st.just(0), st.integers(1, 9), st.sampled_from([max(N - 1, 1), max(N, 1), N + 1])))
    classes = draw(st.sampled_from(["int32", "float32", "bool"])) if wrong == "classes" else "int64"
    return LossCase(
        specs,
        Spec(target, classes, draw(st.sampled_from(["plain", "reversed", "strided", "padded", "offset"]))),
        draw(st.sampled_from(["", "some", "some", "all"])),
        options | more,
        rows=rows,
        block=draw(st.sampled_from([1, V, 3 * V, 2**20])),
        wrong=wrong,
        autocast=wrong == "" and draw(mostly(st.just(False), True, one_in=6)),
        twice=dtype in ("float32", "float64") and N < 300 and draw(mostly(st.just(False), True, one_in=4)),
        mode=draw(MODES),
        threads=draw(THREADS),
        seed=draw(st.integers(0, 9)),
    )


def check_loss(case: LossCase) -> None:
    """Values and gradients are those in float64; dtypes, and what requires a gradient, those of torch in that dtype."""
    functions = {"ours": linear_cross_entropy, "torch": two_functions, "float64": two_functions}
    inputs = {name: loss_arguments(case, torch.float64 if name == "float64" else None) for name in functions}
    calls = {name: functools.partial(f, **inputs[name], **case.options) for name, f in functions.items()}
    with chunks(case):
        ours = guarded(calls["ours"], inputs["ours"], [], case, "cpu" if case.rows else "")
        if case.wrong:
            expected = IndexError if case.wrong == "class" else RuntimeError
            assert isinstance(ours, expected), f"wrong {case.wrong}: {brief(ours)}"
            return
        peer = guarded(calls["torch"], inputs["torch"], [], case, "")
        exact = guarded(calls["float64"], inputs["float64"], [], replace(case, autocast=False), "")
        assert all(isinstance(result, Tensor) for result in (ours, peer, exact)), [brief(ours), brief(peer)]
        outputs, gradients = tolerances(case)
        assert ours.requires_grad == peer.requires_grad, f"requires a gradient: {ours.requires_grad}"
        assert_same(ours, exact.to(peer.dtype), outputs, "the loss")
        step = functools.partial(backward_twice, inputs=inputs["ours"]) if case.twice else backward
        step([ours])
    step = functools.partial(backward_twice, inputs=inputs["float64"]) if case.twice else backward
    step([exact])
    for name, tensor in inputs["ours"].items():
        expected = inputs["float64"][name].grad
        assert_same(
            tensor.grad, expected if expected is None else expected.to(tensor.dtype), gradients, f"gradient of {name}"
        )


def two_functions(
    input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None = None, **options: Any
) -> Tensor:
    logits = torch.nn.functional.linear(input, linear_weight, linear_bias).reshape(target.numel(), len(linear_weight))
    loss = torch.nn.functional.cross_entropy(logits, target.reshape(-1), **options)
    return loss.view(target.shape) if options["reduction"] == "none" else loss


def loss_arguments(case: LossCase, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The tensors, floats of another dtype on demand."""
    made = {name: spec.make(case.seed + i) for i, (name, spec) in enumerate(case.tensors.items())}
    if dtype is not None:
        made = {name: t.detach().to(dtype).requires_grad_(t.requires_grad) for name, t in made.items()}
    generator = torch.Generator().manual_seed(case.seed)
    shape, target = case.target.shape, case.target.make(case.seed)
    V = (*case.tensors["linear_weight"].shape, 1)[0]
    classes = torch.randint(V, shape, generator=generator)
    if case.ignored:
        chosen = torch.rand(shape, generator=generator) < (2 if case.ignored == "all" else 0.4)
        classes[chosen] = case.options.get("ignore_index", -100)
    if case.wrong == "class":
        classes.view(-1)[:1] = V + 1
    return made | {"target": target.copy_(classes)}


@contextlib.contextmanager
def chunks(case: LossCase) -> Iterator[None]:
    """Chunks and blocks of the case's sizes."""
    rows, block = loss_ops.chunk_rows, cross_entropy.BLOCK
    cross_entropy.BLOCK = case.block
    if case.rows:
        loss_ops.chunk_rows = lambda *_: case.rows
    try:
        yield
    finally:
        loss_ops.chunk_rows, cross_entropy.BLOCK = rows, block


CHECKS[LossCase] = check_loss
