"""Puts these kernels behind torch's own recurrent operators: `enable` and `disable`.

torch.nn.LSTM, a scripted model and a program in C++ all end in the operators `aten::lstm`, `gru`, `rnn_tanh` and
`rnn_relu` (`.input`; `.data` for packed sequences), or `aten::lstm_cell`, `gru_cell`, `rnn_tanh_cell`, `rnn_relu_cell`.
They are CompositeImplicitAutograd: one kernel for all dispatch keys, which calls other operators, and those are what
autograd records. `enable` registers another kernel for that same alias, so that for whatever asks the dispatcher
(autograd, torch.compile, torch.export) the operators are what they were; a kernel for the CPU key alone would change
how export decomposes them. Ours runs plain CPU tensors, and calls torch's for all else: other devices, what is
malformed, so that torch says what is wrong, and calls that a mode, a transform or a tracer watches.
"""

import contextlib
import functools
import inspect
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeVar, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.utils.rnn import PackedSequence
from torch.utils._contextlib import _wrap_generator

from rnnkern import _library
from rnnkern.cells import CELLS
from rnnkern.cells.reference import compute_dtype
from rnnkern.nn.recurrent import GRU, LSTM, RNN
from rnnkern.ops import _dispatch
from rnnkern.ops.packs import NAMES, PackCache
from rnnkern.ops.short import SHORT
from rnnkern.ops.step import step

_MODULES: dict[str, tuple[Callable[..., Any], dict[str, str]]] = {
    "rnn_tanh": (RNN, {}),
    "rnn_relu": (RNN, {"nonlinearity": "relu"}),
    "lstm": (LSTM, {}),
    "gru": (GRU, {}),
}
_PLAIN = (Tensor, torch.nn.Parameter)
_AUTOGRAD = torch._C.DispatchKey.AutogradCPU
_ALIAS = "CompositeImplicitAutograd"
_KEPT_SWITCHES = 64
_P = ParamSpec("_P")
_R = TypeVar("_R")


class _Known(NamedTuple):
    """What is kept of a set of weights: their packs, and the call past the dispatcher that may belong to them."""

    memory: weakref.ref[torch.UntypedStorage]  # of the first
    options: tuple[Any, ...]  # the operator's arguments that are no tensors
    packs: PackCache


class _KnownWeights(dict[int, _Known]):
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
    make, options = _MODULES[cell]
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
        _dispatch.note(_dispatch.LayerNote, cell, device, dtype, T, B, I, H, D, "torch", why)
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
    known: _KnownWeights,
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
    cell: str, known: _KnownWeights, input: Tensor, hx: Any, weights: Sequence[Tensor], *options: Any
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
    known: _KnownWeights,
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


def _make_kernels(cell: str, known: _KnownWeights, known_cells: _KnownWeights) -> list[tuple[Any, Callable[..., Any]]]:
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


