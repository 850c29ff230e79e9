"""Drop-in RNNCell, LSTMCell and GRUCell: one step of the fused layer, with torch's constructor, checks and outputs."""

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.fx import Proxy

from rnnkern._checks import autocast_dtype
from rnnkern.cells import find_cell
from rnnkern.cells.gru_reset_before import GRU_RESET_BEFORE
from rnnkern.cells.reference import compute_dtype
from rnnkern.nn._autocast import cast_weights, result_dtype
from rnnkern.nn._graphs import Leaf
from rnnkern.nn._packing import Packing
from rnnkern.nn._public import public
from rnnkern.nn._written import write_step
from rnnkern.ops.packs import NAMES, Weights
from rnnkern.ops.step import step

_RNN_CELLS = {"tanh": "rnn_tanh", "relu": "rnn_relu"}


def _rank(name: str, tensor: Tensor) -> int:
    """The number of dimensions; raises AttributeError, as torch does, unless it is a tensor."""
    try:
        return tensor.dim()
    except AttributeError:
        raise AttributeError(f"{name} must be a tensor, got {type(tensor).__name__}") from None


class _Cell(Packing, torch.nn.RNNCellBase, Leaf):
    """What the three cells share."""

    _cell: str  # as find_cell takes it

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool, num_chunks: int, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks, device=device, dtype=dtype)
        self._packs = self._pack_cache()

    def _weights(self) -> Weights:
        """The weights as they are now: parameters, or what a parametrization put in their place."""
        p = self._parameters
        try:
            return p["weight_ih"], p["weight_hh"], p["bias_ih"], p["bias_hh"], None, None, None, None
        except KeyError:
            return self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh, None, None, None, None

    def _refuse_rank(self, input: Tensor) -> None:
        """Raises ValueError for an input of another rank than 1 or 2."""
        raise ValueError(f"{type(self).__name__}: Expected input to be 1D or 2D, got {input.dim()}D instead")

    def _short(self, input: Any, hx: Any, inplace: bool = False) -> Any:
        """The result of a short call without gradients; None if it is another, for which the ordinary route is."""
        if is_dynamo_compiling():
            return None
        packs = self._packs
        short = packs.short
        if short is None or self.training or packs.cell != self._cell:
            return None
        return short.cell(self._parameters, input, hx, inplace)

    def step(self, input: Tensor, hx: Any = None, *, inplace: bool = False) -> Any:
        """Runs one step as the call does, and returns the new state; on request into the tensors of the old one.

        In eval mode, without gradients, on the CPU, the weights are packed once and a step costs little more than its
        arithmetic; with `inplace=True` it allocates nothing. The result is that of the call, to the last bit.

        Args:
            input: as in the call.  # [B, I] or [I]
            hx: the state as in the call: h, or the pair (h, c).  # [B, H] or [H] each
            inplace: write the new state into the tensors of `hx`, and return hx. They must have the dtype of the new
                state: autocast's under `torch.autocast`, but for GRUCell and LSTMCell on the CPU, which keep the given
                one's.

        Returns:
            the new state, in the form of hx  # [B, H] or [H] each; the formula is that of the class

        Raises:
            TypeError: input is no tensor.
            ValueError: the rank of input or of a state is wrong; inplace=True without a state.
            RuntimeError: a size, dtype or device does not fit; a tensor to be written is not contiguous, shares memory
                with another operand or requires grad, or gradients are wanted.

        Example:
            >>> import torch, rnnkern
            >>> cell = rnnkern.nn.LSTMCell(8, 16).eval()
            >>> state = torch.zeros(1, 16), torch.zeros(1, 16)
            >>> with torch.inference_mode():
            ...     for frame in torch.randn(100, 1, 8):
            ...         h, c = cell.step(frame, state, inplace=True)
        """
        result = self._short(input, hx, inplace)
        if result is not None:
            return result
        if isinstance(input, Proxy):
            return self._traced(input, hx, method="step", inplace=inplace)
        if not isinstance(input, Tensor):
            raise TypeError(f"input must be a tensor, got {type(input).__name__}")
        result = self.forward(input, hx)
        write_step(self.named_parameters, input, hx, result, inplace)
        return hx if inplace else result

    def _step(self, x: Tensor, h: Tensor | None, c: Tensor | None) -> tuple[Tensor, Any]:
        """One step of `[B, I]` from states `[B, H]` (h None: zeros): the next h, and c if the cell has one."""
        cell = self._cell
        weights = self._weights()
        weight = weights[0]
        if weight is None or weights[1] is None:
            raise TypeError(f"{NAMES[weight is not None]} must be a tensor, got NoneType")
        dtype = autocast_dtype(weight)
        if x.layout != torch.strided:
            x = x.to_dense()
        B, I = x.shape
        if self.input_size != I:
            raise RuntimeError(f"input has inconsistent input_size: got {I} expected {self.input_size}")
        if h is None:
            h = x.new_zeros(B, self.hidden_size)
            c = h if len(find_cell(cell).states) == 2 else None
        else:
            device, shape = x.device, (B, self.hidden_size)
            if h.shape != shape or h.dtype != dtype or h.device != device:
                self._check_hidden(x, h, 0)
            if c is not None and (c.shape != shape or c.dtype != dtype or c.device != device):
                self._check_hidden(x, c, 1)
        result = dtype
        if x.dtype != dtype or h.dtype != dtype or (c is not None and c.dtype != dtype):
            self._check_dtypes(x, h, c, dtype)
            result = result_dtype(cell.upper(), h if c is None else c, dtype, fused=False)
            x, h = x.to(dtype), h.to(dtype)
        casts = weight.dtype != dtype
        packs = self._packs_of_call(casts)
        if casts:
            weights = cast_weights(weights, dtype)
        compute = compute_dtype(dtype)
        h, c = step(cell, x, h, None if c is None else c.to(compute), weights, packs)
        if packs is not None and not torch.compiler.is_compiling():
            packs.prepare(cell, self._parameters, [NAMES[: 4 if self.bias else 2]])
        return h if result == dtype else h.to(result), None if c is None else c.to(result)

    def _check_hidden(self, x: Tensor, hidden: Tensor, index: int) -> None:
        """Raises RuntimeError, in torch's words where it has some, unless the state fits x."""
        if hidden.shape[0] != x.shape[0]:
            raise RuntimeError(
                f"Input batch size {x.shape[0]} doesn't match hidden{index} batch size {hidden.shape[0]}"
            )
        if hidden.size(1) != self.hidden_size or hidden.dim() != 2:  # a missing dimension is an IndexError, as in torch
            raise RuntimeError(
                f"hidden{index} has inconsistent hidden_size: got {hidden.size(1)}, expected {self.hidden_size}"
            )
        if hidden.device != x.device:
            raise RuntimeError(
                "Input and hidden tensors are not at the same device, "
                f"found input tensor at {x.device} and hidden tensor at {hidden.device}"
            )

    def _check_dtypes(self, x: Tensor, h: Tensor, c: Tensor | None, dtype: torch.dtype) -> None:
        """Raises RuntimeError unless all have this dtype, or autocast casts them to it."""
        for index, hidden in enumerate((h, c)):
            if hidden is not None and hidden.dtype != x.dtype and autocast_dtype(hidden) != dtype:
                raise RuntimeError(
                    f"hidden{index} must have the dtype of input. Expected {x.dtype}, got {hidden.dtype}"
                )
        if autocast_dtype(x) != dtype:
            raise RuntimeError(f"input must have the dtype of the weights. Expected {dtype}, got {x.dtype}")


