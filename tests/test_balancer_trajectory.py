"""Training runs in which every ``.grad`` is compared with Algorithm 1 run beside it on the same parameters.

Errors are relative norms of the whole shared gradient. They come from the backward passes (which start from other
seeds) and from rounding the state; bounds are about ten times what was measured.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from small_models import Algorithm1, Net, flat, grads_of, make_net, relative_error
from stand_ins import INTERPRETED

from dbmtl_fused import DBMTL, oracle

STEPS, MANY_STEPS = (10, 10) if INTERPRETED else (50, 200)
RTOL = {torch.float32: 1e-5, torch.float64: 1e-13}
BUCKETS = {"from .grad": None, "tiny buckets": 64, "one bucket": 1 << 30}


def train(
    net: Net, balancer: DBMTL, rng: np.random.Generator, steps: int, drop_in: bool = False, **options: Any
) -> None:
    shared, heads = list(net.encoder.parameters()), list(net.heads.parameters())
    expected = Algorithm1(shared, **options)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    rtol = RTOL[shared[0].dtype]
    for k in range(1, steps + 1):
        losses = net.batch_losses(rng)
        shared_grad = expected.step(losses)
        objective = sum((l + 1e-8).log() if expected.log_losses else l for l in losses)
        head_grad = flat(torch.autograd.grad(objective, heads, retain_graph=True), heads)
        optimizer.zero_grad()
        if drop_in:
            loss = balancer(losses)
            torch.testing.assert_close(loss, objective.detach(), rtol=1e-6, atol=1e-5)
            loss.backward()
        else:
            balancer.backward(losses)
        assert relative_error(grads_of(shared), shared_grad) < rtol, f"step {k}"
        assert relative_error(grads_of(heads), head_grad) < rtol, f"step {k}"
        optimizer.step()
    assert balancer.step == steps


@pytest.mark.parametrize("dtype", RTOL, ids=str)
@pytest.mark.parametrize("bucket_bytes", BUCKETS.values(), ids=BUCKETS)
def test_default_options(backend: str, bucket_bytes: int | None, dtype: torch.dtype, rng: np.random.Generator) -> None:
    net = make_net(dtype)
    train(net, DBMTL(net.encoder, num_tasks=3, bucket_bytes=bucket_bytes, backend=backend), rng, STEPS)


def test_bfloat16_state(backend: str, rng: np.random.Generator) -> None:
    """Rounded without bias, the EMA of one run stays within a step or two of bfloat16 of that in float32."""
    net = make_net(torch.float32)
    exact, halved = (
        DBMTL(net.encoder, num_tasks=3, beta_sigma=0.1, state_dtype=dtype, backend=backend)
        for dtype in (torch.float32, torch.bfloat16)
    )
    for _ in range(MANY_STEPS):
        losses = net.batch_losses(rng)
        exact.backward(losses, retain_graph=True, overwrite=True)
        halved.backward(losses, overwrite=True)
    assert halved.step == MANY_STEPS
    assert halved.norms.dtype == halved.weights.dtype == torch.float32
    torch.testing.assert_close(halved.weights, exact.weights, rtol=2e-2, atol=0)
    for name, ema in halved.ema.items():
        assert ema.dtype == torch.bfloat16
        distance = (ema.float() - exact.ema[name]).norm() / exact.ema[name].norm()
        assert distance < 2**-7, name


OPTIONS: dict[str, dict[str, Any]] = {
    "beta 0": {"beta": 0.0},
    "beta 0, alpha mean": {"beta": 0.0, "alpha": "mean"},
    "constant beta": {"beta_sigma": 0.0},
    "beta/k": {"beta": 0.5, "beta_sigma": 1.0},
    "magnitude only": {"log_losses": False},
    "log only": {"alpha": None, "beta": 0.0},
    "equal weighting": {"alpha": None, "beta": 0.0, "log_losses": False},
    "EMA of the plain sum": {"alpha": None},
    "alpha min": {"alpha": "min"},
    "alpha mean": {"alpha": "mean"},
    "alpha median": {"alpha": "median"},
    "alpha 0.5": {"alpha": 0.5},
}


@pytest.mark.parametrize("drop_in", [False, True], ids=["backward", "drop-in loss"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_option(backend: str, options: dict[str, Any], drop_in: bool, rng: np.random.Generator) -> None:
    net = make_net()
    train(net, DBMTL(net.encoder, num_tasks=3, backend=backend, **options), rng, 15, drop_in, **options)


def test_drop_in_loss_for_long(backend: str, rng: np.random.Generator) -> None:
    net = make_net()
    train(net, DBMTL(net.encoder, num_tasks=3, backend=backend), rng, MANY_STEPS, drop_in=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_gradients_enter_a_float32_ema(
    backend: str, dtype: torch.dtype, rng: np.random.Generator
) -> None:
    """The EMA of what autograd delivers is exact to float32; ``.grad`` is that, rounded once."""
    net = make_net(dtype)
    balancer = DBMTL(net.encoder, num_tasks=3, backend=backend, log_losses=False)
    shared, ema = list(net.encoder.parameters()), oracle.real(0.0)
    for k in range(1, 51):
        losses = [l / scale for l, scale in zip(net.batch_losses(rng), (1.0, 1e3, 1e-4), strict=True)]
        grads = np.stack([flat(torch.autograd.grad(l, shared, retain_graph=True), shared) for l in losses])
        net.zero_grad()
        balancer.backward(losses)
        updated = oracle.ema_update(np.broadcast_to(ema, grads.shape), grads, 0.9 / np.sqrt(oracle.real(k)))
        ema = updated.ema
        found = np.concatenate([m.cpu().double().numpy().reshape(3, -1) for m in balancer.ema.values()], axis=1)
        assert relative_error(found, ema) < 1e-6, f"step {k}"
        expected = oracle.combine(ema, oracle.row_norms(ema)).out
        assert relative_error(grads_of(shared), expected) < torch.finfo(dtype).eps, f"step {k}"
        assert {p.grad.dtype for p in shared if p.grad is not None} == {dtype}
