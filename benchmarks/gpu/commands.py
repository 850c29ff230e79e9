"""The parts that run another program: the build, the tests, compute-sanitizer, the latencies."""

import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.environment import ROOT
from benchmarks.gpu import small
from benchmarks.gpu.machine import CannotRun, architecture, need_engines, need_gpu, need_program
from benchmarks.gpu.results import Results

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
BUILD = ROOT / "build" / "gpu"


def stream(command: Sequence[str | Path], seconds: float, **environment: str) -> tuple[int, str]:
    """Runs a program in the repository's root, showing what it says as it goes; its exit status and its output."""
    print("$", " ".join(map(str, command)), flush=True)
    process = subprocess.Popen(
        list(map(str, command)),
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    timer = _Killer(process, seconds)
    lines = []
    assert process.stdout is not None
    with timer:
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
        status = process.wait()
    if timer.expired:
        lines.append(f"no end after {seconds:.0f} s\n")
        print(lines[-1], end="")
    return status, "".join(lines)


class _Killer:
    """Ends a process that takes too long, and what it started."""

    def __init__(self, process: subprocess.Popen[str], seconds: float) -> None:
        self.expired = False
        self._process = process
        self._timer = threading.Timer(seconds, self._kill)

    def _kill(self) -> None:
        self.expired = True
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()


def build(seconds: float) -> int:
    """Builds the extension for the GPU at hand into the tree, with what is installed: no network is needed."""
    need_gpu()
    nvcc = need_program("nvcc")
    options = f"{os.environ.get('CMAKE_ARGS', '')} -DRNNKERN_CUDA=ON -DRNNKERN_CUDA_ARCHITECTURES={architecture()}"
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    begin = time.perf_counter()
    status, _ = stream(command, seconds, CMAKE_ARGS=options.strip(), CUDACXX=nvcc)
    print(f"build: {time.perf_counter() - begin:.0f} s, exit status {status}")
    return min(status, 1) if status >= 0 else 1


def test_counts(output: str) -> dict[str, Any]:
    """What pytest said at its end: counts by outcome, and who failed."""
    endings = re.findall(
        r"^=+ (.*(?:passed|failed|skipped|error|no tests ran).*) in [\d.]+s.*=+$", output, re.MULTILINE
    )
    counts = re.findall(r"(\d+) (passed|failed|skipped|deselected|errors?|xfailed)", endings[-1]) if endings else []
    return {
        "counts": {outcome: int(number) for number, outcome in counts},
        "failed": re.findall(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE),
    }


def in_parallel() -> list[str]:
    """pytest's options for several processes, where pytest-xdist is installed: most of the time Triton compiles."""
    cores = len(os.sched_getaffinity(0))
    return ["-n", str(min(cores // 2, 8))] if importlib.util.find_spec("xdist") is not None and cores > 3 else []


def tests(results: Results, seconds: float) -> int:
    """Runs the tests that are marked cuda."""
    need_engines()
    part = results.begin("tests")
    command = [sys.executable, "-m", "pytest", "-m", "cuda", "-rfE", "--tb=short", "-p", "no:cacheprovider"]
    command += in_parallel()
    files = sorted(path for path in (ROOT / "tests").glob("test_*.py") if "pytest.mark.cuda" in path.read_text())
    status, output = stream([*command, *files], seconds)  # others may import what is not installed here
    part.add("pytest -m cuda", {"status": status, **test_counts(output)})
    part.end()
    return int(status != 0)


def sanitizer_report(output: str) -> dict[str, Any]:
    """Errors that compute-sanitizer counts at its end (None: it did not get there), and the first few it names."""
    said = [line.removeprefix("=========").strip() for line in output.splitlines() if line.startswith("=========")]
    summaries = [re.match(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", line) for line in said]
    counted = [int(found[1]) for found in summaries if found]
    errors = [
        line for line in said if re.match(r"(Error|Warning|Invalid|Uninitialized|Barrier error|Program hit|Race)", line)
    ]
    return {"errors": counted[-1] if counted else None, "first": list(dict.fromkeys(errors))[:5]}


def only_ours(help_text: str, backend: str) -> list[str]:
    """The options that confine compute-sanitizer to our kernels, as this version spells them: those of any filter."""
    filters = ["kns=rnnkern"] if backend == "cuda" else [f"kne={name}" for name in small.triton_kernels()]
    for option in ("--kernel-name", "--kernel-regex"):
        if re.search(rf"{option}\b(?!-)", help_text):
            return [word for each in filters for word in (option, each)]
    return []


def sanitized(tools: Sequence[str], only: str = "") -> list[str]:
    """The rows of the part: a tool and a backend."""
    return [name for tool in tools for backend in small.BACKENDS if only in (name := f"{tool} {backend}")]


def sanitize(results: Results, seconds: float, rows: Sequence[str]) -> int:
    """Runs small calls under compute-sanitizer's tools: races, and reads of what nothing wrote, in our kernels."""
    need_engines()
    program = need_program("compute-sanitizer")
    part = results.begin("sanitize")
    help_text = subprocess.run([program, "--help"], capture_output=True, text=True).stdout
    begin, wrong = time.perf_counter(), 0
    for name in rows:
        tool, backend = name.split()
        if why := small.missing(backend):
            part.add(name, {"skipped": why})
            continue
        left = seconds - (time.perf_counter() - begin)
        if left < 30:
            print(f"sanitize: the time is spent before {name}: run --tools {tool} --only {backend}")
            wrong = 1
            break
        command = [program, "--tool", tool, "--error-exitcode", "9", "--print-limit", "20"]
        command += [*only_ours(help_text, backend), sys.executable, "-m", "benchmarks.gpu.small", backend]
        # Each tensor an allocation of its own, so that reading past its end is an error.
        status, output = stream(command, left, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        row = {"status": status, **sanitizer_report(output)}
        part.add(name, row)
        wrong |= int(status != 0 or row["errors"] != 0)
        results.save()
    part.end()
    return wrong


def compile_latencies(nvcc: str, arch: str, target: Path) -> None:
    """Builds the program; CannotRun where nvcc refuses it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    source = Path(__file__).with_name("latencies.cu")
    flags = ["-std=c++17", "-O3", f"-gencode=arch=compute_{arch},code=sm_{arch}", f"-I{ROOT / 'csrc'}"]
    made = subprocess.run([nvcc, *flags, f"-I{source.parent}", "-o", target, source], capture_output=True, text=True)
    if made.returncode != 0:
        raise CannotRun(f"nvcc cannot compile {source.name}: {made.stderr.strip()[:300]}")


def latency_names() -> Iterator[str]:
    """The names that the program prints, which nvcc must build first; nothing without nvcc."""
    try:
        program = BUILD / "latencies-list"
        compile_latencies(need_program("nvcc"), "90a", program)
    except CannotRun as error:
        print(error, file=sys.stderr)
        return
    yield from subprocess.run([program, "--list"], capture_output=True, text=True).stdout.splitlines()


def parse_latencies(output: str) -> dict[str, dict[str, Any]]:
    """The lines that are JSON objects, by name."""
    rows = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    return {row.pop("name"): row for row in rows}


def latencies(results: Results, seconds: float) -> int:
    """Builds and runs latencies.cu."""
    need_gpu()
    program = BUILD / "latencies"
    compile_latencies(need_program("nvcc"), architecture(), program)
    part = results.begin("latencies")
    status, output = stream([program], seconds)
    for name, row in parse_latencies(output).items():
        part.add(name, row)
    part.end()
    return int(status != 0)
