"""Attention by Triton, interpreted: outputs and all gradients against float64, for every score, dtype and padding."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import rnnkern
from rnnkern import triton as kernels
from rnnkern.ops.attention import OPERATORS, reference
from tests.attention_problem import PADDINGS, SCORES, Problem, make_problem
from tests.helpers import assert_as_accurate, assert_same_bits, error
from tests.test_recurrence import names
from tests.triton_launches import specialized

_why = kernels.missing_on("cpu")
pytestmark = [pytest.mark.skipif(bool(_why), reason=_why), pytest.mark.usefixtures("torch_poison")]

SHAPES = [
    (3, 1, 1, 1, 1),
    (2, 5, 7, 17, 3),
    (3, 1, 150, 20, 33),  # one query, three parts of keys
    (2, 3, 70, 40, 70),  # few queries
    (1, 67, 40, 20, 16),  # more queries than a tile
]  # B, Tq, Tk, D, Dv


def check(problem: Problem, dtype: torch.dtype) -> None:
    assert_as_accurate(problem.run("triton"), problem.run("plain", torch.float64), problem.run("plain"), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=names)
@pytest.mark.parametrize(("B", "Tq", "Tk", "D", "Dv"), SHAPES)
@pytest.mark.parametrize("score", SCORES)
def test_outputs_and_gradients(score: str, B: int, Tq: int, Tk: int, D: int, Dv: int, dtype: torch.dtype) -> None:
    """Each padding with some score, shape and dtype; lengths with all of one dtype."""
    padding = "lengths" if dtype == torch.float32 else PADDINGS[(SCORES.index(score) + Tk) % 3]
    check(make_problem(score, B, Tq, Tk, D, Dv, padding=padding, dtype=dtype), dtype)


@pytest.mark.parametrize("padding", ["none", "mask"])
@pytest.mark.parametrize("Tq", [1, 4])
@pytest.mark.parametrize("score", ["dot", "additive"])
def test_padding(score: str, Tq: int, padding: str) -> None:
    check(make_problem(score, 3, Tq, 67, 5, 6, padding=padding), torch.float32)


@pytest.mark.parametrize("score", ["dot", "additive"])
def test_more_parts_than_are_joined_at_a_time(score: str) -> None:
    check(make_problem(score, 1, 1, 1100, 5, 3), torch.float32)


@pytest.mark.parametrize("Tq", [1, 4])
@pytest.mark.parametrize("size", [9.9, 30.0])
def test_additive_guard(size: float, Tq: int) -> None:
    """Elements of +-size, some of which cancel: where the factored exponential would overflow, tanh is still right."""
    Tk = 70 if Tq > 1 else 9
    query, key = torch.randn(2, Tq, 33).sign() * size, torch.randn(2, Tk, 33).sign() * size
    query[:, 1::2] = torch.randn_like(query[:, 1::2])  # rows with and without large elements
    key[:, ::3] = torch.randn_like(key[:, ::3])
    key[1, :64], query[1] = 0.5, 0.5  # and whole tiles
    tensors = {"query": query, "key": key + torch.randn_like(key) * 0.5, "value": torch.randn(2, Tk, 5)}
    tensors["vector"] = torch.randn(33)

    def run(how: Callable[..., tuple[Tensor, Tensor]], to: torch.dtype) -> dict[str, Tensor]:
        inputs = {name: t.to(to, copy=True).requires_grad_() for name, t in tensors.items()}
        out = how(*inputs.values(), None, None, "additive", 1.0, *([True] if how is not reference else []))
        grads = torch.autograd.grad(out, list(inputs.values()), [torch.ones_like(o).cumsum(-1) for o in out])
        return {"context": out[0].detach(), "weights": out[1].detach()} | {f"d{n}": g for n, g in zip(inputs, grads)}

    expected, peer = run(reference, torch.float64), run(reference, torch.float32)
    assert_as_accurate(run(OPERATORS["triton"].attention, torch.float32), expected, peer, torch.float32)


@pytest.mark.parametrize("padding", ["lengths", "mask"])
@pytest.mark.parametrize("Tq", [1, 3])
@pytest.mark.parametrize(("score", "large"), [("dot", False), ("additive", False), ("additive", True)])
def test_padding_is_never_read(score: str, large: bool, Tq: int, padding: str) -> None:
    """Nor does a row without a valid key give anything but zeros. `large`: tiles of elements that are not factored."""
    B, Tk, D = 3, 9, 6
    problem = make_problem("dot", B, Tq, Tk, D, 5, padding=padding)
    tensors = problem.tensors | ({"vector": torch.randn(D)} if score == "additive" else {})
    if large:
        tensors["key"][..., 0] = 30.0
    if padding == "lengths":
        problem.padding["lengths"][0] = 4  # the keys of tiles that are flagged end amid them
    assert problem.is_padding()[0].any()

    def run() -> dict[str, Tensor]:
        inputs = {n: t.detach().requires_grad_() for n, t in tensors.items()}
        lengths, mask = (problem.padding.get(name) for name in ("lengths", "key_padding_mask"))
        vector = inputs.get("vector")
        out = OPERATORS["triton"].attention(*list(inputs.values())[:3], vector, lengths, mask, score, 0.5, True)
        grads = torch.autograd.grad(out, list(inputs.values()), (problem.dcontext, problem.dweights))
        return dict(zip(("context", "weights", *(f"d{n}" for n in inputs)), (*(o.detach() for o in out), *grads)))

    expected = run()
    for name, bad in (("key", torch.nan), ("value", torch.inf)):
        tensors[name][problem.is_padding()] = bad
    actual = run()
    assert_same_bits(actual, expected)
    of_rows = {name: value for name, value in actual.items() if name != "dvector"}
    assert all(value[1].eq(0).all() for value in of_rows.values())
    assert actual["dkey"][problem.is_padding()].eq(0).all()
    assert actual["dvalue"][problem.is_padding()].eq(0).all()


@pytest.mark.parametrize("Tq", [1, 3])
@pytest.mark.parametrize("score", ["dot", "additive"])
@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_nan_propagates(name: str, score: str, Tq: int) -> None:
    problem = make_problem(score, 2, Tq, 5, 4, 6)
    problem.tensors[name][1, Tq - 1, 3] = torch.nan
    touched = problem.run("triton")["context"].isnan().any(-1)
    expected = torch.zeros(2, Tq, dtype=torch.bool)
    expected[1, Tq - 1 if name == "query" else slice(None)] = True
    assert torch.equal(touched, expected)


@pytest.mark.parametrize("Tq", [1, 3])
@pytest.mark.parametrize("score", ["dot", "additive"])
def test_strides(score: str, Tq: int) -> None:
    """Time first, every other element, a gradient of stride zero; and what an alignment of 16 elements changes."""
    problem = make_problem(score, 3, Tq, 7, 16, 32)
    problem.dcontext = torch.ones(()).expand_as(problem.dcontext)
    expected = problem.run("triton")
    problem.tensors["query"] = problem.tensors["query"].transpose(0, 1).contiguous().transpose(0, 1)
    problem.tensors["key"] = torch.stack((problem.tensors["key"],) * 2, dim=3)[..., 0]
    problem.tensors["value"] = torch.cat((problem.tensors["value"],) * 2, dim=2)[..., 1:33].roll(1, 2)
    tensors = {name: t.requires_grad_() for name, t in problem.tensors.items()}
    with rnnkern.backend("triton"):
        context, weights = problem.attend(tensors)
    grads = torch.autograd.grad((context, weights), list(tensors.values()), (problem.dcontext, problem.dweights))
    actual = {"context": context, "weights": weights} | {f"d{name}": g for name, g in zip(tensors, grads)}
    assert all(error(value, expected[name]) < 1e-6 for name, value in actual.items())


def test_strides_beyond_32_bits() -> None:
    """In units of 16 elements a batch row's is within 32 bits; rows of one batch row are copied together."""
    import triton
    import triton.language as tl

    from rnnkern.triton.attention_call import rows_of
    from rnnkern.triton.attention_parts import batch_pointer, row_pointers

    def distances(out, b, batch, row, batch_pointer: tl.constexpr, row_pointers: tl.constexpr):  # type: ignore[no-untyped-def]
        start = tl.zeros((2,), tl.int64)
        first = tl.program_id(0).to(tl.int64) + b
        tl.store(out + tl.arange(0, 2), batch_pointer(start, first, batch, 16))
        tl.store(out + 2 + tl.arange(0, 2), row_pointers(start, first, tl.arange(0, 2) + 1, batch, row, 16))

    out = torch.zeros(4, dtype=torch.int64)
    triton.jit(distances)[(1,)](out, 3, 2**28, 2**26, batch_pointer, row_pointers)
    assert out.tolist() == [3 * 2**32, 3 * 2**32, 3 * 2**32 + 2**30, 3 * 2**32 + 2**31]
    far = torch.empty_strided((2, 3, 16), (2**33, 2**31, 1), device="meta")
    assert rows_of(far)[1:] == (48, 16)
    assert rows_of(far[:, :1])[1:] == (2**33, 0)


