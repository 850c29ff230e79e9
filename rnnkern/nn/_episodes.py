"""Sequences cut at their resets: every episode becomes a row of its own, packed, longest first."""

import torch
from torch import Tensor


class Episodes:
    """The episodes of a batch of T steps and B rows; E of them, in N steps.

    Running the episodes as rows is what resets mean, for any initial state of each. An empty row is an empty episode.
    Exporters and tracers may follow, for any T, B and E: `len`, and assigning tensors to indices, would fix sizes.

    Attributes:
        lengths: steps of each episode, longest first.  # int64 [E] on the CPU
    """

    lengths: Tensor

    def __init__(
        self,
        resets: Tensor,  # bool [T, B]
        lengths: Tensor | None,  # int64 [B] on the CPU
        D: int,
    ) -> None:
        self._shape = T, B = resets.shape
        device = resets.device
        alive = torch.ones(B, T, dtype=torch.bool) if lengths is None else torch.arange(T) < lengths[:, None]
        replaced = resets.cpu().t() & alive  # [B, T]
        begins = replaced.clone()
        begins[:, :1] = True
        row, begin = begins.nonzero().unbind(1)  # of each episode, row after row
        episode = begins.flatten().cumsum(0).view(B, T) - 1  # of each step
        self.lengths, order = episode[alive].bincount(minlength=row.shape[0]).sort(descending=True, stable=True)
        rank = torch.empty_like(order).index_copy(0, order, torch.arange(order.shape[0]))
        # Packed: the first steps of all episodes, then their second ones, and so on.
        b, t = alive.nonzero().unbind(1)
        of_step = episode[alive]
        since = t - begin[of_step]  # the start of the episode
        count = since.bincount(minlength=1)
        position = (count.cumsum(0) - count)[since] + rank[of_step]
        steps = torch.empty_like(position).index_copy(0, position, t * B + b)
        self._steps = steps.to(device)  # where each packed step lies among T * B
        first, last = episode[:, 0], episode[:, -1]
        # The forward direction meets the given state in the first episode, unless a reset replaces it; the reverse one
        # in the last.
        none = torch.zeros(row.shape[0], dtype=torch.bool)
        meets = torch.stack([none.index_copy(0, first, ~replaced[:, 0]), none.index_fill(0, last, 1)])
        self._row, self._meets = row[order].to(device), meets[:D, order].to(device)  # [E], [D, E]
        self._final = torch.stack([rank[last], rank[first]][:D]).to(device)  # [D, B]

    def initial(self, given: Tensor, learned: Tensor) -> Tensor:
        """The state [L*D, E, H] in which each episode starts, of those given [L*D, B, H] and learned [L*D, 1, H]."""
        D = len(self._meets)
        meets = self._meets.repeat(len(given) // D, 1).unsqueeze(-1)  # [L*D, E, 1]
        return torch.where(meets, given.index_select(1, self._row), learned)

    def final(self, states: Tensor) -> Tensor:
        """The final states of the rows [L*D, B, H], of those of the episodes [L*D, E, H]."""
        D = len(self._final)
        by_layer = states.view(len(states) // D, D, *states.shape[1:])  # [L, D, E, H]
        return torch.stack([by_layer[:, d, self._final[d]] for d in range(D)], 1).flatten(0, 1)

    def split(self, sequence: Tensor) -> Tensor:
        """The packed steps [N, I] of a sequence [T, B, I]."""
        return sequence.flatten(0, 1).index_select(0, self._steps)

    def join(self, packed: Tensor) -> Tensor:
        """[T, B, ...] of packed steps [N, ...], zero where there is none; states [N, L*D, H] become [T, L*D, B, H]."""
        T, B = self._shape
        joined = packed.new_zeros(T * B, *packed.shape[1:]).index_copy(0, self._steps, packed)
        joined = joined.view(T, B, *packed.shape[1:])
        return joined if joined.dim() == 3 else joined.transpose(1, 2)
