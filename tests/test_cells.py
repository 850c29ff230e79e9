"""The cells' descriptions: the same in Python and C++, and steps that are torch's."""

import pytest
import torch

from rnnkern import _library
from rnnkern.cells import CELLS, CellSpec
from rnnkern.cells.reference import layer
from tests.helpers import TORCH_MODULES, needs_kernels


@needs_kernels
def test_python_and_cpp_describe_the_same_cells() -> None:
    described = {
        name: {
            "gates": len(spec.gates),
            "states": len(spec.states),
            "saved": len(spec.saved),
            "split_gates": len(spec.split_gates),
        }
        for name, spec in CELLS.items()
    }
    assert _library.extension.cell_traits() == described


@pytest.mark.parametrize("cell", CELLS)
def test_spec_is_consistent(cell: str) -> None:
    spec = CELLS[cell]
    assert spec.name == cell
    assert spec.states[0] == "h"
    assert spec.gates[len(spec.gates) - len(spec.split_gates) :] == spec.split_gates


@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell in TORCH_MODULES])
def test_step_is_torchs(cell: str) -> None:
    spec = CELLS[cell]
    B, I, H = 3, 5, 7
    G = len(spec.gates)
    x, h, c = (torch.randn(B, n, dtype=torch.float64) for n in (I, H, H))
    w_ih, w_hh, b_ih, b_hh = (
        torch.randn(*s, dtype=torch.float64) for s in ((G * H, I), (G * H, H), (G * H,), (G * H,))
    )
    state = (h, c) if len(spec.states) == 2 else (h,)
    gx, gh = torch.nn.functional.linear(x, w_ih, b_ih), torch.nn.functional.linear(h, w_hh, b_hh)
    hx = state if len(spec.states) == 2 else h
    expected = getattr(torch._VF, f"{cell}_cell")(x, hx, w_ih, w_hh, b_ih, b_hh)
    expected = expected if isinstance(expected, tuple) else (expected,)
    torch.testing.assert_close(spec.next_state(gx, gh, state), expected)


def test_a_toy_cell_runs_in_the_reference() -> None:
    toy = CellSpec(
        name="toy",
        gates=("a",),
        states=("h",),
        saved=(),
        split_gates=(),
        step=lambda gx, gh, h: h + 0.5 * (gx + gh - h),
    )
    x, h0, eye = torch.ones(4, 2, 3), torch.zeros(1, 2, 3), torch.eye(3)
    y, h_n, c_n, c_all = layer(toy, x, h0, None, (eye, 0 * eye, None, None, None, None, None, None))
    assert torch.equal(y[:, 0, 0], torch.tensor([0.5, 0.75, 0.875, 0.9375]))
    assert torch.equal(h_n[0], y[-1])
    assert c_n.shape == c_all.shape == (0,)
