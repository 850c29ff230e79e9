"""What the layer operators of every backend share: shapes of their results, and their first and second gradients.

The operators take cell, x, h0, c0, 8 weights, lengths, resets, return_states; those with an autograd formula grad_clip
next, and then what the backend needs to know.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rnnkern.cells import CELLS, reference
from rnnkern.cells.reference import compute_dtype

Outputs = tuple[Tensor, Tensor, Tensor, Tensor]  # y, h_n, c_n, c_all


def fake_inference(
    cell: str,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    *rest: Any,  # the weights, lengths, resets, return_states, packed
) -> Outputs:
    """What an operator without an autograd formula gives, by shape."""
    return_states = rest[10]
    D, B, H = h0.shape
    two_states = len(CELLS[cell].states) == 2
    compute = compute_dtype(x.dtype)
    return (
        x.new_empty(*x.shape[:-1], D * H),
        x.new_empty(D, B, H),
        x.new_empty((D, B, H) if two_states else (0,), dtype=compute),
        x.new_empty((*x.shape[:-1], D * H) if two_states and return_states else (0,), dtype=compute),
    )


def fake_backward(
    cell: str,
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    dc_all: Tensor | None,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    *rest: Any,  # the weights, lengths, resets, y, saved, need_dx, need_dh0, need_dw, perhaps grad_clip
) -> tuple[Tensor, ...]:
    """Every gradient by shape: of x, h0, c0 and the weights; [0] where it is not wanted or there is no input."""
    weights, (need_dx, need_dh0, need_dw) = rest[:8], rest[12:15]
    compute = compute_dtype(x.dtype)
    return (
        x.new_empty(x.shape if need_dx else (0,)),
        h0.new_empty(h0.shape if need_dh0 else (0,)),
        x.new_empty(0 if c0 is None or not need_dh0 else c0.shape, dtype=compute),
        *(x.new_empty(0 if w is None or not need_dw else w.shape) for w in weights),
    )


def setup_layer(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Of an operator with an autograd formula."""
    ctx.cell = inputs[0]
    y, _, c_n, c_all, saved = output
    ctx.save_for_backward(*inputs[1:14], y, saved)  # x to resets
    ctx.two_states = inputs[3] is not None
    ctx.every_state = ctx.two_states and inputs[14]
    ctx.settings = inputs[15:]  # grad_clip and what else the operator takes
    ctx.mark_non_differentiable(saved, *(() if ctx.two_states else (c_n,)), *(() if ctx.every_state else (c_all,)))
    ctx.set_materialize_grads(False)


def backward_of_layer(
    ctx: Any,
    operator: Any,
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    dc_all: Tensor | None,
    _: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """What autograd asks of a layer, by the operator `rnnkern::layer_backward` or one like it."""
    needed = ctx.needs_input_grad  # cell, x, h0, c0, 8 weights, lengths, resets, return_states, grad_clip
    dc_n = dc_n if ctx.two_states else None  # AOTAutograd gives zeros of shape [0] here
    dc_all = dc_all if ctx.every_state else None
    saved = ctx.saved_tensors  # may run hooks, such as a checkpoint's whole forward: not below autograd
    # Without this, every backward would enter the Python formula of its own gradient to find that nobody wants one.
    with contextlib.nullcontext() if torch.is_grad_enabled() else torch._C._AutoDispatchBelowAutograd():
        grads = operator(
            ctx.cell, dy, dh_n, dc_n, dc_all, *saved, needed[1], any(needed[2:4]), any(needed[4:12]), *ctx.settings
        )
    wanted = (grad if need else None for grad, need in zip(grads, needed[1:12]))
    return (None, *wanted, *[None] * (len(needed) - 12))


def setup_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Of a backward operator."""
    ctx.cell = inputs[0]
    ctx.save_for_backward(*inputs[1:18])  # dy to resets: y and saved follow from them
    ctx.grad_clip = inputs[23]
    ctx.set_materialize_grads(False)


def double_backward(ctx: Any, *dgrads: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradient of `layer_backward`: the reference runs again, its gradient is taken twice."""
    *tensors, lengths, resets = ctx.saved_tensors  # dy, dh_n, dc_n, dc_all, x, h0, c0, 8 weights

    def run(x: Tensor, h0: Tensor, c0: Tensor | None, *weights: Tensor | None) -> Outputs:
        return reference.layer(
            CELLS[ctx.cell],
            x,
            h0,
            c0,
            weights,
            lengths=lengths,
            resets=resets,
            return_states=tensors[3] is not None,
            grad_clip=ctx.grad_clip,
        )

    second = differentiate_twice(run, tensors[:4], tensors[4:], dgrads)
    return (None, *second, *[None] * (len(ctx.needs_input_grad) - 16))


def differentiate_twice(
    run: Callable[..., Sequence[Tensor | None]],
    cotangents: Sequence[Tensor | None],  # of the outputs
    inputs: Sequence[Tensor | None],
    dgrads: Sequence[Tensor | None],  # of the gradients of the inputs
) -> list[Tensor | None]:
    """The gradients of the cotangents and inputs, through outputs = run(*inputs) and their gradients.

    Every tensor enters through an alias of its own, so that one that is a function of another (tied weights, say)
    counts once; the aliases keep the graph where it is wanted, which gives derivatives of any order.
    """
    higher = torch.is_grad_enabled()
    with torch.enable_grad():
        aliases = [
            None if t is None else t.view_as(t) if higher and t.requires_grad else t.detach().requires_grad_()
            for t in (*cotangents, *inputs)
        ]
        of_outputs, of_inputs = aliases[: len(cotangents)], aliases[len(cotangents) :]
        first = grad_of(run(*of_inputs), of_outputs, of_inputs, create_graph=True)
        return grad_of(first, dgrads, aliases, create_graph=higher)


def grad_of(
    outputs: Sequence[Tensor | None],
    cotangents: Sequence[Tensor | None],
    inputs: Sequence[Tensor | None],
    create_graph: bool,
) -> list[Tensor | None]:
    """`torch.autograd.grad` among lists with holes: no cotangent means zero, no dependence gives None."""
    pairs = [(o, g) for o, g in zip(outputs, cotangents) if o is not None and g is not None and o.requires_grad]
    wanted = [i for i in inputs if i is not None]
    if not pairs:
        return [None] * len(inputs)
    found = iter(
        torch.autograd.grad(
            [o for o, _ in pairs], wanted, [g for _, g in pairs], create_graph=create_graph, allow_unused=True
        )
    )
    return [None if i is None else next(found) for i in inputs]
