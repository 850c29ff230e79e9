"""Drop-in RNN, LSTM and GRU: torch's constructor, parameters, checks and outputs over the fused layer."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from rnnkern.cells import CELLS
from rnnkern.cells.reference import compute_dtype
from rnnkern.ops.recurrence import PackCache, Weights, check_lengths, recurrence

_TORCH_MODES = ("RNN_TANH", "RNN_RELU", "LSTM", "GRU")  # a cell's mode is its name in capitals
_KEYWORDS = """
    Besides torch's arguments, `forward` takes these keywords:

    - `lengths`: integer tensor `[B]`, the steps of each row, in any order, zeros allowed. Past a row's end the output
      is zero and h_n is the state at its end; the reverse direction starts at each row's own last step. A row of length
      zero returns its initial state. Not together with a PackedSequence, which has its own.
    - `resets`: bool tensor of the layout of the input without features (`[T, B]`; `[B, T]` if batch_first; `[T]`
      unbatched). Where it is True an episode starts: the forward state is zero again before that step, the reverse
      state before the step ahead of it, and no gradient crosses. The result equals running the episodes one by one; hx
      enters the first that each direction meets, unless `resets` is True at t = 0, which replaces it in the forward
      direction. Not together with a PackedSequence.

    Gradients exist in eval mode too, twice, and of any order. Nothing depends on the number of threads.
    bfloat16 and float16 compute in float32 and round h after each step.

    Raises:
        ValueError: the rank or dtype of the input is wrong, as in torch.
        RuntimeError: a size, device, length or reset does not fit, as in torch; there are no steps.
