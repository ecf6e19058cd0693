"""What the GPU's own counters say of every operator, beside the least it has to read and write.

``python -m benchmarks.counters --out FILE.json``. Nsight Compute (``ncu``) watches :mod:`benchmarks.counters_driver`:
one launch of each operator of each backend, with clocks and caches as they are. Where ncu is missing, or the system
does not let it at the counters, that is said and nothing fails. Without a GPU the driver runs unwatched.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tabulate import tabulate

from benchmarks import cuda_tools
from benchmarks.bandwidth import byte_model

NCU = "ncu"
READ, WRITTEN, HIT_RATE, SECONDS = (
    *("dram__bytes_read.sum", "dram__bytes_write.sum"),
    *("lts__t_sector_hit_rate.pct", "gpu__time_duration.sum"),
)
OPTIONS = (
    *("--metrics", ",".join((READ, WRITTEN, HIT_RATE, SECONDS))),
    *("--cache-control", "none", "--clock-control", "none"),
    *("--profile-from-start", "off", "--target-processes", "application-only"),
    *("--csv", "--print-units", "base", "--print-kernel-base", "function"),
)
BACKENDS = ("cuda", "triton")

DONE, NOT_HERE = "all operators done", "not here: "
"""What the driver prints at the end, or instead where the backend is missing."""

NEEDS_GPU = "needs a GPU"

_REFUSED = re.compile(r".*(ERR_NVGPUCTRPERM|LibraryNotLoaded|Failed to initialize the profiler).*")
_KERNEL = re.compile(r"(begin_step|balance|ema_update|combine|gram)_kernel")
_OPERATORS = {"balance": "balance_", "ema_update": "ema_update_"}  # the others are called as their kernels
_SCALES = {"": 1.0, "%": 1.0, "byte": 1.0, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}
_SCALES |= {"s": 1.0, "second": 1.0, "ms": 1e-3, "msecond": 1e-3, "us": 1e-6, "usecond": 1e-6}
_SCALES |= {"ns": 1e-9, "nsecond": 1e-9}
_LOG_CHARACTERS, _REASON_CHARACTERS = 3000, 200


@dataclass
class Launch:
    """One launch of a kernel, its metrics by their names in bytes, percent and seconds; None where ncu has none."""

    kernel: str
    metrics: dict[str, float | None] = field(default_factory=dict)

    @property
    def operator(self) -> str:
        """Whose kernel it is; empty if none of ours."""
        match = _KERNEL.search(self.kernel)
        return _OPERATORS.get(match[1], match[1]) if match else ""


def launches(output: str) -> list[Launch]:
    """What ``ncu --csv`` prints: a line for each launch and metric, among messages of its own."""
    lines = output.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID",')), len(lines))
    found: dict[tuple[str, str], Launch] = {}
    for row in csv.DictReader(line for line in lines[start:] if line.startswith('"')):
        launch = found.setdefault((row["Process ID"], row["ID"]), Launch(row["Kernel Name"]))
        launch.metrics[row["Metric Name"]] = _number(row["Metric Value"], row["Metric Unit"])
    return list(found.values())


def _number(value: str, unit: str) -> float | None:
    """In bytes, percent or seconds; thousands come with commas, and what the GPU does not count as ``n/a``."""
    if unit not in _SCALES:
        raise ValueError(f"ncu's unit must be one of {', '.join(filter(None, _SCALES))}, got {unit!r}")
    try:
        return float(value.replace(",", "")) * _SCALES[unit]
    except ValueError:
        return None


def refusal(output: str) -> str:
    """Why ncu could not watch, or nothing."""
    for line in output.splitlines():
        if line.startswith(NOT_HERE):
            return line.removeprefix(NOT_HERE)
        if _REFUSED.match(line):
            return f"{NCU}: {line.strip('= ')}"[:_REASON_CHARACTERS]
    return ""


@dataclass
class Report:
    """What was found, as ``make gpu`` takes it over."""

    T: int
    P: int
    rows: list[dict[str, Any]] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def add(self, backend: str, taken: Sequence[Launch]) -> None:
        """Launches of one backend, each with the model of its operator."""
        for launch in taken:
            row: dict[str, Any] = {"backend": backend, "operator": launch.operator, "kernel": launch.kernel}
            row |= {"metrics": launch.metrics}
            if launch.operator:
                row["model_read"], row["model_written"] = byte_model(launch.operator, self.T, self.P)
            self.rows.append(row)

    def to_json(self) -> dict[str, Any]:
        content: dict[str, Any] = {"T": self.T, "P": self.P, "launches": self.rows, "failures": self.failures}
        content["left_out"] = self.left_out
        if not self.rows and not self.failures:
            content["skipped"] = "; ".join(dict.fromkeys(self.left_out.values()))
        return content

    def to_text(self) -> str:
        parts = [f"counters of one launch each, fp32, T={self.T}, P={self.P / 1e6:.4g}M; MB"]
        if self.rows:
            parts.append(tabulate([_line(row) for row in self.rows], headers="keys", floatfmt=".2f"))
        parts += [f"left out, {backend}: {reason}" for backend, reason in self.left_out.items()]
        return "\n".join([*parts, *(f"FAILED {failure}" for failure in self.failures)])


def _line(row: dict[str, Any]) -> dict[str, Any]:
    metrics = row["metrics"]
    read, written, seconds = (metrics.get(name) for name in (READ, WRITTEN, SECONDS))
    line = {"": f"{row['backend']} {row['operator'] or row['kernel']}", "read": _mega(read), "written": _mega(written)}
    moved = None if None in (read, written) else read + written
    if row["operator"]:
        line |= {"least read": _mega(row["model_read"]), "least written": _mega(row["model_written"])}
        line["/ least"] = None if moved is None else moved / (row["model_read"] + row["model_written"])
    line |= {"L2 hits %": metrics.get(HIT_RATE), "µs": None if seconds is None else seconds * 1e6}
    line["GB/s"] = None if moved is None or not seconds else moved / seconds / 1e9
    return line


def _mega(number: float | None) -> float | None:
    return None if number is None else number / 1e6


def watch(backend: str, seconds: float, report: Report) -> None:
    """Let ncu watch the operators of one backend."""
    with tempfile.TemporaryDirectory(prefix="dbmtl_fused_counters_") as scratch:
        log = Path(scratch) / "ncu.csv"
        command = [cuda_tools.find(NCU) or NCU, *OPTIONS, "--log-file", str(log), *_driver("--backend", backend)]
        try:
            ran = subprocess.run(command, capture_output=True, text=True, timeout=max(1.0, seconds), check=False)
        except subprocess.TimeoutExpired:
            report.failures.append(f"{backend}: cut off after {seconds:.0f} s")
            return
        said = log.read_text(errors="replace") if log.exists() else ""
    output = f"{ran.stdout}\n{ran.stderr}\n{said}"
    print(output[-_LOG_CHARACTERS:], flush=True)
    if reason := refusal(output):
        report.left_out[backend] = reason
    elif ran.returncode == 0 and DONE in ran.stdout and (taken := launches(said)):
        report.add(backend, taken)
    else:
        report.failures.append(f"{backend}: exit code {ran.returncode}, {output.strip().splitlines()[-1:]}")


def _driver(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.counters_driver", *arguments]


def main(argv: Sequence[str] | None = None) -> int:
    """Watch every backend; 0, or 1 if one failed."""
    options = _parse(argv)
    from benchmarks.counters_driver import PARAMS, T  # which needs this module
    from benchmarks.shapes import numbers

    report = Report(T, numbers(PARAMS))
    deadline = time.monotonic() + options.seconds
    if options.device != "cuda":
        subprocess.run(_driver("--backend", "reference", "--device", options.device, "--quick"), check=True)
        report.left_out = dict.fromkeys(BACKENDS, NEEDS_GPU)
    elif cuda_tools.find(NCU) is None:
        report.left_out = dict.fromkeys(BACKENDS, f"{NCU} is neither on the PATH nor in CUDA's folders")
    else:
        for backend in BACKENDS:
            watch(backend, deadline - time.monotonic(), report)
            _write(options.out, report)
    _write(options.out, report)
    print(report.to_text())
    return int(bool(report.failures))


def _write(path: Path | None, report: Report) -> None:
    if path is not None:
        path.write_text(json.dumps(report.to_json(), indent=1) + "\n")
        path.with_suffix(".txt").write_text(report.to_text() + "\n")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.counters", description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for a dry run (default: cuda)")
    parser.add_argument("--seconds", type=float, default=600.0, help="for all backends together (default: 600)")
    parser.add_argument("--out", type=Path, help="JSON file to write; the table goes into a .txt beside it")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
