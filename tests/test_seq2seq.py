"""Encoder, decoder and loss: shapes, padding, steps against teacher forcing, gradients, bad input."""

import pytest
import torch

from rnnkern.seq2seq import Decoder, Encoder, Seq2Seq, greedy_search
from tests.seq2seq_models import ATTENTIONS, CELLS, END, LETTERS, PADDING, PHONES, START, make_batch, make_model


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("cell", CELLS)
def test_shapes(cell: str, attention: str, batch_first: bool) -> None:
    model = make_model(cell, attention, encoder_layers=2, decoder_layers=3, batch_first=batch_first)
    source, target, lengths = make_batch()
    if batch_first:
        source, target = source.t(), target.t()
    memory, state = model.encoder(source, lengths)
    assert memory.shape == ((4, 7, 10) if batch_first else (7, 4, 10))
    for part in state if cell == "lstm" else (state,):
        assert part.shape == (3, 4, 10)
    prepared, _ = model.encode(source, lengths)
    assert prepared.values.shape == (4, 7, 10)
    inputs = target[:, :-1] if batch_first else target[:-1]
    need_weights = attention != "none"
    logits, after, weights = model.decoder(inputs, state, prepared, need_weights=need_weights)
    assert logits.shape == ((4, 5, PHONES) if batch_first else (5, 4, PHONES))
    assert type(after) is type(state)
    assert (weights.shape == (4, 5, 7)) if need_weights else (weights is None)
    step_logits, _, step_weights = model.decoder.step(target[:, 0] if batch_first else target[0], state, prepared)
    assert step_logits.shape == (4, PHONES)
    assert step_weights is None
    assert torch.equal(model(source, target, lengths), logits)


