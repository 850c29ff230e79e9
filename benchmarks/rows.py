"""What the report measures: every row, by name."""

from collections.abc import Callable, Iterator
from dataclasses import replace

from benchmarks.attention import AttentionCase
from rnnkern._bench.cases import Case
from rnnkern._bench.cases import runners as recurrence_runners

# T, B, H; input size = H.
GRU_LSTM = [
    (1, 1, 64),
    (1, 1, 256),
    (1, 1, 512),
    (100, 1, 256),
    (100, 1, 512),
    (100, 1, 1024),
    (100, 8, 256),
    (100, 32, 256),
    (100, 64, 512),
    (50, 64, 1024),
    (1000, 1, 128),
    (1000, 16, 128),
]
RNN = [(100, 1, 256), (100, 32, 256), (100, 64, 512), (1000, 1, 128)]
SMOKE = (
    "lstm-T1-B1-H256-eval",
    "gru-T100-B1-H256-eval",
    "lstm-T100-B8-H256-train",
    "rnn_tanh-T100-B32-H256-train",
    "lstm-cell-B64-H256-eval",
    "additive-B32-Tq1-Tk50-D512-train",
    "dot-B32-Tq50-Tk50-D512-eval",
)

Row = Case | AttentionCase


def all_rows() -> Iterator[Row]:
    """Every row, forward and then forward and backward."""
    for row in _forward_rows():
        yield row
        yield replace(row, training=True)


def _forward_rows() -> Iterator[Row]:
    for T, B, H in GRU_LSTM:
        for cell in ("gru", "lstm"):
            yield Case(cell, T, B, H, H)
    for cell in ("gru", "lstm"):
        yield Case(cell, 100, 32, 256, 256, layers=2, bidirectional=True)
    for T, B, H in RNN:
        yield Case("rnn_tanh", T, B, H, H)
    for cell in ("rnn_tanh", "gru", "lstm"):
        for B in (1, 64, 256):
            yield Case(cell, 1, B, 256, 256, single_step=True)
    for score in ("additive", "dot"):
        for Tq in (1, 50):
            yield AttentionCase(score, 32, Tq, 50, 512)


def row_runners(row: Row) -> dict[str, Callable[[], object]]:
    """What to compare in this row, ours first."""
    return row.runners() if isinstance(row, AttentionCase) else recurrence_runners(row)
