"""Attention workloads: ours, the formula in eager torch and, for the dot product, torch's fused attention."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812, torch's own name for it
from torch import Tensor

import rnnkern
from rnnkern._bench.cases import OURS

EAGER, SDPA = "eager", "sdpa"


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

    def runners(self) -> dict[str, Callable[[], object]]:
        """What to compare, ours first."""
        functions = ADDITIVE if self.score == "additive" else DOT
        return {name: self._runner(function) for name, function in functions.items()}

    def _runner(self, function: Callable[..., Tensor]) -> Callable[[], object]:
        inputs = self.inputs()
        if not self.training:

            def forward() -> Tensor:
                with torch.no_grad():
                    return function(*inputs)

            return forward
        gradient = torch.ones(self.B, self.Tq, self.D)
        return lambda: torch.autograd.grad(function(*inputs), inputs, gradient)


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
