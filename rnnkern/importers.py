"""Recurrent layers of Keras 3 and Flax as layers of rnnkern.nn: weights, in torch's order of gates and axes.

Neither library is imported. What they keep, for x W + h U (so that a kernel is `[I, G*H]`, the transpose of torch's):

============================  ===============  ===========================================================
layer                         order of gates   biases
============================  ===============  ===========================================================
keras SimpleRNN               h                `[H]`
keras LSTM                    i, f, g, o       `[4*H]`
keras GRU, reset_after=True   z, r, n          `[2, 3*H]`: of the input, of the recurrent part
keras GRU, reset_after=False  z, r, n          `[3*H]`
flax SimpleCell               h                of the input, `i/bias`
flax LSTMCell and Optimized   by name          of the recurrent part, `hi/bias`, `hf/bias`, `hg/bias`, `ho/bias`
flax GRUCell                  by name          of the input, `ir`, `iz`, `in`, and `hn/bias`
============================  ===============  ===========================================================

Torch has i, f, g, o and r, z, n, and two biases, of which all cells but the GRU with `reset_after=True` use the sum;
what a library does not have is zero. In all three h' = z h + (1 - z) n.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rnnkern.nn.recurrent import GRU, LSTM, RNN
from rnnkern.ops._dispatch import KERNEL_DTYPES
from rnnkern.ops.packs import NAMES

__all__ = ["from_flax", "from_keras"]

Layer = RNN | LSTM | GRU
_KINDS = {1: "RNN", 4: "LSTM", 3: "GRU"}  # by the number of gates
_KERAS_GATES = {"RNN": (0,), "LSTM": (0, 1, 2, 3), "GRU": (1, 0, 2)}  # torch's order


def from_keras(layer_or_weights: Any, *, nonlinearity: str = "tanh", reset_after: bool | None = None) -> Layer:
    """Makes a layer of a Keras 3 `LSTM`, `GRU` or `SimpleRNN`, or of its weights.

    The result is batch_first, as Keras is, and returns the output of every step and the last state, of which Keras
    returns what `return_sequences` and `return_state` say. A mask becomes `lengths=`, if it marks the end of rows.
    Keras's `dropout` and `recurrent_dropout`, which act in training alone, and `stateful` are not carried over.

    Args:
        layer_or_weights: a layer that has been built; a `Bidirectional` of one with `merge_mode="concat"`; or a list
            of its weights, as `get_weights()` and `.weights` give it: kernel, recurrent kernel, and bias if there is
            one, of the backward layer too. Weights alone tell the kind of layer by their shapes.
        nonlinearity: "tanh" or "relu", of the weights of a SimpleRNN; a layer tells.
        reset_after: of the weights of a GRU without bias, which do not tell: True by default, as in Keras. A layer and
            a bias tell.

    Returns:
        `rnnkern.nn.RNN`, `LSTM` or `GRU` (with `reset_after=False` where the layer has it), batch_first, in the dtype
        of the weights.

    Raises:
        TypeError: it is neither a recurrent layer nor a list of arrays of floating-point numbers.
        ValueError: the layer is not built, has activations other than torch's or goes backwards; the shapes of
            the weights do not fit each other; reset_after is not what the layer or its bias says.

    Example:
        >>> import numpy as np, torch, rnnkern
        >>> kernel, recurrent, bias = np.ones((8, 64)), np.ones((16, 64)), np.zeros(64)
        >>> lstm = rnnkern.importers.from_keras([kernel, recurrent, bias])
        >>> lstm
        LSTM(8, 16, batch_first=True)
    """
    layer = layer_or_weights
    weights, bidirectional = layer, False
    if not isinstance(layer, list | tuple):
        if not hasattr(layer, "get_weights"):
            raise TypeError(f"layer_or_weights must be a layer or a list of arrays, got {type(layer).__name__}")
        bidirectional = hasattr(layer, "forward_layer")
        if bidirectional and layer.merge_mode != "concat":
            raise ValueError(f"merge_mode of Bidirectional must be 'concat', got {layer.merge_mode!r}")
        cell = layer.forward_layer if bidirectional else layer
        nonlinearity, reset_after = _check_keras(cell, nonlinearity, reset_after)
        if bidirectional:
            other = _check_keras(layer.backward_layer, nonlinearity, reset_after, backwards=True)
            if other != (nonlinearity, reset_after) or type(layer.backward_layer).__name__ != type(cell).__name__:
                raise ValueError("both layers of Bidirectional must be of one kind, activation and reset_after")
        weights = layer.get_weights()
        if not weights:
            raise ValueError(f"layer_or_weights must be built: {type(layer).__name__} has no weights yet")
    arrays = [_tensor("layer_or_weights", array) for array in weights]
    bidirectional = bidirectional or len(arrays) in (4, 6)
    D = 2 if bidirectional else 1
    if len(arrays) not in (2 * D, 3 * D):
        raise ValueError(f"expected kernel, recurrent_kernel and perhaps bias, got {len(arrays)} arrays")
    count = len(arrays) // D
    directions = [arrays[count * d : count * d + count] for d in range(D)]
    first, last = ([tuple(array.shape) for array in direction] for direction in (directions[0], directions[-1]))
    if first != last:
        raise ValueError(f"the weights of both directions must have the same shapes, got {first} and {last}")
    return _build([_keras_direction(direction, reset_after) for direction in directions], nonlinearity, reset_after)


def _check_keras(
    layer: Any, nonlinearity: str, reset_after: bool | None, backwards: bool = False
) -> tuple[str, bool | None]:
    """The nonlinearity and reset_after of a layer that torch has too; raises ValueError for another."""
    name = type(layer).__name__
    if not hasattr(layer, "cell") or name not in ("LSTM", "GRU", "SimpleRNN"):
        raise TypeError(f"layer_or_weights must be an LSTM, a GRU or a SimpleRNN, got {name}")
    if bool(layer.go_backwards) != backwards:
        raise ValueError(f"go_backwards of {name} must be {backwards}: reverse the input, or import a Bidirectional")
    activation = getattr(layer.activation, "__name__", str(layer.activation))
    allowed = ("tanh", "relu") if name == "SimpleRNN" else ("tanh",)
    if activation not in allowed:
        raise ValueError(f"activation of {name} must be {' or '.join(allowed)}, got {activation}")
    if name != "SimpleRNN":
        gate = getattr(layer.recurrent_activation, "__name__", str(layer.recurrent_activation))
        if gate != "sigmoid":
            raise ValueError(f"recurrent_activation of {name} must be sigmoid, got {gate}")
    if name != "GRU":
        return activation, reset_after
    if reset_after not in (None, layer.reset_after) and not backwards:
        raise ValueError(f"reset_after must be that of the layer, {layer.reset_after}, got {reset_after}")
    return activation, bool(layer.reset_after)


def from_flax(params: Mapping[str, Any], *, nonlinearity: str = "tanh") -> Layer:
    """Makes a layer of the parameters of a Flax linen `OptimizedLSTMCell`, `LSTMCell`, `GRUCell` or `SimpleCell`.

    The result is batch_first, as `flax.linen.RNN` is, and returns the output of every step and the last state. Of a
    `Bidirectional` import each of its cells; a SimpleCell must not be `residual`.

    Args:
        params: what `init` of the cell, or of a `flax.linen.RNN` of it, returned: entries such as `hi`, or a mapping
            of one entry ("params", "cell", the cell's name) that holds them.
        nonlinearity: "tanh" or "relu", the `activation_fn` of a SimpleCell, which the parameters do not tell.

    Returns:
        `rnnkern.nn.RNN`, `LSTM` or `GRU`, batch_first, in the dtype of the parameters.

    Raises:
        TypeError: params is not a mapping, or not of arrays of floating-point numbers.
        ValueError: its entries are not those of one of these cells; the shape of one does not fit the others.

    Example:
        >>> import numpy as np, torch, rnnkern
        >>> kernels = {"i": {"kernel": np.ones((8, 16)), "bias": np.zeros(16)}, "h": {"kernel": np.ones((16, 16))}}
        >>> rnnkern.importers.from_flax({"params": kernels}, nonlinearity="relu")
        RNN(8, 16, batch_first=True)
    """
    while isinstance(params, Mapping) and len(params) == 1:
        (params,) = params.values()
    if not isinstance(params, Mapping):
        raise TypeError(f"params must be a mapping of the cell's parameters, got {type(params).__name__}")
    for gates in ("ifgo", "rzn", ""):
        names = [[f"{part}{gate}" for gate in gates] if gates else [part] for part in "ih"]
        if set(params) == set(names[0] + names[1]):
            break
    else:
        raise ValueError(f"params must be those of an LSTM, GRU or simple cell, got entries {sorted(params)}")
    entry_of = {name: _flax_entry(name, params[name]) for part in names for name in part}
    H, I = (entry_of[part[0]]["kernel"].shape[0] for part in (names[1], names[0]))
    for name, entry in entry_of.items():
        for key, shape in (("kernel", (I if name[0] == "i" else H, H)), ("bias", (H,))):
            if key in entry and entry[key].shape != shape:
                raise ValueError(f"{name}/{key} must have shape {list(shape)}, got {list(entry[key].shape)}")
    kernels: list[Tensor] = []
    biases: list[Tensor | None] = []
    for part in names:
        entries = [entry_of[name] for name in part]
        kernels.append(torch.cat([entry["kernel"].T for entry in entries]))
        if any("bias" in entry for entry in entries):
            zeros = [entry["kernel"].new_zeros(entry["kernel"].shape[1]) for entry in entries]
            biases.append(torch.cat([entry.get("bias", zero) for entry, zero in zip(entries, zeros)]))
        else:
            biases.append(None)
    return _build([(kernels[0], kernels[1], biases[0], biases[1])], nonlinearity, None)


_Direction = tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # as torch has them: `NAMES`


def _flax_entry(name: str, entry: Any) -> dict[str, Tensor]:
    """The kernel [I, H] or [H, H] of a gate, and its bias [H] if there is one."""
    if not isinstance(entry, Mapping) or not {"kernel"} <= set(entry) <= {"kernel", "bias"}:
        held = sorted(entry) if isinstance(entry, Mapping) else type(entry).__name__
        raise ValueError(f"{name} must hold kernel and perhaps bias, got {held}")
    tensors = {key: _tensor(f"{name}/{key}", array) for key, array in entry.items()}
    if tensors["kernel"].dim() != 2:
        raise ValueError(f"{name}/kernel must have two dimensions, got shape {list(tensors['kernel'].shape)}")
    return tensors


def _tensor(name: str, array: Any) -> Tensor:
    """A copy of an array of any library, in its dtype."""
    if hasattr(array, "numpy") and not isinstance(array, Tensor):
        array = array.numpy()  # a variable of Keras
    if isinstance(array, Tensor):
        if array.dtype in KERNEL_DTYPES:
            return array.detach().cpu().clone()
        held = str(array.dtype)
    else:
        values = np.array(array)
        if values.dtype.name == "bfloat16":  # of ml_dtypes, which torch does not read
            return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
        if values.dtype in (np.float16, np.float32, np.float64):
            return torch.from_numpy(values)
        held = type(array).__name__ if values.dtype.kind in "OSU" else str(values.dtype)
    raise TypeError(f"{name} must hold arrays of floating-point numbers, got {held}")


def _keras_direction(arrays: Sequence[Tensor], reset_after: bool | None) -> _Direction:
    """The weights of a direction as torch has them; raises ValueError unless their shapes fit."""
    kernel, recurrent, *biases = arrays
    H = recurrent.shape[0] if recurrent.dim() == 2 else 0
    kind = _KINDS.get(recurrent.shape[1] // H) if H and recurrent.shape[1] % H == 0 else None
    rows = recurrent.shape[-1:]  # G*H
    allowed = (rows, (2, *rows)) if kind == "GRU" else (rows,)
    if kind is None or kernel.dim() != 2 or kernel.shape[1:] != rows or (biases and biases[0].shape not in allowed):
        given = ", ".join(f"{name} {list(a.shape)}" for name, a in zip(("kernel", "recurrent_kernel", "bias"), arrays))
        raise ValueError(
            "expected kernel [I, G*H], recurrent_kernel [H, G*H] and perhaps bias, [G*H] or, of a GRU with "
            f"reset_after=True, [2, G*H], where G is 1, 3 or 4, got {given}"
        )
    if kind == "GRU" and biases and reset_after not in (None, biases[0].dim() == 2):
        shape = list(biases[0].shape)
        raise ValueError(f"reset_after must be {not reset_after} for a bias of shape {shape}, got {reset_after}")

    def reordered(rows: Tensor) -> Tensor:  # [G*H, ...]
        parts = rows.chunk(len(_KERAS_GATES[kind]))
        return torch.cat([parts[i] for i in _KERAS_GATES[kind]])

    bias = biases[0] if biases else None
    both = bias is not None and bias.dim() == 2
    return (
        reordered(kernel.T),
        reordered(recurrent.T),
        None if bias is None else reordered(bias[0] if both else bias),
        reordered(bias[1]) if bias is not None and both else None,
    )


def _build(directions: Sequence[_Direction], nonlinearity: str, reset_after: bool | None) -> Layer:
    """The layer of these weights; `reset_after` None: what the biases tell."""
    w_ih, w_hh, b_ih, b_hh = directions[0]
    H, I = w_hh.shape[1], w_ih.shape[1]
    kind = _KINDS[w_hh.shape[0] // H]
    options: dict[str, Any] = {"nonlinearity": nonlinearity} if kind == "RNN" else {}
    if kind == "GRU":
        options["reset_after"] = (b_ih is None or b_hh is not None) if reset_after is None else reset_after
    bias = b_ih is not None or b_hh is not None
    made: dict[str, type[Layer]] = {"RNN": RNN, "LSTM": LSTM, "GRU": GRU}
    layer = made[kind](
        I, H, bias=bias, batch_first=True, bidirectional=len(directions) == 2, dtype=w_hh.dtype, **options
    )
    zeros = w_hh.new_zeros(w_hh.shape[0])
    state = {
        f"{name}_l0{suffix}": zeros if value is None else value
        for direction, suffix in zip(directions, ("", "_reverse"))
        for name, value in zip(NAMES[: 4 if bias else 2], direction)
    }
    layer.load_state_dict(state)
    return layer
