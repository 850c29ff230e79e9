"""Lengths and the GPU: those on the CPU go there with a launch, those of layers stay on the CPU. Emulated."""

import pytest
import torch

import rnnkern
from rnnkern.functional import General, attention
from rnnkern.ops.recurrence import check_lengths
from tests.helpers import needs_emulator
from tests.test_cuda_step import told

EMULATED = "cuda-emulated"


@needs_emulator
@pytest.mark.parametrize("B", [0, 1, 480, 1000])  # a launch takes 480
def test_they_come_with_the_launch(B: int) -> None:
    lengths = torch.randint(0, 8, (2 * B,))[::2]
    placed = torch.ops.rnnkern.cuda_lengths(lengths, torch.randn(B, 7, 3))
    assert torch.equal(placed, lengths)
    assert placed.is_contiguous()


@needs_emulator
def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.rnnkern.cuda_lengths.default, (torch.tensor([3, 0]), torch.randn(2, 7, 3)))


@needs_emulator
def test_what_does_not_fit_is_refused() -> None:
    run, key = torch.ops.rnnkern.cuda_lengths, torch.randn(2, 7, 3)
    for wrong in (-1, 8):
        with pytest.raises(RuntimeError, match=rf"lengths: expected values in 0..7, the number of keys, got {wrong}"):
            run(torch.tensor([7, wrong]), key)
    with pytest.raises(RuntimeError, match=r"lengths must be int64 \[B\] on the CPU"):
        run(torch.tensor([1, 2], dtype=torch.int32), key)
    with pytest.raises(RuntimeError, match=r"key must be \[B, Tk, D\]"):
        run(torch.tensor([1, 2]), key[0])


@needs_emulator
def test_attention_brings_them() -> None:
    query, key, weight = torch.randn(2, 3, 5), torch.randn(2, 7, 4), torch.randn(5, 4, requires_grad=True)
    score, lengths = General(weight), torch.tensor([6, 2], dtype=torch.int32)
    with rnnkern.backend(EMULATED):
        with torch.no_grad():
            names = told(lambda: attention(query[..., :4], key, score="dot", lengths=lengths))
        assert names == ["rnnkern::cuda_lengths", "rnnkern::cuda_attention_inference"]
        context, _ = attention(query, key, score=score, lengths=lengths)
    (found,) = torch.autograd.grad(context.sum(), weight)
    with rnnkern.backend("eager"):
        expected, _ = attention(query, key, score=score, lengths=lengths)
    torch.testing.assert_close(context, expected)
    torch.testing.assert_close(found, torch.autograd.grad(expected.sum(), weight)[0])


@needs_emulator
def test_one_program_serves_every_number_of_keys() -> None:
    def run(query: torch.Tensor, key: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        return attention(query, key, score="dot", lengths=lengths)[0]

    programs = 0

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        nonlocal programs
        programs += 1
        return graph.forward

    compiled = torch.compile(run, backend=backend, fullgraph=True, dynamic=True)
    with rnnkern.backend(EMULATED), torch.no_grad():
        for Tk in (5, 9, 17):
            inputs = torch.randn(2, 3, 4), torch.randn(2, Tk, 4), torch.tensor([Tk, 2])
            torch.testing.assert_close(compiled(*inputs), run(*inputs), rtol=0, atol=0)
        with pytest.raises(RuntimeError, match=r"lengths: expected values in 0..17, the number of keys, got 18"):
            compiled(*inputs[:2], torch.tensor([18, 2]))
    assert programs == 1


def test_layers_refuse_those_on_a_gpu_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with torch._subclasses.FakeTensorMode():
        lengths = torch.empty(3, dtype=torch.int64, device="cuda")
    with pytest.raises(RuntimeError, match=r"lengths must be on the CPU while a CUDA graph is captured.*on cuda:0"):
        check_lengths(lengths, 5, 3)
    check_lengths(torch.tensor([1, 2, 3]), 5, 3)
