"""The machine's ceilings, measured by a small C++ program (probes.cpp) compiled on the spot."""

import ctypes
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from rnnkern import _library
from rnnkern._bench.floors import CacheLevel, Ceilings

SOURCE = Path(__file__).with_name("probes.cpp")
# Of a cache, this part keeps the speed of its level: the rest holds the stack, the state and what else runs.
USABLE = 0.85


class ProbesUnavailable(RuntimeError):
    """The probes cannot be compiled here; the message says why."""


@dataclass(frozen=True)
class MachineProbe:
    """What was measured, all for one moment: machines drift."""

    fma_gflops_1: float  # one thread
    fma_gflops: float  # all threads
    tanh_gps: float
    read_gbps: dict[str, float]  # by level: l1, l2, l3, memory; all threads together
    ping_pong_ns: float  # 0.0 with one thread
    threads: int


def _cache_bytes(level: str, otherwise: int) -> int:
    name = {"l1": "SC_LEVEL1_DCACHE_SIZE", "l2": "SC_LEVEL2_CACHE_SIZE", "l3": "SC_LEVEL3_CACHE_SIZE"}[level]
    try:
        size = os.sysconf(name)
    except (ValueError, OSError):
        size = 0
    return size if size > 0 else otherwise


CACHES = {"l1": 32 << 10, "l2": 1 << 20, "l3": 16 << 20}


def cache_sizes() -> dict[str, int]:
    """Bytes of each level: the first two of one core, the third of all."""
    return {level: _cache_bytes(level, size) for level, size in CACHES.items()}


class Probes:
    """The compiled probes.

    Raises:
        ProbesUnavailable: there is no compiler, or it refuses.
    """

    def __init__(self) -> None:
        compiler = os.environ.get("CXX") or "g++"
        if shutil.which(compiler.split()[0]) is None:
            raise ProbesUnavailable(
                f"measuring the machine's ceilings needs a C++ compiler, and {compiler} is not found"
            )
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder) / "probes.so"
            flags = ["-O3", "-std=c++17", "-march=native", "-shared", "-fPIC", "-pthread", "-Wno-psabi"]
            if _library.extension is not None and _library.extension.get_isa() == "avx2":
                flags.append("-mno-avx512f")  # the ceilings of the vectors that the engines use
            made = subprocess.run([*compiler.split(), *flags, "-o", library, SOURCE], capture_output=True, text=True)
            if made.returncode != 0:
                raise ProbesUnavailable(f"{compiler} cannot compile the machine probes: {made.stderr.strip()[:300]}")
            self._library = ctypes.CDLL(str(library))
        for name, arguments in {
            "fma_gflops": [ctypes.c_int],
            "tanh_gps": [ctypes.c_int],
            "read_gbps": [ctypes.c_int, ctypes.c_size_t],
            "ping_pong_ns": [],
        }.items():
            function = getattr(self._library, f"rnnkern_probe_{name}")
            function.argtypes, function.restype = arguments, ctypes.c_double

    def fma_gflops(self, threads: int) -> float:
        """Single-precision multiply-adds, 1e9 FLOP/s."""
        return float(self._library.rnnkern_probe_fma_gflops(threads))

    def tanh_gps(self, threads: int) -> float:
        """Rational approximations of tanh, 1e9 per second."""
        return float(self._library.rnnkern_probe_tanh_gps(threads))

    def read_gbps(self, threads: int, bytes_per_thread: int) -> float:
        """Reading again and again, all threads together, 1e9 bytes per second."""
        return float(self._library.rnnkern_probe_read_gbps(threads, bytes_per_thread // 1024 * 1024))

    def ping_pong_ns(self) -> float:
        """A cache line from one core to another and back."""
        return float(self._library.rnnkern_probe_ping_pong_ns())

    def measure(self, threads: int) -> MachineProbe:
        """Everything, in about a second."""
        sizes = cache_sizes()
        return MachineProbe(
            fma_gflops_1=self.fma_gflops(1),
            fma_gflops=self.fma_gflops(threads),
            tanh_gps=self.tanh_gps(threads),
            read_gbps={
                "l1": self.read_gbps(threads, int(0.75 * sizes["l1"])),
                "l2": self.read_gbps(threads, int(0.6 * sizes["l2"])),
                "l3": self.read_gbps(threads, max(2 * sizes["l2"], min(sizes["l3"] // (2 * threads), 8 << 20))),
                "memory": self.read_gbps(threads, 128 << 20),
            },
            ping_pong_ns=self.ping_pong_ns() if threads > 1 else 0.0,
            threads=threads,
        )


def ceilings(probe: MachineProbe) -> Ceilings:
    """The probe as what the floors need."""
    sizes = cache_sizes()
    per_core = {"l1": sizes["l1"], "l2": sizes["l2"], "l3": sizes["l3"] / probe.threads, "memory": float("inf")}
    return Ceilings(
        threads=probe.threads,
        fma_gflops=probe.fma_gflops,
        activations_gps=probe.tanh_gps,
        levels=tuple(CacheLevel(USABLE * size, probe.read_gbps[level]) for level, size in per_core.items()),
    )
