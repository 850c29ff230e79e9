"""Packed sequences beyond what test_nn_recurrent.py compares with torch: forms, indices, states, totals."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence
from torch.utils._pytree import tree_leaves

import rnnkern

T, I, H = 7, 4, 5
KINDS: list[tuple[str, dict[str, Any]]] = [
    ("RNN", {"bidirectional": True}),
    ("LSTM", {"num_layers": 2}),
    ("LSTM", {"proj_size": 3, "bidirectional": True}),
    ("GRU", {"num_layers": 2, "bidirectional": True}),
]
kinds = pytest.mark.parametrize(("kind", "options"), KINDS, ids=str)
LENGTHS = {
    "sorted": [7, 5, 5, 1],
    "unsorted": [1, 5, 7, 5],
    "equal": [7, 7, 7],
    "of one step": [1, 1, 1],
    "one row": [4],
    "one row of one step": [1],
    "long": [40, 17, 16, 3],  # past the limit of short calls
}


def pair(kind: str, options: dict[str, Any], **more: Any) -> tuple[torch.nn.RNNBase, torch.nn.RNNBase]:
    modules = []
    for library in (rnnkern.nn, torch.nn):
        torch.manual_seed(0)
        modules.append(getattr(library, kind)(I, H, **options, **more))
    return modules[0], modules[1]


def random_state(module: torch.nn.RNNBase, batch: int) -> Any:
    rows = module.num_layers * (2 if module.bidirectional else 1)
    h = torch.randn(rows, batch, module.proj_size or H, requires_grad=True)
    return (h, torch.randn(rows, batch, H, requires_grad=True)) if module.mode == "LSTM" else h


def assert_same(actual: Any, expected: Any) -> None:
    for a, b in zip(tree_leaves(actual), tree_leaves(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", LENGTHS)
@kinds
def test_same_as_torch(kind: str, options: dict[str, Any], case: str, training: bool) -> None:
    ours, peer = (module.train(training) for module in pair(kind, options))
    lengths = torch.tensor(LENGTHS[case])
    x = torch.randn(int(lengths.max()), len(lengths), I, requires_grad=True)
    packed = pack_padded_sequence(x, lengths, enforce_sorted=case not in ("unsorted",))
    for hx in (None, random_state(ours, len(lengths))):
        outputs = [module(packed, hx) for module in (ours, peer)]
        assert_same(*outputs)
        output = outputs[0][0]
        assert isinstance(output, PackedSequence)
        assert output.batch_sizes is packed.batch_sizes
        assert output.sorted_indices is packed.sorted_indices
        assert output.unsorted_indices is packed.unsorted_indices
        given = [x, *([] if hx is None else tree_leaves(hx))]
        gradients = []
        for module, out in zip((ours, peer), outputs):
            leaves = [leaf for leaf in tree_leaves(out) if leaf is not None and leaf.is_floating_point()]
            total = sum((leaf * torch.linspace(-1, 1, leaf.numel()).view(leaf.shape)).sum() for leaf in leaves)
            gradients.append(torch.autograd.grad(total, [*given, *module.parameters()], retain_graph=True))
        assert_same(*gradients)
        with torch.no_grad():
            for _ in range(3):  # with packed weights
                assert_same(ours(packed, hx), outputs[1])


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("total_length", [None, T, T + 3])
@kinds
def test_padded_again(kind: str, options: dict[str, Any], total_length: int | None, batch_first: bool) -> None:
    ours, peer = pair(kind, options, batch_first=batch_first)
    lengths = torch.tensor([3, T, 1])
    x = torch.randn(3, T, I) if batch_first else torch.randn(T, 3, I)
    packed = pack_padded_sequence(x, lengths, batch_first=batch_first, enforce_sorted=False)
    results = []
    for module in (ours, peer):
        output, state = module(packed)
        padded, back = pad_packed_sequence(
            output, batch_first=batch_first, padding_value=-9.0, total_length=total_length
        )
        assert torch.equal(back, lengths)
        results.append((padded, state))
    assert_same(*results)
    assert results[0][0].shape == results[1][0].shape


@kinds
def test_states_are_permuted_with_the_rows(kind: str, options: dict[str, Any]) -> None:
    """Row b of hx belongs to row b of the batch as it was before it was sorted, and so does row b of the result."""
    module, _ = pair(kind, options)
    lengths = [2, T, 1, 4]
    x = torch.randn(T, 4, I)
    hx = random_state(module, 4)
    output, state = module(pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False), hx)
    padded, _ = pad_packed_sequence(output)
    for b, length in enumerate(lengths):
        one = torch.utils._pytree.tree_map(lambda s, b=b: s[:, b : b + 1], hx)
        alone, alone_state = module(x[:length, b : b + 1], one)
        torch.testing.assert_close(padded[:length, b : b + 1], alone, rtol=1e-5, atol=1e-6)
        for a, e in zip(tree_leaves(state), tree_leaves(alone_state), strict=True):
            torch.testing.assert_close(a[:, b : b + 1], e, rtol=1e-5, atol=1e-6)


@kinds
def test_lengths_allow_zero_where_packing_does_not(kind: str, options: dict[str, Any]) -> None:
    module, _ = pair(kind, options)
    lengths = torch.tensor([3, 0, T, 0])
    x = torch.randn(T, 4, I)
    hx = random_state(module, 4)
    with pytest.raises(RuntimeError, match="greater than 0"):
        pack_padded_sequence(x, lengths, enforce_sorted=False)
    output, state = module(x, hx, lengths=lengths)
    kept = lengths > 0
    part = torch.utils._pytree.tree_map(lambda s: s[:, kept], hx)
    packed = pack_padded_sequence(x[:, kept], lengths[kept], enforce_sorted=False)
    expected, expected_state = module(packed, part)
    torch.testing.assert_close(output[:, kept], pad_packed_sequence(expected)[0])
    assert not output[:, ~kept].any()
    for a, e, initial in zip(tree_leaves(state), tree_leaves(expected_state), tree_leaves(hx), strict=True):
        torch.testing.assert_close(a[:, kept], e)
        assert torch.equal(a[:, ~kept], initial[:, ~kept])


def test_made_by_hand() -> None:
    """Without indices the rows are sorted already; its members may be any tensors that fit."""
    ours, peer = pair("GRU", {})
    batch_sizes = torch.tensor([3, 2, 2, 1])
    data = torch.randn(I, 8).t()  # not contiguous
    for packed in (
        PackedSequence(data, batch_sizes),
        PackedSequence(data, batch_sizes, torch.tensor([2, 0, 1]), torch.tensor([1, 2, 0])),
    ):
        assert_same(ours(packed), peer(packed))
    assert ours(PackedSequence(data, batch_sizes))[0].sorted_indices is None


@pytest.mark.parametrize("grad", [True, False])
def test_batch_sizes_made_by_hand_are_not_negative(grad: bool) -> None:
    packed = PackedSequence(torch.randn(2, I), torch.tensor([3, -1]))
    with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match=r"batch_sizes .* negative, got \[3, -1\]"):
        rnnkern.nn.GRU(I, H)(packed)


def test_kept_through_conversions() -> None:
    ours, peer = (module.double() for module in pair("LSTM", {}))
    packed = pack_sequence([torch.randn(2, I), torch.randn(5, I)], enforce_sorted=False)
    assert_same(ours(packed.double()), peer(packed.double()))
    output, _ = ours(packed.to(torch.float64))
    assert output.data.dtype == torch.float64
    assert output.to("cpu") is output


@kinds
def test_packed_rows_are_those_of_lengths(kind: str, options: dict[str, Any]) -> None:
    """Bit for bit."""
    module, _ = pair(kind, options)
    lengths = torch.tensor([T, 6, 2])
    x: Tensor = torch.randn(T, 3, I)
    packed_output, packed_state = module(pack_padded_sequence(x, lengths))
    output, state = module(x, lengths=lengths)
    assert torch.equal(pad_packed_sequence(packed_output)[0], output)
    assert all(torch.equal(a, b) for a, b in zip(tree_leaves(packed_state), tree_leaves(state), strict=True))
