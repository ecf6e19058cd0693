"""``examples/adult.py``, and what its table says about an EMA in bfloat16."""

# ruff: noqa: E402  (what may be missing is imported after the check that it is there)

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

for package in ("sklearn", "matplotlib", "tqdm", "tabulate"):
    pytest.importorskip(package, reason="the demo's packages are not installed: pip install 'dbmtl_fused[demo]'")

from dbmtl_fused.demo import report
from dbmtl_fused.demo.study import SINGLE_TASK, Result, Study
from dbmtl_fused.demo.training import BFLOAT16_EMA, METHODS, MultiTaskModel, Settings, buffered_gradients, make_balancer

ROOT = Path(__file__).resolve().parents[1]
ADULT = ROOT.parent / "shared" / "data" / "adult" / "adult.npz"
DB_MTL = METHODS["db-mtl"].name


@pytest.fixture(autouse=True)
def _threads_as_before():
    """The command sets their number."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def adult() -> ModuleType:
    """``examples/adult.py`` as a module."""
    spec = importlib.util.spec_from_file_location("adult", ROOT / "examples" / "adult.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tiny(tmp_path: Path, adult) -> Path:
    """800 made-up people, every fourth of whom is for testing."""
    random = np.random.default_rng(0)
    words = {name: ["?", "a", "b"] for name in (*adult.CATEGORIES, "occupation")}
    words |= {"income": ["<=50K", ">50K"], "marital-status": ["Divorced", "Never-married", "Widowed"]}
    columns = {f"v_{name}": np.array(values) for name, values in words.items()}
    columns |= {f"c_{name}": random.integers(0, len(values), 800).astype(np.uint8) for name, values in words.items()}
    columns |= {f"n_{name}": random.integers(0, 99, 800).astype(np.int32) for name in (*adult.NUMBERS, "age")}
    columns["n_hours-per-week"] = columns["n_age"] // 2
    np.savez(tmp_path / "tiny.npz", split=(np.arange(800) % 4 == 0).astype(np.uint8), **columns)
    return tmp_path / "tiny.npz"


def test_people_without_an_occupation_are_left_out(adult, tiny: Path):
    problem = adult.load_problem(tiny, seed=0)
    with np.load(tiny) as file:
        known, is_test, status = file["c_occupation"] > 0, file["split"] == 1, file["c_marital-status"]
        occupation = file["c_occupation"]
    for split, rows in ((problem.train, known & ~is_test), (problem.test, known & is_test)):
        assert split.targets["occupation"].tolist() == (occupation[rows] - 1).tolist()
        assert split.targets["never-married"].tolist() == (status[rows] == 1).tolist()
    assert problem.train.inputs.shape[1] == 5 * 3 + 2


def test_ages_and_hours_are_raw_but_for_the_training_mean(adult, tiny: Path):
    problem = adult.load_problem(tiny, seed=0)
    age, hours = problem.train.targets["age"], problem.train.targets["hours"]
    assert abs(age.mean().item()) < 1e-4
    assert age.std() > 20
    assert age.std() / hours.std() == pytest.approx(2, rel=0.01)


def test_tiny_run(adult, tiny: Path, tmp_path: Path, capsys):
    arguments = ["--data", str(tiny), "--epochs", "1", "--seeds", "2", "--methods", "db-mtl", "db-mtl-bf16"]
    assert adult.main([*arguments, "--beta", "0.5", "--out", str(tmp_path / "out")]) == 0
    table = (tmp_path / "out" / "results.md").read_text(encoding="utf-8")
    assert table.strip() in capsys.readouterr().out
    assert "| mean within the range" in table
    assert "Best Δp: DB-MTL," in table, "bfloat16 is no method of its own"
    results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))["results"]
    assert list(results) == [SINGLE_TASK, DB_MTL, BFLOAT16_EMA.name]
    for runs in results.values():
        assert [list(run["losses"]) for run in runs] == [[task.name for task in adult.TASKS]] * 2
        assert all(run["losses"]["hours"] / run["losses"]["income"] > 100 for run in runs)


@pytest.mark.skipif(not ADULT.exists(), reason=f"no Adult data at {ADULT}")
def test_real_file(adult):
    problem = adult.load_problem(ADULT, seed=0)
    assert (len(problem.train), len(problem.test)) == (30_718, 15_315)
    assert problem.train.inputs.isfinite().all()
    assert 170 < problem.train.targets["age"].var() < 190
    assert problem.train.targets["occupation"].max() == 13


def test_the_method_keeps_its_ema_in_bfloat16():
    model = MultiTaskModel(torch.nn.Linear(3, 4), {"a": torch.nn.Linear(4, 1)})
    balancer = make_balancer(model, BFLOAT16_EMA)
    assert {m.dtype for m in balancer.ema.values()} == {torch.bfloat16}
    assert buffered_gradients(balancer).dtype == torch.float32


def test_what_lies_within_the_range_of_float32(adult):
    losses = {DB_MTL: [1.0, 2.0, 3.0], BFLOAT16_EMA.name: [0.5, 1.0, 2.5]}
    results = {
        name: [Result(i, {}, 0.0, 1.0, losses={"age": loss, "hours": -2 * i}) for i, loss in enumerate(values)]
        for name, values in losses.items()
    }
    results[BFLOAT16_EMA.name][0].losses["hours"] = 60
    settings = Settings(1, 1, 1e-3, 0, torch.device("cpu"), 1)
    table = report.state_dtype_table(Study(adult.TASKS[3:], settings, "cpu", "a machine", 5, results))
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines()[2:]]
    assert cells[0] == ["age", "2 ± 1", "1 to 3", "1.3333 ± 1", "yes", "2 of 3"]
    assert cells[1][-2:] == ["no", "2 of 3"]
