"""Kernels of torch's own recurrent operators that run ours, which `rnnkern.enable` registers."""

import contextlib
import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.utils.rnn import PackedSequence

from rnnkern.cells import CELLS
from rnnkern.cells.reference import compute_dtype
from rnnkern.nn.recurrent import GRU, LSTM, RNN
from rnnkern.ops import _dispatch, explain
from rnnkern.ops.packs import NAMES, PackCache
from rnnkern.ops.short import SHORT
from rnnkern.ops.step import step

MODULES: dict[str, tuple[Callable[..., Any], dict[str, str]]] = {
    "rnn_tanh": (RNN, {}),
    "rnn_relu": (RNN, {"nonlinearity": "relu"}),
    "lstm": (LSTM, {}),
    "gru": (GRU, {}),
}
_PLAIN = (Tensor, torch.nn.Parameter)
_AUTOGRAD = torch._C.DispatchKey.AutogradCPU


class _Known(NamedTuple):
    """What is kept of a set of weights: their packs, and the call past the dispatcher that may belong to them."""

    memory: weakref.ref[torch.UntypedStorage]  # of the first
    options: tuple[Any, ...]  # the operator's arguments that are no tensors
    packs: PackCache


class KnownWeights(dict[int, _Known]):
    """Sets of weights by the address of the first, which live as long as its memory, also in a scripted module.

    Whether the weights there are the same, PackCache sees. The tensors themselves have no weak references, which
    torch.utils.swap_tensors would refuse.
    """

    def packs(self, first: Tensor, options: tuple[Any, ...]) -> PackCache:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return PackCache()  # for this call alone: FSDP may have gathered them, see `PackCache`
        key, memory = first.data_ptr(), first.untyped_storage()
        known = self.get(key)
        if known is None or known.memory() is not memory or known.options != options:
            known = self[key] = _Known(weakref.ref(memory, lambda _: self.pop(key, None)), options, PackCache())
        return known.packs

    def short(self, first: Tensor, options: tuple[Any, ...]) -> Any:
        """What runs a short call past the dispatcher if it can (`rnnkern.ops.short`), or None."""
        try:
            known = self.get(first.data_ptr())
        except RuntimeError:  # fake tensors have no address
            return None
        if known is None or known.options != options or torch.is_autocast_enabled("cpu"):
            return None
        return known.packs.short


class _Template(NamedTuple):
    """A module without weights, which `_with_weights` gives it for a call."""

    module: Any
    names: tuple[str, ...]  # of the parameters, in the order of the operator's
    shapes: tuple[torch.Size, ...]


@functools.lru_cache(maxsize=256)
def _template(
    cell: str, I: int, H: int, P: int, L: int, bias: bool, dropout: float, bidirectional: bool, batch_first: bool
) -> _Template:
    make, options = MODULES[cell]
    module = make(
        I,
        H,
        num_layers=L,
        bias=bias,
        batch_first=batch_first,
        dropout=dropout,
        bidirectional=bidirectional,
        device="meta",
        **options,
        **({"proj_size": P} if P else {}),
    )
    names = tuple([name for names in module._all_weights for name in names])
    return _Template(module, names, tuple([getattr(module, name).shape for name in names]))


@functools.cache
def _names(L: int, bias: bool) -> tuple[str, ...]:
    """Names of the parameters of layers in one direction."""
    return tuple([f"{name}_l{layer}" for layer in range(L) for name in NAMES[: 4 if bias else 2]])


def _with_weights(template: _Template, weights: Sequence[Tensor], packs: PackCache, training: bool) -> Any:
    """A module of these weights for one call. It shares all else with the template, which other threads use, too."""
    module = object.__new__(type(template.module))
    vars(module).update(
        vars(template.module), _parameters=dict(zip(template.names, weights)), _packs=packs, training=training
    )
    return module