class _Switch:
    """Adds our kernels to the dispatcher with its first user, and removes them with the last."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known = {cell: (_KnownWeights(), _KnownWeights()) for cell in _MODULES}
        self._kernels = [kernel for cell, known in self._known.items() for kernel in _make_kernels(cell, *known)]
        self._library: torch.library.Library | None = None
        # Threads may still be on their way into a kernel that was removed, which must outlive their calls.
        self._kept: deque[Any] = deque(maxlen=_KEPT_SWITCHES * len(self._kernels))
        self._users = 0
        self._disabled = 0  # times that all users were removed

    def add_user(self) -> int:
        """Returns what `remove_user` is to be given."""
        with self._lock:
            self._users += 1
            if self._library is None:
                self._library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", message=".*\\n? *Overriding a previously registered kernel")
                    for operator, kernel in self._kernels:
                        self._library.impl(operator, kernel, _ALIAS, with_keyset=True)  # type: ignore[no-untyped-call]
                        self._kept.append(torch.library.get_kernel(operator, "CPU"))
            return self._disabled

    def has_user(self, added: int) -> bool:
        """Whether this user, or one that was added since, is there still: not all were removed meanwhile."""
        return added == self._disabled

    def remove_user(self, added: int) -> None:
        """Removes a user, unless all were removed since it was added."""
        with self._lock:
            if self.has_user(added):
                self._users -= 1
                self._remove_unused()

    def remove_all(self) -> None:
        with self._lock:
            self._users = 0
            self._disabled += 1
            self._remove_unused()

    def _remove_unused(self) -> None:
        if self._users == 0 and self._library is not None:
            self._library._destroy()  # type: ignore[no-untyped-call]
            self._library = None
            for known in self._known.values():
                known[0].clear()
                known[1].clear()


_switch = _Switch()


class _Enabled(contextlib.AbstractContextManager["_Enabled"]):
    """What `enable` returns: leaving it as a block undoes that call, once; each further block is a call of its own."""

    def __init__(self) -> None:
        self._added = [_switch.add_user()]  # what is not undone yet
        self._entered = False

    def __enter__(self) -> "_Enabled":
        if self._entered or not _switch.has_user(self._added[-1]):
            self._added.append(_switch.add_user())
        self._entered = True
        return self

    def __exit__(self, *_: object) -> None:
        if self._added:
            _switch.remove_user(self._added.pop())

    def __call__(self, function: Callable[_P, _R]) -> Callable[_P, _R]:
        """As a decorator, it undoes the call of `enable`, and holds while the function, or a generator, runs."""
        with self:
            pass
        if not callable(function):
            raise TypeError(f"rnnkern.enable() decorates functions, got {type(function).__name__}")
        if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
            raise TypeError(
                f"rnnkern.enable() cannot decorate {function.__qualname__}, which is async: others run meanwhile. "
                "Use a block within it that awaits nothing"
            )
        if inspect.isgeneratorfunction(function):
            generate: Callable[_P, _R] = _wrap_generator(_Enabled, function)  # type: ignore[no-untyped-call]
            return generate

        @functools.wraps(function)
        def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            with _Enabled():
                return function(*args, **kwargs)

        return run


@overload
def enable() -> _Enabled: ...
@overload
def enable(function: Callable[_P, _R]) -> Callable[_P, _R]: ...
def enable(function: Callable[..., Any] | None = None) -> Any:
    """Runs torch's own recurrent operators on these kernels, so that unmodified programs get faster.

    torch.nn.RNN, LSTM, GRU and their cells, TorchScript files, C++ programs in this process: whatever calls torch's
    operators on CPU tensors. Call it once, or use it as a block or a decorator. It holds for the whole process and
    every thread; blocks and calls nest: torch's kernels are back when every block is left, if all calls were blocks,
    or at `disable`.
    `RNNKERN_ENABLE=1` in the environment calls it when rnnkern is imported.
    A decorated generator holds it while it runs, not between its values.

    torch runs, exactly as before, what these kernels cannot run or what someone watches: `proj_size`, torch.autocast,
    other devices, tensor subclasses, quantized and sparse tensors, dispatch modes, torch.func, forward-mode
    differentiation, and whatever is traced or exported (a graph keeps torch's operators). `rnnkern.explain(model, x)`
    says which calls those are. Results differ by rounding. Weights are packed between calls without gradients,
    as in modules of rnnkern.nn in eval mode, but here `train()` and `eval()` do not drop the packs: after a write that
    torch does not count (`.data`, NumPy) to few elements of a weight, call `disable` and `enable`. With a process group
    of torch.distributed nothing is packed, since these operators cannot tell FSDP's weights, which move, from others.

    Args:
        function: what to decorate, of a decorator without parentheses.

    Returns:
        a context manager whose end undoes this call, to be entered again if wanted; or a decorator of a function

    Raises:
        TypeError: what is to be decorated is async, or no function.

    Warns:
        RuntimeWarning: the compiled kernels are missing, so that nothing changes.

    Example:
        >>> import torch, rnnkern
        >>> lstm, x = torch.nn.LSTM(8, 16), torch.randn(5, 2, 8)
        >>> with rnnkern.enable():
        ...     y, (h_n, c_n) = lstm(x)
        ...     told = rnnkern.explain(lstm, x)
        >>> told.layers[0].backend
        'cpu'
    """
    if not _library.available:
        warnings.warn(f"rnnkern.enable() changes nothing: {_library.reason}", RuntimeWarning, stacklevel=2)
    return _Enabled() if function is None else _Enabled()(function)


def disable() -> None:
    """Gives torch's recurrent operators their own kernels back, in blocks of `enable` too: all is as it was before.

    Without `enable` before, it does nothing.

    Example:
        >>> import rnnkern
        >>> _ = rnnkern.enable()
        >>> rnnkern.disable()
    """
    _switch.remove_all()
