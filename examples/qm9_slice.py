"""Eleven properties of molecules at once, with losses that differ by ten orders of magnitude.

Trains single-task models, equal weighting, DB-MTL's two halves and DB-MTL on the 6,095 isomers of C7H10O2 in QM9 and
prints a Markdown table of test errors::

    pip install 'dbmtl_fused[demo]'
    python examples/qm9_slice.py --data qm9_c7h10o2.npz --out runs/qm9

The file holds ``Z`` (molecules, atoms), ``pos`` (molecules, atoms, 3) in Å, ``y`` (molecules, properties), and the
properties' ``names`` (github.com/chemspacelab/qm9-C7O2H10). Features are Coulomb matrices (Rupp et al., PRL 108,
058301), the encoder is an MLP. Targets are raw but for their training mean, and losses are raw squared errors:
balancing them is the business of the methods.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dbmtl_fused.demo import example
from dbmtl_fused.demo.metrics import Metric, mean_absolute_error
from dbmtl_fused.demo.training import MultiTaskModel, Problem, Split, Task, regression_head

UNITS = {
    "mu": "D",
    "alpha": "a0³",
    "homo": "Ha",
    "lumo": "Ha",
    "r2": "a0²",
    "zpve": "Ha",
    "U0": "Ha",
    "U": "Ha",
    "H": "Ha",
    "G": "Ha",
    "Cv": "cal/mol/K",
}
"""The eleven tasks of the paper's Table 3, in the file's own units."""
TASKS = tuple(
    Task(name, nn.functional.mse_loss, Metric("MAE", unit, False, mean_absolute_error)) for name, unit in UNITS.items()
)
TEST_SHARE = 0.2
HIDDEN = 256


def coulomb_matrices(Z: Tensor, positions: Tensor) -> Tensor:
    """Upper triangles of Coulomb matrices, rows and columns sorted by falling row norm, shape (N, A(A+1)/2).

    ``C_ij = Z_i Z_j / |R_i - R_j|`` and ``C_ii = 0.5 Z_i**2.4``, from ``Z`` (N, A) and ``positions`` (N, A, 3).
    """
    distances = torch.cdist(positions, positions, compute_mode="donot_use_mm_for_euclid_dist")
    distances.diagonal(dim1=1, dim2=2).fill_(1)
    matrices = Z[:, :, None] * Z[:, None, :] / distances
    matrices.diagonal(dim1=1, dim2=2).copy_(0.5 * Z**2.4)
    order = matrices.norm(dim=2).argsort(dim=1, descending=True)
    matrices = matrices.take_along_dim(order[:, :, None], 1).take_along_dim(order[:, None, :], 2)
    upper = torch.triu_indices(*matrices.shape[1:])
    return matrices[:, upper[0], upper[1]]


def load_problem(path: Path, seed: int) -> Problem:
    """Features and targets of a random training and test split; all statistics are the training molecules'."""
    with np.load(path) as file:
        Z, positions, y = (torch.from_numpy(file[key]).double() for key in ("Z", "pos", "y"))
        columns = [file["names"].tolist().index(name) for name in UNITS]
    order = torch.randperm(len(Z), generator=torch.Generator().manual_seed(seed))
    test, train = order.split([int(TEST_SHARE * len(Z)), len(Z) - int(TEST_SHARE * len(Z))])

    features = coulomb_matrices(Z, positions)
    spread, mean = torch.std_mean(features[train], dim=0)
    features = (features - mean) / spread.clamp_min(1e-8)  # some entries are the same in all molecules
    # In float64: U0 sits at -422 with a spread of 0.03.
    targets = y[:, columns] - y[train][:, columns].mean(0)
    scales = dict(zip(UNITS, targets[train].std(0).tolist(), strict=True))

    def split(rows: Tensor) -> Split:
        return Split(features[rows].float(), dict(zip(UNITS, targets[rows].float().T.contiguous(), strict=True)))

    def build_model() -> MultiTaskModel:
        encoder = nn.Sequential(nn.Linear(features.shape[1], HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU())
        return MultiTaskModel(encoder, {name: regression_head(HIDDEN, scale) for name, scale in scales.items()})

    return Problem(TASKS, split(train), split(test), build_model)


def main(argv: Sequence[str]) -> int:
    """Run the comparison with the command line ``argv`` and return the exit status."""
    return example.run(
        argv,
        description=(__doc__ or "").split("\n\n")[0],
        file="qm9_c7h10o2.npz",
        load_problem=load_problem,
        epochs=30,
        batch_size=128,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
