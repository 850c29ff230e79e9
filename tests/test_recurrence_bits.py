"""What may not change a bit of a result: threads, the batch around a row, chunking, instruction set, packing."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import rnnkern
from rnnkern.cells import CELLS
from rnnkern.ops.packs import PackCache
from tests.helpers import DTYPES, ISAS, assert_same_bits, instruction_set, make_layer, needs_kernels, threads

pytestmark = needs_kernels
# T, B, I, H: few rows and many (the engines split the one by units, the other by rows), odd sizes
SHAPES = [(5, 1, 10, 100), (6, 20, 7, 33), (33, 4, 20, 64)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("T", "B", "I", "H"), SHAPES)
@pytest.mark.parametrize("cell", CELLS)
def test_threads(cell: str, T: int, B: int, I: int, H: int, dtype: torch.dtype, isa: str) -> None:
    lengths, resets = torch.randint(0, T + 1, (B,)), torch.rand(T, B) < 0.2
    layer = make_layer(cell, T, B, I, H, D=2, dtype=dtype, lengths=lengths, resets=resets, every_c=True)
    with threads(1):
        expected = layer.run("cpu")
    for count in (2, 3):
        with threads(count):
            assert_same_bits(layer.run("cpu"), expected)


@pytest.mark.parametrize("B", [8, 12])
@pytest.mark.parametrize("cell", CELLS)
def test_threads_with_a_few_equal_rows_each(cell: str, B: int, isa: str) -> None:
    layer = make_layer(cell, 33, B, 20, 64)
    with threads(1):
        expected = layer.run("cpu")
    for count in (2, 3):
        with threads(count):
            assert_same_bits(layer.run("cpu"), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cell", CELLS)
def test_the_batch_around_a_row(cell: str, dtype: torch.dtype, isa: str) -> None:
    layer = make_layer(cell, 7, 37, 9, 51, D=2, dtype=dtype)
    whole = layer.infer()
    for begin, end in ((0, 1), (36, 37), (3, 20)):
        part = make_layer(cell, 7, 37, 9, 51, D=2, dtype=dtype)
        part.x, part.h0 = part.x[:, begin:end], part.h0[:, begin:end]
        part.c0 = None if part.c0 is None else part.c0[:, begin:end]
        assert_same_bits(part.infer(), {name: value[:, begin:end] for name, value in whole.items()})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cell", CELLS)
def test_gradients_and_the_batch_around_a_row(cell: str, dtype: torch.dtype, isa: str) -> None:
    """Those of the row's own: of x and its initial state."""
    T, B = 40, 37
    whole = make_layer(cell, T, B, 9, 51, D=2, dtype=dtype, every_c=True)
    wanted = ["y", "h_n", "dx", "dh0", *(["c_n", "c_all", "dc0"] if whole.c0 is not None else [])]
    found = whole.run("cpu")
    for begin, end in ((0, 1), (36, 37), (3, 20)):
        part = make_layer(cell, T, B, 9, 51, D=2, dtype=dtype, every_c=True)
        part.x, part.h0 = part.x[:, begin:end], part.h0[:, begin:end]
        part.c0 = None if part.c0 is None else part.c0[:, begin:end]
        part.cotangents = tuple(d[:, begin:end] for d in part.cotangents)
        alone = part.run("cpu")
        assert_same_bits({name: alone[name] for name in wanted}, {name: found[name][:, begin:end] for name in wanted})


@pytest.mark.parametrize("cell", CELLS)
def test_runs_repeat_themselves(cell: str, isa: str) -> None:
    """With no setting, and torch's for determinism finds nothing to object to."""
    layer = make_layer(cell, 33, 20, 20, 64, D=2, lengths=torch.randint(0, 34, (20,)), every_c=True)
    with threads(2):
        first, second = layer.run("cpu"), layer.run("cpu")
        torch.use_deterministic_algorithms(True)
        try:
            third = layer.run("cpu")
        finally:
            torch.use_deterministic_algorithms(False)
    assert_same_bits(second, first)
    assert_same_bits(third, first)


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
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "B", "I", "H"), SHAPES)
@pytest.mark.parametrize("cell", CELLS)
def test_avx2_and_avx512(cell: str, T: int, B: int, I: int, H: int, dtype: torch.dtype) -> None:
    layer = make_layer(cell, T, B, I, H, D=2, dtype=dtype)
    results = []
    for name in ("avx2", "avx512"):
        with instruction_set(name):
            results.append(layer.run("cpu") | {f"{name} alone": out for name, out in layer.infer().items()})
    assert_same_bits(*results)


