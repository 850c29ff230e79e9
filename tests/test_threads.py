"""Threads around the kernels: their number changed between calls, Python threads at once, a child after a fork.

Each test runs in a process of its own with a limit of time, so that what hangs fails.
"""

import subprocess
import sys
import textwrap

import pytest

from tests.helpers import needs_kernels

pytestmark = needs_kernels
SECONDS = 300  # on a busy machine

COMMON = """
import concurrent.futures, os, threading
import torch, rnnkern
from torch.utils._pytree import tree_leaves

torch.manual_seed(0)
# One that the kernels run on one thread, and two that they share out: by rows, and by hidden units.
CASES = [("GRU", 1, 1, 20, 40), ("LSTM", 20, 40, 64, 96), ("GRU", 12, 1, 256, 256), ("RNN", 1, 24, 512, 512)]
MODULES = [getattr(rnnkern.nn, kind)(I, H).eval() for kind, T, B, I, H in CASES]
INPUTS = [torch.randn(T, B, I) for kind, T, B, I, H in CASES]
COTANGENTS = [torch.ones(T, B, H) for kind, T, B, I, H in CASES]


def infer(i):
    with torch.no_grad():
        return tree_leaves(MODULES[i](INPUTS[i]))


def step(i):
    with torch.no_grad():
        return tree_leaves(MODULES[i].step(INPUTS[i][0]))


def train(i):
    x = INPUTS[i].detach().requires_grad_()
    y, _ = MODULES[i](x)
    return [y.detach(), *torch.autograd.grad(y, [x, *MODULES[i].parameters()], COTANGENTS[i])]


def check(actual, expected):
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


CALLS = [(f, i) for i in range(len(CASES)) for f in (infer, infer, step, train, infer)]
torch.set_num_threads(1)
EXPECTED = [f(i) for f, i in CALLS]


def check_all():
    for (f, i), expected in zip(CALLS, EXPECTED):
        check(f(i), expected)
"""


def run(program: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", COMMON + textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "done" in done.stdout


def test_their_number_may_change_between_calls() -> None:
    run("""
        for count in (2, 1, 4, 2, 4, 1):
            torch.set_num_threads(count)
            check_all()
        print("done")
    """)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_two_python_threads_share_modules(count: int) -> None:
    """One on the modules in order, one in reverse: they meet on the same module and on different ones."""
    run(f"""
        begin = threading.Barrier(2)

        def call(reverse):
            torch.set_num_threads({count})
            begin.wait()
            for _ in range(2):
                order = list(zip(CALLS, EXPECTED))
                for (f, i), expected in reversed(order) if reverse else order:
                    check(f(i), expected)

        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            for future in [pool.submit(call, reverse) for reverse in (False, True)]:
                future.result()
        print("done")
    """)


def test_a_forked_child_runs_on_its_one_thread() -> None:
    run("""
        torch.set_num_threads(2)
        check_all()  # OpenMP's threads exist now, but not in the child
        child = os.fork()
        if child == 0:
            try:
                results = [f(i) for f, i in CALLS]
                assert torch.get_num_threads() == 2
                torch.set_num_threads(1)  # or torch's own comparison waits for OpenMP
                for result, expected in zip(results, EXPECTED):
                    check(result, expected)
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitpid(child, 0)[1] == 0
        check_all()  # the parent still has its threads
        print("done")
    """)
