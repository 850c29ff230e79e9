"""What tests/test_parallel.py runs in two processes: `python -m tests.parallel_checks RANK FOLDER CHECK...`.

Each check runs in both processes at once and compares with the same computation in one. What comes of it is written to
FOLDER/CHECK.RANK: nothing, or the traceback.
"""

import contextlib
import copy
import datetime
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import rnnkern
from rnnkern import _enable

WORLD = 2
PATIENCE = datetime.timedelta(minutes=5)  # on a busy machine; a check that fails in one process alone takes as long
T, B, I, H = 5, 4, 3, 6


class Model(nn.Module):
    """Every kind of module that has parameters, one after another."""

    def __init__(self, recompute: bool | None = None) -> None:
        super().__init__()
        self.lstm = rnnkern.nn.LSTM(I, H, num_layers=2, bidirectional=True)
        self.projected = rnnkern.nn.LSTM(2 * H, H, proj_size=4)
        self.gru = rnnkern.nn.GRU(4, H, batch_first=True)
        self.rnn = rnnkern.nn.RNN(H, H, nonlinearity="relu", bias=False)
        self.attention = rnnkern.nn.AdditiveAttention(H, H, 5)
        self.lstm_cell = rnnkern.nn.LSTMCell(H, H)
        self.gru_cell = rnnkern.nn.GRUCell(H, H)
        self.rnn_cell = rnnkern.nn.RNNCell(H, H)
        self.recompute = recompute  # None, or use_reentrant of torch.utils.checkpoint

    def call(self, module: Callable[..., Any], *args: Tensor) -> Any:
        if self.recompute is None:
            return module(*args)
        return checkpoint(module, *args, use_reentrant=self.recompute)

    def forward(self, x: Tensor) -> Tensor:  # [T, B, I] -> [B, H]
        y, _ = self.call(self.lstm, x)
        y, _ = self.call(self.projected, y)
        y, h_n = self.call(self.gru, y.transpose(0, 1))
        y, _ = self.call(self.rnn, y.transpose(0, 1))
        context, _ = self.call(self.attention, h_n[0].unsqueeze(1), y.transpose(0, 1), y.transpose(0, 1))
        h = c = context.squeeze(1)
        # FSDP2 loses gradients of what reentrant checkpoints call twice, of torch.nn's modules too.
        for x_t in y[: 1 if self.recompute else 2]:
            # Reentrant checkpoints know of no tensors within a tuple.
            h, c = self.call(lambda x, h, c: self.lstm_cell(x, (h, c)), x_t, h, c)
            h = self.call(self.rnn_cell, x_t, self.call(self.gru_cell, x_t, h))
        return h


def make_model(seed: int = 0, **options: Any) -> Model:
    torch.manual_seed(seed)
    return Model(**options).double()


