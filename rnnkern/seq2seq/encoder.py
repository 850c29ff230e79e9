"""Encoder: embedding and a recurrent network over the source; its final state, bridged, starts the decoder."""

import torch
from torch import Tensor, nn

from rnnkern import nn as rnn
from rnnkern._checks import check_tensor

# h [L, B, H], or (h, c) for a cell with two states.
State = Tensor | tuple[Tensor, Tensor]

RECURRENT_CELLS = ("rnn_tanh", "rnn_relu", "lstm", "gru")


class Encoder(nn.Module):
    """Reads the source: embedding, then a recurrent network, in one direction or both.

    .. math::
        m_t = [\\overrightarrow{h}_t; \\overleftarrow{h}_t], \\qquad
        s_0 = \\tanh(W_h [h_1; \\ldots; h_L] + b_h), \\qquad c_0 = W_c [c_1; \\ldots; c_L] + b_c

    where m is the memory that the decoder attends to, h_1 to h_L are the final states of all layers and directions and
    s_0 is the decoder's first state (c_0 only for the LSTM). Where the encoder has one direction and the decoder its
    layers and size, the final state is handed over as it is, without weights. Dropout acts on the embedding and between
    the layers.

    Sources: Sutskever et al. 2014, https://arxiv.org/abs/1409.3215 (final state to first state); Bahdanau et al. 2015,
    https://arxiv.org/abs/1409.0473 (both directions, learned first state).

    Args:
        vocabulary_size: number of source symbols, padding included.
        embedding_size: size of a symbol's vector.
        hidden_size: size H of each direction.
        cell: "rnn_tanh", "rnn_relu", "lstm" or "gru".
        num_layers: number of stacked layers L.
        bidirectional: read in both directions; the memory has D*H features, D = 2.
        dropout: probability of zeroing an element, in [0, 1).
        padding_index: the symbol that fills rows past their length; its embedding is zero and is not trained.
        state_size: hidden size of the decoder; ``hidden_size`` by default.
        state_layers: number of layers of the decoder; ``num_layers`` by default.
        batch_first: tokens are [B, T] and the memory [B, T, D*H] instead of [T, B] and [T, B, D*H].

    Raises:
        TypeError: a size or padding_index is not an integer.
        ValueError: an unknown cell, a size below 1, a padding_index outside the vocabulary, a dropout outside [0, 1).

    Example:
        >>> import torch
        >>> from rnnkern.seq2seq import Encoder
        >>> encoder = Encoder(30, 16, 32, cell="gru")
        >>> memory, state = encoder(torch.randint(1, 30, (7, 3)), torch.tensor([7, 2, 5]))
        >>> memory.shape, state.shape
        (torch.Size([7, 3, 64]), torch.Size([1, 3, 32]))
    """

    def __init__(
        self,
        vocabulary_size: int,
        embedding_size: int,
        hidden_size: int,
        *,
        cell: str = "lstm",
        num_layers: int = 1,
        bidirectional: bool = True,
        dropout: float = 0.0,
        padding_index: int = 0,
        state_size: int | None = None,
        state_layers: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.state_size = hidden_size if state_size is None else state_size
        self.state_layers = num_layers if state_layers is None else state_layers
        check_sizes(
            vocabulary_size=vocabulary_size,
            embedding_size=embedding_size,
            hidden_size=hidden_size,
            num_layers=num_layers,
            state_size=self.state_size,
            state_layers=self.state_layers,
        )
        check_symbol("padding_index", padding_index, vocabulary_size)
        check_dropout(dropout)
        self.cell = cell
        self.memory_size = hidden_size * (2 if bidirectional else 1)
        self.padding_index = padding_index
        self.batch_first = batch_first
        self.embedding = nn.Embedding(
            vocabulary_size, embedding_size, padding_idx=padding_index, device=device, dtype=dtype
        )
        self.dropout = nn.Dropout(dropout)
        self.recurrent = make_recurrent(
            cell, embedding_size, hidden_size, num_layers, bidirectional, dropout, device=device, dtype=dtype
        )
        final_size = num_layers * self.memory_size
        bridged = bidirectional or (self.state_layers, self.state_size) != (num_layers, hidden_size)
        self.bridge_hidden: nn.Linear | None = None
        self.bridge_cell: nn.Linear | None = None
        if bridged:
            first_size = self.state_layers * self.state_size
            self.bridge_hidden = nn.Linear(final_size, first_size, device=device, dtype=dtype)
            if cell == "lstm":
                self.bridge_cell = nn.Linear(final_size, first_size, device=device, dtype=dtype)

    def forward(self, tokens: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, State]:
        """Encodes a batch of sources.

        Args:
            tokens: source symbols, int64 or int32.  # [T, B], or [B, T] with batch_first
            lengths: number of symbols of each row, integers on the CPU in any order; all rows are full without.  # [B]

        Returns:
            The memory, zero past each row's length  # [T, B, D*H], or [B, T, D*H] with batch_first
            and the decoder's first state: h, or (h, c) for the LSTM.  # [state_layers, B, state_size] each

        Raises:
            TypeError: tokens or lengths is not a tensor.
            ValueError: tokens is not 2-D.
            RuntimeError: tokens is not integral; lengths does not fit it.
            IndexError: a symbol outside the vocabulary.
        """
        check_tokens(tokens, "tokens")
        tokens = tokens.transpose(0, 1) if self.batch_first else tokens  # [T, B]
        lengths = check_lengths(lengths, tokens.shape[0], tokens.shape[1])
        embedded = self.dropout(self.embedding(tokens))  # [T, B, E]
        memory, final = self.recurrent(embedded, lengths=lengths)  # [T, B, D*H]
        if self.batch_first:
            memory = memory.transpose(0, 1)
        if isinstance(final, tuple):
            hidden, cell = final
            return memory, (self._bridge_hidden(hidden), self._bridge(cell.to(hidden.dtype), self.bridge_cell))
        return memory, self._bridge_hidden(final)

    def _bridge_hidden(self, hidden: Tensor) -> Tensor:
        return hidden if self.bridge_hidden is None else self._bridge(hidden, self.bridge_hidden).tanh()

    def _bridge(self, final: Tensor, linear: nn.Linear | None) -> Tensor:
        if linear is None:
            return final
        batch_size = final.shape[1]
        flat = final.transpose(0, 1).reshape(batch_size, linear.in_features)  # [B, L*D*H]
        first: Tensor = linear(flat).view(batch_size, self.state_layers, self.state_size)
        return first.transpose(0, 1).contiguous()  # [state_layers, B, state_size]

    def extra_repr(self) -> str:
        """Names the cell and the layout."""
        return f"cell={self.cell!r}, batch_first={self.batch_first}"


def make_recurrent(
    cell: str,
    input_size: int,
    hidden_size: int,
    num_layers: int,
    bidirectional: bool,
    dropout: float,
    *,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> nn.Module:
    """Builds the recurrent network of a cell by its name; dropout acts between layers only."""
    if cell not in RECURRENT_CELLS:
        raise ValueError(f"cell: expected one of {', '.join(RECURRENT_CELLS)}, got {cell!r}")
    between = dropout if num_layers > 1 else 0.0
    if cell == "lstm":
        return rnn.LSTM(
            input_size,
            hidden_size,
            num_layers,
            bidirectional=bidirectional,
            dropout=between,
            device=device,
            dtype=dtype,
        )
    if cell == "gru":
        return rnn.GRU(
            input_size,
            hidden_size,
            num_layers,
            bidirectional=bidirectional,
            dropout=between,
            device=device,
            dtype=dtype,
        )
    return rnn.RNN(
        input_size,
        hidden_size,
        num_layers,
        nonlinearity=cell.removeprefix("rnn_"),
        bidirectional=bidirectional,
        dropout=between,
        device=device,
        dtype=dtype,
    )


def check_sizes(**sizes: int) -> None:
    """Refuses a size that is no integer or below 1, by its name."""
    for name, size in sizes.items():
        check_integer(name, size)
        if size < 1:
            raise ValueError(f"{name}: expected at least 1, got {size}")


def check_integer(name: str, value: object) -> None:
    """Refuses anything but an integer; True and False are none."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or isinstance(value, Tensor):
        raise TypeError(f"{name}: expected an int, got {value!r}")


def check_symbol(name: str, symbol: int, vocabulary_size: int) -> None:
    """Refuses what is no symbol of the vocabulary."""
    check_integer(name, symbol)
    if not 0 <= symbol < vocabulary_size:
        raise ValueError(f"{name}: expected a symbol from 0 to {vocabulary_size - 1}, got {symbol}")


def check_dropout(dropout: float) -> None:
    """Refuses a probability outside [0, 1)."""
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout: expected a probability in [0, 1), got {dropout}")


def check_tokens(tokens: Tensor, name: str) -> None:
    """Refuses anything but a matrix of int64 or int32."""
    check_tensor(name, tokens)
    if tokens.dim() != 2:
        raise ValueError(f"{name}: expected a 2-D tensor, got shape {list(tokens.shape)}")
    if tokens.dtype not in (torch.int64, torch.int32):
        raise RuntimeError(f"{name}: expected int64 or int32, got {tokens.dtype}")


def check_lengths(lengths: Tensor | None, time: int, batch_size: int) -> Tensor | None:
    """Refuses lengths that do not fit a batch [time, batch_size]; returns them as int64."""
    if lengths is None:
        return None
    check_tensor("lengths", lengths)
    if lengths.shape != (batch_size,):
        raise RuntimeError(f"lengths: expected shape [{batch_size}], got {list(lengths.shape)}")
    if lengths.dtype.is_floating_point or lengths.dtype.is_complex or lengths.dtype == torch.bool:
        raise RuntimeError(f"lengths: expected an integer dtype, got {lengths.dtype}")
    if lengths.device.type != "cpu":
        raise RuntimeError(f"lengths: expected a CPU tensor, got device {lengths.device}")
    lengths = lengths.long()
    if torch.compiler.is_compiling():  # a traced program cannot look at values
        return lengths
    if batch_size and not 0 <= int(lengths.min()) <= int(lengths.max()) <= time:
        raise RuntimeError(
            f"lengths: expected values from 0 to {time}, got {int(lengths.min())} to {int(lengths.max())}"
        )
    return lengths
