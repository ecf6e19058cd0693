"""Native operators refuse what would make them leave a tensor's memory, naming the parameter and what was found.

These are the last line of defence: users meet the checks in Python first (``test_balance_function.py``). The reference
needs none, for torch's own operators check.
"""

from __future__ import annotations

import re
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from op_inputs import DEVICE, Segments, arrivals, flags

from dbmtl_fused import backends
from dbmtl_fused.layout import chunk_table

T, P = 3, 130


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=DEVICE)


def arguments(op: str) -> dict[str, Any]:
    """Good arguments of ``op``, by name and in order."""
    outputs = {"out": zeros(P), "norms": zeros(T), "weights": zeros(T)}
    alpha = {"alpha": "max", "alpha_constant": 1.0, "eps": 1e-8}
    if op == "begin_step":
        inputs = {"losses": zeros(T), "active": zeros(T, dtype=torch.bool), "scale": zeros()}
        numbers = {"step": zeros(dtype=torch.int64), "beta": 0.9, "beta_sigma": 0.5, "micro_batches": 1}
        written = {"seeds": zeros(T), "betas": zeros(T), "inv_scale": zeros(), "found_inf": flags()}
        return {**inputs, **numbers, "log_eps": 1e-8, "accumulate": False, **written}
    if op == "balance_":
        matrices = {"ema": zeros(T, P), "grads": zeros(T, P), "beta": zeros(), "seed": None}
        return {**matrices, **alpha, **outputs, "found_inf": flags()}
    if op == "combine":
        inputs = {"ema": zeros(T, P), "sq_norms": zeros(T), "preference": zeros(T)}
        scalars = {"found_inf": flags(), "scale": zeros(), **alpha, "accumulate": False}
        outputs |= {"alpha_value": zeros(), "out_sq_norm": zeros(), "step": zeros(dtype=torch.int64)}
        outputs |= {"arrivals": arrivals()}
        return {**inputs, **scalars, **outputs}
    if op == "gram":
        return {"ema": zeros(T, P), "out": zeros(T, T), "arrivals": arrivals()}
    segments = Segments.of([5000, 12])
    tables = {"segments": segments.table, "chunks": chunk_table(segments.table.tolist()).to(DEVICE)}
    inputs = {"grads": [zeros(5000), zeros(12)], "slots": [0, 1], **tables}
    scalars = {"beta": zeros(), "inv_scale": zeros(), "seed": None}
    outputs = {"partials": zeros(segments.chunks), "sq_norm": zeros(), "found_inf": flags()}
    return {"row": zeros(segments.P), **inputs, **scalars, **outputs, "arrivals": arrivals(), "accumulate": False}


def table(*rows: tuple[int, int, int]) -> torch.Tensor:
    """Segments, which are always in the host's memory."""
    return torch.tensor(rows, dtype=torch.int64)


ROUNDED: dict[str, Any] = {"ema": zeros(T, P, dtype=torch.bfloat16), "seed": zeros(dtype=torch.int64)}
ROUNDED_ROW: dict[str, Any] = {"row": zeros(5376, dtype=torch.bfloat16), "seed": zeros(dtype=torch.int64)}


