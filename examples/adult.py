"""Five things about a person at once: three classifications beside two raw squared errors a hundred times as large.

Trains single-task models, equal weighting, DB-MTL's two halves and DB-MTL on UCI Adult and prints a Markdown table of
test scores::

    pip install 'dbmtl_fused[demo]'
    python examples/adult.py --data adult.npz --out runs/adult

The file holds integer columns ``n_age``, ..., codes ``c_workclass``, ... of the categories ``v_workclass``, ..., and
``split``: 0 for the rows of the training file, 1 for those of the test file (UCI Adult as in
github.com/probml/pmtkdata). Rows whose occupation is unknown are left out, and so is the column ``relationship``, of
which marital status is a part. Age and hours a week are raw but for their training mean.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dbmtl_fused.demo import example
from dbmtl_fused.demo.metrics import Metric, accuracy, mean_absolute_error
from dbmtl_fused.demo.training import MultiTaskModel, Problem, Split, Task, regression_head

ACCURACY = Metric("accuracy", "%", True, accuracy)
TASKS = (
    Task("income", nn.functional.cross_entropy, ACCURACY),
    Task("never-married", nn.functional.cross_entropy, ACCURACY),
    Task("occupation", nn.functional.cross_entropy, ACCURACY),
    Task("age", nn.functional.mse_loss, Metric("MAE", "years", False, mean_absolute_error)),
    Task("hours", nn.functional.mse_loss, Metric("MAE", "hours a week", False, mean_absolute_error)),
)
CATEGORIES = ("workclass", "education", "race", "sex", "native-country")
NUMBERS = ("capital-gain", "capital-loss")  # mostly 0, else up to 99,999
UNKNOWN = "?"
HIDDEN = 128


def load_problem(path: Path, seed: int) -> Problem:
    """Features and targets of the file's own training and test rows, the same for every ``seed``."""
    with np.load(path) as file:
        columns = {name: torch.from_numpy(file[name]) for name in file.files if not name.startswith("v_")}
        words = {name.removeprefix("v_"): file[name].tolist() for name in file.files if name.startswith("v_")}

    def code(column: str) -> Tensor:
        return columns[f"c_{column}"].long()

    # Codes in alphabetical order, the unknown one first.
    occupation = code("occupation") - 1
    assert words["occupation"][0] == UNKNOWN
    is_train, known = columns["split"] == 0, occupation >= 0
    inputs = torch.cat(
        [nn.functional.one_hot(code(name), len(words[name])) for name in CATEGORIES]
        + [columns[f"n_{name}"][:, None].log1p() / 10 for name in NUMBERS],
        dim=1,
    )
    targets = {
        "income": code("income"),
        "never-married": (code("marital-status") == words["marital-status"].index("Never-married")).long(),
        "occupation": occupation,
    }
    scales = {}
    for name, column in (("age", "n_age"), ("hours", "n_hours-per-week")):
        values = columns[column].float()
        scales[name], mean = (value.item() for value in torch.std_mean(values[is_train & known]))
        targets[name] = values - mean

    def build_model() -> MultiTaskModel:
        encoder = nn.Sequential(nn.Linear(inputs.shape[1], HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU())
        classes = {"income": 2, "never-married": 2, "occupation": len(words["occupation"]) - 1}
        heads: dict[str, nn.Module] = {name: nn.Linear(HIDDEN, number) for name, number in classes.items()}
        return MultiTaskModel(encoder, heads | {name: regression_head(HIDDEN, scales[name]) for name in scales})

    data = Split(inputs, targets)
    return Problem(TASKS, data[is_train & known], data[~is_train & known], build_model)


def main(argv: Sequence[str]) -> int:
    """Run the comparison with the command line ``argv`` and return the exit status."""
    return example.run(
        argv,
        description=(__doc__ or "").split("\n\n")[0],
        file="adult.npz",
        load_problem=load_problem,
        epochs=10,
        batch_size=256,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
