"""What a cell is: the names of its parts and one step of it, from which the eager layer is built."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class CellSpec:
    """A recurrent cell, as `csrc/cells/<name>.h` describes it to the C++ engines.

    `step(gx, gh, *state)` gives the state after one step: a tensor for a cell of one state, a tuple for more.
    gx = W_ih x + b_ih and gh = W_hh h + b_hh arrive apart, `[B, G*H]` each, gates in torch's order.
    """

    name: str
    gates: tuple[str, ...]  # in the order of torch's stacked weight rows
    states: tuple[str, ...]  # states[0] is h, the one that the recurrent product reads and that is the output
    saved: tuple[str, ...]  # what the engines keep for backward, per unit, besides the states
    split_gates: tuple[str, ...]  # the last gates, whose gradients for gx and gh differ
    step: Callable[..., Tensor | tuple[Tensor, ...]]

    def next_state(self, gx: Tensor, gh: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """`step`, with a tuple for any number of states."""
        result = self.step(gx, gh, *state)
        return result if isinstance(result, tuple) else (result,)