def batch(seed: int = 1) -> Tensor:
    return torch.randn(T, B, I, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def mine(x: Tensor) -> Tensor:
    """The rows of this process."""
    return x.chunk(WORLD, dim=1)[dist.get_rank()]


def loss(y: Tensor) -> Tensor:
    return y.square().sum()


def gradients(model: nn.Module, *inputs: Tensor) -> dict[str, Tensor]:
    """Those of the whole batch in one process, where the loss is the mean of what the processes would have."""
    model.zero_grad()
    for x in inputs:
        (loss(model(x)) / WORLD).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def shard(model: nn.Module, **options: Any) -> nn.Module:
    mesh = init_device_mesh("cpu", (WORLD,))
    for module in model.children():
        fully_shard(module, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def full(tensor: Tensor | None) -> Tensor | None:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_gradients(model: nn.Module, expected: dict[str, Tensor]) -> None:
    found = {name.removeprefix("module."): full(p.grad) for name, p in model.named_parameters()}
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(found[name], gradient, msg=lambda message, name=name: f"{name}: {message}")


def assert_backwards(model: nn.Module) -> None:
    """One backward after the other gives the gradients of one process."""
    x = batch()
    expected = gradients(make_model(), x)
    for _ in range(2):
        model.zero_grad()
        loss(model(mine(x))).backward()
        assert_gradients(model, expected)


def assert_same_outputs(model: nn.Module, alone: nn.Module) -> None:
    """Calls without gradients give this process's rows of what one process computes."""
    x = batch()
    with torch.no_grad():
        for _ in range(3):  # in eval mode the weights are packed in the last
            torch.testing.assert_close(model(mine(x)), alone(x).chunk(WORLD)[dist.get_rank()])


def assert_trains(model: nn.Module, alone: nn.Module) -> None:
    """After every step of Adam both compute the same."""
    x = batch()
    ours, theirs = (torch.optim.Adam(m.parameters(), lr=0.01) for m in (model, alone))
    for _ in range(3):
        ours.zero_grad()
        loss(model(mine(x))).backward()
        ours.step()
        gradients(alone, x)
        theirs.step()
        assert_same_outputs(model, alone)


def assert_checkpointing(distribute: Callable[[nn.Module, bool], nn.Module]) -> None:
    """So does a backward that runs the modules again; `distribute` takes a model and use_reentrant."""
    x = batch().requires_grad_()
    for reentrant in (False, True):
        expected = gradients(make_model(recompute=reentrant), x)
        model = distribute(make_model(recompute=reentrant), reentrant)
        loss(model(mine(x))).backward()
        assert_gradients(model, expected)


CHECKS: dict[str, Callable[[Path], None]] = {}


def check(function: Callable[[Path], None]) -> Callable[[Path], None]:
    CHECKS[function.__name__] = function
    return function


@check
def ddp(_: Path) -> None:
    assert_backwards(DistributedDataParallel(make_model()))


@check
def ddp_trains(_: Path) -> None:
    alone, model = make_model(), DistributedDataParallel(make_model())
    assert_trains(model, alone)
    assert_same_outputs(model.eval(), alone.eval())


@check
def ddp_no_sync(_: Path) -> None:
    inputs = batch(1), batch(2)
    expected = gradients(make_model(), *inputs)
    model = DistributedDataParallel(make_model())
    with model.no_sync():
        loss(model(mine(inputs[0]))).backward()
    local = next(model.parameters()).grad.clone()
    dist.broadcast(local, src=0)
    assert torch.equal(local, next(model.parameters()).grad) == (dist.get_rank() == 0)  # nothing was exchanged
    loss(model(mine(inputs[1]))).backward()
    assert_gradients(model, expected)


@check
def ddp_checkpointing(_: Path) -> None:
    # DDP wants to know that the graph is static, or reentrant backward marks what is used twice as ready twice.
    assert_checkpointing(lambda model, reentrant: DistributedDataParallel(model, static_graph=reentrant))


@check
def fsdp(_: Path) -> None:
    for reshard in (True, False):
        model = shard(make_model(), reshard_after_forward=reshard)
        assert all(isinstance(p, DTensor) for p in model.parameters())
        assert_backwards(model)


@check
def fsdp_no_sync(_: Path) -> None:
    inputs = batch(1), batch(2)
    expected = gradients(make_model(), *inputs)
    model = shard(make_model())
    model.set_requires_gradient_sync(False)
    loss(model(mine(inputs[0]))).backward()
    model.set_requires_gradient_sync(True)
    loss(model(mine(inputs[1]))).backward()
    assert_gradients(model, expected)


@check
def fsdp_checkpointing(_: Path) -> None:
    assert_checkpointing(lambda model, _: shard(model))


@check
def fsdp_trains(_: Path) -> None:
    """Between calls FSDP frees the gathered weights; packs made of them must not outlive an update."""
    alone, model = make_model(), shard(make_model())
    assert_trains(model, alone)
    assert_trains(model.eval(), alone.eval())
    for seed in (3, 4):  # without a call in training mode between
        other = make_model(seed).eval()
        with torch.no_grad():
            for p, value in zip(model.parameters(), other.parameters()):
                local = DTensor.from_local(value.detach(), p.device_mesh).redistribute(placements=p.placements)
                p.copy_(local)
        assert_same_outputs(model, other)


def change_row(model: nn.Module, peer: nn.Module, row: int) -> None:
    """Changes a row of the first weight of both, less than a sample of its elements need show."""
    with torch.no_grad():
        next(peer.parameters())[row] += 1
        for p, value in zip(model.parameters(), peer.parameters()):
            local = DTensor.from_local(value.detach(), p.device_mesh).redistribute(placements=p.placements)
            p.copy_(local)


def assert_rows_are_seen(model: FSDPModule, peer: nn.Module, x: Tensor) -> None:
    """Torch.nn's `peer` in one process tells what a model has to give that is gathered anew after every change."""
    for row in range(5):
        with torch.no_grad():
            for _ in range(4):
                model(x)
            model.reshard()
            change_row(model, peer, row)
            for found, expected in zip(tree_leaves(model(x)), tree_leaves(peer(x)), strict=True):
                torch.testing.assert_close(found, expected)


@check
def fsdp_packs_nothing(_: Path) -> None:
    """What it gathers next may lie where the last lay, in the same storage, and have the same version."""
    for kind in ("LSTM", "GRUCell"):
        for reshard in (True, False):
            torch.manual_seed(0)
            peer = getattr(nn, kind)(32, 256).eval()
            model = getattr(rnnkern.nn, kind)(32, 256).eval()
            model.load_state_dict(peer.state_dict())
            x = torch.randn(B, 32) if kind == "GRUCell" else torch.randn(3, B, 32)
            with torch.no_grad():
                for _ in range(4):
                    model(x)
            assert model._packs.short is not None  # in one process they are packed
            fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)), reshard_after_forward=reshard)
            assert_rows_are_seen(model, peer, x)
            assert not model._packs._entries


