"""Swaps torch's recurrent modules of a model for ours, in place, and back: `accelerate` and `restore`.

A module changes its class and stays the same object, with the same parameters, hooks and attributes: whoever holds it
or them (a parent, a list, an optimizer, a hook, a wrapper for parallel training) notices nothing.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils import parametrize

from rnnkern import _library, nn
from rnnkern.ops import _dispatch

_CLASSES: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    torch.nn.RNN: nn.RNN,
    torch.nn.LSTM: nn.LSTM,
    torch.nn.GRU: nn.GRU,
    torch.nn.RNNCell: nn.RNNCell,
    torch.nn.LSTMCell: nn.LSTMCell,
    torch.nn.GRUCell: nn.GRUCell,
}
_BACK = {ours: theirs for theirs, ours in _CLASSES.items()}
_ADDED = "_accelerated_with"  # an accelerated module's list of the attributes that it got, in copies and pickles too


@dataclass(frozen=True)
class ModuleNote:
    """What became of one module.

    Attributes:
        path: where it is in the model, "" for the model itself; a shared module has a note for each place.
        kind: the name of its class before.
        why: why it was left alone, "" if it was swapped.
    """

    path: str
    kind: str
    why: str = ""

    def __str__(self) -> str:
        text = f"{self.path or '(the model)'}: {self.kind}"
        return f"{text} left alone: {self.why}" if self.why else f"{text} swapped"


@dataclass(frozen=True)
class Report:
    """What `accelerate` did: a note for each recurrent module of torch, in the order of `named_modules`.

    Attributes:
        swapped: by this call.
        left: what was left alone.
        already: what an earlier call had swapped.
    """

    swapped: tuple[ModuleNote, ...] = ()
    left: tuple[ModuleNote, ...] = ()
    already: tuple[ModuleNote, ...] = ()

    def __str__(self) -> str:
        notes = [*map(str, (*self.swapped, *self.left)), *(f"{note} already" for note in self.already)]
        return "\n".join(notes) or "no recurrent module of torch was found"


def accelerate(model: torch.nn.Module) -> Report:
    """Swaps every RNN, LSTM, GRU and cell of torch.nn in a model for ours, in place.

    Each module stays the object that it is and changes its class, so parameters, optimizers, hooks, `weight_norm`,
    parametrizations, training mode, sharing and checkpoints stay as they are. From then on it takes what modules of
    rnnkern.nn take, `lengths` and `step` for example. `isinstance(module, torch.nn.LSTM)` no longer holds, since
    torch.compile refuses to trace such instances; `rnnkern.enable` speeds modules up that must stay torch's.

    Left alone, with the reason in the report, are subclasses (which may compute something else) and modules whose
    `forward` was replaced, scripted modules, modules whose parameters are no ordinary tensors (DTensor, say), and those
    that our compiled kernels would not run as they are now: `proj_size`, another device, the kernels not built.

    Args:
        model: any module; a recurrent module itself is possible, too.

    Returns:
        a `Report`: what was swapped, what was left alone and why, and what an earlier call had swapped. Modules made
            by rnnkern.nn are not mentioned.

    Raises:
        TypeError: the model is not a module.

    Example:
        >>> import torch, rnnkern
        >>> model = torch.nn.Sequential(torch.nn.LSTM(8, 16), torch.nn.Linear(16, 4))
        >>> optimizer = torch.optim.Adam(model.parameters())
        >>> print(rnnkern.accelerate(model))
        0: LSTM swapped
        >>> type(model[0])
        <class 'rnnkern.nn.recurrent.LSTM'>
    """
    _check_model(model)
    accelerated = {module for module in model.modules() if _ADDED in vars(module)}
    already: list[ModuleNote] = []
    seen: dict[torch.nn.Module, ModuleNote | None] = {}
    swapped: list[ModuleNote] = []
    left: list[ModuleNote] = []
    for path, module in model.named_modules(remove_duplicate=False):
        if module in accelerated:
            ours = next(cls for cls in type(module).__mro__ if cls in _BACK)
            already.append(ModuleNote(path, _BACK[ours].__name__))
            continue
        if module not in seen:
            seen[module] = _swap(module)
        note = seen[module]
        if note is not None:
            (left if note.why else swapped).append(ModuleNote(path, note.kind, note.why))
    return Report(tuple(swapped), tuple(left), tuple(already))


def restore(model: torch.nn.Module) -> tuple[str, ...]:
    """Makes the modules that `accelerate` swapped torch's again, in place, also in a copy or an unpickled model.

    Args:
        model: any module.

    Returns:
        where they are in the model

    Raises:
        TypeError: the model is not a module.
        RuntimeError: a module's `forward` was replaced meanwhile, by what calls ours, or its class, as `fully_shard`
            does; nothing was restored.

    Example:
        >>> import torch, rnnkern
        >>> model = torch.nn.Sequential(torch.nn.GRUCell(8, 16))
        >>> report = rnnkern.accelerate(model)
        >>> rnnkern.restore(model)
        ('0',)
        >>> type(model[0])
        <class 'torch.nn.modules.rnn.GRUCell'>
    """
    _check_model(model)
    accelerated = [
        (path, module) for path, module in model.named_modules(remove_duplicate=False) if _ADDED in vars(module)
    ]
    for path, module in accelerated:
        if "forward" in vars(module):
            raise RuntimeError(f"{path or 'the model'}: its forward was replaced after accelerate; put it back first")
        if _plain_class(module) not in _BACK:
            raise RuntimeError(
                f"{path or 'the model'}: its class was replaced after accelerate, by {type(module).__name__}"
            )
    for module in {module: None for _, module in accelerated}:
        cls = type(module)
        module.__class__ = _rebased(cls, _BACK[_plain_class(module)])
        for name in vars(module).pop(_ADDED):
            vars(module).pop(name, None)
    return tuple(path for path, _ in accelerated)


def _check_model(model: object) -> None:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a module, got {type(model).__name__}")


def _plain_class(module: torch.nn.Module) -> type[torch.nn.Module]:
    """Its class, or that which was parametrized: `torch.nn.utils.parametrize` makes a subclass for each module."""
    cls = type(module)
    return cls.__bases__[0] if parametrize.is_parametrized(module) else cls


def _rebased(cls: type[torch.nn.Module], base: type[torch.nn.Module]) -> type[torch.nn.Module]:
    """`base`, or a subclass of it that parametrizes as `cls` does."""
    if cls in _CLASSES or cls in _BACK:
        return base
    own = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    return type(f"Parametrized{base.__name__}", (base,), own)


def _swap(module: torch.nn.Module) -> ModuleNote | None:
    """Swaps a module if it can be; None if it is none of torch's recurrent modules."""
    if isinstance(module, torch.jit.ScriptModule):
        name = str(getattr(module, "original_name", ""))
        if name in {theirs.__name__ for theirs in _CLASSES}:
            return ModuleNote("", name, "it is scripted; rnnkern.enable() reaches it")
        return None
    plain = _plain_class(module)
    if not isinstance(module, tuple(_CLASSES)):
        return None
    why = _refusal(module, plain)
    if why:
        return ModuleNote("", plain.__name__, why)
    ours = _CLASSES[plain]
    # What a new module of ours has and this one lacks. On the meta device it has no memory and draws no random numbers.
    new = vars(ours(**_arguments(module), device="meta"))
    added = [name for name in new if name not in vars(module)]
    vars(module).update({name: new[name] for name in added}, **{_ADDED: added})
    module.__class__ = _rebased(type(module), ours)
    return ModuleNote("", plain.__name__)


