"""checkpoint_every: the same bits of outputs and gradients of inputs, close gradients of weights, and less memory."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils._pytree import tree_leaves

import rnnkern
from tests.helpers import needs_kernels

KINDS = ["RNN", "LSTM", "GRU"]
T, B, I, H = 11, 4, 3, 5
LENGTHS = torch.tensor([4, T, 0, 9])


def pair(kind: str, every: int, **options: Any) -> tuple[torch.nn.RNNBase, torch.nn.RNNBase]:
    plain = getattr(rnnkern.nn, kind)(I, H, **options)
    module = getattr(rnnkern.nn, kind)(I, H, checkpoint_every=every, **options)
    module.load_state_dict(plain.state_dict())
    return plain, module


def run(module: torch.nn.RNNBase, x: Any, **options: Any) -> tuple[list[Tensor], list[Tensor], dict[str, Tensor]]:
    """Outputs, the gradients of x and hx, and those of parameters."""
    data = (x.data if isinstance(x, PackedSequence) else x).detach().clone().requires_grad_()
    given = x._replace(data=data) if isinstance(x, PackedSequence) else data
    generator = torch.Generator().manual_seed(1)
    rows = module.num_layers * (2 if module.bidirectional else 1)
    sizes = [module.proj_size or H, H][: 2 if module.mode == "LSTM" else 1]
    states = [torch.rand(rows, B, n, generator=generator, dtype=data.dtype).requires_grad_() for n in sizes]
    results = module(given, tuple(states) if len(states) == 2 else states[0], **options)
    outputs = [leaf for leaf in tree_leaves(results) if leaf.is_floating_point()]
    loss = sum((out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)).sum() for out in outputs)
    parameters = dict(module.named_parameters())
    found = torch.autograd.grad(loss, [data, *states, *parameters.values()])
    return outputs, list(found[: 1 + len(states)]), dict(zip(parameters, found[1 + len(states) :]))


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("call", ["plain", "lengths", "resets", "both", "packed"])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("poison")
def test_same_bits(kind: str, bidirectional: bool, call: str, dtype: torch.dtype) -> None:
    plain, module = pair(kind, 4, num_layers=2, bidirectional=bidirectional, dtype=dtype)
    x: Any = torch.randn(T, B, I, dtype=dtype)
    options: dict[str, Any] = {"return_sequence_states": True}
    if call in ("lengths", "both"):
        options["lengths"] = LENGTHS
    if call in ("resets", "both"):
        options["resets"] = torch.rand(T, B) < 0.2
        options["resets"][[4, 8]] = torch.tensor([True, True, False, False])  # where segments meet
    if call == "packed":
        x = pack_padded_sequence(x, LENGTHS.clamp(min=1), enforce_sorted=False)
    outputs, gradients, weights = run(module, x, **options)
    expected_outputs, expected_gradients, expected_weights = run(plain, x, **options)
    for found, expected in ((outputs, expected_outputs), (gradients, expected_gradients)):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    torch.testing.assert_close(weights, expected_weights)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_sixteen_bits(kind: str, dtype: torch.dtype) -> None:
    """As accurate as without, against float64: the sum over segments is not in 16 bits."""
    torch.manual_seed(0)
    plain, module = pair(kind, 1, dtype=dtype, bidirectional=True)
    exact = getattr(rnnkern.nn, kind)(I, H, dtype=torch.float64, bidirectional=True)
    exact.load_state_dict(plain.state_dict())
    x = torch.rand(150, B, I).to(dtype)
    results = [run(m, x.to(next(m.parameters()).dtype)) for m in (module, plain, exact)]
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=0)
    for name, value in results[2][2].items():
        ours, theirs = ((found[2][name].double() - value).norm() / value.norm() for found in results[:2])
        assert ours < 2 * theirs + torch.finfo(dtype).eps, name


@pytest.mark.parametrize("every", [1, 5, T, 100])
def test_any_number_of_steps(every: int) -> None:
    plain, module = pair("LSTM", every, batch_first=True, proj_size=2, dtype=torch.float64)  # on the reference
    x = torch.randn(B, T, I, dtype=torch.float64)
    torch.testing.assert_close(run(module, x), run(plain, x))
    assert f"checkpoint_every={every}" in repr(module)
    assert not module(x[:, :0])[0].numel()
    with torch.no_grad():
        torch.testing.assert_close(module(x), plain(x))


def test_with_everything_else() -> None:
    """Dropout draws as without; limits and the learned state act as without."""
    options = {"dropout": 0.5, "num_layers": 3, "grad_clip": 0.1, "grad_clip_norm": 0.5, "learn_initial_state": True}
    plain, module = pair("GRU", 3, bidirectional=True, dtype=torch.float64, **options)
    x, resets = torch.randn(T, B, I, dtype=torch.float64), torch.rand(T, B) < 0.1
    results = []
    for m in (plain, module):
        torch.manual_seed(3)
        y, _ = m(x, resets=resets)
        results.append(torch.autograd.grad(y.sum(), list(m.parameters())))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("call", ["y", "h_n", "packed"])
def test_batches_of_cotangents(call: str) -> None:
    """As torch.autograd.functional.jacobian(vectorize=True) gives them."""
    plain, module = pair("LSTM", 4, bidirectional=True, dtype=torch.float64)
    data = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    h_0, c_0 = (torch.randn(2, B, H, dtype=torch.float64, requires_grad=True) for _ in range(2))
    x: Any = pack_padded_sequence(data, LENGTHS.clamp(min=1), enforce_sorted=False) if call == "packed" else data
    results = []
    for m in (plain, module):
        leaves = tree_leaves(m(x, (h_0, c_0)))
        out = leaves[-2] if call == "h_n" else leaves[0]
        cotangents = torch.linspace(-1, 1, 3 * out.numel(), dtype=out.dtype).view(3, *out.shape)
        inputs = [data, h_0, c_0, *m.parameters()]
        results.append(torch.autograd.grad(out, inputs, cotangents, retain_graph=True, is_grads_batched=True))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_gradients(kind: str) -> None:
    """With a state that is a function of the input: each path counts once."""
    _, module = pair(kind, 2, dtype=torch.float64, bidirectional=True)
    x = torch.randn(5, 2, I, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, *_: Tensor) -> Tensor:
        h = torch.cat([x[:2], x[2:4, :, : H - I]], -1)
        return module(x, (h, h) if kind == "LSTM" else h)[0]

    found, expected = (torch.autograd.grad(run(x).sum(), x, create_graph=again)[0] for again in (True, False))
    torch.testing.assert_close(found, expected)
    assert torch.autograd.gradgradcheck(run, (x, *module.parameters()), fast_mode=True)


def test_compiled() -> None:
    """Everything is kept then."""
    plain, module = pair("LSTM", 4, bidirectional=True, dtype=torch.float64)
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    found, expected = (torch.autograd.grad(f(x)[0].sum(), x) for f in (compiled, plain))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("every", "exception"), [(0, ValueError), (-1, ValueError), (2.0, TypeError), (True, TypeError)]
)
def test_bad_numbers_of_steps(every: Any, exception: type[Exception]) -> None:
    with pytest.raises(exception, match="checkpoint_every must be"):
        rnnkern.nn.GRU(I, H, checkpoint_every=every)


MEASURE = """
import sys, torch, rnnkern
from pathlib import Path
every = int(sys.argv[1]) or None
torch.set_num_threads(1)
module = rnnkern.nn.LSTM(16, 128, checkpoint_every=every)
def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
def step(T):
    y, _ = module(torch.randn(T, 16, 16))
    y.backward(torch.ones(()).expand_as(y))
