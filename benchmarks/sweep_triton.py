"""Which launch parameters suit this GPU: ``python -m benchmarks.sweep_triton``.

Every entry of ``dbmtl_fused.triton_kernels.tuning`` is varied one field at a time on scratch buffers, which the kernels
update in place as often as they are timed; then the best value of each field, all together. A choice that computes
something else than float64 does, or cannot be launched, is reported and not timed. Choices of one table take turns with
copies of as many bytes. The entries to commit are printed last.

Under ``TRITON_INTERPRET=1``, ``--device cpu --quick`` shows that everything runs, and measures nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tabulate import tabulate

from benchmarks import comparators, shapes
from benchmarks.comparators import EPS, relative_error
from benchmarks.gpu_info import device_facts
from benchmarks.gpu_problems import (
    FP32,
    LARGE_BYTES,
    TASKS,
    Exact,
    Matrices,
    RowLists,
    columns_of,
    copies,
)
from benchmarks.graph_timing import Calls, buffer_sets, graph_timer
from benchmarks.timing import Quartiles, Sample, Samples, interleave, per_round
from dbmtl_fused import backends
from dbmtl_fused.triton_kernels import balance, tuning

KERNELS = ("ema_update", "combine", "gram", "balance")
RESIDENCIES: tuple[Mapping[str, int], ...] = (
    {"BALANCE_WARPS": 8, "BALANCE_REGISTERS": 255},
    {"BALANCE_WARPS": 32, "BALANCE_REGISTERS": 64},
)
"""Other splits of a multiprocessor's 65,536 registers. They hold for every ``T``, so they are measured, not chosen."""

WORTH_A_CHANGE = 1.005
"""Less than this is noise: the entry stays."""

_MEDIUM_COLUMNS = 11_200_000


class Choice(NamedTuple):
    """An entry of a table of ``tuning``, and constants that are to go with it."""

    table: str
    key: int | None
    entry: Any
    constants: Mapping[str, int] = {}

    def __str__(self) -> str:
        where = self.table if self.key is None else f"{self.table}[{self.key}]"
        return " ".join([f"{where} = {self.entry}", *(f"{name}={value}" for name, value in self.constants.items())])


class Problem(NamedTuple):
    """Scratch buffers, and a kernel to run on them."""

    title: str
    moved: int  # bytes
    calls: Calls
    error: Callable[[], float]


@dataclass
class Outcome:
    """What a choice reached: the share of the better copy for each problem, or why there is none."""

    choice: Choice
    shares: dict[str, Quartiles] = field(default_factory=dict)
    reason: str = ""

    @property
    def score(self) -> float:
        """The geometric mean of the shares."""
        if self.reason or not self.shares:
            return 0.0
        return math.exp(sum(math.log(share.median) for share in self.shares.values()) / len(self.shares))

    def to_json(self) -> dict[str, Any]:
        shares = {title: share._asdict() for title, share in self.shares.items()}
        return {"choice": str(self.choice), "score": self.score, "shares": shares, "reason": self.reason}


@contextlib.contextmanager
def chosen(choice: Choice) -> Iterator[None]:
    """``choice`` instead of what the tables say."""
    entry = choice.entry if choice.key is None else {**getattr(tuning, choice.table), choice.key: choice.entry}
    new = {choice.table: entry, **choice.constants}
    old = {name: getattr(tuning, name) for name in new}
    try:
        for name, value in new.items():
            setattr(tuning, name, value)
        yield
    finally:
        for name, value in old.items():
            setattr(tuning, name, value)


# --- Problems


def ema_update_problem(params: Sequence[shapes.Shape], device: torch.device) -> Problem:
    """One row, all parameters in one call."""
    op = backends.operators("triton").ema_update_
    first = RowLists(params, FP32, device)
    numel = sum(grad.numel() for grad in first.grads)
    sets = [first, *(RowLists(params, FP32, device, i) for i in range(1, buffer_sets(8 * numel, device)))]
    before = first.row.clone()
    exact = before.double().mul_(float(first.beta))
    for (start, count, _), grad in zip(first.tables[0].tolist(), first.grads, strict=True):
        exact[start : start + count] += (1 - float(first.beta)) * grad.double().flatten()

    def error() -> float:
        first.row.copy_(before)
        first.ema_update_(op)
        return max(relative_error(first.row, exact), relative_error(first.sq_norm, exact.square().sum()))

    title = f"ema_update_, {len(params)} tensors, P={numel / 1e6:.4g}M"
    return Problem(title, FP32.bytes("ema_update_", 1, numel), [partial(of.ema_update_, op) for of in sets], error)


