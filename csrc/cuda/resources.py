"""Registers, shared memory and stack of every CUDA kernel, from what ptxas said when the library was built.

    python csrc/cuda/resources.py BUILD [--update]

BUILD is CMake's folder. Writes a table to build/cuda-resources.md and compares with resources.json beside this file:
fails where a kernel spills, has a larger stack frame or needs more registers than before, and where a kernel, or one of
its architectures, comes or goes without `--update`, which writes resources.json anew; and, even then, where objects
hold different code under one name. With another nvcc than that of resources.json, registers may differ. Without nvcc
nothing was compiled: says so and succeeds.
"""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
BASELINE = Path(__file__).with_suffix(".json")
SLACK = 8  # registers, the unit in which a GPU hands them out


class DifferentCode(Exception):
    """Two objects hold kernels of one name that need different resources."""


class Resources(NamedTuple):
    """Of one kernel on one architecture, in bytes but the first; launches ask for shared memory besides."""

    registers: int
    shared: int
    stack: int
    spilled: int


Kernels = dict[str, dict[str, Resources]]  # kernel -> architecture -> resources


def parse(log: str) -> dict[tuple[str, str], Resources]:
    """From the output of `ptxas -v`, by mangled name and architecture. Functions that are called count as kernels."""
    found: dict[tuple[str, str], Resources] = {}
    entry = function = arch = ""
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)' for '(\w+)'", line):
            entry, arch = match.groups()
        elif match := re.search(r"Function properties for (\w+)", line):
            function = match[1]
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            stack, stores, loads = map(int, match.groups())
            found[function, arch] = Resources(0, 0, stack, stores + loads)
        elif match := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            kernel = found[entry, arch]
            found[entry, arch] = kernel._replace(registers=int(match[1]), shared=int(shared[1]) if shared else 0)
    return found


def shorten(mangled: Iterable[str]) -> list[str]:
    """`next_step<Lstm, Bf16, float>` for the kernel of that name."""
    names = list(mangled)
    out = subprocess.run(["c++filt", "-p"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    short = []
    for name in out.splitlines():
        name = re.sub(r"^void ", "", name).replace("rnnkern::cuda::", "").replace("rnnkern::", "")
        short.append(name.replace("__nv_bfloat16", "Bf16").replace("__half", "F16"))
    return short


def merge(logs: Iterable[tuple[str, str]]) -> Kernels:
    """From the output of `ptxas -v` for each object. Kernels without a cell are in several objects.

    Raises:
        DifferentCode: two objects differ in what they need for a kernel, or two kernels are shortened to one name.
    """
    found: dict[tuple[str, str], tuple[str, Resources]] = {}
    for name, log in logs:
        for key, resources in parse(log).items():
            first, before = found.setdefault(key, (name, resources))
            if before != resources:
                raise DifferentCode(f"{key[0]} on {key[1]}: {before} in {first}, {resources} in {name}")
    names = sorted({mangled for mangled, _ in found})
    short = dict(zip(names, shorten(names), strict=True))
    kernels: Kernels = {}
    for (mangled, arch), (_, resources) in found.items():
        of = kernels.setdefault(short[mangled], {})
        if arch in of:
            raise DifferentCode(f"two kernels are called {short[mangled]}")
        of[arch] = resources
    return dict(sorted(kernels.items()))


def read(build: Path) -> Kernels:
    """Of the objects that CMake's list of commands names: others may be left from before."""
    logs = []
    for command in json.loads((build / "compile_commands.json").read_text()):
        if not command["file"].endswith(".cu"):
            continue
        log = build / (re.findall(r" -o (\S+)", command["command"])[-1] + ".log")
        if not log.exists():
            sys.exit(f"{log} is missing: build first")
        logs.append((command["file"], log.read_text()))
    return merge(logs)


def nvcc_version(build: Path) -> str:
    """Such as 13.0."""
    cache = (build / "CMakeCache.txt").read_text()
    compiler = re.search(r"^CMAKE_CUDA_COMPILER:\w+=(.*)$", cache, re.MULTILINE)
    assert compiler is not None
    said = subprocess.run([compiler[1], "--version"], capture_output=True, text=True, check=True).stdout
    version = re.search(r"release ([\d.]+)", said)
    assert version is not None, said
    return version[1]


def table(kernels: Kernels) -> str:
    """In Markdown."""
    lines = ["| kernel | arch | registers | shared | stack | spilled |", "|---|---|---|---|---|---|"]
    for name, of in kernels.items():
        lines += [f"| `{name}` | {arch} | {' | '.join(map(str, resources))} |" for arch, resources in of.items()]
    return "\n".join(lines) + "\n"


def save(kernels: Kernels, nvcc: str, path: Path) -> None:
    """One line for each kernel, so that changes are easy to read."""
    lines = []
    for name, of in kernels.items():
        archs = {arch: {"registers": r.registers, "shared": r.shared, "stack": r.stack} for arch, r in of.items()}
        lines.append(f"    {json.dumps(name)}: {json.dumps(archs)}")
    path.write_text(f'{{\n  "nvcc": "{nvcc}",\n  "kernels": {{\n' + ",\n".join(lines) + "\n  }\n}\n")


def regressions(kernels: Kernels, nvcc: str, baseline: dict[str, Any]) -> list[str]:
    """What must not be, one line each."""
    wrong = []
    before = baseline["kernels"]
    for name, of in before.items():
        if name not in kernels:
            wrong.append(f"{name}: gone")
        else:
            wrong += [f"{name} on {arch}: gone" for arch in of if arch not in kernels[name]]
    for name, of in kernels.items():
        for arch, now in of.items():
            where = f"{name} on {arch}"
            if now.spilled > 0:
                wrong.append(f"{where}: spills {now.spilled} bytes")
            then = before.get(name, {}).get(arch)
            if then is None:
                wrong.append(f"{where}: new")
                continue
            if now.stack > then["stack"]:
                wrong.append(f"{where}: a stack frame of {now.stack} bytes, {then['stack']} before")
            if nvcc == baseline["nvcc"] and now.registers > then["registers"] + SLACK:
                wrong.append(f"{where}: {now.registers} registers, {then['registers']} before")
    return wrong


def main() -> None:
    """Write the table, then compare or update."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("build", type=Path)
    parser.add_argument("--update", action="store_true", help="write resources.json anew; spills still fail")
    options = parser.parse_args()
    try:
        kernels = read(options.build)
    except DifferentCode as error:
        sys.exit(str(error))
    if not kernels:
        print("skipped: no nvcc of version 12.8 or later was found, and no CUDA kernel was compiled")
        return
    report = ROOT / "build" / "cuda-resources.md"
    report.parent.mkdir(exist_ok=True)
    report.write_text(table(kernels))
    nvcc = nvcc_version(options.build)
    if options.update:
        save(kernels, nvcc, BASELINE)
    baseline = json.loads(BASELINE.read_text())
    wrong = regressions(kernels, nvcc, baseline)
    most = max((r.registers, f"{name} on {arch}") for name, of in kernels.items() for arch, r in of.items())
    print(
        f"{len(kernels)} kernels by nvcc {nvcc}; most registers {most[0]}: {most[1]}; all in {report.relative_to(ROOT)}"
    )
    if nvcc != baseline["nvcc"]:
        print(f"registers were not compared: {BASELINE.name} was written with nvcc {baseline['nvcc']}")
    if wrong:
        print("\n".join(wrong))
        sys.exit("if this is meant: make cuda-check ARGS=--update, and commit the change of csrc/cuda/resources.json")


if __name__ == "__main__":
    main()