"""


class _Recurrent(torch.nn.RNNBase):
    """What RNN, LSTM and GRU share: everything but the constructor's arguments and the form of hx."""

    _packs: PackCache

    def __init__(self, mode: str, *args: Any, **kwargs: Any) -> None:
        own = mode not in _TORCH_MODES
        super().__init__("RNN_TANH" if own else mode, *args, **kwargs)
        self._packs = PackCache()
        if own:  # a cell that torch does not know: one gate's parameters become G gates'
            self.mode = mode
            gates = len(CELLS[mode.lower()].gates)
            for name, parameter in list(self._parameters.items()):
                assert parameter is not None
                H, *rest = parameter.shape
                setattr(self, name, torch.nn.Parameter(parameter.new_empty(gates * H, *rest)))
            self.reset_parameters()

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        state.pop("_packs", None)  # neither pickled nor deep-copied
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._packs = PackCache()

    def _replicate_for_data_parallel(self) -> "_Recurrent":
        replica: _Recurrent = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        replica._packs = PackCache()
        return replica

    def _layer_weights(self, layer: int) -> tuple[Weights, tuple[Tensor | None, ...]]:
        """The weights of a layer as they are now: parameters, or what a parametrization put in their place."""
        D = 2 if self.bidirectional else 1
        parameters = self._parameters
        weights: list[Tensor | None] = []
        projection: list[Tensor | None] = []
        for names in self._all_weights[layer * D : layer * D + D]:
            try:
                found = [parameters[name] for name in names]
            except KeyError:
                found = [getattr(self, name) for name in names]
            weights += found[:4] if self.bias else [*found[:2], None, None]
            projection.append(found[-1] if self.proj_size else None)
        if D == 1:
            weights += (None, None, None, None)
            projection.append(None)
        return tuple(weights), tuple(projection)

    def _first_state(self, x: Tensor, B: int) -> tuple[Tensor, Tensor | None]:
        """Zeros for h [L*D, B, H or P] and c [L*D, B, H]."""
        layers = self.num_layers * (2 if self.bidirectional else 1)
        h = x.new_zeros(layers, B, self.proj_size or self.hidden_size)
        return h, None if self.mode != "LSTM" else x.new_zeros(layers, B, self.hidden_size)

    def _hidden_dims(self, h: Tensor, c: Tensor | None, batched: bool) -> None:
        """Raises RuntimeError if the state has another rank than the input."""
        rank = 3 if batched else 2
        if h.dim() == rank and (c is None or c.dim() == rank):
            return
        kind = f"For {'batched' if batched else 'unbatched'} {rank}-D input,"
        if c is None:
            raise RuntimeError(f"{kind} hx should also be {rank}-D but got {h.dim()}-D tensor")
        raise RuntimeError(f"{kind} hx and cx should also be {rank}-D but got ({h.dim()}-D, {c.dim()}-D) tensors")

    def _check(
        self, input: Tensor, T: int, B: int, h: Tensor, c: Tensor | None, batch_sizes: Tensor | None = None
    ) -> Tensor:
        """Checks what torch checks, in its order and words; returns the first weight. `input` has torch's layout."""
        layers = self.num_layers * (2 if self.bidirectional else 1)
        weight = self._layer_weights(0)[0][0]
        assert weight is not None
        if (
            input.dtype != weight.dtype
            or input.shape[-1] != self.input_size
            or h.shape != (layers, B, self.proj_size or self.hidden_size)
            or (c is not None and c.shape != (layers, B, self.hidden_size))
        ):
            self._update_flat_weights()
            self.check_forward_args(input, h if c is None else (h, c), batch_sizes)  # type: ignore[arg-type]
        for state in (h,) if c is None else (h, c):
            if state.device != input.device:
                raise RuntimeError(
                    "Input and hidden tensors are not at the same device, "
                    f"found input tensor at {input.device} and hidden tensor at {state.device}"
                )
            if state.dtype != input.dtype and not torch._C._is_any_autocast_enabled():
                raise RuntimeError(f"hx must have the dtype of input. Expected {input.dtype}, got {state.dtype}")
        if T == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        return weight

    def _run(
        self, input: Any, hx: Any, lengths: Tensor | None, resets: Tensor | None, return_states: bool = False
    ) -> tuple[Any, Tensor, Tensor | None, Any]:
        """Output, h_n, c_n and every c of the last layer, in the form that the input has."""
        if isinstance(input, PackedSequence):
            return self._run_packed(input, hx, lengths, resets, return_states)
        rank = input.dim()
        if rank != 3 and rank != 2:
            tensor = " tensor" if self.mode.startswith("RNN") else ""  # torch's wording differs
            raise ValueError(f"{type(self).__name__}: Expected input to be 2D or 3D, got {rank}D{tensor} instead")
        batched = rank == 3
        h, c = (None, None) if hx is None else (hx, None) if self.mode != "LSTM" else (hx[0], hx[1])
        if h is not None:
            self._hidden_dims(h, c, batched)
        if not batched:
            x = input.unsqueeze(1)
            input = input.unsqueeze(0) if self.batch_first else x
            if h is not None:
                h = h.unsqueeze(1)
                c = None if c is None else c.unsqueeze(1)
        else:
            x = input.transpose(0, 1) if self.batch_first else input
        T, B, _ = x.shape
        if h is None:
            h, c = self._first_state(x, B)
        weight = self._check(input, T, B, h, c)
        if lengths is not None:
            lengths = check_lengths(lengths, T, B)
        if resets is not None:
            resets = self._time_major_resets(resets, T, B, batched, weight.device)
        if x.dtype != weight.dtype:  # only autocast lets this pass
            x, h = x.to(weight.dtype), h.to(weight.dtype)
        y, h_n, c_n, c_all = self._layers(x, h, c, lengths, resets, return_states)
        if not batched:
            c_n = None if c_n is None else c_n.squeeze(1)
            return y.squeeze(1), h_n.squeeze(1), c_n, None if c_all is None else c_all.squeeze(1)
        if self.batch_first:
            return y.transpose(0, 1), h_n, c_n, None if c_all is None else c_all.transpose(0, 1)
        return y, h_n, c_n, c_all

    def _time_major_resets(self, resets: Tensor, T: int, B: int, batched: bool, device: torch.device) -> Tensor:
        """Returns resets as [T, B]; raises RuntimeError unless they are bool, in the input's layout, on its device."""
        if not isinstance(resets, Tensor):
            raise TypeError(f"resets must be a tensor, got {type(resets).__name__}")
        expected = [T] if not batched else [B, T] if self.batch_first else [T, B]
        if list(resets.shape) != expected:
            raise RuntimeError(
                f"resets must have one entry per row and step. Expected shape {expected}, got {list(resets.shape)}"
            )
        if resets.dtype != torch.bool:
            raise RuntimeError(f"resets must be bool. Expected torch.bool, got {resets.dtype}")
        if resets.device != device:
            raise RuntimeError(f"resets must be on the device of input. Expected {device}, got {resets.device}")
        if not batched:
            return resets.unsqueeze(1)
        return resets.t().contiguous() if self.batch_first else resets.contiguous()

    def _layers(
        self,
        x: Tensor,  # [T, B, I]
        h: Tensor,  # [L*D, B, H or P]
        c: Tensor | None,  # [L*D, B, H]
        lengths: Tensor | None,  # [B]
        resets: Tensor | None,  # [T, B]
        return_states: bool,
        batch_sizes: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """The stack of layers: y [T, B, D*H], h_n, c_n and every c of the last layer, the latter two in x's dtype."""
        D, L = 2 if self.bidirectional else 1, self.num_layers
        cell = self.mode.lower()
        dtype = x.dtype
        if c is not None:
            c = c.to(compute_dtype(dtype))
        h_n, c_n = [], []
        for layer in range(L):
            weights, projection = self._layer_weights(layer)
            rows = slice(layer * D, layer * D + D)
            y, h_layer, c_layer, c_all = recurrence(
                cell,
                x,
                h if L == 1 else h[rows],
                c if c is None or L == 1 else c[rows],
                weights,
                lengths=lengths,
                resets=resets,
                return_states=return_states and layer == L - 1,
                projection=projection,
                packs=self._packs,
                layer=layer,
            )
            h_n.append(h_layer)
            c_n.append(c_layer)
            x = y
            if self.dropout and self.training and layer < L - 1:
                x = self._between_layers(x, lengths, batch_sizes)
        h_last = h_n[0] if L == 1 else torch.cat(h_n)
        if c is None:
            return y, h_last, None, None
        c_last = c_n[0] if L == 1 else torch.cat(c_n)
        return y, h_last, c_last.to(dtype), c_all.to(dtype) if return_states else None

    def _between_layers(self, y: Tensor, lengths: Tensor | None, batch_sizes: Tensor | None) -> Tensor:
        """Dropout between layers; of a packed sequence it draws for the packed entries, as torch does."""
        if batch_sizes is None or lengths is None:
            return torch.dropout(y, self.dropout, True)
        data = torch.dropout(_pack(y, lengths), self.dropout, True)
        padded: Tensor = torch._VF._pad_packed_sequence(data, batch_sizes, False, 0.0, y.shape[0])[0]
        return padded

    def _run_packed(
        self, packed: PackedSequence, hx: Any, lengths: Tensor | None, resets: Tensor | None, return_states: bool
    ) -> tuple[PackedSequence, Tensor, Tensor | None, PackedSequence | None]:
        """Runs a packed sequence padded, rows in its sorted order, and packs the result again."""
        data, batch_sizes, order, back = packed
        for name, value in (("lengths", lengths), ("resets", resets)):
            if value is not None:
                raise ValueError(f"{name} must be None if input is a PackedSequence, got shape {list(value.shape)}")
        B = int(batch_sizes[0])
        if hx is None:
            h, c = self._first_state(data, B)
        else:
            h, c = (hx, None) if self.mode != "LSTM" else (hx[0], hx[1])
            if order is not None:
                h = h.index_select(1, order)
                c = None if c is None else c.index_select(1, order)
        weight = self._check(data, len(batch_sizes), B, h, c, batch_sizes)
        if data.dtype != weight.dtype:  # only autocast lets this pass
            data, h = data.to(weight.dtype), h.to(weight.dtype)
        x, row_lengths = torch._VF._pad_packed_sequence(data, batch_sizes, False, 0.0, len(batch_sizes))
        y, h_n, c_n, c_all = self._layers(x, h, c, row_lengths, None, return_states, batch_sizes)
        if back is not None:
            h_n = h_n.index_select(1, back)
            c_n = None if c_n is None else c_n.index_select(1, back)
        output = PackedSequence(_pack(y, row_lengths), batch_sizes, order, back)
        states = None if c_all is None else PackedSequence(_pack(c_all, row_lengths), batch_sizes, order, back)
        return output, h_n, c_n, states


def _pack(padded: Tensor, lengths: Tensor) -> Tensor:
    """The entries of [T, B, *] within the rows' lengths (sorted, longest first), in a PackedSequence's order."""
    data: Tensor = torch._VF._pack_padded_sequence(padded, lengths, False)[0]
    return data


class RNN(_Recurrent):  # noqa: D101, it has one
    __doc__ = f"""Elman network of one or more layers, in the place of torch.nn.RNN.

    h' = tanh(W_ih x + b_ih + W_hh h + b_hh), or relu in the place of tanh (`nonlinearity="relu"`). The constructor,
    parameters, initial values, inputs and outputs are those of `torch.nn.RNN`. Returns the output and h_n.
{_KEYWORDS}
    Source: Elman 1990, https://doi.org/10.1207/s15516709cog1402_1.

    Example:
        >>> import torch, rnnkern
        >>> rnn = rnnkern.nn.RNN(10, 20, num_layers=2)
        >>> output, h_n = rnn(torch.randn(5, 3, 10), lengths=torch.tensor([5, 0, 2]))
        >>> output.shape, h_n.shape
        (torch.Size([5, 3, 20]), torch.Size([2, 3, 20]))
    """

    nonlinearity: str

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if "proj_size" in kwargs:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        if len(args) > 3:
            self.nonlinearity = args[3]
            args = args[:3] + args[4:]
        else:
            self.nonlinearity = kwargs.pop("nonlinearity", "tanh")
        if self.nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"Unknown nonlinearity '{self.nonlinearity}'. Select from 'tanh' or 'relu'.")
        super().__init__(f"RNN_{self.nonlinearity.upper()}", *args, **kwargs)

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
    ) -> tuple[Any, Tensor]:
        """Runs the layers; see the class."""
        output, h_n, _, _ = self._run(input, hx, lengths, resets)
        return output, h_n


