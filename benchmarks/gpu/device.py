"""How a call is measured on a GPU: time by events, memory by torch's allocator, kernels by torch's profiler."""

import contextlib
import statistics
import time
import weakref
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

import torch

DEVICE = "cuda"
WAIT_AT_MOST = 2e-3
WARM_UP_SECONDS = 0.3


def ahead(launching: float) -> float:
    """Seconds that a call's launches are queued ahead of the GPU, if the last one's took `launching` seconds."""
    return min(1.5 * launching + 20e-6, WAIT_AT_MOST)


def host_bound(seconds: float, launching: float) -> bool:
    """Whether the GPU waited for launches in a call that took it `seconds`: its time is then that of the host.

    Its launches came later than they could be queued ahead, and its work ended with the last of them. A call of which
    the GPU waits in the middle and is behind at the end is not found.
    """
    late = launching - ahead(launching)
    return late > 0 and seconds < 1.1 * late + 20e-6


class DeviceClock:
    """The seconds that a call takes on the GPU, for `rnnkern._bench.timing.compare`.

    Before each call the L2 cache is overwritten, and a kernel waits for as long as the call's launches took the last
    time, up to WAIT_AT_MOST: what is measured is the device's work, not Python's, unless a call launches for longer
    than that.
    """

    def __init__(self) -> None:
        facts = torch.cuda.get_device_properties(0)
        self._cache = torch.empty(2 * facts.L2_cache_size, dtype=torch.int8, device=DEVICE)
        self._events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        # Seconds on the host of each function's calls; a function holds its row's tensors, and this does not.
        self.launching: MutableMapping[Callable[[], object], list[float]] = weakref.WeakKeyDictionary()
        matrix = torch.randn(4096, 4096, device=DEVICE, dtype=torch.bfloat16)
        begin = time.perf_counter()
        while time.perf_counter() - begin < WARM_UP_SECONDS:  # clocks rise
            torch.mm(matrix, matrix)
            torch.cuda.synchronize()
        self._cycles_per_second = 1e6 / self._between(lambda: torch.cuda._sleep(1_000_000))

    def _between(self, function: Callable[[], object]) -> float:
        start, end = self._events
        start.record()
        function()
        end.record()
        end.synchronize()
        return 1e-3 * float(start.elapsed_time(end))

    def launching_seconds(self, function: Callable[[], object]) -> float:
        """Seconds that the function's calls took on the host: the median."""
        return statistics.median(self.launching[function])

    def host_bound(self, seconds: dict[str, float], functions: dict[str, Callable[[], object]]) -> list[str]:
        """Whose calls, of those that took so many seconds, the GPU waited for: by medians, as the seconds are."""
        launching = {name: self.launching_seconds(functions[name]) for name in seconds}
        return [name for name, value in seconds.items() if host_bound(value, launching[name])]

    def __call__(self, function: Callable[[], object], calls: int) -> float:
        """Seconds of one call: each sample is one."""
        assert calls == 1
        launching = self.launching.setdefault(function, [])
        self._cache.zero_()
        torch.cuda._sleep(round(ahead(launching[-1] if launching else 0.0) * self._cycles_per_second))

        def timed() -> None:
            begin = time.perf_counter()
            function()
            launching.append(time.perf_counter() - begin)

        return self._between(timed)


def call_seconds(function: Callable[[], object], rounds: int = 5) -> float:
    """Seconds of a call that is waited for, on the host: the median."""
    found = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        function()
        torch.cuda.synchronize()
        found.append(time.perf_counter() - begin)
    return sorted(found)[rounds // 2]


def peak_mib(function: Callable[[], object]) -> float:
    """MiB at the peak of a call over what was there before: outputs, workspaces and, in training, gradients."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def kernels(function: Callable[[], object], most: int = 6) -> dict[str, Any]:
    """How many kernels a call launches, and those that take most of its time: names, launches, microseconds."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    on_device = [event for event in profile.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA]
    on_device.sort(key=lambda event: event.self_device_time_total, reverse=True)
    return {
        "launches": sum(event.count for event in on_device),
        "top": [[event.key[:100], event.count, event.self_device_time_total] for event in on_device[:most]],
    }


@contextlib.contextmanager
def float32_products(tf32: bool) -> Iterator[None]:
    """Whether matrix products and cuDNN's recurrent layers may round float32 to TF32."""
    places: tuple[Any, ...] = (torch.backends.cudnn.rnn, torch.backends.cuda.matmul)
    before = [place.fp32_precision for place in places]
    for place in places:
        place.fp32_precision = "tf32" if tf32 else "ieee"
    try:
        yield
    finally:
        for place, value in zip(places, before):
            place.fp32_precision = value