class _OneStateCell(_Cell):
    """A cell whose only state is h."""

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Runs one step; see the class."""
        result: Tensor | None = self._short(input, hx)
        if result is not None:
            return result
        if isinstance(input, Proxy):
            return self._traced(input, hx)
        rank = _rank("input", input)
        if rank != 1 and rank != 2:
            self._refuse_rank(input)
        if hx is not None and _rank("hx", hx) not in (1, 2):
            raise ValueError(f"{type(self).__name__}: Expected hidden to be 1D or 2D, got {hx.dim()}D instead")
        if rank == 2:
            return self._step(input, hx, None)[0]
        return self._step(input.unsqueeze(0), None if hx is None else hx.unsqueeze(0), None)[0].squeeze(0)


@public
class RNNCell(_OneStateCell):
    """One step of an Elman network, `h' = tanh(W_ih x + b_ih + W_hh h + b_hh)`, in the place of torch.nn.RNNCell.

    The constructor, parameters, initial values, inputs and output are those of `torch.nn.RNNCell`: input `[B, I]` or
    `[I]`, hx `[B, H]` or `[H]`, zeros if None; returns h'.

    Raises:
        ValueError: the rank of input or hx is wrong, as in torch.
        RuntimeError: a size, dtype or device does not fit, or the nonlinearity is unknown.

    Source: Elman 1990, https://doi.org/10.1207/s15516709cog1402_1.

    Example:
        >>> import torch, rnnkern
        >>> rnnkern.nn.RNNCell(10, 20, nonlinearity="relu")(torch.randn(3, 10)).shape
        torch.Size([3, 20])
    """

    __constants__ = ["input_size", "hidden_size", "bias", "nonlinearity"]  # noqa: RUF012, torch's protocol
    nonlinearity: str

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=1, device=device, dtype=dtype)
        self.nonlinearity = nonlinearity

    @property
    def _cell(self) -> str:  # type: ignore[override]
        """As the nonlinearity says now: torch reads it at every call."""
        try:
            return _RNN_CELLS[self.nonlinearity]
        except KeyError:
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}") from None


@public
class LSTMCell(_Cell):
    """One step of the long short-term memory, in the place of torch.nn.LSTMCell; `rnnkern.nn.LSTM` has the formula.

    The constructor, parameters, initial values, inputs and outputs are those of `torch.nn.LSTMCell`: input `[B, I]` or
    `[I]`, hx a pair of `[B, H]` or `[H]`, zeros if None; returns (h', c').

    Raises:
        ValueError: the rank of input or of a state is wrong, as in torch.
        RuntimeError: a size, dtype or device does not fit, or hx is not a pair.

    Source: Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al. 2000.

    Example:
        >>> import torch, rnnkern
        >>> h, c = rnnkern.nn.LSTMCell(10, 20)(torch.randn(3, 10))
        >>> h.shape, c.shape
        (torch.Size([3, 20]), torch.Size([3, 20]))
    """

    _cell = "lstm"

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=4, device=device, dtype=dtype)

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Runs one step; see the class."""
        result: tuple[Tensor, Tensor] | None = self._short(input, hx)
        if result is not None:
            return result
        if isinstance(input, Proxy):
            return self._traced(input, hx)
        rank = _rank("input", input)
        if rank != 1 and rank != 2:
            self._refuse_rank(input)
        h = c = None
        if hx is not None:
            for i, state in enumerate(hx):
                if _rank(f"hx[{i}]", state) not in (1, 2):
                    raise ValueError(f"LSTMCell: Expected hx[{i}] to be 1D or 2D, got {state.dim()}D instead")
            if rank == 1:  # torch takes the first two of anything
                h, c = hx[0].unsqueeze(0), hx[1].unsqueeze(0)
            elif not isinstance(hx, tuple | list):
                raise TypeError(f"hx must be a tuple of Tensors, not {type(hx).__name__}")
            elif len(hx) != 2:
                raise RuntimeError("lstm_cell expects two hidden states")
            else:
                h, c = hx
        if rank == 2:
            return self._step(input, h, c)
        h, c = self._step(input.unsqueeze(0), h, c)
        return h.squeeze(0), c.squeeze(0)


