"""The times that this project aims at: targets set before any kernel had run, neither measurements nor promises."""

from dataclasses import dataclass

import torch

from rnnkern._bench.cases import Case

SOURCE = "the project's target: microseconds per step, recurrent part of an LSTM's forward on an H200"
LOW_PRECISION = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Target:
    """Microseconds per step, from and to, for hidden sizes up to H."""

    H: int
    low: float
    high: float
    B: tuple[int, int] = (1, 128)  # batches it speaks of


ONE_ROW = Target(2048, 0.5, 1.2, B=(1, 1))  # from H = 256 on
BY_SIZE = (
    Target(128, 0.5, 0.7),
    Target(192, 0.6, 0.6, B=(32, 128)),
    Target(512, 0.6, 0.8, B=(8, 128)),
    Target(1024, 1.3, 1.3, B=(8, 128)),
    Target(2048, 2.5, 2.5, B=(8, 128)),
)


def target(case: Case) -> Target | None:
    """The target of a case, None where there is none: for 16 bits, LSTM and GRU, forward."""
    if case.dtype not in LOW_PRECISION or case.cell not in ("lstm", "gru") or case.training or case.single_step:
        return None
    if case.B == 1 and 256 <= case.H <= ONE_ROW.H:
        return ONE_ROW
    of_size = next((found for found in BY_SIZE if case.H <= found.H), None)
    return of_size if of_size is not None and of_size.B[0] <= case.B <= of_size.B[1] else None


# What latencies were taken to be when the engines were designed, in nanoseconds at 1.98 GHz: low, high.
ESTIMATES = {
    "cluster exchange, 8 blocks, 8 KiB": (177, 227),
    "flag through L2, one way": (400, 400),
    "grid barrier, cooperative groups": (1200, 2000),
}
