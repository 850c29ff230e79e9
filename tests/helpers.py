"""What the tests share: layers with random contents, ways to run them, and the one table of tolerances."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import rnnkern
from rnnkern import _library
from rnnkern.cells import CELLS
from rnnkern.cells.reference import compute_dtype
from rnnkern.ops.packs import PackCache
from rnnkern.ops.recurrence import recurrence

ISAS = _library.extension.supported_isas() if _library.extension is not None else []
BACKENDS = ["eager", "cpu"] if _library.available else ["eager"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
if _library.available:
    _library.load_emulated()
needs_emulator = pytest.mark.skipif(
    bool(_library.missing["cuda-emulated"]), reason=f"no emulator: {_library.missing['cuda-emulated']}"
)
needs_kernels = pytest.mark.skipif(not _library.available, reason=f"no compiled kernels: {_library.reason}")

# An error may be 1.5 times torch's own on the same inputs, plus this part of the largest value (or of 1).
FLOORS = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}

TORCH_MODULES = {"rnn_tanh": "RNN", "rnn_relu": "RNN", "lstm": "LSTM", "gru": "GRU"}
_WEIGHTS = ("w_ih", "w_hh", "b_ih", "b_hh")
WEIGHT_NAMES = (*_WEIGHTS, *(f"{name}_reverse" for name in _WEIGHTS))
OUTPUT_NAMES = ("y", "h_n", "c_n", "c_all")


@contextmanager
def setting(get: Callable[[], Any], set: Callable[[Any], Any], value: Any) -> Iterator[None]:
    """Another value of a global setting."""
    before = get()
    set(value)
    try:
        yield
    finally:
        set(before)


def threads(count: int) -> AbstractContextManager[None]:
    return setting(torch.get_num_threads, torch.set_num_threads, count)


def instruction_set(name: str) -> AbstractContextManager[None]:
    return setting(_library.extension.get_isa, _library.extension.set_isa, name)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Every output and workspace of the compiled operators starts as NaN."""
    if _library.extension is None:
        yield
        return
    _library.extension.set_poison(True)
    try:
        yield
    finally:
        _library.extension.set_poison(False)