@public
class GRUCell(_OneStateCell):
    """One step of the gated recurrent unit, in the place of torch.nn.GRUCell; `rnnkern.nn.GRU` has the formula.

    The constructor, parameters, initial values, inputs and output are those of `torch.nn.GRUCell`: input `[B, I]` or
    `[I]`, hx `[B, H]` or `[H]`, zeros if None; returns h'. With `reset_after=False` r acts on h before the product, as
    in `rnnkern.nn.GRU`; that runs on the eager reference.

    Raises:
        ValueError: the rank of input or hx is wrong, as in torch.
        RuntimeError: a size, dtype or device does not fit.

    Source: Cho et al. 2014, https://arxiv.org/abs/1406.1078, in cuDNN's form.

    Example:
        >>> import torch, rnnkern
        >>> rnnkern.nn.GRUCell(10, 20)(torch.randn(3, 10), torch.zeros(3, 20)).shape
        torch.Size([3, 20])
    """

    _cell = "gru"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        reset_after: bool = True,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=3, device=device, dtype=dtype)
        if not reset_after:
            self._cell = GRU_RESET_BEFORE.name

    @property
    def reset_after(self) -> bool:
        """Whether the reset gate acts after the recurrent product, as in torch."""
        return self._cell == "gru"

    def extra_repr(self) -> str:
        """Torch's, and what torch has not."""
        return super().extra_repr() + ("" if self.reset_after else ", reset_after=False")