@pytest.mark.parametrize("Tq", [1, 3])
@pytest.mark.parametrize("score", ["dot", "additive"])
@pytest.mark.parametrize("given", ["context", "weights"])
def test_gradient_of_one_output(given: str, score: str, Tq: int) -> None:
    problem = make_problem(score, 2, Tq, 5, 6, 7)
    results: list[tuple[Any, ...]] = []
    for how in ("triton", "eager"):
        tensors = {name: t.detach().requires_grad_() for name, t in problem.tensors.items()}
        with rnnkern.backend(how):
            outputs = dict(zip(("context", "weights"), problem.attend(tensors)))
        cotangent = {"context": problem.dcontext, "weights": problem.dweights}[given]
        wanted = [t for name, t in tensors.items() if given == "context" or name != "value"]
        results.append(torch.autograd.grad(outputs[given], wanted, cotangent))
    assert all(error(a, b) < 2e-6 for a, b in zip(*results))


@pytest.mark.parametrize(
    ("B", "Tq", "Tk", "D", "Dv"), [(0, 2, 3, 4, 5), (2, 3, 0, 4, 5), (2, 0, 3, 4, 5), (2, 1, 0, 4, 5)]
)
@pytest.mark.parametrize("score", ["dot", "additive"])
def test_empty(score: str, B: int, Tq: int, Tk: int, D: int, Dv: int) -> None:
    results = make_problem(score, B, Tq, Tk, D, Dv).run("triton")
    assert results["context"].shape == (B, Tq, Dv)
    assert results["weights"].shape == (B, Tq, Tk)
    assert all(value.eq(0).all() for value in results.values())


