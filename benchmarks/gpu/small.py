"""Small calls of every kernel, in every dtype: layers, stacks, cells, attention. What compute-sanitizer watches.

Sizes are odd, so that tails are reached, and few, since a sanitized kernel takes a hundred times as long.
"""

import itertools
import sys

import torch

import rnnkern
from benchmarks.gpu.device import DEVICE, float32_products
from benchmarks.gpu.machine import CannotRun, need_kernels
from rnnkern._bench.cases import OURS, Case, modules, runner
from rnnkern.cells import CELLS as CELLS_OF
from rnnkern.ops import cuda_stack
from rnnkern.ops._dispatch import ENGINES
from rnnkern.ops.cuda import step_workspace
from rnnkern.ops.step import attention_step, step

CELLS = ("lstm", "gru", "rnn_tanh", "rnn_relu")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SIZES = (  # T, B, I, H, and more
    (3, 3, 5, 20, {"bidirectional": True}),
    (4, 9, 16, 130, {"ragged": "packed"}),
    (2, 1, 8, 256, {}),
)


def run_layer(case: Case) -> tuple[list[str], bool]:
    """Runs a case by each engine, forward and backward; what ran and what was refused, and whether that may be."""
    told, right = [], True
    function = runner(case, modules(case, DEVICE)[OURS], DEVICE)
    for engine in (None, *ENGINES):
        try:
            with rnnkern.backend("cuda", engine=engine):
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
    for Tq, Tk, D, Dv in ((1, 5, 17, 9), (1, 200, 64, 64), (6, 33, 17, 9), (70, 130, 64, 40)):
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


def main() -> int:
    """Runs everything; the exit status."""
    try:
        need_kernels()
    except CannotRun as error:
        print(error, file=sys.stderr)
        return 2
    failed = False
    for dtype in DTYPES:
        run_steps("cuda", DEVICE, dtype)
        run_stacks("cuda", DEVICE, dtype)
        run_attention("cuda", DEVICE, dtype)
        torch.cuda.synchronize()
        print(f"steps, stacks and attention in {dtype}", flush=True)
    for cell, dtype, (T, B, I, H, more) in itertools.product(CELLS, DTYPES, SIZES):
        case = Case(cell, T, B, I, H, dtype=dtype, training=True, **more)
        for tf32 in (False, True) if dtype == torch.float32 else (True,):
            with float32_products(tf32):
                told, right = run_layer(case)
                failed = failed or not right
                print(case.name, "tf32" if tf32 else "", *told, sep=" | ", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