def _watched() -> bool:
    """Whether a mode, a transform or a tracer wants to see torch's own operators."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch.compiler.is_compiling()
    )


def _alike(tensors: Sequence[Tensor]) -> bool:
    """Whether all are ordinary tensors of one dtype on one device. Nothing else is looked at: it may be symbolic."""
    dtype, device = tensors[0].dtype, tensors[0].device
    return all(
        [type(t) in _PLAIN and t.dtype == dtype and t.device == device and t.layout == torch.strided for t in tensors]
    )


def _accepted(cell: str, x: Tensor, weight: Tensor, T: int, B: int, H: int, D: int, projection: bool = False) -> bool:
    """Whether the compiled kernels run a well-formed call, or what `rnnkern.backend` forces; tells `explain` if not."""
    forced = _dispatch.forced()
    if torch.is_autocast_enabled("cpu"):
        why = "torch.autocast is enabled"
    elif T * B < SHORT and weight.is_inference():
        why = "the weights were made in inference mode, and would be packed for every short call"
    elif forced is None:
        choice = _dispatch._cached_choice(cell, x.device, x.dtype, T, B, H, projection)
        why = "" if choice.backend == "cpu" else choice.why.removesuffix(": eager reference")
    else:
        _dispatch.choose(cell, x.device.type, x.dtype, T, B, H, projection=projection, forced=forced)
        why = ""
    if why:
        device, dtype, I = str(x.device), str(x.dtype), x.shape[-1]
        explain.note(explain.LayerNote, cell, device, dtype, T, B, I, H, D, "torch", why)
    return not why


def _unseen() -> contextlib.AbstractContextManager[Any]:
    """Hides calls in Python from modes that would not see those of torch's kernel in C++."""
    return torch._C.DisableTorchFunction() if torch._C._len_torch_function_stack() > 0 else contextlib.nullcontext()


def _valid(batch_sizes: Tensor, rows: int) -> bool:
    """Whether these are the batch sizes of a packed sequence of so many rows."""
    return (
        batch_sizes.dim() == 1
        and batch_sizes.dtype == torch.int64
        and batch_sizes.is_cpu
        and len(batch_sizes) > 0
        and not bool((batch_sizes[1:] > batch_sizes[:-1]).any())
        and int(batch_sizes[-1]) > 0
        and int(batch_sizes.sum()) == rows
    )


def _layers(
    cell: str,
    known: KnownWeights,
    input: Tensor,  # [T, B, I] or [B, T, I]; [N, I] with batch_sizes
    batch_sizes: Tensor | None,
    hx: Any,
    weights: Sequence[Tensor],
    bias: bool,
    L: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
    batch_first: bool = False,
) -> Any:
    """The result of `aten::lstm` and its like; None if torch's kernel is to give it."""
    states = tuple(hx) if isinstance(hx, list | tuple) else (hx,)
    if len(weights) < 2 or not states or not _alike([input, *states, *weights]):
        return None
    if input.dim() != (3 if batch_sizes is None else 2) or weights[0].dim() != 2:
        return None
    if batch_sizes is not None:
        if not _valid(batch_sizes, input.shape[0]):
            return None
        T, B = len(batch_sizes), int(batch_sizes[0])
    else:
        T, B = (input.shape[1], input.shape[0]) if batch_first else (input.shape[0], input.shape[1])
    h, spec = states[0], CELLS[cell]
    I, H, D = input.shape[-1], weights[0].shape[0] // len(spec.gates), 2 if bidirectional else 1
    P = h.shape[2] if cell == "lstm" and h.dim() == 3 and h.shape[2] < H else 0
    if [state.shape for state in states] != [(L * D, B, P or H), (L * D, B, H)][: len(spec.states)]:
        return None
    if min(T, B, I, H, L) < 1 or not 0 <= dropout <= 1:
        return None
    template = _template(cell, I, H, P, L, bias, dropout if L > 1 else 0.0, bidirectional, batch_first)
    if tuple([weight.shape for weight in weights]) != template.shapes:
        return None
    if not _accepted(cell, input, weights[0], T, B, H, D, P > 0):
        return None
    packs = known.packs(weights[0], (bias, L, dropout, training, bidirectional, batch_first))
    module = _with_weights(template, weights, packs, training)
    state = states if len(states) > 1 else h
    with _unseen():
        if batch_sizes is None:
            output, last = module.forward(input, state)
        else:
            packed, last = module.forward(PackedSequence(input, batch_sizes), state)
            output = packed.data
    return (output, *last) if len(states) > 1 else (output, last)


