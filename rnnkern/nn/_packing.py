"""What layers and cells share about packed weights: which calls use them, what drops them, that no copy has them."""

from typing import Any

import torch
from typing_extensions import Self

from rnnkern.ops.packs import PackCache


class Packing(torch.nn.Module):
    """Comes first among the bases of a module with packed weights."""

    _packs: PackCache
    _pack_cache: type[PackCache] = PackCache

    def train(self, mode: bool = True) -> Self:
        """Sets the mode, as in torch; packed weights are forgotten."""
        self._packs.forget()
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        state = dict(getattr(super(), "__getstate__", lambda: vars(self))())  # before Python 3.11 not all bases have it
        state.pop("_packs", None)  # neither pickled nor deep-copied
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._packs = self._pack_cache()

    def _replicate_for_data_parallel(self) -> Self:
        replica: Self = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        replica._packs = self._pack_cache()
        return replica

    def _packs_of_call(self, casts: bool) -> PackCache | None:
        """The cache for this call; None, and what is packed is forgotten, if packs would not last.

        They would not in training, nor if autocast `casts` the weights anew for each call, nor under FSDP, which
        gathers weights into memory that it resizes: others may come to lie at the same address, with the same version.
        """
        if self.training or casts or getattr(self, "_is_fsdp_managed_module", False):
            self._packs.forget()
            return None
        return self._packs
