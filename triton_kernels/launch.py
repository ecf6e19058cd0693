"""What a launch must know of the device, for every device that Triton reaches."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
from torch import Tensor

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether kernels run in Triton's interpreter, on CPU tensors: ``TRITON_INTERPRET=1`` when this package is imported."""

_INTERPRETED_MULTIPROCESSORS = 3


def on_device(tensor: Tensor) -> AbstractContextManager:
    """A context in which kernels are launched on the device of ``tensor``."""
    index = tensor.device.index
    if INTERPRETED or index == torch.accelerator.current_device_index():
        return nullcontext()
    return torch.accelerator.device_index(index)


def current_stream(device: torch.device) -> int:
    """The stream of launches on ``device``: memory that one has filled is not ready for another. A CPU, where the
    interpreter runs, has none."""
    return 0 if device.type == "cpu" else triton.runtime.driver.active.get_current_stream(device.index)


def is_capturing(device: torch.device) -> bool:
    """Whether launches are being recorded into a graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@functools.cache
def multiprocessors(device: torch.device) -> int:
    if INTERPRETED:
        return _INTERPRETED_MULTIPROCESSORS
    return triton.runtime.driver.active.utils.get_device_properties(device.index)["multiprocessor_count"]


@functools.cache
def target() -> str:
    """Triton's name of the kind of device: ``"cuda"``, ``"hip"``, ``"xpu"``, or ``"interpreter"``."""
    return "interpreter" if INTERPRETED else triton.runtime.driver.active.get_current_target().backend


_GRAPH_BARRIERS = 4096
_barriers: dict[tuple[torch.device, int], Tensor] = {}
_graph_barriers: dict[torch.device, list[Tensor]] = {}
_supplies: list[Tensor] = []
"""What graphs read and write must not die with its last view."""


def barrier_words(device: torch.device) -> Tensor:
    """Two zeros for a grid barrier, shared by all launches on the current stream, which leave zeros behind.

    A captured launch has its own, since a graph may be replayed on any stream: out of a supply made by the first
    launch on the device that is not captured, so that no graph has to fill it; else filled by the graph.
    """
    if is_capturing(device):
        supply = _graph_barriers.get(device)
        return supply.pop() if supply else torch.zeros(2, dtype=torch.int32, device=device)
    key = (device, current_stream(device))
    if key not in _barriers:
        if device not in _graph_barriers:
            _supplies.append(torch.zeros(_GRAPH_BARRIERS, 2, dtype=torch.int32, device=device))
            _graph_barriers[device] = list(_supplies[-1])
        _barriers[key] = torch.zeros(2, dtype=torch.int32, device=device)
    return _barriers[key]
