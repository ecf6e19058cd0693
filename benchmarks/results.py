"""What was measured, read back from the JSON files that are committed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.comparators import kept
from benchmarks.timing import Quartiles, Sample, Samples, per_round

RESULTS = Path(__file__).resolve().parent / "results"
STUDIES = RESULTS / "studies"
_STANDS_FOR_ALL = re.compile(r"\w+ fp32, (T=3,|(?!T=))")


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

    def page_faults(self, name: str) -> float:
        """A call's, the median of a candidate."""
        return Quartiles.of([sample.page_faults for sample in self.samples[name]]).median


@dataclass(frozen=True)
class Run:
    """All tables of one machine."""

    name: str  # of the file, and of its figures
    path: str
    found: Mapping[str, Any]
    tables: Sequence[Table]
    left_out: Mapping[str, str]
    stages: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # of `make gpu`, by name

    @property
    def on_gpu(self) -> bool:
        """Whether it measured a GPU."""
        return bool(self.found["device"] != "cpu")

    @property
    def hardware(self) -> str:
        """What was measured."""
        machine = self.found["machine"]
        return str(self.found["device"]) if self.on_gpu else f"{machine['threads']} threads of {machine['cpu']}"

    def operators(self) -> list[Table]:
        """Of a GPU's those that stand for all: float32, three tasks or a model's parameters, beside a copy."""
        return [table for table in self.of_kind("") if table["copy"] and _STANDS_FOR_ALL.match(table["title"])]

    def of_kind(self, kind: str, **facts: Any) -> list[Table]:
        """Tables of one kind that are about all ``facts``."""
        return [
            table
            for table in self.tables
            if table["kind"] == kind and all(table["facts"].get(name) == value for name, value in facts.items())
        ]


@dataclass(frozen=True)
class Study:
    """What the demo or an example left: its table and remarks in Markdown, and all numbers."""

    name: str
    text: str
    content: Mapping[str, Any]


def studies(folder: Path = STUDIES) -> list[Study]:
    """Every study that is committed."""
    found = sorted(folder.glob("*/results.md"))
    return [
        Study(path.parent.name, path.read_text(), json.loads(path.with_suffix(".json").read_text())) for path in found
    ]


def paired(candidates: Iterable[str]) -> list[str]:
    """Those whose memory was kept right behind their likes."""
    names = list(candidates)
    again = {kept(name) for name in names}
    return [name for other in names if other not in again for name in (other, kept(other)) if name in names]


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
    """The report of all stages: the machine of one of them, the tables of others. A dry run without a GPU or at tiny
    sizes, should one be there, measures nothing."""
    path = folder / "gpu" / "gpu.json"
    content = json.loads(path.read_text()) if path.exists() else None
    if content is None or content["settings"]["device"] != "cuda" or content["settings"]["quick"]:
        return
    stages = {stage["name"]: stage for stage in content["stages"]}
    info, operators, steps = (stages.get(name, {}).get("data") or {} for name in ("info", "operators", "steps"))
    if not info:  # figures of an unknown machine say nothing
        return
    unmeasured = dict.fromkeys(operators.get("settings", {}).get("left_out", []), "no time left")
    yield Run(
        "gpu",
        f"{folder.name}/gpu/{path.name}",
        {**info, "device": info["device"]["name"]},
        [Table(section) for of in (operators, steps) for section in of.get("sections", [])],
        {**unmeasured, **steps.get("left_out", {})},
        stages,
    )
