"""What must be equal bit for bit, and why.

* EMA after an update: each entry is made of the same products and sums as in the reference, each rounded by itself,
  and depends on no other entry.
* ``out`` given the weights, on ``ORDERED_BACKENDS``: rows are added in task order, each product and each sum rounded by
  itself.
* Norms only where they are exact. Sums of squares may associate differently, and torch's own square root (MKL's) is not
  correctly rounded for one number in a hundred. Likewise the ``mean`` of three norms or more is only close.
* Every backend against itself: run after run, whatever the number of threads, whatever the bucketing. Partial sums are
  keyed by chunk and summed in a fixed order; there are no float atomics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import pytest
import torch
from op_inputs import (
    ALPHA_MODES,
    DEVICE,
    GRAD_DTYPES,
    LARGE,
    ORDERED_BACKENDS,
    STATE_DTYPES,
    Row,
    Segments,
    array,
    assert_same_bits,
    random_rows,
    run_balance,
    run_combine,
    run_gram,
    tensor,
)
from torch import Tensor

from dbmtl_fused._ops import ENTRY_LIMIT, compute_dtype

ordered_backends = pytest.mark.parametrize("ordered_backend", ORDERED_BACKENDS)
dtypes = pytest.mark.parametrize("dtype", GRAD_DTYPES, ids=str)
states = pytest.mark.parametrize("state_dtype", STATE_DTYPES, ids=str)
tasks = pytest.mark.parametrize("T", [1, 2, 3, 8, 17, 64], ids="T={}".format)

Results = Iterable[tuple[str, Tensor]]


def weighted_sum(weights: Tensor, ema: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum in task order, every operation rounded to the weights' dtype, and once to ``dtype``."""
    total = torch.zeros_like(ema[0], dtype=weights.dtype)
    for weight, row in zip(weights, ema.to(weights.dtype), strict=True):
        total = total + weight * row
    return total.to(dtype)


@dtypes
@states
@tasks
@pytest.mark.parametrize("P", [129, 8205], ids="P={}".format)
def test_balance_equals_reference(
    backend: str, rng: np.random.Generator, dtype: torch.dtype, state_dtype: torch.dtype, T: int, P: int
) -> None:
    ema, grads = tensor(random_rows(rng, T, P), state_dtype), tensor(random_rows(rng, T, P), dtype)
    actual = run_balance(backend, ema.clone(), grads, 0.7)
    reference = run_balance("reference", ema.clone(), grads, 0.7)
    assert_same_bits("ema", actual.ema, reference.ema)
    assert_same_bits("weights", actual.weights, actual.norms.amax() / (actual.norms + 1e-8))
    if backend in ORDERED_BACKENDS:
        assert_same_bits("out", actual.out, weighted_sum(actual.weights, actual.ema, dtype))


@ordered_backends
@dtypes
@states
@tasks
@pytest.mark.parametrize("accumulate", [False, True], ids=["write", "add"])
@pytest.mark.parametrize("scale", [1.0, 0.3], ids="scale={}".format)
def test_combine_equals_reference(
    ordered_backend: str,
    rng: np.random.Generator,
    dtype: torch.dtype,
    state_dtype: torch.dtype,
    T: int,
    accumulate: bool,
    scale: float,
) -> None:
    ema = tensor(random_rows(rng, T, 4105), state_dtype)
    base = tensor(rng.standard_normal(4105), dtype)
    sq_norms = tensor(
        np.square(rng.integers(1, 2**12, T) / 64), compute_dtype(state_dtype)
    )  # their square roots are exact
    for alpha in ALPHA_MODES:
        if alpha == "mean" and T > 2:
            continue
        options = {"alpha": alpha, "scale": scale, "accumulate": accumulate}
        actual = run_combine(ordered_backend, ema, sq_norms, out=base.clone(), **options)
        reference = run_combine("reference", ema, sq_norms, out=base.clone(), **options)
        for name in ("out", "norms", "weights", "alpha"):
            assert_same_bits(f"{name}, alpha={alpha}", getattr(actual, name), getattr(reference, name))


