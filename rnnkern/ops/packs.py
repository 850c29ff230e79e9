"""Packed weights that inference calls of few rows share."""

import functools
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rnnkern.ops.short import ShortCall

# Of each direction, without the suffix that names layer and direction. A layer without biases has the first two.
NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
# Tensors of these names, and the same four of the reverse direction or None; scales follow where matrices are int8.
Weights = tuple[Tensor | None, ...]


class _Entry(NamedTuple):
    """What is known of a layer."""

    key: list[Any]  # of the weights that were seen
    packed: Tensor | None  # None until they are seen again
    memory: list[weakref.ref[torch.UntypedStorage]]  # of the weights, whose death drops the entry


class PackCache:
    """Weights of a module's layers in the kernels' layout, for calls of few rows without gradients in eval mode.

    An entry holds while every weight keeps address, version, dtype, shape and strides. That misses writes without a
    trace: fused optimizers, `.data`, numpy, another process, a storage resized to nothing and filled again. So a module
    forgets all its packs in every call in training mode or with gradients, and in `train` and `eval`; and the kernels
    compare a sample of the elements with one kept in the pack. What remains unseen is a write without a trace, to so
    few elements that the sample misses them, between two calls without gradients of a module that stays in eval mode:
    `module.eval()` after such a write makes it seen. Weights are packed when seen unchanged for the second time:
    evaluating between updates packs nothing in vain. An entry goes when the storage of one of its weights dies: a
    weight that a hook or a parametrization makes anew for every call would else come to lie where an earlier one did,
    with its version. FSDP resizes its storages instead, call by call, so what it may have gathered is never packed.

    Attributes:
        short: runs the whole module past the dispatcher (`rnnkern.ops.short`), once all its layers have packs; or None.
        cell: the cell for which `short` was made.
    """

    short: Any
    cell: str
    _entries: dict[int, _Entry]  # by layer

    def __init__(self) -> None:
        self._entries = {}
        self._drop_short()

    def forget(self) -> None:
        """Drops every pack, without reading: `torch.compile` would guard on what it reads.

        Not while `torch.export` traces: the program that it makes is not to change this module.
        """
        if not torch.compiler.is_exporting():
            self._entries = {}
            self._drop_short()

    def _drop_short(self) -> None:
        self.short = None
        self._prepared = False

    def find(self, layer: int, weights: Weights) -> tuple[list[Any] | None, Tensor | None]:
        """The key of these weights (None if they cannot have one), and their pack if there is one."""
        try:
            key = _key(weights if weights[4] is not None else (*weights[:4], *weights[8:]))
        except RuntimeError:  # inference tensors have no version, fake tensors no address
            return None, None
        entry = self._entries.get(layer)
        return key, entry.packed if entry is not None and entry.key == key else None

    def add(self, layer: int, key: list[Any], cell: str, weights: Weights) -> Tensor | None:
        """Remembers these weights; packs them if they were remembered before."""
        entry = self._entries.get(layer)
        packed = torch.ops.rnnkern.pack.default(cell, *weights) if entry is not None and entry.key == key else None
        self._remember(layer, key, weights, packed)
        return packed

    def _remember(self, layer: int, key: list[Any], weights: Sequence[Tensor | None], packed: Tensor | None) -> None:
        lost = functools.partial(_drop_entry, weakref.ref(self), layer)
        memory = [weakref.ref(weight.untyped_storage(), lost) for weight in weights if weight is not None]
        self._entries[layer] = _Entry(key, packed, memory)
        self._drop_short()

    def prepare(self, cell: str, parameters: dict[str, Any], names: Sequence[Sequence[str]]) -> None:
        """Makes `short`, if it can be made: every layer's weights are parameters of these names, and packed."""
        if self._prepared or ShortCall is None:
            return
        entries = [entry for layer in range(len(names)) if (entry := self._entries.get(layer)) is not None]
        packs = tuple([entry.packed for entry in entries if entry.packed is not None])
        if len(packs) < len(names):
            return
        self._prepared = True
        parameters = dict(parameters)  # holds the weights: another thread may replace them meanwhile
        try:
            short = ShortCall(cell, parameters, tuple(map(tuple, names)), packs)
        except ValueError:  # a parametrization, or a dtype that needs conversions
            return
        now = [_key([parameters[name] for name in layer]) for layer in names]
        # Looked up after `short` took note of the weights: another thread may have changed them after they were packed.
        if all(key == [weight for weight in entry.key if weight is not None] for key, entry in zip(now, entries)):
            self.cell = cell
            self.short = short


def _drop_entry(cache: weakref.ref[PackCache], layer: int, _: object) -> None:
    """Forgets a layer of which a weight's memory is freed."""
    packs = cache()
    if packs is not None:
        packs._entries.pop(layer, None)
        packs._drop_short()


def _key(weights: Sequence[Tensor | None]) -> list[Any]:
    """What changes whenever weights change, but for writes without a trace."""
    return [None if w is None else (w.data_ptr(), w._version, w.dtype, w.shape, w.stride()) for w in weights]