@pytest.mark.parametrize("count", [1, 2])
def test_two_callers_at_once(count: int) -> None:
    """Python threads share modules, packs and the engines' helpers; torch's number of threads is each caller's own."""
    layers = [make_layer(cell, T, B, 10, 64, D=2, every_c=True) for cell, T, B in (("lstm", 12, 20), ("gru", 3, 1))]
    with threads(1):
        expected = [layer.run("cpu") for layer in layers]
        outputs = [layer.infer() for layer in layers]
    packs = [PackCache() for _ in layers]
    begin = threading.Barrier(2)

    def call(first: int) -> None:
        torch.set_num_threads(count)
        begin.wait()
        for i in range(20):
            which = (first + i) % 2
            assert_same_bits(layers[which].run("cpu"), expected[which])
            assert_same_bits(layers[which].infer(packs=packs[which]), outputs[which])

    with threads(count), ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(call, first) for first in range(2)]:
            done.result()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cell", CELLS)
def test_training_and_inference(cell: str, dtype: torch.dtype) -> None:
    layer = make_layer(cell, 8, 5, 6, 20, D=2, dtype=dtype)
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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("H", [1, 33])  # at 1 the packs are of one size, whatever their layout
def test_a_pack_of_another_instruction_set(H: int, dtype: torch.dtype) -> None:
    layer = make_layer("gru", 1, 2, H, H, dtype=dtype)
    packs = PackCache()
    for name in (*ISAS, *reversed(ISAS)):
        with instruction_set(name):
            expected = layer.infer()
            for _ in range(3):
                assert_same_bits(layer.infer(packs=packs), expected)
    assert packs.find(0, layer.weights)[1] is not None


@pytest.mark.parametrize("how", ["in place", "through .data", "columns", "one element", "replaced", "set_"])
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
    elif how == "columns":
        w.data[:, 1:] = other[:, 1:]
    elif how == "one element":
        w[17, 3] += 1
    elif how == "set_":
        w.set_(other)
    else:
        layer.weights = (layer.weights[0], other, *layer.weights[2:])
    for _ in range(3):
        assert_same_bits(layer.infer(packs=packs), layer.infer())


def packed(module: torch.nn.Module) -> bool:
    return any(entry.packed is not None for entry in module._packs._entries.values())


OPTIMIZERS = {
    "fused": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0, fused=True),  # leaves no trace in `_version`
    "foreach": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0, foreach=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
}


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("toggle", [True, False], ids=["train and eval", "always eval"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", ["GRU", "GRUCell"])
def test_optimizer_steps_between_short_calls_are_seen(kind: str, optimizer: str, toggle: bool, backend: str) -> None:
    module = getattr(rnnkern.nn, kind)(64, 64, bias=False).eval()
    x = torch.eye(64)[5].view(1, 1, 64) if kind == "GRU" else torch.eye(64)[5:6]
    step = OPTIMIZERS[optimizer](module.parameters())
    for _ in range(4):
        with torch.no_grad():
            before = [module(x)[0] for _ in range(3)][-1]
        assert packed(module)
        module.train(toggle)
        with rnnkern.backend(backend):
            module(x)[0].sum().backward()  # only the column of one input has a gradient
        assert module._parameters[next(iter(module._parameters))].grad.count_nonzero() <= 3 * 64
        step.step()
        step.zero_grad()
        module.eval()
        with torch.no_grad():
            after = module(x)[0]
            assert not torch.equal(after, before)
            assert torch.equal(after, copy.deepcopy(module)(x)[0])


def test_compiled_training_forgets_the_packs() -> None:
    module = rnnkern.nn.GRU(64, 64, bias=False).eval()
    x = torch.eye(64)[5].view(1, 1, 64)
    run = torch.compile(module, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        with torch.no_grad():
            for _ in range(3):
                module(x)
        assert packed(module)
        run(x)[0].sum().backward()
        assert not module._packs._entries


def test_a_module_packs_in_eval_mode_only() -> None:
    module, x = rnnkern.nn.LSTM(4, 8), torch.randn(1, 1, 4)
    with torch.no_grad():
        for _ in range(3):
            module(x)
        assert not module._packs._entries
        module.eval()
        for _ in range(3):
            module(x)
        assert packed(module)
        module.training = True  # past train(): the next call notices
        module(x)
        assert not module._packs._entries


def test_loaded_weights_are_seen() -> None:
    module, other = (rnnkern.nn.LSTM(20, 40, num_layers=2).eval() for _ in range(2))
    x = torch.randn(1, 1, 20)
    with torch.no_grad():
        for _ in range(3):
            module(x)
        assert packed(module)
        module.load_state_dict(other.state_dict())
        for _ in range(3):
            assert torch.equal(module(x)[0], other(x)[0])


def test_weights_are_packed_when_seen_again_only() -> None:
    module = rnnkern.nn.LSTM(4, 8).eval()
    x = torch.randn(1, 1, 4)
    with torch.no_grad():
        for _ in range(3):  # a loop that evaluates one step after each update
            module(x)
            module.weight_hh_l0.mul_(0.9)
        assert module._packs._entries[0].packed is None
        module(x)
        module(x)
        assert packed(module)
        module(x.expand(16, 1, 4))  # long calls pack anew
        assert packed(module)
    module(x)  # a call with gradients forgets
    assert not module._packs._entries
