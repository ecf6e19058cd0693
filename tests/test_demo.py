"""The demo and the QM9 example: their data, what they measure, and both end to end."""

# ruff: noqa: E402  (what may be missing is imported after the check that it is there)

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor, nn

for package in ("sklearn", "matplotlib", "tqdm", "tabulate"):
    pytest.importorskip(package, reason="the demo's packages are not installed: pip install 'dbmtl_fused[demo]'")

from sklearn.datasets import load_digits
from tqdm import tqdm

from dbmtl_fused import demo
from dbmtl_fused.demo import digits, report
from dbmtl_fused.demo.study import SINGLE_TASK, Result, Study
from dbmtl_fused.demo.timing import StepTimes, backward_each, gradients_dropped
from dbmtl_fused.demo.training import (
    EQUAL_WEIGHTING,
    METHODS,
    Method,
    Problem,
    Run,
    Settings,
    batches,
    initial_model,
    train,
)

ROOT = Path(__file__).resolve().parents[1]
QM9 = ROOT.parent / "shared" / "data" / "qm9_c7h10o2" / "qm9_c7h10o2.npz"
SETTINGS = Settings(epochs=1, batch_size=32, learning_rate=1e-3, seed=3, device=torch.device("cpu"), record_every=2)


@pytest.fixture(autouse=True)
def _one_thread():
    """The commands set the number of threads; put it back."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pairs() -> tuple[digits.Pairs, digits.Pairs]:
    return digits.load_pairs(300, 200, seed=1)


class TestPairs:
    def test_no_digit_is_in_training_and_test(self, pairs):
        train_pairs, test_pairs = pairs
        seen = {*train_pairs.left.tolist(), *train_pairs.right.tolist()}
        unseen = {*test_pairs.left.tolist(), *test_pairs.right.tolist()}
        assert seen
        assert unseen
        assert not seen & unseen

    def test_ink_is_the_sum_of_both_digits_pixels(self, pairs):
        images = torch.from_numpy(load_digits().images)
        for split in pairs:
            expected = images[split.left].sum((1, 2)) + images[split.right].sum((1, 2))
            torch.testing.assert_close(split.ink.double(), expected, rtol=0, atol=0)

    def test_overlay_keeps_the_darker_pixel(self, pairs):
        images, split = torch.from_numpy(load_digits().images).float(), pairs[0]
        canvas, shift, side = split.images, digits.SHIFT, digits.SIDE
        assert canvas.shape == (300, side, side + shift)
        assert torch.equal(canvas[:, :, :shift], images[split.left][:, :, :shift])
        assert torch.equal(canvas[:, :, side:], images[split.right][:, :, side - shift :])
        both = torch.maximum(images[split.left][:, :, shift:], images[split.right][:, :, : side - shift])
        assert torch.equal(canvas[:, :, shift:side], both)

    def test_labels_are_the_digits_values_and_digits_differ(self, pairs):
        values = torch.from_numpy(load_digits().target)
        for split in pairs:
            assert torch.equal(split.labels, torch.stack([values[split.left], values[split.right]], 1))
            assert not (split.left == split.right).any()

    def test_same_seed_same_pairs(self, pairs):
        again, other = digits.load_pairs(300, 200, seed=1), digits.load_pairs(300, 200, seed=2)
        assert torch.equal(again[0].images, pairs[0].images)
        assert not torch.equal(other[0].images, pairs[0].images)

    def test_ink_target_is_raw_but_for_the_training_mean(self):
        problem, (train_pairs, test_pairs) = digits.load_problem(300, 200, 1), digits.load_pairs(300, 200, 1)
        mean = train_pairs.ink.mean()
        torch.testing.assert_close(problem.test.targets["ink"] + mean, test_pairs.ink)
        assert problem.train.targets["ink"].std() > 20  # grey levels, not standardised


@pytest.fixture(scope="module")
def problem() -> Problem:
    return digits.load_problem(160, 50, seed=0)


class TestTraining:
    def run(self, problem, method: Method, tasks=None) -> Run:
        with tqdm(disable=True) as bar:
            return train(problem, tasks or problem.tasks, method, SETTINGS, bar)

    def test_single_task_models_start_as_the_multi_task_model_does(self, problem):
        together = initial_model(problem, problem.tasks, SETTINGS).state_dict()
        for task in problem.tasks:
            for name, value in initial_model(problem, [task], SETTINGS).state_dict().items():
                assert torch.equal(value, together[name])

    def test_batches_depend_on_the_seed_only(self, problem):
        first, again, other = (
            next(batches(problem.train, settings)).inputs
            for settings in (SETTINGS, SETTINGS, replace(SETTINGS, seed=4))
        )
        assert torch.equal(first, again)
        assert not torch.equal(first, other)

    def test_single_task_run_is_a_plain_loop_of_adam(self, problem):
        task = problem.tasks[2]
        model = initial_model(problem, [task], SETTINGS)
        optimizer = torch.optim.Adam(model.parameters(), lr=SETTINGS.learning_rate, eps=1e-16)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=5)
        data = batches(problem.train, SETTINGS)
        for _ in range(5):  # 160 pairs in batches of 32
            batch = next(data)
            optimizer.zero_grad()
            nn.functional.mse_loss(model(batch.inputs)["ink"], batch.targets["ink"]).backward()
            optimizer.step()
            schedule.step()
        trained = self.run(problem, EQUAL_WEIGHTING, [task]).model
        for ours, plain in zip(trained.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(ours, plain)

    @pytest.mark.parametrize("name", METHODS)
    def test_history(self, problem, name: str):
        history = self.run(problem, METHODS[name]).history
        assert history.steps == [1, 2, 4, 5]
        assert list(history.cosines) == ["left / right", "left / ink", "right / ink"]
        for series in (history.losses, history.norms, history.weights, history.cosines):
            assert {len(values) for values in series.values()} == {4}
        norms, weights = (torch.tensor(list(series.values())) for series in (history.norms, history.weights))
        assert (norms > 0).all()
        assert all(-1.0001 <= cosine <= 1.0001 for cosines in history.cosines.values() for cosine in cosines)
        if METHODS[name].is_plain_sum:
            assert (weights == 1).all()
        else:
            torch.testing.assert_close(weights * norms, norms.amax(0).expand_as(norms))


def test_dropped_gradients_reach_heads_only():
    shared, head = nn.Linear(3, 4), nn.Linear(4, 2)
    parameters = list(shared.parameters())

    def losses() -> dict[str, Tensor]:
        a, b = head(shared(torch.ones(5, 3))).square().mean(0)
        return {"a": a, "b": b}

    with gradients_dropped(parameters):
        backward_each(losses())
    assert all(parameter.grad is None for parameter in parameters)
    assert all(parameter.grad is not None for parameter in head.parameters())
    backward_each(losses())  # outside, they arrive again
    assert all(parameter.grad is not None for parameter in parameters)


def study_of(improvements: dict[str, list[float]]) -> Study:
    """A made-up study with these Delta_p."""
    names = [task.name for task in digits.TASKS]
    results = {
        method: [Result(seed, dict.fromkeys(names, 50.0), value, 2.0) for seed, value in enumerate(values)]
        for method, values in ({SINGLE_TASK: [0.0] * 2} | improvements).items()
    }
    return Study(digits.TASKS, SETTINGS, "cpu", "a machine", 5, results)


@pytest.mark.parametrize(
    ("improvements", "expected"),
    [
        ({"EW": [-3.0], "DB-MTL": [2.0]}, r"DB-MTL has the best Δp, \+2.00 %: 5.00 points more than EW.*one seed"),
        ({"EW": [-1.0], "DB-MTL": [-4.0]}, r"DB-MTL does not win here: Δp is -4.00 %, 3.00 points less than EW"),
        ({"EW": [1.0, 5.0], "DB-MTL": [2.0, 3.0]}, r"does not win.* 0.50 points less.*ahead of EW in 1 of 2 seeds"),
        (
            {"EW": [-9.0], "log only": [3.0], "DB-MTL": [1.0]},
            r"2.00 points less than log only. Against EW: \+10.00 points",
        ),
        ({"EW": [1.0]}, r"Best Δp: EW, \+1.00 %"),
    ],
)
def test_conclusion_says_what_the_numbers_say(improvements: dict[str, list[float]], expected: str):
    assert re.search(expected, report.conclusion(study_of(improvements)))


def test_table_over_seeds_has_means_and_deviations():
    table = report.table(study_of({"DB-MTL": [1.0, 3.0]}))
    assert "+2.00 ± 1.4" in table


def test_share_is_what_balancing_adds():
    assert StepTimes(step=10.0, floor=8.0).share == pytest.approx(0.2)


def test_demo_end_to_end(tmp_path: Path, capsys):
    assert demo.main(["--quick", "--out", str(tmp_path / "runs")]) == 0
    printed = capsys.readouterr().out
    table = (tmp_path / "runs" / "results.md").read_text(encoding="utf-8")
    assert table.strip() in printed
    assert (tmp_path / "runs" / "training.png").read_bytes().startswith(b"\x89PNG")
    assert f"Figure: {tmp_path / 'runs' / 'training.png'}" in printed

    results = json.loads((tmp_path / "runs" / "results.json").read_text(encoding="utf-8"))
    methods = [SINGLE_TASK, *(method.name for method in METHODS.values())]
    rows = [line.split("|")[1:-1] for line in table.splitlines() if line.startswith("|")]
    assert [row[0].strip() for row in rows[2:]] == methods == list(results["results"])
    baseline = results["results"][SINGLE_TASK][0]["scores"]
    signs = {task["name"]: 1 if task["higher_is_better"] else -1 for task in results["tasks"]}
    for row, (method, (result,)) in zip(rows[2:], results["results"].items(), strict=True):
        scores = result["scores"]
        expected = sum(100 * signs[t] * (scores[t] - baseline[t]) / baseline[t] for t in signs) / 3
        assert result["delta_p"] == pytest.approx(expected)
        assert [cell.strip() for cell in row[1:4]] == [f"{score:.3g}" for score in scores.values()]
        balances = method in ("magnitude only", "DB-MTL")
        assert (result["step_times"] is not None) == balances
        assert row[-1].strip().endswith("%") == balances


@pytest.mark.parametrize("option", ["--epochs", "--seeds", "--threads"])
def test_demo_refuses_nothing_to_do(option: str, capsys):
    with pytest.raises(SystemExit):
        demo.main([option, "0"])
    assert f"argument {option}: invalid positive value: '0'" in capsys.readouterr().err


def test_demo_says_what_to_install(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(demo, "find_spec", lambda name: None if name == "matplotlib" else object())
    assert demo.main([]) == 1
    message = capsys.readouterr().err
    assert "matplotlib" in message
    assert "pip install 'dbmtl_fused[demo]'" in message


def test_the_package_imports_nothing_heavy():
    # What torch itself imports (tqdm, where it is there) is not ours to avoid.
    code = (
        "import sys, torch; before = set(sys.modules); import dbmtl_fused; "
        "print({'sklearn', 'matplotlib', 'tqdm', 'tabulate', 'dbmtl_fused.demo'} & (set(sys.modules) - before))"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"


@pytest.fixture(scope="module")
def qm9_slice() -> ModuleType:
    """``examples/qm9_slice.py`` as a module."""
    spec = importlib.util.spec_from_file_location("qm9_slice", ROOT / "examples" / "qm9_slice.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class TestQM9:
    @pytest.fixture
    def tiny(self, tmp_path: Path, qm9_slice) -> Path:
        """160 made-up molecules of five atoms."""
        random = np.random.default_rng(0)
        names = ["A", *reversed(qm9_slice.UNITS)]  # another order and a column that is no task
        y = random.normal(size=(160, len(names))) * np.logspace(-3, 3, len(names)) - 400
        Z, pos = np.tile([6, 6, 8, 1, 1], (160, 1)).astype(np.uint8), random.normal(size=(160, 5, 3))
        np.savez(tmp_path / "tiny.npz", Z=Z, pos=pos.astype(np.float32), y=y, names=np.array(names))
        return tmp_path / "tiny.npz"

    def test_coulomb_matrix_by_hand(self, qm9_slice):
        # Hydrogen, oxygen, hydrogen on a line, 2 and 4 apart from the first; sorted: O, then the H nearer to it first.
        Z = torch.tensor([[1.0, 8.0, 1.0]], dtype=torch.float64)
        positions = torch.tensor([[[0.0, 0, 0], [2.0, 0, 0], [6.0, 0, 0]]], dtype=torch.float64)
        expected = [0.5 * 8**2.4, 8 / 2, 8 / 4, 0.5, 1 / 6, 0.5]
        assert qm9_slice.coulomb_matrices(Z, positions)[0].tolist() == pytest.approx(expected)

    def test_features_do_not_depend_on_the_order_of_atoms(self, qm9_slice):
        Z = torch.tensor([[6.0, 1.0, 8.0, 7.0]], dtype=torch.float64)
        positions = torch.randn(1, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        order = torch.tensor([2, 0, 3, 1])
        torch.testing.assert_close(
            qm9_slice.coulomb_matrices(Z, positions), qm9_slice.coulomb_matrices(Z[:, order], positions[:, order])
        )

    def test_targets_are_raw_but_for_the_training_mean(self, qm9_slice, tiny: Path):
        problem = qm9_slice.load_problem(tiny, seed=0)
        assert (len(problem.train), len(problem.test)) == (128, 32)
        spreads = [problem.train.targets[name].std().item() for name in qm9_slice.UNITS]
        assert spreads == sorted(spreads, reverse=True)  # the file's columns are in reverse order, and growing
        assert spreads[0] / spreads[-1] > 1e5
        for target in problem.train.targets.values():
            assert abs(target.mean().item()) < 1e-5 * target.std().item()

    def test_tiny_run(self, qm9_slice, tiny: Path, tmp_path: Path, capsys):
        arguments = ["--data", str(tiny), "--epochs", "1", "--methods", "ew", "db-mtl", "--out", str(tmp_path / "out")]
        assert qm9_slice.main(arguments) == 0
        printed = capsys.readouterr().out
        assert (tmp_path / "out" / "results.md").read_text(encoding="utf-8").strip() in printed
        results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
        assert list(results["results"]) == [SINGLE_TASK, "EW", "DB-MTL"]
        assert list(results["results"]["DB-MTL"][0]["scores"]) == list(qm9_slice.UNITS)

    @pytest.mark.skipif(not QM9.exists(), reason=f"no QM9 slice at {QM9}")
    def test_real_file(self, qm9_slice):
        problem = qm9_slice.load_problem(QM9, seed=0)
        assert len(problem.train) + len(problem.test) == 6095
        assert problem.train.inputs.shape[1] == 19 * 20 // 2
        assert problem.train.inputs.isfinite().all()
        # Thermal energies differ by little: only float64 keeps that apart from the offset of -422.
        assert 0.03 < problem.train.targets["U0"].std() < 0.04
        losses = [target.square().mean().item() for target in problem.train.targets.values()]
        assert max(losses) / min(losses) > 1e10

    def test_missing_file(self, qm9_slice, tmp_path: Path, capsys):
        with pytest.raises(SystemExit):
            qm9_slice.main(["--data", str(tmp_path / "nowhere.npz")])
        assert "--data must be the file qm9_c7h10o2.npz" in capsys.readouterr().err
