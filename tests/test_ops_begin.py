"""``begin_step`` on every backend against the oracle: seeds, coefficients, flags."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from op_checks import check_begin_step
from op_inputs import DEVICE, assert_same_bits, exactly, run_begin_step, tensor
from torch import Tensor

from dbmtl_fused._ops import NEGATIVE_LOSS_TOLERANCE

LOSS_DTYPES = (torch.float32, torch.float64)

dtypes = pytest.mark.parametrize("dtype", LOSS_DTYPES, ids=str)
loss_dtypes = pytest.mark.parametrize("loss_dtype", LOSS_DTYPES, ids=str)
logs = pytest.mark.parametrize("log_eps", [1e-8, 0.5, None], ids=["log", "log of more", "no log"])


def random_losses(rng: np.random.Generator, T: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return tensor(10.0 ** rng.uniform(-6, 4, T), dtype)


def which(*flags: bool) -> Tensor:
    return torch.tensor(flags, device=DEVICE)


@pytest.mark.parametrize("T", [1, 2, 3, 31, 32, 33, 64, 257, 1025])
@logs
def test_tasks(backend: str, rng: np.random.Generator, T: int, log_eps: float | None) -> None:
    active = torch.from_numpy(rng.uniform(size=T) < 0.7).to(DEVICE)
    check_begin_step(backend, random_losses(rng, T), 7, log_eps=log_eps)
    check_begin_step(backend, random_losses(rng, T), 7, log_eps=log_eps, active=active)


@dtypes
@loss_dtypes
@logs
def test_dtypes(
    backend: str, rng: np.random.Generator, dtype: torch.dtype, loss_dtype: torch.dtype, log_eps: float | None
) -> None:
    options: dict[str, Any] = {"dtype": dtype, "log_eps": log_eps, "micro_batches": 3, "scale": 2.0**16 * 1.1}
    check_begin_step(backend, random_losses(rng, 11, loss_dtype), 2, **options)


@dtypes
@pytest.mark.parametrize("beta_sigma", [0.0, 0.3, 0.5, 1.0, 2.0, 7.0])
@pytest.mark.parametrize("step", [0, 1, 2, 9999, 2**31 + 5, 2**40 + 1])
def test_schedule(backend: str, rng: np.random.Generator, dtype: torch.dtype, beta_sigma: float, step: int) -> None:
    begun = check_begin_step(backend, random_losses(rng, 2), step, dtype=dtype, beta=0.93, beta_sigma=beta_sigma)
    if step == 0 or beta_sigma == 0:
        assert_same_bits("betas", begun.betas, tensor([0.93, 0.93], dtype))


def test_without_an_ema(backend: str, rng: np.random.Generator) -> None:
    begun = check_begin_step(backend, random_losses(rng, 3), 5, beta=0.0)
    assert torch.equal(begun.betas, torch.zeros_like(begun.betas))


@pytest.mark.parametrize("loss_dtype", LOSS_DTYPES, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -1.0, -1.001e-6])
@logs
def test_losses_without_information(backend: str, loss_dtype: torch.dtype, bad: float, log_eps: float | None) -> None:
    losses = tensor([2.0, bad, 0.0], loss_dtype)
    begun = check_begin_step(backend, losses, 3, log_eps=log_eps)
    harmless = log_eps is None and math.isfinite(bad)
    assert bool(begun.found_inf) != harmless
    begun = check_begin_step(backend, losses, 3, log_eps=log_eps, active=which(True, False, True))
    assert not begun.found_inf
    assert begun.seeds[1] == 0


@loss_dtypes
def test_losses_just_below_zero_count_as_zero(backend: str, loss_dtype: torch.dtype) -> None:
    """Both sides of the tolerance, to the last bit; -0 is 0."""
    zero, last = tensor([-0.0], loss_dtype), tensor([-NEGATIVE_LOSS_TOLERANCE], loss_dtype)
    losses = torch.cat([zero, last / 1e6, last, last.nextafter(tensor([-1.0], loss_dtype))])
    begun = check_begin_step(backend, losses, 3, scale=3.0, log_eps=0.5)
    assert begun.seeds[:3].tolist() == [6.0] * 3
    assert begun.seeds[3].isnan()
    assert begun.found_inf
    assert not check_begin_step(backend, losses[:3], 3, log_eps=1e-8).found_inf


@loss_dtypes
def test_without_a_log_the_sign_of_a_loss_means_nothing(backend: str, loss_dtype: torch.dtype) -> None:
    begun = check_begin_step(backend, tensor([-1e-7, -5.0], loss_dtype), 3, log_eps=None, scale=3.0)
    assert begun.seeds.tolist() == [3.0, 3.0]


def test_nobody_is_there(backend: str, rng: np.random.Generator) -> None:
    begun = check_begin_step(backend, random_losses(rng, 2), 3, active=which(False, False))
    assert begun.betas.tolist() == [1, 1]


@pytest.mark.parametrize("found_inf", [0.0, 1.0])
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("loss", [1.0, math.nan])
def test_flag(backend: str, found_inf: float, accumulate: bool, loss: float) -> None:
    """Written at the beginning of a step, then only raised: a bad micro-batch spoils the whole window."""
    check_begin_step(backend, tensor([0.5, loss]), 0, found_inf=found_inf, accumulate=accumulate)


@pytest.mark.parametrize("scale", [-2.0, math.inf, -math.inf, math.nan, torch.finfo(torch.float32).tiny, 65536.0])
def test_scales(backend: str, scale: float) -> None:
    """Of a loss that somebody multiplies, and of gradient scalers."""
    begun = run_begin_step(backend, tensor([0.5, 2.0]), 0, scale=scale)
    exact = tensor(scale)
    assert_same_bits("inv_scale", begun.inv_scale, exact.reciprocal())
    assert_same_bits("seeds", begun.seeds, exact / (tensor([0.5, 2.0]) + 1e-8))
    assert begun.betas.tolist() == [exactly(0.9)] * 2


@dtypes
@loss_dtypes
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("loss", [0.0, 2.0, math.nan], ids=str)
def test_scales_that_vanish(backend: str, dtype: torch.dtype, loss_dtype: torch.dtype, sign: int, loss: float) -> None:
    """What is multiplied by them cannot be unscaled: all rows keep their EMA. Seeds and flag are the losses' alone."""
    losses, tiny = tensor([loss, 0.5], loss_dtype), torch.finfo(dtype).tiny
    for scale in (0.0, tiny / 2**10, tiny * (1 - 2.0**-20)):
        begun = check_begin_step(backend, losses, 3, dtype=dtype, scale=sign * scale, log_eps=1e-3, micro_batches=2)
        assert begun.betas.tolist() == [1, 1]
        assert float(begun.inv_scale) == 1
        assert not begun.seeds[1].isnan()
        assert bool(begun.found_inf) == math.isnan(loss)
    if tiny >= torch.finfo(loss_dtype).tiny:
        begun = check_begin_step(backend, losses, 3, dtype=dtype, scale=sign * tiny)
        assert begun.betas[1] != 1
        assert float(begun.inv_scale) == sign / tiny


@logs
def test_seeds_have_the_bits_of_autograd(native_backend: str, rng: np.random.Generator, log_eps: float | None) -> None:
    losses = random_losses(rng, 64).requires_grad_()
    objective = losses if log_eps is None else (losses + log_eps).log()
    (objective.sum() * 3.0).backward()
    begun = run_begin_step(native_backend, losses.detach(), 0, scale=3.0, log_eps=log_eps)
    assert losses.grad is not None
    assert_same_bits("seeds", begun.seeds, losses.grad)
