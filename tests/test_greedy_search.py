"""Greedy search: against brute force with teacher forcing, rows that end, weights, what it learns, bad input."""

import pytest
import torch
from torch import Tensor

from rnnkern.seq2seq import Decoder, Encoder, Seq2Seq, greedy_search, search
from tests.helpers import threads
from tests.seq2seq_models import (
    ATTENTIONS,
    CELLS,
    END,
    LETTERS,
    PADDING,
    PHONES,
    START,
    make_batch,
    make_model,
    teacher_forced,
)


def make_lively(model: Seq2Seq) -> Seq2Seq:
    """Makes the weights large, so that rows say different things."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "recurrent" not in name or model.encoder.cell != "rnn_relu":  # relu would grow without bound
                parameter.mul_(4)
    return model.eval()


def most_scattered_symbol(tokens: Tensor) -> int:
    """Gives the symbol that rows [T, B] meet first at the most different steps: as end symbol it tests the most."""
    first = {
        symbol: {column.index(symbol) for column in tokens.t().tolist() if symbol in column} for symbol in range(PHONES)
    }
    return max(first, key=lambda symbol: len(first[symbol]))


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("cell", CELLS)
def test_greedy_search_equals_argmax_of_teacher_forcing(cell: str, attention: str) -> None:
    model = make_lively(make_model(cell, attention, seed=1))
    S, B, steps = 9, 24, 12
    source = torch.randint(3, LETTERS, (S, B), generator=torch.Generator().manual_seed(5))
    lengths = torch.arange(B) % S + 1
    tokens, logits, _ = teacher_forced(model, source, lengths, steps)
    end = most_scattered_symbol(tokens)
    result = greedy_search(model, source, lengths, start=START, end=end, max_length=steps - 1)
    scores = logits.log_softmax(-1).gather(2, tokens[:, :, None])[:, :, 0]  # [steps, B]
    for row in range(B):
        ends = (tokens[:, row] == end).nonzero().flatten().tolist()
        length = ends[0] if ends else steps - 1
        assert result.lengths[row] == length
        assert bool(result.finished[row]) == bool(ends)
        assert result.tokens[row, :length].tolist() == tokens[:length, row].tolist()
        assert (result.tokens[row, length:] == PADDING).all()
        expected = scores[: length + 1 if ends else length, row].sum().float()
        torch.testing.assert_close(result.scores[row], expected, rtol=1e-5, atol=1e-4)
    assert len(set(result.lengths.tolist())) > 1, "the rows should end at different steps, or this test tests little"
    assert result.tokens.shape == (B, int(result.lengths.max()))


@pytest.mark.parametrize("attention", ATTENTIONS[1:])
def test_attention_weights_of_the_search(attention: str) -> None:
    model = make_model("gru", attention).eval()
    with torch.no_grad():
        model.decoder.output.weight.mul_(8)
    source, _, lengths = make_batch()
    result = greedy_search(model, source, lengths, start=START, end=END, max_length=9, need_weights=True)
    assert result.weights is not None
    assert result.weights.shape == (4, result.tokens.shape[1], 7)
    written = torch.arange(result.tokens.shape[1]) < result.lengths[:, None]  # [B, T]
    assert written.any()
    torch.testing.assert_close(result.weights.sum(2), written.double(), rtol=0, atol=1e-12)
    beyond = torch.arange(7) >= lengths[:, None, None]  # [B, 1, Tk]
    assert (result.weights.masked_select(beyond.expand_as(result.weights)) == 0).all()
    _, _, expected = teacher_forced(model, source, lengths, result.tokens.shape[1])
    expected = expected * written[:, :, None]
    torch.testing.assert_close(result.weights, expected, rtol=0, atol=1e-12)


def test_a_row_does_not_depend_on_rows_that_finish() -> None:
    """Rows leave the batch as they end; those that stay must not notice."""
    model = make_lively(make_model())
    source = torch.randint(3, LETTERS, (7, 16), generator=torch.Generator().manual_seed(2))
    end = most_scattered_symbol(teacher_forced(model, source, None, 20)[0])
    together = greedy_search(model, source, start=START, end=end, max_length=20)
    assert len(set(together.lengths.tolist())) > 2
    for row in range(16):
        alone = greedy_search(model, source[:, row : row + 1], start=START, end=end, max_length=20)
        length = int(together.lengths[row])
        assert alone.tokens[0].tolist() == together.tokens[row, :length].tolist()
        torch.testing.assert_close(alone.scores[0], together.scores[row], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("symbol", [END, 5])
def test_rows_that_end_at_once_or_never(symbol: int) -> None:
    model = make_model().eval()
    with torch.no_grad():
        model.decoder.output.bias[symbol] += 100.0
    source, _, lengths = make_batch()
    result = greedy_search(model, source, lengths, start=START, end=END, max_length=4, need_weights=True)
    ended = symbol == END
    assert result.finished.tolist() == [ended] * 4
    assert result.tokens.tolist() == ([[]] * 4 if ended else [[5] * 4] * 4)
    assert result.weights is not None
    assert result.weights.shape == (4, 0 if ended else 4, 7)


def test_max_length() -> None:
    model = make_model().eval()
    source, _, lengths = make_batch()
    with torch.no_grad():
        model.decoder.output.bias[END] -= 100.0
    for max_length in (0, 1, 5):
        result = greedy_search(model, source, lengths, start=START, end=END, max_length=max_length)
        assert result.tokens.shape == (4, max_length)
        assert result.lengths.tolist() == [max_length] * 4
        assert not result.finished.any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_a_row_comes_to_after_its_end_does_not_count(bad: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that has ended stays in the batch until others have, too."""
    model = make_model().eval()
    source, _, lengths = make_batch()
    steps = 0

    def step(tokens: Tensor, state: object, memory: object, *, need_weights: bool) -> tuple[Tensor, object, None]:
        nonlocal steps
        logits = torch.zeros(len(tokens), PHONES)
        logits[:, 5] = 1  # all would write this
        if steps == 0:
            logits[2, END] = 2
        else:
            logits[2] = bad
        steps += 1
        return logits, state, None

    monkeypatch.setattr(model.decoder, "step", step)
    result = greedy_search(model, source, lengths, start=START, end=END, max_length=3)
    assert steps == 4
    assert result.lengths.tolist() == [3, 3, 0, 3]
    assert result.finished.tolist() == [False, False, True, False]
    writing = torch.zeros(PHONES)
    writing[5] = 1
    ending = writing.clone()
    ending[END] = 2
    score = 3 * writing.log_softmax(0)[5]
    torch.testing.assert_close(result.scores, torch.stack([score, score, ending.log_softmax(0)[END], score]))


