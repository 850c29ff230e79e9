"""Compiles Triton's kernels ahead of time, for GPUs that need not be here, and tells what they need.

    python -m rnnkern.triton.compile [--quick] [--targets sm_90 gfx942] [--only resident.forward] [--update]

A case runs a layer on tensors without memory and lists what it would launch on a GPU of given facts
(`rnnkern.triton.launch.recording`), so that kernels are compiled for the very arguments and constants that they run
with. Writes a table to build/triton-resources.md and compares with resources.json beside this file, which has a part
for each version of Triton that was asked; another version is compared with the newest of them. Fails where a kernel
needs more shared memory than a program may have, spills more, or needs more registers or shared memory than before,
where one comes or goes without `--update`, which writes resources.json anew, and where there is no Triton. `--quick`
takes some of the cases, for every change.
"""

import argparse
import concurrent.futures
import functools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rnnkern import triton as kernels
from rnnkern.cells import CELLS
from rnnkern.cells.reference import compute_dtype
from rnnkern.triton.config import Facts
from rnnkern.triton.launch import Launch, recording

BASELINE = Path(__file__).with_name("resources.json")
SLACK = 8  # registers, the unit in which a GPU hands them out


class Target(NamedTuple):
    """A GPU to compile for."""

    backend: str
    arch: int | str
    warp: int
    facts: Facts


TARGETS = {
    "sm_80": Target("cuda", 80, 32, Facts("cuda", 108, 166912)),
    "sm_90": Target("cuda", 90, 32, Facts("cuda", 132, 232448)),
    "sm_100": Target("cuda", 100, 32, Facts("cuda", 148, 232448)),
    "gfx942": Target("hip", "gfx942", 64, Facts("hip", 304, 65536)),
}
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}
TYPES |= {torch.int64: "i64", torch.int32: "i32", torch.bool: "i1"}


class Case(NamedTuple):
    """Something to launch; `run` does, on the device "meta", inside `recording`, and may add to the name."""

    name: str
    quick: bool  # whether it is among those of every change
    run: Callable[[], str]


class Resources(NamedTuple):
    """Of one kernel on one GPU; bytes but the first. Spilled: the stack of a thread."""

    registers: int
    shared: int
    spilled: int


Kernels = dict[str, dict[str, Resources]]  # kernel -> target -> resources


