"""The grapheme-to-phoneme demo: batches, training, checkpoints, the comparison with torch.nn, short runs."""

import json
import random
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import g2p
import g2p_compare
import g2p_data
import g2p_train

from tests.helpers import threads

SMALL = [
    *("--hidden", "24", "--embedding", "12", "--batch", "16", "--epochs", "2", "--lr", "0.01"),
    *("--compare-steps", "0", "--threads", "1"),
]


def toy_lexicon(words: int = 160) -> g2p_data.Lexicon:
    """Words over a few letters, said letter by letter: small, and quick to learn."""
    sounds = {"a": "AH", "b": "B", "c": "K", "d": "D", "e": "EH"}
    generator = random.Random(0)
    lexicon: g2p_data.Lexicon = {}
    while len(lexicon) < words:
        word = "".join(generator.choice("abcde") for _ in range(generator.randint(1, 6)))
        lexicon[word] = [tuple(sounds[letter] for letter in word)]
    return lexicon


@pytest.fixture
def toy_file(tmp_path: Path) -> Path:
    path = tmp_path / "toy.tsv"
    path.write_text("".join(f"{word}\t{' '.join(phones)}\n" for word, (phones,) in toy_lexicon().items()))
    return path


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with threads(1):  # such small models gain nothing from more, and lose much on a busy machine
        yield


