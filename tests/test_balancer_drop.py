"""``drop_ema_below``: the buffer goes when its coefficient has become small, at the same step in every run."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from small_models import Algorithm1, Net, grads_of, make_net, relative_error

from dbmtl_fused import DBMTL, schedule
from dbmtl_fused.rows import EmaRows
from dbmtl_fused.schedule import BetaSchedule

Rng = np.random.Generator

LAST = 4  # 0.9 / sqrt(4) = 0.45, 0.9 / sqrt(5) = 0.402
OPTIONS = {"drop_ema_below": 0.42}


def make(backend: str = "reference", **options: Any) -> tuple[Net, DBMTL]:
    net = make_net()
    return net, DBMTL(net.encoder, num_tasks=3, backend=backend, **OPTIONS, **options)


@pytest.mark.parametrize("drop_in", [False, True], ids=["backward", "drop-in loss"])
@pytest.mark.parametrize("alpha", ["max", None])
def test_the_buffer_goes(backend: str, rng: Rng, drop_in: bool, alpha: str | None) -> None:
    """Up to there Algorithm 1, from there on Algorithm 1 with beta 0."""
    net, balancer = make(backend, alpha=alpha)
    shared = list(net.encoder.parameters())
    expected = Algorithm1(shared, alpha=alpha)
    for step in range(1, LAST + 4):
        losses = net.batch_losses(rng)
        if step > LAST:
            expected.beta = 0.0
        shared_grad = expected.step(losses)
        net.zero_grad()
        if drop_in:
            balancer(losses).backward()
        else:
            balancer.backward(losses)
        assert relative_error(grads_of(shared), shared_grad) < 1e-5
        assert bool(balancer.ema) == (step <= LAST)
        assert bool(balancer.state_dict()["ema"]) == (step <= LAST)
        assert int(balancer.step) == step
        assert bool(balancer.grad_norm.isnan()) == bool(balancer.norms.isnan().all()) == (alpha is None and step > LAST)


def test_steps_that_overflow_do_not_count(rng: Rng) -> None:
    """It is k that decides, which the host does not know: it asks when it may be so far."""
    net, balancer = make()
    for number in range(LAST + 2):
        losses = net.batch_losses(rng)
        balancer.backward([losses[0] * (torch.inf if number in (1, 2) else 1), *losses[1:]])
    assert int(balancer.step) == LAST
    assert balancer.ema
    balancer.backward(net.batch_losses(rng))
    assert not balancer.ema


def test_the_host_seldom_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, as a rule; and again as many calls later as steps were skipped."""
    of = BetaSchedule(0.9, 0.5, 0.42)
    asked = []

    class Step(int):
        device = torch.device("cpu")

        def __int__(self) -> int:
            asked.append(self + 0)
            return self + 0

    def begin(step: Step) -> bool:
        over = of.is_over(step)
        of.count(step)
        return over

    taken = [0, 1, 1, 1, 2, 3, 4]  # before each call; two steps were skipped
    assert [begin(Step(k)) for k in taken] == [False] * 6 + [True]
    assert asked == [2, 4]


def test_a_captured_graph_keeps_its_buffer(rng: Rng, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it is captured the device cannot be asked, and the host's count alone must not decide."""
    net, balancer = make()
    for _ in range(LAST):
        balancer.backward(net.batch_losses(rng))
    with monkeypatch.context() as patch:
        patch.setattr(schedule, "_is_capturing", lambda device: True)
        balancer.backward(net.batch_losses(rng))
    assert balancer.ema
    balancer.backward(net.batch_losses(rng))
    assert not balancer.ema


def test_resuming_on_either_side(rng: Rng) -> None:
    """A run that is stopped and resumed, before or after, drops at the same step and gives the same bits."""
    batches = [make_net().batch(rng) for _ in range(LAST + 3)]
    for stop in (LAST - 1, LAST, LAST + 1):
        (net, whole), (other, first) = make(), make()
        for number, (x, target) in enumerate(batches):
            net.zero_grad()
            whole.backward(net.losses(x, target))
            if number == stop:
                state = first.state_dict()
                _, first = other, DBMTL(other.encoder, num_tasks=3, backend="reference", **OPTIONS)
                first.load_state_dict(state)
            other.zero_grad()
            first.backward(other.losses(x, target))
            for p, q in zip(net.parameters(), other.parameters(), strict=True):
                assert torch.equal(p.grad, q.grad)


def test_an_early_checkpoint_brings_the_buffer_back(rng: Rng) -> None:
    net, balancer = make()
    balancer.backward(net.batch_losses(rng))
    early = {**balancer.state_dict(), "ema": {name: ema.clone() for name, ema in balancer.ema.items()}}
    for _ in range(LAST + 1):
        balancer.backward(net.batch_losses(rng))
    assert not balancer.ema
    balancer.load_state_dict(early)
    assert all(torch.equal(ema, early["ema"][name]) for name, ema in balancer.ema.items())
    balancer.reset()
    assert isinstance(balancer._rows, EmaRows)
    assert not any(ema.any() for ema in balancer.ema.values())


def test_a_checkpoint_without_buffer_is_only_for_who_has_none(rng: Rng) -> None:
    net, balancer = make()
    for _ in range(LAST + 1):
        balancer.backward(net.batch_losses(rng))
    keeps = DBMTL(net.encoder, num_tasks=3, backend="reference")
    with pytest.raises(ValueError, match="state_dict does not fit the shared parameters: missing '0"):
        keeps.load_state_dict(balancer.state_dict())


@pytest.mark.parametrize(
    ("beta", "sigma", "below"), [(0.9, 0.5, 0.42), (0.9, 0.5, 0.45), (0.9, 1.0, 0.1), (0.5, 2.0, 1e-5), (0.7, 0.3, 0.7)]
)
def test_the_last_step(beta: float, sigma: float, below: float) -> None:
    of = BetaSchedule(beta, sigma, below)
    last = next(k for k in range(1, 10_000) if beta / (k + 1) ** sigma < below)
    assert not of.has_ended(last - 1)
    assert of.has_ended(last)


def test_never(rng: Rng) -> None:
    assert not BetaSchedule(0.9, 0.5, None).ends
    assert not BetaSchedule(0.9, 0.001, 1e-3).has_ended(10**9)  # in 10**2954 steps
    assert not BetaSchedule(0.9, 0.05, 0.4).has_ended(10**6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drop_ema_below": 0.95}, "drop_ema_below must be at most beta=0.9, with a beta_sigma above 0 so that"),
        ({"drop_ema_below": 0.1, "beta_sigma": 0.0}, "coefficient falls, got 0.1 and beta_sigma=0"),
        ({"drop_ema_below": 0.1, "beta": 0.0}, "drop_ema_below must be at most beta=0,"),
        ({"drop_ema_below": 0.0}, "drop_ema_below must be > 0, got 0.0"),
    ],
)
def test_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        DBMTL(make_net().encoder, num_tasks=3, **options)


def test_no_windows_that_would_lose_their_buffer(rng: Rng) -> None:
    """Refused at once, not in the middle of a training."""
    net, balancer = make()
    with pytest.raises(ValueError, match="accumulation_steps must be 1 with drop_ema_below, got 2"):
        balancer.backward(net.batch_losses(rng), accumulation_steps=2)
    balancer.backward(net.batch_losses(rng), accumulation_steps=1)
    assert int(balancer.step) == 1