def _short_layers(
    cell: str, known: KnownWeights, input: Tensor, hx: Any, weights: Sequence[Tensor], *options: Any
) -> Any:
    """The result of a short call without gradients on weights that are packed; None if it is another."""
    short = known.short(weights[0], options) if weights else None
    if short is None:
        return None
    bias, L, *_, batch_first = options
    names = _names(L, bias)
    if len(weights) != len(names) or input.dim() != 3:  # modules take more
        return None
    parameters = dict(zip(names, weights))
    result = short.sequence(parameters, input, tuple(hx) if cell == "lstm" else hx, batch_first)
    if result is None:
        return None
    output, last = result
    output = output.transpose(0, 1) if batch_first else output
    return (output, *last) if cell == "lstm" else (output, last)


def _step(
    cell: str,
    known: KnownWeights,
    x: Tensor,  # [B, I]
    hx: Any,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Any:
    """The result of `aten::lstm_cell` and its like; None if torch's kernel is to give it."""
    bias = b_ih is not None
    parameters = {"weight_ih": w_ih, "weight_hh": w_hh, "bias_ih": b_ih, "bias_hh": b_hh}
    short = known.short(w_ih, (bias,))
    if short is not None and x.dim() == 2:
        result = short.cell(parameters, x, tuple(hx) if cell == "lstm" else hx, False)
        if result is not None:
            return result
    states = tuple(hx) if isinstance(hx, list | tuple) else (hx,)
    weights = [weight for weight in parameters.values() if weight is not None]
    if bias != (b_hh is not None) or not states or not _alike([x, *states, *weights]) or x.dim() != 2:
        return None
    spec = CELLS[cell]
    B, I = x.shape
    H = states[0].shape[-1] if states[0].dim() == 2 else 0
    rows = len(spec.gates) * H
    if min(B, I, H) < 1 or [state.shape for state in states] != [(B, H)] * len(spec.states):
        return None
    if [weight.shape for weight in weights] != [(rows, I), (rows, H), (rows,), (rows,)][: len(weights)]:
        return None
    if not _accepted(cell, x, w_ih, 1, B, H, 1):
        return None
    h, c, dtype = states[0], None if len(states) == 1 else states[1], x.dtype
    packs = known.packs(w_ih, (bias,))
    with _unseen():
        h, c = step(
            cell,
            x,
            h,
            None if c is None else c.to(compute_dtype(dtype)),
            (w_ih, w_hh, b_ih, b_hh, None, None, None, None),
            packs,
        )
        packs.prepare(cell, parameters, [NAMES[: len(weights)]])
        return h if c is None else (h, c.to(dtype))


def make_kernels(cell: str, known: KnownWeights, known_cells: KnownWeights) -> list[tuple[Any, Callable[..., Any]]]:
    """Operators of a cell, and a kernel for each."""
    layers, one_step = getattr(torch.ops.aten, cell), getattr(torch.ops.aten, f"{cell}_cell").default

    def run_input(input: Tensor, *rest: Any) -> Any:
        result = _short_layers(cell, known, input, *rest)
        return _layers(cell, known, input, None, *rest) if result is None else result

    runs = (
        (layers.input, run_input),
        (layers.data, functools.partial(_layers, cell, known)),
        (one_step, functools.partial(_step, cell, known_cells)),
    )
    return [(operator, _make_kernel(operator, run)) for operator, run in runs]


def _make_kernel(operator: Any, run: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel that asks `run` for the result, and torch's kernel where it gives None."""
    torch_kernel = torch.library.get_kernel(operator, "CPU")

    def kernel(keys: torch._C.DispatchKeySet, *args: Any) -> Any:
        # Below autograd nothing is recorded, though gradients may be enabled; the kernels would.
        recorded = not torch.is_grad_enabled() or keys.has(_AUTOGRAD)
        result = run(*args) if recorded and not _watched() else None
        return torch_kernel.call_boxed(keys, *args) if result is None else result

    return kernel
