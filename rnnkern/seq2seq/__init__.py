"""Sequence to sequence models on the fused kernels: encoder, attention decoder, searches."""

from rnnkern.seq2seq.decoder import Decoder, Memory
from rnnkern.seq2seq.encoder import Encoder, State
from rnnkern.seq2seq.model import Seq2Seq
from rnnkern.seq2seq.search import SearchResult, greedy_search

__all__ = ["Decoder", "Encoder", "Memory", "SearchResult", "Seq2Seq", "State", "greedy_search"]
