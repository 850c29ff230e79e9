"""What the report measures: every row, by name, and the functions that a row compares."""

import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch

from benchmarks.attention import AttentionCase
from benchmarks.loss import LossCase
from benchmarks.peers import TOLERANCES, Build, check_agreement, recurrence_builders, tolerance
from benchmarks.runtimes import PeerUnavailable
from rnnkern._bench.cases import Case

# T, B, H; input size = H. Each in both cells, forward and training.
GRU_LSTM = [
    (1, 1, 64),
    (1, 1, 256),
    (1, 1, 512),
    (7, 100, 256),
    (100, 1, 256),
    (100, 1, 512),
    (100, 1, 1024),
    *((100, B, 256) for B in (2, 4, 8, 12, 32, 48)),
    *((100, 32, H) for H in (100, 200, 320, 650)),
    (100, 64, 512),
    (50, 64, 1024),
    (1000, 1, 128),
    (1000, 16, 128),
    (2000, 1, 128),
]
OTHER_INPUT = [(100, 32, 80, 256), (100, 32, 512, 128)]  # T, B, I, H
RNN = [(100, 1, 256), (100, 32, 256), (100, 64, 512), (1000, 1, 128)]
# T, B, H; forward only.
LOW_PRECISION = {
    torch.bfloat16: [(100, 32, 256), (100, 64, 512), (50, 64, 1024), (100, 1, 512), (100, 1, 1024)],
    torch.float16: [(100, 32, 256), (100, 1, 512)],
    torch.int8: [(100, B, H) for H in (512, 1024) for B in (1, 2, 4, 8)],
}
# N, V, D: a small call, many rows of few classes, a word vocabulary, GPT-2's 50257 (rows of logits start anywhere).
LOSS = [(64, 1000, 128), (4096, 1000, 1024), (1024, 10000, 256), (512, 50257, 256)]
LOSS_BFLOAT16 = [LOSS[0], *LOSS[2:]]
SMOKE = (
    "lstm-T1-B1-H256-eval",
    "gru-T100-B1-H256-eval",
    "lstm-T100-B8-H256-train",
    "rnn_tanh-T100-B32-H256-train",
    "lstm-T100-B32-H256-packed-eval",
    "gru-T100-B32-H256-bfloat16-eval",
    "lstm-cell-B64-H256-eval",
    "additive-B32-Tq1-Tk50-D512-train",
    "dot-B32-Tq50-Tk50-D512-eval",
    "loss-N1024-V10000-D256-train",
)

Row = Case | AttentionCase | LossCase


def all_rows() -> Iterator[Row]:
    """Every row. Training first: torch's time depends on what the process did before, least on this fixed order."""
    for row in _both_modes():
        yield replace(row, training=True)
    yield from _both_modes()
    for dtype, sizes in LOW_PRECISION.items():
        for T, B, H in sizes:
            for cell in ("gru", "lstm"):
                yield Case(cell, T, B, H, H, dtype=dtype)


def _both_modes() -> Iterator[Row]:
    for T, B, H in GRU_LSTM:
        for cell in ("gru", "lstm"):
            yield Case(cell, T, B, H, H)
    for cell in ("gru", "lstm"):
        for T, B, I, H in OTHER_INPUT:
            yield Case(cell, T, B, I, H)
    for cell in ("gru", "lstm"):
        yield Case(cell, 100, 32, 256, 256, layers=2, bidirectional=True)
    for T, B, H in RNN:
        yield Case("rnn_tanh", T, B, H, H)
    for cell in ("gru", "lstm"):
        for ragged in ("lengths", "packed"):
            yield Case(cell, 100, 32, 256, 256, ragged=ragged)
    for cell in ("rnn_tanh", "gru", "lstm"):
        for B in (1, 64, 256):
            yield Case(cell, 1, B, 256, 256, single_step=True)
    for score in ("additive", "dot", "general"):
        for Tq in (1, 50):
            yield AttentionCase(score, 32, Tq, 50, 512)
    for B, Tq, Tk, D in ((32, 50, 50, 64), (8, 200, 500, 64)):
        for need_weights in (False, True):
            yield AttentionCase("scaled_dot", B, Tq, Tk, D, need_weights=need_weights)
    for N, V, D in LOSS:
        yield LossCase(N, V, D)
    yield LossCase(*LOSS[2], padding=0.3)
    for N, V, D in LOSS_BFLOAT16:
        yield LossCase(N, V, D, dtype=torch.bfloat16)


def row_builders(row: Row) -> dict[str, Build]:
    """What builds each implementation of the row, ours first; PeerUnavailable where it cannot run here."""
    return recurrence_builders(row) if isinstance(row, Case) else row.builders()


def row_runners(row: Row) -> dict[str, Callable[[], object]]:
    """What to compare in this row, ours first. A peer that cannot run here is left out, which is said once."""
    found = {}
    for name, build in row_builders(row).items():
        try:
            found[name] = build()
        except PeerUnavailable as error:
            _say_once(f"{name} is left out: {error}")
    return found


def check_row(row: Row, functions: Mapping[str, Callable[[], object]]) -> None:
    """Raises PeerDisagrees unless all functions of the row compute the same."""
    if isinstance(row, Case):
        check_agreement(row.name, functions, {name: tolerance(row, name) for name in functions})
    else:
        check_agreement(row.name, functions, dict.fromkeys(functions, TOLERANCES[row.dtype]))


@functools.cache
def _say_once(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
