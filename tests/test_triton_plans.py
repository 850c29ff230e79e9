"""How Triton's engines cut a layer, what would be compiled for it, and the gate on what that needs."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import rnnkern
from rnnkern import triton as kernels
from rnnkern.cells import CELLS
from rnnkern.ops._dispatch import TRITON_ENGINES
from rnnkern.ops.products import widens
from rnnkern.triton import config, launch
from rnnkern.triton.config import Facts
from tests.triton_launches import specialized

H100 = Facts("cuda", 132, 232448)
MI300 = Facts("hip", 304, 65536)


def plan(cell: str, H: int, B: int = 16, D: int = 1, dtype: torch.dtype = torch.bfloat16, facts: Facts = H100) -> str:
    return config.plan(cell, dtype, H, B, D, "", False, facts).engine


def test_every_cell_has_kernels() -> None:
    assert set(CELLS) == kernels.CELLS


def test_the_engine_follows_from_what_fits() -> None:
    assert [plan("lstm", H) for H in (1, 100, 128, 129, 1024, 1600)] == ["resident"] * 3 + ["grid"] * 2 + ["stepwise"]
    assert [plan("lstm", H, dtype=torch.float32) for H in (64, 128, 1024)] == ["resident", "grid", "stepwise"]
    assert plan("lstm", 64, dtype=torch.float64) == "stepwise"
    assert [plan("lstm", H, facts=MI300) for H in (64, 128, 1024)] == ["resident", "grid", "grid"]
    assert plan("lstm", 64, facts=Facts("xpu", 64, 65536)) == "stepwise"
    small = {H: plan("lstm", H, facts=Facts("cuda", 128, 101376)) for H in (64, 65, 640, 641)}
    assert list(small.values()) == ["resident", "grid", "grid", "stepwise"]


def test_a_grid_runs_at_once_or_not_at_all() -> None:
    assert plan("lstm", 1024, B=32) == "grid"
    assert plan("lstm", 1024, B=33) == plan("lstm", 1024, B=32, D=2) == "stepwise"
    with pytest.raises(RuntimeError, match=r"the grid engine cannot run: 192 programs must run at once"):
        config.plan("lstm", torch.bfloat16, 1024, 33, 1, "grid", False, H100)


def test_large_batches_of_16_bits_have_larger_programs() -> None:
    def rows(B: int, dtype: torch.dtype, tf32: bool = False, H: int = 64) -> int:
        return config.plan("lstm", dtype, H, B, 1, "resident", tf32, H100).rows

    assert [rows(B, torch.bfloat16) for B in (16, 4224, 4225)] == [16, 16, 32]
    assert rows(4225, torch.float32) == rows(4225, torch.float32, tf32=True) == 16
    assert rows(4225, torch.bfloat16, H=128) == 16


def test_amd_launches_each_step_of_a_grid() -> None:
    def found(facts: Facts) -> config.Plan:
        return config.plan("lstm", torch.bfloat16, 1024, 16, 1, "", False, facts)

    assert found(H100).cooperative
    assert str(found(MI300)) == "grid, 16 rows x 16 units, 4 warps, a launch per step"


def test_slices_pad_the_sum_least() -> None:
    for H, size in ((512, 64), (640, 16), (768, 32), (1024, 64), (100, 16), (1168, 32), (1296, 64)):
        found = config.plan("gru", torch.bfloat16, H, 16, 1, "grid", False, H100)
        assert found.slice_size == size


def test_slices_of_float32_follow_the_pass() -> None:
    """By which it spills least; both passes have room where one has."""

    def found(backward: bool, H: int) -> config.Plan:
        return config.plan("lstm", torch.float32, H, 16, 1, "", False, H100, backward)

    assert [(found(b, 256).engine, found(b, 256).slice_size) for b in (False, True)] == [("grid", 16), ("grid", 32)]
    assert all(found(False, H).engine == found(True, H).engine for H in range(1, 600))


def test_a_refused_cooperative_launch_is_explained() -> None:
    class Refused:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            raise RuntimeError("Triton Error [CUDA]: too many blocks in cooperative launch")

    with pytest.raises(RuntimeError, match=r"refuses to run 6 programs.*engine=\"stepwise\""):
        launch.launch(Refused(), (2, 3))


def test_products_that_widen_are_for_nvidia(monkeypatch: pytest.MonkeyPatch) -> None:
    def on(gpu: bool) -> bool:
        return widens(SimpleNamespace(is_cuda=gpu))  # type: ignore[arg-type]

    monkeypatch.setattr(torch.version, "hip", None)
    assert (on(gpu=True), on(gpu=False)) == (True, False)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert not on(gpu=True)


def test_tf32_follows_the_setting() -> None:
    assert config.precision(H100, torch.float32, True) == "tf32"
    assert config.precision(H100, torch.float32, False) == "tf32x3"
    assert config.precision(MI300, torch.float32, True) == config.precision(H100, torch.float16, True) == "ieee"


def test_which_interpreters_run_with_which_numpy() -> None:
    for version, numpy in (("3.6.0", "1.26.4"), ("3.6.0", "2.3.5"), ("3.7.0", "2.4.0"), ("3.10.0", "2.10.0")):
        assert not kernels.interpreter_refusal(version, numpy)
    for numpy in ("2.4.0", "2.10.0rc1", "3.0.0"):
        why = kernels.interpreter_refusal("3.6.1", numpy)
        assert why == f"the interpreter of Triton 3.6.1 needs NumPy before 2.4, this is {numpy}"


@pytest.mark.skipif(bool(kernels.missing_on("cpu")), reason=kernels.missing_on("cpu"))
def test_explain_tells_the_engine() -> None:
    gru, x = rnnkern.nn.GRU(3, 40), torch.zeros(2, 3, 3)
    for engine in TRITON_ENGINES:
        with rnnkern.backend("triton", engine=engine), torch.no_grad():
            (note,) = rnnkern.explain(gru, x).layers
        assert note.backend == "triton"
        assert note.engine.startswith(engine)
    why = "float64 is for the stepwise engine"
    with rnnkern.backend("triton", engine="grid"), pytest.raises(rnnkern.BackendUnavailable, match=why):
        gru.double()(x.double())


@pytest.mark.skipif(not kernels.available, reason=kernels.reason)
def test_a_new_length_or_batch_compiles_nothing() -> None:
    """In a process of its own, where kernels are compiled and not interpreted."""
    program = """
