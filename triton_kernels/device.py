"""Device functions that several kernels share."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from dbmtl_fused._ops import ENTRY_LIMIT

# WHOLE says that all columns are below `count`: a mask on a length that is only known at run time costs the 16-byte
# accesses.


@triton.jit
def load_tile(pointers, rows, columns, count, WHOLE: tl.constexpr):
    """A tile of the given ``rows`` (a mask); zeros elsewhere."""
    if WHOLE:
        return tl.load(pointers, mask=rows, other=0.0)
    return tl.load(pointers, mask=rows & (columns < count), other=0.0)


@triton.jit
def load_columns(pointers, columns, count, WHOLE: tl.constexpr):
    if WHOLE:
        return tl.load(pointers)
    return tl.load(pointers, mask=columns < count, other=0.0)


@triton.jit
def store_columns(pointers, values, columns, count, WHOLE: tl.constexpr):
    if WHOLE:
        tl.store(pointers, values)
    else:
        tl.store(pointers, values, mask=columns < count)


@triton.jit
def mix(word):
    """See ``dbmtl_fused.rounding``; ``word`` is uint32."""
    word = word ^ (word >> 16)
    word = word * 0x7FEB352D
    word = word ^ (word >> 15)
    word = word * 0x846CA68B
    return word ^ (word >> 16)


@triton.jit
def random_bits(seed, columns):
    """16 uniform bits for each of ``columns`` (int64), as ``dbmtl_fused.rounding`` draws them; uint32."""
    high = mix((seed >> 32).to(tl.uint32) + 0x9E3779B9)
    key = mix(seed.to(tl.uint32) ^ high)
    return mix(columns.to(tl.uint32) ^ (columns >> 32).to(tl.uint32) ^ key) >> 16


@triton.jit
def is_finite(values):
    return tl.abs(values) < float("inf")


@triton.constexpr_function
def entry_limit(dtype: Any) -> float:
    """``dbmtl_fused._ops.ENTRY_LIMIT`` of what is computed in."""
    return ENTRY_LIMIT[torch.float64 if dtype.primitive_bitwidth == 64 else torch.float32]


@triton.constexpr_function
def smallest_normal(dtype: Any) -> float:
    return torch.finfo(torch.float64 if dtype.primitive_bitwidth == 64 else torch.float32).tiny


@triton.jit
def round_state(updated, old, seed, columns, ROUND: tl.constexpr):
    """What is stored of an update, in the dtype that is computed in, and where the guard let it through."""
    within_limit = tl.abs(updated) <= entry_limit(updated.dtype)  # false for NaN
    if ROUND:
        bits = (updated.to(tl.uint32, bitcast=True) + random_bits(seed, columns)) & 0xFFFF0000
        updated = bits.to(tl.float32, bitcast=True)
    return tl.where(within_limit, updated, old), within_limit


@triton.constexpr_function
def alignment(element: Any, state: Any) -> int:
    """What the compiler is to be told of a 16-byte aligned address of ``element`` beside one of ``state``, in bytes: no
    more than lets a thread take as many elements as it can of the wider state. With more, one of the two would have to
    be passed between threads.

    It must be told, by ``tl.multiple_of``, in the very expression that makes the pointer: the hint is the operation's.
    """
    narrower = element.primitive_bitwidth < state.primitive_bitwidth
    return 16 * element.primitive_bitwidth // state.primitive_bitwidth if narrower else 16


@triton.jit
def fold(values):
    """Neighbouring columns of a ``(rows, columns)`` tile side by side, ``(rows, columns / n, n)``: as many as a thread
    loads at once, so that reducing them moves nothing between threads."""
    per_thread: tl.constexpr = 16 // (values.dtype.primitive_bitwidth // 8)
    return tl.reshape(values, [values.shape[0], values.shape[1] // per_thread, per_thread])


@triton.jit
def is_last(arrivals):
    """Whether this program is the last of its launch to get here. It then sees what the others have stored, but not
    through its first-level cache. ``arrivals`` is 0, and is again once the last one has been here."""
    tl.debug_barrier()
    last = tl.atomic_add(arrivals, 1, sem="acq_rel") == tl.num_programs(0) - 1
    if last:
        tl.store(arrivals, 0)
    return last


@triton.jit
def sum_of_programs(partials, count, BLOCK: tl.constexpr):
    """The sum of ``count`` numbers that other programs have stored, in a fixed order."""
    offsets = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], partials.dtype.element_ty)
    for first in range(0, count, BLOCK):
        # Not from the first-level cache: other programs have just written them.
        sums += tl.load(partials + first + offsets, mask=first + offsets < count, other=0.0, cache_modifier=".cg")
    return tl.sum(sums, axis=0)


@triton.jit
def convert_out(values, dtype: tl.constexpr):
    """Rounded to nearest even; like torch, from float64 to 16 bits by way of float32."""
    if values.dtype == tl.float64 and dtype != tl.float64:
        values = values.to(tl.float32)
    return values.to(dtype)


@triton.jit
def alpha_of(norms, tasks, counts, T, constant, MODE: tl.constexpr):
    """``alpha`` of the ``norms`` that count (a mask, false from ``T`` on), 0 if none does; NaN as in the reference: max
    and min return it, median sorts it last."""
    if MODE == "min":
        counts = counts & (norms != 0)
    number = tl.sum(counts.to(tl.int32), axis=0)
    nan = tl.max((counts & (norms != norms)).to(tl.int32), axis=0) > 0
    if MODE == "max":
        alpha = tl.where(nan, float("nan"), tl.max(tl.where(counts, norms, 0), axis=0))
    elif MODE == "min":
        least = tl.min(tl.where(counts, norms, float("inf")), axis=0)
        alpha = tl.where(nan, float("nan"), tl.where(number > 0, least, 0))
    elif MODE == "mean":
        alpha = tl.sum(tl.where(counts, norms, 0), axis=0) / tl.maximum(number, 1)
    elif MODE == "median":
        rank = tl.zeros_like(tasks)
        for j in range(T):
            other = tl.zeros_like(norms) + tl.sum(tl.where(tasks == j, norms, 0), axis=0)
            below = (other < norms) | ((norms != norms) & (other == other))
            equal = (other == norms) | ((norms != norms) & (other != other))
            is_before = below | (equal & (j < tasks))
            rank += (is_before & (tl.sum(tl.where(tasks == j, counts.to(tl.int32), 0), axis=0) > 0)).to(tl.int32)
        lower = tl.sum(tl.where(counts & (rank == (number - 1) // 2), norms, 0), axis=0)
        upper = tl.sum(tl.where(counts & (rank == number // 2), norms, 0), axis=0)
        alpha = (lower + upper) / 2
    elif MODE == "constant":
        alpha = tl.cast(constant, norms.dtype)
    else:
        alpha = tl.full([], 1, norms.dtype)
    return alpha


@triton.jit
def weights_of(norms, preference, alpha, eps, found_inf, MODE: tl.constexpr):
    """Weights of ``norms``, given ``alpha``; ``preference`` may be None."""
    if MODE == "none":
        weights = tl.full(norms.shape, 1, norms.dtype)
    else:
        weights = divide(alpha, norms + tl.cast(eps, norms.dtype))
    if preference is not None:
        weights = preference * weights
    return tl.where(found_inf != 0, float("nan"), weights)


@triton.jit
def divide(numerator, denominator):
    """Correctly rounded, in the dtype of the denominator."""
    if denominator.dtype == tl.float32:
        return tl.div_rn(numerator, denominator)
    return numerator / denominator


@triton.jit
def square_root(values):
    """Correctly rounded."""
    if values.dtype == tl.float32:
        return tl.sqrt_rn(values)
    return tl.sqrt(values)