def test_batch_first_is_the_same_computation() -> None:
    source, target, lengths = make_batch()
    expected = make_model()(source, target, lengths)
    actual = make_model(batch_first=True)(source.t(), target.t(), lengths)
    torch.testing.assert_close(actual.transpose(0, 1), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("cell", CELLS)
def test_one_direction_hands_its_final_state_over(cell: str) -> None:
    model = make_model(cell, bidirectional=False)
    source, _, _ = make_batch()
    assert not any("bridge" in name for name, _ in model.named_parameters())
    memory, state = model.encoder(source)
    hidden = state[0] if cell == "lstm" else state
    torch.testing.assert_close(hidden[0], memory[-1], rtol=0, atol=0)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("cell", CELLS)
def test_padding_does_not_change_a_row(cell: str, attention: str) -> None:
    model = make_model(cell, attention, encoder_layers=2)
    source, target, lengths = make_batch()
    together = model(source, target, lengths)
    for row, length in enumerate(lengths.tolist()):
        alone = model(source[:length, row : row + 1], target[:, row : row + 1])
        torch.testing.assert_close(together[:, row : row + 1], alone, rtol=0, atol=1e-12)
    source[source == PADDING] = LETTERS - 1  # what stands past a row's length is never read
    assert torch.equal(model(source, target, lengths), together)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("cell", CELLS)
def test_steps_equal_teacher_forcing(cell: str, attention: str) -> None:
    model = make_model(cell, attention, decoder_layers=2)
    source, target, lengths = make_batch()
    logits = model(source, target, lengths)
    memory, state = model.encode(source, lengths)
    for position in range(target.shape[0] - 1):
        step, state, _ = model.decoder.step(target[position], state, memory)
        torch.testing.assert_close(step, logits[position], rtol=0, atol=1e-12)


def test_source_without_symbols() -> None:
    """A row of length zero attends to nothing: finite numbers, no gradient into its memory."""
    model = make_model("gru")
    source, target, lengths = make_batch()
    lengths[2] = 0
    model.loss(source, target, lengths).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    result = greedy_search(model.eval(), source, lengths, start=START, end=END, max_length=3, need_weights=True)
    assert result.weights is not None
    assert (result.weights[2] == 0).all()


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("cell", CELLS)
def test_gradients_reach_every_parameter(cell: str, attention: str) -> None:
    model = make_model(cell, attention, encoder_layers=2, decoder_layers=2)
    source, target, lengths = make_batch()
    model.loss(source, target, lengths).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name
    assert (model.encoder.embedding.weight.grad[PADDING] == 0).all()


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_gradient_is_that_of_finite_differences(attention: str) -> None:
    model = make_model("gru", attention)
    source, target, lengths = make_batch()
    model.loss(source, target, lengths).backward()
    generator = torch.Generator().manual_seed(3)
    step = 1e-6
    for name, parameter in model.named_parameters():
        direction = torch.randn(parameter.shape, dtype=parameter.dtype, generator=generator)
        if "embedding" in name:
            direction[PADDING] = 0  # held at zero
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(direction, alpha=sign * step)
                losses.append(model.loss(source, target, lengths).item())
                parameter.add_(direction, alpha=-sign * step)
        expected = (losses[0] - losses[1]) / (2 * step)
        actual = (parameter.grad * direction).sum().item()
        assert actual == pytest.approx(expected, rel=1e-5, abs=1e-8), name


def test_loss_is_cross_entropy_per_symbol_without_padding() -> None:
    model = make_model()
    source, target, lengths = make_batch()
    log_probabilities = model(source, target, lengths).log_softmax(-1)
    total, count = 0.0, 0
    for row in range(4):
        for position in range(1, target.shape[0]):
            if target[position, row] != PADDING:
                total -= log_probabilities[position - 1, row, target[position, row]].item()
                count += 1
    assert count < 4 * (target.shape[0] - 1)
    assert model.loss(source, target, lengths).item() == pytest.approx(total / count, rel=1e-12)
    more = torch.cat((target, torch.zeros(3, 4, dtype=torch.int64)))
    torch.testing.assert_close(
        model.loss(source, more, lengths), model.loss(source, target, lengths), rtol=1e-12, atol=0
    )


def test_dropout_acts_in_training_only() -> None:
    model = make_model(dropout=0.5, encoder_layers=2)
    source, target, lengths = make_batch()
    assert not torch.equal(model(source, target, lengths), model(source, target, lengths))
    model.eval()
    assert torch.equal(model(source, target, lengths), model(source, target, lengths))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model = make_model("lstm", "general", dtype=dtype, encoder_layers=2)
    source, target, lengths = make_batch()
    model.loss(source, target, lengths).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    result = greedy_search(model.eval(), source, lengths, start=START, end=END, max_length=5, need_weights=True)
    assert result.scores.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_lengths_of_any_integer_dtype(dtype: torch.dtype) -> None:
    model = make_model()
    source, target, lengths = make_batch()
    assert torch.equal(model(source, target, lengths.to(dtype)), model(source, target, lengths))
    results = [
        greedy_search(model.eval(), source, given, start=START, end=END, max_length=3)
        for given in (lengths, lengths.to(dtype))
    ]
    assert torch.equal(results[0].scores, results[1].scores)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # no input of the model has a gradient
@pytest.mark.parametrize("batch_first", [False, True])
def test_hooks_see_the_calls_of_the_loss(batch_first: bool) -> None:
    model = make_model(batch_first=batch_first)
    source, target, lengths = make_batch()
    if batch_first:
        source, target = source.t(), target.t()
    expected = model.loss(source, target, lengths)
    expected_gradients = torch.autograd.grad(expected, list(model.parameters()))
    for module in (model, model.decoder, model.decoder.output):
        for register in (
            module.register_forward_hook,
            module.register_forward_pre_hook,
            module.register_full_backward_pre_hook,
        ):
            calls: list[str] = []
            handle = register(lambda module, *_, calls=calls: calls.append(type(module).__name__))  # type: ignore[operator]
            loss = model.loss(source, target, lengths)
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            handle.remove()
            assert calls == [type(module).__name__]
            torch.testing.assert_close(loss, expected)
            torch.testing.assert_close(gradients, expected_gradients)
    seen: list[torch.nn.Module] = []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        torch.testing.assert_close(model.loss(source, target, lengths), expected)
    finally:
        handle.remove()
    assert {model, model.encoder, model.decoder, model.decoder.output} <= set(seen)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_autocast(attention: str) -> None:
    model = make_model("gru", attention, dtype=torch.float32)
    source, target, lengths = make_batch()
    expected = model.loss(source, target, lengths).item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model.loss(source, target, lengths)
        result = greedy_search(model, source, lengths, start=START, end=END, max_length=3)
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=0.02)
    assert result.scores.isfinite().all()
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.float32, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_compiles_without_a_break(attention: str) -> None:
    model = make_model("lstm", attention)
    source, target, lengths = make_batch()
    torch._dynamo.reset()
    expected = model.loss(source, target, lengths)
    actual = torch.compile(model.loss, fullgraph=True, backend="aot_eager")(source, target, lengths)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    parameters = list(model.parameters())
    for a, b in zip(torch.autograd.grad(actual, parameters), torch.autograd.grad(expected, parameters)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_state_dict_round_trip() -> None:
    source, target, lengths = make_batch()
    model, other = make_model("gru", "additive", seed=0), make_model("gru", "additive", seed=1)
    assert not torch.equal(model(source, target, lengths), other(source, target, lengths))
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(model(source, target, lengths), other(source, target, lengths))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cell": "sru"}, "cell"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"vocabulary_size": -1}, "vocabulary_size"),
        ({"num_layers": 0}, "num_layers"),
        ({"dropout": 1.0}, "dropout"),
        ({"dropout": -0.1}, "dropout"),
        ({"padding_index": -1}, "padding_index: expected a symbol from 0 to 8, got -1"),
        ({"padding_index": 9}, "padding_index: expected a symbol from 0 to 8, got 9"),
    ],
    ids=str,
)
def test_bad_constructor_arguments(change: dict, message: str) -> None:
    options = {"vocabulary_size": 9, "embedding_size": 4, "hidden_size": 4} | change
    with pytest.raises(ValueError, match=message):
        Encoder(**options)
    with pytest.raises(ValueError, match=message):
        Decoder(**options, memory_size=8)


