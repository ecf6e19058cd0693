"""Measure every bar of the package on this machine, and beside what people would use instead."""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

if __package__ != "benchmarks":  # run as a script: appended, so that an installed dbmtl_fused is what gets measured
    sys.path.append(str(Path(__file__).resolve().parent.parent))

import torch
from tqdm import tqdm

from benchmarks import bench_lists, bench_memory, bench_ops, bench_step, qm9_folder, report, torchjd_steps
from benchmarks.gpu_info import sampled
from benchmarks.plan import LeftOut, Options, Table
from dbmtl_fused import backends, info

QUICK_ROUNDS = 3


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the tables and, with ``--out``, write JSON anew after each of them.

    :returns: 0, or 1 if a table failed; with ``--strict`` also if a bar was missed.
    """
    parsed = _parse(argv)
    options = _options(parsed)
    torch.set_num_threads(options.threads)
    found = report.environment(options.threads, options.device)
    print(report.environment_to_text(found), flush=True)
    # Said explicitly, so that a process started later raises rather than measure another one.
    os.environ[backends.ENVIRONMENT_VARIABLE] = found["backend"]
    if parsed.what in ("step", "memory", "all") and torchjd_steps.WHY_NOT:
        print(torchjd_steps.WHY_NOT, flush=True)
    settings: dict[str, object] = {"what": parsed.what, "rounds": options.rounds, "quick": options.quick}
    settings["compile"] = options.compiled
    left_out: dict[str, str] = {}
    failed = False
    sections: list[report.Section] = []
    started = time.monotonic()
    todo = list(tables(parsed.what, options))
    with sampled(options.device) as under_load, tqdm(todo, unit="table", desc="bench", disable=None) as bar:
        if options.device.type == "cuda":
            found["nvidia_smi under load"] = under_load
        for title, measure in bar:
            bar.set_postfix_str(title)
            try:
                if time.monotonic() - started > parsed.seconds:
                    raise LeftOut(f"no time left of {parsed.seconds:.0f} s")
                sections.append(measure())
                bar.write(sections[-1].to_text(), file=sys.stdout)
            except LeftOut as reason:
                left_out[title] = str(reason)
                bar.write(f"\n{title}\nleft out: {reason}", file=sys.stdout)
            except Exception as error:  # such as for want of memory; the others are worth measuring all the same
                failed = True
                left_out[title] = f"failed: {type(error).__name__}: {error}"
                bar.write(f"\n{title}\n{traceback.format_exc()}", file=sys.stdout)
            if parsed.out:
                settings["seconds"] = round(time.monotonic() - started, 1)
                report.write_json(parsed.out, {**found, "left_out": left_out}, settings, sections)
    print(report.bars_to_text(sections, options.quick))
    if parsed.out:
        print(f"\nwrote {parsed.out}")
    missed = any(not bar.passed for section in sections for bar in section.bars)
    return int(failed or (missed and parsed.strict))


def tables(what: str, options: Options) -> Iterator[Table]:
    """All that ``what`` stands for. What the bars are about comes first.

    On a GPU the operators have a program of their own, :mod:`benchmarks.bench_gpu_ops`; only their growth is here.
    """
    cpu = options.device.type == "cpu"
    if what in ("ops", "all") and cpu:
        yield from bench_ops.tables(options)
        yield from bench_lists.tables(options)
    if what in ("step", "all"):
        yield from bench_step.tables(options)
    if what in ("memory", "all"):
        yield from bench_memory.tables(options)
    if what in ("ops", "all"):
        yield from bench_ops.growth(options)


def _options(parsed: argparse.Namespace) -> Options:
    return Options(
        device=parsed.device,
        # Few rounds would do for a smoke test; below 20 no median of a bar is published.
        rounds=QUICK_ROUNDS if parsed.quick else parsed.repeats,
        quick=parsed.quick,
        threads=parsed.threads,
        compiled=not parsed.quick if parsed.compile is None else parsed.compile,
        data=parsed.data,
    )


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m dbmtl_fused bench", description=__doc__)
    parser.add_argument("what", nargs="?", choices=("ops", "step", "memory", "all"), default="all")
    parser.add_argument("--device", type=info.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="tiny sizes and few rounds: shows that everything runs")
    parser.add_argument("--threads", type=int, default=2, help="of torch (default: 2)")
    parser.add_argument("--repeats", type=int, default=20, help="rounds, each with one sample of every candidate")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="torch.compile(reference) as one more candidate for ops (default: unless --quick)",
    )
    parser.add_argument("--data", type=Path, help=f"folder of QM9 (default: {qm9_folder.folder()})")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="after which no further table is begun")
    parser.add_argument("--out", type=Path, help="JSON file to write, such as benchmarks/results/cpu.json")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if a bar is missed")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
