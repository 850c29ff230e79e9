"""RNN, LSTM and GRU with int8 weights for inference, and what makes them of float models."""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from rnnkern._checks import autocasts
from rnnkern.cells import CELLS
from rnnkern.nn._checks import check_present
from rnnkern.nn._options import OF_BACKWARD
from rnnkern.nn._public import public
from rnnkern.nn._recurrent import _NO_PROJECTION, _Recurrent
from rnnkern.nn.recurrent import GRU, LSTM, RNN
from rnnkern.ops.int8 import Int8PackCache, quantize_rows, recurrence_int8
from rnnkern.ops.packs import Weights

_ABOUT = """
    Weight matrices are int8 with a float32 scale for each row, a quarter of the memory: row r of W is scale[r] times
    int8[r], where scale[r] = max |W[r]| / 127. At every step the kernels round each row of the input, and each half of
    a row of h, to 15 bits and a sign, multiply and sum integers exactly, and keep all else in float32, the states too:
    what sets the result apart from the float layer's is the rounding of the weights. A row whose input or h holds an
    infinity or NaN gives NaN from there on. `rnnkern.quantize_dynamic` makes such layers of all those of a model.
    Off the CPU, or where the kernels are absent, each call makes float32 weights of them and multiplies by those.

    Arguments, keywords, results and `step` are the float layer's. There are no gradients. Weights, their scales
    (`weight_ih_l0_scale`, ...) and biases are buffers. A new module is in eval mode and has zero weights, to be loaded
    by `load_state_dict`; `from_float` rounds those of a float layer. Input and states are float32; `half`, `double` and
    `to(dtype)` change no dtype, as with torch's dynamically quantized layers.

    Raises:
        ValueError: what the float layer raises; `proj_size`, `reset_after=False` or a dtype other than float32 is asked
            for; the input is not float32.
        RuntimeError: what the float layer raises; a gradient is wanted.
"""


