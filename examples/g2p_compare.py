"""The same training on rnnkern's modules and on torch's own: the same losses, and how much faster."""

import math
import statistics
import time
from dataclasses import dataclass, replace

import torch
from g2p_data import Pairs, Vocabulary
from g2p_train import Config, learning_rate_factor, make_optimizer, train_step

# Two implementations of one model drift apart by rounding alone; this is what the first 50 steps may show of it.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Comparison:
    """Losses of each step and median seconds per step, on both kinds of modules."""

    losses: list[float]
    torch_losses: list[float]
    seconds: float
    torch_seconds: float

    @property
    def difference(self) -> float:
        """The largest difference of two losses."""
        return max(abs(a - b) for a, b in zip(self.losses, self.torch_losses))

    @property
    def speed_ratio(self) -> float:
        """How many times faster a step is on rnnkern's modules."""
        return self.torch_seconds / self.seconds


def compare(
    config: Config, pairs: Pairs, letters: Vocabulary, phones: Vocabulary, device: str, steps: int
) -> Comparison:
    """Takes the first steps of the training on both, from the same weights, without dropout, in turns.

    The turns make the two meet the same load of the machine; medians keep a stray pause out.
    """
    config = replace(config, dropout=0.0)
    batches = pairs.batches(config.batch_size, torch.Generator().manual_seed(config.seed))
    total = config.epochs * math.ceil(len(pairs) / config.batch_size)
    models = {name: config.model(letters, phones, modules=name).to(device) for name in ("rnnkern", "torch")}
    optimizers = {name: make_optimizer(model, config.learning_rate) for name, model in models.items()}
    losses: dict[str, list[float]] = {name: [] for name in models}
    times: dict[str, list[float]] = {name: [] for name in models}
    for step in range(steps):
        batch = pairs.batch(batches[step % len(batches)]).to(device)
        for optimizer in optimizers.values():
            optimizer.param_groups[0]["lr"] = config.learning_rate * learning_rate_factor(step, total, config.warmup)
        for name in models if step % 2 == 0 else reversed(models):
            begin = time.perf_counter()
            losses[name].append(train_step(models[name].train(), optimizers[name], batch, config.clip))
            times[name].append(time.perf_counter() - begin)
    return Comparison(
        losses["rnnkern"], losses["torch"], statistics.median(times["rnnkern"]), statistics.median(times["torch"])
    )
