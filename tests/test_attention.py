"""Attention on every backend against the float64 reference: scores, dtypes, padding, odd sizes, all gradients."""

import itertools
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import rnnkern
from rnnkern.functional import Additive, attention
from rnnkern.ops.attention import OPERATORS, reference
from tests.attention_problem import BACKENDS, EMULATED, KERNELS, PADDINGS, SCORES, make_problem
from tests.helpers import (
    DTYPES,
    ISAS,
    assert_as_accurate,
    assert_same_bits,
    error,
    instruction_set,
    needs_kernels,
    threads,
)

SHAPES = [
    (3, 1, 1, 1, 1),
    (2, 5, 7, 17, 3),
    (3, 1, 50, 100, 33),
    (2, 67, 50, 20, 16),
    (0, 2, 3, 4, 5),
]  # B, Tq, Tk, D, Dv


def names(value: object) -> str | None:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def skip_refused(backend: str, dtype: torch.dtype) -> None:
    if backend == "cuda-emulated" and dtype == torch.float64:
        pytest.skip("float64 is not supported by the CUDA kernels")


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize(("B", "Tq", "Tk", "D", "Dv"), SHAPES)
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("backend", KERNELS)
def test_outputs_and_gradients(
    backend: str, score: str, B: int, Tq: int, Tk: int, D: int, Dv: int, padding: str, dtype: torch.dtype
) -> None:
    skip_refused(backend, dtype)
    problem = make_problem(score, B, Tq, Tk, D, Dv, padding=padding, dtype=dtype)
    expected, peer = problem.run("plain", torch.float64), problem.run("plain")
    for isa in ISAS if backend == "cpu" else [rnnkern._library.extension.get_isa()]:
        with instruction_set(isa):
            assert_as_accurate(problem.run(backend), expected, peer, dtype)


@pytest.mark.parametrize("backend", KERNELS)
def test_large_scores_are_as_accurate_on_average(backend: str, isa: str) -> None:
    """Scores whose sums are long and large, where the factored exponential costs most: the mean error over many draws.

    The largest single error varies several times from one draw to the next, for torch as for us; the mean does not.
    """
    ours: dict[str, list[float]] = {}
    torchs: dict[str, list[float]] = {}
    for _ in range(12):
        problem = make_problem("additive", 3, 4, 50, 100, 33)
        problem.tensors["vector"] = torch.randn(103)
        expected, peer, actual = problem.run("plain", torch.float64), problem.run("plain"), problem.run(backend)
        for name in expected:
            ours.setdefault(name, []).append((actual[name] - expected[name]).abs().mean().item())
            torchs.setdefault(name, []).append((peer[name] - expected[name]).abs().mean().item())
    for name in ours:
        assert sum(ours[name]) <= 1.5 * sum(torchs[name]), name


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("score", SCORES)
def test_reference_is_as_accurate_as_torch(score: str, padding: str, dtype: torch.dtype) -> None:
    problem = make_problem(score, 3, 4, 7, 17, 5, padding=padding, dtype=dtype)
    assert_as_accurate(problem.run("eager"), problem.run("plain", torch.float64), problem.run("plain"), dtype)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("score", SCORES)
def test_more_keys_than_a_tile(score: str, backend: str) -> None:
    problem = make_problem(score, 2, 70, 300, 18, 20, padding="mask")
    assert_as_accurate(problem.run(backend), problem.run("plain", torch.float64), problem.run("plain"), torch.float32)


@needs_kernels
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("score", ["dot", "additive"])
def test_more_keys_than_are_summed_at_a_time(score: str) -> None:
    """In 16 bits, with several blocks of queries."""
    problem = make_problem(score, 1, 70, 1100, 18, 20, padding="mask", dtype=torch.bfloat16)
    problem.padding["key_padding_mask"][:] = torch.arange(1100) == 5
    assert_as_accurate(problem.run("cpu"), problem.run("plain", torch.float64), problem.run("plain"), torch.bfloat16)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=names)
