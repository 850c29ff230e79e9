"""A decoder's loss over its vocabulary: ours, torch's two functions, also compiled, and its chunks if it has them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812, torch's own name for it
from torch import Tensor

import rnnkern
from benchmarks.attention import COMPILED, EAGER
from benchmarks.runtimes import PeerUnavailable, compiled_runner
from rnnkern._bench.cases import OURS

CHUNKED = "torch chunked"


@dataclass(frozen=True)
class LossCase:
    """The mean loss of N rows, of which a part is padding."""

    N: int
    V: int
    D: int
    training: bool = False
    padding: float = 0.0
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    @property
    def name(self) -> str:
        """A short name, the same on every machine."""
        mode = "" if self.dtype == torch.float32 else f"{self.dtype}-".removeprefix("torch.")
        mode += "train" if self.training else "eval"
        return f"loss-N{self.N}-V{self.V}-D{self.D}-{f'padding{self.padding:g}-' if self.padding else ''}{mode}"

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """input [N, D], weight [V, D], bias [V] and target [N]."""
        generator = torch.Generator(self.device).manual_seed(0)
        where: dict[str, Any] = {"generator": generator, "device": self.device}
        made = (torch.randn(shape, **where) for shape in ((self.N, self.D), (self.V, self.D), (self.V,)))
        x, weight, bias = (tensor.to(self.dtype) for tensor in made)
        weight *= self.D**-0.5  # logits of about one
        target = torch.randint(self.V, (self.N,), **where)
        target[torch.rand(self.N, **where) < self.padding] = -100
        return *(tensor.requires_grad_(self.training) for tensor in (x, weight, bias)), target

    def builders(self) -> dict[str, Callable[[], Callable[[], object]]]:
        """What builds each implementation, ours first; PeerUnavailable where it cannot run here."""
        functions = {OURS: rnnkern.functional.linear_cross_entropy, EAGER: eager, CHUNKED: chunked}
        found: dict[str, Callable[[], Callable[[], object]]] = {
            name: lambda function=function: self._runner(function) for name, function in functions.items()
        }
        # On a CPU for any size: to compile for each would take longer than all the rest.
        found[COMPILED] = lambda: compiled_runner(self._runner, eager, dynamic=self.device == "cpu")
        return found

    def _runner(self, function: Callable[..., Tensor]) -> Callable[[], object]:
        if function is chunked and not hasattr(torch.nn, "LinearCrossEntropyOptions"):
            raise PeerUnavailable("this torch has no LinearCrossEntropyOptions")
        x, weight, bias, target = self.inputs()

        def run() -> Any:
            loss = function(x, weight, target, linear_bias=bias)
            return torch.autograd.grad(loss, (x, weight, bias)) if self.training else loss

        return run


def eager(x: Tensor, weight: Tensor, target: Tensor, *, linear_bias: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight, linear_bias), target)


def chunked(x: Tensor, weight: Tensor, target: Tensor, *, linear_bias: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()  # torch's own choice of chunks
    return F.linear_cross_entropy(x, weight, target, linear_bias=linear_bias, options=options)
