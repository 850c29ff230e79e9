"""Attention and the loss over a vocabulary on a GPU: ours by each backend, against torch's own ways to the same."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch

import rnnkern
from benchmarks.attention import COMPILED, EAGER, SDPA, AttentionCase
from benchmarks.gpu.candidates import CUDA, TRITON, Function, Tried, disagreements, forced, times_of, try_all, wrong_in
from benchmarks.gpu.device import DEVICE, DeviceClock, float32_products, peak_mib
from benchmarks.loss import LossCase
from benchmarks.peers import TOLERANCES
from benchmarks.runtimes import PeerUnavailable
from rnnkern._bench.cases import OURS
from rnnkern._bench.timing import compare

Case = AttentionCase | LossCase
ATTENTION = (
    (32, 1, 50, 512),
    (64, 1, 1000, 512),
    (32, 50, 50, 512),
    (64, 50, 1000, 512),
    (8, 200, 500, 64),
)  # B, Tq, Tk, D
SCORES = ("additive", "scaled_dot")
LOSS = (
    (1024, 10_000, 512),
    (8192, 32_000, 512),
    (8192, 50_257, 768),
    (8192, 128_000, 1024),
)  # N, V, D
DTYPES = (torch.bfloat16, torch.float32, torch.float16)
COMPILED_DTYPE = torch.bfloat16  # torch.compile takes seconds for each row


def attention_cases() -> Iterator[AttentionCase]:
    """Every row, by dtype."""
    for dtype in DTYPES:
        for size in ATTENTION:
            for score in SCORES:
                for training in (False, True):
                    yield AttentionCase(score, *size, training=training, dtype=dtype, device=DEVICE)


def loss_cases() -> Iterator[LossCase]:
    """Every row, by dtype."""
    for dtype in (torch.bfloat16, torch.float32):
        for size in LOSS:
            for training in (False, True):
                yield LossCase(*size, training=training, dtype=dtype, device=DEVICE)


def builders(case: Case) -> dict[str, Callable[[], Function]]:
    """What builds each implementation, ours first: by the backends that have it, then as it is chosen."""
    found = case.builders()
    if case.dtype != COMPILED_DTYPE:
        found[COMPILED] = compile_nothing
    backends = {CUDA: "cuda", TRITON: "triton"} if isinstance(case, AttentionCase) else {TRITON: "triton"}
    ours = {name: lambda backend=backend: forced(found[OURS](), backend) for name, backend in backends.items()}
    return {**ours, **found}


def compile_nothing() -> Function:
    raise PeerUnavailable(f"rows of {COMPILED_DTYPE} alone are compiled")


def note_choice(tried: Tried) -> dict[str, str]:
    """What was chosen for ours; where that is the eager formula once more it is left out."""
    if OURS not in tried.running:
        return {}
    notes = rnnkern.explain(tried.running[OURS]).layers
    if notes and notes[0].backend == "eager":
        tried.refuse(OURS, f"eager: {notes[0].why}")
        return {}
    return {"choice": str(notes[0])} if notes else {}


def measure(case: Case, clock: DeviceClock, seconds: float) -> dict[str, Any]:
    """One row of the results. Products of float32 are not rounded to TF32."""
    torch._dynamo.reset()  # else it stops compiling after the eighth shape
    with float32_products(False), torch.set_grad_enabled(case.training):
        tried = try_all(builders(case))
        chosen = note_choice(tried)
        functions = tried.running
        facts = {**dataclasses.asdict(case), "dtype": str(case.dtype).removeprefix("torch.")}
        result: dict[str, Any] = {"case": facts, **tried.facts(), **chosen}
        if not functions:
            return result
        # The eager formula needs most memory: where there is too little, another speaks for it.
        reference = next(name for name in (EAGER, SDPA, COMPILED, *functions) if name in functions)
        result["disagrees"] = disagreements(case.name, functions, reference, TOLERANCES[case.dtype])
        result["peak_mib"] = {name: peak_mib(function) for name, function in functions.items()}
        times = compare(functions, seconds=seconds, run=clock, sample_seconds=0.0, max_rounds=50)
    device_seconds = {name: times.median(name) for name in functions}
    return result | {
        "seconds": device_seconds,
        "host_bound": clock.host_bound(device_seconds, functions),
        "ratio": {peer: times.ratio(peer, OURS) for peer in functions if peer != OURS and OURS in functions},
        "triton_ratio": {who: times.ratio(who, TRITON) for who in functions if who != TRITON and TRITON in functions},
        "rounds": len(times.samples[reference]),
    }


def line(name: str, row: dict[str, Any]) -> str:
    """A row for the terminal."""
    if "seconds" not in row:
        return f"{name}: {row.get('failed') or row['broken'] or row['refused']}"
    ratio = f"{row['ratio'][EAGER]:.2f}x {EAGER}, " if EAGER in row["ratio"] else ""
    return f"{name}: {ratio}us {times_of(row)}; left out: {row['refused'] or 'none'}{wrong_in(row)}"
