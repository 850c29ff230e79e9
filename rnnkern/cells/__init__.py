"""The cells: one description each, and the eager layer that is the ground truth of every backend."""

from rnnkern.cells.gru import GRU
from rnnkern.cells.gru_reset_before import GRU_RESET_BEFORE
from rnnkern.cells.lstm import LSTM
from rnnkern.cells.rnn_relu import RNN_RELU
from rnnkern.cells.rnn_tanh import RNN_TANH
from rnnkern.cells.spec import CellSpec

# Those of the engines, which compiled kernels describe too; and those that run on the eager layer alone.
CELLS: dict[str, CellSpec] = {spec.name: spec for spec in (RNN_TANH, RNN_RELU, LSTM, GRU)}
EAGER_CELLS: dict[str, CellSpec] = {spec.name: spec for spec in (GRU_RESET_BEFORE,)}


def find_cell(name: str) -> CellSpec:
    """The cell of this name."""
    return EAGER_CELLS[name] if name in EAGER_CELLS else CELLS[name]


__all__ = ["CELLS", "EAGER_CELLS", "CellSpec", "find_cell"]