@pytest.mark.parametrize("Tq", [1, 3])
def test_rows_without_columns(Tq: int) -> None:
    query, key, value = (torch.zeros(2, T, C, requires_grad=True) for T, C in ((Tq, 0), (5, 0), (5, 0)))
    with rnnkern.backend("triton"):
        context, weights = rnnkern.functional.attention(query, key, value, score="dot", need_weights=True)
    assert context.shape == (2, Tq, 0)
    assert torch.allclose(weights, torch.full((2, Tq, 5), 0.2))
    assert [g.shape for g in torch.autograd.grad(weights.sum() + context.sum(), (query, key, value))] == [
        t.shape for t in (query, key, value)
    ]


@pytest.mark.parametrize("score", ["dot", "additive"])
def test_chunks_of_rows_change_no_bit(score: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from rnnkern.triton import attention_call

    problem = make_problem(score, 3, 3, 9, 6, 5, padding="lengths")
    together = problem.run("triton")
    monkeypatch.setattr(attention_call, "_CHUNK_BYTES", 1)
    apart = problem.run("triton")
    for name in ("context", "weights", "dquery", "dkey", "dvalue"):
        assert torch.equal(apart[name], together[name]), name


@pytest.mark.parametrize(("score", "Tq"), [("dot", 1), ("additive", 2)])
def test_operators(score: str, Tq: int) -> None:
    """Schemas, fake kernels, autograd; and second derivatives, which go through the reference."""
    query, key, value = (torch.randn(2, T, 3, requires_grad=True) for T in (Tq, 4, 4))
    vector = torch.randn(3, requires_grad=True) if score == "additive" else None
    inputs = (query, key, value, vector, torch.tensor([4, 2]), None, score, 0.5, True)
    torch.library.opcheck(OPERATORS["triton"].attention, inputs)
    gradients = (torch.randn(2, Tq, 3), torch.randn(2, Tq, 4))
    torch.library.opcheck(OPERATORS["triton"].backward, (*gradients, *inputs[:-1]))

    tensors = {"query": query, "key": key, "value": value} | ({"vector": vector} if vector is not None else {})

    def second(how: Callable[..., tuple[Tensor, Tensor]], dtype: torch.dtype, *extra: bool) -> dict[str, Tensor]:
        wanted = {name: t.detach().to(dtype).requires_grad_() for name, t in tensors.items()}
        four = (*wanted.values(), *((None,) if vector is None else ()))
        cotangents = [g.to(dtype) for g in gradients]
        first = torch.autograd.grad(
            how(*four, *inputs[4:8], *extra), list(wanted.values()), cotangents, create_graph=True
        )
        return dict(zip(wanted, torch.autograd.grad([g.square().sum() for g in first], list(wanted.values()))))

    actual = second(OPERATORS["triton"].attention, torch.float32, True)
    assert_as_accurate(actual, second(reference, torch.float64), second(reference, torch.float32), torch.float32)


def test_refusals() -> None:
    problem = make_problem("dot", 1, 2, 3, 4, 5, dtype=torch.float64)
    with pytest.raises(rnnkern.BackendUnavailable, match="float64 is not supported by triton"):
        problem.run("triton")


def compiled_for(score: str, B: int, Tq: int, Tk: int, *, D: int = 20, Dv: int = 17) -> list[Any]:
    """What Triton compiles for, launch by launch."""
    from rnnkern.triton import attention, config, launch

    query, key, value = (torch.zeros(B, T, C, dtype=torch.float16) for T, C in ((Tq, D), (Tk, D), (Tk, Dv)))
    vector = query.new_zeros(D) if score == "additive" else None
    padding = torch.full((B,), Tk), torch.zeros(B, Tk, dtype=torch.bool)
    inputs = (query, key, value, vector, *padding, score, 0.5)
    with launch.recording(config.Facts("cuda", 132, 232448)) as found:
        attention.attention(*inputs, True)
        attention.attention_backward(query.new_empty(B, Tq, Dv), query.new_empty(B, Tq, Tk), *inputs)
    return list(map(specialized, found))


@pytest.mark.parametrize("score", ["dot", "additive"])
def test_new_lengths_compile_nothing_new(score: str) -> None:
    """Beyond what tells few queries and keys from many: a launch differs in numbers alone."""
    assert compiled_for(score, 3, 1, 100) == compiled_for(score, 16, 1, 1024)
    assert compiled_for(score, 3, 2, 100) == compiled_for(score, 16, 16, 1024)
    assert compiled_for(score, 3, 20, 100) == compiled_for(score, 2, 100, 300)


@pytest.mark.parametrize("score", ["dot", "additive"])
@pytest.mark.parametrize(("rows", "Tk", "D", "Dv"), [(21, 9, 5, 7), (1, 8, 24, 16)])
def test_chunks_of_rows_compile_nothing_new(
    score: str, rows: int, Tk: int, D: int, Dv: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever a chunk's lengths, mask and rows begin in memory."""
    from rnnkern.triton import attention, attention_call

    def different(found: list[Any]) -> set[str]:
        return set(map(repr, found))

    together = compiled_for(score, 40, 3, Tk, D=D, Dv=Dv)
    monkeypatch.setattr(attention_call, "_CHUNK_BYTES", rows)
    monkeypatch.setattr(attention, "pair_bytes", lambda call, backward: 1)
    apart = compiled_for(score, 40, 3, Tk, D=D, Dv=Dv)
    assert len(apart) >= 3 * len(together)
    assert different(apart) == different(together)


def test_explain_names_triton() -> None:
    problem = make_problem("dot", 2, 3, 5, 4, 6)
    with rnnkern.backend("triton"):
        told = rnnkern.explain(lambda: problem.attend(problem.tensors))
    assert told.layers[0].backend == "triton"
