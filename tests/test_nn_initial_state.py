"""learn_initial_state: where the parameters enter, what a reset goes back to, and what stays as it was without them."""

import copy
import pickle
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence
from torch.utils._pytree import tree_leaves, tree_map

import rnnkern
from tests.helpers import BACKENDS, needs_kernels

KINDS = ["RNN", "LSTM", "GRU"]
T, B, I, H = 7, 4, 3, 5


def learned(kind: str, dtype: torch.dtype = torch.float64, **options: Any) -> torch.nn.RNNBase:
    """A module whose initial state is not zero."""
    module = getattr(rnnkern.nn, kind)(I, H, learn_initial_state=True, dtype=dtype, **options)
    with torch.no_grad():
        for name in ("h_0", "c_0")[: 2 if kind == "LSTM" else 1]:
            getattr(module, name).uniform_(-1, 1)
    return module


def state_of(module: torch.nn.RNNBase, batch: int = B) -> Any:
    """The learned state as hx."""
    h = module.h_0.expand(-1, batch, -1)
    return (h, module.c_0.expand(-1, batch, -1)) if module.mode == "LSTM" else h


def gradients(module: torch.nn.RNNBase, outputs: list[Tensor], *more: Tensor) -> list[Tensor]:
    loss = sum((out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)).sum() for out in outputs)
    return list(torch.autograd.grad(loss, [*module.parameters(), *more], materialize_grads=True))


@pytest.mark.parametrize(("kind", "options"), [("RNN", {}), ("GRU", {}), ("LSTM", {}), ("LSTM", {"proj_size": 2})])
def test_parameters(kind: str, options: dict[str, Any]) -> None:
    torch.manual_seed(1)
    plain = getattr(rnnkern.nn, kind)(I, H, num_layers=2, bidirectional=True, **options)
    torch.manual_seed(1)
    module = getattr(rnnkern.nn, kind)(I, H, num_layers=2, bidirectional=True, learn_initial_state=True, **options)
    added = {"h_0": (4, 1, options.get("proj_size", H))} | ({"c_0": (4, 1, H)} if kind == "LSTM" else {})
    state, before = module.state_dict(), plain.state_dict()
    assert {name: tuple(value.shape) for name, value in state.items() if name not in before} == added
    assert not any(state[name].any() for name in added)
    x = torch.randn(T, B, I)
    torch.testing.assert_close(module(x), plain(x), rtol=0, atol=0)
    assert "learn_initial_state=True" in repr(module)
    assert repr(module).replace(", learn_initial_state=True", "") == repr(plain)
    assert plain.__dict__.keys() == module.__dict__.keys() - {"learn_initial_state"}
    torch.nn.init.ones_(module.h_0)
    module.reset_parameters()
    assert not module.h_0.any()
    assert module.weight_hh_l0.any()


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_stands_for_hx(kind: str, bidirectional: bool) -> None:
    module = learned(kind, num_layers=2, bidirectional=bidirectional)
    x = torch.randn(T, B, I, dtype=torch.float64)
    results = []
    for hx in (None, state_of(module)):
        results.append(gradients(module, tree_leaves(module(x, hx))))
    torch.testing.assert_close(*results, rtol=0, atol=0)
    assert all(gradient.any() for gradient in results[0])
    torch.testing.assert_close(module(x[:, 0])[0], module(x)[0][:, 0])
    packed = pack_sequence([x[:2, 0], x[:, 1]], enforce_sorted=False)
    torch.testing.assert_close(module(packed)[0].data, module(packed, state_of(module, 2))[0].data)
    given = torch.randn_like(state_of(module)[0] if kind == "LSTM" else state_of(module))
    hx = (given, given) if kind == "LSTM" else given
    assert not any(g.any() for g in gradients(module, [module(x, hx)[0]])[-(2 if kind == "LSTM" else 1) :])


