"""Gradient accumulation: several micro-batches, and tasks that come one by one, make one step."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from op_inputs import DEVICE
from small_models import Algorithm1, Net, flat, grads_of, make_net, relative_error

from dbmtl_fused import DBMTL

Rng = np.random.Generator

ways = pytest.mark.parametrize("drop_in", [False, True], ids=["backward", "drop-in loss"])
PLAIN = {"beta": 0.0, "alpha": None}


def run_backward(balancer: DBMTL, losses: Any, drop_in: bool, **options: Any) -> None:
    if drop_in:
        balancer(losses, **options).backward()
    else:
        balancer.backward(losses, **options)


def make(backend: str, **options: Any) -> tuple[Net, DBMTL]:
    net = make_net()
    return net, DBMTL(net.encoder, num_tasks=3, backend=backend, **options)


def assert_same(net: Net, other: Net) -> None:
    """All gradients, bit for bit."""
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


@ways
@pytest.mark.parametrize("bucket_bytes", [None, 64], ids=["from .grad", "buckets"])
@pytest.mark.parametrize("options", [{}, {"log_losses": False}, PLAIN], ids=["EMA", "no log", "log only"])
def test_a_window_is_a_step_on_the_mean(
    backend: str, rng: Rng, drop_in: bool, bucket_bytes: int | None, options: dict[str, Any]
) -> None:
    """Mean of the gradients of the logs; shared gradients appear with the last micro-batch, one decay a window."""
    M = 3
    net, balancer = make(backend, bucket_bytes=bucket_bytes, **options)
    shared, heads = list(net.encoder.parameters()), list(net.heads.parameters())
    expected = Algorithm1(shared, **options)
    for window in range(1, 5):
        batches = [net.batch_losses(rng) for _ in range(M)]
        shared_grad = expected.step(*batches)
        objective = sum((l if options == {"log_losses": False} else (l + 1e-8).log()) for b in batches for l in b) / M
        head_grad = flat(torch.autograd.grad(objective, heads, retain_graph=True), heads)
        net.zero_grad()
        for number, losses in enumerate(batches, start=1):
            run_backward(balancer, losses, drop_in, accumulation_steps=M)
            if number < M and options != PLAIN:
                assert all(p.grad is None for p in shared)
        assert relative_error(grads_of(shared), shared_grad) < 1e-5
        assert relative_error(grads_of(heads), head_grad) < 1e-5
        assert int(balancer.step) == window


@ways
def test_one_micro_batch_is_no_accumulation(backend: str, rng: Rng, drop_in: bool) -> None:
    (net, balancer), (other, plain) = make(backend), make(backend)
    for _ in range(3):
        x, target = net.batch(rng)
        run_backward(balancer, net.losses(x, target), drop_in, accumulation_steps=1)
        run_backward(plain, other.losses(x, target), drop_in)
    assert_same(net, other)


@ways
@pytest.mark.parametrize("options", [{}, {"beta": 0.0}, PLAIN], ids=["EMA", "beta 0", "log only"])
@pytest.mark.parametrize("M", [1, 2])
def test_tasks_may_come_one_by_one(backend: str, rng: Rng, drop_in: bool, options: dict[str, Any], M: int) -> None:
    """In any order, each with a graph of its own that is freed at once."""
    if options == {"beta": 0.0} and M > 1:
        pytest.skip("there is no buffer to accumulate in")
    (net, balancer), (other, whole) = make(backend, **options), make(backend, **options)
    for _ in range(3):
        net.zero_grad()
        other.zero_grad()
        for _ in range(M):
            x, target = net.batch(rng)
            for task in rng.permutation(3):
                loss = net.losses(x, target)[task]
                run_backward(balancer, {str(task): loss}, drop_in, accumulation_steps=M)
            run_backward(whole, other.losses(x, target), drop_in, accumulation_steps=M)
        for p, q in zip(net.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)
        assert balancer.step == whole.step
    for name, ema in balancer.ema.items():
        torch.testing.assert_close(ema, whole.ema[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("options", [{}, PLAIN], ids=["EMA", "log only"])
def test_flush_ends_a_short_window(backend: str, rng: Rng, options: dict[str, Any]) -> None:
    """As if the missing micro-batches had had no gradient, and then the next window begins."""
    net, balancer = make(backend, **options)
    shared = list(net.encoder.parameters())
    expected = Algorithm1(shared, **options)
    batches = [net.batch_losses(rng) for _ in range(2)]
    nothing = [0.0 * loss for loss in batches[0]]
    shared_grad = expected.step(*batches, nothing)
    for losses in batches:
        balancer.backward(losses, accumulation_steps=3, retain_graph=True)
    balancer.flush()
    assert relative_error(grads_of(shared), shared_grad) < 1e-5
    assert int(balancer.step) == 1
    balancer.flush()
    assert int(balancer.step) == 1, "no window had begun"
    balancer.backward(net.batch_losses(rng), accumulation_steps=1)
    assert int(balancer.step) == 2


def test_flush_leaves_absent_tasks_as_they_are(backend: str, rng: Rng) -> None:
    """A task that had nothing in a window takes no part in its step."""
    net, balancer = make(backend)
    shared = list(net.encoder.parameters())
    expected = Algorithm1(shared)
    losses = net.batch_losses(rng)
    expected.step(losses)
    balancer.backward(losses, retain_graph=True)
    (_, loss, _), nothing = net.batch_losses(rng), 0.0 * losses[1]
    shared_grad = expected.step([None, loss, None], [None, nothing, None])
    balancer.backward({"1": loss}, accumulation_steps=2, retain_graph=True)
    net.zero_grad()
    balancer.flush()
    assert relative_error(grads_of(shared), shared_grad) < 1e-5
    assert balancer.weights[0::2].tolist() == [0, 0]


def test_accumulates_into_grad_or_overwrites_it(backend: str, rng: Rng) -> None:
    (net, balancer), (other, whole) = make(backend), make(backend)
    batches = [net.batch(rng) for _ in range(2)]
    for p in net.encoder.parameters():
        p.grad = torch.ones_like(p)
    for x, target in batches:
        balancer.backward(net.losses(x, target), accumulation_steps=2)
        whole.backward(other.losses(x, target), accumulation_steps=2)
    for p, q in zip(net.encoder.parameters(), other.encoder.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad + 1)
    for x, target in batches:
        balancer.backward(net.losses(x, target), accumulation_steps=2, overwrite=True)
    assert not any((p.grad.abs() > 1e6).any() for p in net.encoder.parameters())


def test_one_bad_micro_batch_spoils_the_window_and_nothing_else(backend: str, rng: Rng) -> None:
    net, balancer = make(backend)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**10)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for bad in (False, True, False):
        optimizer.zero_grad()
        for number in range(3):
            losses = net.batch_losses(rng)
            if bad and number == 1:
                losses[2] = losses[2] * torch.inf
            balancer.backward(losses, accumulation_steps=3, scaler=scaler)
        assert all(p.grad.isnan().all() == bad for p in net.encoder.parameters())
        scaler.step(optimizer)
        scaler.update()
    assert int(balancer.step) == 2
    assert scaler.get_scale() == 2.0**9
    assert all(ema.isfinite().all() for ema in balancer.ema.values())


def test_reset_and_loading_abandon_a_window(backend: str, rng: Rng) -> None:
    net, balancer = make(backend)
    state = balancer.state_dict()
    for abandon in (balancer.reset, lambda: balancer.load_state_dict(state)):
        balancer.backward(net.batch_losses(rng), accumulation_steps=2)
        abandon()
        balancer.flush()
        assert int(balancer.step) == 0
        balancer.backward(net.batch_losses(rng))
        assert int(balancer.step) == 1
        balancer.reset()


ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "other number": (
        {"accumulation_steps": 2},
        "accumulation_steps must stay what the window began with, 3, got 2; flush() ends the window",
    ),
    "none": ({}, "accumulation_steps must stay what the window began with, 3, got None"),
    "zero": ({"accumulation_steps": 0}, "accumulation_steps must be a positive integer or None, got 0"),
    "float": ({"accumulation_steps": 2.0}, "accumulation_steps must be a positive integer or None, got 2.0"),
    "bool": ({"accumulation_steps": True}, "accumulation_steps must be a positive integer or None, got True"),
}


@ways
@pytest.mark.parametrize("error", ERRORS)
def test_errors(rng: Rng, drop_in: bool, error: str) -> None:
    """They come before anything has changed: the window goes on."""
    net, balancer = make("reference")
    balancer.backward(net.batch_losses(rng), accumulation_steps=3)
    before = {name: ema.clone() for name, ema in balancer.ema.items()}
    options, message = ERRORS[error]
    with pytest.raises(ValueError, match=re.escape(message)):
        run_backward(balancer, net.batch_losses(rng), drop_in, **options)
    assert all(torch.equal(ema, before[name]) for name, ema in balancer.ema.items())
    for _ in range(2):
        run_backward(balancer, net.batch_losses(rng), drop_in, accumulation_steps=3)
    assert int(balancer.step) == 1


def test_a_task_that_has_had_its_share(rng: Rng) -> None:
    net, balancer = make("reference")
    balancer.backward({"0": net.batch_losses(rng)[0]}, accumulation_steps=1)
    message = "task '0' has had its 1 of this accumulation window, which waits for ['1', '2']; flush() ends the window"
    with pytest.raises(ValueError, match=re.escape(message)):
        balancer.backward({"0": net.batch_losses(rng)[0]}, accumulation_steps=1)


def test_without_an_ema_there_is_nothing_to_accumulate_in(rng: Rng) -> None:
    net, balancer = make("reference", beta=0.0)
    with pytest.raises(ValueError, match="accumulation_steps must be 1 with beta=0, got 2"):
        balancer.backward(net.batch_losses(rng), accumulation_steps=2)


def test_no_checkpoint_in_the_middle(rng: Rng) -> None:
    net, balancer = make("reference")
    balancer.backward(net.batch_losses(rng), accumulation_steps=2)
    with pytest.raises(RuntimeError, match="in the middle of an accumulation window cannot be saved"):
        balancer.state_dict()
    balancer.flush()
    assert int(balancer.state_dict()["step"]) == 1


def test_a_step_that_fails_at_its_end_is_noticed(rng: Rng, monkeypatch: pytest.MonkeyPatch) -> None:
    """The EMA has advanced and the step has not: nothing goes on until that is mended."""
    net, balancer = make("reference")

    def out_of_memory(wanted: object) -> None:
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(balancer._rows, "finish", out_of_memory)
        with pytest.raises(MemoryError):
            balancer.backward(net.batch_losses(rng))
    assert all(p.grad is None for p in net.encoder.parameters())
    with pytest.raises(
        RuntimeError, match=re.escape("the balancing of its last step failed (MemoryError: no room); call reset")
    ):
        balancer.backward(net.batch_losses(rng))
    balancer.reset()
    balancer.backward(net.batch_losses(rng))
    assert int(balancer.step) == 1
