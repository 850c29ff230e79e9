"""A recurrent workload, built once and run by rnnkern and by torch.nn on the same weights and data."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import rnnkern
from rnnkern._bench.floors import Ceilings, floor_seconds

CELLS = {"rnn_tanh": "RNN", "rnn_relu": "RNN", "gru": "GRU", "lstm": "LSTM"}
OURS, TORCH = "rnnkern", "torch.nn"


@dataclass(frozen=True)
class Case:
    """What is run. With `single_step`, the modules are torch's cells (nn.LSTMCell, ...) and T is 1."""

    cell: str
    T: int
    B: int
    I: int
    H: int
    layers: int = 1
    bidirectional: bool = False
    training: bool = False
    dtype: torch.dtype = torch.float32
    single_step: bool = False

    @property
    def name(self) -> str:
        """A short name, the same on every machine."""
        parts = [self.cell, "cell" if self.single_step else f"T{self.T}", f"B{self.B}", f"H{self.H}"]
        if self.I != self.H:
            parts.append(f"I{self.I}")
        if self.layers > 1:
            parts.append(f"L{self.layers}")
        if self.bidirectional:
            parts.append("bidirectional")
        if self.dtype != torch.float32:
            parts.append(str(self.dtype).removeprefix("torch."))
        return "-".join([*parts, "train" if self.training else "eval"])

    def floor(self, ceilings: Ceilings) -> float | None:
        """Seconds, or None where the formula does not speak: it is one of single precision."""
        if self.dtype != torch.float32:
            return None
        sizes = {"T": self.T, "B": self.B, "I": self.I, "H": self.H, "layers": self.layers}
        return floor_seconds(self.cell, ceilings, **sizes, bidirectional=self.bidirectional, training=self.training)


def modules(case: Case) -> dict[str, nn.Module]:
    """Ours and torch's module, with the same weights."""
    kwargs: dict[str, object] = {"nonlinearity": case.cell.removeprefix("rnn_")} if case.cell.startswith("rnn_") else {}
    name = CELLS[case.cell] + ("Cell" if case.single_step else "")
    if not case.single_step:
        kwargs |= {"num_layers": case.layers, "bidirectional": case.bidirectional}
    theirs = getattr(nn, name)(case.I, case.H, **kwargs).to(case.dtype)
    ours = getattr(rnnkern.nn, name)(case.I, case.H, **kwargs).to(case.dtype)
    ours.load_state_dict(theirs.state_dict())
    return {OURS: ours.train(case.training), TORCH: theirs.train(case.training)}


def first_tensor(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """A module's output without its states."""
    return output if isinstance(output, Tensor) else output[0]


def runner(case: Case, module: nn.Module) -> Callable[[], object]:
    """A function that runs the case once: forward without gradients, or forward and every gradient."""
    generator = torch.Generator().manual_seed(0)
    shape = (case.B, case.I) if case.single_step else (case.T, case.B, case.I)
    x = torch.randn(shape, generator=generator).to(case.dtype)
    if not case.training:

        def forward() -> Tensor:
            with torch.no_grad():
                return first_tensor(module(x))

        return forward
    x.requires_grad_()
    wanted = [x, *module.parameters()]
    gradient = torch.ones(*shape[:-1], case.H * (2 if case.bidirectional else 1), dtype=case.dtype)

    def forward_backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(first_tensor(module(x)), wanted, gradient)

    return forward_backward


def runners(case: Case) -> dict[str, Callable[[], object]]:
    """The functions to compare, ours first."""
    return {name: runner(case, module) for name, module in modules(case).items()}
