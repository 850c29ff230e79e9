"""Lengths on the CPU that none of our compiled kernels brings to the device of the keys: they are copied."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import vmap

import rnnkern
from rnnkern.functional import attention
from rnnkern.ops import lengths as lengths_ops
from rnnkern.ops.clip import clip_sequences
from rnnkern.seq2seq import Decoder

Use = Callable[[Tensor], object]


class _Copies(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes what is copied to another device, and whether the CPU waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Tensor, bool]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.ops.aten._to_copy.default and kwargs.get("device") is not None:
            self.found.append((args[0], not kwargs.get("non_blocking", False)))
        return function(*args, **kwargs)


def attend(lengths: Tensor) -> object:
    key = torch.empty(2, 7, 3, device="meta")
    with rnnkern.backend("eager"):
        return attention(key, key, score="dot", lengths=lengths)


def prepare(lengths: Tensor) -> object:
    return Decoder(5, 6, 3, 3, attention="dot", device="meta").prepare(torch.empty(7, 2, 3, device="meta"), lengths)


def clip(lengths: Tensor) -> object:
    y, h_n = torch.empty(7, 2, 3, device="meta"), torch.empty(1, 2, 3, device="meta", requires_grad=True)
    return clip_sequences((y, h_n, h_n.new_empty(0), y.new_empty(0)), lengths, 1.0)


def clip_packed(lengths: Tensor) -> object:
    y, h_n = torch.empty(9, 3, device="meta"), torch.empty(1, 2, 3, device="meta", requires_grad=True)
    return clip_sequences((y, h_n, h_n.new_empty(0), y.new_empty(0)), lengths, 1.0)


@pytest.mark.parametrize("use", [attend, prepare, clip, clip_packed])
def test_they_come_without_a_wait(use: Use) -> None:
    """Nor does the copy read the caller's memory, which may be pinned, and soon hold others."""
    lengths = torch.tensor([7, 2])
    with _Copies() as copies:
        use(lengths)
    ((source, waits),) = copies.found
    assert not waits
    assert torch.equal(source, lengths)
    assert source.data_ptr() != lengths.data_ptr()


@pytest.mark.parametrize("use", [attend, prepare, clip])
@pytest.mark.parametrize("wrong", [-1, 8])
def test_what_does_not_fit_is_refused(wrong: int, use: Use) -> None:
    with pytest.raises(RuntimeError, match=rf"lengths: expected values .*7, .*{wrong}"):
        use(torch.tensor([7, wrong]))


@pytest.mark.parametrize("numbers", [[5, 0, 2**40, 3], list(range(300)), []])
def test_a_graph_takes_numbers_not_a_copy(numbers: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """As many launches of torch's as it needs; `tests/test_triton_device.py` captures them."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    launch, devices = lengths_ops.launch_lengths, []

    def launch_here(given: Tensor, device: torch.device) -> Tensor:
        devices.append(device.type)
        return launch(given, torch.device("cpu"))

    monkeypatch.setattr(lengths_ops, "launch_lengths", launch_here)
    given = torch.tensor(numbers, dtype=torch.int64)
    with _Copies() as copies:
        placed = lengths_ops.copy_lengths(given, torch.device("cuda"))
    assert torch.equal(placed, given)
    assert placed is not given
    assert devices == ["cuda"]
    assert not copies.found


def test_vmap_goes_over_them_and_all_are_checked() -> None:
    def run(query: Tensor, key: Tensor, lengths: Tensor) -> Tensor:
        return attention(query, key, score="dot", lengths=lengths)[0]

    query, key, lengths = torch.randn(4, 2, 3, 5), torch.randn(4, 2, 7, 5), torch.randint(0, 8, (4, 2))
    torch.testing.assert_close(vmap(run)(query, key, lengths), torch.stack([*map(run, query, key, lengths)]))
    lengths[3, 1] = 8
    with pytest.raises(RuntimeError, match=r"lengths: expected values in 0..7, the number of keys, got 8"):
        vmap(run)(query, key, lengths)
