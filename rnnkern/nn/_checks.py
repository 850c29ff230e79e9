"""Checks of what a call of a layer gives, its input, the state and the resets, with torch's exceptions."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def states_of(hx: Any, rank: int, two_states: bool, step: bool = False) -> tuple[Tensor, Tensor | None]:
    """h and c, None if the cell has none, of this rank; raises torch's exception where hx does not fit.

    It is the rank of the input, too, but that of a `step` has no dimension of time.
    """
    h: Any
    c: Any
    if not two_states:
        h, c = hx, None
    elif type(hx) is tuple and len(hx) == 2:
        h, c = hx
    else:
        h, c = first_two(hx)
    try:
        fits = (h.dim(), c.dim()) == (rank, rank) if two_states else h.dim() == rank
    except AttributeError:
        raise AttributeError(not_tensors(h, c, two_states)) from None
    if not fits:
        _refuse_rank(h, c, rank, step)
    return h, c


def _refuse_rank(h: Tensor, c: Tensor | None, rank: int, step: bool) -> None:
    """Raises RuntimeError for states of another rank."""
    kind = f"For {'batched' if rank == 3 else 'unbatched'} {rank - step}-D input,"
    be = f"be {rank}-D [{'L, B, H' if rank == 3 else 'L, H'}]" if step else f"also be {rank}-D"
    if c is None:
        raise RuntimeError(f"{kind} hx should {be} but got {h.dim()}-D tensor")
    raise RuntimeError(f"{kind} hx and cx should {be} but got ({h.dim()}-D, {c.dim()}-D) tensors")


def first_two(hx: Any) -> tuple[Tensor, Any]:
    """The first two items of what is not a pair; else the exception that torch comes to."""
    try:
        h = hx[0]
        if not isinstance(h, Tensor):
            raise AttributeError
        return h, hx[1]
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise type(error)(f"hx must be a pair of tensors, got {kind_of(hx)}") from None


def check_pair(hx: Any) -> tuple[Any, Any]:
    """Returns the pair; raises TypeError or RuntimeError, as torch's operator does, unless hx is one."""
    if not isinstance(hx, tuple | list):
        raise TypeError(f"hx must be a pair of tensors, got {kind_of(hx)}")
    if len(hx) != 2:
        raise RuntimeError(f"hx must be a pair of tensors: lstm expects two hidden states, got {len(hx)}")
    return hx[0], hx[1]


def not_tensors(h: Any, c: Any, two_states: bool) -> str:
    if two_states:
        return f"hx must be a pair of tensors, got {kind_of(h)} and {kind_of(c)}"
    return f"hx must be a tensor, got {kind_of(h)}"


def kind_of(value: Any) -> str:
    return f"{type(value).__name__} of {len(value)}" if isinstance(value, tuple | list) else type(value).__name__


def check_present(names: Sequence[str], weights: Sequence[Any]) -> None:
    """Raises torch's exception if one of the weights of a layer in one direction, which have these names, is None."""
    for name, weight in zip(names, weights):
        if weight is None:
            absent = AttributeError if name == "weight_ih_l0" else TypeError  # torch reads the dtype of the first
            raise absent(f"{name} must be a tensor, got NoneType")


def check_call(
    layers: Any,  # a module of rnnkern.nn
    input: Tensor,  # in torch's layout
    B: int,
    hx: Any,  # as it was given, if it has to be a pair
    h: Tensor,
    c: Tensor | None,
    dtype: torch.dtype,  # of the weights
    batch_sizes: Tensor | None = None,
) -> None:
    """Checks what torch checks, in its order and words."""
    rows = layers.num_layers * 2 if layers.bidirectional else layers.num_layers
    if (
        input.dtype != dtype
        or input.shape[-1] != layers.input_size
        or h.shape != (rows, B, layers.proj_size or layers.hidden_size)
        or (c is not None and c.shape != (rows, B, layers.hidden_size))
    ):
        layers._update_flat_weights()
        if c is None:
            layers.check_forward_args(input, h, batch_sizes)
        else:
            torch.nn.LSTM.check_forward_args(layers, input, (h, c), batch_sizes)
    if c is not None and (type(hx) is not tuple or len(hx) != 2):
        check_pair(hx)
    device = input.device
    states = (h,) if c is None else (h, c)
    for state in states:
        if state.device != device:
            raise RuntimeError(
                "Input and hidden tensors are not at the same device, "
                f"found input tensor at {device} and hidden tensor at {state.device}"
            )
    if input.dtype != dtype and not layers._fits(input, dtype):
        raise RuntimeError(f"input must have the dtype of the weights. Expected {dtype}, got {input.dtype}")
    for state in states:
        if state.dtype != dtype and not layers._fits(state, dtype):
            raise RuntimeError(f"hx must have the dtype of input. Expected {input.dtype}, got {state.dtype}")


def time_major_resets(
    resets: Tensor, T: int, B: int, *, batched: bool, batch_first: bool, device: torch.device
) -> Tensor:
    """Returns resets as [T, B]; raises RuntimeError unless they are bool, in the input's layout, on this device."""
    if not isinstance(resets, Tensor):
        raise TypeError(f"resets must be a tensor, got {type(resets).__name__}")
    expected = [T] if not batched else [B, T] if batch_first else [T, B]
    if list(resets.shape) != expected:
        raise RuntimeError(
            f"resets must have one entry per row and step. Expected shape {expected}, got {list(resets.shape)}"
        )
    if resets.dtype != torch.bool:
        raise RuntimeError(f"resets must be bool. Expected torch.bool, got {resets.dtype}")
    if resets.device != device:
        raise RuntimeError(f"resets must be on the device of the weights. Expected {device}, got {resets.device}")
    if not batched:
        return resets.unsqueeze(1)
    return resets.t().contiguous() if batch_first else resets.contiguous()