CASES = [
    ("begin_step", {"losses": zeros(T, 1)}, "losses must have shape (T,) with T >= 1, got (3, 1)"),
    ("begin_step", {"losses": zeros(0)}, "losses must have shape (T,) with T >= 1, got (0,)"),
    ("begin_step", {"losses": zeros(T, dtype=torch.float16)}, "losses must be float32 or float64, got float16"),
    ("begin_step", {"losses": zeros(T, 2)[:, 0]}, "losses must have adjacent columns, got stride 2"),
    ("begin_step", {"active": zeros(T)}, "active must be bool, got float32"),
    ("begin_step", {"active": zeros(T - 1, dtype=torch.bool)}, "active must have shape (3,), got (2,)"),
    ("begin_step", {"scale": zeros(dtype=torch.float64)}, "scale must be float32, got float64"),
    ("begin_step", {"scale": zeros(2)}, "scale must have one element, got shape (2,)"),
    ("begin_step", {"step": zeros()}, "step must be int64, got float32"),
    ("begin_step", {"micro_batches": 0}, "micro_batches must be >= 1, got 0"),
    ("begin_step", {"seeds": zeros(T, dtype=torch.float64)}, "seeds must be float32, got float64"),
    ("begin_step", {"seeds": zeros(T + 1)}, "seeds must have shape (3,), got (4,)"),
    ("begin_step", {"betas": zeros(T, dtype=torch.bfloat16)}, "betas must be float32 or float64, got bfloat16"),
    ("begin_step", {"betas": zeros(1)}, "betas must have shape (3,), got (1,)"),
    ("begin_step", {"inv_scale": zeros(dtype=torch.float64)}, "inv_scale must be float32, got float64"),
    ("begin_step", {"found_inf": zeros(0)}, "found_inf must have one element, got shape (0,)"),
    ("balance_", {"ema": zeros(P)}, "ema must have shape (T, P) with T >= 1, got (130,)"),
    ("balance_", {"ema": zeros(0, P), "grads": zeros(0, P)}, "ema must have shape (T, P) with T >= 1, got (0, 130)"),
    ("balance_", {"ema": zeros(T, P, dtype=torch.float16)}, "ema must be float32, float64 or bfloat16, got float16"),
    ("balance_", {"ema": zeros(P, T).t()}, "ema must have adjacent columns, got stride 3"),
    ("balance_", {"grads": zeros(T, P - 1)}, "grads must have ema's shape (3, 130), got (3, 129)"),
    ("balance_", {"grads": zeros(T - 1, P)}, "grads must have ema's shape (3, 130), got (2, 130)"),
    ("balance_", {"grads": zeros(P, T).t()}, "grads must have adjacent columns, got stride 3"),
    (
        "balance_",
        {"grads": zeros(T, P, dtype=torch.int64)},
        "grads must be float32, bfloat16, float16 or float64, got int64",
    ),
    ("balance_", {"beta": zeros(2)}, "beta must have one element, got shape (2,)"),
    ("balance_", {"beta": zeros(dtype=torch.float64)}, "beta must be float32, got float64"),
    ("balance_", {**ROUNDED, "beta": zeros(dtype=torch.bfloat16)}, "beta must be float32, got bfloat16"),
    ("balance_", {**ROUNDED, "weights": zeros(T, dtype=torch.bfloat16)}, "weights must be float32, got bfloat16"),
    ("balance_", {**ROUNDED, "seed": None}, "seed must be given if and only if ema is bfloat16, got none for bfloat16"),
    (
        "balance_",
        {**ROUNDED, "ema": zeros(T, P)},
        "seed must be given if and only if ema is bfloat16, got one for float32",
    ),
    ("balance_", {**ROUNDED, "seed": zeros(2, dtype=torch.int64)}, "seed must have one element, got shape (2,)"),
    ("balance_", {**ROUNDED, "seed": zeros(dtype=torch.int32)}, "seed must be int64, got int32"),
    ("balance_", {"out": zeros(P - 1)}, "out must have shape (130,), got (129,)"),
    ("balance_", {"out": zeros(2 * P)[::2]}, "out must have adjacent columns, got stride 2"),
    ("balance_", {"out": zeros(P, dtype=torch.int32)}, "out must be float32, bfloat16, float16 or float64, got int32"),
    ("balance_", {"norms": zeros(T - 1)}, "norms must have shape (3,), got (2,)"),
    ("balance_", {"norms": zeros(T, dtype=torch.float64)}, "norms must be float32, got float64"),
    ("balance_", {"weights": zeros(T + 1)}, "weights must have shape (3,), got (4,)"),
    ("balance_", {"weights": zeros(T, 2)[:, 0]}, "weights must have adjacent columns, got stride 2"),
    ("balance_", {"found_inf": zeros(dtype=torch.bool)}, "found_inf must be float32, got bool"),
    ("balance_", {"found_inf": zeros(0)}, "found_inf must have one element, got shape (0,)"),
    ("balance_", {"alpha": "maximum"}, "alpha must be max, min, mean, median, constant or none, got maximum"),
    ("combine", {"ema": zeros(T, P, 1)}, "ema must have shape (T, P) with T >= 1, got (3, 130, 1)"),
    ("combine", {"ema": zeros(P, T).t()}, "ema must have adjacent columns, got stride 3"),
    ("combine", {"sq_norms": zeros(T - 1)}, "sq_norms must have shape (3,), got (2,)"),
    ("combine", {"sq_norms": zeros(T, 2)[:, 0]}, "sq_norms must have adjacent columns, got stride 2"),
    ("combine", {"sq_norms": zeros(T, dtype=torch.float64)}, "sq_norms must be float32, got float64"),
    (
        "combine",
        {"ema": zeros(T, P, dtype=torch.bfloat16), "sq_norms": zeros(T, dtype=torch.bfloat16)},
        "sq_norms must be float32, got bfloat16",
    ),
    ("combine", {"scale": zeros(0)}, "scale must have one element, got shape (0,)"),
    ("combine", {"out": zeros(1)}, "out must have shape (130,), got (1,)"),
    ("combine", {"out": zeros(P, dtype=torch.bool)}, "out must be float32, bfloat16, float16 or float64, got bool"),
    ("combine", {"norms": zeros()}, "norms must have shape (3,), got ()"),
    ("combine", {"weights": zeros(0)}, "weights must have shape (3,), got (0,)"),
    ("combine", {"alpha_value": zeros(0)}, "alpha_value must have one element, got shape (0,)"),
    ("combine", {"preference": zeros(T + 1)}, "preference must have shape (3,), got (4,)"),
    ("combine", {"preference": zeros(T, dtype=torch.bool)}, "preference must be float32, got bool"),
    ("combine", {"step": zeros(2, dtype=torch.int64)}, "step must have one element, got shape (2,)"),
    ("combine", {"step": zeros()}, "step must be int64, got float32"),
    ("combine", {"arrivals": zeros()}, "arrivals must be int32, got float32"),
    ("combine", {"out_sq_norm": zeros(dtype=torch.float64)}, "out_sq_norm must be float32, got float64"),
    ("gram", {"ema": zeros(P)}, "ema must have shape (T, P) with T >= 1, got (130,)"),
    ("gram", {"ema": zeros(T, P, dtype=torch.float16)}, "ema must be float32, float64 or bfloat16, got float16"),
    ("gram", {"arrivals": zeros(2, dtype=torch.int32)}, "arrivals must have one element, got shape (2,)"),
    ("gram", {"out": zeros(T, P)}, "out must have shape (3, 3) and be contiguous, got (3, 130)"),
    ("gram", {"out": zeros(T, 2 * T)[:, :T]}, "out must have shape (3, 3) and be contiguous, got (3, 3)"),
    ("gram", {"out": zeros(T, T, dtype=torch.float64)}, "out must be float32, got float64"),
    ("ema_update_", {"row": zeros(2, 3000)}, "row must have shape (P,), got (2, 3000)"),
    ("ema_update_", {"row": zeros(10752)[::2]}, "row must have adjacent columns, got stride 2"),
    ("ema_update_", {"row": zeros(5376, dtype=torch.int16)}, "row must be float32, float64 or bfloat16, got int16"),
    ("ema_update_", {"row": zeros(5131)}, "segments must lie in row's 5131 columns, got start 5120 and numel 12"),
    ("ema_update_", {"grads": [zeros(5000)]}, "grads and slots must be of the same length, got 1 and 2"),
    (
        "ema_update_",
        {"grads": [zeros(5000), zeros(11)]},
        "grads must have as many elements as their segments, got 11 for 12",
    ),
    (
        "ema_update_",
        {"grads": [zeros(1).expand(5000), None]},
        "grads must be dense, got a view of shape (5000,) that repeats elements",
    ),
    (
        "ema_update_",
        {"grads": [None, zeros(12, dtype=torch.complex64)]},
        "grads must be float32, bfloat16, float16 or float64",
    ),
    ("ema_update_", {"slots": [0, 2]}, "slots must be below the 2 rows of segments, got 2"),
    ("ema_update_", {"slots": [0, -1]}, "slots must be below the 2 rows of segments, got -1"),
    ("ema_update_", {"segments": torch.zeros(2, 3)}, "segments must be int64, got float32"),
    (
        "ema_update_",
        {"segments": table((0, 5000, 0), (5120, 12, 2))[:, :2]},
        "segments must be contiguous, of shape (S, 3)",
    ),
    (
        "ema_update_",
        {"segments": table((0, 5000, 0), (-1, 12, 2))},
        "segments must lie in row's 5376 columns, got start -1 and numel 12",
    ),
    (
        "ema_update_",
        {"segments": table((0, 5000, 0), (2**63 - 1, 12, 2))},
        f"segments must lie in row's 5376 columns, got start {2**63 - 1} and numel 12",
    ),
    (
        "ema_update_",
        {"segments": table((0, 5000, 2), (5120, 12, 0))},
        "the chunks of segments must lie in 3 partials, got numel 5000 and first_chunk 2",
    ),
    (
        "ema_update_",
        {"segments": table((0, 5000, -1), (5120, 12, 2))},
        "the chunks of segments must lie in 3 partials, got numel 5000 and first_chunk -1",
    ),
    (
        "ema_update_",
        {"partials": zeros(2)},
        "the chunks of segments must lie in 2 partials, got numel 12 and first_chunk 2",
    ),
    ("ema_update_", {"partials": zeros(3, dtype=torch.float64)}, "partials must be float32, got float64"),
    ("ema_update_", {"beta": zeros(0)}, "beta must have one element, got shape (0,)"),
    ("ema_update_", {"inv_scale": zeros(0)}, "inv_scale must have one element, got shape (0,)"),
    (
        "ema_update_",
        {**ROUNDED_ROW, "seed": None},
        "seed must be given if and only if row is bfloat16, got none for bfloat16",
    ),
    (
        "ema_update_",
        {**ROUNDED_ROW, "row": zeros(5376)},
        "seed must be given if and only if row is bfloat16, got one for float32",
    ),
    ("ema_update_", {**ROUNDED_ROW, "seed": zeros(0, dtype=torch.int64)}, "seed must have one element, got shape (0,)"),
    (
        "ema_update_",
        {**ROUNDED_ROW, "partials": zeros(3, dtype=torch.bfloat16)},
        "partials must be float32, got bfloat16",
    ),
    ("ema_update_", {"sq_norm": zeros(0)}, "sq_norm must have one element, got shape (0,)"),
    ("ema_update_", {"found_inf": zeros(dtype=torch.float64)}, "found_inf must be float32, got float64"),
]