def test_search_leaves_mode_and_gradients_alone() -> None:
    model = make_model()
    source, _, lengths = make_batch()
    result = greedy_search(model, source, lengths, start=START, end=END, max_length=3)
    assert model.training
    assert not result.scores.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


def test_keys_are_projected_once_per_source(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model().eval()
    with torch.no_grad():
        model.decoder.output.bias[END] -= 100.0
    calls = []
    project = model.decoder.attention.project_keys
    monkeypatch.setattr(model.decoder.attention, "project_keys", lambda *a, **k: (calls.append(1), project(*a, **k))[1])
    source, _, lengths = make_batch()
    greedy_search(model, source, lengths, start=START, end=END, max_length=6)
    assert len(calls) == 1


@pytest.mark.parametrize("attention", ["general", "additive"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_learns_to_reverse(cell: str, attention: str) -> None:
    with threads(1):
        check_learns_to_reverse(cell, attention)


def check_learns_to_reverse(cell: str, attention: str) -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    encoder = Encoder(8, 16, 24, cell=cell)
    model = Seq2Seq(encoder, Decoder(8, 16, 24, encoder.memory_size, cell=cell, attention=attention))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    rows = torch.randint(3, 8, (64, 4), generator=generator)  # [B, 4]
    source = rows.t().contiguous()
    target = torch.cat((torch.full((1, 64), START), rows.flip(1).t(), torch.full((1, 64), END)))
    first = model.loss(source, target).item()
    for _ in range(120):
        optimizer.zero_grad()
        loss = model.loss(source, target)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1 * first
    result = greedy_search(model.eval(), source, start=START, end=END, max_length=8)
    right = [row[:n].tolist() == row_in.flip(0).tolist() for row, n, row_in in zip(result.tokens, result.lengths, rows)]
    assert sum(right) >= 58


def test_bad_arguments_of_the_search() -> None:
    source, _, lengths = make_batch()
    options = {"start": START, "end": END, "max_length": 3}
    for change, message in (
        ({"max_length": -1}, "max_length: expected at least 0, got -1"),
        ({"start": PHONES}, "start: expected a symbol from 0 to 12, got 13"),
        ({"end": -1}, "end: expected a symbol"),
    ):
        with pytest.raises(ValueError, match=message):
            greedy_search(make_model(), source, lengths, **(options | change))
    for name, value in (("start", 1.0), ("start", True), ("end", None), ("end", torch.tensor(2)), ("max_length", 3.0)):
        with pytest.raises(TypeError, match=f"^{name}: expected an int, got "):
            greedy_search(make_model(), source, lengths, **(options | {name: value}))
    with pytest.raises(TypeError, match="lengths: expected a Tensor, got list"):
        greedy_search(make_model(), source, lengths.tolist(), **options)
    with pytest.raises(ValueError, match="need_weights"):
        greedy_search(make_model(attention="none"), source, lengths, **options, need_weights=True)
    with pytest.raises(ValueError, match="tokens: expected a 2-D tensor"):
        greedy_search(make_model(), source[0], **options)


@pytest.mark.parametrize("steps", [3, 8, 100])
def test_looking_seldom_finds_the_same(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where ended rows stay in the batch for some steps."""
    model = make_lively(make_model("gru", seed=1))
    source = torch.randint(3, LETTERS, (9, 24), generator=torch.Generator().manual_seed(5))
    lengths = torch.arange(24) % 9 + 1
    end = most_scattered_symbol(teacher_forced(model, source, lengths, 12)[0])
    found = []
    for between in (1, steps):
        monkeypatch.setattr(search, "_steps_between_looks", lambda device, between=between: between)
        found.append(greedy_search(model, source, lengths, start=START, end=end, max_length=11, need_weights=True))
    assert len(set(found[0].lengths.tolist())) > 1
    for before, after in zip(found[0], found[1], strict=True):
        torch.testing.assert_close(after, before)


@pytest.mark.parametrize("cell", CELLS)
def test_weights_under_autocast(cell: str) -> None:
    """Those of a GRU come in another dtype than what its encoder gives."""
    source, _, lengths = make_batch()
    model = make_model(cell, dtype=torch.float32).eval()
    with torch.autocast("cpu", torch.bfloat16):
        result = greedy_search(model, source, lengths, start=START, end=END, max_length=4, need_weights=True)
    assert result.weights is not None
    torch.testing.assert_close(result.weights[0, 0].float().sum(), torch.tensor(1.0), rtol=0, atol=0.02)