def combine_problem(T: int, P: int, device: torch.device) -> Problem:
    op = backends.operators("triton").combine
    moved = FP32.bytes("combine", T, P)
    sets = [Matrices(T, P, FP32, device, i) for i in range(buffer_sets(moved, device))]
    norms = sets[0].sq_norms.double().sqrt()
    exact = (norms.max() / (norms + EPS)) @ sets[0].ema.double()

    def error() -> float:
        sets[0].out.fill_(torch.nan)
        sets[0].combine(op)
        return relative_error(sets[0].out, exact)

    return Problem(f"combine, T={T}, P={P / 1e6:.4g}M", moved, [partial(of.combine, op) for of in sets], error)


def gram_problem(T: int, P: int, device: torch.device) -> Problem:
    op = backends.operators("triton").gram
    moved = FP32.bytes("gram", T, P)
    sets = [Matrices(T, P, FP32, device, i) for i in range(buffer_sets(moved, device))]
    exact = sets[0].ema.double() @ sets[0].ema.double().t()

    def error() -> float:
        sets[0].products.fill_(torch.nan)
        sets[0].gram(op)
        return relative_error(sets[0].products, exact)

    return Problem(f"gram, T={T}, P={P / 1e6:.4g}M", moved, [partial(of.gram, op) for of in sets], error)


def balance_problem(T: int, P: int, device: torch.device) -> Problem:
    op = backends.operators("triton").balance_
    moved = FP32.bytes("balance_", T, P)
    sets = [Matrices(T, P, FP32, device, i) for i in range(buffer_sets((2 * T + 1) * P * 4, device))]
    error = partial(Exact(sets[0]).error_of, op)
    return Problem(f"balance_, T={T}, P={P / 1e6:.4g}M", moved, [partial(of.balance_, op) for of in sets], error)


# --- Choices


def neighbours(current: Choice, fields: Mapping[str, Sequence[int]]) -> list[Choice]:
    """``current`` and what differs from it in one field."""
    found = [current]
    for name, values in fields.items():
        for value in values:
            entry = current.entry._replace(**{name: value})
            if entry != current.entry:
                found.append(current._replace(entry=entry))
    return found


def around(value: int) -> tuple[int, int, int]:
    """Half, the same, twice."""
    return value // 2, value, 2 * value


def together(outcomes: Sequence[Outcome], fields: Mapping[str, Sequence[int]]) -> Choice:
    """The best value of each field; of outcomes that each differ from the first in one field at most."""
    current = outcomes[0].choice
    best = {}
    for name in fields:
        others = [name_ for name_ in fields if name_ != name]
        varied = [
            outcome
            for outcome in outcomes
            if not outcome.choice.constants
            and all(getattr(outcome.choice.entry, other) == getattr(current.entry, other) for other in others)
        ]
        best[name] = getattr(max(varied, key=lambda outcome: outcome.score).choice.entry, name)
    return current._replace(entry=current.entry._replace(**best))


