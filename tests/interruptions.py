"""Exceptions at chosen lines of the package, and tiny models on which a step can be repeated bit for bit."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

import dbmtl_fused
from dbmtl_fused import DBMTL

PACKAGE = str(Path(dbmtl_fused.__file__).parent)
MOST_LINES = 80
"""Lines of one action at which it is interrupted, at most."""

Place = tuple[str, int]


@contextmanager
def tracing(on_line: Callable[[Place], None]) -> Iterator[None]:
    """Call ``on_line`` before each line of the package that runs in this thread."""

    def local(frame: FrameType, event: str, argument: object) -> Any:
        if event == "line":
            on_line((frame.f_code.co_filename, frame.f_lineno))
        return local

    def enter(frame: FrameType, event: str, argument: object) -> Any:
        return local if frame.f_code.co_filename.startswith(PACKAGE) else None

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        yield
    finally:
        sys.settrace(before)


def lines_of(action: Callable[[], object]) -> list[Place]:
    """Return the lines of the package that ``action`` runs, in order."""
    lines: list[Place] = []
    with tracing(lines.append):
        action()
    return lines


def chosen(lines: list[Place]) -> list[int]:
    """Return the first and the last occurrence of each line, evenly thinned out to at most ``MOST_LINES``."""
    first = {place: n for n, place in reversed(list(enumerate(lines)))}
    last = {place: n for n, place in enumerate(lines)}
    both = sorted({*first.values(), *last.values()})
    step = max(1.0, len(both) / MOST_LINES)
    return [both[int(i * step)] for i in range(int(len(both) / step))]


@contextmanager
def interrupted_at(number: int) -> Iterator[None]:
    """Raise KeyboardInterrupt before the line of that number, once."""
    left = number

    def on_line(place: Place) -> None:
        nonlocal left
        left -= 1
        if left == -1:
            raise KeyboardInterrupt

    with tracing(on_line):
        yield


class World:
    """An encoder of two layers, two heads and a balancer, the same each time."""

    def __init__(self, **options: Any) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.encoder = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2))
            self.heads = nn.ModuleList([nn.Linear(2, 1), nn.Linear(2, 1)])
        self.params = list(self.encoder.parameters())
        self.balancer = DBMTL(self.encoder, num_tasks=2, **options)

    def losses(self, seed: int) -> list[Tensor]:
        x = torch.randn(4, 2, generator=torch.Generator().manual_seed(seed))
        features = self.encoder(x)
        return [(10.0**task) * head(features).square().mean() for task, head in enumerate(self.heads)]

    def zero_grad(self) -> None:
        self.encoder.zero_grad()
        self.heads.zero_grad()

    def shared_grads(self) -> list[Tensor | None]:
        return [None if p.grad is None else p.grad.clone() for p in self.params]

    def grads(self) -> list[Tensor | None]:
        return self.shared_grads() + [None if p.grad is None else p.grad.clone() for p in self.heads.parameters()]

    def state(self) -> list[Tensor | None]:
        return [value.clone() for value in self.balancer.ema.values()] + [self.balancer.step]


def same(found: list[Tensor | None], expected: list[Tensor | None]) -> bool:
    """Return whether all tensors are equal, bit for bit."""
    return len(found) == len(expected) and all(
        a is b is None or (a is not None and b is not None and torch.equal(a, b))
        for a, b in zip(found, expected, strict=True)
    )
