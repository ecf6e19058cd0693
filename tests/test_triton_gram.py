"""``gram`` as if on one multiprocessor: programs take several spans of columns, and add to what they left."""

from __future__ import annotations

import numpy as np
import pytest
from op_checks import check_gram
from op_inputs import random_rows, tensor

pytest.importorskip("triton")
from dbmtl_fused.triton_kernels import gram, tuning

P = 20_003


@pytest.mark.parametrize("T", [5, 9])
def test_programs_with_several_spans(
    native_backend: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, T: int
) -> None:
    monkeypatch.setattr(gram, "multiprocessors", lambda device: 1)
    assert tuning.gram(T).spans(T, P, 1)[1] > tuning.GRAM_PROGRAMS
    check_gram(native_backend, tensor(random_rows(rng, T, P)))
