"""The documents and docstrings: their Python examples run, and their links lead somewhere."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import rnnkern
from rnnkern import triton as kernels
from tests.helpers import needs_kernels

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
MODULES = [
    found.name
    for found in pkgutil.walk_packages(rnnkern.__path__, "rnnkern.")
    if found.name.rpartition(".")[2]
    not in ("_C", "librnnkern", "librnnkern_emulated", "__main__")  # compiled, or a program
]
EXAMPLES = [page for page in PAGES if "```python" in page.read_text()]


def test_there_are_examples() -> None:
    assert ROOT / "README.md" in EXAMPLES


@pytest.mark.parametrize("page", EXAMPLES, ids=lambda page: page.name)
def test_examples_run(page: Path) -> None:
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        exec(compile(block, str(page), "exec"), names)


def test_there_are_modules_with_examples() -> None:
    assert {"rnnkern._enable", "rnnkern.nn.recurrent", "rnnkern.seq2seq.decoder"} < set(MODULES)


@needs_kernels  # some ask for them by name
@pytest.mark.parametrize("name", MODULES)
@pytest.mark.usefixtures("disabled_afterwards")
def test_examples_of_docstrings_run(name: str) -> None:
    if name.startswith("rnnkern.triton.") and not kernels.available:
        pytest.skip(kernels.reason)
    assert doctest.testmod(importlib.import_module(name)).failed == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        if not target.startswith(("http:", "https:")):
            assert (page.parent / target).exists(), target
