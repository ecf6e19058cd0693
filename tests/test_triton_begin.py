"""``begin_step`` with more tasks than a block: what one block has found, later ones do not forget."""

from __future__ import annotations

import math

import numpy as np
import pytest
from op_checks import check_begin_step
from op_inputs import tensor

pytest.importorskip("triton")
from dbmtl_fused.triton_kernels import tuning

BLOCK = tuning.BEGIN_STEP.block


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("bad", [0, BLOCK - 1, BLOCK, 2 * BLOCK])
def test_one_bad_loss_in_any_block(native_backend: str, rng: np.random.Generator, bad: int, accumulate: bool) -> None:
    losses = tensor(rng.uniform(0.1, 10, 2 * BLOCK + 1))
    losses[bad] = math.nan
    assert check_begin_step(native_backend, losses, 3, accumulate=accumulate).found_inf == 1
