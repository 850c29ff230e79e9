"""Searches: from a trained model to target symbols."""

from typing import NamedTuple

import torch
from torch import Tensor

from rnnkern.seq2seq.encoder import State, check_integer, check_symbol
from rnnkern.seq2seq.model import Seq2Seq


class SearchResult(NamedTuple):
    """What a search found, one row per source.

    Attributes:
        tokens: symbols without start and end, padding past each row's length.  # [B, T], T = max(lengths)
        lengths: number of symbols of each row.  # [B]
        scores: log probability of each row's symbols, its end symbol included.  # [B]
        finished: whether the row reached the end symbol within the maximum length.  # [B]
        weights: attention weights of each symbol, zero past the row's length; None unless asked for.  # [B, T, Tk]
    """

    tokens: Tensor
    lengths: Tensor
    scores: Tensor
    finished: Tensor
    weights: Tensor | None


@torch.no_grad()
def greedy_search(
    model: Seq2Seq,
    source: Tensor,
    lengths: Tensor | None = None,
    *,
    start: int,
    end: int,
    max_length: int,
    need_weights: bool = False,
) -> SearchResult:
    """Takes the most probable symbol at each step, from the start symbol to the end symbol.

    .. math:: y_t = \\arg\\max_y p(y \\mid y_{<t}, x), \\qquad y_0 = \\mathrm{start}

    Rows that have reached the end are dropped from the batch when they are half of it; on a GPU the search looks at
    every eighth step only, since it has to wait for that, and no other step waits. The search runs in the mode that
    the model is in: call ``model.eval()`` first, or dropout acts.

    Args:
        model: the model.
        source: source symbols.  # [S, B], or [B, S] where the model is batch_first
        lengths: number of source symbols of each row, integers on the CPU.  # [B]
        start: the symbol that starts a target.
        end: the symbol that ends it.
        max_length: most symbols of a row, the end symbol not counted; a longer row is cut.
        need_weights: return the attention weights.

    Raises:
        TypeError: start, end or max_length is not an integer; source or lengths is not a tensor.
        ValueError: max_length is negative, start or end is outside the vocabulary, weights are asked of a model without
            attention, source is not 2-D.
        RuntimeError: wrong dtype, lengths that do not fit.

    Example:
        >>> import torch
        >>> from rnnkern.seq2seq import Decoder, Encoder, Seq2Seq, greedy_search
        >>> encoder = Encoder(30, 16, 32)
        >>> model = Seq2Seq(encoder, Decoder(40, 16, 32, encoder.memory_size)).eval()
        >>> source, lengths = torch.randint(1, 30, (7, 3)), torch.tensor([7, 2, 5])
        >>> result = greedy_search(model, source, lengths, start=1, end=2, max_length=20)
        >>> rows = [row[:length].tolist() for row, length in zip(result.tokens, result.lengths)]
        >>> len(rows)
        3
    """
    check_integer("max_length", max_length)
    if max_length < 0:
        raise ValueError(f"max_length: expected at least 0, got {max_length}")
    vocabulary_size = model.decoder.vocabulary_size
    for name, symbol in (("start", start), ("end", end)):
        check_symbol(name, symbol, vocabulary_size)
    if need_weights and model.decoder.attention is None:
        raise ValueError("need_weights: this model has no attention (attention='none')")

    memory, state = model.encode(source, lengths)
    batch_size, source_time, _ = memory.values.shape
    device = source.device
    tokens = torch.full((batch_size, max_length), model.decoder.padding_index, dtype=torch.int64, device=device)
    found = torch.zeros(batch_size, dtype=torch.int64, device=device)
    scores = torch.zeros(batch_size, device=device)
    finished = torch.zeros(batch_size, dtype=torch.bool, device=device)
    weights = memory.values.new_zeros(batch_size, max_length, source_time) if need_weights else None

    rows = torch.arange(batch_size, device=device)  # the result's row of each row still in the batch
    previous = torch.full((batch_size,), start, dtype=torch.int64, device=device)
    for position in range(max_length + 1):
        if rows.numel() == 0:
            break
        logits, state, step_weights = model.decoder.step(previous, state, memory, need_weights=need_weights)
        step_scores, previous = logits.float().log_softmax(dim=1).max(dim=1)  # [rows]
        live = ~finished[rows]
        ended = previous == end
        # The step after the last symbol only asks whether the row ends there.
        counts = live & (ended | (position < max_length))
        scores[rows] += step_scores.masked_fill(~counts, 0)  # a row that has ended may come to NaN
        finished[rows] |= ended
        writing = live & ~ended
        if position == max_length:
            break
        tokens[rows, position] = previous.masked_fill(~writing, model.decoder.padding_index)
        found[rows] += writing
        if weights is not None and step_weights is not None:
            weights = weights.to(step_weights.dtype)  # under autocast another than the memory's
            weights[rows, position] = step_weights.masked_fill(~writing[:, None], 0)
        if (position + 1) % _steps_between_looks(device) == 0 and 2 * int(writing.sum()) <= rows.numel():
            keep = writing.nonzero().squeeze(1)
            rows, previous = rows[keep], previous[keep]
            state, memory = _select_rows(state, keep), model.decoder.select_rows(memory, keep)
    longest = int(found.max()) if batch_size else 0
    if weights is not None:
        weights = weights[:, :longest]
    return SearchResult(tokens[:, :longest], found, scores, finished, weights)


def _steps_between_looks(device: torch.device) -> int:
    """How many steps run before the search looks which rows have ended: on a GPU that waits for all of them."""
    return 1 if device.type == "cpu" else 8


def _select_rows(state: State, keep: Tensor) -> State:
    if isinstance(state, tuple):
        return state[0].index_select(1, keep), state[1].index_select(1, keep)
    return state.index_select(1, keep)
