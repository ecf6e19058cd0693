"""Offsets past 2^31: rows far apart and slots far out, which touches little memory, and a buffer really that large.

An ``int`` somewhere in an address computation would read or write in the wrong place, or crash.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from op_checks import check_balance, check_combine, check_ema_update
from op_inputs import (
    BACKENDS,
    DEVICE,
    GRAD_DTYPES,
    Guarded,
    Row,
    Segments,
    array,
    assert_same_bits,
    random_rows,
    run_balance,
    run_combine,
    tensor,
)
from torch import Tensor

BEYOND = 2**31 + 4099
PART = 2**24


def untouched(count: int, dtype: torch.dtype) -> Tensor:
    """``count`` zeros; on a CPU they occupy no memory until they are written."""
    if DEVICE.type != "cpu":
        return torch.zeros(count, dtype=dtype, device=DEVICE)
    integers = {2: np.int16, 4: np.int32}[dtype.itemsize]
    try:
        return torch.from_numpy(np.zeros(count, dtype=integers)).view(dtype)
    except MemoryError:
        pytest.skip(f"this machine does not lend {count * dtype.itemsize / 2**30:.0f} GiB of addresses")


def available_bytes() -> int:
    if DEVICE.type == "cuda":
        return torch.cuda.mem_get_info(DEVICE)[0]
    with open("/proc/meminfo") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


@pytest.fixture(autouse=True)
def _give_memory_back() -> Iterator[None]:
    """To the other processes that test on the same GPU."""
    yield
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


def parts() -> Iterator[slice]:
    return (slice(start, min(start + PART, BEYOND)) for start in range(0, BEYOND, PART))


# --- Beyond caches


@pytest.mark.skipif("cpu" not in BACKENDS, reason="only the C++ backend writes past caches")
@pytest.mark.parametrize("dtype", GRAD_DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("accumulate", [False, True], ids=["write", "add"])
def test_sums_larger_than_caches(rng: np.random.Generator, dtype: torch.dtype, offset: int, accumulate: bool) -> None:
    """The same bits as the reference's; nothing around them is touched, and every thread sees them."""
    P = 2**24 // dtype.itemsize + 4099
    ema, base = tensor(random_rows(rng, 2, P)), tensor(rng.standard_normal(P), dtype)
    out = Guarded(base, offset=offset)
    options = {"scale": 0.3, "accumulate": accumulate}
    actual = run_combine("cpu", ema, tensor([4.0, 9.0]), out=out.view, **options)
    out.assert_intact()
    reference = run_combine("reference", ema, tensor([4.0, 9.0]), out=base.clone(), **options)
    assert_same_bits("out", actual.out, reference.out)


# --- Far apart


@pytest.mark.parametrize("P", [130, 5000], ids="P={}".format)
def test_balance_rows_far_apart(backend: str, rng: np.random.Generator, P: int) -> None:
    """The last row starts behind element 2^31 of each buffer."""
    stride = BEYOND // 2
    ema, grads = (
        untouched(2 * stride + P, dtype).as_strided((3, P), (stride, 1)) for dtype in (torch.float32, torch.bfloat16)
    )
    ema.copy_(tensor(random_rows(rng, 3, P)))
    grads.copy_(tensor(random_rows(rng, 3, P)))
    check_balance(backend, ema, grads, 0.75)