@pytest.mark.parametrize("lengths", [None, [4, T, 0, 1]], ids=["", "lengths"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_resets_equal_running_the_episodes(
    kind: str, bidirectional: bool, backend: str, lengths: list[int] | None
) -> None:
    """Outputs, final states and every gradient, with a state given for the first episode."""
    module = learned(kind, bidirectional=bidirectional)
    D = 2 if bidirectional else 1
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    given = tree_map(lambda t: torch.randn_like(t).requires_grad_(), state_of(module))
    resets = torch.zeros(T, B, dtype=torch.bool)
    resets[[3, 4], 0] = resets[0, 1] = resets[5, 1] = resets[2, 2] = resets[4, 3] = True
    with rnnkern.backend(backend):
        y, state = module(x, given, resets=resets, lengths=None if lengths is None else torch.tensor(lengths))
        rows, finals = [], []
        for b in range(B):
            n = T if lengths is None else lengths[b]
            cuts = [0, *(t for t in range(1, n) if resets[t, b]), n]
            own, start = ([leaf[:, b : b + 1] for leaf in tree_leaves(s)] for s in (given, state_of(module)))
            outputs, ends = [], []
            for begin, end in pairwise(cuts):
                meets = [begin == 0 and not (n > 0 and resets[0, b]), end == n][:D]  # which directions meet hx
                mask = torch.tensor(meets)[:, None, None]
                hx = [torch.where(mask, o, s) for o, s in zip(own, start)]
                out, end_state = module(x[begin:end, b : b + 1], tuple(hx) if kind == "LSTM" else hx[0])
                outputs.append(out)
                ends.append(tree_leaves(end_state))
            rows.append(torch.cat([*outputs, outputs[0].new_zeros(T - n, 1, D * H)]))
            final = zip(ends[-1], ends[0])  # forward ends in the last episode, the reverse direction in the first
            finals.append([torch.cat([forward[:1], reverse[1:]]) for forward, reverse in final])
        expected = [torch.cat(rows, 1), *(torch.cat([row[i] for row in finals], 1) for i in range(len(finals[0])))]
        found = [y, *tree_leaves(state)]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
        more = [x, *tree_leaves(given)]
        torch.testing.assert_close(gradients(module, found, *more), gradients(module, expected, *more))


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_zeros_are_what_resets_are_without(kind: str, dtype: torch.dtype) -> None:
    plain = getattr(rnnkern.nn, kind)(I, H, num_layers=2, bidirectional=True, batch_first=True, dtype=dtype)
    module = getattr(rnnkern.nn, kind)(
        I, H, num_layers=2, bidirectional=True, batch_first=True, dtype=dtype, learn_initial_state=True
    )
    module.load_state_dict(plain.state_dict(), strict=False)
    x = torch.randn(B, T, I, dtype=dtype)
    for options in ({}, {"lengths": torch.tensor([T, 0, 3, 5])}):
        resets = torch.rand(B, T) < 0.4
        given = dict(resets=resets, return_sequence_states=True, **options)
        torch.testing.assert_close(module(x, **given), plain(x, **given), rtol=0, atol=0)
    torch.testing.assert_close(module(x[0], resets=resets[0]), plain(x[0], resets=resets[0]), rtol=0, atol=0)
    empty = x[:0]
    assert module(empty, resets=resets[:0])[0].shape == (0, T, 2 * H)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_one_step(kind: str, bidirectional: bool) -> None:
    """A step takes a shorter way, with and without lengths."""
    module = learned(kind, num_layers=2, bidirectional=bidirectional)
    x = torch.randn(1, B, I, dtype=torch.float64)
    given = tree_map(torch.rand_like, state_of(module))
    resets = torch.tensor([[True, False, True, False]])
    lengths = torch.tensor([1, 1, 0, 1])
    for options in ({}, {"lengths": lengths}):
        _, state = module(x, given, resets=resets, **options)
        longer, long_state = torch.cat([x, torch.zeros_like(x)]), torch.cat([resets, torch.zeros_like(resets)])
        options = {"lengths": options.get("lengths", torch.ones(B, dtype=torch.long))}
        torch.testing.assert_close(state, module(longer, given, resets=long_state, **options)[1])
    y, state = module(x[:0], given, resets=resets[:0])
    assert y.shape[0] == 0
    torch.testing.assert_close(state, given, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_calls_in_eval_mode_start_from_it(kind: str) -> None:
    """Short calls go past the dispatcher elsewhere, and know zeros only."""
    module = learned(kind, torch.float32).eval()
    x = torch.randn(3, B, I)
    with torch.no_grad():
        expected = module(x, state_of(module))
        for _ in range(4):
            torch.testing.assert_close(module(x), expected, rtol=0, atol=0)
            y, _ = module.step(x[0])
            torch.testing.assert_close(y, expected[0][0], rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_casts(kind: str) -> None:
    module = learned(kind, bidirectional=True)
    x, resets = torch.randn(T, B, I, dtype=torch.float64), torch.rand(T, B) < 0.3
    expected = module(x, resets=resets)
    other = getattr(rnnkern.nn, kind)(I, H, bidirectional=True, dtype=torch.float64, learn_initial_state=True)
    other.load_state_dict(module.state_dict())
    for same in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), other):
        torch.testing.assert_close(same(x, resets=resets), expected, rtol=0, atol=0)
    half = copy.deepcopy(module).to(torch.bfloat16)
    assert half.h_0.dtype == torch.bfloat16
    for actual, value in zip(tree_leaves(half(x.bfloat16(), resets=resets)), tree_leaves(expected)):
        torch.testing.assert_close(actual.double(), value, rtol=0, atol=0.05)
    on_meta = module.to("meta")(x.to("meta"))
    assert on_meta[0].is_meta


@needs_kernels
@pytest.mark.parametrize("kind", KINDS)
def test_quantized_modules_keep_it(kind: str) -> None:
    module = learned(kind, torch.float32)
    quantized = getattr(rnnkern.nn, f"Quantized{kind}").from_float(module)
    x, resets = torch.randn(T, B, I), torch.rand(T, B) < 0.3
    with torch.no_grad():
        for options in ({}, {"resets": resets}):
            torch.testing.assert_close(quantized(x, **options), module(x, **options), rtol=0, atol=0.02)
    assert torch.equal(quantized.state_dict()["h_0"], module.h_0)


def test_something_else_in_its_place() -> None:
    module, x = rnnkern.nn.LSTM(I, H, learn_initial_state=True), torch.randn(T, 2, I)
    module.h_0 = torch.nn.Parameter(torch.zeros(1, 2, H))  # would fit a batch of two
    with pytest.raises(RuntimeError, match=r"h_0 must have shape \[1, 1, 5\], got \[1, 2, 5\]"):
        module(x)
    module.h_0 = None
    for call in (lambda: module(x), lambda: module.step(x[0]), module.reset_parameters):
        with pytest.raises(
            TypeError, match=r"h_0 must be a tensor \[1, 1, 5\] with learn_initial_state=True, got NoneT"
        ):
            call()
    hx = torch.zeros(1, 2, H), torch.zeros(1, 2, H)
    assert module(x, hx)[0].shape == (T, 2, H)


def test_compiled() -> None:
    module = learned("LSTM")
    run = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(T, B, I, dtype=torch.float64)
    torch.testing.assert_close(gradients(module, tree_leaves(run(x))), gradients(module, tree_leaves(module(x))))
    resets = torch.tensor([[True, False, True, False]])
    hx = tree_map(torch.rand_like, state_of(module))
    torch.testing.assert_close(run(x[:1], hx, resets=resets), module(x[:1], hx, resets=resets))
    torch._dynamo.reset()
    longer = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for often in (0.3, 0.0, 1.0):  # the number of episodes compiles nothing anew
            resets = torch.rand(T, B) < often
            torch.testing.assert_close(longer(x, resets=resets), module(x, resets=resets))