def toy_trainer(**changes: object) -> g2p_train.Trainer:
    lexicon = toy_lexicon()
    splits = g2p_data.split_lexicon(lexicon)
    letters = g2p_data.Vocabulary.of(lexicon)
    phones = g2p_data.Vocabulary.of(p for pronunciations in lexicon.values() for p in pronunciations)
    config = g2p.make_config(g2p.parse_arguments(SMALL), lexicon)
    train, dev = (g2p_data.Pairs(splits[name], letters, phones) for name in ("train", "dev"))
    return g2p_train.Trainer(replace(config, **changes), train, dev, letters, phones)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--lr", "nan"], "--lr"),
        (["--clip", "inf"], "--clip"),
        (["--minutes", "nan"], "--minutes"),
        (["--threads", "100000"], "--threads"),
        (["--seed", str(10**23)], "--seed"),
        (["--device", "meta"], "--device"),
    ],
)
def test_impossible_numbers_are_refused(
    options: list[str], named: str, toy_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        g2p.main(["--data", str(toy_file), *options])
    assert f"argument {named}: " in capsys.readouterr().err


def test_unwritable_output_is_refused_before_training(toy_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert g2p.main(["--data", str(toy_file), "--output", str(toy_file / "below")]) == 2
    assert "argument --output: cannot write to" in capsys.readouterr().err


def test_batches_hold_every_pair_once_with_little_padding() -> None:
    trainer = toy_trainer()
    pairs = trainer.train_pairs
    generator = torch.Generator().manual_seed(0)
    first, second = pairs.batches(16, generator), pairs.batches(16, generator)
    assert torch.cat(first).sort().values.tolist() == list(range(len(pairs)))
    assert torch.cat(first).tolist() != torch.cat(second).tolist()
    for rows in first:
        batch = pairs.batch(rows)
        letters = batch.source != g2p_data.PADDING
        lengths = letters.sum(0)
        assert int(lengths.max()) == batch.source.shape[0]
        assert batch.lengths is None or torch.equal(batch.lengths, lengths)
        assert batch.lengths is not None or bool(letters.all())
        assert int((batch.target[1:] != g2p_data.PADDING).sum()) == batch.tokens
        assert (batch.target[0] == g2p_data.START).all()
        assert ((batch.target == g2p_data.END).sum(0) == 1).all()
    cells = sum(pairs.batch(rows).source.numel() for rows in first)
    assert int(pairs.source_lengths.sum()) / cells > 0.9


def assert_same_state(a: g2p_train.Trainer, b: g2p_train.Trainer) -> None:
    for (name, expected), actual in zip(a.model.state_dict().items(), b.model.state_dict().values()):
        assert torch.equal(expected, actual), name
    for expected, actual in zip(a.optimizer.state.values(), b.optimizer.state.values()):
        assert all(torch.equal(expected[key], actual[key]) for key in expected)
    assert a.scheduler.state_dict() == b.scheduler.state_dict()
    assert [r["train_loss"] for r in a.history] == [r["train_loss"] for r in b.history]
    assert [r["dev_loss"] for r in a.history] == [r["dev_loss"] for r in b.history]


@pytest.mark.parametrize("cut", [{"stop_after": 1}, {"max_steps": 3}, {"max_steps": 13}], ids=str)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_resume_is_bit_for_bit(cell: str, cut: dict, tmp_path: Path) -> None:
    whole = toy_trainer(cell=cell, dropout=0.3)
    assert whole.run() == "finished"
    path = tmp_path / "checkpoint.pt"
    first = toy_trainer(cell=cell, dropout=0.3)
    assert first.run(path, **cut) == "stopped"
    torch.manual_seed(12345)  # what a new process may have done with its generators
    second = toy_trainer(cell=cell, dropout=0.3)
    second.resume(path)
    assert second.total_steps == first.total_steps > 0
    assert second.run(path) == "finished"
    assert_same_state(whole, second)
    assert list(tmp_path.iterdir()) == [path], "temporary files must not stay"


def test_same_seed_same_weights_other_seed_others() -> None:
    trainers = [toy_trainer(), toy_trainer(), toy_trainer(seed=1)]
    for trainer in trainers:
        trainer.run(max_steps=3)
    assert_same_state(trainers[0], trainers[1])
    assert not torch.equal(trainers[0].model.decoder.output.weight, trainers[2].model.decoder.output.weight)


def test_time_budget_stops_training() -> None:
    trainer = toy_trainer()
    assert trainer.run(seconds=0.0) == "out of time"
    assert trainer.total_steps == 0


def test_interrupt_ends_the_step_and_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import signal

    step = g2p_train.train_step
    steps = []

    def interrupted_step(*arguments: object) -> float:
        steps.append(1)
        if len(steps) == 2:
            signal.raise_signal(signal.SIGINT)
        return step(*arguments)

    monkeypatch.setattr(g2p_train, "train_step", interrupted_step)
    trainer = toy_trainer()
    before = signal.getsignal(signal.SIGINT)
    assert trainer.run(tmp_path / "checkpoint.pt") == "interrupted"
    assert signal.getsignal(signal.SIGINT) is before
    assert trainer.step == 2
    assert g2p_train.read_checkpoint(tmp_path / "checkpoint.pt")["step"] == 2


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "checkpoint.pt"
    trainer = toy_trainer()
    trainer.save(path)
    old = path.read_bytes()

    def fail(state: object, file) -> None:
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        trainer.save(path)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_checkpoints_that_cannot_be_used(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    trainer = toy_trainer()
    with pytest.raises(g2p_train.CheckpointError, match="No such file"):
        trainer.resume(path)
    path.write_bytes(b"no checkpoint")
    with pytest.raises(g2p_train.CheckpointError, match="not a checkpoint"):
        trainer.resume(path)
    torch.save({"format": 0}, path)
    with pytest.raises(g2p_train.CheckpointError, match="not a checkpoint of this version"):
        trainer.resume(path)
    trainer.save(path)
    with pytest.raises(g2p_train.CheckpointError, match="hidden_size 24 there, 32 here"):
        toy_trainer(hidden_size=32).resume(path)


def test_learning_rate_rises_and_falls() -> None:
    factors = [g2p_train.learning_rate_factor(step, 100, 0.1) for step in range(101)]
    assert factors[0] == pytest.approx(0.1)
    assert max(factors) == factors[10] == 1.0
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[100] == pytest.approx(0.0)


@pytest.mark.parametrize("attention", ["none", "dot", "general", "additive"])
@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru"])
def test_losses_equal_those_on_torch_modules(cell: str, attention: str) -> None:
    trainer = toy_trainer()
    encoder_size = 12 if attention == "dot" else 24
    config = replace(trainer.config, cell=cell, attention=attention, encoder_size=encoder_size, encoder_layers=2)
    comparison = g2p_compare.compare(config, trainer.train_pairs, trainer.letters, trainer.phones, "cpu", steps=50)
    assert len(comparison.losses) == len(comparison.torch_losses) == 50
    assert comparison.difference <= 1e-3
    assert comparison.losses[-1] < comparison.losses[0]
    assert comparison.losses[0] != comparison.losses[1]


def test_torch_modules_are_torchs_own() -> None:
    trainer = toy_trainer(modules="torch", attention="additive")
    kinds = {type(module).__module__.split(".")[0] for module in trainer.model.modules()}
    assert "g2p_model" in kinds
    assert not any(type(module).__module__.startswith("rnnkern.nn") for module in trainer.model.modules())
    expected = toy_trainer(attention="additive").model.state_dict()
    actual = trainer.model.state_dict()
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


def test_building_a_model_leaves_the_generator_alone() -> None:
    state = torch.get_rng_state()
    trainer = toy_trainer()
    torch.set_rng_state(state)
    trainer.config.model(trainer.letters, trainer.phones)
    assert torch.equal(torch.get_rng_state(), state)


def test_short_run_from_end_to_end(toy_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    output = tmp_path / "run"
    arguments = ["--data", str(toy_file), "--output", str(output), *SMALL, "--epochs", "40", "--compare-steps", "3"]
    assert g2p.main([*arguments, "--say", "abba", "xyz"]) == 0
    printed = capsys.readouterr().out
    for part in ("epoch 40/40", "dev loss", "word error rate", "phoneme error rate", "words/s", "times as fast"):
        assert part in printed
    assert "abba  AH B B AH" in printed
    assert "xyz  has letters that the dictionary lacks" in printed
    assert (output / "attention.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((output / "results.json").read_text())
    assert len(results["history"]) == 40
    assert results["history"][-1]["dev_loss"] < 0.5 * results["history"][0]["dev_loss"]
    assert results["word_error_rate"] < 0.5
    assert len((output / "test.tsv").read_text().splitlines()) == results["test"]["words"]

    # Again: the same configuration, finished, may be made anew; another one may not take its place.
    other = [*arguments, "--hidden", "26"]
    assert g2p.main(other) == 2
    error = capsys.readouterr().err
    assert "hidden_size 24 there, 26 here" in error
    assert "--overwrite" in error
    assert g2p.main([*arguments, "--resume", "--say", "cab"]) == 0
    assert "cab  K AH B" in capsys.readouterr().out


def test_stopped_run_is_resumed(toy_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--data", str(toy_file), *SMALL, "--attention", "none"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert g2p.main([*arguments, "--output", str(whole)]) == 0
    assert g2p.main([*arguments, "--output", str(parts), "--stop-after", "1"]) == 0
    assert g2p.main([*arguments, "--output", str(parts)]) == 2
    assert "unfinished (1 of 2 epochs)" in capsys.readouterr().err
    assert g2p.main([*arguments, "--output", str(parts), "--resume"]) == 0
    states = [g2p_train.read_checkpoint(path / "checkpoint.pt")["model"] for path in (whole, parts)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert g2p.main([*arguments, "--output", str(parts), "--epochs", "3", "--overwrite"]) == 0


def test_input_errors_are_one_line(toy_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert g2p.main(["--data", str(tmp_path / "absent"), *SMALL]) == 2
    assert capsys.readouterr().err.startswith("g2p.py: ")
    toy_file.write_text(toy_file.read_text() + "no tab here\n")
    arguments = ["--data", str(toy_file), "--output", str(tmp_path / "run"), *SMALL, "--epochs", "1"]
    assert g2p.main(arguments) == 2
    assert "toy.tsv:161: expected word<TAB>phonemes" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert g2p.main([*arguments, "--on-bad-line", "skip"]) == 0
    assert "toy.tsv:161" in capsys.readouterr().err
    assert g2p.main(["--data", str(toy_file), "--resume", "--output", str(tmp_path / "none"), *SMALL]) == 2
    assert g2p.main([*arguments, "--on-bad-line", "skip", "--attention", "dot", "--encoder-hidden", "7"]) == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ["--cell", "sru"],
        ["--hidden", "0"],
        ["--dropout", "1"],
        ["--lr", "0"],
        ["--minutes", "-1"],
        ["--limit", "-1"],
        ["--threads", "0"],
        ["--device", "warp"],
        ["--resume", "--overwrite"],
    ],
    ids=" ".join,
)
def test_bad_options(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        g2p.parse_arguments(arguments)
    assert error.value.code == 2
    assert arguments[0] in capsys.readouterr().err
