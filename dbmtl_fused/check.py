"""``python -m dbmtl_fused check``: is every available backend right on this machine? Takes seconds.

Each backend runs a few steps of the one-shot operator, and of the streaming ones, on random inputs of awkward sizes.
Its EMA, norms, weights and weighted sum are compared with a NumPy oracle in float64 or better, which shares no code.
Errors are in machine epsilons of the coarser of state and output, relative to the largest magnitude.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dbmtl_fused import backends, info
from dbmtl_fused._ops import GRAD_DTYPES, STATE_DTYPES, compute_dtype
from dbmtl_fused.functional import balance_
from dbmtl_fused.layout import FlatLayout, large_first
from dbmtl_fused.rows import EmaRows, Step

STEPS = 3
BETA = 0.75  # exact in every dtype
EPS = 1e-8
SHAPES = ((1, 1), (3, 4097), (11, 1000))
PARAMETERS = ((7, 19), (), (4099,), (0, 3), (16, 3, 3, 3))
LIMIT = 32.0
"""A right backend stays below 10: a weight is a quotient of norms, each a few roundings off."""


class Case(NamedTuple):
    """One line of the report."""

    operator: str
    state_dtype: torch.dtype
    grad_dtype: torch.dtype
    error: float

    @property
    def passed(self) -> bool:
        return self.error <= LIMIT


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m dbmtl_fused check", description=__doc__)
    parser.add_argument(
        "--device", type=info.device, help="device to check (default: the CPU, and the accelerator if there is one)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random inputs (default 0)")
    options = parser.parse_args(arguments)
    try:
        import numpy  # noqa: F401
    except ImportError:
        print("check needs NumPy, in which its oracle is written: pip install numpy", file=sys.stderr)
        return 2
    devices = [options.device] if options.device else map(torch.device, info.devices())
    failures = 0
    for device in devices:
        for backend in backends.BACKENDS:
            if reason := backends.why_not(backend, device.type):
                print(f"{device.type} {backend}: skipped, {reason}")
                continue
            for case in check_backend(backend, device, options.seed):
                verdict = "ok" if case.passed else "WRONG"
                dtypes = f"{_short(case.state_dtype)} state, {_short(case.grad_dtype)} gradients"
                print(f"{device.type} {backend}: {case.operator:9} {dtypes:34} error {case.error:6.2f} eps  {verdict}")
                failures += not case.passed
    print(f"{failures} wrong" if failures else f"all right (limit {LIMIT:g} eps)")
    return 1 if failures else 0


def check_backend(backend: str, device: torch.device, seed: int) -> Iterator[Case]:
    """Compare ``backend`` with the oracle on ``device`` for every pair of dtypes."""
    random = torch.Generator().manual_seed(seed)
    for state_dtype in STATE_DTYPES:
        for grad_dtype in GRAD_DTYPES:
            one_shot = max(_one_shot(backend, device, shape, state_dtype, grad_dtype, random) for shape in SHAPES)
            yield Case("one-shot", state_dtype, grad_dtype, one_shot)
            yield Case(
                "streaming", state_dtype, grad_dtype, _streaming(backend, device, state_dtype, grad_dtype, random)
            )


def _one_shot(
    backend: str,
    device: torch.device,
    shape: tuple[int, int],
    state_dtype: torch.dtype,
    grad_dtype: torch.dtype,
    random: torch.Generator,
) -> float:
    T, P = shape
    ema = torch.zeros(T, P, dtype=state_dtype, device=device)
    out = torch.full((P,), torch.nan, dtype=state_dtype, device=device)
    expected, errors = None, []
    for k in range(STEPS):
        grads = _random(shape, grad_dtype, device, random)
        seed = k * T if state_dtype is torch.bfloat16 else None
        _, norms, weights = balance_(ema, grads, BETA, eps=EPS, seed=seed, out=out, backend=backend)
        expected, error = _compare(expected, grads, ema, norms, weights, out)
        errors.append(error)
    return max(errors)


def _streaming(
    backend: str, device: torch.device, state_dtype: torch.dtype, grad_dtype: torch.dtype, random: torch.Generator
) -> float:
    """Gradients arrive parameter by parameter, the last one in two parts, and one never does."""
    T = 3
    params = [(str(i), torch.zeros(shape, dtype=grad_dtype, device=device)) for i, shape in enumerate(PARAMETERS)]
    layout = FlatLayout(large_first(params))
    ops = backends.operators(backend)
    rows = EmaRows(T, layout, ops, ("max", 0.0), EPS, state_dtype)
    expected, errors = None, []
    for k in range(STEPS):
        losses = torch.ones(T, device=device)
        step = Step([0] * T, torch.tensor(k, device=device), BETA, 0.0, compute_dtype(state_dtype))
        step.take(ops.begin_step, range(T), losses, losses[0])
        rows.begin(step)
        flat_grads = torch.zeros(T, layout.P, dtype=torch.float64, device=device)
        *whole, (last, _) = enumerate(layout.slots)
        for task in range(T):
            for i, slot in whole:
                missing = i == task
                grad = None if missing else _random(slot.shape, grad_dtype, device, random)
                rows.update(task, [i], [grad], accumulate=False)
                if grad is not None:
                    slot.view(flat_grads[task]).copy_(grad)
            for part in range(2):
                grad = _random(layout.slots[last].shape, grad_dtype, device, random)
                rows.update(task, [last], [grad], accumulate=part > 0)
                layout.slots[last].view(flat_grads[task]).add_(grad)
            rows.end_task(task)
        out = torch.zeros(layout.P, dtype=grad_dtype, device=device)
        for slot, grad in zip(layout.slots, rows.finish(range(len(layout.slots))), strict=True):
            slot.view(out).copy_(grad)
        diagnostics = step.grad_norm(), rows.gram()
        expected, error = _compare(expected, flat_grads, rows.buffer, step.norms, step.weights, out, *diagnostics)
        errors.append(error)
    return max(errors)


def _random(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, random: torch.Generator) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=random).to(device, dtype)


def _compare(
    expected: Any,
    grads: Tensor,
    ema: Tensor,
    norms: Tensor,
    weights: Tensor,
    out: Tensor,
    grad_norm: Tensor | None = None,
    gram: Tensor | None = None,
) -> tuple[Any, float]:
    """The oracle's EMA after a step, and the largest error of what a backend made of the same gradients."""
    from dbmtl_fused import oracle

    updated = oracle.ema_update(oracle.real(0 if expected is None else expected), _array(grads), BETA).ema
    balanced = oracle.combine(updated, oracle.row_norms(updated), eps=EPS)
    pairs = [(ema, updated), (norms, balanced.norms), (weights, balanced.weights), (out, balanced.out)]
    if grad_norm is not None and gram is not None:
        pairs += [(grad_norm, balanced.out_sq_norm**0.5), (gram, oracle.gram(updated))]
    errors = []
    for found, exact in pairs:
        distance = abs(_array(found) - exact).max()
        epsilon = max(torch.finfo(dtype).eps for dtype in (found.dtype, ema.dtype))  # float64 out of a float32 state
        errors.append(float(distance / abs(exact).max()) / epsilon)
    # NaN is the largest error of all, and max() would lose it.
    return updated, max(errors, key=lambda error: float("inf") if error != error else error)


def _array(tensor: Tensor) -> Any:
    return tensor.detach().cpu().double().numpy()


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
