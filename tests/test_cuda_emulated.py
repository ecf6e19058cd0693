"""The tests of operators and balancer on the CUDA backend without a GPU: its sources on the CPU, under ``cuda_emu``.

A process of its own, as backends are found once, when tests are collected. By hand, to see or select tests::

    DBMTL_FUSED_TEST_CUDA_EMU=1 python -m pytest -k cuda tests/test_ops_values.py
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_emu.build import COMPILER

TESTS = Path(__file__).parent
EVERY_OPERATOR_TEST = sorted(path.name for path in TESTS.glob("test_ops_*.py"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(COMPILER is None, reason="needs g++"),
]


@pytest.mark.parametrize(
    ("files", "selected", "environment", "least"),
    [
        pytest.param(EVERY_OPERATOR_TEST, "cuda", {}, 1000, id="operators"),
        pytest.param(
            ["test_balance_function.py", "test_balancer_capture.py"],
            "cuda",
            {},
            50,
            id="balancer",
        ),
        # Where a grid cannot wait for itself, and where little stays in shared memory.
        pytest.param(["test_ops_values.py"], "cuda and shapes", {"CUDA_EMU_COOPERATIVE": "0"}, 20, id="two_launches"),
        pytest.param(["test_ops_values.py"], "cuda and shapes", {"CUDA_EMU_SHARED_BYTES": "24000"}, 20, id="spill"),
        # Threads of a block, and lanes of a warp, in another order.
        pytest.param(["test_ops_values.py"], "cuda and shapes", {"CUDA_EMU_SEED": "3"}, 20, id="other_order"),
    ],
)
def test_passes_emulated(files: list[str], selected: str, environment: dict[str, str], least: int) -> None:
    """``least``: fewer tests than that were not what was meant to run."""
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", selected, *files],
        cwd=TESTS,
        env=os.environ | {"DBMTL_FUSED_TEST_CUDA_EMU": "1", "DBMTL_FUSED_TEST_DEVICE": "cpu"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-10_000:] + result.stderr[-2000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed is not None
    assert int(passed[1]) >= least
