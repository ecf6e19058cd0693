"""Others at work on the shared parameters while a step runs: threads, hooks and calls of the same balancer."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from interruptions import World, same
from torch import Tensor

Action = Callable[[World], object]


def during_a_step(world: World, work: Callable[[], object], *, times: int = 1) -> None:
    """Run ``work`` within the first backward pass of a step, after the gradient of the last layer has come."""
    left = times
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(1))
    between = world.encoder[1](world.encoder[0](x))

    def hook(grad: Tensor) -> None:
        nonlocal left
        left -= 1
        if left >= 0:
            with torch.enable_grad():
                work()

    between.register_hook(hook)
    features = world.encoder[2](between)
    world.balancer.backward([(10.0**t) * head(features).square().mean() for t, head in enumerate(world.heads)])


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("bucket_bytes", [None, 8, "auto"])
def test_a_backward_of_another_thread_during_a_step_lands_in_grad(
    bucket_bytes: int | str | None, existing: bool
) -> None:
    world, undisturbed, other = (World(bucket_bytes=bucket_bytes) for _ in range(3))
    sum(other.losses(2)).backward()  # type: ignore[union-attr]
    for each in (world, undisturbed):
        if existing:
            for p in each.params:
                p.grad = torch.full_like(p, 2)

    def in_another_thread() -> None:
        thread = threading.Thread(target=lambda: sum(world.losses(2)).backward())  # type: ignore[union-attr]
        thread.start()
        thread.join()

    during_a_step(world, in_another_thread)
    during_a_step(undisturbed, lambda: None)
    assert same(world.state(), undisturbed.state()), "the other thread's gradient is in the EMA"
    for found, stepped, ordinary in zip(
        world.shared_grads(), undisturbed.shared_grads(), other.shared_grads(), strict=True
    ):
        assert found is not None
        assert stepped is not None
        torch.testing.assert_close(found, stepped + ordinary)


@pytest.mark.parametrize(
    "call",
    [
        lambda world: world.balancer.backward(world.losses(2)),
        lambda world: world.balancer(world.losses(2)),
        lambda world: world.balancer(world.losses(2)).backward(),
    ],
    ids=["backward", "drop-in loss", "drop-in backward"],
)
@pytest.mark.parametrize("threaded", [False, True])
def test_a_second_call_during_a_step_raises(call: Action, threaded: bool) -> None:
    world, undisturbed, errors = World(), World(), []

    def try_it() -> None:
        try:
            call(world)
        except RuntimeError as error:
            errors.append(str(error))

    def in_another_thread() -> None:
        thread = threading.Thread(target=try_it)
        thread.start()
        thread.join()

    during_a_step(world, in_another_thread if threaded else try_it)
    during_a_step(undisturbed, lambda: None)
    assert len(errors) == 1
    assert "a step of this balancer is running" in errors[0]
    assert same(world.grads() + world.state(), undisturbed.grads() + undisturbed.state())


@pytest.mark.parametrize("call", ["flush", "reset", "load_state_dict", "state_dict", "hold"])
def test_a_changing_call_during_a_step_raises_or_takes_effect(call: str) -> None:
    world = World()
    state = World().balancer.state_dict()
    arguments = [state] if call == "load_state_dict" else []

    def use() -> None:
        found = getattr(world.balancer, call)(*arguments)
        if call == "hold":
            with found:
                pass

    error = None
    try:
        during_a_step(world, use)
    except RuntimeError as raised:
        error = str(raised)
    new = World()
    for each in (world, new):
        each.zero_grad()
        sum(each.losses(5)).backward()  # type: ignore[union-attr]
    assert same(world.grads(), new.grads())
    if error is None and call not in ("reset", "load_state_dict"):
        undisturbed = World()
        during_a_step(undisturbed, lambda: None)
        assert same(world.state(), undisturbed.state())
    world.balancer.reset()
    for each in (world, new):
        each.zero_grad()
        each.balancer.backward(each.losses(6))
    assert same(world.grads() + world.state(), new.grads() + new.state())