@pytest.mark.parametrize(("op", "bad", "message"), CASES, ids=[f"{op}{message[:40]}" for op, _, message in CASES])
def test_refused(native_backend: str, op: str, bad: dict[str, Any], message: str) -> None:
    good = arguments(op)
    operator = getattr(backends.operators(native_backend), op)
    operator(*good.values())
    with pytest.raises(RuntimeError, match=re.escape(message)):
        operator(*(good | bad).values())


@pytest.mark.parametrize(
    ("chunks", "message"),
    [
        (zeros(2, 3, dtype=torch.int64), "chunks must be contiguous, of shape (3, 3), got (2, 3)"),
        (zeros(3, 3), "chunks must be int64, got float32"),
    ],
    ids=["shape", "dtype"],
)
def test_chunks_are_refused(native_backend: str, chunks: torch.Tensor, message: str) -> None:
    """By the backends that look at them."""
    good = arguments("ema_update_") | {"chunks": chunks}
    operator = backends.operators(native_backend).ema_update_
    with nullcontext() if native_backend == "cpu" else pytest.raises(RuntimeError, match=re.escape(message)):
        operator(*good.values())


@pytest.mark.skipif(DEVICE.type == "cpu", reason="tensors on two devices need a second device")
@pytest.mark.parametrize("op", backends.Operators._fields)
def test_tensors_elsewhere_are_refused(native_backend: str, op: str) -> None:
    """One tensor in the host's memory among those of the device, or the one whose place that is on the device.

    Where it is the first, which says where the others must be, one of them is named.
    """
    good = arguments(op)
    first = next(iter(good))
    for name, value in good.items():
        if isinstance(value, torch.Tensor):
            elsewhere = value.to(DEVICE) if name == "segments" else value.cpu()
            with pytest.raises(RuntimeError, match="must be on" if name == first else f"{name} must be on"):
                getattr(backends.operators(native_backend), op)(*(good | {name: elsewhere}).values())
