"""Small calls of every kernel of a backend: layers, stacks, cells, attention, the loss. What compute-sanitizer watches.

    python -m benchmarks.gpu.small cuda|triton

Sizes are odd, so that tails are reached, and few, since a sanitized kernel takes a hundred times as long.
"""

import argparse
import itertools
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

import rnnkern
from benchmarks.gpu.candidates import loaded_kernels
from benchmarks.gpu.device import DEVICE, float32_products
from benchmarks.gpu.machine import CannotRun, need_gpu
from rnnkern import _library, triton
from rnnkern._bench.cases import OURS, Case, modules, runner
from rnnkern.cells import CELLS as CELLS_OF
from rnnkern.ops import cuda_stack
from rnnkern.ops._dispatch import ENGINES, TRITON_ENGINES
from rnnkern.ops.cuda import step_workspace
from rnnkern.ops.step import attention_step, step
from rnnkern.triton import probe

BACKENDS = {"cuda": ENGINES, "triton": TRITON_ENGINES}
CELLS = ("lstm", "gru", "rnn_tanh", "rnn_relu")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SIZES = {  # T, B, I, H, and more; of Triton those that fit every engine
    "cuda": (
        (3, 3, 5, 20, {"bidirectional": True}),
        (4, 9, 16, 130, {"ragged": "packed"}),
        (2, 1, 8, 256, {}),
    ),
    "triton": (
        (3, 3, 5, 20, {"bidirectional": True}),
        (4, 18, 16, 40, {"ragged": "packed"}),
    ),
}
ATTENTION = ((1, 5, 17, 9), (1, 200, 64, 64), (6, 33, 17, 9), (70, 130, 64, 40))  # Tq, Tk, D, Dv
# Multiples of 16, as rows of logits have them in memory: what lies behind an odd V is read, and means nothing.
VOCABULARIES = (48, 4112)  # a block, and two with a tail


def missing(backend: str) -> str:
    """Why a backend can run nothing on a GPU, "" if it can."""
    return _library.missing["cuda"] if backend == "cuda" else probe.refusal(torch.device("cuda"))


def triton_kernels() -> list[str]:
    """The names of all kernels that rnnkern launches by Triton, which are those of their functions."""
    sources = (path.read_text() for path in sorted(Path(triton.__file__).parent.glob("*.py")))
    found = itertools.chain.from_iterable(re.findall(r"\blaunch\(\s*(?:\w+\.)?(\w+),", text) for text in sources)
    return sorted(set(found))


def layer_cases(backend: str) -> Iterator[Case]:
    """In every dtype; of Triton, which compiles them here, LSTM alone: a kernel takes its cell as an argument."""
    for cell, dtype, (T, B, I, H, more) in itertools.product(CELLS, DTYPES, SIZES[backend]):
        if backend == "cuda" or cell == "lstm" or dtype == torch.bfloat16:
            yield Case(cell, T, B, I, H, dtype=dtype, training=True, **more)


def run_layer(backend: str, device: str, case: Case) -> tuple[list[str], bool]:
    """Runs a case by each engine, forward and backward; what ran and what was refused, and whether that may be."""
    told, right = [], True
    function = runner(case, modules(case, device)[OURS], device)
    for engine in (None, *BACKENDS[backend]):
        try:
            with rnnkern.backend(backend, engine=engine):
                function()
            torch.cuda.synchronize()
            told.append(engine or "automatic")
        except rnnkern.BackendUnavailable as refusal:  # may be before Hopper: these sizes fit there
            told.append(f"not {engine}: {str(refusal).splitlines()[0]}")
            right = right and engine is not None and torch.cuda.get_device_capability() < (9, 0)
    return told, right


def run_steps(backend: str, device: str, dtype: torch.dtype) -> None:
    """Each cell without gradients, and with attention after it, twice with the same workspace: fused steps."""
    for name in CELLS:
        spec = CELLS_OF[name]
        for B, H in ((1, 40), (9, 33)):
            shapes = (B, 7), (B, H), (len(spec.gates) * H, 7), (len(spec.gates) * H, H)
            x, h, w_ih, w_hh = (torch.randn(*shape, device=device).to(dtype) for shape in shapes)
            c = torch.randn(B, H, device=device) if len(spec.states) == 2 else None
            weights = (w_ih, w_hh, *[None] * 6)
            key, value = (torch.randn(B, 70, n, device=device).to(dtype) for n in (H, 5))
            vector = torch.randn(H, device=device).to(dtype)
            workspace = step_workspace(key, value)
            with torch.no_grad(), rnnkern.backend(backend):
                step(name, x, h, c, weights)
                for score_vector in (None, vector, None):
                    attention_step(name, x, h, c, weights, key, value, vector=score_vector, workspace=workspace)


