"""Every operator of one backend, each launched once for a profiler to watch.

``python -m benchmarks.counters_driver --backend cuda``; :mod:`benchmarks.counters` runs it. ``T = 3`` and ``P`` that
of a ResNet-18 without classifier: two matrices of 134 MB, more than caches hold.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Sequence

import torch

from benchmarks import shapes
from benchmarks.counters import DONE, NOT_HERE
from benchmarks.gpu_problems import FP32, Beginning, Matrices, RowLists
from benchmarks.graph_timing import synchronize
from dbmtl_fused import backends

T = 3
PARAMS = shapes.resnet18()[:-2]
QUICK_PARAMS = PARAMS[:4]
BEFORE = 3
"""Launches that are not watched: they compile, and leave the caches as steps in a row do."""


def calls(backend: str, device: torch.device, params: list[shapes.Shape]) -> dict[str, Callable[[], object]]:
    """Every operator by its name, ready to be called."""
    ops = backends.operators(backend)
    matrices, rows = Matrices(T, shapes.numbers(params), FP32, device), RowLists(params, FP32, device)
    return {
        "begin_step": functools.partial(Beginning(T, device).begin_step, ops.begin_step),
        "balance_": functools.partial(matrices.balance_, ops.balance_),
        "ema_update_": functools.partial(rows.ema_update_, ops.ema_update_),
        "combine": functools.partial(matrices.combine, ops.combine),
        "gram": functools.partial(matrices.gram, ops.gram),
    }


@contextlib.contextmanager
def watched(device: torch.device) -> Iterator[None]:
    """What a profiler that does not start by itself sees."""
    synchronize(device)
    if device.type == "cuda":
        torch.cuda.profiler.start()
    yield
    synchronize(device)
    if device.type == "cuda":
        torch.cuda.profiler.stop()


def main(argv: Sequence[str] | None = None) -> int:
    """Call each operator, naming it; 0 unless one raises."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.counters_driver", description=__doc__)
    parser.add_argument("--backend", default="cuda", choices=backends.BACKENDS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="small sizes")
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    if reason := backends.why_not(options.backend, device.type):
        print(f"{NOT_HERE}{reason}")
        return 0
    for name, call in calls(options.backend, device, QUICK_PARAMS if options.quick else PARAMS).items():
        for _ in range(BEFORE):
            call()
        with watched(device):
            call()
        print(name, flush=True)
    print(DONE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
