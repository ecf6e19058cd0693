"""What a run found: text tables, and JSON with the raw samples and everything needed to judge them.

``python -m benchmarks.report`` makes the documentation from what is committed: :mod:`benchmarks.pages` the text,
:mod:`benchmarks.figures` the figures.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from tabulate import tabulate

import dbmtl_fused
from benchmarks.timing import Bar, Quartiles, Samples, per_round
from dbmtl_fused import backends

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
SETTINGS = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD", "OMP_", "GOMP_", "KMP_", "MKL_", "DBMTL_FUSED_")
"""Prefixes of environment variables that change timings."""


@dataclass(frozen=True)
class Section:
    """One table: candidates measured beside each other, and the bars computed from them."""

    title: str
    samples: Samples
    bars: Sequence[Bar]
    bytes_moved: int | None = None  # the least that has to be read and written, for GB/s
    copy: str | None = None  # the candidate that copies so many bytes
    ratio_to: str | None = None  # the candidate whose time is 1
    floor: str | None = None  # the candidate to which others add time
    megabytes: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    checks: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()
    kind: str = ""  # tables of one kind stand together in the documentation
    facts: Mapping[str, Any] = field(default_factory=dict)  # T, P and whatever else the table is about

    def to_json(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "kind": self.kind,
            "facts": dict(self.facts),
            "bytes_moved": self.bytes_moved,
            "copy": self.copy,
            "ratio_to": self.ratio_to,
            "floor": self.floor,
            "candidates": {
                name: {
                    "seconds": Quartiles.of([sample.seconds for sample in taken])._asdict(),
                    "page_faults": Quartiles.of([sample.page_faults for sample in taken])._asdict(),
                    "samples": [sample._asdict() for sample in taken],
                }
                for name, taken in self.samples.items()
            },
            "megabytes": {name: dict(of) for name, of in self.megabytes.items()},
            "bars": [bar.to_json() for bar in self.bars],
            "checks": dict(self.checks),
            "notes": list(self.notes),
        }

    def to_text(self) -> str:
        parts = [f"\n{self.title}"]
        if self.samples:
            parts.append(self._timings())
        if self.megabytes:
            rows = [{"MB at the peak": name, **of} for name, of in self.megabytes.items()]
            parts.append(tabulate(rows, headers="keys", floatfmt=".1f"))
        if self.checks:
            worst = max(self.checks["errors"].values())
            parts.append(f"all agree: largest difference {worst:.1e} (allowed {self.checks['rtol']:.0e})")
        return "\n".join([*parts, *self.notes])

    def _timings(self) -> str:
        medians = {name: Quartiles.of([sample.seconds for sample in taken]) for name, taken in self.samples.items()}
        scale, unit = (1e6, "µs") if max(seconds.median for seconds in medians.values()) < 2e-3 else (1e3, "ms")
        rows = []
        for name, seconds in medians.items():
            row: dict[str, Any] = {"": name, unit: seconds.median * scale}
            row["quartiles"] = f"{seconds.q1 * scale:.1f} .. {seconds.q3 * scale:.1f}"
            if self.ratio_to:
                row[f"/ {self.ratio_to}"] = self._median(lambda own, other: own / other, name, self.ratio_to)
            if self.floor:
                added = self._median(lambda own, floor: own - floor, name, self.floor)
                row[f"{unit} added to {self.floor!r}"] = None if name == self.copy else added * scale
                row["page faults"] = Quartiles.of([sample.page_faults for sample in self.samples[name]]).median
            elif self.bytes_moved and self.copy:
                row["GB/s"] = self.bytes_moved / seconds.median / 1e9
                row["of copy"] = self._median(lambda copy, own: copy / own, self.copy, name)
            rows.append(row)
        return tabulate(rows, headers="keys", floatfmt=".2f")

    def _median(self, formula: Callable[..., float], *names: str) -> float:
        return Quartiles.of(per_round(formula, self.samples, *names)).median


def bars_to_text(sections: Sequence[Section], quick: bool) -> str:
    """The table of all bars."""
    rows = [
        {
            "bar": bar.name,
            "target": f"{'>=' if bar.at_least else '<='} {bar.target:.4g} {bar.unit}",
            "measured": f"{bar.measured.median:.4g}",
            "quartiles": f"{bar.measured.q1:.4g} .. {bar.measured.q3:.4g}",
            "": "reached" if bar.passed else "MISSED",
        }
        for section in sections
        for bar in section.bars
    ]
    warning = "\n--quick: sizes are tiny, bars mean nothing" if quick else ""
    return f"\n{tabulate(rows, headers='keys')}{warning}"


def environment(threads: int, device: torch.device = CPU) -> dict[str, Any]:
    """The machine, versions, commit and settings a run is to be judged by."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": {
            "cpu": _cpu_model(),
            "cores": psutil.cpu_count(logical=False),
            "logical_cores": psutil.cpu_count(),
            "threads": threads,
            "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
            "load_average": os.getloadavg(),
            "transparent_hugepages": _read("/sys/kernel/mm/transparent_hugepage/enabled"),
            "system": platform.platform(),
            "libc": " ".join(platform.libc_ver()),
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "dbmtl_fused": dbmtl_fused.__version__,
            "capability": torch.backends.cpu.get_cpu_capability(),
        },
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "backend": backends.resolve("auto", device),
        "backends": backends.available(device.type),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith(SETTINGS)},
    }


def environment_to_text(found: Mapping[str, Any]) -> str:
    """The same in three lines."""
    machine, versions = found["machine"], found["versions"]
    settings = " ".join(f"{name}={value}" for name, value in found["environment"].items()) or "glibc's defaults"
    return "\n".join(
        [
            f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, "
            f"load {machine['load_average'][0]:.1f}",
            f"torch {versions['torch']}, python {versions['python']}, dbmtl_fused {versions['dbmtl_fused']} at "
            f"{(found['commit'] or 'unknown')[:7]}{'+dirty' if found['dirty'] else ''}, "
            f"backend measured: {found['backend']} (available: {', '.join(found['backends'])})",
            f"malloc and OpenMP settings: {settings}; transparent huge pages: {machine['transparent_hugepages']}",
        ]
    )


def write_json(path: Path, found: Mapping[str, Any], settings: Mapping[str, Any], sections: Sequence[Section]) -> None:
    """Everything, raw samples included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {**found, "settings": dict(settings), "sections": [section.to_json() for section in sections]}
    path.write_text(json.dumps(content, indent=1) + "\n")


def _cpu_model() -> str:
    lines = _read("/proc/cpuinfo").splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _git(*arguments: str) -> str | None:
    """Output of a git command in the checkout, or None if there is no git or no checkout."""
    try:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def main() -> int:
    """Write ``docs/benchmarks.md``, the tables of ``docs/results.md`` and of the README, and all figures, from the
    results that are committed."""
    from benchmarks import figures, pages, results  # which need this module

    runs, studies = results.load(), results.studies()
    for path, text in pages.written(ROOT, runs, studies).items():
        (ROOT / path).write_text(text)
        print(f"wrote {path}")
    for drawn in figures.draw(figures.of_all(runs, studies), ROOT / "docs" / "figures"):
        print(f"wrote {drawn.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