def run_stacks(backend: str, device: str, dtype: torch.dtype) -> None:
    """Two layers of one direction, side by side on two chunks of time, forward and backward."""
    before, cuda_stack.CHUNKS = cuda_stack.CHUNKS, 2
    try:
        for name, engine in itertools.product(CELLS, (None, "grid")):
            case = Case(name, 5, 3, 6, 20, layers=2, dtype=dtype, training=True)
            with rnnkern.backend(backend, engine=engine):
                runner(case, modules(case, device)[OURS], device)()
    finally:
        cuda_stack.CHUNKS = before


def run_attention(backend: str, device: str, dtype: torch.dtype) -> None:
    """Dot and additive scores, one query and several, few keys and many, both ways, with weights and lengths."""
    for Tq, Tk, D, Dv in ATTENTION:
        sizes = (2, Tq, D), (2, Tk, D), (2, Tk, Dv)
        q, k, v = (torch.randn(*size, device=device).to(dtype).requires_grad_() for size in sizes)
        vector = torch.randn(D, device=device).to(dtype).requires_grad_()
        lengths = torch.tensor([Tk, Tk // 2])
        for score in ("scaled_dot", rnnkern.functional.Additive(vector)):
            with rnnkern.backend(backend):
                context, weights = rnnkern.functional.attention(
                    q, k, v, score=score, lengths=lengths, need_weights=True
                )
                assert weights is not None
                (context.sum() + weights.square().sum()).backward()


def run_loss(backend: str, device: str, dtype: torch.dtype) -> None:
    """Losses that are summed and that stay apart, without gradients and with them, smoothed or not, one row ignored."""
    for V, reduction, smoothing in itertools.product(VOCABULARIES, ("mean", "none"), (0.0, 0.1)):
        x, weight, bias = (torch.randn(*size, device=device).to(dtype) for size in ((5, 8), (V, 8), (V,)))
        target = torch.randint(V, (5,), device=device)
        target[2] = -100
        options = {"linear_bias": bias, "reduction": reduction, "label_smoothing": smoothing}
        with rnnkern.backend(backend):
            rnnkern.functional.linear_cross_entropy(x, weight, target, **options)
            for tensor in (x, weight, bias):
                tensor.requires_grad_()
            rnnkern.functional.linear_cross_entropy(x, weight, target, **options).sum().backward()


def run_functions(backend: str) -> None:
    """All that is no layer."""
    for dtype in DTYPES:
        if backend == "cuda":
            run_steps(backend, DEVICE, dtype)
            run_stacks(backend, DEVICE, dtype)
        else:
            run_loss(backend, DEVICE, dtype)
        run_attention(backend, DEVICE, dtype)
        torch.cuda.synchronize()
        print(f"steps and stacks, or the loss; attention, in {dtype}", flush=True)


def run_all(backend: str) -> bool:
    """Runs everything; whether nothing was refused that should run."""
    run_functions(backend)
    right = True
    for case in layer_cases(backend):
        for tf32 in (False, True) if case.dtype == torch.float32 else (True,):
            with float32_products(tf32):
                told, expected = run_layer(backend, DEVICE, case)
                right = right and expected
                print(case.name, "tf32" if tf32 else "", *told, sep=" | ", flush=True)
    return right


def main() -> int:
    """The exit status: 1 where something was refused, or compute-sanitizer would not know a kernel by its name."""
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("backend", choices=BACKENDS)
    backend = top.parse_args().backend
    try:
        need_gpu()
        if why := missing(backend):
            raise CannotRun(f"no {backend} kernels: {why}")
    except CannotRun as error:
        print(error, file=sys.stderr)
        return 2
    with loaded_kernels() as loaded:
        right = run_all(backend)
    names = {name for kernels in loaded.values() for name in kernels}
    print(f"kernels by Triton: {', '.join(sorted(names)) or 'none'}")
    if unknown := sorted(names - set(triton_kernels())):
        print(f"not looked at, since their names are not known: {', '.join(unknown)}")
    return int(not right or bool(unknown))


if __name__ == "__main__":
    sys.exit(main())
