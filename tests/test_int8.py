"""Layers with int8 weights: what they compute, in every bit; accuracy; NaN and infinity; what is refused."""

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

import rnnkern
from rnnkern.cells import CELLS, reference
from rnnkern.ops.int8 import Int8PackCache, dequantized, quantize_rows, recurrence_int8
from tests.helpers import (
    BACKENDS,
    ISAS,
    OUTPUT_NAMES,
    Layer,
    assert_same_bits,
    error,
    instruction_set,
    make_layer,
    needs_emulator,
    needs_kernels,
    threads,
)

pytestmark = pytest.mark.usefixtures("poison")

SHAPES = [
    (1, 1, 1, 1, 2),
    (3, 9, 5, 17, 2),
    (4, 1, 10, 100, 1),
    (2, 2, 320, 64, 1),
    (3, 4, 7, 320, 2),
    (5, 33, 20, 33, 1),
    (2, 3, 600, 1100, 1),
]  # T, B, I, H, D


class Int8Layer(Layer):
    """A layer whose `weights` are rounded: the eight of both directions, then their scales."""

    def infer(self, backend: str = "cpu", packs: Int8PackCache | None = None) -> dict[str, Tensor]:
        with torch.no_grad(), rnnkern.backend(backend):
            outputs = recurrence_int8(
                self.cell,
                self.x,
                self.h0,
                self.c0,
                self.weights,
                lengths=self.lengths,
                resets=self.resets,
                return_states=True,
                packs=packs,
            )
        return self.named(outputs)

    def named(self, outputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
        two_states = len(CELLS[self.cell].states) == 2
        return {name: out for name, out in zip(OUTPUT_NAMES, outputs) if two_states or name[0] != "c"}

    def run_reference(self) -> dict[str, Tensor]:
        """The rounded weights in float64, nothing else rounded."""
        x, h0, c0, *weights = (
            None if t is None else t.double() for t in (self.x, self.h0, self.c0, *dequantized(self.weights))
        )
        exact = [w.double() if w is not None else None for w in self.weights]
        for matrix, scale in zip((0, 1, 4, 5), exact[8:]):
            weights[matrix] = None if scale is None else exact[matrix] * scale[:, None]
        return self.named(
            reference.layer(
                CELLS[self.cell],
                x,
                h0,
                c0,
                tuple(weights),
                lengths=self.lengths,
                resets=self.resets,
                return_states=True,
            )
        )


def make_int8(cell: str, T: int, B: int, I: int, H: int, **options: object) -> Int8Layer:
    layer = make_layer(cell, T, B, I, H, **options)
    weights, scales = list(layer.weights), [None] * 4
    for i, matrix in enumerate((0, 1, 4, 5)):
        if weights[matrix] is not None:
            weights[matrix], scales[i] = quantize_rows(weights[matrix])
    fields = {field.name: getattr(layer, field.name) for field in dataclasses.fields(layer)}
    return Int8Layer(**fields | {"weights": (*weights, *scales)})


def rounded(rows: Tensor) -> Tensor:
    """Rows as the kernels see them, in float64: 15 bits and a sign of each row's largest magnitude."""
    largest = rows.abs().amax(-1, keepdim=True).clamp(min=1e-30)
    inverse = torch.full_like(largest, 32767) / largest  # torch multiplies where a number is divided by a tensor
    return (rows * inverse).round().double() * (largest.double() / 32767)


def test_rows_are_rounded_to_the_nearest() -> None:
    weight = torch.randn(50, 40) * torch.logspace(-20, 20, 50)[:, None]
    weight[7] = 0
    int8, scale = quantize_rows(weight)
    assert int8.dtype == torch.int8
    assert int8.abs().amax(1).tolist() == [0 if r == 7 else 127 for r in range(50)]
    assert ((int8 * scale[:, None] - weight).abs() <= scale[:, None] * 0.50001).all()
    for bad in (torch.nan, torch.inf, -torch.inf):
        weight[3, 4] = bad
        with pytest.raises(ValueError, match="weights that are infinite or NaN cannot be rounded"):
            quantize_rows(weight)


@needs_kernels
@pytest.mark.parametrize(("T", "B", "I", "H", "D"), SHAPES)
@pytest.mark.parametrize("cell", CELLS)
def test_one_step_is_its_definition(cell: str, T: int, B: int, I: int, H: int, D: int, isa: str) -> None:
    """Rounded rows of x and halves of h times rounded weights: what is left is float32's error."""
    layer = make_int8(cell, 1, B, I, H, D=D, bias=H != 33)
    cut = (H + 15) // 16 // 2 * 16
    results = []
    spec = CELLS[cell]
    exact = [None if w is None else w.double() for w in layer.weights]
    for d in range(D):
        w_ih, w_hh, b_ih, b_hh = exact[4 * d : 4 * d + 4]
        scale_ih, scale_hh = exact[8 + 2 * d : 10 + 2 * d]
        h = torch.cat([rounded(half) for half in layer.h0[d].split([cut, H - cut], 1) if half.shape[1]], 1)
        gx = linear(rounded(layer.x[0]), w_ih * scale_ih[:, None], b_ih)
        gh = linear(h, w_hh * scale_hh[:, None], b_hh)
        state = (layer.h0[d].double(),) if layer.c0 is None else (layer.h0[d].double(), layer.c0[d].double())
        results.append(spec.next_state(gx, gh, state))
    actual = layer.infer()
    for s, name in enumerate(("h_n", "c_n")[: len(spec.states)]):
        expected = torch.stack([state[s] for state in results])
        assert error(actual[name], expected) <= 1.5e-6 * max(1.0, expected.abs().max().item()), name
    assert torch.equal(actual["y"][0], torch.cat(list(actual["h_n"]), 1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("T", "B", "I", "H", "D"), SHAPES)
@pytest.mark.parametrize("cell", CELLS)
def test_accuracy(cell: str, T: int, B: int, I: int, H: int, D: int, backend: str) -> None:
    """Against the rounded weights in float64: the rounding of x and h is all that the kernels add."""
    layer = make_int8(cell, T, B, I, H, D=D)
    expected = layer.run_reference()
    allowed = 1e-4 if backend == "cpu" else 3e-6
    for name, value in layer.infer(backend).items():
        assert error(value, expected[name]) <= allowed * max(1.0, expected[name].abs().max().item()), name


@needs_kernels
@pytest.mark.parametrize("resets", [False, True], ids=["", "resets"])
@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("cell", CELLS)
def test_lengths_and_resets(cell: str, D: int, resets: bool, isa: str) -> None:
    T, B = 9, 20
    lengths = torch.where(torch.arange(B) % 3 == 1, 0, torch.linspace(1, T, B).round().long())
    boundaries = torch.rand(T, B) < 0.3 if resets else None
    layer = make_int8(cell, T, B, 11, 18, D=D, lengths=lengths, resets=boundaries)
    expected = layer.run_reference()
    for name, value in layer.infer().items():
        assert error(value, expected[name]) <= 1e-4 * max(1.0, expected[name].abs().max().item()), name


@needs_kernels
@pytest.mark.parametrize("K", [512, 513, 1024, 1700])
def test_the_largest_sums_do_not_overflow(K: int, isa: str) -> None:
    layer = make_int8("rnn_tanh", 1, 3, K, 16, bias=False)
    layer.x = torch.ones(1, 3, K)
    layer.x[0, 1] = -1
    layer.h0.zero_()
    w_ih, w_hh = torch.full((16, K), 127, dtype=torch.int8), torch.zeros(16, 16, dtype=torch.int8)
    scale = torch.full((16,), 0.5 / (127 * K))
    layer.weights = (w_ih, w_hh, *[None] * 6, scale, scale, None, None)
    expected = torch.tensor([0.5, -0.5, 0.5]).tanh()[:, None].expand(3, 16)
    torch.testing.assert_close(layer.infer()["y"][0], expected, rtol=1e-6, atol=0)


@needs_kernels
@pytest.mark.parametrize("H", [16, 40, 500])
def test_sums_are_exact(H: int, isa: str) -> None:
    """Large terms cancel to a small integer, which a sum in float32 would miss."""
    K = 500  # one run
    generator = torch.Generator().manual_seed(H)
    x = torch.randint(-32767, 32768, (2, K), generator=generator)
    x[:, 0] = 32767
    w = torch.randint(-127, 128, (H, K), generator=generator)
    w[:, 1] = 127
    x[:, K // 2 :], w[:, K // 2 :] = -x[:, : K // 2], w[:, : K // 2]
    w[:, -1] += torch.where(w[:, -1] < 127, 1, -1)  # one term is left over
    totals = x.double() @ w.double().T
    assert (totals != 0).any()
    assert totals.abs().max() <= 32767
    layer = make_int8("rnn_tanh", 1, 2, K, H, bias=False)
    layer.x = x[None].float()
    scale = torch.full((H,), 2.0**-16)
    layer.weights = (w.to(torch.int8), torch.zeros(H, H, dtype=torch.int8), *[None] * 6, scale, scale, None, None)
    layer.h0.zero_()
    torch.testing.assert_close(layer.infer()["y"][0].double(), (totals * 2.0**-16).tanh(), rtol=1e-6, atol=1e-9)


@pytest.mark.skipif(not {"avx2", "avx512"} <= set(ISAS), reason="this CPU lacks AVX2 or AVX-512")
@pytest.mark.parametrize(("T", "B", "I", "H", "D"), SHAPES)
@pytest.mark.parametrize("cell", CELLS)
def test_instruction_sets(cell: str, T: int, B: int, I: int, H: int, D: int) -> None:
    layer = make_int8(cell, T, B, I, H, D=D)
    results = {}
    for name in ISAS:
        with instruction_set(name):
            results[name] = layer.infer()
    for name in set(ISAS) - {"portable"}:  # whose fused multiply-adds round twice
        assert_same_bits(results[name], results["avx2"])
    # A rounding of the last bit may move h to the next of its 32767 steps.
    for output, value in results["portable"].items():
        assert error(value, results["avx2"][output]) <= 2e-5 * max(1.0, value.abs().max().item())


@needs_kernels
@pytest.mark.parametrize(("T", "B", "I", "H"), [(5, 1, 10, 100), (6, 20, 7, 33), (33, 4, 20, 64), (2, 2, 9, 16)])
@pytest.mark.parametrize("cell", CELLS)
def test_bits_do_not_depend_on_threads_chunks_batch_or_packing(
    cell: str, T: int, B: int, I: int, H: int, isa: str
) -> None:
    lengths, resets = torch.randint(0, T + 1, (B,)), torch.rand(T, B) < 0.2
    for layer in (make_int8(cell, T, B, I, H, D=2, lengths=lengths, resets=resets), make_int8(cell, T, B, I, H)):
        expected, packs = layer.infer(), Int8PackCache()
        for count in (2, 3):
            with threads(count):
                assert_same_bits(layer.infer(), expected)
        for _ in range(2):
            assert_same_bits(layer.infer(packs=packs), expected)
        assert packs.find(0, layer.weights)[1] is not None
    last = dataclasses.replace(layer, x=layer.x[:, -1:], h0=layer.h0[:, -1:])  # layer: one direction, padded
    last.c0 = None if layer.c0 is None else layer.c0[:, -1:]
    assert_same_bits(last.infer(), {name: value[:, -1:] for name, value in expected.items()})
    pieces = []
    for chunk in layer.x.split([1, T - 1]):
        layer.x = chunk
        pieces.append(layer.infer())
        layer.h0, layer.c0 = pieces[-1]["h_n"], pieces[-1].get("c_n")
    joined = {n: torch.cat([p[n] for p in pieces]) if n in ("y", "c_all") else pieces[-1][n] for n in expected}
    assert_same_bits(joined, expected)


@needs_kernels
def test_packs_notice_other_weights() -> None:
    layer, packs = make_int8("gru", 3, 2, 20, 40), Int8PackCache()
    layer.infer(packs=packs)
    other = torch.randint(-127, 128, layer.weights[1].shape, dtype=torch.int8)
    changes = (
        lambda: layer.weights[1].copy_(other),
        lambda: layer.weights[0].data.mul_(-1),  # leaves no trace: the kernels' own sample finds it
        lambda: layer.weights[8].mul_(0.5),
        lambda: layer.weights[9].data.mul_(0.5),
        lambda: layer.weights[3].add_(1),
    )
    for change in changes:
        before = layer.infer(packs=packs)
        change()
        assert not torch.equal(layer.infer(packs=packs)["y"], before["y"])
        assert_same_bits(layer.infer(packs=packs), layer.infer())


@needs_kernels
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["x", "h0", "c0"])
@pytest.mark.parametrize("cell", CELLS)
def test_a_row_with_nan_or_infinity_is_nan_from_there_on(cell: str, where: str, value: float, isa: str) -> None:
    layer = make_int8(cell, 6, 3, 5, 40)
    expected = layer.infer()
    if where == "x":
        layer.x[2, 1, 4] = value
    elif where == "h0":
        layer.h0[0, 1, 20] = value
    elif layer.c0 is None:
        return
    else:
        layer.c0[0, 1, 20] = value
    actual = layer.infer()
    for name in ("y", "h_n"):
        others = actual[name][:, [0, 2]]
        assert torch.equal(others, expected[name][:, [0, 2]])
    if where != "c0":
        assert actual["y"][2:, 1].isnan().all()
        assert actual["h_n"][0, 1].isnan().all()
        if where == "x":
            assert torch.equal(actual["y"][:2, 1], expected["y"][:2, 1])
    elif value != value:  # tanh of an infinite cell state is 1; NaN reaches all units one step later
        assert actual["y"][1:, 1].isnan().all()
    else:
        assert actual["y"].isfinite().all()


@needs_kernels
@pytest.mark.parametrize("size", [1e-38, 1e-25, 1e30, 3e38])
def test_rows_of_any_size(size: float, isa: str) -> None:
    layer = make_int8("gru", 3, 2, 9, 20)
    layer.x = layer.x / layer.x.abs().max() * size
    expected = layer.run_reference()
    for name, value in layer.infer().items():
        assert error(value, expected[name]) <= 1e-4, name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cell", CELLS)
def test_without_rows_or_steps(cell: str, backend: str) -> None:
    for T, B in ((3, 0), (3, 2)):
        layer = make_int8(cell, T, B, 4, 5, D=2, lengths=torch.zeros(B, dtype=torch.long))
        outputs = layer.infer(backend)
        assert outputs["y"].shape == (T, B, 10)
        assert not outputs["y"].any()
        assert torch.equal(outputs["h_n"], layer.h0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wanted", ["x", "h0", "c0", "bias"])
def test_gradients_are_refused(wanted: str, backend: str) -> None:
    layer = make_int8("lstm", 3, 2, 4, 5)
    {"x": layer.x, "h0": layer.h0, "c0": layer.c0, "bias": layer.weights[2]}[wanted].requires_grad_()
    layer.infer(backend)
    with pytest.raises(RuntimeError, match="int8 weights have no gradient"), rnnkern.backend(backend):
        recurrence_int8("lstm", layer.x, layer.h0, layer.c0, layer.weights)


@needs_emulator
def test_kernels_are_those_of_the_cpu() -> None:
    module, x = rnnkern.quantize_dynamic(rnnkern.nn.GRU(3, 4)), torch.zeros(2, 1, 3)
    with torch.no_grad():
        (note,) = rnnkern.explain(module, x).layers
        assert (note.backend, note.dtype) == ("cpu", "torch.int8")
        with (
            rnnkern.backend("cuda-emulated"),
            pytest.raises(rnnkern.BackendUnavailable, match="int8 is not supported by cuda-emulated kernels"),
        ):
            module(x)


BAD = {
    "float matrix": (0, lambda w: w.float(), "weight_ih must be rounded. Expected torch.int8, got torch.float32"),
    "double scale": (9, lambda s: s.double(), "scale_hh must have the dtype of input. Expected torch.float32"),
    "scale size": (8, lambda s: s[1:], r"scale_ih must have shape \[15\], got \[14\]"),
    "matrix size": (1, lambda w: w[:, 1:], r"weight_hh must have shape \[15, 5\], got \[15, 4\]"),
    "bias dtype": (2, lambda b: b.half(), "bias_ih must have the dtype of input. Expected torch.float32"),
    "device": (8, lambda s: s.to("meta"), "not at the same device"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", BAD)
def test_weights_that_do_not_fit(case: str, backend: str) -> None:
    which, change, message = BAD[case]
    layer = make_int8("gru", 3, 2, 4, 5)
    weights = list(layer.weights)
    weights[which] = change(weights[which])
    layer.weights = tuple(weights)
    for packs in (None, Int8PackCache()):
        with pytest.raises(RuntimeError, match=message):
            layer.infer(backend, packs)


@needs_kernels
def test_operator_refuses_what_would_read_out_of_bounds() -> None:
    layer = make_int8("gru", 3, 2, 4, 5)
    run = torch.ops.rnnkern.layer_int8
    weights = list(layer.weights)
    rest = (None, None, False, None)
    with pytest.raises(RuntimeError, match=r"scale 1 of direction 0 must be float32 \[15\]"):
        run("gru", layer.x, layer.h0, None, *weights[:9], weights[9][1:], None, None, *rest)
    with pytest.raises(RuntimeError, match="weight 0 of direction 0 does not fit"):
        run("gru", layer.x, layer.h0, None, weights[0].float(), *weights[1:], *rest)
    with pytest.raises(RuntimeError, match="x must be float32"):
        run("gru", layer.x.double(), layer.h0.double(), None, *weights, *rest)


@needs_kernels
@pytest.mark.parametrize(("cell", "D"), [("gru", 1), ("lstm", 2)])
def test_opcheck(cell: str, D: int) -> None:
    layer = make_int8(cell, 3, 2, 2, 17, D=D, lengths=torch.tensor([3, 2]))
    plain = (cell, layer.x, layer.h0, layer.c0, *layer.weights, layer.lengths, None)
    for packed in (None, torch.ops.rnnkern.pack_int8(cell, *layer.weights)):
        torch.library.opcheck(torch.ops.rnnkern.layer_int8.default, (*plain, True, packed))


def test_packs_go_with_the_memory_of_their_weights() -> None:
    """Else weights made for every call could lie where the packed ones did."""
    module = rnnkern.quantize_dynamic(torch.nn.Sequential(rnnkern.nn.GRU(5, 8)).eval())[0]
    with torch.no_grad():
        module(torch.randn(2, 1, 5))
    watched = {storage() for storage in module._packs._entries[0].memory}
    assert {buffer.untyped_storage() for buffer in module.buffers()} <= watched
    watched.clear()
    module.bias_hh_l0 = module.bias_hh_l0.clone()
    assert not module._packs._entries
