"""Modules: drop-in recurrent layers and cells, and attention."""

from rnnkern.nn.attention import AdditiveAttention, DotAttention, GeneralAttention
from rnnkern.nn.cell import GRUCell, LSTMCell, RNNCell
from rnnkern.nn.quantized import QuantizedGRU, QuantizedLSTM, QuantizedRNN
from rnnkern.nn.recurrent import GRU, LSTM, RNN

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "AdditiveAttention",
    "DotAttention",
    "GRUCell",
    "GeneralAttention",
    "LSTMCell",
    "QuantizedGRU",
    "QuantizedLSTM",
    "QuantizedRNN",
    "RNNCell",
]
