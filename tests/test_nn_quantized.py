"""Modules with int8 weights in the place of float ones: outputs, checkpoints, copies, errors, and quantize_dynamic."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils._pytree import tree_flatten

import rnnkern
from rnnkern.nn import QuantizedGRU, QuantizedLSTM, QuantizedRNN
from tests.helpers import BACKENDS, needs_kernels

KINDS = [("RNN", {}), ("RNN", {"nonlinearity": "relu"}), ("LSTM", {}), ("GRU", {})]
T, B, I, H = 6, 3, 40, 50


def make(kind: str, **options: Any) -> tuple[torch.nn.RNNBase, Any]:
    """A float module, and the quantized one of it."""
    module = getattr(rnnkern.nn, kind)(I, H, **options).eval()
    return module, rnnkern.quantize_dynamic(module)


def state(module: torch.nn.RNNBase, *batch: int) -> Any:
    rows = module.num_layers * (2 if module.bidirectional else 1)
    h = torch.randn(rows, *batch, H)
    return (h, torch.randn(rows, *batch, H)) if module.mode == "LSTM" else h


def rounded(module: torch.nn.RNNBase) -> torch.nn.RNNBase:
    """The float module with the weights that the quantized one stands for."""
    module = copy.deepcopy(module)
    quantized = rnnkern.quantize_dynamic(module)
    for name, parameter in module.named_parameters():
        if parameter.dim() == 2:
            parameter.data = getattr(quantized, name) * getattr(quantized, f"{name}_scale")[:, None]
    return module


def assert_close(actual: Any, expected: Any, tolerance: float = 1e-4) -> None:
    """Outputs of the same form; the rounding of activations is all that may differ."""
    leaves, form = tree_flatten(actual)
    expected_leaves, expected_form = tree_flatten(expected)
    assert form == expected_form
    for a, e in zip(leaves, expected_leaves, strict=True):
        if isinstance(e, Tensor):
            assert a.dtype == e.dtype
            assert a.stride() == e.stride()
            torch.testing.assert_close(a, e, rtol=0, atol=tolerance * max(1.0, float(e.abs().max())))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("given_state", [False, True], ids=["", "hx"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["", "bidirectional"])
@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_forms_of_input(
    kind: str, options: dict[str, Any], bidirectional: bool, given_state: bool, backend: str
) -> None:
    for more in ({"num_layers": 3, "dropout": 0.5}, {"bias": False}, {"batch_first": True}):
        module, quantized = make(kind, bidirectional=bidirectional, **options, **more)
        reference = rounded(module)
        hx, row_hx = (state(module, B), state(module)) if given_state else (None, None)
        x = torch.randn(B, T, I) if module.batch_first else torch.randn(T, B, I)
        lengths = torch.tensor([T, 0, 2])
        packed = pack_padded_sequence(x, lengths.clamp(1), batch_first=module.batch_first, enforce_sorted=False)
        resets = torch.rand(x.shape[:2]) < 0.3
        with torch.no_grad(), rnnkern.backend(backend):
            assert_close(quantized(x, hx), reference(x, hx))
            assert_close(quantized(x[0], row_hx), reference(x[0], row_hx))
            assert_close(quantized(packed, hx), reference(packed, hx))
            assert_close(quantized(x, hx, lengths=lengths), reference(x, hx, lengths=lengths))
            assert_close(quantized(x, hx, resets=resets), reference(x, hx, resets=resets))
            every = {"return_sequence_states": True}
            assert_close(quantized(x, hx, **every), reference(x, hx, **every))


@needs_kernels
@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_forms_agree_in_every_bit(kind: str, options: dict[str, Any]) -> None:
    module, quantized = make(kind, num_layers=2, **options)
    x, hx = torch.randn(T, B, I), state(module, B)
    lengths = torch.tensor([T, 1, 2])
    with torch.no_grad():
        y, last = quantized(x, hx)
        new = hx
        for t in range(T):
            out, new = quantized.step(x[t], new)
            assert torch.equal(out, y[t])
        for a, b in zip(tree_flatten(new)[0], tree_flatten(last)[0], strict=True):
            assert torch.equal(a, b)
        padded, _ = quantized(x, hx, lengths=lengths)
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        assert torch.equal(pad_packed_sequence(quantized(packed, hx)[0])[0], padded)
        assert quantized._packs.short is not None  # the steps went past the dispatcher
        in_place = torch.utils._pytree.tree_map(torch.clone, hx)
        out, result = quantized.step(x[0], in_place, inplace=True)
        assert torch.equal(out, y[0])
        assert result is in_place


def assert_same(a: torch.nn.Module, b: torch.nn.Module) -> None:
    x = torch.randn(T, B, I)
    with torch.no_grad():
        assert torch.equal(a(x)[0], b(x)[0])


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_copies_and_checkpoints(kind: str, options: dict[str, Any]) -> None:
    module, quantized = make(kind, num_layers=2, bidirectional=True, **options)
    assert_same(quantized, quantized)  # packed by now
    assert_same(copy.deepcopy(quantized), quantized)
    assert_same(pickle.loads(pickle.dumps(quantized)), quantized)
    assert not any("pack" in name for name in quantized.state_dict())
    file = io.BytesIO()
    torch.save(quantized.state_dict(), file)
    file.seek(0)
    fresh = type(quantized)(I, H, num_layers=2, bidirectional=True, **options)
    with torch.no_grad():
        assert not fresh(torch.randn(T, B, I))[0].any()  # zero weights
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert_same(fresh, quantized)
    assert {name: (tuple(v.shape), v.dtype) for name, v in quantized.state_dict().items()} == {
        **{
            name: (tuple(p.shape), torch.int8 if p.dim() == 2 else torch.float32)
            for name, p in module.named_parameters()
        },
        **{
            f"{name}_scale": (tuple(p.shape[:1]), torch.float32)
            for name, p in module.named_parameters()
            if p.dim() == 2
        },
    }
    assert not list(quantized.parameters())
    assert repr(quantized) == f"Quantized{module!r}"
    assert quantized.to("meta").weight_hh_l0.device.type == "meta"


def test_a_float_checkpoint_is_refused() -> None:
    module, quantized = make("GRU")
    before = copy.deepcopy(quantized)
    model = torch.nn.Sequential(quantized)
    checkpoint = torch.nn.Sequential(module).state_dict()
    with pytest.raises(
        RuntimeError, match=r"0.weight_ih_l0 must be torch.int8, got torch.float32: see QuantizedGRU.from_float"
    ):
        model.load_state_dict(checkpoint, strict=False)
    assert_same(quantized, before)


@needs_kernels
def test_loaded_weights_are_seen() -> None:
    _, quantized = make("LSTM")
    _, other = make("LSTM")
    assert_same(quantized, quantized)
    quantized.load_state_dict(other.state_dict())
    assert_same(quantized, other)


def test_what_quantizing_replaces() -> None:
    shared = rnnkern.nn.GRU(I, H)

    class Own(rnnkern.nn.GRU):
        pass

    model = torch.nn.ModuleDict(
        {
            "rnn": torch.nn.RNN(I, H, nonlinearity="relu", batch_first=True),
            "lstm": torch.nn.Sequential(torch.nn.LSTM(I, H, 2, dropout=0.1), torch.nn.Linear(H, H)),
            "gru": shared,
            "again": shared,
            "cell": rnnkern.nn.GRUCell(I, H),
            "own": Own(I, H),
        }
    )
    result = rnnkern.quantize_dynamic(model)
    kinds = {name: type(child) for name, child in result.named_modules()}
    assert kinds["rnn"] is QuantizedRNN
    assert kinds["lstm.0"] is QuantizedLSTM
    assert kinds["gru"] is QuantizedGRU
    assert result["gru"] is result["again"]
    assert kinds["own"] is Own
    assert kinds["cell"] is rnnkern.nn.GRUCell
    assert {name for name, child in result.named_modules() if not child.training} == {"rnn", "lstm.0", "gru"}
    assert result["rnn"].nonlinearity == "relu"
    assert type(model["gru"]) is rnnkern.nn.GRU
    assert type(model["lstm"][0]) is torch.nn.LSTM
    assert result["lstm"][1].weight is not model["lstm"][1].weight
    assert not set(map(id, result.modules())) & set(map(id, model.modules()))
    linear = model["lstm"][1]
    assert rnnkern.quantize_dynamic(model, inplace=True) is model
    assert type(model["lstm"][0]) is QuantizedLSTM
    assert model["lstm"][1] is linear
    assert model["gru"] is model["again"]
    x = torch.randn(T, B, I)
    with torch.no_grad():
        assert torch.equal(model["gru"](x)[0], result["gru"](x)[0])
    with pytest.raises(ValueError, match="holds no RNN, LSTM or GRU layer to quantize"):
        rnnkern.quantize_dynamic(model)


def test_subclasses() -> None:
    class Mine(QuantizedGRU):
        pass

    module = rnnkern.nn.GRU(I, H)
    mine = Mine.from_float(module)
    assert type(mine) is Mine
    assert_same(mine, QuantizedGRU.from_float(module))
    with pytest.raises(TypeError, match=r"Mine.from_float takes a float GRU, got LSTM"):
        Mine.from_float(torch.nn.LSTM(I, H))


def test_what_cannot_be_quantized() -> None:
    refused = {
        r"0: QuantizedLSTM has no proj_size, got 3": rnnkern.nn.LSTM(I, H, proj_size=3),
        r"0: QuantizedGRU has no reset_after=False": rnnkern.nn.GRU(I, H, reset_after=False),
        r"0: weight_ih_l0 must be torch.float32 to be rounded to int8, got torch.float64": rnnkern.nn.GRU(
            I, H
        ).double(),
        r"0: weights that are infinite or NaN cannot be rounded to int8": rnnkern.nn.RNN(I, H),
    }
    list(refused.values())[-1].weight_hh_l0.data[3, 4] = torch.nan
    for message, module in refused.items():
        model = torch.nn.Sequential(module)
        for inplace in (False, True):
            with pytest.raises(ValueError, match=message):
                rnnkern.quantize_dynamic(model, inplace)
        assert model[0] is module
    with pytest.raises(TypeError, match=r"QuantizedGRU.from_float takes a float GRU, got LSTM"):
        QuantizedGRU.from_float(torch.nn.LSTM(I, H))
    with pytest.raises(TypeError, match=r"QuantizedGRU.from_float takes a float GRU, got QuantizedGRU"):
        QuantizedGRU.from_float(QuantizedGRU(I, H))
    with pytest.raises(ValueError, match=r"QuantizedGRU computes in torch.float32, got dtype=torch.float16"):
        QuantizedGRU(I, H, dtype=torch.float16)


def test_bad_calls() -> None:
    quantized = QuantizedLSTM(I, H)
    x = torch.randn(T, B, I)
    with pytest.raises(RuntimeError, match="int8 weights have no gradient"):
        quantized(x.clone().requires_grad_())
    quantized(x)  # gradients are enabled, but nobody wants one
    for dtype in (torch.float64, torch.float16):
        message = rf"input must have dtype torch.float32 for QuantizedLSTM, got {dtype}"
        for wrong in (x.to(dtype), pack_padded_sequence(x.to(dtype), torch.tensor([T, T, 1]))):
            with pytest.raises(ValueError, match=message):
                quantized(wrong)
    with pytest.raises(RuntimeError, match=r"input.size.* must be equal to input_size. Expected 40, got 39"):
        quantized(x[:, :, 1:])
    with pytest.raises(RuntimeError, match=r"Expected hidden\[0\] size"):
        quantized(x, (torch.zeros(1, B + 1, H), torch.zeros(1, B, H)))
    quantized.bias_ih_l0 = quantized.bias_ih_l0.half()
    with pytest.raises(RuntimeError, match=r"bias_ih must have the dtype of input. Expected torch.float32"):
        quantized(x)


@pytest.mark.parametrize("cast", [lambda m: m.half(), lambda m: m.double(), lambda m: m.to("cpu", torch.bfloat16)])
def test_casts_leave_the_dtypes(cast: Any) -> None:
    _, quantized = make("GRU")
    before = copy.deepcopy(quantized)
    model = torch.nn.Sequential(torch.nn.Linear(I, I), quantized)
    cast(model)
    assert model[0].weight.dtype != torch.float32
    for name, buffer in quantized.state_dict().items():
        assert torch.equal(buffer, before.state_dict()[name])
    assert_same(quantized, before)
    moved = quantized.to("meta", torch.float16)
    assert {buffer.device.type for buffer in moved.buffers()} == {"meta"}
    assert {buffer.dtype for buffer in moved.buffers()} == {torch.int8, torch.float32}


@needs_kernels
@pytest.mark.parametrize("float_too", [False, True])
def test_modules_made_in_inference_mode_have_packs(float_too: bool) -> None:
    module = rnnkern.nn.GRU(I, H)
    with torch.inference_mode():
        model = torch.nn.Sequential(rnnkern.nn.GRU(I, H) if float_too else module, torch.nn.Linear(H, H))
        made = [
            QuantizedGRU(I, H),
            QuantizedGRU.from_float(model[0]),
            rnnkern.quantize_dynamic(model)[0],
            rnnkern.quantize_dynamic(model[0]),
        ]
        assert not any(tensor.is_inference() for tensor in rnnkern.quantize_dynamic(model)[1].parameters())
        for quantized in made:
            assert not any(buffer.is_inference() for buffer in quantized.buffers())
            quantized.step(torch.randn(B, I))
            assert quantized._packs.short is not None


@needs_kernels
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("warm", [False, True], ids=["", "packed before"])
def test_a_trace_reads_the_weights(warm: bool) -> None:
    (_, quantized), (_, other) = make("LSTM", num_layers=2), make("LSTM", num_layers=2)
    x = torch.randn(T, B, I)
    with torch.no_grad():
        if warm:
            quantized(x)
        traced = torch.jit.trace(quantized, (x,))
        assert torch.equal(traced(-x)[0], quantized(-x)[0])
        traced.load_state_dict(other.state_dict())
        assert torch.equal(traced(x)[0], other(x)[0])
    graph = str(traced.inlined_graph)
    assert "rnnkern::layer_int8" in graph
    assert "value=<Tensor>" not in graph  # a pack


def test_autocast_leaves_float32() -> None:
    _, quantized = make("GRU")
    x = torch.randn(T, B, I)
    with torch.no_grad():
        expected = quantized(x)[0]
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(quantized(x)[0], expected)
            assert quantized(x.bfloat16())[0].dtype == torch.float32


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_compiled_without_a_graph_break(kind: str) -> None:
    _, quantized = make(kind, num_layers=2, bidirectional=True)
    x = torch.randn(T, B, I)
    run = torch.compile(quantized, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(run(x)[0], quantized(x)[0])


@needs_kernels
def test_export() -> None:
    _, quantized = make("GRU", batch_first=True)
    x = torch.randn(B, T, I)
    with torch.no_grad():
        program = torch.export.export(quantized, (x,))
        assert torch.equal(program.module()(x)[0], quantized(x)[0])


@needs_kernels
def test_explain() -> None:
    _, quantized = make("GRU", num_layers=2)
    with torch.no_grad():
        told = rnnkern.explain(quantized, torch.randn(T, B, I))
    assert [note.backend for note in told.layers] == ["cpu", "cpu"]


def test_seq2seq_encoder() -> None:
    encoder = rnnkern.seq2seq.Encoder(30, 16, 32, cell="lstm").eval()
    quantized = rnnkern.quantize_dynamic(encoder)
    assert any(isinstance(module, QuantizedLSTM) for module in quantized.modules())
    tokens, lengths = torch.randint(1, 30, (7, 3)), torch.tensor([7, 2, 5])
    with torch.no_grad():
        assert_close(quantized(tokens, lengths), encoder(tokens, lengths), tolerance=2e-2)


def test_packed_sequences_keep_their_form() -> None:
    _, quantized = make("GRU")
    packed = pack_padded_sequence(torch.randn(T, B, I), torch.tensor([6, 4, 1]))
    with torch.no_grad():
        assert isinstance(quantized(packed)[0], PackedSequence)


def test_weights_that_others_make_are_refused() -> None:
    with pytest.warns(FutureWarning):
        model = torch.nn.utils.weight_norm(torch.nn.GRU(8, 8), "weight_hh_l0")
    with pytest.raises(ValueError, match="weight_hh_l0 must be a parameter"):
        rnnkern.quantize_dynamic(torch.nn.Sequential(model))
    with pytest.raises(TypeError, match="model must be a module, got dict"):
        rnnkern.quantize_dynamic({})  # type: ignore[arg-type]


@needs_kernels
@pytest.mark.filterwarnings("ignore")  # torch has been about to remove its dynamic quantization since 2.10
@pytest.mark.parametrize(("kind", "bound"), [("GRU", 1e-3), ("LSTM", 5e-4)])
def test_error_against_float(kind: str, bound: float) -> None:
    """The guide's figures: the mean over a sequence, and that torch's dynamic quantization is further off."""
    torch.manual_seed(0)
    module = getattr(torch.nn, kind)(256, 256).eval()
    x = torch.randn(100, 4, 256)
    peer = torch.nn.Sequential(copy.deepcopy(module))
    peer = torch.ao.quantization.quantize_dynamic(peer, {type(module)}, dtype=torch.qint8)
    with torch.no_grad():
        exact = module(x)[0]
        ours, theirs = ((y - exact).abs().mean() for y in (rnnkern.quantize_dynamic(module)(x)[0], peer(x)[0]))
    assert ours < bound
    assert theirs > 4 * ours
