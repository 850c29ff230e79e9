"""The cells: the pointwise maths of one step, as csrc/cells/*.h give it to the C++ engines.

A cell is a module of two functions for kernels, over tuples of tensors of one shape:
  forward(gx, gh, state) -> next, saved                 gx = W_ih x + b_ih, gh = W_hh h + b_hh, a tensor for each gate
  backward(saved, state, dnext) -> dgx, dgh, dstate     dstate leaves out the path through W_hh, which the engine adds
`state` is (h, c); cells of one state look at h alone and return tuples of one.
"""

import importlib
from typing import Any, NamedTuple


class TritonCell(NamedTuple):
    """The two functions of a cell."""

    forward: Any
    backward: Any


def find_cell(name: str) -> TritonCell:
    """The cell of this name, one of `rnnkern.cells.CELLS`."""
    module = importlib.import_module(f"{__name__}.{name}")
    return TritonCell(module.forward, module.backward)