class LSTM(_Recurrent):  # noqa: D101, it has one
    __doc__ = f"""Long short-term memory of one or more layers, in the place of torch.nn.LSTM.

    i, f, o = sigmoid(W x + b + U h + b'), g = tanh(W_g x + b_g + U_g h + b_g'), c' = f c + i g, h' = o tanh(c')
    (with `proj_size`: h' = W_hr o tanh(c')). The constructor, parameters, initial values, inputs and outputs are those
    of `torch.nn.LSTM`. Returns the output and (h_n, c_n).

    With `return_cell_states=True` a third result holds the cell state after every step of the last layer, in the form
    of the output: `[T, B, D*H]`, `[B, T, D*H]` if batch_first, `[T, D*H]` unbatched, or a PackedSequence; zero past a
    row's end.
{_KEYWORDS}
    Source: Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al. 2000; the projection is that of
    Sak et al. 2014, https://arxiv.org/abs/1402.1128.

    Example:
        >>> import torch, rnnkern
        >>> lstm = rnnkern.nn.LSTM(10, 20, bidirectional=True)
        >>> output, (h_n, c_n), cells = lstm(torch.randn(5, 3, 10), return_cell_states=True)
        >>> output.shape, c_n.shape, cells.shape
        (torch.Size([5, 3, 40]), torch.Size([2, 3, 20]), torch.Size([5, 3, 40]))
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__("LSTM", *args, **kwargs)

    # The base class checks a single state; these are torch.nn.LSTM's own.
    check_forward_args = torch.nn.LSTM.check_forward_args  # type: ignore[assignment]
    get_expected_cell_size = torch.nn.LSTM.get_expected_cell_size
    permute_hidden = torch.nn.LSTM.permute_hidden  # type: ignore[assignment]

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
        return_cell_states: bool = False,
    ) -> Any:
        """Runs the layers; see the class."""
        output, h_n, c_n, cells = self._run(input, hx, lengths, resets, return_cell_states)
        if return_cell_states:
            return output, (h_n, c_n), cells
        return output, (h_n, c_n)


class GRU(_Recurrent):  # noqa: D101, it has one
    __doc__ = f"""Gated recurrent unit of one or more layers, in the place of torch.nn.GRU.

    r, z = sigmoid(W x + b + U h + b'), n = tanh(W_n x + b_n + r (U_n h + b_n')), h' = (1 - z) n + z h. The constructor,
    parameters, initial values, inputs and outputs are those of `torch.nn.GRU`. Returns the output and h_n.
{_KEYWORDS}
    Source: Cho et al. 2014, https://arxiv.org/abs/1406.1078, in cuDNN's form.

    Example:
        >>> import torch, rnnkern
        >>> gru = rnnkern.nn.GRU(10, 20, batch_first=True)
        >>> output, h_n = gru(torch.randn(3, 5, 10), resets=torch.rand(3, 5) < 0.1)
        >>> output.shape, h_n.shape
        (torch.Size([3, 5, 20]), torch.Size([1, 3, 20]))
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if "proj_size" in kwargs:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        super().__init__("GRU", *args, **kwargs)

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
    ) -> tuple[Any, Tensor]:
        """Runs the layers; see the class."""
        output, h_n, _, _ = self._run(input, hx, lengths, resets)
        return output, h_n
