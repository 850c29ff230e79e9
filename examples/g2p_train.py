"""Training: one object whose whole state goes into a checkpoint, so that a resumed run continues bit for bit."""

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from g2p_data import Batch, Pairs, Vocabulary
from g2p_model import build_model
from tqdm import tqdm

from rnnkern.seq2seq import Seq2Seq

FORMAT = 1


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used, or must not be overwritten."""


@dataclass(frozen=True)
class Config:
    """All that decides what is learned; a checkpoint belongs to one configuration."""

    data: str  # digest of the dictionary
    cell: str
    attention: str
    embedding_size: int
    hidden_size: int
    encoder_size: int
    encoder_layers: int
    decoder_layers: int
    dropout: float
    epochs: int
    batch_size: int
    learning_rate: float
    warmup: float  # part of the steps over which the learning rate rises
    clip: float
    seed: int
    modules: str

    def model(self, letters: Vocabulary, phones: Vocabulary, **changes: Any) -> Seq2Seq:
        """Builds the model of this configuration, or with changes to it."""
        options = dict(
            cell=self.cell,
            attention=self.attention,
            embedding_size=self.embedding_size,
            hidden_size=self.hidden_size,
            encoder_size=self.encoder_size,
            encoder_layers=self.encoder_layers,
            decoder_layers=self.decoder_layers,
            dropout=self.dropout,
            seed=self.seed,
            modules=self.modules,
        )
        return build_model(len(letters), len(phones), **(options | changes))


def make_optimizer(model: Seq2Seq, learning_rate: float) -> torch.optim.Optimizer:
    """Adam, in one fused call per step."""
    return torch.optim.Adam(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), fused=True)


def train_step(model: Seq2Seq, optimizer: torch.optim.Optimizer, batch: Batch, clip: float) -> float:
    """Takes one step and returns the loss before it, in nats per symbol."""
    loss = model.loss(batch.source, batch.target, batch.lengths)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    return loss.item()


@torch.no_grad()
def mean_loss(model: Seq2Seq, pairs: Pairs, batch_size: int, device: str) -> float:
    """Cross entropy per symbol over all pairs, in nats."""
    training = model.training
    model.eval()
    total, tokens = 0.0, 0
    for rows in pairs.batches(batch_size):
        batch = pairs.batch(rows).to(device)
        total += model.loss(batch.source, batch.target, batch.lengths).item() * batch.tokens
        tokens += batch.tokens
    model.train(training)
    return total / tokens


def learning_rate_factor(step: int, total: int, warmup: float) -> float:
    """Rises linearly over the first part of the steps, then falls to zero along a cosine."""
    rising = max(1, round(warmup * total))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rising) / max(1, total - rising))))


class Trainer:
    """Trains a model on pairs of words and pronunciations.

    The state is: weights, optimizer, schedule, random generators (dropout, order), the order of the epoch under way and
    the place in it. ``save`` writes all of it and ``resume`` reads it back, so that a run cut after any step and then
    resumed ends in the same weights, bit for bit, on the same machine with the same number of threads.
    """

    def __init__(
        self, config: Config, train: Pairs, dev: Pairs, letters: Vocabulary, phones: Vocabulary, device: str = "cpu"
    ) -> None:
        self.config = config
        self.train_pairs, self.dev_pairs = train, dev
        self.letters, self.phones = letters, phones
        self.device = device
        self.model = config.model(letters, phones).to(device)
        self.optimizer = make_optimizer(self.model, config.learning_rate)
        self.steps_per_epoch = math.ceil(len(train) / config.batch_size)
        total = config.epochs * self.steps_per_epoch
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: learning_rate_factor(step, total, config.warmup)
        )
        self.generator = torch.Generator().manual_seed(config.seed)
        self.dropout_state: dict[str, Any] | None = None  # of the generators that dropout draws from; None: fresh
        self.epoch = 0  # epochs completed
        self.step = 0  # steps completed in the epoch under way
        self.order: list[torch.Tensor] = []  # batches of the epoch under way
        self.loss_sum = 0.0  # of the epoch under way
        self.seconds = 0.0  # of training, over all runs
        self.history: list[dict[str, float]] = []

    @property
    def finished(self) -> bool:
        """Whether all epochs are done."""
        return self.epoch >= self.config.epochs

    def run(
        self,
        checkpoint: Path | None = None,
        *,
        stop_after: int | None = None,
        seconds: float | None = None,
        max_steps: int | None = None,
    ) -> str:
        """Trains to the end of the last epoch, or until it is told to stop; either way the state can be resumed.

        Args:
            checkpoint: file to save to, after each epoch and when stopped; none is saved without it.
            stop_after: stop when this many epochs are completed, over all runs.
            seconds: stop at the first step after this much time.
            max_steps: stop after this many steps of this run.

        Returns:
            "finished", or what stopped it: "interrupted" (Ctrl-C), "out of time", "stopped".
        """
        self._restore_dropout()
        begin, before, first = time.perf_counter(), self.seconds, self.total_steps
        last_epoch = self.config.epochs if stop_after is None else min(stop_after, self.config.epochs)
        with _deferred_interrupt() as interrupted:

            def verdict() -> str | None:
                self.seconds = before + time.perf_counter() - begin
                if interrupted.is_set():
                    return "interrupted"
                if seconds is not None and time.perf_counter() - begin > seconds:
                    return "out of time"
                if max_steps is not None and self.total_steps - first >= max_steps:
                    return "stopped"
                return None

            stopped = None
            while stopped is None and self.epoch < last_epoch:
                stopped = self._run_epoch(verdict)
                cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
                self.dropout_state = {"cpu": torch.get_rng_state(), "cuda": cuda}
                if checkpoint is not None:
                    self.save(checkpoint)
        return stopped or ("finished" if self.finished else "stopped")

    def _restore_dropout(self) -> None:
        """Puts the global generators where this training left them."""
        if self.dropout_state is None:
            torch.manual_seed(self.config.seed)
            return
        torch.set_rng_state(self.dropout_state["cpu"])
        if self.dropout_state["cuda"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(self.dropout_state["cuda"])

    @property
    def total_steps(self) -> int:
        """Steps taken over all runs."""
        return self.epoch * self.steps_per_epoch + self.step

    def _run_epoch(self, verdict: Callable[[], str | None]) -> str | None:
        """Goes on to the end of the epoch, or to the step at which there is a verdict."""
        if not self.order:
            self.order = self.train_pairs.batches(self.config.batch_size, self.generator)
        self.model.train()
        title = f"epoch {self.epoch + 1}/{self.config.epochs}"
        with tqdm(total=len(self.order), initial=self.step, desc=title, unit="batch", leave=False, disable=None) as bar:
            while self.step < len(self.order):
                stopped = verdict()
                if stopped is not None:
                    return stopped
                batch = self.train_pairs.batch(self.order[self.step]).to(self.device)
                loss = train_step(self.model, self.optimizer, batch, self.config.clip)
                self.scheduler.step()
                self.loss_sum += loss
                self.step += 1
                bar.update()
                if self.step % 20 == 0:
                    bar.set_postfix(loss=f"{loss:.3f}")
        record = {
            "epoch": self.epoch + 1,
            "train_loss": self.loss_sum / len(self.order),
            "dev_loss": mean_loss(self.model, self.dev_pairs, self.config.batch_size, self.device),
        }
        self.epoch, self.step, self.order, self.loss_sum = self.epoch + 1, 0, [], 0.0
        verdict()  # brings self.seconds up to date
        self.history.append(record | {"seconds": self.seconds})
        print(
            f"{title}  train loss {record['train_loss']:.4f}  dev loss {record['dev_loss']:.4f}  {self.seconds:.0f} s",
            flush=True,
        )
        return None

    def save(self, path: Path) -> None:
        """Writes the checkpoint: to a temporary file first, so that a crash leaves the old one whole."""
        state = {
            "format": FORMAT,
            "config": asdict(self.config),
            "letters": list(self.letters.symbols),
            "phones": list(self.phones.symbols),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "dropout": self.dropout_state,
            "order_rng": self.generator.get_state(),
            "order": self.order,
            "epoch": self.epoch,
            "step": self.step,
            "loss_sum": self.loss_sum,
            "seconds": self.seconds,
            "history": self.history,
        }
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def resume(self, path: Path) -> None:
        """Takes up the state of a checkpoint of the same configuration.

        Raises:
            CheckpointError: the file is no checkpoint of this program, or of another configuration.
        """
        state = read_checkpoint(path)
        require_same(state["config"], self.config, path)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.dropout_state = state["dropout"]
        self.generator.set_state(state["order_rng"])
        self.order = state["order"]
        self.epoch, self.step = state["epoch"], state["step"]
        self.loss_sum, self.seconds = state["loss_sum"], state["seconds"]
        self.history = state["history"]


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a checkpoint: tensors and plain values only, never code.

    Raises:
        CheckpointError: the file cannot be read, or is no checkpoint of this program.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    except Exception as error:  # torch.load raises whatever the broken bytes lead to
        raise CheckpointError(f"{path}: not a checkpoint ({type(error).__name__})") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a checkpoint of this version")
    return state


def require_same(saved: dict[str, Any], config: Config, path: Path) -> None:
    """Refuses a checkpoint of another configuration, naming what differs."""
    given = asdict(config)
    differing = [
        f"{name} {saved.get(name)} there, {given.get(name)} here"
        for name in sorted(saved.keys() | given.keys())
        if saved.get(name) != given.get(name)
    ]
    if differing:
        raise CheckpointError(f"{path} is of another configuration: {'; '.join(differing)}")


@contextmanager
def _deferred_interrupt() -> Iterator[threading.Event]:
    """Turns the first Ctrl-C into an event, so that no step is cut in half; the second one acts as ever."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def on_interrupt(number: int, frame: Any) -> None:
        event.set()
        signal.signal(signal.SIGINT, previous)

    previous = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, previous)
