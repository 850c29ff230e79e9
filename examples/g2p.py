"""English grapheme-to-phoneme conversion: how is a word that is not in the dictionary pronounced?

Trains a seq2seq model with attention on the CMU Pronouncing Dictionary, or on a dictionary of your own; then pronounces
the test words, which it has not seen, and reports phoneme and word error rates. Run it with no options for the demo:

    python examples/g2p.py

Everything it makes goes to the output directory: checkpoint.pt (``--resume`` continues it bit for bit), attention.png,
results.json and test.tsv (each test word, its pronunciation as found and as listed).
"""

import argparse
import json
import math
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import g2p_data as data
from g2p_compare import TOLERANCE, Comparison, compare
from g2p_evaluate import Score, evaluate, plot_attention, pronounce
from g2p_model import MODULES
from g2p_train import CheckpointError, Config, Trainer, read_checkpoint, require_same

import rnnkern
from rnnkern.seq2seq.decoder import ATTENTIONS
from rnnkern.seq2seq.encoder import RECURRENT_CELLS

EXAMPLES = 10
MOST_THREADS = 1024


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="g2p.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def add(group: Any, name: str, default: Any, help: str, **options: Any) -> None:
        group.add_argument(name, default=default, type=type(default), help=f"{help} (default: %(default)s)", **options)

    group = parser.add_argument_group("data")
    group.add_argument(
        "--data",
        type=Path,
        metavar="FILE",
        help="dictionary of lines word<TAB>p h o n e s, in UTF-8 (default: CMUdict)",
    )
    add(group, "--on-bad-line", "error", "what to do with a malformed line", choices=("error", "skip"))
    add(group, "--limit", 0, "use this many words only; 0 is all", metavar="N")

    group = parser.add_argument_group("model")
    add(group, "--cell", "lstm", "recurrent cell", choices=RECURRENT_CELLS)
    add(group, "--attention", "general", "attention score", choices=ATTENTIONS)
    add(group, "--hidden", 256, "hidden size of the decoder", metavar="H")
    group.add_argument(
        "--encoder-hidden",
        type=int,
        metavar="H",
        help="hidden size of each direction of the encoder (default: half of the decoder's)",
    )
    add(group, "--embedding", 64, "size of the letters' and phonemes' vectors", metavar="E")
    add(group, "--encoder-layers", 1, "layers of the encoder", metavar="L")
    add(group, "--decoder-layers", 1, "layers of the decoder", metavar="L")
    add(group, "--dropout", 0.2, "dropout probability", metavar="P")
    add(group, "--modules", "rnnkern", "train on rnnkern's modules or on torch's own", choices=MODULES)

    group = parser.add_argument_group("training")
    add(group, "--epochs", 5, "passes over the training words", metavar="N")
    add(group, "--batch", 128, "words per step", metavar="B")
    add(group, "--lr", 3e-3, "highest learning rate; it rises at first, then falls to 0 along a cosine")
    add(group, "--warmup", 0.05, "part of the training over which the learning rate rises", metavar="P")
    add(group, "--clip", 1.0, "largest norm of the gradient", metavar="NORM")
    add(group, "--seed", 0, "seed of weights, order and dropout", metavar="N")
    group.add_argument("--minutes", type=float, metavar="M", help="stop training after this time; --resume continues")
    group.add_argument("--stop-after", type=int, metavar="N", help="stop after this epoch; --resume continues")

    group = parser.add_argument_group("machine")
    add(group, "--device", "cpu", "torch device")
    group.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")

    group = parser.add_argument_group("output")
    add(group, "--output", Path("runs/g2p"), "directory for all results", metavar="DIR")
    group.add_argument(
        "--resume", action="store_true", help="continue from the output directory's checkpoint; give the same options"
    )
    group.add_argument("--overwrite", action="store_true", help="start anew even where there is another checkpoint")
    add(group, "--compare-steps", 50, "steps of the comparison with torch.nn before training; 0 for none", metavar="N")
    group.add_argument("--say", nargs="+", default=[], metavar="WORD", help="words of your own to pronounce at the end")

    options = parser.parse_args(arguments)
    for name in ("hidden", "embedding", "encoder_layers", "decoder_layers", "epochs", "batch"):
        if getattr(options, name) < 1:
            parser.error(f"argument --{name.replace('_', '-')}: expected at least 1, got {getattr(options, name)}")
    for name in ("limit", "compare_steps"):
        if getattr(options, name) < 0:
            parser.error(f"argument --{name.replace('_', '-')}: expected at least 0, got {getattr(options, name)}")
    if options.threads is not None and options.threads > MOST_THREADS:
        parser.error(f"argument --threads: expected at most {MOST_THREADS}, got {options.threads}")
    if not 0 <= options.seed < 2**63:
        parser.error(f"argument --seed: expected a number from 0 to 2**63 - 1, got {options.seed}")
    for name in ("encoder_hidden", "threads", "stop_after"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"argument --{name.replace('_', '-')}: expected at least 1, got {getattr(options, name)}")
    if not 0 <= options.dropout < 1:
        parser.error(f"argument --dropout: expected a probability in [0, 1), got {options.dropout}")
    if not 0 <= options.warmup <= 1:
        parser.error(f"argument --warmup: expected a number from 0 to 1, got {options.warmup}")
    for name in ("lr", "clip", "minutes"):
        value = getattr(options, name)
        if value is not None and not (0 < value < math.inf):  # refuses NaN too
            parser.error(f"argument --{name}: expected a number above 0, got {value}")
    if options.resume and options.overwrite:
        parser.error("--resume and --overwrite exclude each other")
    try:
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"argument --device: {str(error).splitlines()[0]}")
    if torch.device(options.device).type == "meta":
        parser.error("argument --device: nothing can be trained on meta, which holds no data")
    return options


