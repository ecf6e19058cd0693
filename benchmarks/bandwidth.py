"""The machine's copy bandwidth, the yardstick for what only moves memory."""

from __future__ import annotations

import torch

ITEM = 4  # bytes of float32


class Copy:
    """``copy_`` of float32 between two buffers that together have ``total_bytes``: so many bytes are read + written."""

    def __init__(self, total_bytes: int) -> None:
        self.source = torch.zeros(total_bytes // (2 * ITEM))
        self.target = torch.empty_like(self.source)

    def __call__(self) -> None:
        self.target.copy_(self.source)


def fused_bytes(T: int, P: int) -> int:
    """Bytes that must be read and written: ``4 T + 1`` vectors of ``P`` (the EMA twice, as it leaves the caches)."""
    return (4 * T + 1) * P * ITEM