@dataclass
class Layer:
    """The arguments of one layer, with the gradients of its outputs."""

    cell: str
    x: Tensor  # [T, B, I]
    h0: Tensor  # [D, B, H]
    c0: Tensor | None  # [D, B, H]
    weights: tuple[Tensor | None, ...]
    lengths: Tensor | None
    resets: Tensor | None
    cotangents: tuple[Tensor, ...]  # of y, h_n, c_n, c_all
    grad_clip: float = 0.0

    @property
    def inputs(self) -> dict[str, Tensor]:
        named = {"x": self.x, "h0": self.h0, "c0": self.c0, **dict(zip(WEIGHT_NAMES, self.weights))}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def forward(self, inputs: dict[str, Tensor], packs: PackCache | None = None) -> tuple[Tensor, ...]:
        return recurrence(
            self.cell,
            inputs["x"],
            inputs["h0"],
            inputs.get("c0"),
            tuple(inputs.get(name) for name in WEIGHT_NAMES),
            lengths=self.lengths,
            resets=self.resets,
            return_states=True,
            packs=packs,
            grad_clip=self.grad_clip,
        )

    def infer(
        self, backend: str = "cpu", packs: PackCache | None = None, engine: str | None = None
    ) -> dict[str, Tensor]:
        """The outputs, without gradients."""
        with torch.no_grad(), rnnkern.backend(backend, engine=engine):
            outputs = self.forward(self.inputs, packs)
        return {
            name: out for name, out in zip(OUTPUT_NAMES, outputs) if len(CELLS[self.cell].states) == 2 or name[0] != "c"
        }

    def run(self, backend: str, dtype: torch.dtype | None = None, engine: str | None = None) -> dict[str, Tensor]:
        """Outputs and gradients by name; in another dtype, the same values converted."""
        inputs = {
            name: tensor.detach().to(dtype or tensor.dtype, copy=True).requires_grad_()
            for name, tensor in self.inputs.items()
        }
        with rnnkern.backend(backend, engine=engine):
            outputs = self.forward(inputs)
        return self._with_gradients(dict(zip(OUTPUT_NAMES, outputs)), inputs)

    def run_reference(self) -> dict[str, Tensor]:
        return self.run("eager", torch.float64)

    def run_torch(self) -> dict[str, Tensor]:
        """torch's own kernel, which knows neither resets nor lengths; every c is not among its results.

        The eager reference takes its place for a cell that torch does not have.
        """
        assert self.lengths is None
        assert self.resets is None
        if self.cell not in TORCH_MODULES:
            return self.run("eager")
        D, _, H = self.h0.shape
        mode = TORCH_MODULES[self.cell]
        options = {"nonlinearity": "relu"} if self.cell == "rnn_relu" else {}
        bias = self.weights[2] is not None
        module = getattr(torch.nn, mode)(
            self.x.shape[2], H, bias=bias, bidirectional=D == 2, dtype=self.x.dtype, device=self.x.device, **options
        )
        with torch.no_grad():
            for parameter, value in zip(module._flat_weights, [w for w in self.weights if w is not None], strict=True):
                parameter.copy_(value)
        inputs = {"x": self.x.detach().clone().requires_grad_(), "h0": self.h0.detach().clone().requires_grad_()}
        if self.c0 is not None:
            inputs["c0"] = self.c0.detach().to(self.x.dtype, copy=True).requires_grad_()
            y, (h_n, c_n) = module(inputs["x"], (inputs["h0"], inputs["c0"]))
            outputs = {"y": y, "h_n": h_n, "c_n": c_n}
        else:
            y, h_n = module(inputs["x"], inputs["h0"])
            outputs = {"y": y, "h_n": h_n}
        names = [name for name, w in zip(WEIGHT_NAMES, self.weights) if w is not None]
        return self._with_gradients(outputs, inputs | dict(zip(names, module._flat_weights)))

    def _with_gradients(self, outputs: dict[str, Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        outputs = {name: out for name, out in outputs.items() if len(CELLS[self.cell].states) == 2 or name[0] != "c"}
        cotangents = dict(zip(OUTPUT_NAMES, self.cotangents))
        pairs = [(out, cotangents[name].to(out.dtype)) for name, out in outputs.items()]
        gradients = torch.autograd.grad([o for o, _ in pairs], list(inputs.values()), [g for _, g in pairs])
        return {name: out.detach() for name, out in outputs.items()} | {
            f"d{name}": gradient for name, gradient in zip(inputs, gradients)
        }


def make_layer(
    cell: str,
    T: int,
    B: int,
    I: int,
    H: int,
    *,
    D: int = 1,
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    every_c: bool = False,  # whether the gradient of c_all is other than zero, which torch cannot follow
    grad_clip: float = 0.0,
    seed: int = 0,
) -> Layer:
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64) * 2 - 1

    spec = CELLS[cell]
    rows, scale = len(spec.gates) * H, H**-0.5
    two_states = len(spec.states) == 2
    shapes = ((rows, I), (rows, H), *(((rows,), (rows,)) if bias else ()))
    weights: list[Tensor | None] = []
    # relu's gradient jumps at zero, where rounding decides: in low precision every unit is kept clear of it, on or off.
    clear = cell == "rnn_relu" and compute_dtype(dtype) != dtype
    for direction in range(2):
        present = [(uniform(*shape) * scale * (0.25 if clear else 1)).to(dtype) for shape in shapes if direction < D]
        if clear and present:
            by = uniform(rows).sign().mul(2).to(dtype)
            if bias:
                present[2] = by
            else:
                present[0][:, :1] = by[:, None]
        weights += [*present, *[None] * (4 - len(present))]
    x = uniform(T, B, I).to(dtype)
    if clear and not bias:
        x[:, :, :1] = 1  # so that the first column of W_ih is what b_ih else would be
    return Layer(
        cell=cell,
        x=x,
        h0=uniform(D, B, H).to(dtype),
        # Values that the storage dtype has too, so that torch can start from the same.
        c0=uniform(D, B, H).to(dtype).to(compute_dtype(dtype)) if two_states else None,
        weights=tuple(weights),
        lengths=lengths,
        resets=resets,
        cotangents=(
            uniform(T, B, D * H).to(dtype),
            uniform(D, B, H).to(dtype),
            uniform(D, B, H).to(dtype),
            uniform(T, B, D * H).to(dtype) * every_c,
        ),
        grad_clip=grad_clip,
    )


def error(actual: Tensor, expected: Tensor) -> float:
    """The largest difference; infinite where NaN meets a number."""
    assert actual.shape == expected.shape
    if actual.numel() == 0:
        return 0.0
    difference = (actual.double() - expected.double()).abs().max().item()
    return difference if difference == difference else float("inf")


def assert_as_accurate(
    actual: dict[str, Tensor], expected: dict[str, Tensor], peer: dict[str, Tensor], dtype: torch.dtype
) -> None:
    """Every value's error against float64 is at most 1.5 times the peer's, plus the floor of the dtype."""
    assert set(actual) == set(expected)
    for name, value in actual.items():
        size = max(1.0, expected[name].abs().max().item()) if expected[name].numel() else 1.0
        allowed = 1.5 * error(peer[name], expected[name]) if name in peer else 0.0
        allowed += FLOORS[dtype] * size
        found = error(value, expected[name])
        assert found <= allowed, f"{name}: error {found:.3g}, allowed {allowed:.3g}"


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(actual) == set(expected)
    for name, value in actual.items():
        assert torch.equal(value, expected[name]), f"{name} differs by {error(value, expected[name]):.3g}"