@pytest.mark.parametrize("alpha", ALPHA_MODES)
@pytest.mark.parametrize("sq_norms", [(4, np.inf, 9), (np.nan, 4, 1), (4, np.nan, np.inf), (4, 0, 1e-40)], ids=str)
def test_combine_of_norms_that_are_not_ordinary(backend: str, alpha: str, sq_norms: tuple[float, ...]) -> None:
    """Squares that overflowed, or NaN: the same infinities and NaNs as in the reference, whatever alpha."""
    ema = tensor(np.ones((3, 5)))
    actual, reference = (run_combine(name, ema, tensor(sq_norms), alpha=alpha) for name in (backend, "reference"))
    for name, values in actual._asdict().items():
        torch.testing.assert_close(values, getattr(reference, name), rtol=1e-6, atol=0, equal_nan=True, msg=name)


@dtypes
@states
@pytest.mark.parametrize("accumulate", [False, True], ids=["decay", "add"])
def test_ema_update_equals_reference(
    backend: str, rng: np.random.Generator, dtype: torch.dtype, state_dtype: torch.dtype, accumulate: bool
) -> None:
    numels = [129, 1, 0, 4097, 9000]
    segments = Segments.of(numels)
    start = tensor(rng.standard_normal(segments.P), state_dtype)
    grads = [tensor(rng.standard_normal(numel), dtype) for numel in numels[:-1]] + [None]
    actual, reference = (
        Row(start.clone(), segments).update(name, grads, beta=0.7, inv_scale=0.3, accumulate=accumulate)
        for name in (backend, "reference")
    )
    assert_same_bits("row", actual.row, reference.row)


# --- Conversions, with coefficients that make everything else exact, so on every backend


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@states
def test_every_16_bit_gradient_is_read_exactly(backend: str, dtype: torch.dtype, state_dtype: torch.dtype) -> None:
    """All 65536 bit patterns; those beyond the limit, and NaNs, are held back."""
    if state_dtype is torch.bfloat16 and dtype is torch.float16:
        pytest.skip("float16 is finer than bfloat16")
    grads = torch.arange(-(2**15), 2**15, device=DEVICE).to(torch.int16).view(dtype)
    row = Row(torch.full((2**16,), 7.0, dtype=state_dtype, device=DEVICE), Segments.of([2**16]))
    row.update(backend, [grads], beta=0.0)
    limit = ENTRY_LIMIT[compute_dtype(state_dtype)]
    expected = torch.where(grads.double().abs() <= limit, grads, 7.0).to(state_dtype)
    assert torch.equal(row.row, expected)


@dtypes
@states
def test_out_is_rounded_to_nearest_even(
    backend: str, rng: np.random.Generator, dtype: torch.dtype, state_dtype: torch.dtype
) -> None:
    """Random bit patterns: subnormal numbers, ties, overflows, infinities and NaNs of the narrower type among them."""
    small = np.arange(0, 2**16, dtype=np.uint32) << 16  # every bfloat16, and with the rest set, its ties and neighbours
    bits = np.concatenate(
        [small | low for low in (0, 0x7FFF, 0x8000, 0x8001)] + [rng.integers(0, 2**32, 2**16, np.uint32)]
    )
    halves = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16).float()  # and the ties of float16
    ties = torch.stack([halves, halves * (1 + 2**-11), halves + 2.0**-25]).flatten()
    values = torch.cat([torch.from_numpy(bits.view(np.float32)), ties]).to(DEVICE, state_dtype)
    out = torch.empty(values.numel(), dtype=dtype, device=DEVICE)
    run_combine(backend, values[None], tensor([1.0], compute_dtype(state_dtype)), alpha="none", out=out)
    assert_same_bits("out", out, (values + 0.0).to(dtype))


# --- Against itself