@check
def fsdp_packs_nothing_with_enable(_: Path) -> None:
    torch.manual_seed(0)
    peer = nn.LSTM(32, 256).eval()
    model = copy.deepcopy(peer)
    fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)), reshard_after_forward=False)
    with rnnkern.enable():
        assert_rows_are_seen(model, peer, torch.randn(3, B, 32))
        assert not _enable._switch._known["lstm"][0]  # nothing is kept of weights


@check
def fsdp_and_accelerate(_: Path) -> None:
    mesh, model = init_device_mesh("cpu", (WORLD,)), nn.Sequential(nn.LSTM(I, H), nn.LSTM(I, H))
    fully_shard(model[0], mesh=mesh)
    report = rnnkern.accelerate(model)
    assert [note.path for note in report.swapped] == ["1"]
    assert [note.why for note in report.left] == ["weight_ih_l0 is a DTensor"]
    fully_shard(model[1], mesh=mesh)
    assert rnnkern.accelerate(model).already == report.swapped
    try:
        rnnkern.restore(model)
    except RuntimeError as error:
        assert "class was replaced" in str(error)  # noqa: PT017, no pytest here
    else:
        raise AssertionError("restore passed over a sharded module")


@check
def fsdp_mixed_precision(_: Path) -> None:
    x = batch().float()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.float32)
    plain = make_model().float()
    expected = gradients(plain, x)
    model = shard(make_model().float(), mp_policy=policy)
    y = model(mine(x))
    torch.testing.assert_close(y, plain(mine(x)), rtol=0.05, atol=0.02)
    loss(y).backward()
    found = {name: full(p.grad) for name, p in model.named_parameters()}
    assert all(gradient.dtype == torch.float32 for gradient in found.values())
    error, size = (
        torch.cat([gradient.flatten() for gradient in gradients]).norm()
        for gradients in ([found[name] - expected[name] for name in expected], expected.values())
    )
    assert error < 0.05 * size


@check
def fsdp_step(_: Path) -> None:
    """`step` is another method than the call: FSDP has to be told of it, as of any."""
    torch.manual_seed(0)
    alone = rnnkern.nn.LSTM(I, H, num_layers=2).eval()
    model = copy.deepcopy(alone)
    fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)))
    register_fsdp_forward_method(model, "step")
    x, state, expected = batch()[0].float(), None, None
    with torch.no_grad():
        for _ in range(4):
            y, state = model.step(x, state)
            y_alone, expected = alone.step(x, expected)
            assert torch.equal(y, y_alone)


@check
def distributed_checkpoint(folder: Path) -> None:
    """What FSDP saves, one process, DDP and FSDP load."""
    x, source = batch(), shard(make_model(seed=5))
    dcp.save(get_model_state_dict(source), checkpoint_id=folder / "saved")
    plain = make_model(seed=5).eval()
    with torch.no_grad():
        expected = plain(mine(x))
        for wrap in (lambda m: m, DistributedDataParallel, shard):
            model = wrap(make_model(seed=6)).eval()
            for _ in range(3):  # and what the weights were packed to is not used any more
                assert not torch.equal(model(mine(x)), expected)
            state = get_model_state_dict(model)
            assert set(state) == set(plain.state_dict())
            dcp.load(state, checkpoint_id=folder / "saved")
            set_model_state_dict(model, state)
            for _ in range(3):
                assert torch.equal(model(mine(x)), expected)


@contextlib.contextmanager
def group(rank: int, folder: Path) -> Iterator[None]:
    store = dist.FileStore(str(folder / "store"), WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()


def main(rank: int, folder: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    with group(rank, folder):
        for name in names:
            try:
                CHECKS[name](folder)
                outcome = ""
            except Exception:
                outcome = traceback.format_exc()
            (folder / f"{name}.{rank}").write_text(outcome)
            dist.barrier()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:] or list(CHECKS))
