"""Weights of Keras and Flax: against their formulas in NumPy, and against the libraries where they are installed."""

import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rnnkern.importers import from_flax, from_keras

B, T, I, H = 3, 5, 4, 6
Arrays = list[np.ndarray]


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).uniform(-1, 1, shape)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def scan(step: Callable[..., Any], x: np.ndarray, states: int = 1) -> np.ndarray:
    """y [B, T, H] of step(x_t, *state) from zeros."""
    state, y = (np.zeros((len(x), H)),) * states, []
    for x_t in x.swapaxes(0, 1):
        state = step(x_t, *state)
        y.append(state[0])
    return np.stack(y, axis=1)


def keras_formula(weights: Arrays, x: np.ndarray, reset_after: bool = True, relu: bool = False) -> np.ndarray:
    """The formulas of Keras's documentation and source, gates in its order."""
    kernel, recurrent = weights[:2]
    bias = weights[2] if len(weights) == 3 else np.zeros(kernel.shape[1])
    gates = kernel.shape[1] // H
    b, b_ = bias if bias.ndim == 2 else (bias, np.zeros_like(bias))

    def simple(x_t: np.ndarray, h: np.ndarray) -> Any:
        a = x_t @ kernel + h @ recurrent + b
        return (np.maximum(a, 0) if relu else np.tanh(a),)

    def lstm(x_t: np.ndarray, h: np.ndarray, c: np.ndarray) -> Any:
        i, f, g, o = np.split(x_t @ kernel + h @ recurrent + b, 4, axis=-1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        return sigmoid(o) * np.tanh(c), c

    def gru(x_t: np.ndarray, h: np.ndarray) -> Any:
        x_z, x_r, x_h = np.split(x_t @ kernel + b, 3, axis=-1)
        U, c = np.split(recurrent, 3, axis=-1), np.split(b_, 3)
        z, r = sigmoid(x_z + h @ U[0] + c[0]), sigmoid(x_r + h @ U[1] + c[1])
        n = np.tanh(x_h + (r * (h @ U[2] + c[2]) if reset_after else (r * h) @ U[2]))
        return (z * h + (1 - z) * n,)

    return scan({1: simple, 3: gru, 4: lstm}[gates], x, 2 if gates == 4 else 1)


def keras_weights(gates: int, bias: tuple[int, ...] | None) -> Arrays:
    return [random(I, gates * H), random(H, gates * H), *([] if bias is None else [random(*bias)])]


def run(layer: torch.nn.Module, x: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return layer(torch.from_numpy(x))[0].numpy()


KERAS = {
    "SimpleRNN": (1, (H,), {}),
    "SimpleRNN relu": (1, (H,), {"nonlinearity": "relu"}),
    "LSTM": (4, (4 * H,), {}),
    "LSTM without bias": (4, None, {}),
    "GRU": (3, (2, 3 * H), {}),
    "GRU reset before": (3, (3 * H,), {}),
    "GRU without bias": (3, None, {}),
    "GRU without bias reset before": (3, None, {"reset_after": False}),
}


@pytest.mark.parametrize("name", KERAS)
def test_keras_weights(name: str) -> None:
    gates, bias, options = KERAS[name]
    weights, x = keras_weights(gates, bias), random(B, T, I)
    layer = from_keras(weights, **options)
    assert type(layer).__name__ == name.split()[0].removeprefix("Simple")
    assert layer.bias == (bias is not None)
    expected = keras_formula(weights, x, reset_after="before" not in name, relu="relu" in name)
    np.testing.assert_allclose(run(layer, x), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("bias", [None, (4 * H,)])
def test_keras_weights_of_two_directions(bias: tuple[int, ...] | None) -> None:
    first, x = keras_weights(4, bias), random(B, T, I)
    second = [-array for array in first]
    expected = [keras_formula(first, x), keras_formula(second, x[:, ::-1])[:, ::-1]]
    layer = from_keras(first + second)
    np.testing.assert_allclose(run(layer, x), np.concatenate(expected, axis=-1), rtol=1e-9, atol=1e-10)


def flax_params(gates: str) -> dict[str, Any]:
    """As OptimizedLSTMCell (ifgo), GRUCell (rzn) and SimpleCell have them."""
    names = {part: [f"{part}{gate}" for gate in gates] or [part] for part in "ih"}
    biased = {"ifgo": names["h"], "rzn": [*names["i"], "hn"], "": ["i"]}[gates]
    return {
        name: {"kernel": random(I if part == "i" else H, H) * (k + 1) / 4}
        | ({"bias": random(H) / (k + 1)} if name in biased else {})
        for part, rows in names.items()
        for k, name in enumerate(rows)
    }


def flax_formula(gates: str, p: dict[str, Any], x: np.ndarray) -> np.ndarray:
    def dense(name: str, value: np.ndarray) -> np.ndarray:
        return value @ p[name]["kernel"] + p[name].get("bias", 0)

    def lstm(x: np.ndarray, h: np.ndarray, c: np.ndarray) -> Any:
        i, f, o = (sigmoid(dense(f"i{gate}", x) + dense(f"h{gate}", h)) for gate in "ifo")
        c = f * c + i * np.tanh(dense("ig", x) + dense("hg", h))
        return o * np.tanh(c), c

    def gru(x: np.ndarray, h: np.ndarray) -> Any:
        r, z = (sigmoid(dense(f"i{gate}", x) + dense(f"h{gate}", h)) for gate in "rz")
        n = np.tanh(dense("in", x) + r * dense("hn", h))
        return ((1 - z) * n + z * h,)

    def simple(x: np.ndarray, h: np.ndarray) -> Any:
        return (np.tanh(dense("i", x) + dense("h", h)),)

    return scan({"ifgo": lstm, "rzn": gru, "": simple}[gates], x, 2 if gates == "ifgo" else 1)


@pytest.mark.parametrize("gates", ["ifgo", "rzn", ""], ids=["LSTM", "GRU", "simple"])
def test_flax_params(gates: str) -> None:
    params, x = flax_params(gates), random(B, T, I)
    for wrapped in (params, {"params": params}, {"params": {"cell": params}}):
        layer = from_flax(wrapped)
        assert type(layer).__name__ == {"ifgo": "LSTM", "rzn": "GRU", "": "RNN"}[gates]
        np.testing.assert_allclose(run(layer, x), flax_formula(gates, params, x), rtol=1e-9, atol=1e-10)


def test_the_imported_layer_is_a_copy() -> None:
    weights = keras_weights(1, (H,))
    before = [array.copy() for array in weights]
    layer = from_keras(weights)
    with torch.no_grad():
        for p in layer.parameters():
            p.zero_()
    assert all(np.array_equal(a, b) for a, b in zip(weights, before))
    assert all(p.requires_grad and p.dtype == torch.float64 for p in layer.parameters())
    assert from_keras([array.astype(np.float16) for array in weights]).weight_ih_l0.dtype == torch.float16
    assert from_keras([torch.from_numpy(array).float() for array in weights]).weight_ih_l0.dtype == torch.float32


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (3, TypeError, "must be a layer or a list of arrays, got int"),
        ("lstm", TypeError, "must be a layer or a list of arrays, got str"),
        (["kernel", "bias"], TypeError, "layer_or_weights must hold arrays of floating-point numbers, got str"),
        ([random(I, H)], ValueError, "expected kernel, recurrent_kernel and perhaps bias, got 1 arrays"),
        ([random(I, 2 * H), random(H, 2 * H)], ValueError, r"got kernel \[4, 12\], recurrent_kernel \[6, 12\]"),
        ([random(I, 4 * H), random(H, 3 * H)], ValueError, r"got kernel \[4, 24\], recurrent_kernel \[6, 18\]"),
        ([random(I, 4 * H + 1), random(H, 4 * H + 1)], ValueError, "G is 1, 3 or 4, got kernel"),
        ([random(I, 4 * H), random(H, 4 * H), random(3 * H)], ValueError, r"recurrent_kernel \[6, 24\], bias \[18\]"),
        ([random(I, 4 * H), random(H, 4 * H), random(2, 4 * H)], ValueError, r"bias \[2, 24\]"),
        ([random(I, 3 * H), random(H, 3 * H), random(3, 3 * H)], ValueError, r"bias \[3, 18\]"),
        ([random(I), random(H)], ValueError, r"got kernel \[4\], recurrent_kernel \[6\]"),
        (
            [random(I, H), random(H, H), random(I + 1, H), random(H, H)],
            ValueError,
            r"same shapes, got \[\(4, 6\), \(6, 6\)\] and \[\(5, 6\), \(6, 6\)\]",
        ),
    ],
)
def test_keras_weights_that_do_not_fit(given: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        from_keras(given)


def keras_layer(kind: str, activation: str = "tanh", reset_after: bool = True, backwards: bool = False) -> Any:
    """Without Keras: an object that says of itself what a layer says."""
    named = {name: SimpleNamespace(__name__=name) for name in (activation, "sigmoid")}
    facts = {"cell": None, "go_backwards": backwards, "activation": named[activation], "get_weights": list}
    return type(kind, (), facts | {"recurrent_activation": named["sigmoid"], "reset_after": reset_after})()


@pytest.mark.parametrize("tells", [True, False])
def test_reset_after_that_contradicts(tells: bool) -> None:
    bias = (2, 3 * H) if tells else (3 * H,)
    message = rf"reset_after must be {tells} for a bias of shape .*18\], got {not tells}"
    with pytest.raises(ValueError, match=message):
        from_keras(keras_weights(3, bias), reset_after=not tells)
    assert from_keras(keras_weights(3, bias), reset_after=tells).reset_after is tells
    with pytest.raises(ValueError, match=f"reset_after must be that of the layer, {tells}, got {not tells}"):
        from_keras(keras_layer("GRU", reset_after=tells), reset_after=not tells)


@pytest.mark.parametrize("convert", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
def test_integers_are_no_weights(convert: Callable[..., Any]) -> None:
    kernel, recurrent = (convert(np.ones((rows, 4 * H), dtype=np.int64)) for rows in (I, H))
    with pytest.raises(TypeError, match=r"layer_or_weights must hold arrays of floating-point numbers, got .*int64"):
        from_keras([kernel, recurrent])
    with pytest.raises(TypeError, match=r"i/kernel must hold arrays of floating-point numbers, got .*int64"):
        from_flax({"i": {"kernel": kernel}, "h": {"kernel": recurrent}})


def test_bfloat16_stays() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")  # comes with Flax, and with Keras' JAX
    values = random(I, H), random(H, H)
    kernels = [array.astype(ml_dtypes.bfloat16) for array in values]
    rnn = from_flax({name: {"kernel": kernel} for name, kernel in zip("ih", kernels)})
    for weight, array in zip((rnn.weight_ih_l0, rnn.weight_hh_l0), values):
        assert torch.equal(weight, torch.from_numpy(array).bfloat16().T)


@pytest.mark.parametrize("differs", [{"activation": "relu"}, {"reset_after": False}], ids=str)
def test_directions_of_keras_that_differ(differs: dict[str, Any]) -> None:
    kind = "SimpleRNN" if "activation" in differs else "GRU"
    both = SimpleNamespace(
        merge_mode="concat",
        forward_layer=keras_layer(kind),
        backward_layer=keras_layer(kind, backwards=True, **differs),
        get_weights=list,
    )
    with pytest.raises(ValueError, match="both layers of Bidirectional must be of one kind"):
        from_keras(both)


def test_flax_params_that_do_not_fit() -> None:
    with pytest.raises(TypeError, match="params must be a mapping of the cell's parameters, got list"):
        from_flax([1])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"an LSTM, GRU or simple cell, got entries \['hf', 'hn', 'if', 'in'\]"):
        from_flax({"if": {}, "in": {}, "hf": {}, "hn": {}})
    for name, entry, error, message in (
        ("hg", {"kernel": random(H, H + 1)}, ValueError, r"hg/kernel must have shape \[6, 6\], got \[6, 7\]"),
        ("ig", {"kernel": random(I + 1, H)}, ValueError, r"ig/kernel must have shape \[4, 6\], got \[5, 6\]"),
        ("hg", {"kernel": random(H)}, ValueError, r"hg/kernel must have two dimensions, got shape \[6\]"),
        (
            "hg",
            {"kernel": random(H, H), "bias": random(1, H)},
            ValueError,
            r"hg/bias must have shape \[6\], got \[1, 6",
        ),
        ("hg", {"bias": random(H)}, ValueError, r"hg must hold kernel and perhaps bias, got \['bias'\]"),
        ("hg", random(H, H), ValueError, "hg must hold kernel and perhaps bias, got ndarray"),
        ("hg", {"kernel": "ones"}, TypeError, "hg/kernel must hold arrays of floating-point numbers, got str"),
    ):
        with pytest.raises(error, match=message):
            from_flax(flax_params("ifgo") | {name: entry})


# Against the libraries themselves.


@pytest.fixture(scope="module")
def keras() -> Any:
    os.environ.setdefault("KERAS_BACKEND", "torch")
    return pytest.importorskip("keras", reason="keras is not installed (pip install rnnkern[importers])")


@pytest.fixture(scope="module")
def flax() -> Any:
    pytest.importorskip("jax", reason="jax is not installed (pip install rnnkern[importers])")
    return pytest.importorskip("flax.linen", reason="flax is not installed (pip install rnnkern[importers])")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("SimpleRNN", {}),
        ("SimpleRNN", {"activation": "relu"}),
        ("LSTM", {}),
        ("GRU", {}),
        ("GRU", {"reset_after": False}),
    ],
)
def test_keras_layers(keras: Any, name: str, options: dict[str, Any], bias: bool) -> None:
    options = options | {"use_bias": bias, "bias_initializer": "normal", "return_sequences": True}
    x = random(B, T, I).astype(np.float32)
    for layer in (
        getattr(keras.layers, name)(H, **options),
        keras.layers.Bidirectional(getattr(keras.layers, name)(H, **options)),
    ):
        with pytest.raises(ValueError, match="must be built"):
            from_keras(layer)
        expected = keras.ops.convert_to_numpy(layer(x))
        np.testing.assert_allclose(run(from_keras(layer), x), expected, rtol=1e-4, atol=1e-5)
    if "activation" not in options:
        more = {} if bias or name != "GRU" else {"reset_after": options.get("reset_after", True)}
        np.testing.assert_allclose(run(from_keras(layer.weights, **more), x), expected, rtol=1e-4, atol=1e-5)