@pytest.mark.parametrize("name", ["vocabulary_size", "embedding_size", "hidden_size", "num_layers", "padding_index"])
@pytest.mark.parametrize("value", [True, 2.0, "2", None], ids=repr)
def test_sizes_that_are_no_integers(name: str, value: object) -> None:
    options = {"vocabulary_size": 9, "embedding_size": 4, "hidden_size": 4, name: value}
    with pytest.raises(TypeError, match=f"^{name}: expected an int, got {value!r}$"):
        Encoder(**options)
    with pytest.raises(TypeError, match=f"^{name}: expected an int, got {value!r}$"):
        Decoder(**options, memory_size=8)


def test_bad_attention() -> None:
    with pytest.raises(ValueError, match="alignment_size: expected at least 1, got 0"):
        Decoder(9, 4, 4, 8, attention="additive", alignment_size=0)
    with pytest.raises(ValueError, match=r"attention: expected one of .*got 'local'"):
        Decoder(9, 4, 4, 8, attention="local")
    with pytest.raises(ValueError, match="hidden_size 4 and memory_size 8"):
        Decoder(9, 4, 4, 8, attention="dot")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory_size": 9}, "memory_size 8"),
        ({"hidden_size": 5}, "hidden_size 4"),
        ({"num_layers": 2}, "num_layers 1"),
        ({"batch_first": True}, "batch_first False"),
        ({"cell": "gru"}, "cell 'gru'"),
    ],
    ids=str,
)
def test_encoder_and_decoder_that_do_not_fit(options: dict, message: str) -> None:
    encoder = Encoder(9, 4, 4)
    decoder = Decoder(**({"vocabulary_size": 9, "embedding_size": 4, "hidden_size": 4, "memory_size": 8} | options))
    with pytest.raises(ValueError, match=message):
        Seq2Seq(encoder, decoder)


def test_bad_tensors() -> None:
    model = make_model(dtype=torch.float32)
    source, target, lengths = make_batch()
    with pytest.raises(ValueError, match="source: expected a 2-D tensor, got shape"):
        model(source[0], target)
    with pytest.raises(ValueError, match="tokens: expected a 2-D tensor, got shape"):
        model.encoder(source[None])
    with pytest.raises(ValueError, match="target: expected a 2-D tensor, got shape"):
        model(source, target[0])
    with pytest.raises(RuntimeError, match=r"source: expected int64 or int32, got torch\.float32"):
        model(source.float(), target)
    with pytest.raises(RuntimeError, match="target: expected int64 or int32"):
        model.loss(source, target.float())
    with pytest.raises(ValueError, match="target: expected start and end"):
        model(source, target[:1])
    with pytest.raises(RuntimeError, match=r"target: expected the batch size 4 of source, got shape \[6, 3\]"):
        model(source, target[:, :3])
    with pytest.raises(RuntimeError, match=r"lengths: expected shape \[4\], got \[3\]"):
        model(source, target, lengths[:3])
    with pytest.raises(RuntimeError, match=r"lengths: expected values from 0 to 7, got 1 to 8"):
        model(source, target, lengths + (lengths == 7))
    with pytest.raises(RuntimeError, match="lengths: expected values from 0 to 7, got -1"):
        model(source, target, lengths - 2)
    with pytest.raises(RuntimeError, match=r"lengths: expected an integer dtype, got torch\.float32"):
        model(source, target, lengths.float())
    with pytest.raises(RuntimeError, match=r"lengths: expected an integer dtype, got torch\.bool"):
        model(source, target, lengths > 1)
    with pytest.raises(TypeError, match="lengths: expected a Tensor, got list"):
        model(source, target, lengths.tolist())
    with pytest.raises(TypeError, match="source: expected a Tensor, got list"):
        model(source.tolist(), target)
    with pytest.raises(TypeError, match="target: expected a Tensor, got NoneType"):
        model.loss(source, None)
    with pytest.raises(TypeError, match="tokens: expected a Tensor, got NoneType"):
        model.encoder(None)
    with pytest.raises(IndexError):
        model(source + LETTERS, target)


