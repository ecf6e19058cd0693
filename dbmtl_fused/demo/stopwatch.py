"""A clock that waits for the device."""

from __future__ import annotations

from time import perf_counter
from types import TracebackType

import torch


class Stopwatch:
    """Adds up the ``seconds`` spent inside ``with stopwatch:``, queued work of the device included."""

    def __init__(self, device: torch.device) -> None:
        self.seconds = 0.0
        self._device = device

    def __enter__(self) -> Stopwatch:
        self._synchronize()
        self._started = perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._synchronize()
        self.seconds += perf_counter() - self._started

    def _synchronize(self) -> None:
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
