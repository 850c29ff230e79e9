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
from collections import deque
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, overload

import torch
from torch.utils._contextlib import _wrap_generator

from rnnkern import _library
from rnnkern._operators import MODULES, KnownWeights, make_kernels

_ALIAS = "CompositeImplicitAutograd"
_KEPT_SWITCHES = 64
_P = ParamSpec("_P")
_R = TypeVar("_R")


class _Switch:
    """Adds our kernels to the dispatcher with its first user, and removes them with the last."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known = {cell: (KnownWeights(), KnownWeights()) for cell in MODULES}
        self._kernels = [kernel for cell, known in self._known.items() for kernel in make_kernels(cell, *known)]
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
    `RNNKERN_ENABLE=1` in the environment calls it when rnnkern is imported; any other value does nothing.
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
