"""Small seq2seq models and batches for the tests."""

import torch
from torch import Tensor

from rnnkern.seq2seq import Decoder, Encoder, Seq2Seq

CELLS = ["rnn_tanh", "rnn_relu", "lstm", "gru"]
ATTENTIONS = ["none", "dot", "general", "additive"]
PADDING, START, END = 0, 1, 2
LETTERS, PHONES = 11, 13


def make_model(
    cell: str = "lstm",
    attention: str = "general",
    *,
    bidirectional: bool = True,
    encoder_layers: int = 1,
    decoder_layers: int = 1,
    batch_first: bool = False,
    dropout: float = 0.0,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Seq2Seq:
    torch.manual_seed(seed)
    encoder = Encoder(
        LETTERS,
        6,
        5,
        cell=cell,
        num_layers=encoder_layers,
        bidirectional=bidirectional,
        dropout=dropout,
        state_size=10 if bidirectional else 5,
        state_layers=decoder_layers,
        batch_first=batch_first,
        dtype=dtype,
    )
    decoder = Decoder(
        PHONES,
        7,
        10 if bidirectional else 5,
        encoder.memory_size,
        cell=cell,
        attention=attention,
        alignment_size=9,
        num_layers=decoder_layers,
        dropout=dropout,
        batch_first=batch_first,
        dtype=dtype,
    )
    return Seq2Seq(encoder, decoder)


def make_batch(S: int = 7, T: int = 6, B: int = 4, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Source [S, B] and target [T, B] with padding, source lengths [B] in no order."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([S - 2, S, 1, S - 3][:B])
    target_lengths = torch.tensor([T, T - 2, 3, T - 1][:B])  # start and end included
    source = torch.randint(3, LETTERS, (S, B), generator=generator)
    target = torch.randint(3, PHONES, (T, B), generator=generator)
    target[0] = START
    target[target_lengths - 1, torch.arange(B)] = END
    source[torch.arange(S)[:, None] >= lengths] = PADDING
    target[torch.arange(T)[:, None] >= target_lengths] = PADDING
    return source, target, lengths


def teacher_forced(model: Seq2Seq, source: Tensor, lengths: Tensor | None, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Greedy search by brute force, the whole target again for each symbol: symbols, logits, weights of each step."""
    memory, state = model.encode(source, lengths)
    tokens = torch.full((1, source.shape[1]), START)
    for _ in range(steps):
        logits, _, weights = model.decoder(tokens, state, memory, need_weights=model.decoder.attention is not None)
        tokens = torch.cat((tokens, logits[-1:].argmax(-1)))
    return tokens[1:], logits, weights
