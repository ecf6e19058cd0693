"""An exception at any line of the package leaves ordinary training as it was, and a balancer that works or asks for a
reset."""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dbmtl_fused
from dbmtl_fused import DBMTL

PACKAGE = str(Path(dbmtl_fused.__file__).parent)
STRIDE = 40  # of the lines that are interrupted in one run; the first one is random


class Interrupted(BaseException):
    """Stands for KeyboardInterrupt."""


class Small:
    """An encoder, heads and a balancer; ``.grad`` of the encoder holds ones if ``kept``."""

    def __init__(self, kept: bool, **options: Any) -> None:
        self.kept, self.options = kept, options
        torch.manual_seed(0)
        self.encoder, self.heads = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2)), nn.Linear(2, 2)
        self.balancer = DBMTL(self.encoder, num_tasks=2, **options)
        self.balancer.backward(self.losses(1))
        self.zero_grad()
        for p in self.encoder.parameters() if kept else ():
            p.grad = torch.ones_like(p)

    def as_built(self) -> Small:
        return Small(self.kept, **self.options)

    def losses(self, seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        return list(self.heads(self.encoder(torch.randn(4, 2))).square().mean(0))

    def zero_grad(self) -> None:
        self.encoder.zero_grad()
        self.heads.zero_grad()

    def grads(self) -> list[Tensor | None]:
        return [None if p.grad is None else p.grad.clone() for p in self.encoder.parameters()]

    def step(self, seed: int) -> list[Tensor | None]:
        self.zero_grad()
        self.balancer.backward(self.losses(seed))
        return self.grads()


@contextmanager
def interrupted_at(line: int) -> Iterator[list[int]]:
    """Raise at the ``line``-th line of the package that runs; yields the number of lines seen."""
    seen = [0]

    def local(frame: FrameType, event: str, argument: object) -> Any:
        if event == "line":
            seen[0] += 1
            if seen[0] == line:
                sys.settrace(None)
                raise Interrupted
        return local

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        return local if frame.f_code.co_filename.startswith(PACKAGE) else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield seen
    finally:
        sys.settrace(before)


def same(a: list[Tensor | None], b: list[Tensor | None]) -> bool:
    return all(
        (x is None and y is None) or (x is not None and y is not None and torch.equal(x, y))
        for x, y in zip(a, b, strict=True)
    )


def assert_all_is_well(net: Small, before: list[Tensor | None], undisturbed: Callable[[], Small]) -> None:
    """``.grad`` was left alone or written whole; ordinary passes are ordinary; the balancer works or says reset()."""
    done = undisturbed()
    assert same(net.grads(), before) or same(net.grads(), done.grads()), "shared .grad is lost, or written by half"
    net.zero_grad()
    sum(net.losses(5)).backward()
    expected = torch.autograd.grad(sum(net.losses(5)), list(net.encoder.parameters()))
    assert same(net.grads(), list(expected)), "an ordinary backward pass is not ordinary"
    if net.balancer._failure or net.balancer._is_running:
        with pytest.raises(RuntimeError, match=re.escape("reset()")):
            net.step(7)
    elif net.balancer._window is None:  # else the first micro-batch is whole, and the second has not been
        found = net.step(7)
        assert any(same(found, other.step(7)) for other in (undisturbed(), net.as_built())), "neither before nor after"
    net.balancer.reset()
    found = net.step(9)
    net.balancer = DBMTL(net.encoder, num_tasks=2, **net.options)
    assert same(found, net.step(9)), "reset() does not give a new balancer"


ACTIONS: dict[str, tuple[dict[str, Any], Callable[[Small], object]]] = {
    "backward": ({}, lambda net: net.balancer.backward(net.losses(2))),
    "backward, buckets": ({"bucket_bytes": 1}, lambda net: net.balancer.backward(net.losses(2))),
    "backward, whole tasks": ({"bucket_bytes": None}, lambda net: net.balancer.backward(net.losses(2))),
    "overwrite": ({}, lambda net: net.balancer.backward(net.losses(2), overwrite=True)),
    "drop-in loss": ({}, lambda net: net.balancer(net.losses(2)).backward()),
    "beta 0": ({"beta": 0.0}, lambda net: net.balancer.backward(net.losses(2))),
    "log only": ({"beta": 0.0, "alpha": None}, lambda net: net.balancer.backward(net.losses(2), overwrite=True)),
    "state": ({}, lambda net: net.balancer.load_state_dict(copy.deepcopy(net.balancer.state_dict()))),
    "reset": ({}, lambda net: net.balancer.reset()),
    "two micro-batches": (
        {},
        lambda net: [net.balancer.backward(net.losses(s), accumulation_steps=2) for s in (2, 3)],
    ),
    "flush": ({}, lambda net: [net.balancer.backward(net.losses(2), accumulation_steps=2), net.balancer.flush()]),
}


@pytest.mark.parametrize("kept", [False, True], ids=["no .grad", ".grad"])
@pytest.mark.parametrize(("options", "action"), ACTIONS.values(), ids=ACTIONS)
def test_at_every_line(
    options: dict[str, Any], action: Callable[[Small], object], kept: bool, rng: np.random.Generator
) -> None:
    def undisturbed() -> Small:
        net = Small(kept, **options)
        action(net)
        return net

    net = Small(kept, **options)
    with interrupted_at(-1) as lines:
        action(net)
    total = lines[0]
    assert total > 20
    for line in range(1 + int(rng.integers(STRIDE)), total + 1, STRIDE):
        net = Small(kept, **options)
        before = net.grads()
        with pytest.raises(Interrupted), interrupted_at(line):
            action(net)
        assert_all_is_well(net, before, undisturbed)
