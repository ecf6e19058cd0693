"""Benchmark subjects that each live in a process of their own.

What a training step costs depends on the state of malloc's heap: which block lies on top decides whether a freed
gradient goes back to the system, to come again page by page. In one process every subject would run on the heap the
others left; here each has its own, as in training, and they still take turns. Or the heap is given a state that costs
nothing: :func:`keep_memory`.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from types import TracebackType
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")

_NEW = multiprocessing.get_context("spawn")
# A server that imports torch once and never computes: its children start fast, but all with the same heap.
_FORKED = multiprocessing.get_context("forkserver")
_FORKED.set_forkserver_preload(["torch"])

PAUSE = 0.02
"""Seconds between turns of two processes, in which the OpenMP threads of the first stop spinning (5 ms as measured)."""

ROUNDS_PER_PROCESS = 5
"""After which a process is replaced: where its memory and its threads lie, and so its times, is its own luck."""

SETTLING_CALLS = 16
"""After which what allocates finds all it needs in a heap that keeps memory. At first slivers beside each aligned block
stay in malloc's cache of small blocks, up to seven of a size, and the hole without them is too small for the next."""

_MMAP_MAX, _MMAP_THRESHOLD, _TRIM_THRESHOLD = -4, -3, -1  # malloc.h
_MB = 1 << 20
KEPT_BY_DEFAULT = 32 * _MB
"""Bytes of a block up to which glibc's malloc, once it has freed one as large, no longer maps it anew every time."""


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

    def call(self, function: Callable[..., Result], *args: Any) -> Result:
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

    def call(self, function: Callable[..., Result], *args: Any) -> Result:
        """``function(subject, *args)``."""
        return function(self._subject, *args)

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def can_keep_memory() -> bool:
    """Whether :func:`keep_memory` works here: with glibc."""
    return hasattr(ctypes.CDLL(None), "mallopt")


def keep_memory() -> None:
    """Let malloc keep what it gets from now on, in this process and for good.

    By default it maps a block beyond :data:`KEPT_BY_DEFAULT` anew every time, page by page as it is written, unless
    something freed earlier left a hole as large. So what a call that allocates costs would depend on what ran before.
    Here it settles after :data:`SETTLING_CALLS`.
    """
    _set_malloc({_MMAP_MAX: 0, _TRIM_THRESHOLD: -1})  # no block by mmap, and the heap never shrinks


@contextmanager
def leaving_no_holes() -> Iterator[None]:
    """What is freed meanwhile goes back to the system. After that malloc is as it is by default in a process that has
    freed a large block: thresholds are at their upper ends. With another malloc than glibc's nothing is done."""
    if not can_keep_memory():
        yield
        return
    _set_malloc({_MMAP_THRESHOLD: _MB})
    yield
    _set_malloc({_MMAP_THRESHOLD: KEPT_BY_DEFAULT, _TRIM_THRESHOLD: 2 * KEPT_BY_DEFAULT})


def _set_malloc(values: Mapping[int, int]) -> None:
    mallopt = ctypes.CDLL(None).mallopt
    for parameter, value in values.items():
        if mallopt(parameter, value) != 1:
            raise RuntimeError(f"mallopt({parameter}, {value}) failed")


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


def _apply(function: Callable[..., Result], args: tuple[Any, ...]) -> Result:
    return function(_subject, *args)
