"""Small calls of every cell, dtype and engine, forward and backward: what compute-sanitizer watches.

Sizes are odd, so that tails are reached, and few, since a sanitized kernel takes a hundred times as long.
"""

import itertools
import sys

import torch

import rnnkern
from benchmarks.gpu.device import DEVICE, float32_products
from benchmarks.gpu.machine import CannotRun, need_kernels
from rnnkern._bench.cases import OURS, Case, modules, runner
from rnnkern.ops._dispatch import ENGINES

CELLS = ("lstm", "gru", "rnn_tanh")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SIZES = (  # T, B, I, H, and more
    (3, 3, 5, 20, {"bidirectional": True}),
    (4, 9, 16, 130, {"ragged": "packed"}),
    (2, 1, 8, 256, {}),
)


def run(case: Case) -> list[str]:
    """Runs a case by each engine, forward and backward; what ran and what was refused."""
    told = []
    function = runner(case, modules(case, DEVICE)[OURS], DEVICE)
    for engine in (None, *ENGINES):
        options = {} if engine is None else {"engine": engine}
        try:
            with rnnkern.backend("cuda", **options):
                function()
            torch.cuda.synchronize()
            told.append(engine or "automatic")
        except torch.AcceleratorError:
            raise
        except RuntimeError as error:
            told.append(f"not {engine}: {str(error).splitlines()[0]}")
    return told


def main() -> int:
    """Runs everything; the exit status."""
    try:
        need_kernels()
    except CannotRun as error:
        print(error, file=sys.stderr)
        return 2
    for cell, dtype, (T, B, I, H, more) in itertools.product(CELLS, DTYPES, SIZES):
        case = Case(cell, T, B, I, H, dtype=dtype, training=True, **more)
        for tf32 in (False, True) if dtype == torch.float32 else (True,):
            with float32_products(tf32):
                print(case.name, "tf32" if tf32 else "", *run(case), sep=" | ", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
