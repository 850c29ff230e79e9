"""The least time a recurrence can take on a machine, from what the machine can do.

    floor of a direction = projection + T * (max(FLOP / peak, weight bytes / bandwidth) + exchange + activations)
    projection           = max(FLOP / peak, weight bytes / bandwidth)
    training             = 3 * forward

FLOP counts the two matrix products (2 per multiply-add). The recurrent weights are read once per step, each core its
share, from the nearest memory that holds it. `exchange` is the hand-over of the hidden state between threads, which a
batch of 8 and more rows avoids by splitting rows. Activations run at the rate of a rational approximation of tanh. No
engine reaches a floor: it says how far there is still to go.
"""

from dataclasses import dataclass

GATES = {"rnn_tanh": 1, "rnn_relu": 1, "gru": 3, "lstm": 4}
# Transcendental functions per unit and step: LSTM has four gates and the tanh of its cell state.
ACTIVATIONS = {"rnn_tanh": 1, "rnn_relu": 0, "gru": 3, "lstm": 5}
EXCHANGE_SECONDS = 0.04e-6
EXCHANGE_BELOW_BATCH = 8


@dataclass(frozen=True)
class CacheLevel:
    """A level of memory: what one core can keep in it, and how fast the cores together read it."""

    bytes_per_core: float
    read_gbps: float  # all threads together


@dataclass(frozen=True)
class Ceilings:
    """What the machine can do with `threads` threads."""

    threads: int
    fma_gflops: float  # single precision
    activations_gps: float  # 1e9 tanh per second
    levels: tuple[CacheLevel, ...]  # nearest first; the last one holds everything

    def read_seconds(self, size: float) -> float:
        """Time to read `size` bytes, as is done again and again, each core its share."""
        share = size / self.threads
        nearest, *farther = self.levels
        if share <= nearest.bytes_per_core:
            return size / (nearest.read_gbps * 1e9)
        # A loop over more than the first cache holds finds nothing there; larger ones keep a part, read back and forth.
        seconds = 0.0
        for level in farther:
            part = share if level is farther[-1] else min(share, level.bytes_per_core)
            seconds += part * self.threads / (level.read_gbps * 1e9)
            share -= part
        return seconds


def floor_seconds(
    cell: str,
    ceilings: Ceilings,
    *,
    T: int,
    B: int,
    I: int,
    H: int,
    layers: int = 1,
    bidirectional: bool = False,
    training: bool = False,
    element_size: int = 4,
) -> float:
    """The floor in seconds.

    Args:
        cell: "rnn_tanh", "rnn_relu", "lstm" or "gru".
        ceilings: the machine's.
        T: time steps.
        B: batch.
        I: input size.
        H: hidden size.
        layers: stacked layers.
        bidirectional: both directions.
        training: forward and backward: each matrix product of the forward has two more in the backward.
        element_size: bytes of a weight.
    """
    directions = 2 if bidirectional else 1
    flops = ceilings.fma_gflops * 1e9
    gates = GATES[cell] * H
    total = 0.0
    for layer in range(layers):
        inputs = I if layer == 0 else directions * H
        projection = max(2 * T * B * inputs * gates / flops, ceilings.read_seconds(inputs * gates * element_size))
        step = max(2 * B * H * gates / flops, ceilings.read_seconds(H * gates * element_size))
        if B < EXCHANGE_BELOW_BATCH and ceilings.threads > 1:
            step += EXCHANGE_SECONDS
        step += ACTIVATIONS[cell] * B * H / (ceilings.activations_gps * 1e9)
        total += directions * (projection + T * step)
    return 3 * total if training else total
