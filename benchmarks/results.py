"""What was measured, read back from the JSON files that are committed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.timing import Quartiles, Sample, Samples, per_round

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Table:
    """One section of a file; :class:`benchmarks.report.Section` says what its entries are."""

    content: Mapping[str, Any]

    def __getitem__(self, key: str) -> Any:
        return self.content[key]

    @property
    def samples(self) -> Samples:
        return {name: [Sample(**taken) for taken in of["samples"]] for name, of in self.content["candidates"].items()}

    def quartiles(self, formula: Callable[..., float], *names: str) -> Quartiles:
        """Of ``formula(seconds of names[0], ...)`` over the rounds."""
        return Quartiles.of(per_round(formula, self.samples, *names))

    def median(self, formula: Callable[..., float], *names: str) -> float:
        """The middle one of :meth:`quartiles`."""
        return self.quartiles(formula, *names).median

    def seconds(self, name: str) -> float:
        """The median of a candidate."""
        return self.median(lambda own: own, name)

    def ratio(self, name: str, other: str) -> float:
        """The median of quotients within a round."""
        return self.median(lambda own, one: own / one, name, other)


@dataclass(frozen=True)
class Run:
    """All tables of one machine."""

    name: str  # of the file, and of its figures
    path: str
    found: Mapping[str, Any]
    tables: Sequence[Table]
    left_out: Mapping[str, str]

    def of_kind(self, kind: str, **facts: Any) -> list[Table]:
        """Tables of one kind that are about all ``facts``."""
        return [
            table
            for table in self.tables
            if table["kind"] == kind and all(table["facts"].get(name) == value for name, value in facts.items())
        ]


def load(folder: Path = RESULTS) -> list[Run]:
    """Every run that is committed: CPUs first, the newest of them first (``cpu.json``, then ``cpu_*.json`` of other
    machines), then what ``bench --device cuda`` and ``make gpu`` left, if anything."""
    return [*_bench(folder, "cpu"), *_bench(folder, "cpu_*"), *_bench(folder, "cuda"), *_gpu(folder)]


def _bench(folder: Path, names: str) -> Iterator[Run]:
    for path in sorted(folder.glob(f"{names}.json")):
        content = json.loads(path.read_text())
        tables = [Table(section) for section in content["sections"]]
        yield Run(path.stem, f"{folder.name}/{path.name}", content, tables, content["left_out"])


def _gpu(folder: Path) -> Iterator[Run]:
    """The report of all stages: the machine of one of them, the tables of others."""
    if (path := folder / "gpu" / "gpu.json").exists():
        stages = {stage["name"]: stage["data"] or {} for stage in json.loads(path.read_text())["stages"]}
        sections = [s for name in ("operators", "steps") for s in stages.get(name, {}).get("sections", [])]
        tables = [
            Table({"kind": "", "facts": {}, "copy": None, "ratio_to": None, "floor": None, **s}) for s in sections
        ]
        yield Run("gpu", f"{folder.name}/gpu/{path.name}", stages.get("info", {}), tables, {})
