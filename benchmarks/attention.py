"""Attention workloads: ours, the formula in eager torch, and torch's fused dot product or the compiled additive one."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812, torch's own name for it
from torch import Tensor

import rnnkern
from benchmarks.runtimes import PeerUnavailable
from rnnkern._bench.cases import OURS

EAGER, COMPILED, SDPA = "eager", "torch.compile", "sdpa"


@dataclass(frozen=True)
class AttentionCase:
    """Queries and keys already projected to one size D, values of size D, no mask."""

    score: str  # additive or dot
    B: int
    Tq: int
    Tk: int
    D: int
    training: bool = False

    @property
    def name(self) -> str:
        """A short name, the same on every machine."""
        mode = "train" if self.training else "eval"
        return f"{self.score}-B{self.B}-Tq{self.Tq}-Tk{self.Tk}-D{self.D}-{mode}"

    def inputs(self) -> list[Tensor]:
        """query [B, Tq, D], key [B, Tk, D], value [B, Tk, D] and, for the additive score, its vector [D]."""
        generator = torch.Generator().manual_seed(0)
        shapes = [(self.B, self.Tq, self.D), (self.B, self.Tk, self.D), (self.B, self.Tk, self.D)]
        if self.score == "additive":
            shapes.append((self.D,))
        scale = self.D**-0.25  # scores of about one, as in a trained model
        return [torch.randn(s, generator=generator).mul_(scale).requires_grad_(self.training) for s in shapes]

    def builders(self) -> dict[str, Callable[[], Callable[[], object]]]:
        """What builds each implementation, ours first; PeerUnavailable where it cannot run here."""
        functions = ADDITIVE if self.score == "additive" else DOT
        found: dict[str, Callable[[], Callable[[], object]]] = {
            name: lambda function=function: self._runner(function) for name, function in functions.items()
        }
        if self.score == "additive":
            found[COMPILED] = self._compiled
        return found

    def _runner(self, function: Callable[..., Tensor]) -> Callable[[], object]:
        inputs = self.inputs()
        if not self.training:
            return lambda: function(*inputs)
        gradient = torch.ones(self.B, self.Tq, self.D)
        return lambda: torch.autograd.grad(function(*inputs), inputs, gradient)

    def _compiled(self) -> Callable[[], object]:
        run = self._runner(torch.compile(eager_additive, dynamic=False))
        try:
            run()  # it compiles at the first call
        except Exception as error:  # of many types: no compiler, no headers, a compiler that fails
            raise PeerUnavailable(str(error).strip().split("\n")[0]) from error
        return run


def our_additive(query: Tensor, key: Tensor, value: Tensor, vector: Tensor) -> Tensor:
    return rnnkern.functional.attention(query, key, value, score=rnnkern.functional.Additive(vector))[0]


def eager_additive(query: Tensor, key: Tensor, value: Tensor, vector: Tensor) -> Tensor:
    score = torch.tanh(query[:, :, None] + key[:, None]) @ vector  # [B, Tq, Tk]
    return score.softmax(-1) @ value


def our_dot(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return rnnkern.functional.attention(query, key, value, score="dot")[0]


def eager_dot(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return (query @ key.transpose(1, 2)).softmax(-1) @ value


def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    heads = (tensor[:, None] for tensor in (query, key, value))  # one head
    return F.scaled_dot_product_attention(*heads, scale=1.0)[:, 0]


ADDITIVE = {OURS: our_additive, EAGER: eager_additive}
DOT = {OURS: our_dot, EAGER: eager_dot, SDPA: sdpa}
