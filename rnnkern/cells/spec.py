"""What a cell is: the names of its parts and one step of it, from which the eager layer is built."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import linear


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
    # (gx, h, w_hh, b_hh) -> gh in the place of the plain product; no engine runs a cell that has it, for they multiply
    # by W_hh before they know any gate.
    recurrent: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor] | None = None

    def recurrent_part(self, gx: Tensor, h: Tensor, w_hh: Tensor, b_hh: Tensor | None) -> Tensor:
        """The gh of a step."""  # [B, G*H]
        return linear(h, w_hh, b_hh) if self.recurrent is None else self.recurrent(gx, h, w_hh, b_hh)

    def next_state(self, gx: Tensor, gh: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """`step`, with a tuple for any number of states."""
        result = self.step(gx, gh, *state)
        return result if isinstance(result, tuple) else (result,)