def check_same_bits(run: Callable[[], Results], environments: Iterable[Callable[[], None]]) -> None:
    """``run`` gives the same bits in every environment."""
    expected = dict(run())
    for enter in environments:
        enter()
        for name, values in run():
            assert_same_bits(name, values, expected[name])


def balance_run(backend: str, rng: np.random.Generator, T: int, P: int) -> Callable[[], Results]:
    ema, grads = tensor(random_rows(rng, T, P)), tensor(random_rows(rng, T, P), torch.bfloat16)
    return lambda: run_balance(backend, ema.clone(), grads, 0.7)._asdict().items()


def streaming_run(backend: str, rng: np.random.Generator) -> Callable[[], Results]:
    numels = [100_000, 4096, 5, 70_001, 0, 300]
    segments = Segments.of(numels)
    start, grads = tensor(rng.standard_normal(segments.P)), [tensor(rng.standard_normal(n)) for n in numels]
    return lambda: Row(start.clone(), segments).update(backend, grads).state().items()


def combine_run(backend: str, rng: np.random.Generator, alpha: str) -> Callable[[], Results]:
    ema = tensor(random_rows(rng, 7, 100_003))
    sq_norms = tensor(np.square(array(ema)).sum(axis=1))
    return lambda: run_combine(backend, ema, sq_norms, alpha=alpha)._asdict().items()


def gram_run(backend: str, rng: np.random.Generator, T: int) -> Callable[[], Results]:
    ema = tensor(random_rows(rng, T, 5003))
    return lambda: {"gram": run_gram(backend, ema)}.items()


runs = pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda backend, rng: balance_run(backend, rng, 3, LARGE), id="balance_wide"),
        pytest.param(lambda backend, rng: balance_run(backend, rng, 64, 5003), id="balance_tall"),
        pytest.param(lambda backend, rng: balance_run(backend, rng, 1, LARGE // 2), id="balance_one_row"),
        pytest.param(streaming_run, id="ema_update"),
        pytest.param(lambda backend, rng: combine_run(backend, rng, "max"), id="combine_max"),
        pytest.param(lambda backend, rng: combine_run(backend, rng, "mean"), id="combine_mean"),
        pytest.param(lambda backend, rng: gram_run(backend, rng, 3), id="gram"),
        pytest.param(lambda backend, rng: gram_run(backend, rng, 17), id="gram_tall"),
    ],
)


@runs
def test_same_bits_run_after_run(backend: str, rng: np.random.Generator, make: Callable) -> None:
    check_same_bits(make(backend, rng), [lambda: None] * 5)


@runs
@pytest.mark.skipif(DEVICE.type != "cpu", reason="torch.set_num_threads only concerns CPUs")
def test_same_bits_with_any_number_of_threads(backend: str, rng: np.random.Generator, make: Callable) -> None:
    check_same_bits(
        make(backend, rng), [lambda threads=threads: torch.set_num_threads(threads) for threads in (1, 2, 5)]
    )


@pytest.mark.parametrize("accumulate", [False, True], ids=["decay", "add"])
def test_same_bits_whatever_the_bucketing(backend: str, rng: np.random.Generator, accumulate: bool) -> None:
    """Slots split over random calls in random order, against all of them in one call."""
    numels = [5000, 1, 4096, 300, 0, 12_289, 77, 256, 4097, 40_000]
    segments = Segments.of(numels)
    start = tensor(rng.standard_normal(segments.P))
    grads = [tensor(rng.standard_normal(n)) for n in numels]
    grads[3] = None
    expected = Row(start.clone(), segments).update(backend, grads, accumulate=accumulate).state()

    for _ in range(20):
        order = rng.permutation(len(numels))
        cuts = np.sort(rng.integers(0, len(numels) + 1, rng.integers(0, 5)))
        row = Row(start.clone(), segments)
        for bucket in np.split(order, cuts):
            row.update(backend, [grads[slot] for slot in bucket], bucket.tolist(), accumulate=accumulate)
        for name, values in row.state().items():
            assert_same_bits(f"{name}, order {order.tolist()}, cut at {cuts.tolist()}", values, expected[name])
