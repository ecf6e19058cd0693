"""``dbmtl_fused.balance_``: what users call. Its values, its defaults, and what it says when it is called wrongly."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from op_checks import assert_balanced, assert_ema, ema_magnitude
from op_inputs import (
    BACKENDS,
    DEVICE,
    EXACT_STATE_DTYPES,
    GRAD_DTYPES,
    SEED,
    Balanced,
    array,
    assert_same_bits,
    exactly,
    flags,
    random_rows,
    run_balance,
    tensor,
)
from torch import Tensor

from dbmtl_fused import backends, balance_, oracle
from dbmtl_fused._ops import compute_dtype
from dbmtl_fused.functional import check_beta, check_in_range

T, P = 3, 130


def zeros(*shape: int, **options: Any) -> Tensor:
    return torch.zeros(shape, device=DEVICE, **options)


@pytest.fixture
def matrices(rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    return tensor(random_rows(rng, T, P)), tensor(random_rows(rng, T, P))


# --- Values


@pytest.mark.parametrize("dtype", GRAD_DTYPES, ids=str)
@pytest.mark.parametrize("state_dtype", EXACT_STATE_DTYPES, ids=str)
@pytest.mark.parametrize("alpha", ["max", "min", "mean", "median", 2.5, 3, None], ids=str)
def test_values(
    backend: str, rng: np.random.Generator, dtype: torch.dtype, state_dtype: torch.dtype, alpha: Any
) -> None:
    ema, grads = tensor(random_rows(rng, T, P), state_dtype), tensor(random_rows(rng, T, P), dtype)
    beta = exactly(0.7, state_dtype)
    mode = alpha if isinstance(alpha, str) else "none" if alpha is None else "constant"
    constant = alpha if mode == "constant" else 1.0
    expected_ema, expected = oracle.balance(array(ema), array(grads), beta, mode, constant)
    reference = run_balance("reference", ema.clone(), grads, beta, alpha=mode, constant=constant)
    magnitude = ema_magnitude(array(ema), array(grads), beta)

    result = balance_(ema, grads, beta, alpha=alpha, backend=backend)
    assert_ema(ema, reference.ema, expected_ema.ema, magnitude)
    assert_balanced(Balanced(ema, *result, flags()), reference, expected, magnitude)
    assert result[0].dtype == dtype
    assert result[1].dtype == result[2].dtype == state_dtype


@pytest.mark.parametrize("as_tensor", [False, True], ids=["integer", "tensor"])
def test_bfloat16_state(backend: str, matrices: tuple[Tensor, Tensor], as_tensor: bool) -> None:
    ema, grads = matrices[0].bfloat16(), matrices[1]
    expected = run_balance(backend, ema.clone(), grads, exactly(0.7))
    seed = torch.tensor(SEED, device=DEVICE) if as_tensor else SEED
    out, norms, weights = balance_(ema, grads, 0.7, seed=seed, backend=backend)
    for name, values in {"ema": ema, "out": out, "norms": norms, "weights": weights}.items():
        assert_same_bits(name, values, getattr(expected, name))
    assert norms.dtype == weights.dtype == torch.float32


def test_steps_of_the_paper(backend: str, rng: np.random.Generator) -> None:
    """Ten iterations of Algorithm 1 as the paper writes it."""
    ema, exact_ema = zeros(T, P, dtype=torch.float64), np.zeros((T, P))
    for k in range(1, 11):
        losses, grads = rng.uniform(0.1, 5, T), random_rows(rng, T, P)
        exact_ema, expected = oracle.algorithm1_step(exact_ema, list(grads), list(losses), k)
        log_grads = tensor(grads / (losses + 1e-8)[:, None], torch.float64)
        out, _, _ = balance_(ema, log_grads, 0.9 / k**0.5, backend=backend)
        np.testing.assert_allclose(array(ema).astype(float), exact_ema.astype(float), rtol=1e-11, atol=1e-13)
        np.testing.assert_allclose(array(out).astype(float), expected.astype(float), rtol=1e-11, atol=1e-11)


def test_returns_what_it_was_given_to_write_to(backend: str, matrices: tuple[Tensor, Tensor]) -> None:
    out = torch.empty(P, dtype=torch.bfloat16, device=DEVICE)
    expected = balance_(matrices[0].clone(), matrices[1], 0.5, backend=backend)
    result = balance_(*matrices, 0.5, out=out, backend=backend)
    assert result[0] is out
    assert_same_bits("out", out, expected[0].bfloat16())


def test_beta_as_tensor(backend: str, matrices: tuple[Tensor, Tensor]) -> None:
    """Read by the kernel, of any floating dtype, and left alone."""
    number = balance_(matrices[0].clone(), matrices[1], 0.75, backend=backend)
    for dtype in GRAD_DTYPES:
        beta = tensor(0.75, dtype)
        for actual, expected in zip(
            balance_(matrices[0].clone(), matrices[1], beta, backend=backend), number, strict=True
        ):
            assert_same_bits("output", actual, expected)
        assert float(beta) == 0.75


def test_eps(backend: str) -> None:
    _, norms, weights = balance_(zeros(1, 1), tensor([[3.0]]), 0.0, eps=1.0, backend=backend)
    assert norms.tolist() == [3.0]
    assert weights.tolist() == [0.75]


@pytest.mark.parametrize(
    ("state_dtype", "eps", "alpha", "beta"),
    [
        (torch.float32, 1e-12, 1e19, 1 - 2.0**-24),
        (torch.float32, 1e-12, 1e-19, 0.0),
        (torch.bfloat16, 1e-12, 1e19, 1 - 2.0**-24),
        (torch.float64, 1e-150, 1e150, 1 - 2.0**-53),
        (torch.float64, 1e-150, 1e-150, 1 - 1e-9),
    ],
)
def test_ends_of_the_ranges(backend: str, state_dtype: torch.dtype, eps: float, alpha: float, beta: float) -> None:
    """What is let in neither vanishes nor overflows where it is computed with."""
    ema, grads = zeros(2, P, dtype=state_dtype), zeros(2, P, dtype=compute_dtype(state_dtype))
    ema[1], grads[1] = 1, 1
    seed = SEED if state_dtype is torch.bfloat16 else None
    out, norms, weights = balance_(ema, grads, beta, eps=eps, alpha=alpha, seed=seed, backend=backend)
    assert norms[0] == 0
    assert weights.isfinite().all()
    assert (weights > 0).all()
    assert (norms * weights)[1].item() == pytest.approx(alpha, rel=1e-5)
    assert out.isfinite().all()


def test_half_way_to_one() -> None:
    """The first number that is rounded to 1 raises; the one before it is rounded to the last below 1."""
    half_way = 1 - 2.0**-25
    below = float(np.nextafter(half_way, 0))
    assert (float(torch.tensor(half_way)), float(torch.tensor(below))) == (1, 1 - 2.0**-24)
    with pytest.raises(ValueError, match="beta must be < 1 once rounded to float32"):
        check_beta(half_way, torch.float32)
    check_beta(below, torch.float32)
    check_beta(half_way, torch.float64)


def test_ranges_of_arguments_of_others() -> None:
    """Numbers that may be 0, or that have another least number."""
    for value in (0, 1e-19, 1e19):
        check_in_range("preference", value, torch.float32, or_zero=True)
    check_in_range("log_eps", 1.2e-38, torch.float32, low=torch.finfo(torch.float32).tiny)
    for bad, dtype, options, message in [
        (-1, torch.float32, {"or_zero": True}, "x must be >= 0, got -1"),
        (0, torch.float32, {}, "x must be > 0, got 0"),
        ("1", torch.float32, {}, "x must be a number, got str"),
        (1e-160, torch.float64, {"or_zero": True}, "x must be 0 or from 1e-150 to 1e+150 in float64 arithmetic, got"),
        (1e-13, torch.float32, {"low": 1e-12, "cure": "float64 losses"}, "got 1e-13; use float64 losses for more"),
    ]:
        with pytest.raises((TypeError, ValueError), match=re.escape(message)):
            check_in_range("x", bad, dtype, **options)


@pytest.mark.parametrize("integer", [np.int64, np.int32, np.uint8, np.uint64], ids=lambda kind: kind.__name__)
def test_seeds_of_numpy(backend: str, matrices: tuple[Tensor, Tensor], integer: type) -> None:
    expected, found = (matrices[0].bfloat16() for _ in range(2))
    balance_(expected, matrices[1], 0.5, seed=7, backend=backend)
    balance_(found, matrices[1], 0.5, seed=integer(7), backend=backend)
    assert_same_bits("ema", found, expected)


def test_default_backend_is_one_of_those_there(
    matrices: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "DEFAULT", "auto")
    assert backends.resolve("auto", DEVICE) == BACKENDS[0]
    expected = balance_(matrices[0].clone(), matrices[1], 0.5, backend=BACKENDS[0])
    for actual, values in zip(balance_(*matrices, 0.5), expected, strict=True):
        assert_same_bits("output", actual, values)


def test_gradients_may_require_grad(backend: str, matrices: tuple[Tensor, Tensor]) -> None:
    """Gradients go in and a gradient comes out: nothing is recorded."""
    ema, grads = matrices
    out, norms, weights = balance_(ema, (grads.requires_grad_() * 2), 0.5, backend=backend)
    assert not any(values.requires_grad for values in (ema, out, norms, weights))


def test_inference_mode_and_autocast(backend: str, matrices: tuple[Tensor, Tensor]) -> None:
    """Neither changes a bit."""
    expected = balance_(matrices[0].clone(), matrices[1], 0.5, backend=backend)
    with torch.inference_mode():
        inference = balance_(matrices[0].clone(), matrices[1], 0.5, backend=backend)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        autocast = balance_(matrices[0].clone(), matrices[1], 0.5, backend=backend)
    for result in (inference, autocast):
        for actual, values in zip(result, expected, strict=True):
            assert_same_bits("output", actual, values)


def test_mutation_is_visible_to_autograd(backend: str, matrices: tuple[Tensor, Tensor]) -> None:
    """Something saved for a backward pass that was then overwritten must be noticed."""
    ema, grads = matrices
    weight = zeros(T, P, requires_grad=True)
    loss = (weight * ema).sum()
    balance_(ema, grads, 0.5, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_non_finite_gradient(backend: str, matrices: tuple[Tensor, Tensor]) -> None:
    ema, grads = matrices
    before = ema[1, 7].clone()
    grads[1, 7] = torch.inf
    out, norms, weights = balance_(ema, grads, 0.5, backend=backend)
    assert ema.isfinite().all()
    assert ema[1, 7] == before
    assert norms.isfinite().all()
    assert weights.isnan().all()
    assert out.isnan().all()


def test_no_columns(backend: str) -> None:
    out, norms, weights = balance_(zeros(T, 0), zeros(T, 0), 0.5, backend=backend)
    assert out.shape == (0,)
    assert norms.tolist() == weights.tolist() == [0.0] * T


def test_rows_of_one_buffer_may_alternate(backend: str, matrices: tuple[Tensor, Tensor]) -> None:
    """Not an overlap, although the address ranges intersect."""
    expected = balance_(matrices[0].clone(), matrices[1], 0.5, backend=backend)
    both = torch.cat(matrices, dim=1)
    result = balance_(both[:, :P], both[:, P:], 0.5, backend=backend)
    for actual, values in zip(result, expected, strict=True):
        assert_same_bits("output", actual, values)


# --- Errors: which parameter, which rule, what was found

DTYPES = "(torch.float32, torch.bfloat16, torch.float16, torch.float64)"
NAMES = "('max', 'min', 'mean', 'median')"
STRIDES = "must have adjacent columns and rows that do not overlap, got strides"

BFLOAT16 = {"ema": zeros(T, P, dtype=torch.bfloat16)}
FLOAT64 = {"ema": zeros(T, P, dtype=torch.float64)}

ERRORS = [
    ({"ema": [[0.0]]}, TypeError, "ema must be a tensor, got list"),
    (
        {"ema": zeros(T, P, dtype=torch.int64)},
        TypeError,
        "ema must have one of the dtypes (torch.float32, torch.float64, torch.bfloat16), got torch.int64",
    ),
    (
        {"ema": zeros(T, P, dtype=torch.float16)},
        TypeError,
        "ema must have one of the dtypes (torch.float32, torch.float64, torch.bfloat16), got torch.float16",
    ),
    ({"ema": zeros(P)}, ValueError, "ema must have shape (T, P), got (130,)"),
    ({"ema": zeros(1, T, P)}, ValueError, "ema must have shape (T, P), got (1, 3, 130)"),
    (
        {"ema": zeros(0, P), "grads": zeros(0, P)},
        ValueError,
        "ema must have at least one row (task), got shape (0, 130)",
    ),
    ({"ema": zeros(P, T).t()}, ValueError, f"ema {STRIDES} (1, 3)"),
    ({"ema": zeros(T, 2 * P)[:, ::2]}, ValueError, f"ema {STRIDES} (260, 2)"),
    ({"ema": zeros(1, P).expand(T, P)}, ValueError, f"ema {STRIDES} (0, 1)"),
    ({"ema": zeros(1000).as_strided((T, P), (P - 1, 1))}, ValueError, f"ema {STRIDES} (129, 1)"),
    ({"grads": None}, TypeError, "grads must be a tensor, got NoneType"),
    (
        {"grads": zeros(T, P, dtype=torch.int32)},
        TypeError,
        f"grads must have one of the dtypes {DTYPES}, got torch.int32",
    ),
    (
        {"grads": zeros(T, P, dtype=torch.complex64)},
        TypeError,
        f"grads must have one of the dtypes {DTYPES}, got torch.complex64",
    ),
    ({"grads": zeros(P)}, ValueError, "grads must have shape (T, P), got (130,)"),
    ({"grads": zeros(T, P + 1)}, ValueError, "grads must have the shape of ema, (3, 130), got (3, 131)"),
    ({"grads": zeros(T + 1, P)}, ValueError, "grads must have the shape of ema, (3, 130), got (4, 130)"),
    ({"grads": zeros(P, T).t()}, ValueError, f"grads {STRIDES} (1, 3)"),
    (
        {"grads": torch.zeros(T, P, device="meta")},
        ValueError,
        f"grads must be on the device of ema, {zeros().device}, got meta",
    ),
    ({"out": 3.0}, TypeError, "out must be a tensor, got float"),
    ({"out": zeros(P, dtype=torch.int8)}, TypeError, f"out must have one of the dtypes {DTYPES}, got torch.int8"),
    (
        {"out": zeros(P, dtype=torch.complex128)},
        TypeError,
        f"out must have one of the dtypes {DTYPES}, got torch.complex128",
    ),
    ({"out": zeros(P + 1)}, ValueError, "out must have shape (130,), got (131,)"),
    ({"out": zeros(1, P)}, ValueError, "out must have shape (130,), got (1, 130)"),
    ({"out": zeros(2 * P)[::2]}, ValueError, "out must have adjacent elements, got stride 2"),
    ({"out": zeros(1).expand(P)}, ValueError, "out must have adjacent elements, got stride 0"),
    (
        {"out": torch.zeros(P, device="meta")},
        ValueError,
        f"out must be on the device of ema, {zeros().device}, got meta",
    ),
    ({"out": zeros(P, requires_grad=True)}, ValueError, "out must not require grad"),
    ({"beta": 1.0}, ValueError, "beta must be >= 0 and < 1, got 1.0"),
    ({"beta": -0.1}, ValueError, "beta must be >= 0 and < 1, got -0.1"),
    ({"beta": float("nan")}, ValueError, "beta must be >= 0 and < 1, got nan"),
    ({"beta": "0.9"}, TypeError, "beta must be a number, got str"),
    ({"beta": True}, TypeError, "beta must be a number, got bool"),
    ({"beta": zeros(1)}, ValueError, "beta must be a number or a 0-d floating-point tensor on"),
    ({"beta": torch.zeros((), device="meta")}, ValueError, "torch.float32, on meta"),
    ({"beta": zeros(dtype=torch.int64)}, (TypeError, ValueError), "got shape (), torch.int64"),
    ({"eps": -1e-8}, ValueError, "eps must be > 0, got -1e-08"),
    ({"eps": 0.0}, ValueError, "eps must be > 0, got 0.0"),
    ({"eps": float("inf")}, ValueError, "eps must be > 0, got inf"),
    ({"eps": None}, TypeError, "eps must be a number, got NoneType"),
    (
        {"eps": 1e-13},
        ValueError,
        "eps must be from 1e-12 to 1e+19 in float32 arithmetic, got 1e-13; use a float64 ema for more",
    ),
    (BFLOAT16 | {"eps": 1e20, "seed": 1}, ValueError, "eps must be from 1e-12 to 1e+19 in float32 arithmetic, got"),
    (FLOAT64 | {"eps": 1e-151}, ValueError, "eps must be from 1e-150 to 1e+150 in float64 arithmetic, got 1e-151"),
    (
        {"beta": 1 - 1e-9},
        ValueError,
        "beta must be < 1 once rounded to float32, got 0.999999999; use a float64 ema for more",
    ),
    (
        {"ema": zeros(T, P, dtype=torch.bfloat16)},
        ValueError,
        "seed must be given if ema is bfloat16, and only then, got None for torch.bfloat16",
    ),
    ({"seed": 3}, ValueError, "seed must be given if ema is bfloat16, and only then, got 3 for torch.float32"),
    (BFLOAT16 | {"seed": 2**63}, ValueError, "seed must fit 64 bits, got 9223372036854775808"),
    (BFLOAT16 | {"seed": 1.5}, TypeError, "seed must be an integer or a tensor, got float"),
    (BFLOAT16 | {"seed": np.float32(1)}, TypeError, "seed must be an integer or a tensor, got float32"),
    (BFLOAT16 | {"seed": np.uint64(2**63)}, ValueError, "seed must fit 64 bits, got 9223372036854775808"),
    (BFLOAT16 | {"seed": True}, TypeError, "seed must be an integer or a tensor, got bool"),
    (BFLOAT16 | {"seed": zeros()}, ValueError, "seed must be an integer or a 0-d int64 tensor on"),
    (BFLOAT16 | {"seed": zeros(1, dtype=torch.int64)}, ValueError, "got shape (1,), torch.int64"),
    ({"alpha": "maximum"}, ValueError, f"alpha must be one of {NAMES}, a positive number or None, got 'maximum'"),
    ({"alpha": "none"}, ValueError, f"alpha must be one of {NAMES}, a positive number or None, got 'none'"),
    ({"alpha": 0.0}, ValueError, "a positive number or None, got 0.0"),
    ({"alpha": -2}, ValueError, "a positive number or None, got -2"),
    ({"alpha": True}, ValueError, "a positive number or None, got True"),
    (
        {"alpha": 1e-20},
        ValueError,
        "alpha must be from 1e-19 to 1e+19 in float32 arithmetic, got 1e-20; use a float64 ema for more",
    ),
    ({"alpha": 1e20}, ValueError, "alpha must be from 1e-19 to 1e+19 in float32 arithmetic, got 1e+20"),
    (FLOAT64 | {"alpha": 1e151}, ValueError, "alpha must be from 1e-150 to 1e+150 in float64 arithmetic, got 1e+151"),
    ({"alpha": float("nan")}, ValueError, "a positive number or None, got nan"),
    ({"alpha": float("inf")}, ValueError, "a positive number or None, got inf"),
    (
        {"backend": "gpu"},
        ValueError,
        "backend must be one of ('auto', 'cuda', 'triton', 'cpu', 'reference'), got 'gpu'",
    ),
]


def good_arguments() -> dict[str, Any]:
    # A gradient that would change the state, so that a check that comes too late shows.
    return {"ema": zeros(T, P), "grads": zeros(T, P) + 1, "beta": 0.5, "backend": "reference"}


@pytest.mark.parametrize(("bad", "error", "message"), ERRORS, ids=[message[:60] for _, _, message in ERRORS])
def test_errors(bad: dict[str, Any], error: type[Exception], message: str) -> None:
    """They come before anything was changed."""
    arguments = good_arguments()
    with pytest.raises(error, match=re.escape(message)):
        balance_(**(arguments | bad))
    assert not arguments["ema"].any()


BUFFER = zeros(5000)
OVERLAPS = [
    ("grads must not share memory with ema", lambda ema: {"grads": ema}),
    ("grads must not share memory with ema", lambda ema: {"grads": BUFFER[P : (T + 1) * P].view(T, P)}),
    ("grads must not share memory with ema", lambda ema: {"grads": BUFFER[1 : T * P + 1].view(T, P)}),
    ("grads must not share memory with ema", lambda ema: {"grads": BUFFER.as_strided((T, P), (P + 9, 1), P)}),
    ("grads must not share memory with ema", lambda ema: {"grads": ema.view(torch.bfloat16)[:, P:]}),
    ("out must not share memory with ema", lambda ema: {"out": ema[1]}),
    ("out must not share memory with ema", lambda ema: {"out": BUFFER[T * P - 1 : (T + 1) * P - 1]}),
]


@pytest.mark.parametrize(("message", "arguments"), OVERLAPS, ids=[f"{m[:5]}{i}" for i, (m, _) in enumerate(OVERLAPS)])
def test_overlaps(message: str, arguments: Any) -> None:
    ema = BUFFER[: T * P].view(T, P)
    with pytest.raises(ValueError, match=re.escape(message)):
        balance_(**(good_arguments() | {"ema": ema} | arguments(ema)))
    assert not BUFFER.any()


def test_overlap_of_out_and_grads() -> None:
    grads = zeros(T, P) + 1
    with pytest.raises(ValueError, match="out must not share memory with grads"):
        balance_(zeros(T, P), grads, 0.5, out=grads[-1])


@pytest.mark.parametrize("shift", [P - 1, 2 * P - 1, 1], ids=str)
def test_overlap_of_alternating_rows(shift: int) -> None:
    """Rows at the same pitch of 2 P in one buffer, one column too near to each other."""
    ema, grads = BUFFER.as_strided((T, P), (2 * P - 1, 1)), BUFFER.as_strided((T, P), (2 * P - 1, 1), shift)
    with pytest.raises(ValueError, match="grads must not share memory with ema"):
        balance_(ema, grads, 0.5)


def test_overlap_of_one_row_whose_stride_means_nothing() -> None:
    ema, grads = BUFFER.as_strided((1, P), (0, 1)), BUFFER.as_strided((1, P), (0, 1), 5)
    with pytest.raises(ValueError, match="grads must not share memory with ema"):
        balance_(ema, grads, 0.5)


def test_neighbours_do_not_overlap(backend: str) -> None:
    """ema, grads and out one after the other in one buffer."""
    buffer = zeros((2 * T + 1) * P)
    ema, grads, out = buffer.split([T * P, T * P, P])
    grads.fill_(1)
    balance_(ema.view(T, P), grads.view(T, P), 0.5, out=out, backend=backend)
    assert (ema == 0.5).all()
    assert (grads == 1).all()
    torch.testing.assert_close(out, torch.full_like(out, T * 0.5))


@pytest.mark.parametrize("through", ["argument", "environment"])
def test_a_backend_that_is_not_there_is_no_fallback(monkeypatch: pytest.MonkeyPatch, through: str) -> None:
    monkeypatch.setattr(backends, "why_not", lambda name, device_type: f"no {name} today")
    name = "backend" if through == "argument" else backends.ENVIRONMENT_VARIABLE
    if through == "environment":
        monkeypatch.setattr(backends, "DEFAULT", "triton")
    arguments = good_arguments() | {"backend": "triton" if through == "argument" else "auto"}
    message = f"{name}='triton' cannot run on {DEVICE.type} tensors here: no triton today"
    with pytest.raises(RuntimeError, match=re.escape(message)):
        balance_(**arguments)
    assert not arguments["ema"].any()


def test_environment_variable_is_read_at_import() -> None:
    command = [sys.executable, "-c", "from dbmtl_fused import backends; print(backends.DEFAULT)"]
    environment = os.environ | {backends.ENVIRONMENT_VARIABLE: "fast"}
    assert subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout == "fast\n"


def test_environment_variable_is_checked_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "DEFAULT", "fast")
    with pytest.raises(ValueError, match=re.escape(f"{backends.ENVIRONMENT_VARIABLE} must be one of ('auto',")):
        balance_(**(good_arguments() | {"backend": "auto"}))


def test_argument_beats_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "DEFAULT", "fast")
    balance_(**good_arguments())
