"""Tasks that come and go, and what users say of single tasks: preferences, a reset."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from op_inputs import ALPHA_MODES, DEVICE
from small_models import Algorithm1, Net, flat, grads_of, make_net, relative_error
from torch import Tensor

from dbmtl_fused import DBMTL

Rng = np.random.Generator

NAMES = ["a", "b", "c"]
PLAIN = {"beta": 0.0, "alpha": None}
OPTIONS = {"EMA": {}, "beta 0": {"beta": 0.0}, "log only": PLAIN, "no log": {"log_losses": False}}

ways = pytest.mark.parametrize("drop_in", [False, True], ids=["backward", "drop-in loss"])
captures = pytest.mark.parametrize("bucket_bytes", [None, 64], ids=["from .grad", "buckets"])
all_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def run_backward(balancer: DBMTL, losses: Any, drop_in: bool, **options: Any) -> None:
    if drop_in:
        balancer(losses, **options).backward(retain_graph=True)
    else:
        balancer.backward(losses, retain_graph=True, **options)


def make(backend: str, **options: Any) -> tuple[Net, DBMTL]:
    net = make_net()
    return net, DBMTL(net.encoder, task_names=NAMES, backend=backend, **options)


def as_none(losses: list[Tensor], there: list[bool]) -> Any:
    return [loss if here else None for loss, here in zip(losses, there, strict=True)]


def as_missing_keys(losses: list[Tensor], there: list[bool]) -> Any:
    return {name: loss for name, loss, here in zip(NAMES, losses, there, strict=True) if here}


def head_grads(net: Net, losses: list[Tensor | None], log_losses: bool = True) -> np.ndarray[Any, Any]:
    present = [loss for loss in losses if loss is not None]
    objective = sum((loss + 1e-8).log() if log_losses else loss for loss in present)
    heads = list(net.heads.parameters())
    return flat(torch.autograd.grad(objective, heads, retain_graph=True, allow_unused=True), heads)


@ways
@captures
@all_options
@pytest.mark.parametrize("style", [as_none, as_missing_keys, "active"], ids=["None", "missing key", "mask"])
def test_tasks_come_and_go(
    backend: str, rng: Rng, drop_in: bool, bucket_bytes: int | None, options: dict[str, Any], style: Any
) -> None:
    """The row of a task that is not there stays bit for bit, it has a weight of 0 and does not count for alpha; every
    other step is Algorithm 1 on the others. A mask on the device says the same as None."""
    net, balancer = make(backend, bucket_bytes=bucket_bytes, **options)
    shared = list(net.encoder.parameters())
    expected = Algorithm1(shared, **options)
    for step in range(1, 7):
        there = [True, True, True] if step == 1 else (rng.random(3) < 0.5).tolist()
        there[step % 3] = True
        losses = net.batch_losses(rng)
        present = as_none(losses, there)
        before = {name: ema.clone() for name, ema in balancer.ema.items()}
        shared_grad = expected.step(present)
        heads = head_grads(net, present, options.get("log_losses", True))
        net.zero_grad()
        if style == "active":
            if options != PLAIN:  # as the mean over no label is, and its derivative
                losses = [l if here else l * torch.nan for l, here in zip(losses, there, strict=True)]
            run_backward(balancer, losses, drop_in, active=torch.tensor(there, device=DEVICE))
        else:
            run_backward(balancer, style(losses, there), drop_in)
        absent = [task for task in range(3) if not there[task]]
        assert relative_error(grads_of(shared), shared_grad) < 1e-5
        for name, ema in balancer.ema.items():
            assert torch.equal(ema[absent], before[name][absent])
        assert not balancer.weights[absent].any()
        assert int(balancer.step) == step
        if style != "active":
            assert relative_error(grads_of(list(net.heads.parameters())), heads) < 1e-5
        if options == {} and balancer.norms.isfinite().all():
            np.testing.assert_allclose(balancer.norms.cpu(), np.float64(expected.balanced.norms), rtol=1e-5)


@ways
@all_options
def test_value_is_of_the_tasks_that_are_there(backend: str, rng: Rng, drop_in: bool, options: dict[str, Any]) -> None:
    net, balancer = make(backend, **options)
    losses = net.batch_losses(rng)
    with torch.set_grad_enabled(drop_in):
        expected = balancer({"a": losses[0], "c": losses[2]})
        masked = balancer(
            [losses[0], losses[1] * torch.nan, losses[2]], active=torch.tensor([True, False, True]).to(DEVICE)
        )
    assert torch.equal(expected, masked)


@ways
@all_options
def test_heads_of_masked_tasks_get_zeros(backend: str, rng: Rng, drop_in: bool, options: dict[str, Any]) -> None:
    """As long as their losses have a derivative."""
    net, balancer = make(backend, **options)
    run_backward(balancer, net.batch_losses(rng), drop_in, active=torch.tensor([True, False, True], device=DEVICE))
    assert not net.heads[1].weight.grad.any()
    assert net.heads[0].weight.grad.any()


@all_options
def test_nobody_there_on_the_device(backend: str, rng: Rng, options: dict[str, Any]) -> None:
    """Nothing moves: gradients of zero, neither NaN nor what was there before."""
    net, balancer = make(backend, **options)
    balancer.backward(net.batch_losses(rng))
    before = {name: ema.clone() for name, ema in balancer.ema.items()}
    net.zero_grad()
    balancer.backward(net.batch_losses(rng), active=torch.zeros(3, dtype=torch.bool, device=DEVICE))
    assert not any(p.grad.any() for p in net.parameters())
    assert all(torch.equal(ema, before[name]) for name, ema in balancer.ema.items())


def test_absent_tasks_are_measured_after_loading(backend: str, rng: Rng) -> None:
    """A row that the next step does not touch has the norm it had before the checkpoint."""
    net, balancer = make(backend)
    resumed = DBMTL(net.encoder, task_names=NAMES, backend=backend)
    balancer.backward(net.batch_losses(rng))
    resumed.load_state_dict(balancer.state_dict())
    for each in (balancer, resumed):
        net.zero_grad()
        each.backward([None, *net.batch_losses(np.random.default_rng(0))[1:]])
    assert torch.equal(balancer.norms, resumed.norms)
    assert balancer.norms[0] > 0
    assert torch.equal(balancer.weights, resumed.weights)


@ways
@pytest.mark.parametrize("alpha", [*ALPHA_MODES[:4], 2.5, None])
@pytest.mark.parametrize("beta", [0.9, 0.0])
def test_preference(backend: str, rng: Rng, drop_in: bool, alpha: Any, beta: float) -> None:
    """A factor on the weights after normalisation, and none on the heads' gradients."""
    preference = [1.0, 0.25, 3.0]
    net, balancer = make(backend, alpha=alpha, beta=beta, preference=preference)
    shared = list(net.encoder.parameters())
    expected = Algorithm1(shared, alpha=alpha, beta=beta, preference=preference)
    for present in (lambda l: l, lambda l: [l[0], None, l[2]], lambda l: l):
        losses = present(net.batch_losses(rng))
        shared_grad, heads = expected.step(losses), head_grads(net, losses)
        net.zero_grad()
        run_backward(balancer, losses, drop_in)
        assert relative_error(grads_of(shared), shared_grad) < 1e-5
        assert relative_error(grads_of(list(net.heads.parameters())), heads) < 1e-5
        np.testing.assert_allclose(balancer.weights.cpu(), np.float64(expected.balanced.weights), rtol=1e-5)


