"""An exception at any line of the package: ordinary training goes on, and the balancer works or asks for a reset."""

from __future__ import annotations

import functools
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from interruptions import World, chosen, interrupted_at, lines_of, same
from torch import Tensor

from dbmtl_fused import DBMTL

Rng = np.random.Generator
Action = Callable[[World], object]


def accumulate(world: World, seed: int) -> None:
    world.balancer.backward(world.losses(seed), accumulation_steps=2)


def with_existing_grads(world: World) -> None:
    for p in world.encoder.parameters():
        p.grad = torch.full_like(p, 2)


def with_some_grads(world: World) -> None:
    world.params[0].grad = torch.full_like(world.params[0], 2)


def take_one(world: World) -> None:
    world.balancer.backward(world.losses(0))
    world.zero_grad()


def drop_in(world: World) -> None:
    world.balancer(world.losses(1)).backward()


def autograd_grad(world: World) -> None:
    torch.autograd.grad(world.balancer(world.losses(1)), world.params)


def held(world: World) -> None:
    with world.balancer.hold():
        world.balancer.backward(world.losses(1))


def backward(world: World) -> None:
    world.balancer.backward(world.losses(1))


def replace(world: World) -> None:
    world.balancer.backward(world.losses(1), overwrite=True)


def load(world: World) -> None:
    world.balancer.load_state_dict(saved_state())


@functools.cache
def saved_state() -> dict[str, Any]:
    source = World()
    source.balancer.backward(source.losses(9))
    return source.balancer.state_dict()


def flush(world: World) -> None:
    world.balancer.flush()


def nothing(world: World) -> None:
    """Change nothing."""


PLAIN: dict[str, Any] = {"beta": 0.0, "alpha": None}
CASES: dict[str, tuple[dict[str, Any], Action, Action, Action]] = {
    # options, before, interrupted, calls afterwards
    "backward": ({}, take_one, backward, backward),
    "first backward": ({}, nothing, backward, backward),
    "one bucket": ({"bucket_bytes": None}, take_one, backward, backward),
    "small buckets": ({"bucket_bytes": 8}, take_one, backward, backward),
    "existing .grad": ({}, with_existing_grads, backward, backward),
    "existing .grad, one bucket": ({"bucket_bytes": None}, with_existing_grads, backward, backward),
    "some existing .grad": ({}, with_some_grads, backward, backward),
    "overwrite": ({}, with_existing_grads, replace, backward),
    "bfloat16": ({"state_dtype": torch.bfloat16}, take_one, backward, backward),
    "without EMA": ({"beta": 0.0}, take_one, backward, backward),
    "without EMA, existing .grad": ({"beta": 0.0}, with_existing_grads, backward, backward),
    "window begins": ({}, take_one, lambda w: accumulate(w, 1), lambda w: [accumulate(w, 2), accumulate(w, 3)]),
    "window ends": (
        {},
        lambda w: accumulate(w, 0),
        lambda w: accumulate(w, 1),
        lambda w: [accumulate(w, 2), accumulate(w, 3)],
    ),
    "window ends, small buckets": (
        {"bucket_bytes": 8},
        lambda w: accumulate(w, 0),
        lambda w: accumulate(w, 1),
        lambda w: [accumulate(w, 2), accumulate(w, 3)],
    ),
    "flush": ({}, lambda w: accumulate(w, 0), flush, lambda w: [flush(w), backward(w)]),
    "drop-in loss": ({}, take_one, drop_in, drop_in),
    "drop-in loss, existing .grad": ({}, with_existing_grads, drop_in, drop_in),
    "drop-in loss, autograd.grad": ({}, take_one, autograd_grad, drop_in),
    "plain": (PLAIN, take_one, backward, backward),
    "plain, overwrite": (PLAIN, with_existing_grads, replace, backward),
    "plain window": (
        PLAIN,
        lambda w: accumulate(w, 0),
        lambda w: accumulate(w, 1),
        lambda w: [accumulate(w, 2), accumulate(w, 3)],
    ),
    "plain drop-in loss": (PLAIN, take_one, drop_in, drop_in),
    "EMA dropped": ({"beta": 0.5, "beta_sigma": 1.0, "drop_ema_below": 0.3}, take_one, backward, backward),
    "reset": ({}, take_one, lambda w: w.balancer.reset(), backward),
    "load_state_dict": ({}, take_one, load, backward),
    "hold": ({}, take_one, held, backward),
}


def prepared(options: dict[str, Any], before: Action) -> World:
    world = World(**options)
    before(world)
    return world


def outcome(world: World, afterwards: Action) -> list[Tensor | None]:
    """Return gradients and state after further calls from empty ``.grad``."""
    world.zero_grad()
    afterwards(world)
    return world.grads() + world.state()


def ordinary_grads(world: World) -> list[Tensor | None]:
    world.zero_grad()
    sum(world.losses(5)).backward()  # type: ignore[union-attr]
    return world.grads()


