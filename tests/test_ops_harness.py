"""The tests' own tools: an oracle or a poison that does not work would let everything pass."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from op_checks import assert_accurate
from op_inputs import BACKENDS, DEVICE, Guarded, assert_same_bits, in_memory_order, tensor

from dbmtl_fused import backends, oracle


@pytest.mark.parametrize("name", backends.BACKENDS)
def test_backend_is_there(name: str) -> None:
    """A backend that could not be tested is listed as skipped, with the reason."""
    if reason := backends.why_not(name, DEVICE.type):
        pytest.skip(f"backend {name!r} on {DEVICE.type}: {reason}")
    assert name in BACKENDS


def test_oracle_on_numbers_done_by_hand() -> None:
    (ema, flag), result = oracle.balance([[0, 0], [2, 0]], [[6, 8], [0, 0]], 0.5, eps=0.0)
    np.testing.assert_array_equal(ema, [[3, 4], [1, 0]])
    assert not flag
    np.testing.assert_array_equal(result.norms, [5, 1])
    np.testing.assert_array_equal(result.weights, [1, 5])
    np.testing.assert_array_equal(result.out, [8, 4])


@pytest.mark.parametrize(
    ("alpha", "expected"), [("max", 9), ("min", 1), ("mean", 4), ("median", 3), ("constant", 7), ("none", 1)]
)
def test_oracle_alpha(alpha: str, expected: float) -> None:
    norms = oracle.real([4, 9, 1, 2])
    assert oracle.alpha_of(norms, alpha, 7.0) == expected
    assert oracle.alpha_of(norms[[0, 2, 3]], "median") == 2


def test_oracle_guard() -> None:
    ema, flag = oracle.ema_update([1, 2, 3], [np.nan, 4, 1e39], 0.5, largest=3.4e38)
    np.testing.assert_array_equal(ema, [1, 3, 3])
    assert flag


@pytest.mark.parametrize(("largest", "limit"), [(3.4e38, 2.0**46), (1.7e308, 2.0**490), (np.inf, 2.0**490)])
def test_oracle_limit(largest: float, limit: float) -> None:
    ema, flag = oracle.ema_update([1, 2, 3], [limit, -limit, 4], 0, largest=largest)
    np.testing.assert_array_equal(ema, [limit, -limit, 4])
    assert not flag
    ema, flag = oracle.ema_update([1, 2, 3], [limit * (1 + 2.0**-52), -limit * 2, 4], 0, largest=largest)
    np.testing.assert_array_equal(ema, [1, 2, 4])
    assert flag


def test_oracle_begin_step() -> None:
    begun = oracle.begin_step([1, -1e-7, -1e-5, 0], 1, active=[1, 1, 1, 0], scale=2, beta=0.5, log_eps=1)
    np.testing.assert_array_equal(begun.seeds, [1, 2, np.nan, 0])
    np.testing.assert_array_equal(begun.betas, [0.5, 0.5, 1, 1])
    assert begun.inv_scale == 0.5
    assert begun.found_inf
    begun = oracle.begin_step([1, 1], 1, scale=1e-40, tiny=1e-38)
    assert begun.inv_scale == 1
    assert not begun.found_inf
    np.testing.assert_array_equal(begun.betas, [1, 1])


def test_oracle_accumulates_without_decay() -> None:
    np.testing.assert_array_equal(oracle.ema_update([4], [8], 0.75, 0.5, accumulate=True).ema, [5])


def test_oracle_agrees_with_the_transcribed_algorithm(rng: np.random.Generator) -> None:
    """Two independent writings of Algorithm 1, the second from the gradients of the losses."""
    ema = expected_ema = np.zeros((3, 7))
    for k in range(1, 6):
        losses, loss_grads = rng.uniform(0.1, 5, 3), rng.standard_normal((3, 7))
        log_grads = oracle.real(loss_grads) / (oracle.real(losses) + oracle.REAL(1e-8))[:, None]
        beta = oracle.REAL(0.9) / np.sqrt(oracle.REAL(k))
        (ema, _), result = oracle.balance(ema, log_grads, beta)
        expected_ema, expected = oracle.algorithm1_step(expected_ema, list(loss_grads), list(losses), k)
        np.testing.assert_allclose(ema, expected_ema, rtol=1e-15)
        np.testing.assert_allclose(result.out, expected, rtol=1e-13)


FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    "allocate",
    [
        lambda like: torch.empty(5, dtype=like.dtype, device=like.device),
        torch.empty_like,
        lambda like: like.new_empty(5),
        lambda like: torch.empty_strided((5,), (2,), dtype=like.dtype, device=like.device),
        lambda like: like[:0].clone().resize_(5),
    ],
    ids=["empty", "empty_like", "new_empty", "empty_strided", "resize_"],
)
def test_fresh_memory_is_poisoned(dtype: torch.dtype, allocate: Callable) -> None:
    assert allocate(torch.zeros(5, dtype=dtype, device=DEVICE)).isnan().all()


def test_number_of_threads_is_fixed() -> None:
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("place", [-1, 3, 4, 9], ids="column {}".format)
def test_guard_sees_stray_writes(place: int) -> None:
    """Rows of three columns at a pitch of five: columns 3 and 4 are padding, 9 is behind the last row."""
    guarded = Guarded(torch.zeros(2, 3, device=DEVICE), offset=1, row_padding=2)
    guarded.view.fill_(7)
    guarded.assert_intact()
    guarded.view.as_strided((1,), (1,), guarded.view.storage_offset() + place).zero_()
    with pytest.raises(AssertionError, match="wrote outside the view"):
        guarded.assert_intact()


def test_accuracy_check_fails_where_it_should() -> None:
    exact, one = oracle.real([1.0, 2.0]), oracle.real([1.0, 1.0])

    def check(actual: list[float], reference: list[float], floor: float = 0.0, cap: float = 1.0) -> None:
        assert_accurate("it", tensor(actual), tensor(reference), exact, one, floor, cap)

    check([1.25, 2.0], [1.0, 2.125])
    with pytest.raises(AssertionError, match=re.escape("it: error 0.5, the reference's is 0.125, the limit 0.25")):
        check([1.5, 2.0], [1.0, 2.125])
    with pytest.raises(AssertionError, match=re.escape("the limit 0.0625")):
        check([1.125, 2.0], [1.125, 2.0], cap=0.0625)
    with pytest.raises(AssertionError, match="1 entries are NaN"):
        check([np.nan, 2.0], [1.0, 2.0])


def test_bitwise_check_sees_signs_of_zeros_but_not_of_nans() -> None:
    assert_same_bits("nan", tensor([np.nan]), -tensor([np.nan]))
    with pytest.raises(AssertionError, match="zero: 1 of 2 entries"):
        assert_same_bits("zero", tensor([0.0, 1.0]), tensor([-0.0, 1.0]))


def test_memory_order_is_what_the_name_says() -> None:
    flat = torch.arange(8.0 * 3 * 5 * 7, device=DEVICE)
    last = in_memory_order(flat, (8, 3, 5, 7), (0, 2, 3, 1))
    assert last.shape == (8, 3, 5, 7)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert last.data_ptr() == flat.data_ptr()
