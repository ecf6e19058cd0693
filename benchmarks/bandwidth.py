"""The machine's copy bandwidth, the yardstick for what only moves memory, and the bytes that must be moved."""

from __future__ import annotations

import torch

ITEM = 4  # bytes of float32

COPY = "copy of as many bytes"
"""Name of :class:`Copy` among candidates."""

LARGEST = 1_000_000_000
"""Bytes of two buffers beyond which they are copied several times instead: memory is for what is measured."""


class Copy:
    """``copy_`` of float32 between two buffers, so often that ``total_bytes`` are read + written."""

    def __init__(self, total_bytes: int, device: str | torch.device = "cpu") -> None:
        self.times = -(-total_bytes // LARGEST)
        # Random, as gradients are: zeros cost some memories less.
        self.source = torch.rand(total_bytes // (2 * ITEM * self.times), device=device)
        self.target = torch.empty_like(self.source)

    def __call__(self) -> None:
        for _ in range(self.times):
            self.target.copy_(self.source)


def byte_model(operator: str, T: int, P: int, state: int = ITEM, grad: int = ITEM) -> tuple[int, int]:
    """The least that an operator reads and writes, ``balance_`` in two phases; of ``ema_update_`` a row of ``P``.

    :param state: Bytes of an entry of the state.
    :param grad: The same of gradients and of the weighted sum.
    """
    if operator == "begin_step":  # losses, scale and step; seeds, betas, inv_scale and found_inf
        return (T + 1) * grad + 8, (2 * T + 2) * grad
    read, written = {
        "balance_": (T * (2 * state + grad), T * state + grad),  # state and gradients, the state again; state, sum
        "ema_update_": (state + grad, state),
        "combine": (T * state, grad),
        "gram": (T * state, 0),
    }[operator]
    return P * read, P * written


def fused_bytes(T: int, P: int) -> int:
    """Bytes of ``balance_`` in float32: ``4 T + 1`` vectors of ``P`` (the EMA twice, as it leaves the caches)."""
    return sum(byte_model("balance_", T, P))
