"""Decoding steps by fused launches, emulated: against float64, what they keep, and which steps they leave alone."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import rnnkern
from rnnkern.ops.cuda import FUSED_DTYPES, FUSED_ROWS
from rnnkern.seq2seq import Decoder, greedy_search
from rnnkern.seq2seq.decoder import Memory
from tests.helpers import assert_as_accurate, assert_same_bits, needs_emulator
from tests.seq2seq_models import ATTENTIONS, CELLS, END, LETTERS, PHONES, START, make_batch, make_model
from tests.test_cuda_step import told

pytestmark = needs_emulator
EMULATED = "cuda-emulated"
B, TK = 4, 37  # keys in two parts
LENGTHS = torch.tensor([37, 0, 33, 1])


def make_decoder(
    cell: str, attention: str = "additive", layers: int = 1, dtype: torch.dtype = torch.float32
) -> Decoder:
    return make_model(cell, attention, decoder_layers=layers, dtype=dtype).decoder.eval()


def make_inputs(decoder: Decoder, rows: int = B) -> tuple[Tensor, Any, Tensor, Tensor]:
    """Symbols, a state, the encoder's outputs and their lengths."""
    generator = torch.Generator().manual_seed(4)
    dtype = decoder.output.weight.dtype

    def uniform(*shape: int) -> Tensor:
        return (torch.rand(*shape, generator=generator) * 2 - 1).to(dtype)

    sizes = decoder.num_layers, rows, decoder.hidden_size
    state = (uniform(*sizes), uniform(*sizes)) if decoder.cell == "lstm" else uniform(*sizes)
    lengths = LENGTHS.repeat(-(-rows // B))[:rows]
    return torch.arange(rows) % PHONES, state, uniform(TK, rows, decoder.memory_size), lengths


def prepared(decoder: Decoder, values: Tensor, lengths: Tensor | None) -> Memory:
    """The memory, with NaN wherever no step may read."""
    memory = decoder.prepare(values, lengths)
    assert memory.projected is None or (memory.workspace is not None) == (values.dtype != torch.float64)
    if lengths is not None and memory.projected is not None:
        past = torch.arange(TK) >= lengths[:, None]
        parts = (part.clone() for part in memory[:2])
        values, projected = (part.masked_fill(past[..., None], torch.nan) for part in parts)
        memory = memory._replace(values=values, projected=projected)
    if memory.workspace is not None:
        memory.workspace.scratch.fill_(torch.nan)
    return memory


def stepped(decoder: Decoder, backend: str, steps: int = 2) -> dict[str, Tensor]:
    """The logits of every step and the last state."""
    tokens, state, values, lengths = make_inputs(decoder)
    found = {}
    with torch.inference_mode(), rnnkern.backend(EMULATED):
        memory = prepared(decoder, values, lengths)
    with torch.inference_mode(), rnnkern.backend(backend):
        for i in range(steps):
            found[f"logits{i}"], state, weights = decoder.step((tokens + i) % PHONES, state, memory)
            assert weights is None
    names = ("h", "c") if decoder.cell == "lstm" else ("h",)
    return found | dict(zip(names, state if isinstance(state, tuple) else (state,), strict=True))


@pytest.mark.parametrize("dtype", FUSED_DTYPES, ids=str)
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("cell", CELLS)
def test_steps(cell: str, attention: str, layers: int, dtype: torch.dtype) -> None:
    decoder = make_decoder(cell, attention, layers, dtype)
    last = "rnnkern::cuda_cell_step" if attention == "none" else "rnnkern::cuda_attention_step"
    run = told(lambda: stepped(decoder, EMULATED, 1))
    assert [name for name in run if name != "rnnkern::cuda_lengths"] == ["rnnkern::cuda_cell_step"] * (layers - 1) + [
        last
    ]
    expected = stepped(copy.deepcopy(decoder).double(), "eager")
    assert_as_accurate(stepped(decoder, EMULATED), expected, stepped(decoder, "eager"), dtype)


class _Operators(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(func.name().removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


VIEWS = {"select.int", "unsqueeze", "unsqueeze_", "t", "transpose.int", "view", "detach", "alias"}


@pytest.mark.parametrize("dtype", FUSED_DTYPES, ids=str)
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("cell", CELLS)
def test_a_step_copies_and_clears_nothing(cell: str, attention: str, layers: int, dtype: torch.dtype) -> None:
    """What would wait for a GPU, or take a launch more: the memory has what the steps of a sequence share."""
    decoder = make_decoder(cell, attention, layers, dtype)
    tokens, state, values, lengths = make_inputs(decoder)
    with torch.no_grad(), rnnkern.backend(EMULATED):
        memory = decoder.prepare(values, lengths)
        with _Operators() as first:
            _, state, _ = decoder.step(tokens, state, memory)
        with _Operators() as next_one:
            decoder.step(tokens, state, memory)
    last = "cell" if attention == "none" else "attention"
    recurrent = ["rnnkern::cuda_cell_step"] * (layers - 1) + [f"rnnkern::cuda_{last}_step"]
    states = ["stack"] * ((layers > 1) * (2 if cell == "lstm" else 1))
    after = ["mm", "tanh", "addmm"] if attention == "none" else ["cat", "mm", "tanh", "addmm"]
    launches = ["embedding", *recurrent, *states, *after]
    assert [name for name in next_one.names if name not in VIEWS] == launches
    converted = ["_to_copy"] * (cell == "lstm" and dtype != torch.float32)  # of c, once for a sequence
    assert [name for name in first.names if name not in VIEWS] == ["embedding", *converted, *launches[1:]]


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("dtype", FUSED_DTYPES[1:], ids=str)
def test_c_of_16_bits_goes_on_in_float32(dtype: torch.dtype, layers: int) -> None:
    decoder = make_decoder("lstm", layers=layers, dtype=dtype)
    tokens, (h, c), values, lengths = make_inputs(decoder)
    with torch.no_grad(), rnnkern.backend(EMULATED):
        memory = decoder.prepare(values, lengths)
        fine = c.float() * (1 + 1e-4)  # which 16 bits do not hold
        _, (_, found), _ = decoder.step(tokens, (h, fine), memory)
        _, (_, rounded), _ = decoder.step(tokens, (h, fine.to(dtype)), memory)
        assert found.dtype == rounded.dtype == torch.float32
        assert not torch.equal(found, rounded)
        # The modules take it, and give what they give for the rounded one.
        for run in (
            lambda c: decoder.step(tokens, (h, c), memory, need_weights=True),
            lambda c: decoder(tokens[None], (h, c), memory),
        ):
            (logits, (_, last), _), (expected, (_, expected_last), _) = run(fine), run(fine.to(dtype))
            assert last.dtype == dtype
            assert_same_bits({"logits": logits, "c": last}, {"logits": expected, "c": expected_last})


@pytest.mark.parametrize("cell", CELLS)
def test_the_workspace_serves_every_step_and_comes_back_clean(cell: str) -> None:
    decoder = make_decoder(cell)
    tokens, state, values, lengths = make_inputs(decoder)
    with torch.no_grad(), rnnkern.backend(EMULATED):
        memory = prepared(decoder, values, lengths)
        assert memory.workspace is not None
        first = decoder.step(tokens, state, memory)[0]
        assert not memory.workspace.counters.any()
        again = decoder.step(tokens, state, memory)[0]
        another = decoder.step(tokens, state, memory._replace(workspace=None))[0]
        few = decoder.select_rows(memory, torch.tensor([2, 0]))
        assert few.workspace is not None
        parts = state if isinstance(state, tuple) else (state,)
        kept = tuple(part[:, [2, 0]] for part in parts)
        state = kept if isinstance(state, tuple) else kept[0]
        chosen = decoder.step(tokens[[2, 0]], state, few)[0]
        misfit = decoder.step(tokens[[2, 0]], state, few._replace(workspace=memory.workspace))[0]
    assert_same_bits({"again": again, "another": another}, {"again": first, "another": first})
    torch.testing.assert_close(chosen, first[[2, 0]])
    assert torch.equal(misfit, chosen)


def test_explain_tells_of_it() -> None:
    decoder = make_decoder("lstm", layers=2)
    tokens, state, values, lengths = make_inputs(decoder)
    with torch.no_grad(), rnnkern.backend(EMULATED):
        memory = decoder.prepare(values, lengths)
        notes = rnnkern.explain(decoder.step, tokens, state, memory).layers
    assert [str(note).partition(" ")[0] for note in notes] == ["lstm", "lstm", "additive"]
    assert [note.backend for note in notes] == [EMULATED] * 3
    assert [note.engine for note in notes[:2]] == ["one launch"] * 2


def run_by(decoder: Decoder, rows: int = B, **options: Any) -> list[str]:
    """The operators of ours that a step calls, without gradients unless they are enabled."""
    tokens, state, values, lengths = make_inputs(decoder, rows)
    with rnnkern.backend(EMULATED):
        memory = decoder.prepare(values, lengths)
        return told(lambda: decoder.step(tokens, state, memory, **options))


def test_the_modules_run_where_a_launch_does_not_do_what_they_do() -> None:
    ordinary = ["rnnkern::cuda_layer_inference", "rnnkern::cuda_lengths", "rnnkern::cuda_attention_inference"]
    with torch.no_grad():
        assert run_by(make_decoder("gru")) == ["rnnkern::cuda_attention_step"]
        assert run_by(make_decoder("gru"), need_weights=True) == ordinary
        assert run_by(make_decoder("gru"), FUSED_ROWS + 1) == ordinary
        decoder = make_decoder("gru")
        seen: list[Tensor] = []
        handle = decoder.attention.register_forward_hook(lambda module, inputs, output: seen.append(output[0]))
        assert run_by(decoder) == ordinary
        assert len(seen) == 1
        handle.remove()
        assert run_by(decoder) == ["rnnkern::cuda_attention_step"]
        called: list[str] = []
        for register in (
            torch.nn.modules.module.register_module_forward_hook,
            torch.nn.modules.module.register_module_forward_pre_hook,
        ):
            called.clear()
            handle = register(lambda module, *_: called.append(type(module).__name__))
            try:
                assert run_by(decoder) == ordinary
            finally:
                handle.remove()
            assert {"GRU", "AdditiveAttention"} <= set(called)
        assert run_by(decoder) == ["rnnkern::cuda_attention_step"]
        decoder.attention.query_projection = type("Own", (torch.nn.Linear,), {})(10, 9, bias=False)
        assert run_by(decoder) == ordinary
        decoder = make_decoder("gru")
        torch.nn.utils.parametrizations.weight_norm(decoder.recurrent, "weight_hh_l0")
        assert run_by(decoder) == ordinary
        with torch.autocast("cpu", torch.bfloat16):
            assert run_by(make_decoder("gru")) == ordinary
        quantized = rnnkern.quantize_dynamic(make_decoder("gru"))
        with rnnkern.backend("cpu"):
            tokens, state, values, lengths = make_inputs(quantized)
            quantized.step(tokens, state, quantized.prepare(values, lengths))
        dropping = make_model("gru", decoder_layers=2, dropout=0.5, dtype=torch.float32).decoder
        assert "rnnkern::cuda_attention_step" not in run_by(dropping)
        assert run_by(dropping.eval())[-1] == "rnnkern::cuda_attention_step"
    assert run_by(make_decoder("gru"))[-1] == "rnnkern::cuda_attention"


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_what_does_not_fit_is_refused_as_elsewhere(cell: str) -> None:
    decoder = make_decoder(cell)
    tokens, state, values, lengths = make_inputs(decoder)
    h = state[0] if cell == "lstm" else state
    wrong_states = [(h, h) if cell == "gru" else h, (h[..., 1:],) * 2 if cell == "lstm" else h[..., 1:]]
    wrong_states.append((h.double(),) * 2 if cell == "lstm" else h.double())
    for bad in [(tokens, wrong) for wrong in wrong_states] + [(tokens[1:], state)]:
        said = []
        for backend in ("eager", EMULATED):
            with torch.no_grad(), rnnkern.backend(backend):
                memory = decoder.prepare(values, lengths)
                with pytest.raises(Exception) as caught:  # noqa: PT011, the same one
                    decoder.step(*bad, memory)
                said.append((caught.type, str(caught.value)))
        assert said[0] == said[1]


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_greedy_search_finds_the_same(attention: str) -> None:
    model = make_model("lstm", attention, dtype=torch.float32, seed=1).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    source = torch.randint(3, LETTERS, (9, 6), generator=torch.Generator().manual_seed(5))
    results = []
    for backend in ("eager", EMULATED):
        with rnnkern.backend(backend):
            results.append(greedy_search(model, source, LENGTHS.repeat(2)[:6] % 9, start=START, end=END, max_length=8))
    assert torch.equal(results[0].tokens, results[1].tokens)
    torch.testing.assert_close(results[0].scores, results[1].scores, rtol=1e-3, atol=1e-3)


def test_compiled() -> None:
    decoder = make_decoder("lstm", layers=2)
    tokens, state, values, lengths = make_inputs(decoder)
    with torch.no_grad(), rnnkern.backend(EMULATED):
        memory = decoder.prepare(values, lengths)
        expected = decoder.step(tokens, state, memory)
        compiled = torch.compile(decoder.step, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(tokens, state, memory), expected, rtol=0, atol=0)


def test_teacher_forcing_learns_as_before() -> None:
    model = make_model("gru", dtype=torch.float32)
    source, target, lengths = make_batch()
    with rnnkern.backend(EMULATED):
        assert model.encode(source, lengths)[0].workspace is None
        model.loss(source, target, lengths).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