@pytest.mark.parametrize(
    ("T", "stride", "dtype"),
    [(3, BEYOND // 2, torch.float32), (17, 2**29 + 256, torch.bfloat16)],  # the latter: more rows than are read at once
    ids=["T=3", "T=17"],
)
def test_combine_rows_far_apart(
    backend: str, rng: np.random.Generator, T: int, stride: int, dtype: torch.dtype
) -> None:
    ema = untouched((T - 1) * stride + 5000, dtype).as_strided((T, 5000), (stride, 1))
    ema.copy_(tensor(random_rows(rng, T, 5000)))
    check_combine(backend, ema, tensor(np.square(array(ema)).sum(axis=1)), torch.empty(5000, device=DEVICE))


def test_ema_update_slots_far_out(backend: str, rng: np.random.Generator) -> None:
    """The second slot lies behind column 2^31; what is between them belongs to no slot."""
    segments = Segments.at([(0, 130, 0), (BEYOND, 5000, 1)], BEYOND + 5000)
    row = Row(untouched(segments.P, torch.float32), segments)
    grads = [tensor(rng.standard_normal(130)), tensor(rng.standard_normal(5000), torch.bfloat16)]
    for slot, grad in enumerate(grads):
        row.row[segments.columns(slot)] = grad.float().flip(0)
    # The oracle takes a row as a whole: it gets the two slots side by side.
    near = Segments.of([130, 5000])
    expected = Row(torch.zeros(near.P, device=DEVICE), near)
    for slot in range(2):
        expected.row[near.columns(slot)] = row.row[segments.columns(slot)]
    check_ema_update(backend, expected, grads)

    row.update(backend, grads)
    for slot in range(2):
        assert torch.equal(row.row[segments.columns(slot)], expected.row[near.columns(slot)])
    assert torch.equal(row.partials, expected.partials)
    assert torch.equal(row.sq_norm, expected.sq_norm)


# --- Really that large


@pytest.fixture
def large_grads(rng: np.random.Generator) -> Tensor:
    """``BEYOND`` bfloat16 numbers; their period is odd, so that a wrapped offset meets other numbers."""
    need = BEYOND * (4 + 2 + 2) + 2**30  # state, gradients, out; parts of them while comparing
    if need > available_bytes():
        pytest.skip(f"needs {need / 2**30:.0f} GiB, {available_bytes() / 2**30:.1f} GiB are available")
    pattern = tensor(rng.standard_normal(PART // 4 + 1), torch.bfloat16).repeat(4)
    grads = untouched(BEYOND, torch.bfloat16)
    for start in range(0, BEYOND, len(pattern)):
        part = grads[start : start + len(pattern)]
        part.copy_(pattern[: len(part)])
    return grads


def assert_half(values: Tensor, grads: Tensor) -> None:
    """A step from zero with beta 1/2 is exact."""
    for part in parts():
        assert torch.equal(values[part], (grads[part] / 2).to(values.dtype)), f"columns {part.start} to {part.stop}"


def norm_of(grads: Tensor) -> float:
    return sum(float(grads[part].double().square().sum()) for part in parts()) ** 0.5


@pytest.mark.slow
def test_balance_beyond_32_bits(native_backend: str, large_grads: Tensor) -> None:
    """T P > 2^31, all in one row, so that column indices pass it too. The reference's temporaries would need 35 GB."""
    ema = untouched(BEYOND, torch.float32)
    result = run_balance(native_backend, ema[None], large_grads[None], 0.5)
    assert_half(ema, large_grads)
    torch.testing.assert_close(float(result.norms), norm_of(large_grads) / 2, rtol=1e-5, atol=0)
    assert_half(result.out, large_grads)  # the weight of a single task is 1
    assert float(result.found_inf) == 0


@pytest.mark.slow
def test_streaming_beyond_32_bits(native_backend: str, large_grads: Tensor) -> None:
    """The same through ``ema_update_`` and ``combine``."""
    row = Row(untouched(BEYOND, torch.float32), Segments.of([BEYOND], align=1))
    row.update(native_backend, [large_grads], beta=0.5)
    assert_half(row.row, large_grads)
    torch.testing.assert_close(float(row.sq_norm) ** 0.5, norm_of(large_grads) / 2, rtol=1e-5, atol=0)
    out = torch.empty(BEYOND, dtype=torch.bfloat16, device=DEVICE)
    run_combine(native_backend, row.row[None], row.sq_norm[None], out=out)
    assert_half(out, large_grads)
