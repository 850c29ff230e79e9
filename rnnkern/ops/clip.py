"""The gradient of a layer's outputs, limited for each sequence of the batch by itself."""

from typing import Any

import torch
from torch import Tensor

from rnnkern.cells.reference import compute_dtype, refuse_forward_mode
from rnnkern.ops.attention import place_lengths
from rnnkern.ops.formulas import Outputs


def clip_sequences(outputs: Outputs, lengths: Tensor | None, limit: float) -> Outputs:
    r"""The same outputs, whose gradients are limited in norm, one sequence of the batch at a time.

    .. math:: g_b = (\partial L / \partial y_{1..T,b},\; \partial L / \partial h_{n,b},\;
        \partial L / \partial c_{n,b}), \qquad g_b \leftarrow g_b \min(1, \text{limit} / \lVert g_b \rVert_2)

    The gradient of c_all belongs to g_b, too; what comes for padding does not. Backward through a layer is linear in
    g_b, so all that the sequence adds to any gradient shrinks by this factor.

    Programs of torch.export and torch.jit.trace hold no functions of Python: they limit nothing.

    Args:
        outputs: y, h_n, c_n, c_all of `rnnkern.ops.recurrence.recurrence`.
        lengths: steps of each row, or None.  # int64 [B]
        limit: the largest norm of g_b.
    """
    refuse_forward_mode("grad_clip_norm", outputs)
    exported = torch.compiler.is_exporting() or torch._C._get_tracing_state() is not None
    if exported or not (torch.is_grad_enabled() and any([output.requires_grad for output in outputs])):
        return outputs
    y, h_n, c_n, c_all = outputs
    B = h_n.shape[1]
    if y.dim() == 3:
        T = y.shape[0]
        rows = torch.arange(B, device=y.device).expand(T, B)  # the sequence that a step belongs to; B for padding
        if lengths is not None:
            past = torch.arange(T, device=y.device)[:, None] >= place_lengths(lengths, y.transpose(0, 1))
            rows = rows.masked_fill(past, B)
    else:
        assert lengths is not None
        rows = _owners(place_lengths(lengths, y.unsqueeze(0)), y.shape[0])
    result: Outputs = _apply(y, h_n, c_n, c_all, rows.reshape(-1), limit)
    return result


def _owners(lengths: Tensor, N: int) -> Tensor:
    """The sequence that each of N packed rows belongs to; no size depends on the values of lengths, for compilers."""
    device = lengths.device
    row = torch.arange(lengths.shape[0], device=device).repeat_interleave(lengths, output_size=N)  # one after the other
    t = torch.arange(N, device=device) - (lengths.cumsum(0) - lengths)[row]
    return row[t.argsort(stable=True)]


class _ClipSequences(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor, h_n: Tensor, c_n: Tensor, c_all: Tensor, rows: Tensor, limit: float) -> Any:
        # The states are copies, since programs detach them in place, which views refuse.
        return y.view_as(y), h_n.clone(), c_n.clone(), c_all.view_as(c_all)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(inputs[4])
        ctx.B, ctx.limit = inputs[1].shape[1], inputs[5]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        (rows,) = ctx.saved_tensors
        given = [(i, d) for i, d in enumerate(gradients) if d is not None and d.dim() > 1]  # [0]: there is none
        if not given:
            return (*gradients, None, None)
        states = torch.arange(ctx.B, device=rows.device)
        owners = [states.expand(d.shape[:-1]) if i in (1, 2) else rows.view(d.shape[:-1]) for i, d in given]
        squares = rows.new_zeros(ctx.B + 1, dtype=torch.float64)  # in float32 those of 2e19 are infinite
        for (_, d), owner in zip(given, owners):
            norms = torch.linalg.vector_norm(d, dim=-1, dtype=torch.float64)
            squares = squares.index_add(0, owner.reshape(-1), norms.square().reshape(-1))
        short = ~(squares > ctx.limit**2)  # NaN, too
        # Not torch.where, which copies a number to a GPU, and waits for that.
        factors = (ctx.limit * squares.masked_fill(short, 1).rsqrt()).masked_fill(short, 1)
        factors = factors.to(compute_dtype(given[0][1].dtype))
        result = list(gradients)
        for (i, d), owner in zip(given, owners):
            result[i] = (d * factors[owner].unsqueeze(-1)).to(d.dtype)
        return (*result, None, None)


_apply: Any = _ClipSequences.apply
