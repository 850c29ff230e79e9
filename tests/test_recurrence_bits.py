"""What may not change a bit of a result: threads, the batch around a row, chunking, instruction set, packing."""

import pytest
import torch

import rnnkern
from rnnkern.cells import CELLS
from rnnkern.ops.recurrence import PackCache
from tests.helpers import ISAS, assert_same_bits, instruction_set, make_layer, needs_kernels, threads

pytestmark = needs_kernels
# T, B, I, H: few rows and many (the engines split the one by units, the other by rows), odd sizes
SHAPES = [(5, 1, 10, 100), (6, 20, 7, 33), (33, 4, 20, 64)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("T", "B", "I", "H"), SHAPES)
@pytest.mark.parametrize("cell", CELLS)
def test_threads(cell: str, T: int, B: int, I: int, H: int, dtype: torch.dtype, isa: str) -> None:
    layer = make_layer(cell, T, B, I, H, D=2, dtype=dtype, lengths=torch.randint(0, T + 1, (B,)))
    with threads(1):
        expected = layer.run("cpu")
    for count in (2, 3):
        with threads(count):
            assert_same_bits(layer.run("cpu"), expected)


@pytest.mark.parametrize("cell", CELLS)
def test_the_batch_around_a_row(cell: str, isa: str) -> None:
    layer = make_layer(cell, 7, 37, 9, 50, D=2)
    whole = layer.infer()
    for begin, end in ((0, 1), (36, 37), (3, 20)):
        part = make_layer(cell, 7, 37, 9, 50, D=2)
        part.x, part.h0 = part.x[:, begin:end], part.h0[:, begin:end]
        part.c0 = None if part.c0 is None else part.c0[:, begin:end]
        assert_same_bits(part.infer(), {name: value[:, begin:end] for name, value in whole.items()})


@pytest.mark.parametrize("B", [1, 20])
@pytest.mark.parametrize("cell", CELLS)
def test_padding_of_other_rows(cell: str, B: int) -> None:
    """A row with `lengths` gives what it gives cut to its length and alone."""
    T = 9
    lengths = torch.randint(0, T + 1, (B,))
    layer = make_layer(cell, T, B, 5, 17, D=2, lengths=lengths)
    whole = layer.infer()
    for b in {0, B - 1, int(lengths.argmax())}:
        length = int(lengths[b])
        if length == 0:
            continue
        part = make_layer(cell, T, B, 5, 17, D=2)
        part.x, part.h0 = part.x[:length, b : b + 1], part.h0[:, b : b + 1]
        part.c0 = None if part.c0 is None else part.c0[:, b : b + 1]
        alone = part.infer()
        assert_same_bits(
            alone, {n: v[:length, b : b + 1] if n in ("y", "c_all") else v[:, b : b + 1] for n, v in whole.items()}
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("T", "B", "I", "H"), SHAPES)
@pytest.mark.parametrize("cell", CELLS)
def test_chunking(cell: str, T: int, B: int, I: int, H: int, dtype: torch.dtype, isa: str) -> None:
    layer = make_layer(cell, T, B, I, H, dtype=dtype)
    whole = layer.infer()
    x, pieces = layer.x, []
    for chunk in x.split([1, 2, T - 3]):
        layer.x = chunk
        pieces.append(layer.infer())
        layer.h0, layer.c0 = pieces[-1]["h_n"], pieces[-1].get("c_n")
    joined = {
        name: torch.cat([p[name] for p in pieces]) if name in ("y", "c_all") else pieces[-1][name] for name in whole
    }
    assert_same_bits(joined, whole)


@pytest.mark.skipif(not {"avx2", "avx512"} <= set(ISAS), reason="this CPU lacks AVX2 or AVX-512")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("T", "B", "I", "H"), SHAPES)
@pytest.mark.parametrize("cell", CELLS)
def test_avx2_and_avx512(cell: str, T: int, B: int, I: int, H: int, dtype: torch.dtype) -> None:
    layer = make_layer(cell, T, B, I, H, D=2, dtype=dtype)
    results = []
    for name in ("avx2", "avx512"):
        with instruction_set(name):
            results.append(layer.infer())
    assert_same_bits(*results)


@pytest.mark.parametrize("cell", CELLS)
def test_training_and_inference(cell: str) -> None:
    layer = make_layer(cell, 8, 5, 6, 20, D=2)
    trained, inferred = layer.run("cpu"), layer.infer()
    assert_same_bits({name: trained[name] for name in inferred}, inferred)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("T", "B", "I", "H"), [(1, 1, 30, 64), (3, 4, 7, 33), (2, 20, 5, 17)])
@pytest.mark.parametrize("cell", CELLS)
def test_packed_weights(cell: str, T: int, B: int, I: int, H: int, dtype: torch.dtype, isa: str) -> None:
    layer = make_layer(cell, T, B, I, H, D=2, dtype=dtype)
    expected, packs = layer.infer(), PackCache()
    for _ in range(3):  # noted, packed, used
        assert_same_bits(layer.infer(packs=packs), expected)
    assert packs.find(0, layer.weights)[1] is not None


@pytest.mark.parametrize("how", ["in place", "through .data", "one element", "replaced", "set_"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_a_pack_is_never_stale(cell: str, how: str) -> None:
    layer = make_layer(cell, 1, 2, 20, 40)
    packs = PackCache()
    for _ in range(3):
        layer.infer(packs=packs)
    w = layer.weights[1]
    other = torch.randn_like(w)
    if how == "in place":
        w.copy_(other)
    elif how == "through .data":  # leaves neither address nor version changed: the kernels' own check finds it
        w.data.copy_(other)
    elif how == "one element":
        w[17, 3] += 1
    elif how == "set_":
        w.set_(other)
    else:
        layer.weights = (layer.weights[0], other, *layer.weights[2:])
    for _ in range(3):
        assert_same_bits(layer.infer(packs=packs), layer.infer())


def test_weights_are_packed_when_seen_again_only() -> None:
    module = rnnkern.nn.LSTM(4, 8)
    x = torch.randn(1, 1, 4)
    with torch.no_grad():
        for _ in range(3):  # a training loop that evaluates one step after each update
            module(x)
            module.weight_hh_l0.mul_(0.9)
        assert module._packs._entries[0][1] is None
        module(x)
        module(x)
        assert module._packs._entries[0][1] is not None
        module(x.expand(16, 1, 4))  # long calls pack anew
    module(x)  # so do calls with gradients
