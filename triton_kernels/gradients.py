"""What tells ``ema_update_`` where the gradients are: a small table in device memory.

Row 0 holds addresses, moved so that a gradient's elements are found under the numbers of their columns. Row 1 says
what is there: the index of a dtype in ``GRAD_DTYPES``, ``ABSENT`` if the task did not reach the parameter, or
``SKIPPED`` for a slot that the call does not list. A training loop gets its gradients at the same few addresses again
and again, so tables are kept: a step after the first few copies nothing to the device.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from dbmtl_fused._ops import CHUNK, GRAD_DTYPES
from dbmtl_fused.triton_kernels import checks
from dbmtl_fused.triton_kernels.launch import current_stream, is_capturing

SKIPPED = tl.constexpr(-1)
ABSENT = tl.constexpr(-2)

_CODES = {dtype: code for code, dtype in enumerate(GRAD_DTYPES)}
_KEPT_TABLES = 256
_KEPT_LISTS = 256


class Listed(NamedTuple):
    """The slots of a call: how many chunks a launch must cover from which on, and likewise for slots."""

    first_chunk: int
    num_chunks: int
    first_slot: int
    num_slots: int
    starts: tuple[int, ...]  # of each slot of the call
    numels: tuple[int, ...]


class Table(NamedTuple):
    values: Tensor  # (2, num_slots) int64
    dtypes: int  # bit i: some gradient has dtype GRAD_DTYPES[i]


_lists: WeakIdKeyDictionary = WeakIdKeyDictionary()


def listed_chunks(slots: Sequence[int], segments: Tensor, P: int, C: int) -> Listed:
    """Check ``slots`` against ``segments`` and find what a launch must cover."""
    version, known = _lists.get(segments, (None, None))
    if version != segments._version or len(known) > _KEPT_LISTS:
        known = {}
        _lists[segments] = (segments._version, known)
    key = (tuple(slots), P, C)
    if key not in known:
        known[key] = _find_chunks(slots, segments, P, C)
    return known[key]


def _find_chunks(slots: Sequence[int], segments: Tensor, P: int, C: int) -> Listed:
    checks.segments(segments)
    rows, starts, numels, chunks = segments.tolist(), [], [], []
    for slot in slots:
        if not 0 <= slot < len(rows):
            raise RuntimeError(f"slots must be below the {len(rows)} rows of segments, got {slot}")
        start, numel, first_chunk = rows[slot]
        if start < 0 or numel < 0 or start > P - numel:
            raise RuntimeError(f"segments must lie in row's {P} columns, got start {start} and numel {numel}")
        end = first_chunk + -(numel // -CHUNK)
        if first_chunk < 0 or end > C:
            raise RuntimeError(
                f"the chunks of segments must lie in {C} partials, got numel {numel} and first_chunk {first_chunk}"
            )
        starts.append(start)
        numels.append(numel)
        chunks += [first_chunk, end] if numel else []
    first, last = min(chunks, default=0), max(chunks, default=0)
    first_slot = min(slots, default=0)
    num_slots = max(slots, default=0) - first_slot + 1
    return Listed(first, last - first, first_slot, num_slots, tuple(starts), tuple(numels))


_tables: OrderedDict[tuple, Table] = OrderedDict()
_captured_tables: list[Table] = []
"""Tables that graphs read, which must outlive their place in the other list; nobody says when a graph is gone."""


def gradient_table(grads: Sequence[Tensor | None], slots: Sequence[int], listed: Listed, device: torch.device) -> Table:
    """The table for ``grads``, from those that were kept or new."""
    if len(grads) != len(slots):
        raise RuntimeError(f"grads and slots must be of the same length, got {len(grads)} and {len(slots)}")
    addresses, codes = [], []
    for grad, start, numel in zip(grads, listed.starts, listed.numels, strict=True):
        if grad is None:
            addresses.append(0)
            codes.append(ABSENT.value)
        else:
            checks.dense_gradient(grad, numel, device)
            addresses.append(grad.data_ptr() - start * grad.itemsize)
            codes.append(_CODES[grad.dtype])
    capturing = is_capturing(device)
    key = (device, current_stream(device), tuple(slots), tuple(addresses), tuple(codes))
    if table := _tables.get(key):
        _tables.move_to_end(key)
        if capturing:
            _captured_tables.append(table)
        return table
    values = torch.zeros(2, listed.num_slots, dtype=torch.int64)
    values[1] = SKIPPED.value
    where = torch.tensor(slots, dtype=torch.int64) - listed.first_slot
    values[:, where] = torch.tensor([addresses, codes], dtype=torch.int64)
    dtypes = sum(1 << code for code in set(codes) if code >= 0)
    if capturing:
        return Table(_captured_copy(values, device), dtypes)  # filled by the graph's replays only: not for other calls
    if device.type == "cuda":
        _arena()  # for captures to come, which could not allocate it
    table = _tables[key] = Table(values.to(device, non_blocking=True), dtypes)
    if len(_tables) > _KEPT_TABLES:
        _tables.popitem(last=False)
    return table


_ARENA_NUMBERS = 2**18
_arena_used = 0


@functools.cache
def _arena() -> Tensor:
    """Pinned host memory that graphs copy their tables from at every replay; never used twice.

    Allocated by the first call outside of a capture.
    """
    return torch.empty(_ARENA_NUMBERS, dtype=torch.int64, pin_memory=True)


def _captured_copy(values: Tensor, device: torch.device) -> Tensor:
    global _arena_used
    start, stop = _arena_used, _arena_used + values.numel()
    if stop > _ARENA_NUMBERS:
        raise RuntimeError(
            f"captured graphs hold tables of {_arena_used} gradient addresses, {values.numel()} more do not fit "
            f"{_ARENA_NUMBERS}; capture fewer graphs in one process"
        )
    _arena_used = stop
    return _arena()[start:stop].view(values.shape).copy_(values).to(device, non_blocking=True)
