"""Mathematical properties that hold for any input, searched for counterexamples by hypothesis.

Inputs come from a seed rather than entry by entry: what matters are shapes, magnitudes and which rows or entries are
special, and those are drawn one by one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from op_checks import check_balance, error
from op_inputs import ALPHA_MODES, EPS, GRAD_DTYPES, STATE_DTYPES, array, assert_same_bits, exactly, run_balance, tensor
from torch import Tensor

from dbmtl_fused import oracle

seeds = st.integers(0, 2**32 - 1)
columns = st.integers(1, 200) | st.sampled_from([4095, 4096, 4097])
tasks = st.integers(1, 9)
exponents = st.integers(-15, 12)  # beyond that, squares leave float32, or entries their limit
betas = st.sampled_from([0.0, 0.5, exactly(0.9), exactly(0.999)])
alphas = st.sampled_from(ALPHA_MODES)
dtypes = st.sampled_from(GRAD_DTYPES)
states = st.sampled_from(STATE_DTYPES)


@st.composite
def matrices(draw: Any, scales: st.SearchStrategy[int] = exponents) -> oracle.Array:
    """A ``(T, P)`` matrix of normal numbers whose rows have any scale of float32."""
    T, P = draw(tasks), draw(columns)
    powers = draw(st.lists(scales, min_size=T, max_size=T))
    normal = np.random.default_rng(draw(seeds)).standard_normal((T, P))
    return normal * 10.0 ** np.array(powers)[:, None]


moderate = matrices(st.integers(-3, 3))


def zeros_like(values: oracle.Array) -> Tensor:
    return tensor(np.zeros_like(values))


@given(matrices(st.integers(-15, 20)), betas, alphas, states)
def test_any_scale(backend: str, grads: oracle.Array, beta: float, alpha: str, state_dtype: torch.dtype) -> None:
    """Rows between 1e-15 and 1e20 in one matrix, against the oracle; the largest do not get into the EMA."""
    ema = tensor(np.roll(grads, 1, axis=0).clip(-1e13, 1e13), state_dtype)
    check_balance(backend, ema, tensor(grads), beta, alpha=alpha)


@given(moderate, seeds, betas)
def test_order_of_tasks_is_irrelevant(backend: str, grads: oracle.Array, seed: int, beta: float) -> None:
    """Norms, weights and EMA follow the permutation bit for bit; ``out`` only adds its terms in another order."""
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(grads)))
    ema = tensor(grads[::-1] * 0.5)
    expected = run_balance(backend, ema.clone(), tensor(grads), beta)
    permuted = run_balance(backend, ema[order], tensor(grads)[order], beta)
    assert_same_bits("ema", permuted.ema, expected.ema[order])
    assert_same_bits("norms", permuted.norms, expected.norms[order])
    assert_same_bits("weights", permuted.weights, expected.weights[order])
    terms = np.abs(array(expected.weights)[:, None] * array(expected.ema)).sum(axis=0)
    assert error(permuted.out, array(expected.out), terms) <= len(grads) * 2.0**-23


@given(moderate, st.data(), st.sampled_from([2.0**10, 2.0**-7]))
def test_direction_does_not_depend_on_the_scale_of_one_task(
    backend: str, grads: oracle.Array, data: st.DataObject, factor: float
) -> None:
    """Scaling one task's gradients rescales ``out`` by the change of alpha, and does not turn it."""
    task = data.draw(st.integers(0, len(grads) - 1))
    scaled = grads.copy()
    scaled[task] *= factor
    before = run_balance(backend, zeros_like(grads), tensor(grads), 0.0, eps=1e-30)
    after = run_balance(backend, zeros_like(grads), tensor(scaled), 0.0, eps=1e-30)
    ratio = array(after.norms).max() / array(before.norms).max()
    terms = ratio * np.abs(array(before.weights)[:, None] * array(before.ema)).sum(axis=0)
    assert error(after.out, ratio * array(before.out), terms) <= (8 + len(grads)) * 2.0**-23


@given(matrices(), st.integers(-5, 5))
def test_scaling_all_tasks_scales_out(backend: str, grads: oracle.Array, power: int) -> None:
    """By a power of two, so bit for bit: only eps could tell magnitudes apart, and it is scaled too."""
    grads, factor = grads * 1e-3, 2.0**power  # 1e12 * 2**5 would be near the limit of entries
    one = run_balance(backend, zeros_like(grads), tensor(grads), 0.5, eps=2.0**-40)
    scaled = run_balance(backend, zeros_like(grads), tensor(grads) * factor, 0.5, eps=2.0**-40 * factor)
    normal = bool(((one.ema.abs() > 1e-17) | (one.ema == 0)).all())  # squares of smaller ones are rounded as subnormals
    if normal:
        assert_same_bits("norms", scaled.norms, one.norms * factor)
        assert_same_bits("weights", scaled.weights, one.weights)
        assert_same_bits("out", scaled.out, one.out * factor)


@given(matrices(), betas)
def test_every_weighted_row_has_the_largest_norm(backend: str, grads: oracle.Array, beta: float) -> None:
    """Up to eps, which matters for rows whose norm is not far above it, and exactly as much as it should."""
    result = run_balance(backend, tensor(grads), tensor(grads), beta)
    weighted = oracle.row_norms(array(result.weights)[:, None] * array(result.ema))
    norms = oracle.row_norms(array(result.ema))
    expected = norms.max() * norms / (norms + oracle.REAL(EPS))
    np.testing.assert_allclose(weighted.astype(float), expected.astype(float), rtol=1e-5)
    large = norms > 1
    np.testing.assert_allclose(weighted[large].astype(float), float(norms.max()), rtol=1e-5)