@pytest.mark.parametrize("size", [9.9, 10.1, 30, 100])
@pytest.mark.parametrize("backend", KERNELS)
def test_additive_guard(backend: str, size: float, dtype: torch.dtype, isa: str) -> None:
    """Elements of +-size, some of which cancel: where the factored exponential would overflow, tanh is still right."""
    skip_refused(backend, dtype)
    query, key = torch.randn(2, 9, 33, dtype=dtype).sign() * size, torch.randn(2, 11, 33, dtype=dtype).sign() * size
    query[:, 1::2] = torch.randn(2, 4, 33, dtype=dtype)  # rows with and without large elements
    key[:, ::3] = torch.randn(2, 4, 33, dtype=dtype)
    key += torch.randn_like(key) * 0.5
    tensors = {"query": query, "key": key, "value": torch.randn(2, 11, 5, dtype=dtype)}
    tensors["vector"] = torch.randn(33, dtype=dtype)

    def run(how: Callable[..., tuple[Tensor, Tensor]], to: torch.dtype) -> dict[str, Tensor]:
        inputs = {name: t.to(to, copy=True).requires_grad_() for name, t in tensors.items()}
        out = how(*inputs.values(), None, None, "additive", 1.0, *([True] if how is not reference else []))
        grads = torch.autograd.grad(out, list(inputs.values()), [torch.ones_like(o).cumsum(-1) for o in out])
        return {"context": out[0].detach(), "weights": out[1].detach()} | {f"d{n}": g for n, g in zip(inputs, grads)}

    expected, peer = run(reference, torch.float64), run(reference, dtype)
    with rnnkern.backend(backend):  # loads it
        assert_as_accurate(run(OPERATORS[backend].attention, dtype), expected, peer, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("score", SCORES)
def test_non_contiguous(score: str, backend: str) -> None:
    problem = make_problem(score, 3, 4, 7, 10, 6)
    expected = problem.run(backend)
    strided = dict(problem.tensors)
    strided["query"] = strided["query"].transpose(0, 1).contiguous().transpose(0, 1)  # time first
    strided["key"] = torch.stack((strided["key"], strided["key"]), dim=3)[..., 0]  # every other element
    strided["value"] = strided["value"].mT.contiguous().mT
    with rnnkern.backend(backend):
        context, weights = problem.attend({name: t.requires_grad_() for name, t in strided.items()})
        dcontext = problem.dcontext.mT.contiguous().mT
        grads = torch.autograd.grad((context, weights), list(strided.values()), (dcontext, problem.dweights))
    for name, grad in zip(strided, grads):
        assert error(grad, expected[f"d{name}"]) < 1e-6
    assert error(context, expected["context"]) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("need_weights", [False, True])
def test_expanded_gradient(backend: str, need_weights: bool) -> None:
    """sum() sends a gradient of stride zero; weights that nothing uses send none."""
    problem = make_problem("additive", 2, 3, 4, 5, 6)
    problem.need_weights = need_weights
    problem.dcontext = torch.ones(())
    with rnnkern.backend(backend):
        tensors = {name: t.requires_grad_() for name, t in problem.tensors.items()}
        context, weights = problem.attend(tensors)
        assert (weights is not None) == need_weights
        grads = torch.autograd.grad(context.sum(), list(tensors.values()))
        plain = torch.autograd.grad(problem.plain(tensors)[0].sum(), list(tensors.values()))
    assert all(error(a, b) < 1e-5 for a, b in zip(grads, plain))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("padding", ["lengths", "mask"])
@pytest.mark.parametrize("score", SCORES)
def test_padding_is_never_read(score: str, padding: str, backend: str) -> None:
    problem = make_problem(score, 4, 3, 9, 6, 5, padding=padding)
    expected = problem.run(backend)
    if score in ("dot", "scaled_dot"):  # a projection of torch would mix NaN into the gradient of its weight
        for name, bad in (("key", math.nan), ("value", math.inf)):
            problem.tensors[name][problem.is_padding()] = bad
    actual = problem.run(backend)
    assert_same_bits(actual, expected)
    for name in ("context", "weights", "dquery", "dkey", "dvalue"):
        assert actual[name][1].eq(0).all(), name  # row 1 has no valid key
    assert actual["dvalue"][problem.is_padding()].eq(0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_nan_propagates(name: str, score: str, backend: str) -> None:
    problem = make_problem(score, 2, 3, 5, 4, 6)
    problem.tensors[name][1, 2, 3] = math.nan
    context = problem.run(backend)["context"]
    touched = context.isnan().any(-1)
    expected = torch.zeros(2, 3, dtype=torch.bool)
    expected[1] = torch.tensor([False, False, True]) if name == "query" else True
    assert torch.equal(touched, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("score", SCORES)
def test_no_keys(score: str, backend: str) -> None:
    results = make_problem(score, 2, 3, 0, 4, 5).run(backend)
    assert results["context"].shape == (2, 3, 5)
    assert results["weights"].shape == (2, 3, 0)
    assert all(value.eq(0).all() for value in results.values())


@pytest.mark.parametrize("Tq", [1, 7])
@pytest.mark.parametrize("score", ["dot", "scaled_dot"])
@pytest.mark.parametrize("backend", EMULATED)
def test_rows_do_not_depend_on_the_batch(backend: str, score: str, Tq: int) -> None:
    problem = make_problem(score, 5, Tq, 130, 17, 9, padding="lengths")
    together = problem.run(backend)
    for b in range(5):
        alone = make_problem(score, 1, Tq, 130, 17, 9)
        batch = {name: t[b : b + 1] for name, t in problem.tensors.items() if name in ("query", "key", "value")}
        alone.tensors = problem.tensors | batch
        alone.padding = {"lengths": problem.padding["lengths"][b : b + 1]}
        actual = alone.run(backend)
        assert torch.equal(actual["context"], together["context"][b : b + 1])
        assert torch.equal(actual["weights"], together["weights"][b : b + 1])


@pytest.mark.parametrize("backend", EMULATED)
def test_float64_is_refused(backend: str) -> None:
    problem = make_problem("dot", 1, 2, 3, 4, 5, dtype=torch.float64)
    with pytest.raises(rnnkern.BackendUnavailable, match=r"float64 is not supported by cuda-emulated kernels"):
        problem.run(backend)


@needs_kernels
@pytest.mark.parametrize(("B", "Tq", "Tk"), [(1, 41, 120), (3, 41, 120), (1, 1, 8000), (1, 70, 130)])
@pytest.mark.parametrize("score", SCORES)
def test_threads_change_no_bit(score: str, B: int, Tq: int, Tk: int, isa: str) -> None:
    problem = make_problem(score, B, Tq, Tk, 64, 40, padding="mask" if B > 1 else "none")
    results = []
    for count in (1, 2, 3):
        with threads(count):
            tensors = {name: t.detach().requires_grad_() for name, t in problem.tensors.items()}
            # The projections are torch's; only the operator's own results are compared.
            query, key = tensors["query"], tensors["key"][..., : tensors["query"].shape[2]]
            vector = tensors["query"][0, 0].detach().clone().requires_grad_() if score == "additive" else None
            inputs = [query, key, tensors["value"], *([vector] if vector is not None else [])]
            kind = "additive" if score == "additive" else "dot"
            mask = problem.padding.get("key_padding_mask")
            out = torch.ops.rnnkern.attention(query, key, tensors["value"], vector, None, mask, kind, 0.3, True)
            grads = torch.autograd.grad(out, inputs, (problem.dcontext, problem.dweights))
            results.append({str(i): t.detach() for i, t in enumerate((*out, *grads))})
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


@needs_kernels
@pytest.mark.parametrize("Tq", [1, 3, 9, 70])
@pytest.mark.parametrize("score", ["dot", "additive"])
def test_avx2_and_avx512_agree_to_the_bit(score: str, Tq: int) -> None:
    supported = [name for name in ("avx2", "avx512") if name in rnnkern._library.extension.supported_isas()]
    if len(supported) < 2:
        pytest.skip("needs AVX-512")
    problem = make_problem(score, 2, Tq, 30, 40, 20)
    results = []
    for name in supported:
        with instruction_set(name):
            results.append(problem.run("cpu"))
    assert_same_bits(*results)


@pytest.mark.parametrize("score", ["dot", "additive"])
def test_value_size_and_default(score: str) -> None:
    query, key = torch.randn(2, 3, 4), torch.randn(2, 5, 4)
    kind = Additive(torch.randn(4)) if score == "additive" else score
    assert torch.equal(attention(query, key, score=kind)[0], attention(query, key, key, score=kind)[0])


# Imports once, and measures each line of its input in a child, which has run nothing yet.
PEAK = """
import ctypes, os, re, sys
from pathlib import Path
import torch
import rnnkern
from rnnkern.functional import Additive, attention
def run(score, dtype, B, Tq, Tk, A):
    options = dict(dtype=getattr(torch, dtype), requires_grad=True)
    q, k, v = (torch.randn(B, T, A, **options) for T in (Tq, Tk, Tk))
    kind = Additive(torch.randn(A, **options)) if score == "additive" else score
    context, _ = attention(q, k, v, score=kind)
    context.backward(torch.ones_like(context))
    return sum(2 * t.numel() for t in (q, k, v, context)) * q.element_size() / 2**20
def status(field):
    return int(re.search(field + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024
def measure(backend, score, dtype, *sizes):
    torch.set_num_threads(2)
    with rnnkern.backend(backend):
        run(score, dtype, 1, 4, 4, 8)
        ctypes.CDLL(None).malloc_trim(0)
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts here, not at what the parent had
        except OSError:
            return "unknown"
        before = status("VmRSS")
        tensors = run(score, dtype, *map(int, sizes))
        return status("VmHWM") - before - tensors
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        print(measure(*line.split()), flush=True)
        os._exit(0)
    print("ended with", os.waitpid(child, 0)[1], flush=True)
"""


@pytest.fixture(scope="module")
def peak_mib() -> Iterator[Callable[..., float]]:
    """MiB beyond inputs, output and their gradients, of forward and backward at B, Tq, Tk, A on two threads."""
    command = [sys.executable, "-u", "-c", PEAK]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, text=True, **pipes) as program:
        asks, tells = program.stdin, program.stdout
        assert asks is not None
        assert tells is not None

        def measure(backend: str, score: str, *sizes: int, dtype: str = "float32") -> float:
            print(backend, score, dtype, *sizes, file=asks, flush=True)
            told = list(itertools.takewhile(lambda line: not line.startswith("ended with"), tells))
            assert len(told) == 1, "".join(told)
            if told == ["unknown\n"]:
                pytest.skip("the system does not let a process reset its peak")
            return float(told[0])

        yield measure
        asks.close()


@needs_kernels
@pytest.mark.parametrize("score", ["dot", "additive"])
@pytest.mark.parametrize(
    ("dtype", "B", "Tq", "Tk", "A"),
    [
        ("float32", 4, 200, 200, 512),  # B Tq Tk A floats: 313 MiB; scratch per thread: 1.5 MiB
        ("float32", 2, 64, 4000, 512),  # a panel of all keys and values: 16 MiB per thread; scratch: 3.9 MiB
        ("float32", 2, 1, 8000, 512),  # the same: 31 MiB; scratch: 0.2 MiB
        ("float32", 1, 64, 4000, 512),  # shared by the threads
        ("float32", 8000, 1, 2, 512),  # a sum of dL/dvector for each row of the batch: 16 MiB; scratch: 0.1 MiB
        ("bfloat16", 2, 128, 4000, 1024),  # gradients of keys and values in float: 31 MiB per thread; scratch: 12 MiB
    ],
)
def test_peak_memory(score: str, dtype: str, B: int, Tq: int, Tk: int, A: int, peak_mib: Callable[..., float]) -> None:
    """Two threads' scratch, and 4 MiB for what the process itself takes."""
    queries, tile = min(Tq, 64), min(256, Tk) if Tq > 8 else 0
    scratch = 2 * queries * Tk + 4 * tile * A + 5 * queries * A + 40 * A  # floats
    if dtype == "bfloat16":
        scratch += 2 * 1024 * A
    assert peak_mib("cpu", score, B, Tq, Tk, A, dtype=dtype) < 2 * scratch * 4 / 2**20 + 4


def test_peak_memory_is_seen(peak_mib: Callable[..., float]) -> None:
    assert peak_mib("eager", "additive", 4, 200, 200, 512) > 313