class _Quantized(_Recurrent):
    """Comes before the float class among the bases, of which it takes all but the parameters."""

    _pack_cache = Int8PackCache
    _recurrence = staticmethod(recurrence_int8)
    _float: type[_Recurrent]  # the class in whose place this one stands

    @torch.inference_mode(False)  # else buffers had no version, and could not be packed
    def __init__(self, *args: Any, device: torch.device | str | None = None, **kwargs: Any) -> None:
        name = type(self).__name__
        if kwargs.get("dtype") not in (None, torch.float32):
            raise ValueError(f"{name} computes in torch.float32, got dtype={kwargs['dtype']}")
        for option in OF_BACKWARD:
            if kwargs.get(option) is not None:
                raise ValueError(f"{name} has no gradients, got {option}={kwargs[option]}")
        super().__init__(*args, device="meta", **kwargs)
        if self.proj_size:
            raise ValueError(f"{name} has no proj_size, got {self.proj_size}")
        if self.mode.lower() not in CELLS:
            raise ValueError(f"{name} has no reset_after=False")
        shapes = {name: parameter.shape for name, parameter in self.named_parameters(recurse=False)}
        scales = []
        for name, shape in shapes.items():
            delattr(self, name)
            dtype = torch.int8 if len(shape) == 2 else torch.float32  # of h_0 and c_0, of rank 3, too
            self.register_buffer(name, torch.zeros(shape, dtype=dtype, device=device))
            if len(shape) == 2:
                scales.append(f"{name}_scale")
                self.register_buffer(scales[-1], torch.ones(shape[0], dtype=torch.float32, device=device))
        self._flat_weights_names = scales  # torch's checks look at their dtype
        self._init_flat_weights()
        self.eval()

    @classmethod
    @torch.inference_mode(False)
    def from_float(cls, module: torch.nn.RNNBase) -> Self:
        """Rounds the weights of a layer of torch.nn or rnnkern.nn; the layer itself stays as it is.

        Raises:
            TypeError: the layer is of another kind.
            ValueError: it has `proj_size` or `reset_after=False`, or parameters that are not float32, infinite or NaN.
        """
        kind = cls._float.__name__
        if not isinstance(module, getattr(torch.nn, kind) | cls._float) or isinstance(module, _Quantized):
            raise TypeError(f"{cls.__name__}.from_float takes a float {kind}, got {type(module).__name__}")
        names = [name for names in module._all_weights for name in names]
        learned = isinstance(module, _Recurrent) and module.learn_initial_state
        if isinstance(module, _Recurrent):
            names += module._initial_shapes()
        parameters: dict[str, Tensor] = {name: getattr(module, name) for name in names}
        for name, parameter in parameters.items():
            if name not in module._parameters:  # weight_norm's hook would have set it before the call
                raise ValueError(
                    f"{name} must be a parameter to be rounded to int8: remove its reparametrization first"
                )
            if parameter.dtype != torch.float32:
                raise ValueError(f"{name} must be torch.float32 to be rounded to int8, got {parameter.dtype}")
        option = {"RNN": "nonlinearity", "LSTM": "proj_size", "GRU": "reset_after"}[kind]
        options = {option: getattr(module, option)} if hasattr(module, option) else {}  # torch.nn.GRU has none
        quantized = cls(
            module.input_size,
            module.hidden_size,
            num_layers=module.num_layers,
            bias=module.bias,
            batch_first=module.batch_first,
            dropout=module.dropout,
            bidirectional=module.bidirectional,
            device=next(iter(parameters.values())).device,
            learn_initial_state=learned,
            **options,
        )
        for name, parameter in parameters.items():
            if parameter.dim() == 2:
                rounded, scale = quantize_rows(parameter)
                quantized._buffers[name] = rounded
                quantized._buffers[f"{name}_scale"] = scale
            else:
                quantized._buffers[name] = parameter.detach().clone()
        quantized._init_flat_weights()
        return quantized

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Lets `fn` move the tensors, but not change their dtypes: the kernels have no others."""

        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        result: Self = super()._apply(moved, recurse)  # type: ignore[no-untyped-call]
        return result

    def check_input(self, input: Tensor, batch_sizes: Tensor | None) -> None:
        """Checks what torch checks, but does not advise to convert the module."""
        if not self._fits(input, torch.float32):
            raise ValueError(f"input must have dtype torch.float32 for {type(self).__name__}, got {input.dtype}")
        super().check_input(input, batch_sizes)

    def _weight_tensors(self) -> dict[str, Any]:
        return self._buffers

    def _named_weights(self) -> Iterable[tuple[str, Tensor]]:
        names = [*(name for names in self._all_weights for name in names), *self._flat_weights_names]
        return [(name, getattr(self, name)) for name in names]  # without a subclass's own buffers, such as a state

    def _dtype(self, weight: Tensor) -> torch.dtype:
        return torch.float32

    def _fits(self, tensor: Tensor, dtype: torch.dtype) -> bool:
        return tensor.dtype == dtype or autocasts(tensor)

    def _casts(self, weights: Weights, dtype: torch.dtype) -> bool:
        return False

    def _layer_weights(self, layer: int) -> tuple[Weights, tuple[Tensor | None, ...]]:
        """Weights and scales of a layer, in the order of `rnnkern.ops.int8`."""
        D = 2 if self.bidirectional else 1
        weights: list[Tensor | None] = []
        scales: list[Tensor | None] = []
        for names in self._all_weights[layer * D : layer * D + D]:
            found = [self._buffers[name] for name in names]
            check_present(names, found)
            weights += found + [None] * (4 - len(names))
            scales += [self._buffers[f"{name}_scale"] for name in names[:2]]
        absent = [None] * (2 - D)
        return (*weights, *(absent * 4), *scales, *(absent * 2)), _NO_PROJECTION

    def _prepare_short(self) -> None:
        names = [[*layer, *(f"{name}_scale" for name in layer[:2])] for layer in self._all_weights]
        self._packs.prepare(self.mode.lower(), self._weight_tensors(), names)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        errors: list[str] = args[-1]
        for scale in self._flat_weights_names:
            name = prefix + scale.removesuffix("_scale")
            if name in state_dict and state_dict[name].dtype != torch.int8:
                errors.append(
                    f"{name} must be torch.int8, got {state_dict[name].dtype}: see {type(self).__name__}.from_float"
                )
                return
        super()._load_from_state_dict(state_dict, prefix, *args)


@public
class QuantizedRNN(_Quantized, RNN):  # noqa: D101, it has one
    __doc__ = f"""Elman network with int8 weights, for inference in the place of `rnnkern.nn.RNN`.

    h' = tanh(W_ih x + b_ih + W_hh h + b_hh), or relu in the place of tanh (`nonlinearity="relu"`).
{_ABOUT}
    Source: Elman 1990, https://doi.org/10.1207/s15516709cog1402_1.

    Example:
        >>> import torch, rnnkern
        >>> rnn = rnnkern.nn.QuantizedRNN.from_float(rnnkern.nn.RNN(10, 20))
        >>> with torch.no_grad():
        ...     output, h_n = rnn(torch.randn(5, 3, 10), lengths=torch.tensor([5, 0, 2]))
        >>> output.shape, rnn.weight_ih_l0.dtype
        (torch.Size([5, 3, 20]), torch.int8)
    """

    _float = RNN


@public
class QuantizedLSTM(_Quantized, LSTM):  # noqa: D101, it has one
    __doc__ = f"""Long short-term memory with int8 weights, for inference in the place of `rnnkern.nn.LSTM`.

    i, f, o = sigmoid(W x + b + U h + b'), g = tanh(W_g x + b_g + U_g h + b_g'), c' = f c + i g, h' = o tanh(c').
{_ABOUT}
    Source: Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al. 2000.

    Example:
        >>> import torch, rnnkern
        >>> lstm = rnnkern.nn.QuantizedLSTM.from_float(torch.nn.LSTM(10, 20, bidirectional=True))
        >>> with torch.no_grad():
        ...     output, (h_n, c_n) = lstm(torch.randn(5, 3, 10))
        >>> output.shape, lstm.weight_hh_l0_reverse_scale.shape
        (torch.Size([5, 3, 40]), torch.Size([80]))
    """

    _float = LSTM


@public
class QuantizedGRU(_Quantized, GRU):  # noqa: D101, it has one
    __doc__ = f"""Gated recurrent unit with int8 weights, for inference in the place of `rnnkern.nn.GRU`.

    r, z = sigmoid(W x + b + U h + b'), n = tanh(W_n x + b_n + r (U_n h + b_n')), h' = (1 - z) n + z h.
{_ABOUT}
    Source: Cho et al. 2014, https://arxiv.org/abs/1406.1078, in cuDNN's form.

    Example:
        >>> import torch, rnnkern
        >>> gru = rnnkern.nn.QuantizedGRU.from_float(rnnkern.nn.GRU(10, 20, batch_first=True))
        >>> with torch.no_grad():
        ...     output, h_n = gru(torch.randn(3, 5, 10), resets=torch.rand(3, 5) < 0.1)
        >>> output.shape, h_n.shape
        (torch.Size([3, 5, 20]), torch.Size([1, 3, 20]))
    """

    _float = GRU


# By exact type: a subclass may compute something else.
_QUANTIZED: dict[type[torch.nn.Module], type[_Quantized]] = {
    **{quantized._float: quantized for quantized in (QuantizedRNN, QuantizedLSTM, QuantizedGRU)},
    torch.nn.RNN: QuantizedRNN,
    torch.nn.LSTM: QuantizedLSTM,
    torch.nn.GRU: QuantizedGRU,
}


@torch.inference_mode(False)
def quantize_dynamic(model: torch.nn.Module, inplace: bool = False) -> torch.nn.Module:
    """Puts layers with int8 weights in the place of a model's RNN, LSTM and GRU layers, for inference.

    Layers of rnnkern.nn and of torch.nn become `rnnkern.nn.QuantizedRNN`, `QuantizedLSTM`, `QuantizedGRU`; see there
    for what is computed. Subclasses of them, cells and all other modules stay as they are. Hooks of the layers that are
    replaced are not carried over. Named after `torch.ao.quantization.quantize_dynamic`, which rounds activations to 7
    or 8 bits instead of 15 and a sign.

    Args:
        model: any module; a layer itself is possible, too.
        inplace: change the model instead of a copy. A model that is a layer itself is replaced in either case: use what
            is returned.

    Returns:
        The model with its layers replaced.

    Raises:
        TypeError: the model is not a module.
        ValueError: there is nothing to replace; a layer has `proj_size`, `reset_after=False`, a weight that is computed
            of others (as by `weight_norm`), or parameters that are not float32 or not finite. The model is unchanged.

    Example:
        >>> import torch, rnnkern
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), rnnkern.nn.GRU(16, 32)).eval()
        >>> small = rnnkern.quantize_dynamic(model)
        >>> type(small[1]).__name__, type(model[1]).__name__
        ('QuantizedGRU', 'GRU')
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a module, got {type(model).__name__}")
    replaced: dict[torch.nn.Module, torch.nn.Module] = {}
    for path, module in model.named_modules():
        quantized = _QUANTIZED.get(type(module))
        if quantized is not None:
            assert isinstance(module, torch.nn.RNNBase)
            try:
                replaced[module] = quantized.from_float(module)
            except ValueError as error:
                raise ValueError(f"{path or type(module).__name__}: {error}") from None
    if not replaced:
        raise ValueError(
            "the model holds no RNN, LSTM or GRU layer to quantize; subclasses and parametrized ones do not count"
        )
    if model in replaced:
        return replaced[model]
    if not inplace:  # a copy that takes the new layers for copies of the old ones, which it never makes
        return copy.deepcopy(model, {id(module): new for module, new in replaced.items()})
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child in replaced:
                setattr(module, name, replaced[child])
    return model
