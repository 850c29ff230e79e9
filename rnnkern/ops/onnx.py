"""The recurrent layer in ONNX's own operators RNN, LSTM and GRU: what `torch.onnx.export` writes of our modules.

Gate order, directions, lengths and initial states are ONNX's to know, so that any runtime may read the model; GRU is in
the form of torch and cuDNN, `linear_before_reset=1`, or 0 with `reset_after=False`.
Source: https://onnx.ai/onnx/operators/onnx__LSTM.html.
"""

from typing import Any

import torch
from torch import Tensor

from rnnkern.cells.reference import compute_dtype

# ONNX's operator of a cell, its attributes, and where in torch's order of gates those of ONNX are.
_OPERATORS: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "rnn_tanh": ("RNN", {"activations": ["Tanh"]}, (0,)),
    "rnn_relu": ("RNN", {"activations": ["Relu"]}, (0,)),
    "lstm": ("LSTM", {}, (0, 3, 1, 2)),  # i, o, f, g
    "gru": ("GRU", {"linear_before_reset": 1}, (1, 0, 2)),  # z, r, n
    "gru_reset_before": ("GRU", {"linear_before_reset": 0}, (1, 0, 2)),
}


def exporting() -> bool:
    """Whether `torch.onnx.export` reads the model at this moment, by torch.export."""
    return torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()


# What torch.compiler.assume_constant_result does, without loading all of torch._dynamo: Dynamo, by which the exporter
# tries again what failed, is to call this while it traces. It takes `is_in_onnx_export` for False.
exporting._dynamo_marked_constant = True  # type: ignore[attr-defined]


def refuse_torchscript() -> None:
    """Raises RuntimeError while the older exporter traces: it has no way to learn of our operators."""
    if torch.onnx.is_in_onnx_export():
        raise RuntimeError(
            "torch.onnx.export(..., dynamo=False) cannot export the modules of rnnkern: call it with dynamo=True"
        )


def layer(
    cell: str,
    x: Tensor,  # [T, B, I]
    h0: Tensor,  # [D, B, H]
    c0: Tensor | None,  # [D, B, H] in the compute dtype
    weights: tuple[Tensor | None, ...],  # w_ih, w_hh, b_ih, b_hh; then the same of the reverse direction, or None
    *,
    projection: tuple[Tensor | None, ...] = (None, None),
    lengths: Tensor | None = None,  # int64 [B]
    resets: Tensor | None = None,
    return_states: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The results of `rnnkern.cells.reference.layer` as outputs of an ONNX operator: shapes and dtypes, no values.

    Raises:
        RuntimeError: ONNX's operators cannot express it.
    """
    for name, given in (
        ("proj_size", projection[0] is not None),
        ("resets=", resets is not None),
        ("return_sequence_states=True", return_states),
        ("a PackedSequence (give lengths= instead)", x.dim() != 3),
        (f"cell {cell!r}", cell not in _OPERATORS),
    ):
        if given:
            raise RuntimeError(f"{name} cannot be exported to ONNX: its operators RNN, LSTM and GRU have no such thing")
    operator, attributes, order = _OPERATORS[cell]
    T, B, _ = x.shape
    D, _, H = h0.shape
    w_ih, w_hh, b_ih, b_hh = (
        _stack([weights[4 * direction + i] for direction in range(D)], order, H) for i in range(4)
    )  # [D, G*H, I], [D, G*H, H], [D, G*H] twice
    bias = None if b_ih is None or b_hh is None else torch.cat((b_ih, b_hh), dim=1)
    steps = None if lengths is None else lengths.to(torch.int32)
    states = [h0] if c0 is None else [h0, c0.to(x.dtype)]
    if "activations" in attributes:
        attributes = {"activations": attributes["activations"] * D}
    y, *last = torch.onnx.ops.symbolic_multi_out(
        operator,
        (x, w_ih, w_hh, bias, steps, *states),
        {"hidden_size": H, "direction": "bidirectional" if D == 2 else "forward", **attributes},
        dtypes=[x.dtype] * (1 + len(states)),
        shapes=[(T, D, B, H), *[(D, B, H)] * len(states)],
    )
    if lengths is not None:  # ONNX does not say what the last state of a row without steps is
        empty = (lengths == 0)[:, None]  # [B, 1]
        last = [torch.where(empty, first, final) for first, final in zip(states, last)]
    compute = compute_dtype(x.dtype)
    absent = x.new_empty(0, dtype=compute)
    return y.transpose(1, 2).flatten(2), last[0], last[1].to(compute) if len(last) == 2 else absent, absent


def _stack(directions: list[Tensor | None], order: tuple[int, ...], H: int) -> Tensor | None:
    """One weight of each direction, its gates in ONNX's order; None if it is absent."""
    present = [weight for weight in directions if weight is not None]
    if not present:
        return None
    return torch.stack([torch.cat([weight[i * H : (i + 1) * H] for i in order]) for weight in present])