def test_keras_layers_that_torch_does_not_have(keras: Any) -> None:
    for layer, message in (
        (keras.layers.LSTM(H, activation="relu"), "activation of LSTM must be tanh, got relu"),
        (keras.layers.GRU(H, recurrent_activation="tanh"), "recurrent_activation of GRU must be sigmoid, got tanh"),
        (keras.layers.GRU(H, go_backwards=True), "go_backwards of GRU must be False"),
        (keras.layers.Bidirectional(keras.layers.LSTM(H), merge_mode="sum"), "merge_mode .* 'concat', got 'sum'"),
    ):
        layer(random(B, T, I).astype(np.float32))
        with pytest.raises(ValueError, match=message):
            from_keras(layer)
    with pytest.raises(TypeError, match="must be an LSTM, a GRU or a SimpleRNN, got Dense"):
        from_keras(keras.layers.Dense(H))


@pytest.mark.parametrize("name", ["OptimizedLSTMCell", "LSTMCell", "GRUCell", "SimpleCell"])
def test_flax_cells(flax: Any, name: str) -> None:
    import jax

    x = random(B, T, I).astype(np.float32)
    cell = getattr(flax, name)(H, bias_init=jax.nn.initializers.normal())
    rnn = flax.RNN(cell)
    variables = rnn.init(jax.random.key(0), x)
    expected = np.asarray(rnn.apply(variables, x))
    np.testing.assert_allclose(run(from_flax(variables), x), expected, rtol=1e-4, atol=1e-5)
    half = jax.tree.map(lambda array: array.astype("bfloat16"), variables)
    assert from_flax(half).weight_ih_l0.dtype == torch.bfloat16