def _arguments(module: Any) -> dict[str, Any]:
    """The arguments of the constructor that decide which attributes a module has."""
    arguments = {"input_size": module.input_size, "hidden_size": module.hidden_size, "bias": module.bias}
    if hasattr(module, "nonlinearity"):
        arguments["nonlinearity"] = module.nonlinearity
    if isinstance(module, torch.nn.RNNBase):
        arguments |= {"num_layers": module.num_layers, "bidirectional": module.bidirectional}
    return arguments


def _refusal(module: Any, plain: type[torch.nn.Module]) -> str:
    """Why this module of torch is left alone, "" if it is not."""
    parameters = list(module.parameters())
    for name, parameter in module.named_parameters():
        if type(parameter) is not torch.nn.Parameter:
            return f"{name} is a {type(parameter).__name__}"
    if plain not in _CLASSES:
        base = next(theirs for theirs in _CLASSES if isinstance(module, theirs))
        return f"it is a subclass of torch.nn.{base.__name__}, which may compute something else"
    if "forward" in vars(module):
        return "its forward was replaced"
    if not parameters:
        return "it has no parameters"
    cell = module.mode.lower() if isinstance(module, torch.nn.RNNBase) else _cell_of(module)
    weight, projection = parameters[0], getattr(module, "proj_size", 0) > 0
    choice = _dispatch.choose(
        cell,
        weight.device.type,
        weight.dtype,
        1,
        1,
        module.hidden_size,
        projection=projection,
        missing=_library.missing,
    )
    return "" if choice.backend == "cpu" else choice.why.removesuffix(": eager reference")


def _cell_of(module: Any) -> str:
    """The name in `rnnkern.cells.CELLS` of torch's cell."""
    if isinstance(module, torch.nn.RNNCell):
        return f"rnn_{module.nonlinearity}"
    return "lstm" if isinstance(module, torch.nn.LSTMCell) else "gru"