def make_config(options: argparse.Namespace, lexicon: data.Lexicon) -> Config:
    """Takes from the options what decides what is learned."""
    encoder_size = max(1, options.hidden // 2) if options.encoder_hidden is None else options.encoder_hidden
    if options.attention == "dot" and 2 * encoder_size != options.hidden:
        raise data.DataError(
            f"dot attention needs --hidden twice --encoder-hidden, got {options.hidden} and {encoder_size}"
        )
    return Config(
        data=data.digest(lexicon),
        cell=options.cell,
        attention=options.attention,
        embedding_size=options.embedding,
        hidden_size=options.hidden,
        encoder_size=encoder_size,
        encoder_layers=options.encoder_layers,
        decoder_layers=options.decoder_layers,
        dropout=options.dropout,
        epochs=options.epochs,
        batch_size=options.batch,
        learning_rate=options.lr,
        warmup=options.warmup,
        clip=options.clip,
        seed=options.seed,
        modules=options.modules,
    )


def check_output(checkpoint: Path, config: Config, resume: bool, overwrite: bool) -> None:
    """Refuses to lose a checkpoint: another configuration's, or an unfinished one.

    A finished checkpoint of this very configuration may be made again: the result is the same.
    """
    if resume:
        if not checkpoint.exists():
            raise CheckpointError(f"nothing to resume: {checkpoint} does not exist")
        return
    if overwrite or not checkpoint.exists():
        return
    try:
        state = read_checkpoint(checkpoint)
        require_same(state["config"], config, checkpoint)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; choose another --output, or --overwrite it") from None
    if state["epoch"] < config.epochs:
        raise CheckpointError(
            f"{checkpoint} is unfinished ({state['epoch']} of {config.epochs} epochs): --resume it, or --overwrite it"
        )


def make_writable(directory: Path) -> None:
    """Makes the directory and shows that it can be written to, before an epoch is spent on what cannot be saved."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise CheckpointError(f"argument --output: cannot write to {directory}: {error.strerror}") from None


def report_comparison(comparison: Comparison) -> None:
    """Prints what the comparison with torch's modules found."""
    print(
        f"first {len(comparison.losses)} steps, no dropout: losses differ by at most {comparison.difference:.1e} "
        f"(allowed {TOLERANCE:.0e}); median step {1e3 * comparison.seconds:.1f} ms on rnnkern, "
        f"{1e3 * comparison.torch_seconds:.1f} ms on torch.nn: {comparison.speed_ratio:.2f} times as fast",
        flush=True,
    )


def report_test(result: Score, rate: float, found: dict[str, tuple[str, ...]], listed: data.Lexicon) -> None:
    """Prints error rates and a few pronunciations, always of the same words."""
    print(
        f"test: {result.words} words, word error rate {100 * result.word_error_rate:.1f}%, "
        f"phoneme error rate {100 * result.phoneme_error_rate:.1f}%, {rate:.0f} words/s"
    )
    words = sorted(found, key=lambda word: data.word_hash(f"example {word}"))[:EXAMPLES]
    width = max(map(len, words))
    for word in words:
        right = found[word] in listed[word]
        wanted = "" if right else f"   listed: {' | '.join(map(' '.join, listed[word]))}"
        print(f"  {'+' if right else '-'} {word:{width}}  {' '.join(found[word])}{wanted}")


def say(words: list[str], trainer: Trainer) -> None:
    """Pronounces words of the user's own."""
    known = set(trainer.letters.symbols)
    for word in words:
        if not word or not known.issuperset(word):
            print(f"  ? {word}  has letters that the dictionary lacks")
            continue
        found = pronounce(trainer.model, [word], trainer.letters, trainer.phones, trainer.device)
        print(f"    {word}  {' '.join(found[word])}")


def write_results(
    directory: Path, results: dict[str, Any], found: dict[str, tuple[str, ...]], listed: data.Lexicon
) -> None:
    """Writes results.json and test.tsv."""
    (directory / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    lines = [f"{word}\t{' '.join(found[word])}\t{' | '.join(map(' '.join, listed[word]))}\n" for word in sorted(found)]
    (directory / "test.tsv").write_text("".join(lines), encoding="utf-8")


def run(options: argparse.Namespace) -> int:
    """Does what the options ask; returns the exit status."""
    begin = time.perf_counter()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    bad = options.on_bad_line
    lexicon = data.read_cmudict(bad) if options.data is None else data.read_file(options.data, bad)
    lexicon = data.take_words(lexicon, options.limit)
    splits = data.split_lexicon(lexicon)
    config = make_config(options, lexicon)
    checkpoint = options.output / "checkpoint.pt"
    check_output(checkpoint, config, options.resume, options.overwrite)
    make_writable(options.output)

    letters = data.Vocabulary.of(lexicon)
    phones = data.Vocabulary.of(p for pronunciations in lexicon.values() for p in pronunciations)
    train, dev = (data.Pairs(splits[name], letters, phones) for name in ("train", "dev"))
    trainer = Trainer(config, train, dev, letters, phones, options.device)
    print(
        f"{len(lexicon)} words: {', '.join(f'{len(splits[name])} {name}' for name in data.SPLITS)}; "
        f"{len(letters) - 3} letters, {len(phones) - 3} phonemes; "
        f"{sum(p.numel() for p in trainer.model.parameters())} weights; {torch.get_num_threads()} threads",
        flush=True,
    )
    comparison = None
    if options.compare_steps and not options.resume:
        comparison = compare(config, train, letters, phones, options.device, options.compare_steps)
        report_comparison(comparison)

    if options.resume:
        trainer.resume(checkpoint)
        print(f"resumed after epoch {trainer.epoch}, step {trainer.step}")
    seconds = None if options.minutes is None else 60 * options.minutes
    verdict = trainer.run(checkpoint, stop_after=options.stop_after, seconds=seconds)
    if verdict != "finished":
        print(f"{verdict} after epoch {trainer.epoch}, step {trainer.step}: --resume continues")
    if verdict == "interrupted":
        return 130

    result, found, rate = evaluate(trainer.model, splits["test"], letters, phones, options.device)
    report_test(result, rate, found, splits["test"])
    say(options.say, trainer)
    if config.attention != "none":
        longest = sorted((w for w in found if 6 <= len(w) <= 12), key=lambda w: data.word_hash(f"example {w}"))[:4]
        plot_attention(
            trainer.model, longest or list(found)[:1], letters, phones, options.device, options.output / "attention.png"
        )
    results = {
        "config": asdict(config),
        "version": rnnkern.__version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "epochs": trainer.epoch,
        "history": trainer.history,
        "test": asdict(result),
        "word_error_rate": result.word_error_rate,
        "phoneme_error_rate": result.phoneme_error_rate,
        "words_per_second": rate,
        "training_seconds": trainer.seconds,
        "seconds": time.perf_counter() - begin,
        "comparison": None if comparison is None else asdict(comparison) | {"speed_ratio": comparison.speed_ratio},
    }
    write_results(options.output, results, found, splits["test"])
    print(f"{results['seconds']:.0f} s in all, {trainer.seconds:.0f} s of it training; results in {options.output}")
    if comparison is not None and not comparison.difference <= TOLERANCE:
        print("the losses differ from those on torch.nn by more than rounding explains", file=sys.stderr)
        return 1
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Runs the program; an error of the user's input is one line."""
    try:
        return run(parse_arguments(arguments))
    except (data.DataError, CheckpointError) as error:
        print(f"g2p.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
