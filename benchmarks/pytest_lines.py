"""A pytest plugin that writes one line of JSON for every finished test: what a run that is killed has shown so far.

``python -m pytest -p benchmarks.pytest_lines --lines FILE``; under pytest-xdist only the controller writes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--lines", type=Path, help="file to write a line of JSON to for every finished test")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--lines")
    if path and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder(path))


class Recorder:
    """Writes ``{"test", "outcome", "seconds", "why"}``; a test that passes has no ``why``."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", buffering=1)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:  # a setup or teardown that passes is no news
            self._write(report.nodeid, "failed" if report.failed else report.outcome, report.duration, _why(report))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if not report.passed:
            self._write(report.nodeid, "failed" if report.failed else report.outcome, 0.0, _why(report))

    def _write(self, test: str, outcome: str, seconds: float, why: str) -> None:
        line = {"test": test, "outcome": outcome, "seconds": round(seconds, 3), "why": why}
        self._file.write(json.dumps(line) + "\n")


def _why(report: Any) -> str:
    """The traceback of a failure, or the reason of a skip."""
    if report.skipped and isinstance(report.longrepr, tuple):
        return report.longrepr[2].removeprefix("Skipped: ")
    return "" if report.passed else str(report.longrepr)
