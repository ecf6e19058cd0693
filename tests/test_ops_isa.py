"""The C++ backend picks its vectors by what the machine can do: every choice must give the same bits.

Sums have a fixed number of lanes, whatever the width of the vectors that hold them; all else goes element by element.
So a checkpoint continues bit for bit on another machine.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from op_inputs import DEVICE, GRAD_DTYPES, STATE_DTYPES, Row, Segments, random_rows, run_balance, tensor

VARIABLE = "DBMTL_FUSED_CPU_ISA"

_C = pytest.importorskip("dbmtl_fused._C")
LEVELS = _C.build_info()["cpu_isa_levels"]
pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="the C++ backend's vectors only concern CPUs")


def digest() -> str:
    """Bits of everything both kinds of update write, for all dtypes."""
    rng = np.random.default_rng(0)
    result = hashlib.sha256()
    for state_dtype in STATE_DTYPES:
        for dtype in GRAD_DTYPES:
            ema, grads = tensor(random_rows(rng, 5, 9011), state_dtype), tensor(random_rows(rng, 5, 9011), dtype)
            row = Row(ema[0].clone(), Segments.of([9011], align=1)).update("cpu", [grads[0]])
            for values in (*run_balance("cpu", ema, grads, 0.7), *row.state().values()):
                result.update(
                    values.contiguous().view(torch.uint8).numpy().tobytes() if values.dim() else str(values).encode()
                )
    # A sum that is larger than caches are.
    ema = tensor(random_rows(rng, 1, 2**22 + 5))
    result.update(run_balance("cpu", ema, torch.zeros_like(ema), 1.0).out.numpy().tobytes())
    return result.hexdigest()


@pytest.mark.parametrize("level", LEVELS)
def test_same_bits_with_any_vectors(level: str) -> None:
    if LEVELS.index(level) > LEVELS.index(_C.build_info()["cpu_isa"]):
        pytest.skip(f"the machine has no {level}, or {VARIABLE} forbids it")
    code = "import test_ops_isa; from dbmtl_fused import _C; print(_C.build_info()['cpu_isa'], test_ops_isa.digest())"
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    child = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, VARIABLE: level, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert child.returncode == 0, child.stderr
    assert child.stdout.split() == [level, digest()]