def jobs(kernels: Sequence[str], tasks: Sequence[int], quick: bool) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Every table entry as ``name, function(run)``."""
    medium = 2_000 if quick else _MEDIUM_COLUMNS
    params = [(300, 17), (64,)] if quick else shapes.resnet50()
    warps = (4, 8) if quick else (2, 4, 8, 16)
    if "ema_update" in kernels:
        current = Choice("EMA_UPDATE", None, tuning.EMA_UPDATE)
        yield "ema_update", partial(sweep, current, [partial(ema_update_problem, params)], {"num_warps": warps})
    for T in tasks:
        key = 1 << (T - 1).bit_length()
        if "combine" in kernels:
            sizes = (medium,) if quick else (medium, columns_of(T, LARGE_BYTES // 2))
            entry = tuning.COMBINE[key]
            fields = {"block": around(entry.block)[: 2 if quick else 3], "num_warps": warps[: 1 if quick else 3]}
            problems = [partial(combine_problem, T, P) for P in sizes]
            yield f"combine, T={T}", partial(sweep, Choice("COMBINE", key, entry), problems, fields)
        if "gram" in kernels:
            sizes = (medium,) if quick else (medium, columns_of(T, LARGE_BYTES // 2))
            own = key in tuning.GRAM
            current = Choice("GRAM" if own else "GRAM_LARGE", key if own else None, tuning.gram(T))
            fields = {
                "block": around(current.entry.block)[: 2 if quick else 3],
                "num_warps": warps[: 1 if quick else 3],
            }
            problems = [partial(gram_problem, T, P) for P in sizes]
            yield f"gram, T={T}", partial(sweep, current, problems, fields)
        if "balance" in kernels:
            sizes = (medium,) if quick else (medium, columns_of(T, LARGE_BYTES))
            tile = tuning.BALANCE[key]
            fields = {
                "update_block": around(tile.update_block)[: 2 if quick else 3],
                "sum_block": around(tile.sum_block)[: 1 if quick else 3],
                "num_warps": (tile.num_warps,) if quick else (4, 8, 16),
            }
            problems = [partial(balance_problem, T, P) for P in sizes]
            extra = [] if quick else residencies(Choice("BALANCE", key, tile))
            yield f"balance, T={T}", partial(sweep, Choice("BALANCE", key, tile), problems, fields, extra)


def residencies(current: Choice) -> list[Choice]:
    """``current`` under other splits of the registers."""
    return [
        current._replace(
            entry=current.entry._replace(num_warps=min(current.entry.num_warps, constants["BALANCE_WARPS"])),
            constants=constants,
        )
        for constants in RESIDENCIES
    ]


# --- Measuring


@dataclass
class Run:
    device: torch.device
    rounds: int
    outcomes: dict[str, list[Outcome]] = field(default_factory=dict)
    chosen: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def sweep(
    current: Choice,
    problems: Sequence[Callable[[torch.device], Problem]],
    fields: Mapping[str, Sequence[int]],
    extra: Sequence[Choice] = (),
    *,
    run: Run,
    name: str,
) -> None:
    """Measure one entry: its neighbours, then the best of each field together."""
    built = [problem(run.device) for problem in problems]
    outcomes = compare([*neighbours(current, fields), *extra], built, run)
    combined = together(outcomes, fields)
    if combined not in [outcome.choice for outcome in outcomes]:
        outcomes += compare([combined], built, run)
    run.outcomes[name] = outcomes
    best = max((outcome for outcome in outcomes if not outcome.choice.constants), key=lambda outcome: outcome.score)
    if best.score < WORTH_A_CHANGE * outcomes[0].score:
        best = outcomes[0]
    run.chosen.append(f"{best.choice}  # {best.score:.3f} of copy; was {outcomes[0].score:.3f}: {current.entry}")
    if outcomes[0].reason:
        run.failures.append(f"{current}: {outcomes[0].reason}")


def compare(choices: Sequence[Choice], problems: Sequence[Problem], run: Run) -> list[Outcome]:
    """Shares of the better copy of all choices, in turns with it."""
    outcomes = [Outcome(choice) for choice in choices]
    for problem in problems:
        timers = {name: graph_timer(calls, run.device) for name, calls in copies(problem.moved, run.device).items()}
        copy_names = tuple(timers)
        for outcome in outcomes:
            outcome.reason = outcome.reason or failure(partial(_add_timer, timers, outcome.choice, problem, run.device))
        samples = interleave(timers, run.rounds, warmup=2, title=problem.title)
        better = min(copy_names, key=lambda name: _median(samples, name))
        for outcome in outcomes:
            if (name := str(outcome.choice)) in samples:
                shares = per_round(lambda copy, own: copy / own, samples, better, name)
                outcome.shares[problem.title] = Quartiles.of(shares)
    return outcomes


def _add_timer(timers: dict[str, Callable[[], Sample]], choice: Choice, problem: Problem, device: torch.device) -> None:
    with chosen(choice):
        _check(problem, device)
        timers[str(choice)] = graph_timer(problem.calls, device)


def failure(function: Callable[[], object]) -> str:
    """Call ``function``; why it failed, such as for want of registers or memory, or nothing."""
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _check(problem: Problem, device: torch.device) -> None:
    """Raise unless the kernel runs as it is meant to, and is right."""
    balance._SECOND_LAUNCH.discard(device)  # what was refused to another choice
    with _warnings_raised():
        error = problem.error()
    if not error <= comparators.RTOL:
        raise AssertionError(f"differs from float64 by {error:.1e} of the largest entry")


@contextlib.contextmanager
def _warnings_raised() -> Iterator[None]:
    """A warning of the package, such as that one launch became two, is an error."""

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    messages: list[str] = []
    handler, logger = Collect(logging.WARNING), logging.getLogger("dbmtl_fused")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
    if messages:
        raise RuntimeError("; ".join(messages))


def _median(samples: Samples, name: str) -> float:
    return Quartiles.of([sample.seconds for sample in samples[name]]).median


# --- The whole


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write.

    :returns: 0, or 1 if an entry as it stands was wrong or failed.
    """
    options = _parse(argv)
    device = torch.device(options.device)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    if reason := backends.why_not("triton", device.type):
        print(f"the triton backend is not there on {device.type}: {reason}", file=sys.stderr)
        return 1
    run = Run(device, 1 if options.quick else options.repeats)
    deadline = time.monotonic() + options.seconds
    for name, job in jobs(options.only, options.tasks[:1] if options.quick else options.tasks, options.quick):
        if time.monotonic() > deadline:
            run.left_out.append(name)
            continue
        if reason := failure(partial(job, run=run, name=name)):
            run.failures.append(f"{name}: {reason}")
        else:
            print(f"\n{name}\n{_table(run.outcomes[name])}", flush=True)
        if device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
        _write(options.out, run)
    _write(options.out, run)
    print(_summary(run))
    return int(bool(run.failures))


