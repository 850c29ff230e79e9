"""What runs a recurrence besides us and torch.nn: other runtimes, torch's int8, and our own module run another way."""

import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from benchmarks.onnx_model import onnx_model
from benchmarks.runtimes import PeerUnavailable, onnxruntime_runner, openvino_runner
from rnnkern._bench.cases import OURS, TORCH, Case, modules, runner

Build = Callable[[], Callable[[], object]]
INT8_UP_TO_BATCH = 8
# How far torch.nn's results may be from ours, as a part of the largest.
TOLERANCES = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2, torch.int8: 5e-2}


class PeerDisagrees(AssertionError):
    """A peer computes something else than we do, so that its time means nothing."""


@dataclass(frozen=True)
class Peer:
    """Another way to run a case."""

    applies: Callable[[Case], bool]
    build: Callable[[Case], Callable[[], object]]
    tolerance: float | None  # of its results, as a part of the largest; None: it computes something else by design
    own_threads: bool = False  # threads of its own, which may spin for a while after a call


def exported(case: Case) -> tuple[bytes, Tensor, Tensor]:
    """The case as an ONNX model, its x and a place for its y.

    Raises:
        PeerUnavailable: onnx is not installed.
    """
    module = modules(case)[TORCH]
    assert isinstance(module, nn.RNNBase)
    try:
        model = onnx_model(module, case.T, case.B)
    except ImportError as error:
        raise PeerUnavailable(str(error)) from None
    return model, case.input(), torch.empty(case.T, case.B, case.H * (2 if case.bidirectional else 1))


def int8_runner(case: Case) -> Callable[[], object]:
    """torch's module with int8 weights and, call by call, int8 activations."""
    if not hasattr(torch.ao, "quantization"):
        raise PeerUnavailable("this torch has no torch.ao.quantization")
    whole = nn.Sequential(modules(case)[TORCH])  # quantize_dynamic replaces children
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch has been about to remove it since 2.10
        quantized = torch.ao.quantization.quantize_dynamic(copy.deepcopy(whole), {nn.GRU, nn.LSTM}, dtype=torch.qint8)
    assert type(quantized[0]) is not type(whole[0])
    return runner(case, quantized[0])


def ours_as(**changes: object) -> Callable[[Case], Callable[[], object]]:
    """Our module in a case that differs by `changes`."""

    def build(case: Case) -> Callable[[], object]:
        other = replace(case, **changes)  # type: ignore[arg-type]
        return runner(other, modules(other)[OURS])

    return build


def plain_forward(case: Case) -> bool:
    """Whether any runtime has it: a layer's forward in float32 over rows of one length."""
    return plain(case) and case.dtype == torch.float32


def plain(case: Case) -> bool:
    """Whether it is a layer's forward over rows of one length."""
    return not (case.training or case.single_step or case.ragged)


PEERS = {
    "ONNX Runtime": Peer(plain_forward, lambda case: onnxruntime_runner(*exported(case)), 1e-3, own_threads=True),
    "OpenVINO": Peer(plain_forward, lambda case: openvino_runner(*exported(case)), 1e-3, own_threads=True),
    "torch int8": Peer(
        lambda case: (
            plain(case) and case.values == torch.float32 and case.cell in ("gru", "lstm") and case.B <= INT8_UP_TO_BATCH
        ),
        int8_runner,
        0.2,
    ),
    "rnnkern float32": Peer(
        lambda case: case.dtype in (torch.bfloat16, torch.int8) and not case.training,
        ours_as(dtype=torch.float32),
        5e-2,
    ),
    "rnnkern bfloat16": Peer(
        lambda case: case.dtype == torch.float16 and not case.training, ours_as(dtype=torch.bfloat16), 5e-2
    ),
    "rnnkern padded": Peer(lambda case: bool(case.ragged), ours_as(ragged=""), None),
}


def recurrence_builders(case: Case) -> dict[str, Build]:
    """What builds each implementation of a case, ours first; PeerUnavailable where it cannot run here."""
    theirs = replace(case, ragged="packed") if case.ragged else case
    builders: dict[str, Build] = {
        OURS: lambda: runner(case, modules(case)[OURS]),
        TORCH: lambda: runner(theirs, modules(theirs)[TORCH]),
    }
    builders |= {name: lambda peer=peer: peer.build(case) for name, peer in PEERS.items() if peer.applies(case)}
    return builders


def tolerance(case: Case, name: str) -> float | None:
    """By how much an implementation's results may differ from ours; None where they say something else."""
    if name in PEERS:
        return PEERS[name].tolerance
    return None if case.ragged == "lengths" else TOLERANCES[case.dtype]  # torch.nn's are packed there


def check_agreement(
    row: str, functions: Mapping[str, Callable[[], object]], tolerances: Mapping[str, float | None]
) -> None:
    """Runs everything once and compares it with ours.

    Raises:
        PeerDisagrees: a result differs by more than its tolerance, a part of the largest.
    """
    ours = as_tuple(functions[OURS]())
    for name, function in functions.items():
        allowed = tolerances[name]
        if name == OURS or allowed is None:
            continue
        for mine, other in zip(ours, as_tuple(function()), strict=True):
            error, largest = float((mine.float() - other.float()).abs().max()), float(other.float().abs().max())
            if not error <= allowed * largest:  # not so for NaN either
                raise PeerDisagrees(f"{row}: {name} differs from {OURS} by {error:.1e}, of {largest:.1e} at most")


def as_tuple(result: object) -> tuple[Tensor, ...]:
    """An output, or all gradients."""
    found = result if isinstance(result, tuple) else (result,)
    assert all(isinstance(tensor, Tensor) for tensor in found)
    return found
