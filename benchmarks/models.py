"""The multi-task problem whose steps are measured: an MLP as shared encoder, one linear head for each task."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

OUTPUTS = 10


class Size(NamedTuple):
    """How large a problem is; picklable, so that every process builds the same one."""

    depth: int = 8
    width: int = 1024
    tasks: int = 3
    batch: int = 64

    @property
    def P(self) -> int:
        """Shared parameters: weights and biases of the encoder."""
        return self.depth * self.width * (self.width + 1)

    def __str__(self) -> str:
        return f"{self.depth}x{self.width} MLP, T={self.tasks}, P={self.P / 1e6:.3g}M, batch {self.batch}"


class MultiTaskMLP(nn.Module):
    """``depth`` layers of Linear and ReLU, then ``tasks`` heads with squared error, on one fixed random batch."""

    def __init__(self, size: Size, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        layers = [layer for _ in range(size.depth) for layer in (nn.Linear(size.width, size.width), nn.ReLU())]
        self.encoder = nn.Sequential(*layers)
        self.heads = nn.ModuleList(nn.Linear(size.width, OUTPUTS) for _ in range(size.tasks))
        self.inputs = torch.randn(size.batch, size.width)
        self.targets = [10.0 ** (t - 1) * torch.randn(size.batch, OUTPUTS) for t in range(size.tasks)]

    def shared(self) -> list[nn.Parameter]:
        """The parameters all tasks share."""
        return list(self.encoder.parameters())

    def losses(self) -> list[Tensor]:
        """The loss of every task; scales differ by powers of ten."""
        features = self.encoder(self.inputs)
        return [nn.functional.mse_loss(head(features), y) for head, y in zip(self.heads, self.targets, strict=True)]
