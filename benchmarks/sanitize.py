"""compute-sanitizer over :mod:`benchmarks.sanitize_driver`: ``python -m benchmarks.sanitize --lines FILE``.

All of its tools at once, each in a process, as most of their time is the host's. One line of JSON for each that ends,
as of :mod:`benchmarks.pytest_lines`. Some systems refuse it the device: that, and that it is not there, is a skip.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import cuda_tools

SANITIZER = "compute-sanitizer"
CHECKS = (
    # A tool, the backend that it watches, and every how many cases: what Triton compiles, it compiles for each.
    *((tool, "cuda", 1) for tool in ("memcheck", "racecheck", "initcheck", "synccheck")),
    ("memcheck", "triton", 3),
)
ERROR_EXIT_CODE = 9
OPTIONS = (
    *("--error-exitcode", str(ERROR_EXIT_CODE), "--print-limit", "20", "--target-processes", "application-only"),
    *("--launch-timeout", "0"),  # torch takes a while to load
    *("--report-api-errors", "no"),  # torch asks for what may not be there; those that matter raise
)

ENVIRONMENT = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
"""Memory of its own for each tensor: sanitizers know no smaller bounds."""

READY, DONE, NOT_HERE = "the device is ready", "all cases done", "not here: "
"""What the driver prints once memory can be allocated, at the end, and instead of both where the backend is missing."""

PASSED, FAILED, SKIPPED, CUT_OFF = "passed", "failed", "skipped", "cut off"

_REFUSED = re.compile(r".*Device not supported.*")
_UNKNOWN_ERROR = re.compile(r".*(\b999\b|cudaErrorUnknown|CUDA_ERROR_UNKNOWN|unknown error).*", re.IGNORECASE)
_CLEAN = re.compile(r"^========= .*SUMMARY: 0 ", re.MULTILINE)
_CASE = re.compile(r"^case (\d+ of \d+)", re.MULTILINE)
_MARK = "========="
_SHOWN_CHARACTERS, _SHOWN_LINES, _LOG_CHARACTERS = 1500, 8, 6000
_POLL_SECONDS = 0.2


@dataclass
class Running:
    """One tool at work."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    started: float


def main(argv: Sequence[str] | None = None) -> int:
    """Run all tools that can be; 0, or 1 if one found something or failed. One without time to end did neither."""
    options = _parse(argv)
    if reason := _why_not(options.device):
        for tool, backend, _ in CHECKS:
            _record(options.lines, _name(tool, backend), SKIPPED, reason, 0.0)
        return 0
    deadline = time.monotonic() + options.seconds
    with tempfile.TemporaryDirectory(prefix="dbmtl_fused_sanitize_") as scratch:
        running = [_start(*check, Path(scratch)) for check in CHECKS]
        outcomes = []
        while running:
            late = time.monotonic() > deadline
            for one in [one for one in running if late or one.process.poll() is not None]:
                running.remove(one)
                outcomes.append(_end(one, options.lines))
            time.sleep(_POLL_SECONDS)
    return int(FAILED in outcomes)


def _why_not(device: str) -> str:
    if device != "cuda":
        return "needs a GPU"
    return "" if cuda_tools.find(SANITIZER) else f"{SANITIZER} is neither on the PATH nor in CUDA's folders"


def _start(tool: str, backend: str, every: int, scratch: Path) -> Running:
    driver = [sys.executable, "-u", "-m", "benchmarks.sanitize_driver", "--backend", backend, "--every", str(every)]
    log = scratch / f"{tool}_{backend}.log"
    with log.open("w") as output:
        command = [cuda_tools.find(SANITIZER) or SANITIZER, "--tool", tool, *OPTIONS, *driver]
        process = subprocess.Popen(
            command,
            env={**os.environ, **ENVIRONMENT},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    return Running(_name(tool, backend), process, log, time.monotonic())


def _end(one: Running, lines: Path | None) -> str:
    """Judge, print and record one that has ended, or has to."""
    code, seconds = one.process.poll(), time.monotonic() - one.started
    if code is None:
        one.process.kill()
        one.process.wait()
    output = one.log.read_text(errors="replace")
    outcome, why = judge(code, output)
    print(f"\n{output[-_LOG_CHARACTERS:]}", flush=True)
    _record(lines, one.name, outcome, why, seconds)
    return outcome


def judge(code: int | None, output: str) -> tuple[str, str]:
    """What came of a tool, and why.

    Clean is only what says so itself and whose driver came to its end: an exit code of 0 alone may come from a tool
    that ran nothing. What was cut off before it had anything to say is neither clean nor failed.

    :param code: Its exit code; None if it was cut off.
    """
    if reason := refusal(output):
        return SKIPPED, reason
    if code == 0 and DONE in output and _CLEAN.search(output):
        return PASSED, ""
    found = [line for line in output.splitlines() if line.startswith(_MARK)][1:]  # without the banner
    others = [line for line in output.splitlines() if not line.startswith(_MARK)]
    if code is None and not found:
        done = _CASE.findall(output)
        return CUT_OFF, f"cut off after {done[-1] if done else 'none'} of its cases"
    parts = ["cut off for want of time" if code is None else f"exit code {code}"]
    parts += ["\n".join(found)[:_SHOWN_CHARACTERS], *others[-_SHOWN_LINES:]]
    return FAILED, "\n".join(parts)[: _SHOWN_CHARACTERS + 450]


def refusal(output: str) -> str:
    """Why it could not watch: the backend is not there, or the system does not let it at the device.

    An unknown error later on is a kernel's.
    """
    for line in output.splitlines():
        if line.startswith(NOT_HERE):
            return line.removeprefix(NOT_HERE)
        if _REFUSED.match(line) or (READY not in output and _UNKNOWN_ERROR.match(line)):
            return f"{SANITIZER}: {line.strip('= ')}"
    return ""


def _name(tool: str, backend: str) -> str:
    return f"{SANITIZER}::{tool}, {backend}"


def _record(path: Path | None, name: str, outcome: str, why: str, seconds: float) -> None:
    print(f"{name}: {outcome} after {seconds:.1f} s {why.splitlines()[0] if why else ''}", flush=True)
    if path is not None:
        with path.open("a") as lines:
            line = {"test": name, "outcome": outcome, "seconds": round(seconds, 3), "why": why}
            lines.write(json.dumps(line) + "\n")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sanitize", description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for a dry run (default: cuda)")
    parser.add_argument("--seconds", type=float, default=600.0, help="for each tool (default: 600)")
    parser.add_argument("--lines", type=Path, help="file to add a line of JSON to for each tool")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