def test_preference_by_name_and_in_place(backend: str, rng: Rng) -> None:
    net, balancer = make(backend, preference={"b": 2.0, "a": 1, "c": 0})
    assert balancer.preference.tolist() == [1, 2, 0]
    balancer.backward(net.batch_losses(rng))
    assert balancer.weights[2] == 0
    assert balancer.alpha_value == balancer.norms[:2].max()
    balancer.preference[2] = 4
    balancer.backward(net.batch_losses(rng))
    assert balancer.alpha_value == balancer.norms.max()
    assert balancer.weights[2] > 0


def test_min_looks_past_tasks_without_gradient(backend: str, rng: Rng) -> None:
    net, balancer = make(backend, alpha="min", log_losses=False)
    losses = net.batch_losses(rng)
    balancer.backward([losses[0], 0.0 * losses[1], losses[2]])
    assert balancer.norms[1] == 0
    assert balancer.alpha_value == balancer.norms[0::2].min() > 0


def test_reset_of_one_task(backend: str, rng: Rng) -> None:
    """As if it had had no gradient so far; the others and ``k`` go on."""
    net, balancer = make(backend)
    balancer.backward(net.batch_losses(rng))
    before = {name: ema.clone() for name, ema in balancer.ema.items()}
    balancer.reset("b")
    for name, ema in balancer.ema.items():
        assert not ema[1].any()
        assert torch.equal(ema[0::2], before[name][0::2])
    assert int(balancer.step) == 1
    balancer.backward([net.batch_losses(rng)[0], None, None])
    assert balancer.norms[1] == 0