def run_layer(
    cell: str,
    dtype: torch.dtype,
    engine: str,
    H: int,
    B: int,
    D: int,
    tf32: bool,
    T: int = 3,
    *,
    having: str = "all",
) -> None:
    """Forward and backward of a layer with all that it may have.

    "plain": with biases alone, as most layers are trained; "bare": forward alone, without these.
    """
    from rnnkern.triton import layer

    G = len(CELLS[cell].gates)

    def tensor(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    compute = compute_dtype(dtype)
    c0 = tensor(D, B, H, dtype=compute) if len(CELLS[cell].states) == 2 else None
    biases = (None, None) if having == "bare" else (tensor(G * H), tensor(G * H))
    weights = (tensor(G * H, H), tensor(G * H, H), *biases) * D + (None,) * (8 - 4 * D)
    whole = having == "all"
    lengths, resets = (torch.full((B,), T), tensor(T, B, dtype=torch.bool)) if whole else (None, None)
    arguments = layer.Layer(cell, tensor(T, B, H), tensor(D, B, H), c0, weights, lengths, resets, tf32)
    if having == "bare":
        layer.forward(arguments, engine, False, False)
        return
    y, _, _, c_all, saved = layer.forward(arguments, engine, whole, True)
    dc_all = c_all if whole and c0 is not None else None
    layer.backward(arguments, engine, y, None, None, dc_all, y, saved, True, True, True, 0.0)


def run_largest(
    cell: str,
    dtype: torch.dtype,
    engine: str,
    sizes: tuple[int, ...],
    tf32: bool = False,
    *,
    B: int = 16,
    D: int = 1,
    having: str = "all",
) -> str:
    """`run_layer` of the first size that the engine has room for."""
    for H in sizes:
        try:
            run_layer(cell, dtype, engine, H, B, D, tf32, having=having)
        except RuntimeError as error:
            if "cannot run: " not in str(error):
                raise
        else:
            return f" H={H}"
    return ""


def layer_cases() -> Iterable[Case]:
    """Every cell, engine and dtype, at the largest of a few sizes."""
    sizes = {"stepwise": (512,), "resident": (128, 64, 32), "grid": (1024, 512, 256)}
    for engine in sizes:
        for cell in CELLS:
            for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
                if dtype == torch.float64 and engine != "stepwise":
                    continue
                for tf32 in (False, True) if dtype == torch.float32 and engine != "stepwise" else (False,):
                    name = f"{cell} {TYPES[dtype]}{' tf32' if tf32 else ''}"
                    arguments = cell, dtype, engine, sizes[engine], tf32
                    yield Case(
                        name, cell == "lstm" and dtype == torch.bfloat16, functools.partial(run_largest, *arguments)
                    )
    # What the table of configurations does only for these, and kernels that lack what those above have.
    for engine in sizes:
        of_lstm, of_gru = (
            functools.partial(run_largest, cell, torch.bfloat16, engine, sizes[engine]) for cell in ("lstm", "gru")
        )
        yield Case("lstm bf16 D=2", False, functools.partial(of_lstm, D=2))
        yield Case("lstm bf16 bare", False, functools.partial(of_lstm, having="bare"))
        yield Case("lstm bf16 plain", True, functools.partial(of_lstm, having="plain"))
        yield Case("gru bf16 plain", False, functools.partial(of_gru, having="plain"))
    for cell in CELLS:
        many = functools.partial(run_largest, cell, torch.bfloat16, "resident", (64,), B=2**15)
        yield Case(f"{cell} bf16 B=32768", False, many)
    for H in (640, 1152):  # slices of 16 and of 32
        yield Case("lstm bf16", False, functools.partial(run_largest, "lstm", torch.bfloat16, "grid", (H,)))
    for cell in ("rnn_tanh", "rnn_relu"):
        yield Case(f"{cell} bf16", False, functools.partial(run_largest, cell, torch.bfloat16, "resident", (256,)))


def run_loss(dtype: torch.dtype, gradients: bool) -> str:
    """A chunk's loss, with all that it may have, over a vocabulary of odd size."""
    from rnnkern.triton.linear_cross_entropy import softmax

    logits = torch.empty(2, 50272, dtype=dtype, device="meta")[:, :50257]
    target = torch.empty(2, dtype=torch.int64, device="meta")
    softmax(logits, target, torch.empty(2, device="meta"), -100, 0.1, gradients)
    return f" V={logits.shape[1]}"


def loss_cases() -> Iterable[Case]:
    """Every dtype, with gradients and without."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for gradients in (False, True):
            name = f"{TYPES[dtype]}{' gradients' if gradients else ''}"
            quick = gradients and dtype == torch.bfloat16
            yield Case(name, quick, functools.partial(run_loss, dtype, gradients))


def run_attention(score: str, dtype: torch.dtype, Tq: int) -> str:
    """Forward with weights, and backward, of rows that end."""
    from rnnkern.triton import attention

    B, Tk, D = 2, 100, 256
    query, key, value, vector, dweights = (
        torch.empty(shape, dtype=dtype, device="meta")
        for shape in ((B, Tq, D), (B, Tk, D), (B, Tk, D), (D,), (B, Tq, Tk))
    )
    inputs = query, key, value, vector if score == "additive" else None, torch.full((B,), Tk), None, score, 1.0
    context, _ = attention.attention(*inputs, True)
    attention.attention_backward(context, dweights, *inputs)
    return ""


def attention_cases() -> Iterable[Case]:
    """Both scores of one query, few and many, in 16 and in 32 bits."""
    for score in ("dot", "additive"):
        for dtype in (torch.bfloat16, torch.float32):
            for Tq in (1, 8, 50):
                quick = score == "additive" and dtype == torch.bfloat16 and Tq != 8
                run = functools.partial(run_attention, score, dtype, Tq)
                yield Case(f"{score} {TYPES[dtype]} Tq={Tq}", quick, run)


def cases() -> list[Case]:
    """Of all kernels."""
    return [*layer_cases(), *attention_cases(), *loss_cases()]


def describe(launch: Launch) -> tuple[dict[str, Any], dict[tuple[int, ...], Any], dict[tuple[int, ...], Any]]:
    """Signature, constants and what is known of pointers, as Triton's compiler takes them."""
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}

    def type_of(value: Any, path: tuple[int, ...]) -> Any:
        if isinstance(value, torch.Tensor):
            attributes[path] = [["tt.divisibility", 16]]
            return f"*{TYPES[value.dtype]}"
        if isinstance(value, tuple):
            return type(value)(*(type_of(part, (*path, i)) for i, part in enumerate(value)))
        if value is None:
            constants[path] = None
            return "constexpr"
        return "fp32" if isinstance(value, float) else "i32"

    names = launch.kernel.arg_names
    signature = {name: type_of(value, (i,)) for i, (name, value) in enumerate(zip(names, launch.arguments))}
    for name, value in launch.constants.items():
        if name in names:
            signature[name] = "constexpr"
            constants[(names.index(name),)] = value
    return signature, constants, attributes


