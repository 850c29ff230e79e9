"""Floating-point operations of our operators, for torch.utils.flop_counter: those of products, as torch counts them.

A multiplication and an addition are two. Lengths are not looked at: what is padding counts, too.
"""

import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

from rnnkern import _library

_COUNTER = "torch.utils.flop_counter"


def _rows(x: Sequence[int]) -> int:
    """Time steps of all rows, of x [T, B, I] or [N, I]."""
    return x[0] if len(x) == 2 else x[0] * x[1]


def _layer(
    cell: str,
    x: Sequence[int],
    h0: Sequence[int],
    c0: Any,
    w_ih: Sequence[int],
    w_hh: Sequence[int],
    *_: Any,
    **__: Any,
) -> int:
    """W_ih x and W_hh h of every step and direction."""
    return 2 * h0[0] * _rows(x) * w_ih[0] * (w_ih[1] + w_hh[1])


def _stack(cell: str, x: Sequence[int], h0: Any, c0: Any, weights: Sequence[Sequence[int]], *_: Any, **__: Any) -> int:
    """W_ih x and W_hh h of every step and layer."""
    return 2 * _rows(x) * sum(w[0] * w[1] for w in weights if len(w) == 2)


def _stack_backward(cell: str, *inputs: Any, **_: Any) -> int:
    """As of a layer; the gradient of every layer's input but the first's is needed."""
    x, h0, _c0, weights = inputs[3:7]
    need_dx, need_dh0, need_dw = inputs[14:17]
    matrices = [w for w in weights if len(w) == 2]
    rows, L, B = _rows(x), h0[0], h0[1]
    states = rows if need_dh0 else max(rows - B, 0)
    columns = 0
    for layer in range(L):
        w_ih, w_hh = matrices[2 * layer : 2 * layer + 2]
        columns += rows * w_ih[1] * ((layer > 0 or need_dx) + need_dw) + rows * w_hh[1] * need_dw + states * w_hh[1]
    return int(2 * matrices[0][0] * columns)


def _layer_backward(cell: str, *inputs: Any, **_: Any) -> int:
    """Transposed products where a gradient is wanted; without that of h0 the first step needs none for its state."""
    x, h0, _, w_ih, w_hh = inputs[4:9]
    need_dx, need_dh0, need_dw = inputs[19:22]
    rows, D, B = _rows(x), h0[0], h0[1]
    states = rows if need_dh0 else max(rows - B, 0)
    columns = rows * w_ih[1] * (need_dx + need_dw) + rows * w_hh[1] * need_dw + states * w_hh[1]
    return int(2 * D * w_ih[0] * columns)


def _attention(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    """The scores, of which the additive ones are products with its vector, and the weighted sum."""
    B, Tq, D = query
    Tk, Dv = value[1:]
    return 2 * B * Tq * Tk * (D + Dv)


def _attention_backward(
    dcontext: Any, dweights: Any, query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any
) -> int:
    """The scores again; gradients of weights and values; those of queries and keys (or the vector) from the scores'."""
    B, Tq, D = query
    Tk, Dv = value[1:]
    return 2 * B * Tq * Tk * (3 * D + 2 * Dv)


def _linear_cross_entropy(input: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    """The logits."""
    return 2 * input[0] * input[1] * weight[0]


def _linear_cross_entropy_gradients(scale: Any, *inputs: Any, **_: Any) -> int:
    """The logits, and a product for the gradient of the input and of the weight each."""
    need_input, need_weight = inputs[6:8]
    return _linear_cross_entropy(*inputs[:2]) * int(1 + need_input + need_weight)


def _register(counter: ModuleType) -> None:
    ops = torch.ops.rnnkern
    if ops.linear_cross_entropy in counter.flop_registry:  # rnnkern was reloaded
        return
    formulas: list[tuple[list[Any], Any]] = [
        ([ops.triton_layer, ops.triton_layer_inference], _layer),
        ([ops.triton_layer_backward], _layer_backward),
        ([ops.triton_attention, ops.triton_attention_inference], _attention),
        ([ops.triton_attention_backward], _attention_backward),
        ([ops.linear_cross_entropy, ops.triton_linear_cross_entropy], _linear_cross_entropy),
        (
            [ops.linear_cross_entropy_gradients, ops.triton_linear_cross_entropy_gradients],
            _linear_cross_entropy_gradients,
        ),
    ]
    if _library.available:
        formulas += [
            ([ops.layer, ops.layer_inference, ops.layer_int8, ops.cuda_layer, ops.cuda_layer_inference], _layer),
            ([ops.layer_backward, ops.cuda_layer_backward], _layer_backward),
            ([ops.cuda_stack, ops.cuda_stack_inference], _stack),
            ([ops.cuda_stack_backward], _stack_backward),
            ([ops.attention, ops.attention_inference, ops.cuda_attention, ops.cuda_attention_inference], _attention),
            ([ops.attention_backward, ops.cuda_attention_backward], _attention_backward),
        ]
    for operators, formula in formulas:
        counter.register_flop_formula(operators)(formula)


class _RegisterOnImport:
    """Finds the counter's module for whoever imports it first, and registers the formulas in it.

    Importing it here would import Triton, where that is installed.
    """

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(_RegisterOnImport)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register(module)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Lets `torch.utils.flop_counter.FlopCounterMode` count our operators."""
    if _COUNTER in sys.modules:
        _register(sys.modules[_COUNTER])
    else:
        sys.meta_path.insert(0, _RegisterOnImport)
