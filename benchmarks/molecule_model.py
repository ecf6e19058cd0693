"""Eleven properties of molecules from QM9, predicted by a small message-passing network on distances."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.models import MultiTaskModel

GEOMETRY, TARGETS = "qm9_geometry_milliA.npz", "qm9_y11_pyg_units.npz"
ELEMENTS = (1, 6, 7, 8, 9)
KERNELS, CUTOFF = 32, 6.0


class Molecules(NamedTuple):
    """A problem; ``data`` is the folder of the two files."""

    data: Path
    batch: int
    width: int = 64
    rounds: int = 3
    tasks: int = 11

    @property
    def P(self) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in MessagePassing(self.width, self.rounds).parameters())

    def build(self) -> MultiTaskModel:
        return Properties(self)

    def __str__(self) -> str:
        return f"QM9 message passing, T={self.tasks}, P={self.P / 1e6:.3g}M, batch {self.batch}"


class Properties(MultiTaskModel):
    """A two-layer head on the sum of all atoms' features for each standardised property, squared error."""

    targets: Tensor

    def __init__(self, size: Molecules) -> None:
        torch.manual_seed(0)
        heads = [
            nn.Sequential(nn.Linear(size.width, size.width), nn.SiLU(), nn.Linear(size.width, 1))
            for _ in range(size.tasks)
        ]
        super().__init__(MessagePassing(size.width, size.rounds), heads)
        atoms, positions, targets = read(size.data, size.batch)
        self.keep(atoms=atoms, positions=positions, targets=targets)

    def features(self) -> list[Tensor]:
        return [self.encoder(self.atoms, self.positions)]

    def losses_of(self, features: list[Tensor]) -> list[Tensor]:
        of_tasks = zip(self.heads, self.targets.T, strict=True)
        return [nn.functional.mse_loss(head(features[0]).squeeze(1), y) for head, y in of_tasks]


class MessagePassing(nn.Module):
    """Every atom hears every other within the cutoff, through a filter of their distance, and remembers by a GRU."""

    def __init__(self, width: int, rounds: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(len(ELEMENTS) + 1, width, padding_idx=0)
        self.filters = nn.ModuleList(
            nn.Sequential(nn.Linear(KERNELS, width), nn.SiLU(), nn.Linear(width, width)) for _ in range(rounds)
        )
        self.send = nn.ModuleList(nn.Linear(width, width) for _ in range(rounds))
        self.remember = nn.ModuleList(nn.GRUCell(width, width) for _ in range(rounds))

    def forward(self, atoms: Tensor, positions: Tensor) -> Tensor:
        there = atoms > 0
        distances = torch.cdist(positions, positions)
        pairs = there[:, :, None] & there[:, None, :] & (distances < CUTOFF)
        pairs &= ~torch.eye(atoms.shape[1], dtype=torch.bool, device=atoms.device)
        molecule, to, source = pairs.nonzero(as_tuple=True)
        centers = torch.linspace(0, CUTOFF, KERNELS, device=atoms.device)
        kernels = torch.exp(-10 * (distances[molecule, to, source][:, None] - centers) ** 2)
        width = atoms.shape[1]
        to, source = molecule * width + to, molecule * width + source
        x = self.embed(atoms).flatten(0, 1)
        for filter_, send, remember in zip(self.filters, self.send, self.remember, strict=True):
            messages = send(x)[source] * filter_(kernels)
            x = remember(torch.zeros_like(x).index_add(0, to, messages), x)
        return (x * there.flatten()[:, None]).unflatten(0, atoms.shape).sum(1)


def read(folder: Path, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first molecules of a fixed shuffle: element index (0: no atom), positions in Å, standardised properties."""
    atoms, places, y = shuffled(folder, count)
    return atoms, places, torch.from_numpy(((y[:count] - y.mean(0)) / y.std(0)).astype(np.float32))


def shuffled(folder: Path, count: int, seed: int = 0) -> tuple[Tensor, Tensor, NDArray[np.float64]]:
    """The first molecules of a shuffle: element index, shape ``(count, A)`` (0: no atom), and positions in Å, shape
    ``(count, A, 3)``; the properties of all molecules in this order."""
    with np.load(folder / GEOMETRY) as geometry, np.load(folder / TARGETS) as properties:
        sizes, elements, positions = geometry["n_atoms"].astype(np.int64), geometry["Z"], geometry["pos_milliA"]
        y = properties["y"].astype(np.float64)
    order = np.random.default_rng(seed).permutation(len(sizes))
    starts, sizes = (np.cumsum(sizes) - sizes)[order[:count], None], sizes[order[:count], None]
    columns = np.arange(sizes.max())
    there = columns < sizes
    source = (starts + columns)[there]
    atoms, places = np.zeros(there.shape, np.int64), np.zeros((*there.shape, 3), np.float32)
    atoms[there] = np.searchsorted(ELEMENTS, elements[source]) + 1
    places[there] = positions[source].astype(np.float32) / 1000
    return torch.from_numpy(atoms), torch.from_numpy(places), y[order]