import torch, triton
from rnnkern.cells import CELLS
from rnnkern.ops._dispatch import TRITON_ENGINES
from rnnkern.triton import compile
from rnnkern.triton.launch import recording

for engine in TRITON_ENGINES:
    for cell in CELLS:
        seen = set()
        for T, B in ((2, 16), (1, 1), (16, 2), (33, 7), (64, 3), (2, 31)):
            with recording(compile.TARGETS["sm_90"].facts) as launches:
                compile.run_layer(cell, torch.bfloat16, engine, 36, B, 1, False, T)
            for launch in launches:
                assert launch.constants["enable_fp_fusion"]
                seen.add((launch.kernel.fn.__module__, launch.kernel.fn.__name__, repr(compile.describe(launch))))
                for parameter, value in zip(launch.kernel.params, launch.arguments):
                    assert not isinstance(value, int) or parameter.do_not_specialize, parameter.name
        assert len(seen) == 3, (engine, cell, len(seen))  # forward, backward and what finds h before each step
"""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr


@pytest.mark.skipif(bool(kernels.missing_on("cpu")), reason=kernels.missing_on("cpu"))
@pytest.mark.parametrize("engine", TRITON_ENGINES)
def test_slices_of_a_batch_compile_nothing(engine: str) -> None:
    """Wherever states of a layer, resets of a few steps and a gradient begin in memory: a row has 72 bytes here."""
    from rnnkern.triton.launch import recording

    H, T, dtype = 36, 5, torch.float16
    module = rnnkern.nn.LSTM(8, H, num_layers=2, dtype=dtype, checkpoint_every=2)

    def compiled_for(B: int) -> set[str]:
        x, resets = torch.zeros(T, B, 8, dtype=dtype), torch.zeros(T, B, dtype=torch.bool)
        states = torch.zeros(2, B, H, dtype=dtype), torch.zeros(2, B, H, dtype=dtype)
        with rnnkern.backend("triton", engine=engine), recording(H100) as launches:
            y, _ = module(x, states, resets=resets)
            torch.cat((torch.zeros(1, B, H, dtype=dtype), y)).square().sum().backward()
        return {repr(specialized(launch)) for launch in launches}

    expected = compiled_for(16)
    assert all(compiled_for(B) == expected for B in (1, 2, 3, 17))


@pytest.mark.skipif(not kernels.available, reason=kernels.reason)
def test_every_kernel_is_recorded_and_no_other() -> None:
    """By each version of Triton that has a part of resources.json."""
    from rnnkern.triton import compile

    wanted = {
        (name, target)
        for case in compile.cases()
        for target, gpu in compile.TARGETS.items()
        for name in compile.launches_of(case, gpu)
    }
    for version, of in json.loads(compile.BASELINE.read_text()).items():
        recorded = {(name, target) for name, targets in of.items() for target in targets}
        assert recorded == wanted, version


@pytest.mark.skipif(not kernels.available, reason=kernels.reason)
def test_the_gate_finds_regressions(tmp_path: Path) -> None:
    from rnnkern.triton.compile import Resources, regressions, save

    recorded = {"same": {"sm_90": [40, 1000, 0]}}
    save({"3.9.0": recorded, "3.6.0": {}}, tmp_path / "resources.json")

    def found(*numbers: int, name: str = "same", whole: bool = True) -> list[str]:
        return regressions({name: {"sm_90": Resources(*numbers)}}, recorded, whole)

    assert found(40, 1000, 0) == found(48, 900, 0) == []
    assert found(49, 1000, 0) == ["same on sm_90: 49 registers, 40 before"]
    assert found(40, 1001, 8) == [
        "same on sm_90: spills 8 bytes, 0 before",
        "same on sm_90: 1001 bytes of shared memory, 1000 before",
    ]
    assert found(40, 232449, 0)[0] == "same on sm_90: 232449 bytes of shared memory, there are 232448"
    assert found(40, 0, 0, name="other") == ["same: gone", "other on sm_90: new"]
    assert found(40, 0, 0, name="other", whole=False) == ["other on sm_90: new"]


@pytest.mark.skipif(not kernels.available, reason=kernels.reason)
def test_the_gate_never_passes_unasked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A Triton that is not recorded is compared with the newest that is; without Triton nothing passes."""
    import triton

    from rnnkern.triton import compile
    from rnnkern.triton.compile import Resources

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compile, "BASELINE", tmp_path / "resources.json")
    compile.save(
        {"3.9.0": {"same": {"sm_90": [99, 0, 9]}}, "3.10.0": {"same": {"sm_90": [40, 0, 0]}}}, compile.BASELINE
    )
    monkeypatch.setattr(triton, "__version__", "3.11.0")
    monkeypatch.setattr(sys, "argv", ["compile", "--targets", "sm_90"])

    def check(*numbers: int) -> str:
        monkeypatch.setattr(compile, "compile_all", lambda *_: {"same": {"sm_90": Resources(*numbers)}})
        with nullcontext() if numbers[2] == 0 else pytest.raises(SystemExit, match="if this is meant"):
            compile.main()
        return capsys.readouterr().out

    assert check(40, 0, 0).startswith("1 kernels by Triton 3.11.0, compared with 3.10.0's;")
    told = check(41, 999999, 9)
    assert "same on sm_90: spills 9 bytes, 0 before" in told
    assert "same on sm_90: 999999 bytes of shared memory, there are 232448" in told

    monkeypatch.setattr(kernels, "reason", "Triton is not installed")
    with pytest.raises(SystemExit, match="nothing was compiled: Triton is not installed"):
        compile.main()


@pytest.mark.skipif(not kernels.available, reason=kernels.reason)
def test_layers_are_compiled_as_most_are_trained() -> None:
    """Ahead of time, among the cases of every change, too: without lengths, resets, and gradients of c."""
    from rnnkern.triton.compile import TARGETS, layer_cases
    from rnnkern.triton.launch import recording

    plain = set()
    for case in layer_cases():
        if not case.quick:
            continue
        with recording(TARGETS["sm_90"].facts) as launches:
            case.run()
        for one in launches:
            sequence, given = one.arguments[:2]
            if one.kernel.fn.__name__.startswith("backward") and given.dc_all is sequence.lengths is None:
                assert sequence.resets is None
                plain.add(one.kernel.fn.__module__.rpartition(".")[2])
    assert plain == set(TRITON_ENGINES)
