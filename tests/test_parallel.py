"""Two processes that share a batch compute what one does: DistributedDataParallel, FSDP2, distributed checkpoints.

The processes start once, since that takes longer than all that they do, and every check is a test of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.parallel_checks import CHECKS, PATIENCE, WORLD

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what each process wrote of each check; they meet in a file, so that no port can be taken."""
    folder = tmp_path_factory.mktemp("parallel")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    logs = [(folder / f"log.{rank}").open("w") for rank in range(WORLD)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.parallel_checks", str(rank), str(folder)],
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        for rank, log in enumerate(logs)
    ]
    try:
        for process in processes:
            process.wait(2 * PATIENCE.total_seconds())
    finally:
        for process in processes:
            process.kill()
            process.wait()
        for log in logs:
            log.close()
    return folder


@pytest.mark.parametrize("name", CHECKS)
def test_two_processes(name: str, outcomes: Path) -> None:
    for rank in range(WORLD):
        outcome = outcomes / f"{name}.{rank}"
        assert outcome.exists(), f"process {rank} did not get so far:\n{(outcomes / f'log.{rank}').read_text()[-3000:]}"
        assert outcome.read_text() == "", f"process {rank}:\n{outcome.read_text()}"
