"""Evaluation: greedy pronunciations of words, their error rates, and a picture of what the decoder attends to."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from g2p_data import END, START, Lexicon, Vocabulary, pad_rows
from torch import Tensor

from rnnkern.seq2seq import Seq2Seq, greedy_search


def longest_pronunciation(letters: int) -> int:
    """Bounds the search: no word of this many letters has more phonemes, and a search that loops ends."""
    return 10 + 3 * letters


def edit_distance(a: Sequence[str], b: Sequence[str]) -> int:
    """Counts the insertions, deletions and substitutions that turn a into b (Levenshtein)."""
    row = list(range(len(b) + 1))
    for i, symbol in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(diagonal + (symbol != other), row[j] + 1, row[j - 1] + 1)
    return row[-1]


@dataclass(frozen=True)
class Score:
    """Error rates over some words.

    Attributes:
        words: number of words.
        wrong: words whose pronunciation is none of those listed.
        phones: phonemes of the closest listed pronunciation, over all words.
        errors: edit distance to it, over all words.
    """

    words: int
    wrong: int
    phones: int
    errors: int

    @property
    def word_error_rate(self) -> float:
        """Part of the words that are wrong."""
        return self.wrong / self.words

    @property
    def phoneme_error_rate(self) -> float:
        """Errors per listed phoneme."""
        return self.errors / self.phones


def score(found: dict[str, tuple[str, ...]], listed: Lexicon) -> Score:
    """Compares pronunciations with the closest of those listed; the first listed wins a tie."""
    wrong = phones = errors = 0
    for word, pronunciation in found.items():
        distance, length = min(
            ((edit_distance(pronunciation, other), len(other)) for other in listed[word]), key=lambda pair: pair[0]
        )
        wrong += distance > 0
        errors += distance
        phones += length
    return Score(len(found), wrong, phones, errors)


def pronounce(
    model: Seq2Seq, words: Sequence[str], letters: Vocabulary, phones: Vocabulary, device: str, batch_size: int = 512
) -> dict[str, tuple[str, ...]]:
    """Finds the pronunciation of each word by greedy search, words of one length together."""
    model.eval()
    found: dict[str, tuple[str, ...]] = {}
    ordered = sorted(words, key=len)
    for begin in range(0, len(ordered), batch_size):
        part = ordered[begin : begin + batch_size]
        source, lengths = encode_words(part, letters)
        result = greedy_search(
            model, source.to(device), lengths, start=START, end=END, max_length=longest_pronunciation(len(source))
        )
        rows, counts = result.tokens.tolist(), result.lengths.tolist()
        found |= {word: phones.decode(row[:count]) for word, row, count in zip(part, rows, counts)}
    return {word: found[word] for word in words}


def encode_words(words: Sequence[str], letters: Vocabulary) -> tuple[Tensor, Tensor | None]:
    """Turns words into letters [S, B] and lengths [B], None where all are full."""
    rows, lengths = pad_rows([letters.encode(word) for word in words])
    return rows.t().contiguous(), None if int(lengths.min()) == int(lengths.max()) else lengths


def evaluate(
    model: Seq2Seq, lexicon: Lexicon, letters: Vocabulary, phones: Vocabulary, device: str
) -> tuple[Score, dict[str, tuple[str, ...]], float]:
    """Pronounces all words of a dictionary: the score, the pronunciations, and the words per second of the search."""
    begin = time.perf_counter()
    found = pronounce(model, list(lexicon), letters, phones, device)
    seconds = time.perf_counter() - begin
    return score(found, lexicon), found, len(found) / seconds


def plot_attention(
    model: Seq2Seq, words: Sequence[str], letters: Vocabulary, phones: Vocabulary, device: str, path: Path
) -> None:
    """Draws which letters (rows) the decoder attends to at each phoneme (columns), one panel per word."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    model.eval()
    figure, panels = plt.subplots(1, len(words), figsize=(3.4 * len(words), 3.6), squeeze=False, layout="constrained")
    for word, panel in zip(words, panels[0]):
        source, _ = encode_words([word], letters)
        result = greedy_search(
            model,
            source.to(device),
            start=START,
            end=END,
            max_length=longest_pronunciation(len(source)),
            need_weights=True,
        )
        assert result.weights is not None
        found = phones.decode(result.tokens[0].tolist())
        if found:
            panel.imshow(result.weights[0].t().cpu().numpy(), cmap="viridis", vmin=0, vmax=1, aspect="auto")
        panel.set_xticks(range(len(found)), found, rotation=90)
        panel.set_yticks(range(len(word)), list(word))
        panel.set_title(word)
    figure.supxlabel("phoneme")
    figure.supylabel("letter")
    figure.savefig(path, dpi=120)
    plt.close(figure)
