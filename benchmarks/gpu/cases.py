"""The sweep over recurrent layers: every case, those that matter most first, and the choice among them."""

import argparse
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from rnnkern._bench.cases import Case

CELLS = ("lstm", "gru", "rnn_tanh")
HIDDEN = (64, 128, 176, 256, 512, 768, 1024, 1536, 2048)
BATCH = (1, 8, 16, 64, 128)
STEPS = (100, 1000)
MODES = ("eval", "train")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "stack": {"layers": 2, "bidirectional": True},
    "two": {"layers": 2},
    "packed": {"ragged": "packed"},
}
# A case is as far down the list as it has values that are not among these.
FIRST = {
    "cell": ("lstm", "gru"),
    "H": (128, 256, 512, 1024, 2048),
    "B": (1, 16, 64),
    "T": (100,),
    "dtype": ("bf16", "fp16"),
    "shape": ("plain",),
}


@dataclass(frozen=True)
class LayerCase:
    """A case, and whether products of float32 may be TF32: 16-bit layers of cuDNN are slow where they may not."""

    case: Case
    dtype: str  # of DTYPES
    shape: str  # of SHAPES
    tier: int = field(compare=False)  # 0 first

    @property
    def name(self) -> str:
        """A short name, the same on every machine."""
        if self.dtype != "tf32":
            return self.case.name
        stem, mode = self.case.name.rsplit("-", 1)
        return f"{stem}-tf32-{mode}"

    @property
    def tf32(self) -> bool:
        """Whether torch may use TF32."""
        return self.dtype != "fp32"

    def facts(self) -> dict[str, Any]:
        """The case for the results."""
        case = self.case
        return {
            **{"cell": case.cell, "T": case.T, "B": case.B, "I": case.I, "H": case.H},
            **{"dtype": self.dtype, "shape": self.shape, "mode": "train" if case.training else "eval"},
            "tf32_allowed": self.tf32,
        }

    @classmethod
    def of(cls, facts: dict[str, Any]) -> "LayerCase":
        """The case of `facts`."""
        sizes = {name: facts[name] for name in ("T", "B", "I", "H")}
        case = Case(
            facts["cell"],
            **sizes,
            **SHAPES[facts["shape"]],
            dtype=DTYPES[facts["dtype"]],
            training=facts["mode"] == "train",
        )
        return cls(case, facts["dtype"], facts["shape"], sum(facts[name] not in FIRST[name] for name in FIRST))


def all_cases() -> Iterator[LayerCase]:
    """The whole sweep, by tier; in a tier forward and training stand together."""
    names = ("shape", "dtype", "T", "cell", "H", "B", "mode")
    product = itertools.product(SHAPES, DTYPES, STEPS, CELLS, HIDDEN, BATCH, MODES)
    found = [LayerCase.of({**(facts := dict(zip(names, values))), "I": facts["H"]}) for values in product]
    yield from sorted(found, key=lambda row: row.tier)


def add_arguments(top: argparse.ArgumentParser) -> None:
    """The options that choose among the cases."""

    def listed(known: Iterable[Any]) -> Any:
        table = {str(value): value for value in known}

        def parse(text: str) -> list[Any]:
            unknown = [part for part in text.split(",") if part not in table]
            if unknown:
                raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: choose from {', '.join(table)}")
            return [table[part] for part in text.split(",")]

        return parse

    group = top.add_argument_group("which layers (lists such as lstm,gru; all by default)")
    known = {
        "cells": CELLS,
        "dtypes": DTYPES,
        "hidden": HIDDEN,
        "batch": BATCH,
        "steps": STEPS,
        "shapes": SHAPES,
        "modes": MODES,
    }
    for name, values in known.items():
        group.add_argument(f"--{name}", type=listed(values), metavar="A,...", help=", ".join(map(str, values)))
    group.add_argument("--tier", type=int, metavar="N", help="only cases with up to N unusual values (0: the core)")


def chosen(arguments: argparse.Namespace) -> list[LayerCase]:
    """The cases that the options leave."""
    of = {
        "cells": "cell",
        "dtypes": "dtype",
        "hidden": "H",
        "batch": "B",
        "steps": "T",
        "shapes": "shape",
        "modes": "mode",
    }
    wanted = {fact: getattr(arguments, option) for option, fact in of.items() if getattr(arguments, option) is not None}
    return [
        row
        for row in all_cases()
        if (arguments.tier is None or row.tier <= arguments.tier)
        and all(row.facts()[fact] in values for fact, values in wanted.items())
    ]
