"""A recurrent workload, built once and run by rnnkern and by torch.nn on the same weights and data."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import rnnkern
from rnnkern._bench.floors import Ceilings, floor_seconds

CELLS = {"rnn_tanh": "RNN", "rnn_relu": "RNN", "gru": "GRU", "lstm": "LSTM"}
DTYPES = {  # as names say them
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
}
OURS, TORCH = "rnnkern", "torch.nn"
NAME = re.compile(
    rf"(?P<cell>{'|'.join(CELLS)})-(?:(?P<single_step>cell)|T(?P<T>\d+))-B(?P<B>\d+)-H(?P<H>\d+)(?:-I(?P<I>\d+))?"
    r"(?:-L(?P<layers>\d+))?(?:-(?P<bidirectional>bidirectional))?(?:-(?P<ragged>lengths|packed))?"
    rf"(?:-(?P<dtype>{'|'.join(DTYPES)}))?-(?P<mode>eval|train)"
)


@dataclass(frozen=True)
class Case:
    """What is run. With `single_step`, the modules are torch's cells (nn.LSTMCell, ...) and T is 1.

    The dtype int8 is that of our module's weights, for inference; all else is float32 then, torch.nn's module too.
    `ragged` gives rows lengths of their own: "lengths" as our modules' argument, "packed" as a PackedSequence, which is
    what torch.nn gets in both.
    """

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
    ragged: str = ""

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
        if self.ragged:
            parts.append(self.ragged)
        if self.dtype != torch.float32:
            parts.append(str(self.dtype).removeprefix("torch."))
        return "-".join([*parts, "train" if self.training else "eval"])

    @classmethod
    def parse(cls, name: str) -> "Case":
        """The case of a name.

        Raises:
            ValueError: it is no case's name.
        """
        found = NAME.fullmatch(name)
        if found is None:
            raise ValueError(
                f"{name!r} is not the name of a case, such as lstm-T100-B32-H256-I80-L2-bidirectional-eval"
            )
        case = cls(
            found["cell"],
            T=int(found["T"] or 1),
            B=int(found["B"]),
            I=int(found["I"] or found["H"]),
            H=int(found["H"]),
            layers=int(found["layers"] or 1),
            bidirectional=found["bidirectional"] is not None,
            training=found["mode"] == "train",
            dtype=DTYPES.get(found["dtype"], torch.float32),
            single_step=found["single_step"] is not None,
            ragged=found["ragged"] or "",
        )
        if min(case.T, case.B, case.I, case.H, case.layers) < 1:
            raise ValueError(f"{name!r}: every size must be at least 1")
        if case.quantized and (case.training or case.single_step):
            raise ValueError(f"{name!r}: int8 is for layers in eval mode")
        return case

    @property
    def quantized(self) -> bool:
        """Whether our module has int8 weights."""
        return self.dtype == torch.int8

    @property
    def values(self) -> torch.dtype:
        """The dtype of input, states and output."""
        return torch.float32 if self.quantized else self.dtype

    def input(self, device: str = "cpu") -> Tensor:
        """x [T, B, I], of a cell [B, I]."""
        shape = (self.B, self.I) if self.single_step else (self.T, self.B, self.I)
        generator = torch.Generator(device).manual_seed(0)
        return torch.randn(shape, generator=generator, device=device).to(self.values)

    def lengths(self) -> Tensor:
        """Steps of each row [B], in no order: of a ragged case T / 10 to T, one of them T; else T."""
        if not self.ragged:
            return torch.full((self.B,), self.T)
        generator = torch.Generator().manual_seed(0)
        lengths = torch.randint(max(1, self.T // 10), self.T + 1, (self.B,), generator=generator)
        lengths[self.B // 2] = self.T
        return lengths

    def valid_share(self) -> float:
        """Valid steps / padded steps."""
        return int(self.lengths().sum()) / (self.T * self.B)

    def floor(self, ceilings: Ceilings) -> float | None:
        """Seconds, or None where the formula does not speak: it is one of single precision."""
        if self.dtype != torch.float32:
            return None
        sizes = {"T": self.T, "B": self.B, "I": self.I, "H": self.H, "layers": self.layers}
        padded = floor_seconds(self.cell, ceilings, **sizes, bidirectional=self.bidirectional, training=self.training)
        return self.valid_share() * padded


def modules(case: Case, device: str = "cpu") -> dict[str, nn.Module]:
    """Ours and torch's module, with the same weights each time."""
    kwargs: dict[str, Any] = {"nonlinearity": case.cell.removeprefix("rnn_")} if case.cell.startswith("rnn_") else {}
    name = CELLS[case.cell] + ("Cell" if case.single_step else "")
    if not case.single_step:
        kwargs |= {"num_layers": case.layers, "bidirectional": case.bidirectional}
    kwargs["device"] = device
    with torch.random.fork_rng(devices=[] if device == "cpu" else [device]):
        torch.manual_seed(0)
        theirs = getattr(nn, name)(case.I, case.H, **kwargs).to(case.values)
        ours = getattr(rnnkern.nn, name)(case.I, case.H, **kwargs).to(case.values)
    ours.load_state_dict(theirs.state_dict())
    if case.quantized:
        ours = rnnkern.quantize_dynamic(ours)
    # Without gradients nothing needs them, so that no call pays for a torch.no_grad of its own.
    return {
        name: module.train(case.training).requires_grad_(case.training)
        for name, module in ((OURS, ours), (TORCH, theirs))
    }


def first_tensor(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """A module's output without its states."""
    return output if isinstance(output, Tensor) else output[0]


def forward_runner(case: Case, module: nn.Module, device: str = "cpu") -> tuple[Tensor, Callable[[], Tensor]]:
    """The input, and a function that runs the module on it and returns its output: of packed input, packed data."""
    x = case.input(device)
    if case.ragged == "packed":
        packed = pack_padded_sequence(x, case.lengths(), enforce_sorted=False)
        packed = PackedSequence(packed.data.requires_grad_(case.training), *packed[1:])
        return packed.data, lambda: module(packed)[0].data
    x.requires_grad_(case.training)
    if case.ragged:
        lengths = case.lengths()
        return x, lambda: first_tensor(module(x, lengths=lengths))
    return x, lambda: first_tensor(module(x))


def runner(case: Case, module: nn.Module, device: str = "cpu") -> Callable[[], object]:
    """A function that runs the case once: forward without gradients, or forward and every gradient."""
    x, forward = forward_runner(case, module, device)
    if not case.training:
        return forward
    wanted = [x, *module.parameters()]
    shape = (*x.shape[:-1], case.H * (2 if case.bidirectional else 1))
    # Gradients of weights are sums over all steps and rows: of ones they may be more than float16 can hold.
    one = 1 / 64 if case.dtype == torch.float16 else 1.0
    gradient = torch.full(shape, one, dtype=case.dtype, device=device)
    return lambda: torch.autograd.grad(forward(), wanted, gradient)


def runners(case: Case) -> dict[str, Callable[[], object]]:
    """The functions to compare, ours first."""
    of = modules(case)
    theirs = replace(case, ragged="packed") if case.ragged else case
    return {OURS: runner(case, of[OURS]), TORCH: runner(theirs, of[TORCH])}
