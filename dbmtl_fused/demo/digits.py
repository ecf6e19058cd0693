"""Overlaid pairs of real handwritten digits, as in MultiMNIST: who is left, who is right, and how much ink was used."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from dbmtl_fused.demo.metrics import Metric, accuracy, mean_absolute_error
from dbmtl_fused.demo.training import MultiTaskModel, Problem, Split, Task, regression_head

SIDE = 8
"""Digits are 8 x 8 pixels of 0 (paper) to 16 (ink)."""
MAX_INK = 16.0
SHIFT = 4
"""The right digit starts this many columns further right: half of each digit lies over the other."""
TEST_SHARE = 0.2

TASKS = (
    Task("left", nn.functional.cross_entropy, Metric("accuracy", "%", True, accuracy)),
    Task("right", nn.functional.cross_entropy, Metric("accuracy", "%", True, accuracy)),
    Task("ink", nn.functional.mse_loss, Metric("MAE", "grey levels", False, mean_absolute_error)),
)


@dataclass(frozen=True)
class Pairs:
    """N pairs of digits: ``left`` and ``right`` are rows of scikit-learn's digits, shape (N,).

    :param images: The two, one over the other (the darker pixel wins), shape (N, 8, 12), 0 to 16.
    :param labels: The digits' values, shape (N, 2), int64.
    :param ink: Sum of the pixels of both digits before they were overlaid, shape (N,), in grey levels.
    """

    left: Tensor
    right: Tensor
    images: Tensor
    labels: Tensor
    ink: Tensor


def make_pairs(images: Tensor, labels: Tensor, rows: Tensor, count: int, generator: torch.Generator) -> Pairs:
    """Draw ``count`` pairs of two different digits from the given ``rows`` of ``images`` (M, 8, 8)."""
    first = torch.randint(len(rows), (count,), generator=generator)
    other = torch.randint(1, len(rows), (count,), generator=generator)
    left, right = rows[first], rows[(first + other) % len(rows)]
    canvas = torch.zeros(count, SIDE, SIDE + SHIFT)
    canvas[:, :, :SIDE] = images[left]
    canvas[:, :, SHIFT:] = torch.maximum(canvas[:, :, SHIFT:], images[right])
    ink = images[left].sum((1, 2)) + images[right].sum((1, 2))
    return Pairs(left, right, canvas, torch.stack([labels[left], labels[right]], 1), ink)


def load_pairs(train_pairs: int, test_pairs: int, seed: int) -> tuple[Pairs, Pairs]:
    """Training and test pairs. Digits are split before they are paired: none is in both."""
    digits = load_digits()
    images, labels = torch.from_numpy(digits.images).float(), torch.from_numpy(digits.target)
    train_rows, test_rows = train_test_split(
        np.arange(len(labels)), test_size=TEST_SHARE, random_state=seed, stratify=digits.target
    )
    generator = torch.Generator().manual_seed(seed)
    train = make_pairs(images, labels, torch.from_numpy(train_rows), train_pairs, generator)
    test = make_pairs(images, labels, torch.from_numpy(test_rows), test_pairs, generator)
    return train, test


def load_problem(train_pairs: int, test_pairs: int, seed: int) -> Problem:
    """The three tasks; ink counts from the training pairs' mean, in grey levels."""
    train, test = load_pairs(train_pairs, test_pairs, seed)
    mean_ink, ink_spread = train.ink.mean(), train.ink.std().item()

    def split(pairs: Pairs) -> Split:
        left, right = pairs.labels.unbind(1)
        return Split(pairs.images[:, None] / MAX_INK, {"left": left, "right": right, "ink": pairs.ink - mean_ink})

    return Problem(TASKS, split(train), split(test), lambda: build_model(ink_spread))


def build_model(ink_spread: float) -> MultiTaskModel:
    """A small convolutional encoder, (N, 1, 8, 12) -> (N, 128), and three linear heads."""
    features = 128
    encoder = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * SIDE * (SIDE + SHIFT) // 4, features),
        nn.ReLU(),
    )
    heads = {
        "left": nn.Linear(features, 10),
        "right": nn.Linear(features, 10),
        "ink": regression_head(features, ink_spread),
    }
    return MultiTaskModel(encoder, heads)
