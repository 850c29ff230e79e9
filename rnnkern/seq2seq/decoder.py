"""Decoder: a recurrent network over the target whose states attend to the memory of the source."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from rnnkern import nn as rnn
from rnnkern._checks import check_tensor
from rnnkern.functional import linear_cross_entropy
from rnnkern.ops import cuda
from rnnkern.ops.attention import place_lengths
from rnnkern.seq2seq._step import fused_step, hooked, modules_state
from rnnkern.seq2seq.encoder import (
    State,
    check_dropout,
    check_lengths,
    check_sizes,
    check_symbol,
    check_tokens,
    make_recurrent,
)

ATTENTIONS = ("none", "dot", "general", "additive")


class Memory(NamedTuple):
    """A source made ready for attention, once: what every step of the decoder reads.

    Attributes:
        values: outputs of the encoder.  # [B, Tk, M]
        projected: keys as the score needs them, projected once; None without attention.
        lengths: number of valid positions of each row, on the device of values; None where all are.  # [B]
        workspace: what steps write to on a GPU, one at a time: two that run at once (on two streams) need a memory
            each; None elsewhere, and if gradients were enabled.
    """

    values: Tensor
    projected: Any
    lengths: Tensor | None
    workspace: cuda.StepWorkspace | None = None


class Decoder(nn.Module):
    """Writes the target: a recurrent network and Luong's global attention.

    .. math::
        h_t = \\mathrm{cell}(E y_{t-1}, h_{t-1}), \\qquad
        c_t = \\sum_k \\mathrm{softmax}_k(\\mathrm{score}(h_t, m_k)) \\, m_k, \\qquad
        \\tilde h_t = \\tanh(W [c_t; h_t]), \\qquad
        p(y_t) = \\mathrm{softmax}(V \\tilde h_t + b)

    The module gives the logits; softmax belongs to the loss or the search. The attended state is not fed back ("input
    feeding"), so that under teacher forcing the recurrent network runs over the whole target in one call, and attention
    over all its queries in one more. ``step`` runs the same weights one symbol at a time. Dropout acts on the
    embedding, between the layers and on the attended state.

    Source: Luong et al. 2015, https://arxiv.org/abs/1508.04025; the additive score is that of Bahdanau et al. 2015,
    https://arxiv.org/abs/1409.0473.

    Args:
        vocabulary_size: number V of target symbols, padding, start and end included.
        embedding_size: size of a symbol's vector.
        hidden_size: size H of the state.
        memory_size: size M of the encoder's outputs (``encoder.memory_size``).
        cell: "rnn_tanh", "rnn_relu", "lstm" or "gru".
        attention: the score: "dot" (h . m, needs H = M), "general" (h . W m), "additive" (v . tanh(W h + U m)), or
            "none" for a plain decoder that knows the source by its first state alone.
        alignment_size: size A of the additive score; H by default.
        num_layers: number of stacked layers L.
        dropout: probability of zeroing an element, in [0, 1).
        padding_index: the symbol that fills rows past their end.
        batch_first: tokens are [B, T] and outputs [B, T, V] instead of [T, B] and [T, B, V]; the memory likewise.

    Raises:
        TypeError: a size or padding_index is not an integer.
        ValueError: an unknown cell or attention, "dot" with H different from M, a size below 1, a padding_index outside
            the vocabulary, a dropout outside [0, 1).

    Example:
        >>> import torch
        >>> from rnnkern.seq2seq import Decoder
        >>> decoder = Decoder(40, 16, 32, memory_size=64, attention="general", cell="gru")
        >>> memory = decoder.prepare(torch.randn(7, 3, 64), torch.tensor([7, 2, 5]))
        >>> logits, state, _ = decoder(torch.randint(1, 40, (5, 3)), torch.zeros(1, 3, 32), memory)
        >>> logits.shape, state.shape
        (torch.Size([5, 3, 40]), torch.Size([1, 3, 32]))
    """

    def __init__(
        self,
        vocabulary_size: int,
        embedding_size: int,
        hidden_size: int,
        memory_size: int,
        *,
        cell: str = "lstm",
        attention: str = "general",
        alignment_size: int | None = None,
        num_layers: int = 1,
        dropout: float = 0.0,
        padding_index: int = 0,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(
            vocabulary_size=vocabulary_size,
            embedding_size=embedding_size,
            hidden_size=hidden_size,
            memory_size=memory_size,
            num_layers=num_layers,
            alignment_size=hidden_size if alignment_size is None else alignment_size,
        )
        check_symbol("padding_index", padding_index, vocabulary_size)
        check_dropout(dropout)
        self.vocabulary_size = vocabulary_size
        self.hidden_size = hidden_size
        self.memory_size = memory_size
        self.num_layers = num_layers
        self.cell = cell
        self.score = attention
        self.padding_index = padding_index
        self.batch_first = batch_first
        self.embedding = nn.Embedding(
            vocabulary_size, embedding_size, padding_idx=padding_index, device=device, dtype=dtype
        )
        self.dropout = nn.Dropout(dropout)
        self.recurrent = make_recurrent(
            cell, embedding_size, hidden_size, num_layers, False, dropout, device=device, dtype=dtype
        )
        self.attention = _make_attention(attention, hidden_size, memory_size, alignment_size, device, dtype)
        combined_size = hidden_size + (0 if self.attention is None else memory_size)
        self.combine = nn.Linear(combined_size, hidden_size, bias=False, device=device, dtype=dtype)
        self.output = nn.Linear(hidden_size, vocabulary_size, device=device, dtype=dtype)

    def prepare(self, memory: Tensor, lengths: Tensor | None = None) -> Memory:
        """Makes an encoder's outputs ready to be attended to, projecting the keys once.

        Args:
            memory: outputs of the encoder.  # [Tk, B, M], or [B, Tk, M] with batch_first
            lengths: number of valid positions of each row, integers on the CPU; all without it.  # [B]

        Raises:
            TypeError: memory or lengths is not a tensor.
            ValueError: memory is not 3-D.
            RuntimeError: its last size is not M; lengths does not fit it.
        """
        check_tensor("memory", memory)
        if memory.dim() != 3:
            raise ValueError(f"memory: expected a 3-D tensor, got shape {list(memory.shape)}")
        values = memory if self.batch_first else memory.transpose(0, 1)  # [B, Tk, M]
        if values.shape[2] != self.memory_size:
            raise RuntimeError(f"memory: expected last size {self.memory_size}, got shape {list(memory.shape)}")
        lengths = check_lengths(lengths, values.shape[1], values.shape[0])
        if lengths is not None:
            lengths = place_lengths(lengths, values)
        return self._memory(values, None if self.attention is None else self.attention.project_keys(values), lengths)

    def select_rows(self, memory: Memory, rows: Tensor) -> Memory:
        """Gives the memory of these rows of the batch, for a search that goes on with some of them.

        Args:
            memory: what ``prepare`` made of the source.
            rows: integers, in any order, on the device of the memory.  # [B']
        """
        self._check_memory(memory, False)
        check_tensor("rows", rows)
        if rows.dim() != 1 or rows.dtype not in (torch.int32, torch.int64):
            raise RuntimeError(f"rows: expected integers of one dimension, got {rows.dtype} {list(rows.shape)}")
        values, projected, lengths, _ = memory
        return self._memory(
            values.index_select(0, rows),
            None if projected is None else projected.index_select(0, rows),
            None if lengths is None else lengths.index_select(0, rows),
        )

    def _memory(self, values: Tensor, projected: Any, lengths: Tensor | None) -> Memory:
        fused = (
            projected is not None and not torch.is_grad_enabled() and cuda.fuses(self.cell, values, self.hidden_size)
        )
        return Memory(values, projected, lengths, cuda.step_workspace(projected, values) if fused else None)

    def forward(
        self, tokens: Tensor, state: State, memory: Memory, *, need_weights: bool = False
    ) -> tuple[Tensor, State, Tensor | None]:
        """Runs the decoder over a given target (teacher forcing), or over the next few symbols of one.

        Args:
            tokens: the symbol before each position: the target shifted by one, from the start symbol on.
                # [T, B], or [B, T] with batch_first
            state: state before the first step: h, or (h, c) for the LSTM.  # [L, B, H] each
            memory: what ``prepare`` made of the source.
            need_weights: return the attention weights.

        Returns:
            The logits of each position's symbol  # [T, B, V], or [B, T, V] with batch_first
            the state after the last step  # [L, B, H] each
            and the attention weights or None.  # [B, T, Tk]

        Raises:
            TypeError: tokens is not a tensor; memory is not what ``prepare`` made.
            ValueError: tokens is not 2-D; weights are asked of a decoder without attention.
            RuntimeError: tokens is not integral; the batch sizes of tokens, state and memory differ.
        """
        attended, state, weights = self._run_target(tokens, state, memory, need_weights)
        logits = self.output(attended)  # [B, T, V]
        return logits if self.batch_first else logits.transpose(0, 1), state, weights

    def loss(self, tokens: Tensor, expected: Tensor, state: State, memory: Memory) -> Tensor:
        """Gives the cross entropy per symbol, in nats, padding ignored; a large vocabulary's logits are never all held.

        Decoders with hooks, or with another output layer than torch.nn.Linear or one with hooks, do hold them.

        Args:
            tokens: the symbol before each position, as in ``forward``.  # [T, B], or [B, T] with batch_first
            expected: the symbol of each position.  # [T, B], or [B, T] with batch_first
            state: state before the first step.  # [L, B, H] each
            memory: what ``prepare`` made of the source.
        """
        check_tokens(expected, "expected")
        if expected.shape != tokens.shape:
            raise RuntimeError(
                f"expected: expected the shape {list(tokens.shape)} of tokens, got {list(expected.shape)}"
            )
        expected = expected.long()
        if type(self.output) is not nn.Linear or hooked(self, self.output):
            # What has taken the layer's place, or watches it or the decoder, is to be called.
            logits: Tensor = self(tokens, state, memory)[0]
            return cross_entropy(logits.flatten(0, 1), expected.flatten(), ignore_index=self.padding_index)
        attended = self._run_target(tokens, state, memory, False)[0]  # [B, T, H]
        expected = expected if self.batch_first else expected.transpose(0, 1)
        weight, bias = self.output.weight, self.output.bias
        return linear_cross_entropy(attended, weight, expected, linear_bias=bias, ignore_index=self.padding_index)

    def step(
        self, tokens: Tensor, state: State, memory: Memory, *, need_weights: bool = False
    ) -> tuple[Tensor, State, Tensor | None]:
        """Runs one step of every row, as a search does.

        On a GPU, without gradients, the attention weights or autocast, each layer is one launch, the last with the
        attention that follows it; states of several layers are joined by one more, an LSTM's by two. The c of an LSTM
        in bfloat16 or float16 is then float32 after the step, so that the next step goes on with all of it; steps and
        calls take c in both dtypes. Nothing is copied from the CPU or waited for, and a CUDA graph may hold the step.

        Args:
            tokens: the last symbol of each row.  # [B]
            state: state before the step.  # [L, B, H] each
            memory: what ``prepare`` made of the source.
            need_weights: return the attention weights.

        Returns:
            Logits of the next symbol  # [B, V]
            the state after the step  # [L, B, H] each
            and the attention weights or None.  # [B, Tk]
        """
        check_tensor("tokens", tokens)
        self._check_memory(memory, need_weights)
        if tokens.dim() != 1:
            raise ValueError(f"tokens: expected a 1-D tensor, got shape {list(tokens.shape)}")
        embedded = self._embed(tokens)  # [B, E]
        stepped = None if need_weights else fused_step(self.recurrent, self.attention, embedded, state, *memory)
        if stepped is not None:
            return self.output(self._attended(stepped.context, stepped.hidden)), stepped.state, None
        attended, state, weights = self._run(embedded.unsqueeze(0), state, memory, need_weights)
        return self.output(attended).squeeze(1), state, None if weights is None else weights.squeeze(1)

    def _embed(self, tokens: Tensor) -> Tensor:
        embedded: Tensor = self.dropout(self.embedding(tokens))
        return embedded

    def _run_target(
        self, tokens: Tensor, state: State, memory: Memory, need_weights: bool
    ) -> tuple[Tensor, State, Tensor | None]:
        """`_run` of a whole target, which is checked."""
        check_tokens(tokens, "tokens")
        self._check_memory(memory, need_weights)
        tokens = tokens.transpose(0, 1) if self.batch_first else tokens  # [T, B]
        if tokens.shape[1] != memory.values.shape[0]:
            raise RuntimeError(
                f"tokens: expected the batch size {memory.values.shape[0]} of memory, got {tokens.shape[1]}"
            )
        return self._run(self._embed(tokens), state, memory, need_weights)

    def _run(
        self,
        embedded: Tensor,  # [T, B, E]
        state: State,
        memory: Memory,
        need_weights: bool,
    ) -> tuple[Tensor, State, Tensor | None]:
        """What the output layer reads [B, T, H], the state after the last step, and the weights or None."""
        hidden, state = self.recurrent(embedded, modules_state(state))  # [T, B, H]
        hidden = hidden.transpose(0, 1)  # [B, T, H]
        context = weights = None
        if self.attention is not None:
            context, weights = self.attention(
                hidden,
                memory.values,
                projected_key=memory.projected,
                lengths=memory.lengths,
                need_weights=need_weights,
            )  # [B, T, M]
        return self._attended(context, hidden), state, weights

    def _attended(
        self,
        context: Tensor | None,  # [..., M]
        hidden: Tensor,  # [..., H]
    ) -> Tensor:
        if context is not None:
            hidden = torch.cat((context, hidden), dim=-1)
        attended: Tensor = self.dropout(torch.tanh(self.combine(hidden)))
        return attended

    def _check_memory(self, memory: object, need_weights: bool) -> None:
        if not isinstance(memory, Memory):
            raise TypeError(f"memory: expected what Decoder.prepare returns, got {type(memory).__name__}")
        if need_weights and self.attention is None:
            raise ValueError("need_weights: this decoder has no attention (attention='none')")

    def extra_repr(self) -> str:
        """Names the cell, the score and the layout."""
        return f"cell={self.cell!r}, attention={self.score!r}, batch_first={self.batch_first}"


def _make_attention(
    score: str,
    hidden_size: int,
    memory_size: int,
    alignment_size: int | None,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> Any:  # an attention module, or None
    if score not in ATTENTIONS:
        raise ValueError(f"attention: expected one of {', '.join(ATTENTIONS)}, got {score!r}")
    if score == "none":
        return None
    if score == "dot":
        if hidden_size != memory_size:
            raise ValueError(
                f"attention: 'dot' needs equal sizes, got hidden_size {hidden_size} and memory_size {memory_size}; "
                "'general' takes any"
            )
        return rnn.DotAttention()
    if score == "general":
        return rnn.GeneralAttention(hidden_size, memory_size, device=device, dtype=dtype)
    return rnn.AdditiveAttention(
        hidden_size, memory_size, hidden_size if alignment_size is None else alignment_size, device=device, dtype=dtype
    )