@given(moderate, dtypes)
def test_one_task_is_left_as_it_is(backend: str, grads: oracle.Array, dtype: torch.dtype) -> None:
    """T = 1: the weight is 1 up to eps, so ``out`` is the EMA."""
    grads = tensor(grads[:1], dtype)
    result = run_balance(
        backend, torch.zeros_like(grads, dtype=torch.float32), grads, 0.0, out=grads.new_empty(grads.shape[1])
    )
    norm = oracle.row_norms(array(grads))
    expected = array(grads)[0] * (norm / (norm + EPS))
    assert error(result.out, expected, np.abs(expected)) <= 2 * torch.finfo(dtype).eps + 2.0**-20


@given(moderate, betas)
def test_constant_and_none(backend: str, grads: oracle.Array, beta: float) -> None:
    """``constant`` gives every weighted row that norm; ``none`` is the plain sum of the EMA."""
    constant = run_balance(backend, tensor(grads), tensor(grads), beta, alpha="constant", constant=3.0)
    norms = oracle.row_norms(array(constant.ema))
    np.testing.assert_allclose((array(constant.weights) * (norms + EPS)).astype(float), 3.0, rtol=1e-5)
    plain = run_balance(backend, tensor(grads), tensor(grads), beta, alpha="none")
    assert (plain.weights == 1).all()
    terms = np.abs(array(plain.ema)).sum(axis=0)
    assert error(plain.out, array(plain.ema).sum(axis=0), terms) <= len(grads) * 2.0**-23


@given(moderate, st.data(), betas, alphas)
def test_zero_rows(backend: str, grads: oracle.Array, data: st.DataObject, beta: float, alpha: str) -> None:
    """A task without gradient: a finite weight, and nothing added to ``out``."""
    zero = data.draw(st.lists(st.booleans(), min_size=len(grads), max_size=len(grads)))
    grads[zero] = 0
    result = check_balance(backend, zeros_like(grads), tensor(grads), beta, alpha=alpha)
    assert result.weights.isfinite().all()
    assert (result.norms[torch.tensor(zero)] == 0).all()


@given(tasks, columns, betas, alphas, dtypes)
def test_all_zeros(backend: str, T: int, P: int, beta: float, alpha: str, dtype: torch.dtype) -> None:
    """No gradient at all: zeros, neither NaN nor a flag."""
    grads = tensor(np.zeros((T, P)), dtype)
    result = check_balance(backend, tensor(np.zeros((T, P))), grads, beta, alpha=alpha)
    assert not result.ema.any()
    assert not result.out.any()


@given(moderate, st.data(), betas, alphas, dtypes)
def test_non_finite_entries(
    backend: str, grads: oracle.Array, data: st.DataObject, beta: float, alpha: str, dtype: torch.dtype
) -> None:
    """The buffer is not poisoned, the flag is raised, and all of ``out`` is NaN so that a scaler skips the step."""
    T, P = grads.shape
    places = st.tuples(st.integers(0, T - 1), st.integers(0, P - 1))
    bad = data.draw(st.lists(places, min_size=1, max_size=20))
    ema, grads = tensor(np.random.default_rng(0).standard_normal((T, P))), tensor(grads, dtype)
    before = ema.clone()
    for place in bad:
        grads[place] = data.draw(st.sampled_from([np.nan, np.inf, -np.inf]))
    result = check_balance(backend, ema, grads, beta, alpha=alpha)
    assert float(result.found_inf) == 1
    assert result.ema.isfinite().all()
    assert result.norms.isfinite().all()
    assert result.weights.isnan().all()
    assert result.out.isnan().all()
    for place in bad:
        assert_same_bits("held entry", ema[place], before[place])


@given(moderate, betas, alphas)
def test_flag_raised_before(backend: str, grads: oracle.Array, beta: float, alpha: str) -> None:
    """An earlier non-finite gradient of the step: the EMA advances all the same, ``out`` is NaN, the flag stays."""
    result = check_balance(backend, tensor(grads[::-1]), tensor(grads), beta, alpha=alpha, found_inf=1.0)
    assert float(result.found_inf) == 1
    assert result.out.isnan().all()


@given(moderate)
@example(np.array([[2.0**46, 1.0], [0.5, 2.0]]))
def test_beta_zero_keeps_no_memory(backend: str, grads: oracle.Array) -> None:
    ema = torch.full_like(tensor(grads), -7.0)
    result = run_balance(backend, ema, tensor(grads), 0.0)
    assert torch.equal(result.ema, tensor(grads))
    assert float(result.found_inf) == 0


@given(moderate, st.integers(1, 30))
def test_constant_gradients_fill_the_ema(backend: str, grads: oracle.Array, steps: int) -> None:
    """From zero, k steps with the same gradient leave (1 - beta^k) of it; there is no bias correction."""
    ema = zeros_like(grads)
    for _ in range(steps):
        run_balance(backend, ema, tensor(grads), 0.875)
    exact = (1 - oracle.REAL(0.875) ** steps) * array(tensor(grads))
    assert error(ema, exact, np.abs(exact)) <= 4 * steps * 2.0**-23
