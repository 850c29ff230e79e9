"""Real programs, unmodified or accelerated: they give what they gave. `make programs` installs and runs them.

Each prints how many times faster it was; no time is asserted.
"""

import importlib.util
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rnnkern
from tests.helpers import needs_kernels

pytestmark = [needs_kernels, pytest.mark.filterwarnings("default")]


def tell_ratio(name: str, before: Callable[[], Any], after: Callable[[], Any], rounds: int = 5) -> None:
    """Prints the median of the ratios of paired times."""
    ratios = []
    for _ in range(rounds):
        times = []
        for run in (before, after):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        ratios.append(times[0] / times[1])
    print(f"\n{name}: {statistics.median(ratios):.2f} times as fast ({min(ratios):.2f} to {max(ratios):.2f})")


def enabled(run: Callable[[], Any]) -> Callable[[], Any]:
    def inside() -> Any:
        with rnnkern.enable():
            return run()

    return inside


def test_silero_vad() -> None:
    """A streaming voice activity detector as a TorchScript file: every probability of every chunk."""
    found = importlib.util.find_spec("silero_vad")
    if found is None or not found.submodule_search_locations:
        pytest.skip("silero-vad is not installed")
    model = torch.jit.load(Path(found.submodule_search_locations[0]) / "data" / "silero_vad.jit")
    model.eval()
    seconds = torch.arange(2 * 16000) / 16000
    voice = sum(torch.sin(2 * torch.pi * 140 * k * seconds) / k for k in range(1, 20)) * (seconds % 0.7 < 0.4)
    chunks = (0.1 * voice + 0.01 * torch.randn_like(seconds)).split(512)[:62]

    def listen() -> Tensor:
        model.reset_states()
        with torch.inference_mode():
            return torch.cat([model(chunk.unsqueeze(0), 16000) for chunk in chunks])

    listen()  # TorchScript optimizes during its first calls
    expected = listen()
    with rnnkern.enable():
        told = rnnkern.explain(listen)
        torch.testing.assert_close(listen(), expected, rtol=1e-4, atol=1e-5)
    assert {note.backend for note in told.layers} == {"cpu"}
    assert expected.max() - expected.min() > 0.05
    assert torch.equal(listen(), expected)
    tell_ratio("silero-vad, enable()", listen, enabled(listen))


def test_recurrent_ppo() -> None:
    """A recurrent policy learns CartPole: the same actions, rollout by rollout, and the same weights after."""
    sb3 = pytest.importorskip("sb3_contrib")
    callbacks = pytest.importorskip("stable_baselines3.common.callbacks")

    class Actions(callbacks.BaseCallback):
        def _on_training_start(self) -> None:
            self.seen: list[Tensor] = []

        def _on_step(self) -> bool:
            self.seen.append(torch.as_tensor(self.locals["actions"]).clone())
            return True

    def learn(accelerate: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
        agent = sb3.RecurrentPPO("MlpLstmPolicy", "CartPole-v1", n_steps=64, n_epochs=4, seed=0, device="cpu")
        if accelerate:
            assert len(rnnkern.accelerate(agent.policy).swapped) == 2
        actions = Actions()
        agent.learn(128, callback=actions)
        return torch.cat(actions.seen), agent.policy.state_dict()

    actions, weights = learn()
    assert 0 < actions.sum() < len(actions)
    for run in (lambda: learn(accelerate=True), enabled(learn)):
        its_actions, its_weights = run()
        assert torch.equal(its_actions, actions)
        torch.testing.assert_close(its_weights, weights, rtol=1e-3, atol=1e-4)
    tell_ratio("RecurrentPPO on CartPole, accelerate()", learn, lambda: learn(accelerate=True), rounds=3)
    tell_ratio("RecurrentPPO on CartPole, enable()", learn, enabled(learn), rounds=3)


class _Last(torch.nn.Module):
    """A layer, and a prediction from its last output."""

    def __init__(self, rnn: torch.nn.Module) -> None:
        super().__init__()
        self.rnn = rnn
        self.head = torch.nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        output = self.rnn(x)
        return self.head((output if isinstance(output, Tensor) else output[0])[:, -1])


class _Output(rnnkern.nn.LSTM):
    """An LSTM that gives one tensor, as Opacus wants of a layer for which it has no rule of its own."""

    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(input)[0]


def test_opacus() -> None:
    """Gradients of each sample by its hooks: those of the samples one by one."""
    opacus = pytest.importorskip("opacus")
    layers = pytest.importorskip("opacus.layers")
    model, x = _Last(torch.nn.LSTM(8, 16, batch_first=True)), torch.randn(12, 10, 8)
    replaced, private = _Last(_Output(8, 16, batch_first=True)), _Last(layers.DPLSTM(8, 16, batch_first=True))
    replaced.load_state_dict(model.state_dict())
    private.rnn.load_state_dict(model.rnn.state_dict())  # which knows torch's names
    private.head.load_state_dict(model.head.state_dict())

    def single(sample: Tensor) -> dict[str, Tensor]:
        model.zero_grad()
        model(sample.unsqueeze(0)).pow(2).sum().backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    one_by_one = [single(sample) for sample in x]
    ours, theirs = (
        opacus.GradSampleModule(module, batch_first=True, loss_reduction="sum") for module in (replaced, private)
    )

    def backward(module: Any) -> dict[str, Tensor]:
        module.zero_grad()
        module(x).pow(2).sum().backward()
        return {name.removeprefix("_module."): p.grad_sample for name, p in module.named_parameters()}

    found, its = backward(ours), backward(theirs)
    for name in one_by_one[0]:
        expected = torch.stack([gradients[name] for gradients in one_by_one])
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["head.weight"], its["head.weight"], rtol=1e-4, atol=1e-5)
    tell_ratio("Opacus, ours against its DPLSTM", lambda: backward(theirs), lambda: backward(ours))


def test_lightning() -> None:
    """A forecast of a series, trained by Lightning: the same losses and weights."""
    lightning = pytest.importorskip("lightning")
    series = torch.sin(torch.arange(2000) / 7) + torch.sin(torch.arange(2000) / 17)
    windows = series.unfold(0, 33, 8)[:, :, None]

    class Forecast(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = _Last(torch.nn.GRU(1, 16, num_layers=2, dropout=0.1, batch_first=True))
            self.losses: list[float] = []

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            loss = (self.model(batch[:, :-1]) - batch[:, -1]).pow(2).mean()
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=1e-2)

    def fit(accelerate: bool = False) -> tuple[list[float], dict[str, Tensor]]:
        torch.manual_seed(0)
        module = Forecast()
        if accelerate:
            assert len(rnnkern.accelerate(module).swapped) == 1
        trainer = lightning.Trainer(
            accelerator="cpu",
            max_epochs=3,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, torch.utils.data.DataLoader(list(windows), batch_size=32, shuffle=True))
        return module.losses, module.state_dict()

    losses, weights = fit()
    assert losses[-1] < 0.5 * losses[0]
    for run in (lambda: fit(accelerate=True), enabled(fit)):
        its_losses, its_weights = run()
        torch.testing.assert_close(its_losses, losses, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(its_weights, weights, rtol=1e-2, atol=1e-3)
    tell_ratio("Lightning, GRU forecast, accelerate()", fit, lambda: fit(accelerate=True), rounds=3)
    tell_ratio("Lightning, GRU forecast, enable()", fit, enabled(fit), rounds=3)
