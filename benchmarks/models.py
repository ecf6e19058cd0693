"""Multi-task problems whose steps are measured, each on one fixed batch; and the smallest of them, an MLP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

OUTPUTS = 10


class MultiTaskModel(nn.Module):
    """A shared ``encoder``, ``heads`` for the tasks, and a batch, kept as buffers so that it moves with the model.

    :param own_batches: Whether each task has a batch, and so a graph, of its own.
    """

    def __init__(self, encoder: nn.Module, heads: Sequence[nn.Module], *, own_batches: bool = False) -> None:
        super().__init__()
        self.encoder, self.heads, self.own_batches = encoder, nn.ModuleList(heads), own_batches

    def keep(self, **tensors: Tensor) -> None:
        """Make tensors of the batch attributes."""
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)

    def shared(self) -> list[nn.Parameter]:
        """The parameters all tasks share."""
        return list(self.encoder.parameters())

    def features(self) -> list[Tensor]:
        """What the encoder makes of the batch; one tensor, or one for each task."""
        return [self.encoder(self.inputs)]

    def losses_of(self, features: list[Tensor]) -> list[Tensor]:
        """The loss of every task."""
        raise NotImplementedError

    def losses(self) -> list[Tensor]:
        """The same from the batch."""
        return self.losses_of(self.features())


class Problem(Protocol):
    """How large a problem is; picklable, so that every process builds the same one."""

    @property
    def tasks(self) -> int: ...

    @property
    def P(self) -> int:
        """Shared parameters."""

    def build(self) -> MultiTaskModel: ...


class Size(NamedTuple):
    """Of the MLP."""

    depth: int = 8
    width: int = 1024
    tasks: int = 3
    batch: int = 64

    @property
    def P(self) -> int:
        """Weights and biases of the encoder."""
        return self.depth * self.width * (self.width + 1)

    def build(self) -> MultiTaskMLP:
        return MultiTaskMLP(self)

    def __str__(self) -> str:
        return f"{self.depth}x{self.width} MLP, T={self.tasks}, P={self.P / 1e6:.3g}M, batch {self.batch}"


class MultiTaskMLP(MultiTaskModel):
    """``depth`` layers of Linear and ReLU, then ``tasks`` heads with squared error; loss scales differ by tens."""

    targets: Tensor

    def __init__(self, size: Size, seed: int = 0) -> None:
        torch.manual_seed(seed)
        layers = [layer for _ in range(size.depth) for layer in (nn.Linear(size.width, size.width), nn.ReLU())]
        super().__init__(nn.Sequential(*layers), [nn.Linear(size.width, OUTPUTS) for _ in range(size.tasks)])
        scales = 10.0 ** (torch.arange(size.tasks) - 1)
        targets = scales.view(-1, 1, 1) * torch.randn(size.tasks, size.batch, OUTPUTS)
        self.keep(inputs=torch.randn(size.batch, size.width), targets=targets)

    def losses_of(self, features: list[Tensor]) -> list[Tensor]:
        return [nn.functional.mse_loss(head(features[0]), y) for head, y in zip(self.heads, self.targets, strict=True)]
