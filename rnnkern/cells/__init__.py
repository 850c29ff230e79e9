"""The cells: one description each, and the eager layer that is the ground truth of every backend."""

from rnnkern.cells.gru import GRU
from rnnkern.cells.lstm import LSTM
from rnnkern.cells.rnn_relu import RNN_RELU
from rnnkern.cells.rnn_tanh import RNN_TANH
from rnnkern.cells.spec import CellSpec

CELLS: dict[str, CellSpec] = {spec.name: spec for spec in (RNN_TANH, RNN_RELU, LSTM, GRU)}

__all__ = ["CELLS", "CellSpec"]
