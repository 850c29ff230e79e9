"""Seq2Seq: an encoder and a decoder trained together."""

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from rnnkern.seq2seq._step import hooked
from rnnkern.seq2seq.decoder import Decoder, Memory
from rnnkern.seq2seq.encoder import Encoder, State, check_tokens


class Seq2Seq(nn.Module):
    """Maps a source sequence to a target sequence, trained by teacher forcing.

    .. math::
        \\mathcal L = - \\frac{1}{N} \\sum_b \\sum_t \\log p(y_{b,t} \\mid y_{b,<t}, x_b)

    over the N target symbols that are not padding.

    Source: Sutskever et al. 2014, https://arxiv.org/abs/1409.3215; with attention, Luong et al. 2015,
    https://arxiv.org/abs/1508.04025.

    Args:
        encoder: reads the source.
        decoder: writes the target; it has the encoder's ``memory_size``, ``state_size``, ``state_layers`` and layout.

    Raises:
        ValueError: encoder and decoder do not fit each other.

    Example:
        >>> import torch
        >>> from rnnkern.seq2seq import Decoder, Encoder, Seq2Seq
        >>> encoder = Encoder(30, 16, 32)
        >>> model = Seq2Seq(encoder, Decoder(40, 16, 32, encoder.memory_size, attention="additive"))
        >>> source, target = torch.randint(1, 30, (7, 3)), torch.randint(1, 40, (6, 3))
        >>> loss = model.loss(source, target, torch.tensor([7, 2, 5]))
        >>> loss.backward()
    """

    def __init__(self, encoder: Encoder, decoder: Decoder) -> None:
        super().__init__()
        for name, given, expected in (
            ("memory_size", decoder.memory_size, encoder.memory_size),
            ("hidden_size", decoder.hidden_size, encoder.state_size),
            ("num_layers", decoder.num_layers, encoder.state_layers),
            ("batch_first", decoder.batch_first, encoder.batch_first),
        ):
            if given != expected:
                raise ValueError(f"decoder: expected {name} {expected} to fit the encoder, got {given}")
        if (decoder.cell == "lstm") != (encoder.cell == "lstm"):
            raise ValueError(f"decoder: cell {decoder.cell!r} cannot start from the state of cell {encoder.cell!r}")
        self.encoder = encoder
        self.decoder = decoder
        self.batch_first = encoder.batch_first

    def encode(self, source: Tensor, lengths: Tensor | None = None) -> tuple[Memory, State]:
        """Reads the source once: the memory, keys projected, and the decoder's first state."""
        memory, state = self.encoder(source, lengths)
        return self.decoder.prepare(memory, lengths), state

    def forward(self, source: Tensor, target: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Gives the logits of every symbol of the target after the first, each from the true symbols before it.

        Args:
            source: source symbols.  # [S, B], or [B, S] with batch_first
            target: start symbol, symbols, end symbol, padding.  # [T, B], or [B, T]
            lengths: number of source symbols of each row, integers on the CPU.  # [B]

        Returns:
            Logits; position t is about target[t + 1].  # [T-1, B, V], or [B, T-1, V]

        Raises:
            TypeError: source, target or lengths is not a tensor.
            ValueError: source or target is not 2-D, target has fewer than two positions.
            RuntimeError: wrong dtype, batch sizes that differ, lengths that do not fit.
        """
        inputs, memory, state = self._begin(source, target, lengths)
        logits: Tensor = self.decoder(inputs, state, memory)[0]
        return logits

    def loss(self, source: Tensor, target: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Gives the cross entropy per target symbol, in nats, padding ignored; arguments as in ``forward``.

        The logits of a large vocabulary are never all held (`rnnkern.functional.linear_cross_entropy`), unless this
        module, the decoder or its output layer has hooks: these see the calls that ``forward`` makes. The loss is NaN
        where the target is only padding after its first symbol, as ``torch.nn.CrossEntropyLoss`` has it.
        """
        time_dim = 1 if self.batch_first else 0
        if hooked(self):  # which are to see a call
            logits: Tensor = self(source, target, lengths)
            expected = target.narrow(time_dim, 1, logits.shape[time_dim]).flatten().long()
            return cross_entropy(logits.flatten(0, 1), expected, ignore_index=self.decoder.padding_index)
        inputs, memory, state = self._begin(source, target, lengths)
        return self.decoder.loss(inputs, target.narrow(time_dim, 1, inputs.shape[time_dim]), state, memory)

    def _begin(self, source: Tensor, target: Tensor, lengths: Tensor | None) -> tuple[Tensor, Memory, State]:
        """What the decoder starts from: the target but for its last position, memory and state."""
        check_tokens(target, "target")
        time_dim, batch_dim = (1, 0) if self.batch_first else (0, 1)
        if target.shape[time_dim] < 2:
            raise ValueError(f"target: expected start and end symbols at least, got shape {list(target.shape)}")
        check_tokens(source, "source")
        if source.shape[batch_dim] != target.shape[batch_dim]:
            raise RuntimeError(
                f"target: expected the batch size {source.shape[batch_dim]} of source, got shape {list(target.shape)}"
            )
        memory, state = self.encode(source, lengths)
        return target.narrow(time_dim, 0, target.shape[time_dim] - 1), memory, state
