"""The machine's copy bandwidth, the yardstick for what only moves memory."""

from __future__ import annotations

import torch

ITEM = 4  # bytes of float32


LARGEST = 1_000_000_000
"""Bytes of two buffers beyond which they are copied several times instead: memory is for what is measured."""


class Copy:
    """``copy_`` of float32 between two buffers, so often that ``total_bytes`` are read + written."""

    def __init__(self, total_bytes: int, device: str | torch.device = "cpu") -> None:
        self.times = -(-total_bytes // LARGEST)
        self.source = torch.zeros(total_bytes // (2 * ITEM * self.times), device=device)
        self.target = torch.empty_like(self.source)

    def __call__(self) -> None:
        for _ in range(self.times):
            self.target.copy_(self.source)


def fused_bytes(T: int, P: int) -> int:
    """Bytes that must be read and written: ``4 T + 1`` vectors of ``P`` (the EMA twice, as it leaves the caches)."""
    return (4 * T + 1) * P * ITEM
