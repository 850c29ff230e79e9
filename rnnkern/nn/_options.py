"""What RNN, LSTM and GRU take beyond torch: a learned initial state, limits of gradients, segments of steps."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rnnkern.nn._episodes import Episodes
from rnnkern.ops.clip import clip_sequences
from rnnkern.ops.recompute import segmented
from rnnkern.ops.recurrence import Outputs

INITIAL_STATE = ("h_0", "c_0")  # the parameters that learn_initial_state adds
OF_BACKWARD = ("grad_clip", "grad_clip_norm", "checkpoint_every")  # what changes nothing without gradients
OPTIONS = ("learn_initial_state", *OF_BACKWARD)


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
                if not limit > 0:
                    raise ValueError(f"{name} must be greater than zero, got {limit}")
                setattr(self, name, float(limit))
        if checkpoint_every is not None:
            if not isinstance(checkpoint_every, int):
                raise TypeError(f"checkpoint_every must be an int, got {type(checkpoint_every).__name__}")
            if checkpoint_every < 1:
                raise ValueError(f"checkpoint_every must be at least 1 step, got {checkpoint_every}")
            self.checkpoint_every = checkpoint_every
        if learn_initial_state:
            self.learn_initial_state = True
            weight = next(self.parameters())
            rows = self.num_layers * (2 if self.bidirectional else 1)
            sizes = (self.proj_size or self.hidden_size, self.hidden_size)
            for name, size in zip(self._initial_names(), sizes):
                self.register_parameter(name, torch.nn.Parameter(weight.new_zeros(rows, 1, size)))

    def _initial_names(self) -> tuple[str, ...]:
        """The names of the parameters that are the initial state."""
        return () if not self.learn_initial_state else INITIAL_STATE if self._two_states else INITIAL_STATE[:1]

    def reset_parameters(self) -> None:
        """Draws the weights anew, as in torch; an initial state to be learned becomes zero."""
        super().reset_parameters()
        for name in self._initial_names():
            torch.nn.init.zeros_(getattr(self, name))

    def extra_repr(self) -> str:
        """The arguments of the constructor, as in torch, and of ours those that are given."""
        given = [f"{name}={getattr(self, name)}" for name in OPTIONS if getattr(self, name)]
        return ", ".join([super().extra_repr(), *given])

    def _learned_state(self, B: int) -> tuple[Tensor, Tensor | None]:
        """h [L*D, B, H or P] and c [L*D, B, H]."""
        h, *c = (getattr(self, name).expand(-1, B, -1) for name in self._initial_names())
        return h, c[0] if c else None

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
        if x.shape[0] == 1:  # what resets decide is where this step starts
            begins = resets[0] if lengths is None else resets[0] & (lengths > 0).to(resets.device)
            chosen = torch.stack([begins, torch.zeros_like(begins)][:D]).repeat(self.num_layers, 1).unsqueeze(-1)
            h = torch.where(chosen, h_0, h)
            c = None if c is None or c_0 is None else torch.where(chosen, c_0, c)
            return layers(x, h, c, first, lengths, None, return_states)
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
