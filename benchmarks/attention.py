"""Attention workloads: ours, the formula in eager torch, and torch's fused dot product or the compiled additive one."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812, torch's own name for it
from torch import Tensor

import rnnkern
from benchmarks.runtimes import compiled_runner
from rnnkern._bench.cases import OURS

EAGER, COMPILED, SDPA = "eager", "torch.compile", "sdpa"


@dataclass(frozen=True)
class AttentionCase:
    """Queries and keys already projected to one size D, values of size D, no mask."""

    score: str  # additive, dot, scaled_dot or general
    B: int
    Tq: int
    Tk: int
    D: int
    training: bool = False
    need_weights: bool = False  # of ours: no fused peer can give them
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    @property
    def name(self) -> str:
        """A short name, the same on every machine."""
        mode = "" if self.dtype == torch.float32 else f"{self.dtype}-".removeprefix("torch.")
        mode += ("weights-" if self.need_weights else "") + ("train" if self.training else "eval")
        return f"{self.score}-B{self.B}-Tq{self.Tq}-Tk{self.Tk}-D{self.D}-{mode}"

    def inputs(self) -> list[Tensor]:
        """query [B, Tq, D], key [B, Tk, D], value [B, Tk, D] and the score's parameter, if it has one."""
        generator = torch.Generator(self.device).manual_seed(0)
        shapes = [(self.B, self.Tq, self.D), (self.B, self.Tk, self.D), (self.B, self.Tk, self.D)]
        shapes += {"additive": [(self.D,)], "general": [(self.D, self.D)]}.get(self.score, [])
        scale = self.D**-0.25  # scores of about one, as in a trained model
        made = (torch.randn(shape, generator=generator, device=self.device) * scale for shape in shapes)
        return [tensor.to(self.dtype).requires_grad_(self.training) for tensor in made]

    def builders(self) -> dict[str, Callable[[], Callable[[], object]]]:
        """What builds each implementation, ours first; PeerUnavailable where it cannot run here."""
        functions: dict[str, Callable[..., Tensor]] = {
            OURS: functools.partial(ours, self.score, self.need_weights),
            EAGER: eager_additive if self.score == "additive" else functools.partial(eager_dot, self.score),
        }
        if self.score != "additive":
            functions[SDPA] = functools.partial(sdpa, self.score)
        found: dict[str, Callable[[], Callable[[], object]]] = {
            name: lambda function=function: self._runner(function) for name, function in functions.items()
        }
        if self.score == "additive" or self.device != "cpu":
            found[COMPILED] = lambda: compiled_runner(self._runner, functions[EAGER])
        return found

    def _runner(self, function: Callable[..., Tensor]) -> Callable[[], object]:
        inputs = self.inputs()
        if not self.training:
            return lambda: function(*inputs)
        gradient = torch.ones(self.B, self.Tq, self.D, dtype=self.dtype, device=self.device)
        return lambda: torch.autograd.grad(function(*inputs), inputs, gradient)


def ours(score: str, need_weights: bool, query: Tensor, key: Tensor, value: Tensor, *parameter: Tensor) -> Tensor:
    kinds = {"additive": rnnkern.functional.Additive, "general": rnnkern.functional.General}
    kind = kinds[score](*parameter) if parameter else score
    return rnnkern.functional.attention(query, key, value, score=kind, need_weights=need_weights)[0]


def eager_additive(query: Tensor, key: Tensor, value: Tensor, vector: Tensor) -> Tensor:
    score = torch.tanh(query[:, :, None] + key[:, None]) @ vector  # [B, Tq, Tk]
    return score.softmax(-1) @ value


def eager_dot(score: str, query: Tensor, key: Tensor, value: Tensor, *weight: Tensor) -> Tensor:
    query, scale = projected(score, query, *weight)
    return (query @ key.transpose(1, 2) * scale).softmax(-1) @ value


def sdpa(score: str, query: Tensor, key: Tensor, value: Tensor, *weight: Tensor) -> Tensor:
    query, scale = projected(score, query, *weight)
    heads = (tensor[:, None] for tensor in (query, key, value))  # one head
    return F.scaled_dot_product_attention(*heads, scale=scale)[:, 0]


def projected(score: str, query: Tensor, *weight: Tensor) -> tuple[Tensor, float]:
    """Queries whose dot products with keys, times the scale, are the scores."""
    return query @ weight[0] if weight else query, 1 / math.sqrt(query.shape[2]) if score == "scaled_dot" else 1.0
