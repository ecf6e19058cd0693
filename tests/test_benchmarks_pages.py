"""What the documentation says about speed is what the committed files say."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks import figures, gpu, growth, pages, results, run
from benchmarks.comparators import LIBMTL, TIGHT
from benchmarks.pages import BEGIN, END
from benchmarks.results import RESULTS, Run, Table

ROOT = Path(__file__).resolve().parent.parent
RUNS = results.load()
COPY, OWN = "copy of as many bytes", "dbmtl_fused cpu"


def test_readme_and_page_are_what_the_committed_results_make_of_them() -> None:
    written = pages.written(RUNS, (ROOT / "README.md").read_text())
    assert written.keys() == {"README.md", "docs/benchmarks.md"}
    for path, text in written.items():
        assert (ROOT / path).read_text() == text, f"{path}: run python -m benchmarks.report"


def test_figures_show_what_the_committed_results_say() -> None:
    shown = {name: data for of in RUNS for name, data in figures.of_run(of).items()}
    folder = ROOT / "docs" / "figures"
    assert {path.stem for path in folder.glob("*.png")} == set(shown)
    for name, data in shown.items():
        assert figures.shown_in(folder / f"{name}.png") == figures.hash_of(data), f"{name}: python -m benchmarks.report"


def test_the_page_shows_every_figure_and_every_bar() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    for of in RUNS:
        assert all(f"(figures/{name}.png)" in page for name in figures.of_run(of))
        assert all(bar["name"] in page for table in of.tables for bar in table["bars"])
        assert all(title in page for title in of.left_out)


def candidate(*seconds: float) -> dict[str, Any]:
    return {"samples": [{"seconds": value, "page_faults": 0.0} for value in seconds]}


def table(kind: str, candidates: Mapping[str, dict[str, Any]] | None = None, **others: Any) -> Table:
    content: dict[str, Any] = {
        "title": kind,
        "kind": kind,
        "facts": {},
        "bars": [],
        "notes": [],
        "megabytes": {},
        "checks": {},
    }
    content |= {"bytes_moved": None, "copy": None, "ratio_to": None, "floor": None, "candidates": candidates or {}}
    return Table(content | others)


def run_of(*tables: Table) -> Run:
    return Run("cpu", "results/cpu.json", RUNS[0].found, tables, {})


def test_a_changed_sample_changes_page_readme_and_figure(tmp_path: Path) -> None:
    shutil.copy(RESULTS / "cpu.json", tmp_path)
    content = json.loads((tmp_path / "cpu.json").read_text())
    (balance, *_) = [section for section in content["sections"] if section["kind"] == "balance"]
    for sample in balance["candidates"][TIGHT]["samples"]:
        sample["seconds"] *= 3
    (tmp_path / "cpu.json").write_text(json.dumps(content))
    before, after = RUNS[:1], results.load(tmp_path)
    assert pages.page(before) != pages.page(after)
    assert pages.readme(before) != pages.readme(after)
    changed = {name for name, data in figures.of_run(after[0]).items() if data != figures.of_run(before[0])[name]}
    assert changed == {"cpu-roofline"}


def test_a_missed_bar_is_shown_as_missed_and_what_is_left_out_with_its_reason() -> None:
    missed = {"name": "a bar", "unit": "x", "relation": ">=", "target": 2.0, "q1": 1.0, "median": 1.5, "q3": 1.7}
    tables = [table("x", bars=[missed | {"passed": False}])]
    page = pages.page([Run("cpu", "results/cpu.json", RUNS[0].found, tables, {"ViT": "why"})])
    assert "| a bar | ≥ 2 x    | 1.5        | 1 … 1.7     | **missed** |" in page
    assert "| ViT | why   |" in page
    assert "No GPU figures yet" in page


def test_ratios_are_formed_within_a_round_and_time_is_stacked() -> None:
    facts = {"forward": "f", "one": "one", "own": "own"}
    of = {"copy": candidate(9, 9, 9), "f": candidate(1, 1, 1), "one": candidate(2, 2, 2), "floor": candidate(3, 30, 5)}
    of["own"] = candidate(4, 32, 6)
    step = table("step", of, facts=facts, floor="floor", ratio_to="floor", copy="copy", bytes_moved=4)
    (problem,) = figures.steps(run_of(step))["problems"].values()
    assert problem["bars"]["own"] == {"forward": 1e3, "backwards": 4e3, "exposed balancing": 1e3}
    assert problem["bars"]["one"] == {"forward": 1e3, "backwards": 1e3, "exposed balancing": 0.0}
    assert list(problem["bars"]) == ["one", "floor", "own"]
    assert step.ratio("own", "floor") == pytest.approx(1.2)


def growing(seconds_of: Mapping[str, Any]) -> Run:
    """Times by formulas of ``T`` and ``P``, far beyond caches."""
    tables = []
    for along, points in (("P", [(3, P * 10**7) for P in (1, 3, 10)]), ("T", [(T, 10**7) for T in (2, 4, 8)])):
        for T, P in points:
            of = {name: candidate(formula(T, P)) for name, formula in seconds_of.items()}
            facts, roles = {"T": T, "P": P, "series": along}, {"copy": COPY, "ratio_to": OWN}
            tables.append(table("growth", of, facts=facts, bytes_moved=(4 * T + 1) * P * 4, **roles))
    return run_of(*tables)


def test_slopes_of_what_grows_as_the_model_says_are_the_models() -> None:
    bandwidth = 1e10
    grown = growing(
        {
            COPY: lambda T, P: (4 * T + 1) * P * 4 / bandwidth,
            OWN: lambda T, P: (4 * T + 1) * P * 4 / bandwidth,
            TIGHT: lambda T, P: 1e-3 + (5 * T + 1) * P * 4 / bandwidth,
            LIBMTL: lambda T, P: 2 * (14 * T - 1) * P * 4 / bandwidth,
        }
    )
    along_p = {found.candidate: found for found in growth.of_time(grown, "P")}
    along_t = {found.candidate: found for found in growth.of_time(grown, "T")}
    assert along_p[OWN].slope == pytest.approx(13 * 4 / bandwidth)
    assert along_p[OWN].exponent == pytest.approx(1)
    assert along_p[TIGHT].slope == pytest.approx(along_p[TIGHT].model)
    assert along_p[TIGHT].exponent < 1
    assert along_p[LIBMTL].slope == pytest.approx(2 * along_p[LIBMTL].model)
    assert along_t[OWN].slope == pytest.approx(4 * 10**7 * 4 / bandwidth)
    assert along_t[LIBMTL].slope == pytest.approx(2 * 14 * 10**7 * 4 / bandwidth)
    text = pages.page([grown])
    assert "| dbmtl_fused cpu       | 3        | 1.00       | 5.2 ns             | 5.2 ns  | 1.00" in text


def test_the_slope_of_memory_is_fitted_beside_the_state() -> None:
    def of(T: int, P: int) -> Table:
        peaks = {"own": {"tensors": (100 + T * P * 4) / 1e6 + 7}, "bare": {"tensors": 7.0}}
        facts = {"T": T, "P": P, "own": "own", "bare": "bare", "series": "P"}
        return table("memory growth", facts=facts, megabytes=peaks)

    grown = run_of(*(of(3, P) for P in (1_000, 2_000, 4_000)))
    assert growth.of_memory(grown, "P") == (pytest.approx(12), pytest.approx(12))
    assert growth.of_memory(grown, "T") is None


def test_make_gpu_can_measure_steps(tmp_path: Path) -> None:
    """A stage of its own, for which the default ones leave no time; what it writes is read back."""
    options = gpu._parse(["--device", "cpu", "--quick", "--stages", "steps", "--out", str(tmp_path)])
    command = gpu.STAGES["steps"].command(gpu.Context(options, tmp_path, 100.0))
    parsed = run._parse(command[4:])
    assert (parsed.quick, parsed.seconds, parsed.data) == (True, 70, options.data)
    assert parsed.out == tmp_path / "steps.json"
    assert command[3:5] == ["benchmarks.run", "step"]


def test_a_run_on_a_gpu_has_a_part_of_its_own(tmp_path: Path) -> None:
    content = json.loads((RESULTS / "cpu.json").read_text())
    (tmp_path / "cuda.json").write_text(json.dumps(content | {"device": "NVIDIA something"}))
    (tmp_path / "gpu").mkdir()
    balance = {key: value for key, value in content["sections"][0].items() if key not in ("kind", "facts")}
    stages = [
        {"name": "info", "data": content | {"device": {"name": "NVIDIA another"}}},
        {"name": "operators", "data": {"sections": [balance]}},
        {"name": "suite", "data": None},
    ]
    (tmp_path / "gpu" / "gpu.json").write_text(json.dumps({"stages": stages}))
    page = pages.page(results.load(tmp_path))
    assert "## NVIDIA something" in page
    assert "## NVIDIA another" in page
    assert "### Operators" in page
    assert "No GPU figures" not in page


@pytest.mark.parametrize("text", ["nothing", f"{BEGIN}", f"{BEGIN} {END} {BEGIN} {END}"])
def test_a_readme_without_its_markers_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"^expected one '<!-- begin"):
        pages.between_markers(text, "content")


def test_what_stands_outside_the_markers_stays() -> None:
    once = pages.between_markers(f"before\n{BEGIN}\nold\n{END}\nafter\n", "new")
    assert once == f"before\n{BEGIN}\n\nnew\n\n{END}\nafter\n"
    assert pages.between_markers(once, "new") == once


@pytest.mark.parametrize(
    ("value", "text"),
    [(2.5, "2.5 s"), (0.0123, "12.3 ms"), (4.56e-5, "45.6 µs"), (7e-9, "7 ns"), (-2e-3, "-2 ms"), (0.0, "0 ns")],
)
def test_seconds(value: float, text: str) -> None:
    assert pages.seconds(value) == text


def test_numbers() -> None:
    assert [pages.numbers(x) for x in (5, 100_000, 11_200_000, 10**9)] == ["5", "100 k", "11.2 M", "1 G"]


def test_drawing_writes_only_what_has_changed(tmp_path: Path) -> None:
    data = {"cpu-roofline": {"problems": {"title": {"own": "a", "bars": {"a": 1.0, "b": 0.5}}}}}
    assert figures.draw(data, tmp_path) == [tmp_path / "cpu-roofline.png"]
    assert figures.draw(data, tmp_path) == []
    data["cpu-roofline"]["problems"]["title"]["bars"]["b"] = 0.6
    assert figures.draw(data, tmp_path) == [tmp_path / "cpu-roofline.png"]
