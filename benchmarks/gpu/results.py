"""The results of one GPU, a file to which every run adds what it measured."""

import json
import os
from pathlib import Path
from typing import Any

from benchmarks.environment import RESULTS, own_folder
from benchmarks.gpu.machine import folder_name, head, identity, state

NAME = "gpu.json"


class Results:
    """Parts by name; each has `runs`, the circumstances, and `rows` by name, of which `run` counts into `runs`."""

    def __init__(self, path: Path, content: dict[str, Any]) -> None:
        self.path, self.content = path, content

    @classmethod
    def of_this_gpu(cls, out: Path | None) -> "Results":
        """Those in the folder of this GPU under `out`, or, if there are none, a copy of those in the repository."""
        machine = identity()
        path = own_folder(out or RESULTS, folder_name(machine["gpu"]), NAME, machine) / NAME
        known = own_folder(RESULTS, folder_name(machine["gpu"]), NAME, machine) / NAME
        for source in (path, known):
            if source.exists():
                return cls(path, json.loads(source.read_text()))
        return cls(path, {"machine": machine, "parts": {}})

    def begin(self, part: str) -> "Part":
        """A new run of a part."""
        kept = self.content["parts"].setdefault(part, {"runs": [], "rows": {}})
        kept["runs"].append(head())
        return Part(self, kept)

    def save(self) -> None:
        """Writes the file, a line for each row, so that it is never half of one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".tmp")
        beside.write_text(dumps(self.content))
        os.replace(beside, self.path)


class Part:
    """One run of one part."""

    def __init__(self, results: Results, kept: dict[str, Any]) -> None:
        self.results, self._kept = results, kept
        self._run = len(kept["runs"]) - 1

    def has(self, name: str) -> bool:
        """Whether the row was measured, or failed, with these very sources."""
        row, runs = self._kept["rows"].get(name), self._kept["runs"]
        return row is not None and runs[row["run"]]["source"] == runs[self._run]["source"]

    def add(self, name: str, row: dict[str, Any]) -> None:
        """Puts a row in the place of an older one."""
        self._kept["rows"][name] = {"run": self._run, **row}

    def note_state(self) -> None:
        """Puts clocks and temperature beside the rows measured around now."""
        run = self._kept["runs"][self._run]
        run.setdefault("states", []).append({"rows": len(self._kept["rows"]), **(state() or {})})

    def end(self) -> None:
        """Writes everything, without the runs that no row is left of."""
        runs, rows = self._kept["runs"], self._kept["rows"]
        runs[self._run]["state_after"] = state()
        used = sorted({row["run"] for row in rows.values()} | {self._run})
        for row in rows.values():
            row["run"] = used.index(row["run"])
        self._kept["runs"] = [runs[number] for number in used]
        self._run = used.index(self._run)
        self.results.save()


def rounded(value: Any) -> Any:
    """Floats with five figures, in a nest of dictionaries and lists."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list | tuple) else value


def dumps(content: dict[str, Any]) -> str:
    """JSON with a line for each run and each row."""
    parts = []
    for name, part in content["parts"].items():
        runs = ",\n   ".join(json.dumps(rounded(run)) for run in part["runs"])
        rows = ",\n   ".join(f"{json.dumps(key)}: {json.dumps(rounded(row))}" for key, row in part["rows"].items())
        parts.append(f'{json.dumps(name)}: {{\n  "runs": [\n   {runs}],\n  "rows": {{\n   {rows}}}}}')
    joined = ",\n ".join(parts)
    return f'{{"machine": {json.dumps(content["machine"])},\n "parts": {{\n {joined}}}}}\n'
