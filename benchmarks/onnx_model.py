"""A module's layers as a chain of the standard ONNX operators RNN, GRU and LSTM, built from its weights.

Gates come in another order there (GRU z r n, LSTM i o f g), and a direction's two biases stand in one row. T and B are
fixed, so that a runtime may plan for them.
"""

from typing import Any

import numpy as np
from torch import Tensor, nn

OPSET, IR_VERSION = 17, 8
ORDER = {"RNN_TANH": [0], "RNN_RELU": [0], "GRU": [1, 0, 2], "LSTM": [0, 3, 1, 2]}  # ONNX's gates among torch's


def reordered(parameter: Tensor, order: list[int]) -> np.ndarray[Any, Any]:
    """A parameter [G*H, ...] with its gates in ONNX's order."""
    gates = parameter.detach().numpy().reshape(len(order), -1, *parameter.shape[1:])
    return np.ascontiguousarray(gates[order]).reshape(parameter.shape)


def layer_weights(module: nn.RNNBase, layer: int) -> dict[str, np.ndarray[Any, Any]]:
    """W [D, G*H, I], R [D, G*H, H] and B [D, 2*G*H] of a layer."""
    order = ORDER[module.mode]
    suffixes = [f"_l{layer}", f"_l{layer}_reverse"][: 2 if module.bidirectional else 1]

    def stacked(stem: str) -> np.ndarray[Any, Any]:
        return np.stack([reordered(getattr(module, stem + suffix), order) for suffix in suffixes])

    biases = [stacked("bias_ih"), stacked("bias_hh")]
    return {"W": stacked("weight_ih"), "R": stacked("weight_hh"), "B": np.concatenate(biases, axis=1)}


def onnx_model(module: nn.RNNBase, T: int, B: int, states: bool = False) -> bytes:
    """The model, serialised: x [T, B, I] -> y [T, B, D*H].

    With `states` each layer k takes h0_k and c0_k and also gives h_k and c_k, [D, B, H] (c of LSTM only).

    Raises:
        ImportError: onnx is not installed.
    """
    from onnx import TensorProto, helper, numpy_helper

    D, H = 2 if module.bidirectional else 1, module.hidden_size
    kind, _, nonlinearity = module.mode.partition("_")
    attributes: dict[str, Any] = {"hidden_size": H, "direction": "bidirectional" if D == 2 else "forward"}
    if kind == "GRU":
        attributes["linear_before_reset"] = 1  # torch's form
    if nonlinearity:
        attributes["activations"] = [nonlinearity.capitalize()] * D

    def value(name: str, *shape: int) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    inputs, outputs = [value("x", T, B, module.input_size)], [value("y", T, B, D * H)]
    constants = {"shape": np.array([T, B, D * H], dtype=np.int64)}
    nodes = []
    last = "x"
    for layer in range(module.num_layers):
        constants |= {f"{name}_{layer}": array for name, array in layer_weights(module, layer).items()}
        first = [f"{state}0_{layer}" for state in ("h", "c")[: 2 if kind == "LSTM" else 1]] if states else []
        final = [name.replace("0_", "_") for name in first]
        inputs += [value(name, D, B, H) for name in first]
        outputs += [value(name, D, B, H) for name in final]
        taken = [last, f"W_{layer}", f"R_{layer}", f"B_{layer}", *(["", *first] if states else [])]
        y = "y" if layer == module.num_layers - 1 else f"y_{layer}"
        nodes += [
            helper.make_node(kind, taken, [f"by_direction_{layer}", *final], **attributes),  # [T, D, B, H]
            helper.make_node("Transpose", [f"by_direction_{layer}"], [f"by_row_{layer}"], perm=[0, 2, 1, 3]),
            helper.make_node("Reshape", [f"by_row_{layer}", "shape"], [y]),
        ]
        last = y
    graph = helper.make_graph(
        nodes,
        "recurrence",
        inputs,
        outputs,
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    return bytes(model.SerializeToString())