def _table(outcomes: Sequence[Outcome]) -> str:
    rows = []
    for outcome in sorted(outcomes, key=lambda outcome: -outcome.score):
        row: dict[str, Any] = {"choice": str(outcome.choice)}
        for title, share in outcome.shares.items():
            row[f"{title}: of copy"] = f"{share.median:.3f} ({share.q1:.3f} .. {share.q3:.3f})"
        row["not measured because"] = outcome.reason[:100] or None
        rows.append(row)
    return tabulate(rows, headers="keys")


def _summary(run: Run) -> str:
    parts = ["\nto commit to triton_kernels/tuning.py:", *(f"  {line}" for line in run.chosen)]
    for title, lines in (("FAILED", run.failures), ("left out for want of time", run.left_out)):
        if lines:
            parts += [f"\n{title}:", *(f"  {line}" for line in lines)]
    return "\n".join(parts)


def _write(path: Path | None, run: Run) -> None:
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "device": device_facts(run.device),
        "settings": {"rounds": run.rounds, "left_out": run.left_out},
        "failures": run.failures,
        "chosen": run.chosen,
        "outcomes": {name: [outcome.to_json() for outcome in outcomes] for name, outcomes in run.outcomes.items()},
    }
    path.write_text(json.dumps(content, indent=1) + "\n")
    tables = "\n".join(f"\n{name}\n{_table(outcomes)}" for name, outcomes in run.outcomes.items())
    path.with_suffix(".txt").write_text(f"{tables}\n{_summary(run)}\n")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweep_triton", description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda, or cpu under the interpreter (default: cuda)")
    parser.add_argument("--only", default=KERNELS, type=_kernels, help=f"comma-separated, of {', '.join(KERNELS)}")
    parser.add_argument("--tasks", default=TASKS, type=_numbers, help="comma-separated T (default: 3,11,2,5,16)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, few choices: shows that everything runs")
    parser.add_argument("--repeats", type=int, default=20, help="rounds, each with one sample of every choice")
    parser.add_argument("--seconds", type=float, default=3600.0, help="start no table after so many (default: 3600)")
    parser.add_argument("--out", type=Path, help="JSON file to write; the tables go into a .txt beside it")
    return parser.parse_args(argv)


def _kernels(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if not set(names) <= set(KERNELS):
        raise argparse.ArgumentTypeError(f"kernels must be among {', '.join(KERNELS)}, got {text}")
    return names


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


if __name__ == "__main__":
    sys.exit(main())