ERRORS: dict[str, tuple[Callable[[DBMTL, list[Tensor]], object], type[Exception], str]] = {
    "nobody": (
        lambda balancer, losses: balancer.backward([None, None, None]),
        ValueError,
        "losses must hold the loss of at least one task, got none",
    ),
    "nobody by name": (
        lambda balancer, losses: balancer.backward({}),
        ValueError,
        "losses must hold the loss of at least one task, got none",
    ),
    "unknown name": (
        lambda balancer, losses: balancer.backward({"a": losses[0], "z": losses[1]}),
        ValueError,
        "losses must have keys out of ['a', 'b', 'c'], unknown ['z']",
    ),
    "too few": (
        lambda balancer, losses: balancer.backward(losses[:2]),
        ValueError,
        "losses must hold one loss per task, 3 (a, b, c), got 2; None stands for a task that is not there",
    ),
    "mask of another shape": (
        lambda balancer, losses: balancer.backward(losses, active=torch.ones(2, dtype=torch.bool, device=DEVICE)),
        ValueError,
        f"active must be bool, of shape (3,), on {torch.zeros(1, device=DEVICE).device}, got torch.bool, (2,), on ",
    ),
    "mask of another dtype": (
        lambda balancer, losses: balancer(losses, active=torch.ones(3, device=DEVICE)),
        ValueError,
        f"active must be bool, of shape (3,), on {torch.zeros(1, device=DEVICE).device}, got torch.float32, (3,), on ",
    ),
    "mask that is none": (
        lambda balancer, losses: balancer.backward(losses, active=[True, False, True]),
        TypeError,
        "active must be a tensor or None, got list",
    ),
    "mask in a window": (
        lambda balancer, losses: balancer.backward(
            losses, active=torch.ones(3, dtype=torch.bool, device=DEVICE), accumulation_steps=2
        ),
        ValueError,
        "active must be None with accumulation_steps: within a window, give the losses of the tasks that are there",
    ),
    "reset of nobody": (
        lambda balancer, losses: balancer.reset("z"),
        ValueError,
        "task must be one of ['a', 'b', 'c'], got 'z'",
    ),
}


@pytest.mark.parametrize("error", ERRORS)
def test_errors(rng: Rng, error: str) -> None:
    """Nothing has changed: the next step is as if nobody had tried."""
    net, balancer = make("reference")
    other = DBMTL(net.encoder, task_names=NAMES, backend="reference")
    run, kind, message = ERRORS[error]
    losses = net.batch_losses(rng)
    with pytest.raises(kind, match=re.escape(message)):
        run(balancer, losses)
    for each in (balancer, other):
        each.backward(losses, retain_graph=True)
    assert int(balancer.step) == 1
    assert all(torch.equal(ema, other.ema[name]) for name, ema in balancer.ema.items())


def test_reset_of_one_task_in_a_window(rng: Rng) -> None:
    net, balancer = make("reference")
    balancer.backward(net.batch_losses(rng), accumulation_steps=2)
    with pytest.raises(RuntimeError, match="one task cannot be reset in the middle of an accumulation window; flush"):
        balancer.reset("a")


@pytest.mark.parametrize(
    ("preference", "kind", "message"),
    [
        ([1.0, 2.0], ValueError, "preference must hold one number per task, 3, got 2"),
        ({"a": 1.0}, ValueError, "preference must have the keys ['a', 'b', 'c'], got ['a']"),
        ([1.0, -1.0, 0.0], ValueError, "preference of task 'b' must be >= 0, got -1.0"),
        ([1.0, 1.0, float("nan")], ValueError, "preference of task 'c' must be >= 0, got nan"),
        ([1.0, "2", 1.0], TypeError, "preference of task 'b' must be a number, got str"),
        ([0.0, 0.0, 0.0], ValueError, "preference must be above 0 for at least one task, got 0 for all"),
    ],
)
def test_preference_errors(preference: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=re.escape(message)):
        make("reference", preference=preference)
