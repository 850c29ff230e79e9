"""What RNN, LSTM and GRU share: the parameters of the stack, torch's checks, the layers, and PackedSequence."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.nn.utils.rnn import PackedSequence

from rnnkern._checks import autocast_dtype
from rnnkern.cells import find_cell
from rnnkern.cells.reference import compute_dtype
from rnnkern.nn._autocast import cast_weights, result_dtype
from rnnkern.nn._checks import check_call, check_present, kind_of, states_of, time_major_resets
from rnnkern.nn._graphs import Leaf
from rnnkern.nn._options import OPTIONS, Options
from rnnkern.nn._packed import run_packed
from rnnkern.nn._packing import Packing
from rnnkern.nn._stack import run_stack, runs_as_one
from rnnkern.nn._written import write_step
from rnnkern.ops.formulas import Outputs
from rnnkern.ops.packs import Weights
from rnnkern.ops.recurrence import check_lengths, recurrence
from rnnkern.ops.short import SHORT

_TORCH_MODES = ("RNN_TANH", "RNN_RELU", "LSTM", "GRU")  # a cell's mode is its name in capitals
_NO_PROJECTION = (None, None)
# What calls past the dispatcher take as it was when they were prepared, rather than spend time on looking.
_PREPARED_FOR = frozenset(
    ("mode", "num_layers", "input_size", "hidden_size", "proj_size", "bias", "bidirectional", "learn_initial_state")
)


class _Recurrent(Packing, Options, Leaf):
    """What RNN, LSTM and GRU share: everything but the constructor's arguments and the form of hx."""

    _recurrence: Callable[..., Outputs] = staticmethod(recurrence)

    def __init__(self, mode: str, *args: Any, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        own = mode not in _TORCH_MODES
        super().__init__("RNN_TANH" if own else mode, *args, **kwargs)
        self._packs = self._pack_cache()
        self._two_states = len(find_cell(mode.lower()).states) == 2
        if own:  # a cell that torch does not know: one gate's parameters become G gates'
            self.mode = mode
            gates = len(find_cell(mode.lower()).gates)
            for name, parameter in list(self._parameters.items()):
                assert parameter is not None
                H, *rest = parameter.shape
                setattr(self, name, torch.nn.Parameter(parameter.new_empty(gates * H, *rest)))
            self.reset_parameters()
        self._set_options(**options)

    def __setattr__(self, name: str, value: Any) -> None:
        """As in torch; what a short call was prepared for is forgotten where it is no longer what the module says."""
        super().__setattr__(name, value)
        if name in _PREPARED_FOR and "_packs" in vars(self):
            self._packs.forget()

    def flatten_parameters(self) -> None:
        """Does what torch's does, which knows torch's cells only."""
        if self.mode in _TORCH_MODES:
            super().flatten_parameters()

    def _load_from_state_dict(self, *args: Any) -> None:
        self._flat_weight_refs = []  # torch.utils.swap_tensors refuses what has weak references
        try:
            super()._load_from_state_dict(*args)
        finally:
            self._init_flat_weights()

    def _weight_tensors(self) -> dict[str, Any]:
        """Where this module keeps its weights, by name."""
        return self._parameters

    def _named_weights(self) -> Iterable[tuple[str, Tensor]]:
        """What the layers read, of parametrizations too."""
        return self.named_parameters()

    def _prepare_short(self) -> None:
        self._packs.prepare(self.mode.lower(), self._weight_tensors(), self._all_weights)

    def _short(self, input: Any, hx: Any) -> Any:
        """The result of a short call without gradients; None if it is another, for which the ordinary route is."""
        if torch.compiler.is_dynamo_compiling():
            return None
        short = self._packs.short
        if short is None or self.training:
            return None
        result = short.sequence(self._weight_tensors(), input, hx, self.batch_first)
        if result is None or not self.batch_first or input.dim() == 2:
            return result
        return result[0].transpose(0, 1), result[1]

    def step(
        self, input: Tensor, hx: Any = None, *, out: Tensor | None = None, inplace: bool = False
    ) -> tuple[Tensor, Any]:
        r"""Runs one time step: the streaming form of the call, without a time dimension.

        .. math:: (y_t, s_t) = f(x_t, s_{t-1})

        where s is the state of all layers and y_t the h of the last one. Equal, to the last bit, to calling the module
        on the sequence of this one step; and the steps of a sequence, one by one, equal the call on the whole (of an
        LSTM in bfloat16 or float16 all but the rounding of c, which is kept in float32 within a call). On the eager
        reference (`reset_after=False`, `proj_size`) a step may differ from the whole by a unit in the last place.

        In eval mode, without gradients, on the CPU, the weights are packed once and a step costs little more than its
        arithmetic. With `inplace=True` and `out` it allocates nothing.

        Args:
            input: x_t.  # [B, I] or [I]
            hx: the state, as the call takes it: h, or the pair (h, c).  # [L, B, H] or [L, H] each; None: zeros
            out: where to write y_t; a new tensor by default.  # [B, H] or [H]
            inplace: write the new state into the tensors of `hx`, and return them. They must have the dtype of the new
                state: autocast's under `torch.autocast`, but for the GRU on the CPU, which keeps the given one's.

        Returns:
            y_t  # [B, H] or [H]
            the new state, in the form of hx

        Raises:
            TypeError: input is no tensor.
            ValueError: the layers are bidirectional, and need the whole sequence; the rank of input is neither 1 nor 2;
                inplace=True without a state.
            RuntimeError: a size, dtype or device does not fit, in the words of the call; a tensor to be written is
                not contiguous, shares memory with another operand or requires grad, or gradients are wanted.

        Example:
            >>> import torch, rnnkern
            >>> gru = rnnkern.nn.GRU(8, 16, num_layers=2).eval()
            >>> h, y = torch.zeros(2, 1, 16), torch.empty(1, 16)
            >>> with torch.inference_mode():
            ...     for frame in torch.randn(100, 1, 8):
            ...         y, h = gru.step(frame, h, out=y, inplace=True)
        """
        if not torch.compiler.is_dynamo_compiling():
            short = self._packs.short
            if short is not None and not self.training:
                result: tuple[Tensor, Any] | None = short.step(self._weight_tensors(), input, hx, out, inplace)
                if result is not None:
                    return result
        if self.bidirectional:
            raise ValueError(f"{type(self).__name__}.step: the reverse direction needs the whole sequence")
        if isinstance(input, Proxy):
            return self._traced(input, hx, method="step", out=out, inplace=inplace)
        if not isinstance(input, Tensor):
            raise TypeError(f"input must be a tensor, got {type(input).__name__}")
        rank = input.dim()
        if rank != 1 and rank != 2:
            raise ValueError(f"{type(self).__name__}.step: Expected input to be 1D or 2D, got {rank}D instead")
        if hx is not None:
            states_of(hx, rank + 1, self._two_states, step=True)
        time = 1 if self.batch_first and rank == 2 else 0
        y, state = self.forward(input.unsqueeze(time), hx)
        y = y.squeeze(time)
        write_step(self._named_weights, input, hx, state, inplace, y, out)
        return y if out is None else out, hx if inplace else state

    def _layer_weights(self, layer: int) -> tuple[Weights, tuple[Tensor | None, ...]]:
        """The weights of a layer as they are now: parameters, or what a parametrization put in their place."""
        parameters = self._parameters
        if self.bias and not self.bidirectional and not self.proj_size:  # the common case, worth a microsecond per call
            names = self._all_weights[layer]
            try:
                w_ih, w_hh, b_ih, b_hh = [parameters[name] for name in names]
            except KeyError:
                w_ih, w_hh, b_ih, b_hh = [getattr(self, name) for name in names]
            if w_ih is None or w_hh is None or b_ih is None or b_hh is None:
                check_present(names, (w_ih, w_hh, b_ih, b_hh))
            return (w_ih, w_hh, b_ih, b_hh, None, None, None, None), _NO_PROJECTION
        D = 2 if self.bidirectional else 1
        weights: list[Tensor | None] = []
        projection: list[Tensor | None] = []
        for names in self._all_weights[layer * D : layer * D + D]:
            try:
                found = [parameters[name] for name in names]
            except KeyError:
                found = [getattr(self, name) for name in names]
            check_present(names, found)
            weights += found[:4] if self.bias else [*found[:2], None, None]
            projection.append(found[-1] if self.proj_size else None)
        if D == 1:
            weights += (None, None, None, None)
            projection.append(None)
        return tuple(weights), tuple(projection)

    def _dtype(self, weight: Tensor) -> torch.dtype:
        """The dtype in which a layer of this weight computes: autocast's where it is on."""
        return autocast_dtype(weight)

    def _fits(self, tensor: Tensor, dtype: torch.dtype) -> bool:
        """Whether a layer that computes in this dtype takes the tensor as it is, or as autocast casts it."""
        return autocast_dtype(tensor) == dtype

    def _casts(self, weights: Weights, dtype: torch.dtype) -> bool:
        """Whether these weights are to be cast: autocast is on."""
        weight = weights[0]
        assert weight is not None
        return weight.dtype != dtype

    def _first_state(self, x: Tensor, B: int) -> tuple[Tensor, Tensor | None]:
        """h [L*D, B, H or P] and c [L*D, B, H]: zeros, or what was learned."""
        if self.learn_initial_state:
            return self._learned_state(B)
        layers = self.num_layers * (2 if self.bidirectional else 1)
        h = x.new_zeros(layers, B, self.proj_size or self.hidden_size)
        return h, x.new_zeros(layers, B, self.hidden_size) if self._two_states else None

    get_expected_cell_size = torch.nn.LSTM.get_expected_cell_size

    def _call(self, input: Any, hx: Any, lengths: Tensor | None, resets: Tensor | None, return_states: bool) -> Any:
        """The results of `forward`."""
        if isinstance(input, Proxy):
            return self._traced(input, hx, lengths=lengths, resets=resets, return_sequence_states=return_states)
        output, h_n, c_n, states = self._run(input, hx, lengths, resets, return_states)
        state = h_n if c_n is None else (h_n, c_n)
        return (output, state, states) if return_states else (output, state)

    def _run(
        self, input: Any, hx: Any, lengths: Tensor | None, resets: Tensor | None, return_states: bool = False
    ) -> tuple[Any, Tensor, Tensor | None, Any]:
        """Output, h_n, c_n and, if asked for, the states after every step, in the form that the input has."""
        if isinstance(input, PackedSequence):
            for name, value in (("lengths", lengths), ("resets", resets)):
                if value is not None:
                    raise ValueError(f"{name} must be None if input is a PackedSequence, got {type(value).__name__}")
            return run_packed(self, input, hx, return_states)
        try:
            rank = input.dim()
        except AttributeError:
            raise AttributeError(f"input must be a tensor or a PackedSequence, got {kind_of(input)}") from None
        if rank != 3 and rank != 2:
            tensor = " tensor" if self.mode.startswith("RNN") else ""  # torch's wording differs
            raise ValueError(f"{type(self).__name__}: Expected input to be 2D or 3D, got {rank}D{tensor} instead")
        if input.layout != torch.strided or input.is_nested:
            kind = "a nested tensor" if input.is_nested else f"layout {input.layout}"
            raise RuntimeError(f"input must be a dense tensor (lengths= takes rows of several lengths), got {kind}")
        batched = rank == 3
        h: Any
        c: Any
        if hx is None:
            h = c = None
        else:
            h, c = states_of(hx, rank, self._two_states)
        if not batched:
            x = input.unsqueeze(1)
            input = input.unsqueeze(0) if self.batch_first else x
            if h is not None:
                h = h.unsqueeze(1)
                c = None if c is None else c.unsqueeze(1)
                hx = h, c  # whatever hx was, torch goes on with its first two items
        else:
            x = input.transpose(0, 1) if self.batch_first else input
        T, B, _ = x.shape
        if h is None:
            hx = h, c = self._first_state(x, B)
        first = self._layer_weights(0)
        weight = first[0][0]
        assert weight is not None
        dtype = self._dtype(weight)
        check_call(self, input, B, hx, h, c, dtype)
        if lengths is not None:
            lengths = check_lengths(lengths, T, B)
        if resets is not None:
            resets = time_major_resets(
                resets, T, B, batched=batched, batch_first=self.batch_first, device=weight.device
            )
        result = dtype
        if x.dtype != dtype or h.dtype != dtype or (c is not None and c.dtype != dtype):  # only autocast lets this pass
            result = result_dtype(self.mode, h if c is None else c, dtype, fused=not self.proj_size)
            x, h = x.to(dtype), h.to(dtype)
        if resets is None or T == 0 or not self.learn_initial_state:
            y, h_n, c_n, states = self._layers(x, h, c, first, lengths, resets, return_states)
        else:
            y, h_n, c_n, states = self._episodes(self._layers, x, h, c, first, lengths, resets, return_states)
        if result != dtype:
            y, h_n, c_n, states = self._widened(result, y, h_n, c_n, states)
        # In this order: a compiled program that compared T would be for short sequences alone, or for long ones.
        # A learned state is left out, since a short call without hx starts from zeros.
        if (
            not (self.bidirectional or self.proj_size or self.learn_initial_state or torch.compiler.is_compiling())
            and T < SHORT
        ):
            self._prepare_short()
        if not batched:
            c_n = None if c_n is None else c_n.squeeze(1)
            y, h_n = y.squeeze(1), h_n.squeeze(1)
            states = None if states is None else tuple(s.squeeze(2) for s in states)
        elif self.batch_first:
            y = y.transpose(0, 1)
        return y, h_n, c_n, self._in_form(states)

    def _in_form(self, states: tuple[Any, ...] | None) -> Any:
        """h alone, or the pair (h, c), as hx has it."""
        return states if states is None or self._two_states else states[0]

    def _widened(
        self, dtype: torch.dtype, y: Tensor, h_n: Tensor, c_n: Tensor | None, states: tuple[Tensor, ...] | None
    ) -> tuple[Tensor, Tensor, Tensor | None, tuple[Tensor, ...] | None]:
        """Results in a wider dtype than autocast's; what a projection gave is a product, and stays."""
        if not self.proj_size:
            y, h_n = y.to(dtype), h_n.to(dtype)
        if states is not None:
            h, *c = states
            states = h if self.proj_size else h.to(dtype), *(s.to(dtype) for s in c)
        return y, h_n, None if c_n is None else c_n.to(dtype), states

    def _layers(
        self,
        x: Tensor,  # [T, B, I], or [N, I] of a PackedSequence
        h: Tensor,  # [L*D, B, H or P]
        c: Tensor | None,  # [L*D, B, H]
        first: tuple[Weights, tuple[Tensor | None, ...]],  # the weights of the first layer
        lengths: Tensor | None,  # [B]
        resets: Tensor | None,  # [T, B]
        return_states: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None, tuple[Tensor, ...] | None]:
        """The stack of layers: y [T, B, D*H], h_n, c_n in x's dtype, and h and c after every step [T, L*D, B, H]."""
        D, L = 2 if self.bidirectional else 1, self.num_layers
        cell = self.mode.lower()
        dtype = x.dtype
        compute = compute_dtype(dtype)
        if c is not None and c.dtype != compute:
            c = c.to(compute)
        casts = self._casts(first[0], dtype)
        packs = self._packs_of_call(casts)
        run = self._recurrence_of_options(self._recurrence)
        if casts:
            first = cast_weights(first[0], dtype), cast_weights(first[1], dtype)
        if L == 1:
            y, h_n, c_n, c_all = run(
                cell,
                x,
                h,
                c,
                first[0],
                lengths=lengths,
                resets=resets,
                return_states=return_states,
                projection=first[1],
                packs=packs,
            )
            states = _every_state([y], [c_all], c is not None, D, dtype) if return_states else None
            if c is None:
                return y, h_n, None, states
            return y, h_n, c_n if compute == dtype else c_n.to(dtype), states
        if runs_as_one(self, x, h.shape[1], return_states):
            y, h, c = run_stack(self, x, h, c, first[0], lengths, resets, casts)
            return y, h, None if c is None else c.to(dtype), None
        h_layers, c_layers, outputs, cells = [], [], [], []
        for layer in range(L):
            weights, projection = self._layer_weights(layer) if layer else first
            if casts and layer:
                weights, projection = cast_weights(weights, dtype), cast_weights(projection, dtype)
            rows = slice(layer * D, layer * D + D)
            y, h_layer, c_layer, c_all = run(
                cell,
                x,
                h[rows],
                None if c is None else c[rows],
                weights,
                lengths=lengths,
                resets=resets,
                return_states=return_states,
                projection=projection,
                packs=packs,
                layer=layer,
            )
            h_layers.append(h_layer)
            c_layers.append(c_layer)
            if return_states:
                outputs.append(y)
                cells.append(c_all)
            x = y
            if self.dropout and self.training and layer < L - 1:
                x = torch.dropout(x, self.dropout, True)
        states = _every_state(outputs, cells, c is not None, D, dtype) if return_states else None
        if c is None:
            return y, torch.cat(h_layers), None, states
        return y, torch.cat(h_layers), torch.cat(c_layers).to(dtype), states


def _every_state(
    outputs: list[Tensor],  # of each layer, [T, B, D*H], or [N, D*H] of packed rows
    cells: list[Tensor],
    two_states: bool,
    D: int,
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    """h, and c of cells that have one, after every step: [T, L*D, B, H], or [N, L*D, H]."""
    kinds = (outputs, cells) if two_states else (outputs,)
    split = [[y.view(*y.shape[:-1], D, y.shape[-1] // D) for y in kind] for kind in kinds]  # [T, B, D, H] or [N, D, H]
    return tuple(torch.cat([s if s.dim() == 3 else s.transpose(1, 2) for s in kind], 1).to(dtype) for kind in split)