step(64)
before = peak()
step(2000)
print(peak() - before)
"""


@needs_kernels
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no procfs to read the peak from")
def test_memory() -> None:
    """An LSTM keeps 5 numbers per unit and step, and the output; in segments of 50 steps of 2000 the output alone."""
    peaks = [
        int(subprocess.run([sys.executable, "-c", MEASURE, every], capture_output=True, text=True, check=True).stdout)
        for every in ("0", "50")
    ]
    unit = 2000 * 16 * 128 * 4 / 1024  # KiB of one number per unit and step
    assert peaks[0] > 5 * unit
    assert peaks[1] < peaks[0] / 2, f"{peaks[1]} KiB with segments, {peaks[0]} without"


@pytest.mark.parametrize("what", ["lengths", "resets"])
def test_what_backward_reads_may_be_written_over(what: str) -> None:
    plain, segmented = pair("GRU", 2)
    x = torch.randn(6, 3, plain.input_size)
    given = {"lengths": torch.tensor([6, 2, 4]), "resets": torch.rand(6, 3) < 0.4}[what]
    gradients = []
    for module, kept in ((plain, given.clone()), (segmented, given)):
        y, _ = module(x, **{what: kept})
        if module is segmented:
            kept.zero_()
        y.square().sum().backward()
        gradients.append([p.grad for p in module.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0])


def test_exported_for_any_number_of_steps() -> None:
    module = torch.nn.Sequential(rnnkern.nn.GRU(5, 4, checkpoint_every=3)).train()
    program = torch.export.export(module, (torch.randn(7, 2, 5),), dynamic_shapes=({0: torch.export.Dim("T")},))
    x = torch.randn(3, 2, 5)
    torch.testing.assert_close(program.module()(x)[0], module(x)[0])