def test_source_without_tokens() -> None:
    """The same as one whose rows are all empty."""
    model = make_model(dtype=torch.float32)
    source, target, _ = make_batch()
    empty = torch.zeros(source.shape[1], dtype=torch.long)
    torch.testing.assert_close(model(source[:0], target), model(source, target, empty))


def test_bad_arguments_of_the_decoder() -> None:
    model = make_model()
    source, target, lengths = make_batch()
    memory, state = model.encode(source, lengths)
    with pytest.raises(RuntimeError, match="tokens: expected the batch size 4 of memory, got 3"):
        model.decoder(target[:, :3], state, memory)
    with pytest.raises(ValueError, match="tokens: expected a 1-D tensor"):
        model.decoder.step(target, state, memory)
    with pytest.raises(RuntimeError):
        model.decoder.step(target[0], (state[0][:, :3], state[1]), memory)
    with pytest.raises(TypeError, match="tokens: expected a Tensor, got int"):
        model.decoder.step(1, state, memory)
    with pytest.raises(TypeError, match=r"memory: expected what Decoder\.prepare returns, got Tensor"):
        model.decoder(target, state, memory.values)
    with pytest.raises(TypeError, match="memory: expected a Tensor, got Memory"):
        model.decoder.prepare(memory)
    with pytest.raises(TypeError, match="lengths: expected a Tensor, got list"):
        model.decoder.prepare(memory.values.transpose(0, 1), lengths.tolist())
    with pytest.raises(ValueError, match="memory: expected a 3-D tensor, got shape"):
        model.decoder.prepare(memory.values[0])
    with pytest.raises(RuntimeError, match="memory: expected last size 10, got shape"):
        model.decoder.prepare(memory.values[:, :, :4])


def test_nan_in_a_weight_reaches_the_loss() -> None:
    model = make_model()
    source, target, lengths = make_batch()
    with torch.no_grad():
        model.encoder.embedding.weight[int(source[0, 1]), 0] = float("nan")
    assert model.loss(source, target, lengths).isnan()


def test_the_loss_calls_a_forward_of_its_own() -> None:
    model = make_model()
    source, target, lengths = make_batch()
    linear = model.decoder.output.forward
    model.decoder.output.forward = lambda x: 2 * linear(x)  # type: ignore[method-assign]
    logits = model(source, target, lengths).flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, target[1:].flatten(), ignore_index=PADDING)
    torch.testing.assert_close(model.loss(source, target, lengths), expected)


def test_expected_symbols_and_rows_that_do_not_fit_are_refused() -> None:
    model = make_model()
    source, target, lengths = make_batch()
    outputs, state = model.encoder(source, lengths)
    memory = model.decoder.prepare(outputs, lengths)
    symbols = target[:-1]
    with pytest.raises(RuntimeError, match="expected: expected int64 or int32, got"):
        model.decoder.loss(symbols, target[1:].float(), state, memory)
    with pytest.raises(RuntimeError, match="expected: expected the shape"):
        model.decoder.loss(symbols, target, state, memory)
    with pytest.raises(TypeError, match=r"memory: expected what Decoder\.prepare returns"):
        model.decoder.select_rows(outputs, torch.tensor([0]))  # type: ignore[arg-type]
    for rows in (torch.tensor(0), torch.tensor([True]), torch.tensor([0.0])):
        with pytest.raises(RuntimeError, match="rows: expected integers of one dimension"):
            model.decoder.select_rows(memory, rows)