@functools.cache
def as_new(case: str) -> list[list[Tensor | None]]:
    """Return the gradients of an ordinary backward and the outcomes of two steps, all of a new balancer."""
    new = World(**CASES[case][0])
    return [ordinary_grads(new), *(outcome(new, step) for step in TWO_STEPS)]


TWO_STEPS: list[Action] = [lambda w: w.balancer.backward(w.losses(6)), lambda w: w.balancer.backward(w.losses(7))]


def assert_as_new(world: World, case: str) -> None:
    """After a reset, steps are those of a new balancer."""
    world.balancer.reset()
    for step, expected in zip(TWO_STEPS, as_new(case)[1:], strict=True):
        assert same(outcome(world, step), expected), "a reset balancer is not as new"


def assert_recovers(world: World, case: str, allowed: list[list[Tensor | None]]) -> None:
    assert same(ordinary_grads(world), as_new(case)[0]), "an ordinary backward is disturbed"
    try:
        found = outcome(world, CASES[case][3])
    except RuntimeError as error:
        assert "reset()" in str(error)  # noqa: PT017
    else:
        assert any(same(found, expected) for expected in allowed), "goes on, with another result"
    assert_as_new(world, case)


class Faults(NamedTuple):
    """Faults after interrupts, each with the line it was interrupted at."""

    of_errors: list[str]
    of_grads: list[str]
    of_balancer: list[str]


@functools.cache
def faults_of(case: str) -> Faults:
    """Interrupt the action of a case at one line after the other."""
    options, before, action, afterwards = CASES[case]
    saved_state()
    world = prepared(options, before)
    lines = lines_of(lambda: action(world))
    undisturbed = prepared(options, before)
    untouched = undisturbed.shared_grads()
    action(undisturbed)
    full = undisturbed.shared_grads()
    allowed = [outcome(prepared(options, before), afterwards), outcome(undisturbed, afterwards)]
    faults = Faults([], [], [])
    for number in chosen(lines):
        world, where = prepared(options, before), f"{Path(lines[number][0]).name}:{lines[number][1]} (event {number})"
        error: BaseException | None = None
        try:
            with interrupted_at(number):
                action(world)
        except BaseException as raised:
            error = raised
        if not isinstance(error, KeyboardInterrupt):
            faults.of_errors.append(f"{where}: {error!r} instead of the interrupt")
        grads = world.shared_grads()
        if not (same(grads, untouched) or same(grads, full)):
            faults.of_grads.append(f"{where}: existing .grad is lost or half")
        try:
            assert_recovers(world, case, allowed)
        except (AssertionError, RuntimeError, ValueError) as raised:
            faults.of_balancer.append(f"{where}: {type(raised).__name__}: {str(raised).splitlines()[0]}")
    return faults


@pytest.mark.parametrize("case", CASES)
def test_an_interrupt_at_any_line_comes_out_as_it_is(case: str) -> None:
    faults = faults_of(case).of_errors
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    "case", [case for case in CASES if case not in ("plain", "plain window", "plain drop-in loss")]
)
def test_an_interrupt_at_any_line_leaves_grad_untouched_or_whole(case: str) -> None:
    """Exempt are ordinary backward passes, which an exception in a hook leaves half done."""
    faults = faults_of(case).of_grads
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("case", CASES)
def test_after_an_interrupt_at_any_line_the_balancer_works_or_asks_for_a_reset(case: str) -> None:
    faults = faults_of(case).of_balancer
    assert not faults, "\n".join(faults)


def test_an_interrupted_construction_leaves_nothing_behind() -> None:
    def build(world: World) -> DBMTL:
        return DBMTL(world.encoder, num_tasks=2, preference=[1.0, 2.0])

    new = World()
    lines = lines_of(lambda: build(new))
    for number in chosen(lines):
        world = World()
        with_existing_grads(world)
        with pytest.raises(KeyboardInterrupt), interrupted_at(number):
            build(world)
        assert all(torch.equal(p.grad, torch.full_like(p, 2)) for p in world.params if p.grad is not None)
        assert all(p.grad is not None and p.requires_grad for p in world.params)
        assert_recovers(world, "backward", [outcome(World(), backward)])


@pytest.mark.parametrize("case", ["one bucket", "small buckets"])
def test_alarms_at_random_times_leave_nothing_behind(case: str, rng: Rng) -> None:
    options = CASES[case][0]

    def alarm(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    allowed = [
        outcome(prepared(options, take_one), steps)
        for steps in (backward, lambda w: [backward(w), w.zero_grad(), backward(w)])
    ]
    before, hits = signal.signal(signal.SIGALRM, alarm), 0
    try:
        start = time.perf_counter()
        backward(prepared(options, take_one))
        longest = time.perf_counter() - start
        for _ in range(30):
            world = prepared(options, take_one)
            losses = world.losses(1)
            try:
                signal.setitimer(signal.ITIMER_REAL, float(rng.uniform(1e-5, longest)))
                world.balancer.backward(losses)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                hits += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            assert_recovers(world, case, allowed)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert hits, "no alarm came within a step"
