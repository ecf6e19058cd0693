"""The one-shot operator and its comparators under pytest-benchmark: ``pytest benchmarks --benchmark-only``.

For looking at one candidate, with statistics and ``--benchmark-compare``. The bars are measured by
``benchmarks/run.py``, where candidates take turns.
"""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import comparators
from benchmarks.bandwidth import Copy, fused_bytes
from benchmarks.bench_ops import BETA, SHAPES

THREADS = 2


@pytest.fixture(autouse=True)
def _threads() -> None:
    torch.set_num_threads(THREADS)


@pytest.mark.parametrize(("T", "P"), SHAPES)
@pytest.mark.parametrize("name", comparators.factories())
def test_balance(benchmark: BenchmarkFixture, name: str, T: int, P: int) -> None:
    ema, grads = comparators.inputs(T, P)
    candidate = comparators.factories()[name](ema, grads, BETA)
    comparators.check(name, candidate, comparators.exact(ema, grads, BETA))
    benchmark.group = f"T={T}, P={P}"
    benchmark(candidate)


@pytest.mark.parametrize(("T", "P"), SHAPES)
def test_copy_of_as_many_bytes(benchmark: BenchmarkFixture, T: int, P: int) -> None:
    benchmark.group = f"T={T}, P={P}"
    benchmark(Copy(fused_bytes(T, P)))
