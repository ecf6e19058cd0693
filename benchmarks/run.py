"""Measure every bar of the package on this machine: ``python benchmarks/run.py [ops|step|memory|all]``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ != "benchmarks":  # run as a script: appended, so that an installed dbmtl_fused is what gets measured
    sys.path.append(str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks import bench_memory, bench_ops, bench_step, report
from dbmtl_fused import backends


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the tables and, with ``--out``, write JSON.

    :returns: 0; with ``--strict`` 1 if a bar was missed.
    """
    options = _parse(argv)
    torch.set_num_threads(options.threads)
    # Few rounds would do for a smoke test; below 20 no median is published.
    rounds = 3 if options.quick else options.repeats
    found = report.environment(options.threads)
    print(report.environment_to_text(found), flush=True)
    # Said explicitly, so that a process started later raises rather than measure another one.
    os.environ[backends.ENVIRONMENT_VARIABLE] = found["backend"]
    sections: list[report.Section] = []
    for name in ("ops", "step", "memory") if options.what == "all" else (options.what,):
        if name == "ops":
            added = bench_ops.run(rounds=rounds, quick=options.quick, compiled=options.compile)
        elif name == "step":
            added = bench_step.run(rounds=rounds, quick=options.quick, threads=options.threads)
        else:
            added = bench_memory.run(quick=options.quick, threads=options.threads)
        for section in added:
            print(section.to_text(), flush=True)
        sections += added
    print(report.bars_to_text(sections, options.quick))
    if options.out:
        settings = {"what": options.what, "rounds": rounds, "quick": options.quick, "compile": options.compile}
        report.write_json(options.out, found, settings, sections)
        print(f"\nwrote {options.out}")
    missed = any(not bar.passed for section in sections for bar in section.bars)
    return int(missed and options.strict)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks/run.py", description=__doc__)
    parser.add_argument("what", nargs="?", choices=("ops", "step", "memory", "all"), default="all")
    parser.add_argument("--quick", action="store_true", help="tiny sizes and few rounds: shows that everything runs")
    parser.add_argument("--threads", type=int, default=2, help="of torch (default: 2)")
    parser.add_argument("--repeats", type=int, default=20, help="rounds, each with one sample of every candidate")
    parser.add_argument("--compile", action="store_true", help="torch.compile(reference) as one more candidate for ops")
    parser.add_argument("--out", type=Path, help="JSON file to write, such as benchmarks/results/cpu.json")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if a bar is missed")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
