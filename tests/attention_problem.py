"""One attention problem: its arguments, ways to run it, and the formula in plain torch."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

import rnnkern
from rnnkern import _library
from rnnkern.functional import Additive, General, attention
from tests import helpers

# The emulated CUDA kernels are a library of their own, which may not have been built.
EMULATED = ["cuda-emulated"] if _library.available and _library._EMULATED_PATH.exists() else []
KERNELS = [*helpers.BACKENDS[1:], *EMULATED]
BACKENDS = ["eager", *KERNELS]
SCORES = ["dot", "scaled_dot", "general", "additive"]
PADDINGS = ["none", "lengths", "mask"]


@dataclass
class Problem:
    """Arguments of `attention`, with the gradients of context and weights."""

    score: str
    tensors: dict[str, Tensor]  # query, key, value and the parameters of the score
    padding: dict[str, Tensor]  # lengths or key_padding_mask
    dcontext: Tensor
    dweights: Tensor
    need_weights: bool = field(default=True)

    def attend(self, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        extra = {name: tensor for name, tensor in tensors.items() if name not in ("query", "key", "value")}
        kind = {"general": General, "additive": Additive}.get(self.score)
        score = self.score if kind is None else kind(**extra)
        qkv = (tensors["query"], tensors["key"], tensors["value"])
        return attention(*qkv, score=score, **self.padding, need_weights=self.need_weights)

    def plain(self, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The formula in torch's own operations and the tensors' own dtype."""
        query, key, value = tensors["query"], tensors["key"], tensors["value"]
        if self.score == "general":
            query = query @ tensors["weight"]
        if self.score == "additive":
            query, key = query @ tensors["query_weight"].T + tensors["bias"], key @ tensors["key_weight"].T
            scores = torch.tanh(query[:, :, None] + key[:, None]) @ tensors["vector"]
        else:
            scores = query @ key.mT * (1 / math.sqrt(query.shape[2]) if self.score == "scaled_dot" else 1)
        padding = self.is_padding()[:, None]
        weights = scores.masked_fill(padding, torch.finfo(scores.dtype).min).softmax(-1).masked_fill(padding, 0)
        return weights @ value, weights

    def is_padding(self) -> Tensor:
        B, Tk, _ = self.tensors["key"].shape
        lengths = self.padding.get("lengths", torch.full((B,), Tk))
        return self.padding.get("key_padding_mask", torch.arange(Tk) >= lengths[:, None])

    def run(self, how: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Outputs and gradients by name; how is a backend or "plain"."""
        tensors = {
            name: t.detach().to(dtype or t.dtype, copy=True).requires_grad_() for name, t in self.tensors.items()
        }
        if how == "plain":
            context, weights = self.plain(tensors)
        else:
            with rnnkern.backend(how):
                context, weights = self.attend(tensors)
        outputs = {"context": context} | ({"weights": weights} if weights is not None else {})
        cotangents = [g.to(context.dtype) for g in (self.dcontext, self.dweights)]
        grads = torch.autograd.grad(list(outputs.values()), list(tensors.values()), cotangents[: len(outputs)])
        return {name: out.detach() for name, out in outputs.items()} | {f"d{n}": g for n, g in zip(tensors, grads)}


def make_problem(
    score: str,
    B: int,
    Tq: int,
    Tk: int,
    D: int,
    Dv: int,
    *,
    padding: str = "none",
    dtype: torch.dtype = torch.float32,
    size: float = 1.0,
) -> Problem:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64).to(dtype)

    A, Dk = D + 3, D + 2 if score in ("general", "additive") else D
    tensors = {"query": normal(B, Tq, D) * size, "key": normal(B, Tk, Dk) * size, "value": normal(B, Tk, Dv)}
    if score == "general":
        tensors["weight"] = normal(D, Dk) / D
    if score == "additive":
        tensors |= {
            "vector": normal(A) / A**0.5,
            "query_weight": normal(A, D) / D**0.5,
            "key_weight": normal(A, Dk) / Dk**0.5,
        }
        tensors["bias"] = normal(A)
    pad: dict[str, Tensor] = {}
    if padding == "lengths":
        pad["lengths"] = torch.randint(0, Tk + 1, (B,))
        pad["lengths"][1:2] = 0
    if padding == "mask":
        pad["key_padding_mask"] = torch.rand(B, Tk) < 0.3
        pad["key_padding_mask"][1:2] = True
    return Problem(score, tensors, pad, normal(B, Tq, Dv), normal(B, Tq, Tk))
