"""The CUDA kernels under g++'s sanitizers, without a GPU: every thread of the emulation is one to them.

A bug planted in a copy of a kernel must show; so a clean run means something.
"""

from __future__ import annotations

import functools
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from cuda_emu.build import COMPILER, CUDA, EMULATION, KERNELS, build

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs g++")

DRIVER = EMULATION / "kernels_test.cpp"
SANITIZERS = {"address,undefined": ["-fno-sanitize-recover=all"], "thread": []}


@functools.cache
def fixed_addresses() -> list[str]:
    """Some systems randomise addresses more than the sanitizers of g++ 12 can stand; some forbid to switch it off."""
    command = ["setarch", "-R"]
    try:
        return command if subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0 else []
    except FileNotFoundError:
        return []


def run(sanitizer: str, kernels: Sequence[Path], *, seed: int = 0) -> subprocess.CompletedProcess[str]:
    """Build the driver with ``kernels`` and run it."""
    options = [f"-fsanitize={sanitizer}", *SANITIZERS[sanitizer]]
    program = build("kernels_test", [*kernels, DRIVER], ["-O0", "-g", *options], [*options, "-pthread"])
    environment = os.environ | {
        "CUDA_EMU_SMS": "2",
        "CUDA_EMU_THREADS": "2",  # races between blocks show only between OS threads
        "CUDA_EMU_SEED": str(seed),
        "TSAN_OPTIONS": "halt_on_error=1 exitcode=66",
        "ASAN_OPTIONS": "detect_leaks=0",  # stacks of threads are kept for the next launch
    }
    return subprocess.run([*fixed_addresses(), program], capture_output=True, text=True, env=environment, check=False)


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_clean(sanitizer: str) -> None:
    result = run(sanitizer, KERNELS)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "all good" in result.stdout


def test_results_do_not_depend_on_the_order_of_warps() -> None:
    result = run("address,undefined", KERNELS, seed=5)
    assert result.returncode == 0, result.stdout + result.stderr


class Plant(NamedTuple):
    """A bug: ``find`` in a source becomes ``replace``, and ``message`` must come of it."""

    source: str
    find: str
    replace: str
    sanitizer: str
    message: str


PLANTS = {
    "barrier_missing": Plant(
        "gram.cu",
        "] = totals[i].total;\n    __syncthreads();",
        "] = totals[i].total;",
        "thread",
        "data race",
    ),
    "coefficient_read_too_early": Plant(
        "begin_step.cu",
        "  __syncthreads();\n",
        "",
        "thread",
        "data race",
    ),
    "grid_barrier_missing": Plant(
        "balance.cu",
        "cooperative_groups::this_grid().sync();",
        "__syncthreads();",
        "thread",
        "data race",
    ),
    "grid_barrier_skipped_by_a_block": Plant(
        "balance.cu",
        "if (args.phases == (kEma | kSum))",
        "if (args.phases == (kEma | kSum) && blockIdx.x > 0)",
        "address,undefined",
        "deadlock: grid.sync()",
    ),
    "out_of_bounds": Plant(
        "ema_update.cu",
        "ceil_div(numel, kSpan<State>), numel, row",
        "ceil_div(numel, kSpan<State>), numel + 1, row",
        "address,undefined",
        "heap-buffer-overflow",
    ),
    "misaligned_word": Plant(
        "combine.cu",
        "const bool aligned = ",
        "const bool aligned = true || ",
        "address,undefined",
        "misaligned address",
    ),
}


@pytest.mark.parametrize("name", PLANTS)
def test_planted_bug_shows(name: str, tmp_path: Path) -> None:
    plant = PLANTS[name]
    original = (CUDA / plant.source).read_text()
    assert original.count(plant.find) == 1, "the plant no longer fits its source"
    changed = tmp_path / plant.source
    changed.write_text(original.replace(plant.find, plant.replace))
    result = run(plant.sanitizer, [changed if path.name == plant.source else path for path in KERNELS])
    assert result.returncode != 0
    assert plant.message in result.stdout + result.stderr
