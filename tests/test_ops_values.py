"""Every operator on every backend against the float64 oracle, over shapes, dtypes, alpha modes and steps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from op_checks import (
    assert_balanced,
    assert_ema,
    check_balance,
    check_combine,
    check_ema_update,
    check_gram,
    ema_magnitude,
)
from op_inputs import (
    ALPHA_MODES,
    DEVICE,
    EXACT_STATE_DTYPES,
    GRAD_DTYPES,
    LARGE,
    STATE_DTYPES,
    Row,
    Segments,
    array,
    assert_same_bits,
    exactly,
    random_rows,
    run_balance,
    tensor,
)
from torch import Tensor

from dbmtl_fused import oracle
from dbmtl_fused._ops import compute_dtype

TASKS = (1, 2, 3, 5, 11, 16, 17, 64)
COLUMNS = (0, 1, 127, 128, 129, 4095, 4097)
SHAPES = [(T, P) for T in TASKS for P in COLUMNS] + [(1, LARGE), (3, LARGE)]
NUMELS = {"nothing": [0], "one": [1], "several": [129, 1, 0, 4097, 256, 8192, 3], "large": [LARGE, 5]}

shapes = pytest.mark.parametrize(("T", "P"), SHAPES, ids=[f"{T}x{P}" for T, P in SHAPES])
dtypes = pytest.mark.parametrize("dtype", GRAD_DTYPES, ids=str)
states = pytest.mark.parametrize("state_dtype", STATE_DTYPES, ids=str)
out_dtypes = pytest.mark.parametrize("out_dtype", GRAD_DTYPES, ids=str)
alphas = pytest.mark.parametrize("alpha", ALPHA_MODES)
writes_or_adds = pytest.mark.parametrize("accumulate", [False, True], ids=["write", "add"])


def poisoned(P: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(P, dtype=dtype, device=DEVICE)


@shapes
def test_balance_shapes(backend: str, rng: np.random.Generator, T: int, P: int) -> None:
    check_balance(backend, tensor(random_rows(rng, T, P)), tensor(random_rows(rng, T, P)), exactly(rng.uniform()))


@dtypes
@states
@out_dtypes
@pytest.mark.parametrize("P", [129, 4097])
def test_balance_dtypes(
    backend: str, rng: np.random.Generator, dtype: torch.dtype, state_dtype: torch.dtype, out_dtype: torch.dtype, P: int
) -> None:
    ema, grads = tensor(random_rows(rng, 3, P), state_dtype), tensor(random_rows(rng, 3, P), dtype)
    check_balance(backend, ema, grads, exactly(rng.uniform(), state_dtype), out=poisoned(P, out_dtype))


@alphas
@states
@pytest.mark.parametrize("T", TASKS)
def test_balance_alpha(backend: str, rng: np.random.Generator, alpha: str, state_dtype: torch.dtype, T: int) -> None:
    ema, grads = (tensor(random_rows(rng, T, 300), state_dtype) for _ in range(2))
    check_balance(backend, ema, grads, 0.75, alpha=alpha)


@pytest.mark.parametrize("eps", [1e-8, 0.5, 0.0])
def test_balance_eps(backend: str, rng: np.random.Generator, eps: float) -> None:
    """``eps`` is added to the norms: with large values of it that shows."""
    check_balance(backend, tensor(random_rows(rng, 4, 129)), tensor(random_rows(rng, 4, 129)), 0.5, eps=eps)


@pytest.mark.parametrize("T", [1, 3, 64])
@pytest.mark.parametrize("state_dtype", EXACT_STATE_DTYPES, ids=str)
def test_balance_many_steps(backend: str, rng: np.random.Generator, T: int, state_dtype: torch.dtype) -> None:
    """Errors of the state add up over steps: the oracle keeps a state of its own."""
    P = 131
    emas = {name: torch.zeros(T, P, dtype=state_dtype, device=DEVICE) for name in (backend, "reference")}
    exact = magnitude = np.zeros((T, P), dtype=oracle.REAL)
    for k in range(1, 51):
        grads = tensor(random_rows(rng, T, P), torch.bfloat16)
        beta = exactly(0.9 / k**0.5, state_dtype)
        (exact, _), expected = oracle.balance(exact, array(grads), beta)
        magnitude = ema_magnitude(magnitude, array(grads), beta)
        results = {
            name: run_balance(name, ema, grads, beta, out=poisoned(P, state_dtype)) for name, ema in emas.items()
        }
        assert_ema(emas[backend], emas["reference"], exact, magnitude)
        assert_balanced(results[backend], results["reference"], expected, magnitude)


def combine_inputs(
    rng: np.random.Generator,
    T: int,
    P: int,
    state_dtype: torch.dtype = torch.float32,
    out_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """``ema``, ``sq_norms``, and an ``out`` that is not empty."""
    ema = tensor(random_rows(rng, T, P), state_dtype)
    sq_norms = tensor(np.square(array(ema)).sum(axis=1), compute_dtype(state_dtype))
    return ema, sq_norms, tensor(rng.standard_normal(P) * 100, out_dtype)


@shapes
def test_combine_shapes(backend: str, rng: np.random.Generator, T: int, P: int) -> None:
    check_combine(backend, *combine_inputs(rng, T, P))


@states
@out_dtypes
@writes_or_adds
def test_combine_dtypes(
    backend: str, rng: np.random.Generator, state_dtype: torch.dtype, out_dtype: torch.dtype, accumulate: bool
) -> None:
    check_combine(backend, *combine_inputs(rng, 5, 4097, state_dtype, out_dtype), accumulate=accumulate)


@alphas
@pytest.mark.parametrize("T", TASKS)
def test_combine_alpha(backend: str, rng: np.random.Generator, alpha: str, T: int) -> None:
    check_combine(backend, *combine_inputs(rng, T, 129), alpha=alpha)


@writes_or_adds
@pytest.mark.parametrize("scale", [65536.0, 0.37109375, 0.0])
def test_combine_scale(backend: str, rng: np.random.Generator, scale: float, accumulate: bool) -> None:
    """``scale`` multiplies the sum and nothing else: neither ``weights`` nor what was in ``out`` before."""
    check_combine(backend, *combine_inputs(rng, 3, 4097), scale=scale, accumulate=accumulate)


@alphas
@pytest.mark.parametrize("T", TASKS)
def test_combine_preference(backend: str, rng: np.random.Generator, alpha: str, T: int) -> None:
    """Applied after alpha; tasks with 0 take no part in it."""
    ema, sq_norms, out = combine_inputs(rng, T, 129)
    preference = tensor(rng.uniform(0.1, 10, T) * (rng.uniform(size=T) < 0.6))
    check_combine(backend, ema, sq_norms, out, preference=preference, alpha=alpha)


@alphas
@pytest.mark.parametrize("T", [1, 3, 17])
def test_combine_without_a_task(backend: str, rng: np.random.Generator, alpha: str, T: int) -> None:
    """Nobody takes part: zeros, neither NaN nor what was there before."""
    result = check_combine(backend, *combine_inputs(rng, T, 129), preference=tensor(np.zeros(T)), alpha=alpha)
    assert not result.out.any()
    assert not result.weights.any()


@alphas
@states
@pytest.mark.parametrize("zeros", [1, 4, 5])
def test_combine_zero_rows(
    backend: str, rng: np.random.Generator, alpha: str, state_dtype: torch.dtype, zeros: int
) -> None:
    """``min`` looks past rows of zeros, the others do not; unless all are."""
    ema, sq_norms, out = combine_inputs(rng, 5, 129, state_dtype)
    ema[:zeros], sq_norms[:zeros] = 0, 0
    result = check_combine(backend, ema, sq_norms, out, alpha=alpha)
    if alpha == "min":
        assert (float(result.alpha) > 0) == (zeros < 5)


@pytest.mark.parametrize("P", [0, 129, 70_001])
@pytest.mark.parametrize("counts", [True, False], ids=["end of a step", "not its end"])
@pytest.mark.parametrize("found_inf", [0.0, 1.0])
def test_combine_counts_steps(backend: str, rng: np.random.Generator, P: int, counts: bool, found_inf: float) -> None:
    """Once, whatever the number of blocks; not where there was something that is not finite."""
    check_combine(backend, *combine_inputs(rng, 3, P), counts=counts, found_inf=found_inf)


def test_combine_norms_of_a_whole_that_ema_is_a_part_of(backend: str, rng: np.random.Generator) -> None:
    """``sq_norms`` are taken as given (ranks all-reduce them first), never computed from ``ema``."""
    ema, sq_norms, out = combine_inputs(rng, 3, 129)
    check_combine(backend, ema, sq_norms * 7, out)


@dtypes
@states
@pytest.mark.parametrize("numels", NUMELS.values(), ids=NUMELS.keys())
@pytest.mark.parametrize("inv_scale", [1.0, 1 / 1024, 0.3])
def test_ema_update(
    backend: str,
    rng: np.random.Generator,
    numels: list[int],
    dtype: torch.dtype,
    state_dtype: torch.dtype,
    inv_scale: float,
) -> None:
    segments = Segments.of(numels)
    row = Row(tensor(rng.standard_normal(segments.P), state_dtype), segments)
    grads = [tensor(rng.standard_normal(numel) / inv_scale, dtype) for numel in numels]
    beta = exactly(rng.uniform(), state_dtype)
    check_ema_update(backend, row, grads, beta=beta, inv_scale=exactly(inv_scale, state_dtype))


@pytest.mark.parametrize("numels", [[129, 1, 0, 4097, 256]], ids=str)
@pytest.mark.parametrize("accumulate", [False, True], ids=["decay", "add"])
@pytest.mark.parametrize("inv_scale", [1.0, np.inf])
@states
def test_ema_update_beta_of_one(
    backend: str,
    rng: np.random.Generator,
    numels: list[int],
    accumulate: bool,
    inv_scale: float,
    state_dtype: torch.dtype,
) -> None:
    """The row stays, bit for bit, whatever the gradients: NaNs in them raise no flag. Norms are those of the row."""
    segments = Segments.of(numels)
    start = tensor(rng.standard_normal(segments.P) * (rng.uniform(size=segments.P) < 0.9), state_dtype) * -1.0
    row = Row(start.clone(), segments)
    grads = [tensor(np.where(rng.uniform(size=n) < 0.5, np.nan, 1e30)) for n in numels]
    check_ema_update(backend, row, grads, beta=1.0, inv_scale=inv_scale, accumulate=accumulate)
    assert_same_bits("row", row.row, start)
    assert not row.found_inf


@pytest.mark.parametrize("T", TASKS)
@pytest.mark.parametrize("P", [0, 1, 129, 4097])
def test_gram_shapes(backend: str, rng: np.random.Generator, T: int, P: int) -> None:
    check_gram(backend, tensor(random_rows(rng, T, P)))


@states
@pytest.mark.parametrize("T", [1, 3, 5, 17])
def test_gram_dtypes(backend: str, rng: np.random.Generator, state_dtype: torch.dtype, T: int) -> None:
    check_gram(backend, tensor(random_rows(rng, T, LARGE // 16), state_dtype))
