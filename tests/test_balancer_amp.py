"""Mixed precision: gradient scalers, autocast, 16-bit parameters and losses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from op_inputs import DEVICE
from small_models import Algorithm1, Net, flat, grads_of, make_net, relative_error
from stand_ins import INTERPRETED
from torch import Tensor, nn

from dbmtl_fused import DBMTL

Rng = np.random.Generator
SCALE = 2.0**16
STEPS = 40 if INTERPRETED else 200

ways = pytest.mark.parametrize("drop_in", [False, True], ids=["backward", "drop-in loss"])


def make_scaler(**options: Any) -> torch.amp.GradScaler:
    return torch.amp.GradScaler(DEVICE.type, init_scale=SCALE, **options)


def run_backward(balancer: DBMTL, losses: list[Tensor], scaler: torch.amp.GradScaler, drop_in: bool) -> None:
    if drop_in:
        scaler.scale(balancer(losses)).backward()
    else:
        balancer.backward(losses, scaler=scaler)


class Overflow(torch.autograd.Function):
    """The identity, in whose gradient some entries are infinite."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, where: Tensor) -> Tensor:
        ctx.where = where
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.masked_fill(ctx.where, torch.inf), None


class Fragile(nn.Module):
    """An encoder of one matrix, some entries of whose gradient overflow when told to, and three heads."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.encoder = nn.Linear(7, 30, bias=False)
            self.heads = nn.ModuleList(nn.Linear(30, 2) for _ in range(3))

    def losses(self, x: Tensor, target: Tensor, where: Tensor) -> list[Tensor]:
        features = torch.tanh(x @ Overflow.apply(self.encoder.weight, where).t())
        return [10.0**i * (head(features) - target).square().mean() for i, head in enumerate(self.heads)]


@ways
def test_many_steps_with_overflows(backend: str, rng: Rng, drop_in: bool) -> None:
    """Every tenth step or so overflows: that step is skipped and does not count, the scale backs off, the EMA loses the
    entries that overflowed and no others; all of it as an oracle with the same guard has it."""
    net = Fragile().to(DEVICE)
    shared = [net.encoder.weight]
    balancer, expected = DBMTL(net.encoder, num_tasks=3, backend=backend), Algorithm1(shared)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-2)
    scaler = make_scaler(growth_interval=7)
    for k in range(STEPS):
        bad = k == STEPS // 2 or rng.random() < 0.1  # one at least, whatever is drawn
        where = torch.from_numpy(rng.random((30, 7)) < (0.05 if bad else 0)).to(DEVICE)
        where[0, 0] |= bad
        x, target = (torch.from_numpy(rng.standard_normal((8, n))).to(DEVICE, torch.float32) for n in (7, 2))
        losses = net.losses(x, target, where)
        shared_grad = expected.step(losses)
        scale, before = scaler.get_scale(), net.encoder.weight.detach().clone()
        optimizer.zero_grad()
        run_backward(balancer, losses, scaler, drop_in)

        assert int(balancer.step) == expected.k
        ema = balancer.ema["weight"].reshape(3, -1)
        assert relative_error(ema.cpu().double().numpy(), expected.ema) < 1e-5
        if bad:
            assert net.encoder.weight.grad.isnan().all()
        else:
            assert relative_error(grads_of(shared), shared_grad * scale) < 1e-5
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(net.encoder.weight, before) == bad
        assert (scaler.get_scale() < scale) == bad


@ways
@pytest.mark.parametrize("enabled", [True, False], ids=["enabled", "disabled"])
@pytest.mark.parametrize("options", [{}, {"beta": 0.0}, {"beta": 0.0, "alpha": None}], ids=["EMA", "beta 0", "log"])
def test_grads_are_in_scaled_units(
    backend: str, rng: Rng, drop_in: bool, enabled: bool, options: dict[str, Any]
) -> None:
    """Heads and shared parameters alike, and only they: a power of two scales without rounding."""
    scaled, plain = make_net(), make_net()
    balancer, other = (DBMTL(net.encoder, num_tasks=3, backend=backend, **options) for net in (scaled, plain))
    scaler = make_scaler(enabled=enabled)
    for _ in range(2):
        x, target = plain.batch(rng)
        run_backward(balancer, scaled.losses(x, target), scaler, drop_in)
        other.backward(plain.losses(x, target))
    factor = SCALE if enabled else 1.0
    for p, q in zip(scaled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad * factor, rtol=1e-5, atol=1e-9 * factor)
    for name, ema in balancer.ema.items():
        assert torch.equal(ema, other.ema[name])


def test_a_head_that_overflows_does_not_stop_the_balancer(backend: str, rng: Rng) -> None:
    """The flag is of the shared gradients: the optimizer step is skipped all the same, ``k`` advances."""
    net = make_net()
    balancer, scaler = DBMTL(net.encoder, num_tasks=3, backend=backend), make_scaler()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    before = [p.detach().clone() for p in net.parameters()]
    balancer.backward(net.batch_losses(rng), scaler=scaler)
    net.heads[0].weight.grad[0, 0] = torch.inf
    scaler.step(optimizer)
    scaler.update()
    assert int(balancer.step) == 1
    assert scaler.get_scale() == SCALE / 2
    assert all(torch.equal(p, old) for p, old in zip(net.parameters(), before, strict=True))


def test_a_seed_that_overflows_backs_the_scaler_off(backend: str, rng: Rng) -> None:
    """A tiny fp16 loss: the derivative of its log, times the scale, is beyond fp16."""
    net = make_net()
    balancer, scaler = DBMTL(net.encoder, num_tasks=3, backend=backend), make_scaler()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    losses = [(loss / loss.detach() * 1e-4).half() for loss in net.batch_losses(rng)]
    balancer.backward(losses, scaler=scaler)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == SCALE / 2
    assert int(balancer.step) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(backend: str, rng: Rng, dtype: torch.dtype) -> None:
    """The forward pass in 16 bits; gradients of float32 parameters, EMA and kernels in float32."""
    net: Net = make_net()
    shared = list(net.encoder.parameters())
    balancer, expected = DBMTL(net.encoder, num_tasks=3, backend=backend), Algorithm1(shared)
    scale = 64.0
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=scale)
    for _ in range(5):
        x, target = net.batch(rng)
        with torch.autocast(DEVICE.type, dtype=dtype):
            losses = [(y.float() - target).square().mean() for y in net(x)]
        shared_grad = expected.step(losses)
        net.zero_grad()
        balancer.backward(losses, scaler=scaler)
        # The oracle differentiates the losses, not their logs: its graph rounds to 16 bits in other places.
        assert relative_error(grads_of(shared), shared_grad * scale) < 10 * torch.finfo(dtype).eps
        assert all(p.grad.dtype == torch.float32 for p in shared)
    assert int(balancer.step) == 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_losses_of_16_bits_are_logged_in_float32(backend: str, rng: Rng, dtype: torch.dtype) -> None:
    net = make_net()
    balancer = DBMTL(net.encoder, num_tasks=3, backend=backend)
    losses = [loss.to(dtype) for loss in net.batch_losses(rng)]
    value = balancer(losses)
    exact = [np.log(loss.item() + 1e-8) for loss in losses]
    # Logs of losses around one cancel, and so may their sum: what is added up counts, not what is left of it.
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(sum(exact), rel=0, abs=1e-6 * sum(1 + abs(z) for z in exact))


def test_parameters_of_16_bits_with_a_float32_ema(backend: str, rng: Rng) -> None:
    net = make_net(torch.bfloat16)
    shared = list(net.encoder.parameters())
    balancer, expected = DBMTL(net.encoder, num_tasks=3, backend=backend), Algorithm1(shared)
    for _ in range(3):
        losses = net.batch_losses(rng)
        shared_grad = expected.step(losses)
        net.zero_grad()
        balancer.backward(losses)
    assert all(p.grad.dtype == torch.bfloat16 for p in shared)
    assert all(ema.dtype == torch.float32 for ema in balancer.ema.values())
    assert relative_error(flat([p.grad for p in shared], shared), shared_grad) < 5 * 2**-7


@pytest.mark.parametrize("scaler", [3.0, "amp", torch.ones(())], ids=str)
def test_a_scaler_must_be_one(rng: Rng, scaler: Any) -> None:
    net = make_net()
    balancer = DBMTL(net.encoder, num_tasks=3, backend="reference")
    message = f"scaler must be a torch.amp.GradScaler or None, got {type(scaler).__name__}"
    with pytest.raises(TypeError, match=message):
        balancer.backward(net.batch_losses(rng), scaler=scaler)
    assert int(balancer.step) == 0
