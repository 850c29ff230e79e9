"""The module of the example cell: it would stand beside GRU in rnnkern/nn/recurrent.py."""

from typing import Any

from rnnkern.nn.recurrent import GRU, _Recurrent


class MGU(_Recurrent):
    """Minimal gated unit of one or more layers: GRU's arguments, inputs and outputs."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__("MGU", *args, **kwargs)

    forward = GRU.forward
