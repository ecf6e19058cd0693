"""Benchmark subjects that each live in a process of their own.

What a training step costs depends on the state of malloc's heap: which block lies on top decides whether a freed
gradient goes back to the system, to come again page by page. In one process every subject would run on the heap the
others left; here each has its own, as in training, and they still take turns.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from types import TracebackType
from typing import Any, TypeVar

import torch

T = TypeVar("T")

_NEW = multiprocessing.get_context("spawn")
# A server that imports torch once and never computes: its children start fast, but all with the same heap.
_FORKED = multiprocessing.get_context("forkserver")
_FORKED.set_forkserver_preload(["torch"])

PAUSE = 0.02
"""Seconds between turns of two processes, in which the OpenMP threads of the first stop spinning (5 ms as measured)."""


class Worker:
    """A fresh process that builds a subject and then applies functions to it, one at a time.

    :param threads: What ``torch.set_num_threads`` is given there.
    :param build: Module-level function or class; called there with ``args``.
    :param forked: Save seconds by forking a process that has imported torch, where the heap does not matter.
    """

    def __init__(self, threads: int, build: Callable[..., Any], *args: Any, forked: bool = False) -> None:
        self._pool = ProcessPoolExecutor(max_workers=1, mp_context=_FORKED if forked else _NEW)
        self._built = self._pool.submit(_build, threads, build, args)

    def wait(self) -> None:
        """Until the subject is built."""
        self._built.result()

    def call(self, function: Callable[..., T], *args: Any) -> T:
        """``function(subject, *args)`` in the process; a module-level function, whose exceptions are raised here."""
        self.wait()
        return self._pool.submit(_apply, function, args).result()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)


class Here:
    """The same without a process, for a run that only shows that everything runs."""

    def __init__(self, build: Callable[..., Any], *args: Any) -> None:
        self._subject = build(*args)

    def wait(self) -> None:
        """Nothing to wait for."""

    def call(self, function: Callable[..., T], *args: Any) -> T:
        """``function(subject, *args)``."""
        return function(self._subject, *args)

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *_: object) -> None:
        pass


_subject: Any = None


def _build(threads: int, build: Callable[..., Any], args: tuple[Any, ...]) -> None:
    global _subject
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    _subject = build(*args)


def _end_with_parent() -> None:
    """A run that is killed cannot end its processes, and they hold gigabytes."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _apply(function: Callable[..., T], args: tuple[Any, ...]) -> T:
    return function(_subject, *args)
