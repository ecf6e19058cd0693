"""``ema_update_``: one task's gradients, wherever autograd put them, into its row of the EMA.

Math      row = beta * row + (1 - beta) * (g * inv_scale), or row + (1 - beta) * ... if accumulate; the partials of the
          chunks touched; sq_norm = sum of all partials
Traffic   fp32: 12 bytes a column of the listed parameters; 4 ceil(P / CHUNK) for the sum, from L2.
Parallel  one program a chunk, from the first to the last chunk of the listed parameters. Tables say where a chunk's
          columns and its gradient are, so that nothing is searched and nothing is copied together first.
Sync      an atomic counter; the program that arrives last adds up the partials.
Numerics  in the state's compute dtype, no multiply-adds: row equals the reference bit for bit. Partials are keyed by
          chunk and summed in chunk order: no bit depends on the order of arrival nor on which gradients share a call.
Limits    no slot twice in one call. A chunk that is not whole or whose row or gradient is not 16-byte aligned is read
          element by element.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from dbmtl_fused._ops import CHUNK
from dbmtl_fused.triton_kernels import checks, tuning
from dbmtl_fused.triton_kernels.device import alignment, is_last, round_state, sum_of_programs
from dbmtl_fused.triton_kernels.gradients import ABSENT, SKIPPED, gradient_table, listed_chunks
from dbmtl_fused.triton_kernels.launch import on_device


@triton.jit
def _load_gradient(
    address, code, start, offsets, numel, values, state: tl.constexpr, DTYPES: tl.constexpr, WHOLE: tl.constexpr
):
    """The gradient, or ``values`` where there is none.

    ``DTYPES`` has a bit for every dtype in the call, so that what does not occur is not compiled.
    """
    for i in tl.static_range(4):
        if DTYPES & (1 << i):  # noqa: SIM102  (decided by the compiler; the next one by the kernel)
            if code == i:
                values = _load_as(address, start, offsets, numel, values, state, i, WHOLE)
    return values


@triton.jit
def _load_as(address, start, offsets, numel, values, state: tl.constexpr, CODE: tl.constexpr, WHOLE: tl.constexpr):
    if CODE == 0:
        pointer = address.to(tl.pointer_type(tl.float32))
    elif CODE == 1:
        pointer = address.to(tl.pointer_type(tl.bfloat16))
    elif CODE == 2:
        pointer = address.to(tl.pointer_type(tl.float16))
    else:
        pointer = address.to(tl.pointer_type(tl.float64))
    if WHOLE:
        first = tl.multiple_of(pointer + start, alignment(pointer.dtype.element_ty, state))
        loaded = tl.load(first + offsets, eviction_policy="evict_first")
    else:
        loaded = tl.load(pointer + start + offsets, mask=offsets < numel, other=0.0, eviction_policy="evict_first")
    return loaded.to(values.dtype)


@triton.jit(
    do_not_specialize=["num_slots", "first_slot", "first_chunk", "num_chunks", "C"],
    do_not_specialize_on_alignment=[
        "table", "chunks", "beta", "inv_scale", "seed", "partials", "sq_norm", "found_inf", "arrivals",
    ],
)  # fmt: skip
def ema_update_kernel(
    row, table, num_slots, first_slot, chunks, first_chunk, num_chunks, C, beta, inv_scale, seed, partials, sq_norm,
    found_inf, arrivals,
    ACCUMULATE: tl.constexpr, DTYPES: tl.constexpr, ROUND: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    coefficient = tl.load(beta)
    index = first_chunk.to(tl.int64) + tl.program_id(0)
    if tl.program_id(0) < num_chunks:
        slot = tl.load(chunks + 3 * index) - first_slot
        code = tl.load(table + num_slots + slot)
        if code != SKIPPED:
            start, numel = tl.load(chunks + 3 * index + 1), tl.load(chunks + 3 * index + 2)
            address = tl.load(table + slot)
            _update_chunk(
                row, start, numel, address, tl.where(coefficient == 1, ABSENT, code), coefficient, inv_scale, seed,
                partials + index, found_inf, ACCUMULATE, DTYPES, ROUND, CHUNK,
            )  # fmt: skip

    if is_last(arrivals):
        tl.store(sq_norm, sum_of_programs(partials, C, CHUNK))


@triton.jit
def _update_chunk(
    row, start, numel, address, code, coefficient, inv_scale, seed, partial, found_inf,
    ACCUMULATE: tl.constexpr, DTYPES: tl.constexpr, ROUND: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    state: tl.constexpr = row.dtype.element_ty
    offsets = tl.arange(0, CHUNK)
    none = tl.zeros([CHUNK], coefficient.dtype)
    element_bytes = tl.where(code == 0, 4, tl.where(code == 3, 8, 2))
    row_address = row.to(tl.int64) + start * (state.primitive_bitwidth // 8)
    whole = (numel == CHUNK) & ((row_address | (address + start * element_bytes)) % 16 == 0)
    if whole:
        old = tl.load(tl.multiple_of(row + start, 16) + offsets).to(none.dtype)
        grad = _load_gradient(address, code, start, offsets, numel, none, state, DTYPES, True)
    else:
        old = tl.load(row + start + offsets, mask=offsets < numel, other=0.0).to(none.dtype)
        grad = _load_gradient(address, code, start, offsets, numel, none, state, DTYPES, False)

    decayed = old if ACCUMULATE else coefficient * old
    # Where there is no gradient, neither a zero's sign nor an infinite inv_scale is to change anything.
    updated = tl.where(code == ABSENT, decayed, decayed + (1 - coefficient) * (grad * tl.load(inv_scale)))
    stored, within_limit = round_state(updated, old, tl.load(seed) if ROUND else 0, start + offsets, ROUND)
    if tl.max((~within_limit).to(tl.int32), axis=0) > 0:
        tl.store(found_inf, 1)
    tl.store(partial, tl.sum(stored * stored, axis=0))
    if whole:
        tl.store(tl.multiple_of(row + start, 16) + offsets, stored.to(state))
    else:
        tl.store(row + start + offsets, stored.to(state), mask=offsets < numel)


def ema_update_(
    row: Tensor,
    grads: Sequence[Tensor | None],
    slots: Sequence[int],
    segments: Tensor,
    chunks: Tensor,
    beta: Tensor,
    inv_scale: Tensor,
    seed: Tensor | None,
    partials: Tensor,
    sq_norm: Tensor,
    found_inf: Tensor,
    arrivals: Tensor,
    accumulate: bool,
) -> None:
    device, dtype = row.device, checks.state("row", row)
    checks.row("row", row, device)
    checks.seed("row", row, seed)
    for name, scalar in {"beta": beta, "inv_scale": inv_scale, "sq_norm": sq_norm}.items():
        checks.scalar(name, scalar, dtype, device)
    checks.scalar("found_inf", found_inf, torch.float32, device)
    checks.scalar("arrivals", arrivals, torch.int32, device)
    checks.row("partials", partials, device)
    checks.dtype("partials", partials, dtype)

    listed = listed_chunks(slots, segments, row.shape[0], partials.shape[0])
    checks.chunks(chunks, partials.shape[0], device)
    with on_device(row):
        table = gradient_table(grads, slots, listed, device)
        ema_update_kernel[(max(1, listed.num_chunks),)](
            row,
            table.values,
            listed.num_slots,
            listed.first_slot,
            chunks,
            listed.first_chunk,
            listed.num_chunks,
            partials.shape[0],
            beta,
            inv_scale,
            seed,
            partials,
            sq_norm,
            found_inf,
            arrivals,
            ACCUMULATE=accumulate,
            DTYPES=table.dtypes,
            ROUND=seed is not None,
            CHUNK=CHUNK,
            num_warps=tuning.EMA_UPDATE.num_warps,
            **tuning.ARITHMETIC,
        )
