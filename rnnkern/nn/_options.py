"""What RNN, LSTM and GRU take beyond torch: a learned initial state, limits of gradients, segments of steps."""

from collections.abc import Callable
from functools import partial
from numbers import Real
from typing import Any, TypedDict

import torch
from torch import Tensor

from rnnkern.nn._episodes import Episodes
from rnnkern.ops import onnx
from rnnkern.ops.clip import clip_sequences
from rnnkern.ops.formulas import Outputs
from rnnkern.ops.recompute import segmented

OF_BACKWARD = ("grad_clip", "grad_clip_norm", "checkpoint_every")  # what changes nothing without gradients


class Keywords(TypedDict, total=False):
    """What the constructors take besides torch's arguments."""

    learn_initial_state: bool
    grad_clip: float | None
    grad_clip_norm: float | None
    checkpoint_every: int | None


OPTIONS = tuple(Keywords.__annotations__)


class Options(torch.nn.RNNBase):
    """The options and what they change. Instances have only those that are asked for: pickles stay what they were."""

    learn_initial_state: bool = False
    grad_clip: float | None = None
    grad_clip_norm: float | None = None
    checkpoint_every: int | None = None
    _two_states: bool  # h and c, as LSTM has; every other cell of two states takes hx in LSTM's form

    def _set_options(
        self,
        learn_initial_state: bool = False,
        grad_clip: float | None = None,
        grad_clip_norm: float | None = None,
        checkpoint_every: int | None = None,
    ) -> None:
        """Checks the options, and adds the parameters."""
        for name, limit in (("grad_clip", grad_clip), ("grad_clip_norm", grad_clip_norm)):
            if limit is not None:
                if not isinstance(limit, Real) or isinstance(limit, bool):
                    raise TypeError(f"{name} must be a number, got {type(limit).__name__}")
                if not limit > 0:
                    raise ValueError(f"{name} must be greater than zero, got {limit}")
                setattr(self, name, float(limit))
        if checkpoint_every is not None:
            if not isinstance(checkpoint_every, int) or isinstance(checkpoint_every, bool):
                raise TypeError(f"checkpoint_every must be an int, got {type(checkpoint_every).__name__}")
            if checkpoint_every < 1:
                raise ValueError(f"checkpoint_every must be at least 1 step, got {checkpoint_every}")
            self.checkpoint_every = checkpoint_every
        if learn_initial_state:
            self.learn_initial_state = True
            weight = next(self.parameters())
            for name, shape in self._initial_shapes().items():
                self.register_parameter(name, torch.nn.Parameter(weight.new_zeros(shape)))

    def _initial_shapes(self) -> dict[str, tuple[int, int, int]]:
        """The names and shapes of the parameters that are the initial state."""
        if not self.learn_initial_state:
            return {}
        rows = self.num_layers * (2 if self.bidirectional else 1)
        shapes = {"h_0": (rows, 1, self.proj_size or self.hidden_size)}
        return shapes | {"c_0": (rows, 1, self.hidden_size)} if self._two_states else shapes

    def reset_parameters(self) -> None:
        """Draws the weights anew, as in torch; an initial state to be learned becomes zero."""
        super().reset_parameters()
        for state in self._initial_state():
            torch.nn.init.zeros_(state)

    def extra_repr(self) -> str:
        """The arguments of the constructor, as in torch, and of ours those that are given."""
        given = [f"{name}={getattr(self, name)}" for name in OPTIONS if getattr(self, name)]
        return ", ".join([super().extra_repr(), *given])

    def _learned_state(self, B: int) -> tuple[Tensor, Tensor | None]:
        """h [L*D, B, H or P] and c [L*D, B, H]."""
        h, *c = (state.expand(-1, B, -1) for state in self._initial_state())
        return h, c[0] if c else None

    def _initial_state(self) -> list[Tensor]:
        """The parameters that are the initial state; raises TypeError or RuntimeError if others took their place."""
        states = []
        for name, shape in self._initial_shapes().items():
            state = getattr(self, name)
            if not isinstance(state, Tensor):
                raise TypeError(
                    f"{name} must be a tensor {list(shape)} with learn_initial_state=True, got {type(state).__name__}"
                )
            if state.shape != shape:
                raise RuntimeError(f"{name} must have shape {list(shape)}, got {list(state.shape)}")
            states.append(state)
        return states

    def _recurrence_of_options(self, recurrence: Callable[..., Outputs]) -> Callable[..., Outputs]:
        """The function that runs a layer: `recurrence`, with what the options ask of its backward."""
        if self.grad_clip is None and self.grad_clip_norm is None and self.checkpoint_every is None:
            return recurrence
        return partial(self._run_layer, recurrence)

    def _run_layer(self, recurrence: Callable[..., Outputs], cell: str, *args: Any, **kwargs: Any) -> Outputs:
        if self.grad_clip is not None:
            kwargs["grad_clip"] = self.grad_clip
        if self.checkpoint_every is not None:
            outputs = segmented(self.checkpoint_every, cell, *args, **kwargs)
        else:
            outputs = recurrence(cell, *args, **kwargs)
        if self.grad_clip_norm is not None:
            outputs = clip_sequences(outputs, kwargs["lengths"], self.grad_clip_norm)
        return outputs

    def _episodes(
        self,
        layers: Callable[..., tuple[Tensor, Tensor, Tensor | None, tuple[Tensor, ...] | None]],
        x: Tensor,  # [T, B, I], T > 0
        h: Tensor,  # [L*D, B, H or P]
        c: Tensor | None,  # [L*D, B, H]
        first: Any,  # the weights of the first layer
        lengths: Tensor | None,  # [B]
        resets: Tensor,  # [T, B]
        return_states: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None, tuple[Tensor, ...] | None]:
        """`layers` with resets to the learned state: every episode is a row of its own, with its own initial state."""
        h_0, c_0 = self._learned_state(1)
        h_0 = h_0.to(h.dtype)  # autocast's
        D = 2 if self.bidirectional else 1
        # What resets decide of one step is where it starts; but torch.jit.trace makes a program for all T.
        if x.shape[0] == 1 and torch._C._get_tracing_state() is None:
            begins = resets[0] if lengths is None else resets[0] & (lengths > 0).to(resets.device)
            chosen = torch.stack([begins, torch.zeros_like(begins)][:D]).repeat(self.num_layers, 1).unsqueeze(-1)
            h = torch.where(chosen, h_0, h)
            c = None if c is None or c_0 is None else torch.where(chosen, c_0, c)
            return layers(x, h, c, first, lengths, None, return_states)
        if onnx.exporting():  # it would refuse the packed rows, which nobody gave: let it refuse the resets
            return layers(x, h, c, first, lengths, resets, return_states)
        cut = Episodes(resets, lengths, D)
        h = cut.initial(h, h_0)
        c = None if c is None or c_0 is None else cut.initial(c, c_0)
        y, h_n, c_n, states = layers(cut.split(x), h, c, first, cut.lengths, None, return_states)
        return (
            cut.join(y),
            cut.final(h_n),
            None if c_n is None else cut.final(c_n),
            None if states is None else tuple(cut.join(s) for s in states),
        )