def compile_launch(launch: Launch, target: Target) -> Resources:
    """Compiles what a launch would run."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = describe(launch)
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {name: value for name, value in launch.constants.items() if name not in launch.kernel.arg_names}
    compiled = triton.compile(source, target=GPUTarget(target.backend, target.arch, target.warp), options=options)
    shared = int(compiled.metadata.shared)
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]
        count = {key: int(n) for key, n in re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s+(\d+)", text)}
        return Resources(count["vgpr_count"], shared, count["private_segment_fixed_size"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    assert found is not None, said
    return Resources(int(found[1]), shared, int(found[2]))


def launches_of(case: Case, target: Target) -> dict[str, Launch]:
    """By name; nothing for a case that the target has no room for."""
    with recording(target.facts) as launches:
        size = case.run()
    found: dict[str, dict[str, Launch]] = {}  # by name, by what is compiled
    for launch in launches:
        module = launch.kernel.fn.__module__.rpartition(".")[2]
        name = f"{module}.{launch.kernel.fn.__name__} {case.name}{size}"
        found.setdefault(name, {}).setdefault(str(describe(launch)), launch)
    return {
        f"{name}, variant {i}" if i > 1 else name: launch
        for name, variants in found.items()
        for i, launch in enumerate(variants.values(), 1)
    }


def compile_case(index: int, target: str, only: str) -> list[tuple[str, str, Resources]]:
    """What one case needs on one target, kernel by kernel."""
    launches = launches_of(cases()[index], TARGETS[target])
    return [
        (name, target, compile_launch(launch, TARGETS[target])) for name, launch in launches.items() if only in name
    ]


def compile_all(targets: list[str], quick: bool, only: str) -> Kernels:
    """On all cores."""
    found: Kernels = {}
    context = multiprocessing.get_context("spawn")  # torch has threads by now
    with concurrent.futures.ProcessPoolExecutor(len(os.sched_getaffinity(0)), context) as pool:
        jobs = [
            pool.submit(compile_case, i, target, only)
            for i, case in enumerate(cases())
            for target in targets
            if case.quick or not quick
        ]
        for job in jobs:
            for name, target, resources in job.result():
                found.setdefault(name, {})[target] = resources
    return dict(sorted(found.items()))


def table(found: Kernels) -> str:
    """In Markdown."""
    lines = ["| kernel | GPU | registers | shared | spilled |", "|---|---|---|---|---|"]
    for name, of in found.items():
        lines += [f"| `{name}` | {target} | {' | '.join(map(str, resources))} |" for target, resources in of.items()]
    return "\n".join(lines) + "\n"


def save(recorded: dict[str, Any], path: Path) -> None:
    """By Triton's version; one line for each kernel, so that changes are easy to read."""
    parts = []
    for version, of in sorted(recorded.items()):
        lines = [f"    {json.dumps(name)}: {json.dumps(targets)}" for name, targets in sorted(of.items())]
        parts.append(f'  "{version}": {{\n' + ",\n".join(lines) + "\n  }")
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def comparable(version: str, recorded: Iterable[str]) -> str:
    """The version to compare with: itself, or the newest."""
    return version if version in recorded else max(recorded, key=lambda known: [*map(int, re.findall(r"\d+", known))])


def regressions(found: Kernels, recorded: dict[str, dict[str, list[int]]], whole: bool) -> list[str]:
    """What must not be, one line each. `whole`: every kernel was compiled."""
    wrong = [f"{name}: gone" for name in recorded if whole and name not in found]
    for name, of in found.items():
        for target, now in of.items():
            where = f"{name} on {target}"
            room = TARGETS[target].facts.shared_bytes
            if now.shared > room:
                wrong.append(f"{where}: {now.shared} bytes of shared memory, there are {room}")
            if target not in recorded.get(name, {}):
                wrong.append(f"{where}: new")
                continue
            then = Resources(*recorded[name][target])
            if now.spilled > then.spilled:
                wrong.append(f"{where}: spills {now.spilled} bytes, {then.spilled} before")
            if now.registers > then.registers + SLACK:
                wrong.append(f"{where}: {now.registers} registers, {then.registers} before")
            if now.shared > then.shared:
                wrong.append(f"{where}: {now.shared} bytes of shared memory, {then.shared} before")
    return wrong


def main() -> None:
    """Write the table, then compare or update."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only some of the cases")
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS), metavar="GPU")
    parser.add_argument("--only", default="", help="only kernels with this in their name")
    parser.add_argument("--update", action="store_true", help="write resources.json anew, what was compiled of it")
    options = parser.parse_args()
    if kernels.reason:
        sys.exit(f"nothing was compiled: {kernels.reason}")
    import triton

    found = compile_all(options.targets, options.quick, options.only)
    if not found:
        sys.exit(f"no kernel has {options.only!r} in its name")
    report = Path("build", "triton-resources.md")
    report.parent.mkdir(exist_ok=True)
    report.write_text(table(found))
    recorded = json.loads(BASELINE.read_text())
    whole = options.targets == list(TARGETS) and not options.quick and not options.only
    if options.update:
        of = recorded.setdefault(triton.__version__, {})
        if whole:
            of.clear()
        for name, targets in found.items():
            of[name] = of.get(name, {}) | {target: list(resources) for target, resources in targets.items()}
        save(recorded, BASELINE)
    version = comparable(triton.__version__, recorded)
    count = sum(map(len, found.values()))
    print(f"{count} kernels by Triton {triton.__version__}, compared with {version}'s; all in {report}")
    spilling = [f"{name} on {target}" for name, by in found.items() for target, r in by.items() if r.spilled]
    print(f"{len(spilling)} spill" + "".join(f"\n  {name}" for name in spilling))
    wrong = regressions(found, recorded[version], whole)
    if wrong:
        print("\n".join(wrong))
        sys.exit("if this is meant: make triton-check ARGS=--update, and commit the change of resources.json")


if __name__ == "__main__":
    main()
