"""The names under which Python's own messages tell of methods that public classes inherit from private ones."""

from types import FunctionType
from typing import TypeVar

import torch

_Module = TypeVar("_Module", bound=torch.nn.Module)


def public(module: type[_Module]) -> type[_Module]:
    """Gives a class its own `forward` and `step`, so that `GRU.forward() missing ...` names it, not a private base."""
    for name in ("forward", "step"):
        inherited = getattr(module, name)
        if name not in vars(module):
            own = FunctionType(
                inherited.__code__, inherited.__globals__, name, inherited.__defaults__, inherited.__closure__
            )
            own.__kwdefaults__ = inherited.__kwdefaults__
            own.__annotations__ = inherited.__annotations__
            own.__doc__ = inherited.__doc__
            own.__qualname__ = f"{module.__qualname__}.{name}"
            setattr(module, name, own)
    return module
