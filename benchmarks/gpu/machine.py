"""Which GPU this is, with what software, and how warm: what stands at the head of every result."""

import datetime
import hashlib
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import ROOT, software
from rnnkern import _library, triton
from rnnkern._bench.machine import cpu_name

STATE = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw", "utilization.gpu", "clocks_event_reasons.active")


class CannotRun(RuntimeError):
    """A part cannot run here; the message says why, in a line."""


def need_gpu() -> None:
    """Raises CannotRun where torch finds no GPU."""
    if not torch.cuda.is_available():
        raise CannotRun(f"no GPU: torch {torch.__version__} finds none")


def need_engines() -> None:
    """Raises CannotRun where there is no GPU, or rnnkern has kernels for it neither in CUDA nor in Triton."""
    need_gpu()
    if triton.available and triton.interprets():
        raise CannotRun("TRITON_INTERPRET is set: Triton would interpret its kernels on the CPU")
    if why := _library.missing["cuda"]:
        if triton.reason:
            raise CannotRun(f"rnnkern has no CUDA kernels, {why}: run --part build; nor Triton's: {triton.reason}")
        print(f"without CUDA kernels: {why}")


def need_program(name: str) -> str:
    """The path of a program of the CUDA toolkit; CannotRun where it is not found."""
    found = shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")
    if found is None:
        raise CannotRun(f"{name} of the CUDA toolkit is not found on the PATH")
    return found


def architecture() -> str:
    """The GPU at hand as nvcc names it, with the instructions of its own that Hopper has."""
    major, minor = torch.cuda.get_device_capability()
    return f"{major}{minor}" + ("a" if major == 9 else "")


def identity() -> dict[str, Any]:
    """What makes results comparable: those of two different GPUs never share a folder."""
    facts = torch.cuda.get_device_properties(0)
    return {
        "gpu": facts.name,
        "capability": f"{facts.major}.{facts.minor}",
        "multiprocessors": facts.multi_processor_count,
        "memory_gib": round(facts.total_memory / 2**30),
        "l2_mib": facts.L2_cache_size / 2**20,
    }


def folder_name(gpu: str) -> str:
    """For example "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


def source_hash(root: Path = ROOT) -> str:
    """Changes with the kernels and with what calls them: a row measured under another hash is measured again."""
    digest = hashlib.sha256()
    files = [root / "CMakeLists.txt", *root.glob("csrc/**/*"), *root.glob("rnnkern/**/*.py")]
    for path in sorted(path for path in files if path.is_file() and "tests" not in path.parts):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def query_nvidia_smi(*fields: str) -> dict[str, str] | None:
    """What nvidia-smi says of the first GPU, or None where it is missing or refuses."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "-i", "0", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    values = [value.strip() for value in run.stdout.strip().split(",")]
    return dict(zip(fields, values, strict=True)) if run.returncode == 0 and len(values) == len(fields) else None


def state() -> dict[str, str] | None:
    """Clocks in MHz, temperature in degrees Celsius, power in W, now."""
    return query_nvidia_smi(*STATE) or query_nvidia_smi(*STATE[:3])  # older ones do not know the last by this name


def head() -> dict[str, Any]:
    """The circumstances of one run."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "source": source_hash(),
        "software": {
            **software(),
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
            "triton": triton.version or None,
            "cudnn": torch.backends.cudnn.version(),
            "driver": (query_nvidia_smi("driver_version") or {}).get("driver_version"),
        },
        "cpu": cpu_name(),
        "state_before": state(),
    }
