"""Timing what runs on a GPU, for :func:`benchmarks.timing.interleave`: seconds of one call, the host left out.

Many calls are captured into one CUDA graph, and a sample is one replay of it between two events, so that neither Python
nor launches are in the figure. The calls take turns over buffer sets that together are several times the L2 cache, so
that each finds its data in memory; nothing is flushed by writing, which would charge foreign dirty lines to a call.
On a CPU the same classes' stand-ins use the clock: that shows that everything runs, and measures nothing.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence

import torch

from benchmarks.timing import Sample, sample

MIN_CALLS = 20
L2_MULTIPLE = 4
MAX_SETS = 256
DRY_CALLS = 2

Calls = Sequence[Callable[[], object]]
"""The same work on one buffer set after the other."""


def buffer_sets(bytes_per_set: int, device: torch.device) -> int:
    """How many sets of buffers a graph must go through for each to have left L2 when its turn comes again."""
    if device.type != "cuda":
        return 2
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(MAX_SETS, max(1, -(-L2_MULTIPLE * cache // max(1, bytes_per_set))))


@functools.cache
def _side_stream() -> torch.cuda.Stream:
    """Where graphs are captured: one for all, as memory that the allocator keeps for a stream serves no other."""
    return torch.cuda.Stream()


class GraphTimer:
    """A CUDA graph of at least ``calls`` calls, as often through all sets as that takes; called, it is replayed once.

    Captured after two calls of each in the open, in which whatever is compiled or allocated once is.
    """

    def __init__(self, functions: Calls, calls: int = MIN_CALLS) -> None:
        self.calls = len(functions) * -(-calls // len(functions))
        stream = _side_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for function in (*functions, *functions):
                function()
        torch.cuda.current_stream().wait_stream(stream)
        self._functions = functions  # whose buffers the graph uses
        # Candidates may put new tensors in place of what they hold. The first captured call reads those of the calls in
        # the open, which nothing else keeps: the next capture would give their memory back to the system.
        self._read = [_held(function) for function in functions]
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=stream):
            for function in itertools.islice(itertools.cycle(functions), self.calls):
                function()
        self._events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def seconds(self) -> float:
        """Of one replay."""
        start, stop = self._events
        start.record()
        self._graph.replay()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) * 1e-3

    def __call__(self) -> Sample:
        return Sample(self.seconds() / self.calls)


def _held(function: object) -> list[object]:
    """The arguments of a call, and what its object and they have as attributes now."""
    if isinstance(function, functools.partial):
        return [_held(part) for part in (function.func, *function.args, *function.keywords.values())]
    owner = getattr(function, "__self__", function)
    return [owner, dict(getattr(owner, "__dict__", {}))]


class SlopeTimer:
    """Seconds that one more call takes: a graph of ``2 n`` calls less one of ``n``, so that what a replay costs by
    itself cancels. For calls of a few microseconds."""

    def __init__(self, functions: Calls, calls: int) -> None:
        self._short = GraphTimer(functions, calls)
        self._long = GraphTimer(functions, 2 * self._short.calls)

    def __call__(self) -> Sample:
        return Sample((self._long.seconds() - self._short.seconds()) / (self._long.calls - self._short.calls))


class HostTimer:
    """Seconds of the host for one call: ``calls`` in a row that the device is left to catch up with afterwards."""

    def __init__(self, function: Callable[[], object], device: torch.device, calls: int) -> None:
        self._function, self._device, self._calls = function, device, calls

    def __call__(self) -> Sample:
        synchronize(self._device)
        taken = sample(self._function, self._calls)
        synchronize(self._device)
        return taken


class ClockTimer:
    """Stand-in on a CPU for the two that need graphs."""

    def __init__(self, functions: Calls, calls: int) -> None:
        turns = itertools.cycle(functions)
        self._next, self._calls = lambda: next(turns)(), calls

    def __call__(self) -> Sample:
        return sample(self._next, self._calls)


def graph_timer(functions: Calls, device: torch.device) -> Callable[[], Sample]:
    """What takes samples of ``functions`` on ``device``."""
    return GraphTimer(functions) if device.type == "cuda" else ClockTimer(functions, DRY_CALLS)


def open_timer(functions: Calls, device: torch.device) -> Callable[[], Sample]:
    """The same for what no graph can hold: by the clock, one call and what it leaves to the device included."""
    turns = itertools.cycle(functions)
    return lambda: sample(lambda: next(turns)(), finish=functools.partial(synchronize, device))


def slope_timer(functions: Calls, device: torch.device, calls: int) -> Callable[[], Sample]:
    """The same for calls of a few microseconds."""
    return SlopeTimer(functions, calls) if device.type == "cuda" else ClockTimer(functions, DRY_CALLS)


def synchronize(device: torch.device) -> None:
    """Wait for everything launched on ``device``."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
