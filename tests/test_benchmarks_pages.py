"""What the documentation says about speed is what the committed files say."""

from __future__ import annotations

import json
import shutil
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks import counters, figures, gpu, growth, pages, results, run
from benchmarks.comparators import LIBMTL, TIGHT, kept
from benchmarks.report import Section
from benchmarks.results import RESULTS, Run, Table
from benchmarks.timing import Bar, Sample

ROOT = Path(__file__).resolve().parent.parent
RUNS, STUDIES = results.load(), results.studies()
BEGIN, END = (marker.format(pages.MAKER) for marker in (pages.BEGIN, pages.END))
COPY, OWN = "copy of as many bytes", "dbmtl_fused cpu"


def test_readme_and_page_are_what_the_committed_results_make_of_them() -> None:
    written = pages.written(ROOT, RUNS, STUDIES)
    assert written.keys() == {"README.md", "docs/benchmarks.md", "docs/results.md"}
    for path, text in written.items():
        assert (ROOT / path).read_text() == text, f"{path}: run python -m benchmarks.report"


def test_figures_show_what_the_committed_results_say() -> None:
    shown = figures.of_all(RUNS, STUDIES)
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


def candidate(*seconds: float, page_faults: float = 0.0) -> dict[str, Any]:
    return {"samples": [{"seconds": value, "page_faults": page_faults} for value in seconds]}


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


@pytest.mark.parametrize(
    ("quartiles", "passed", "text"),
    [
        ((1.1, 1.2, 1.3), True, "reached"),
        ((0.9, 1.2, 1.3), True, "reached, within noise"),
        ((0.8, 0.9, 1.1), False, "**missed**, within noise"),
        ((0.7, 0.8, 0.9), False, "**missed**"),
        ((1.0, 1.0, 1.0), True, "reached"),
    ],
)
def test_a_bar_whose_target_is_between_the_quartiles_is_within_noise(
    quartiles: tuple[float, float, float], passed: bool, text: str
) -> None:
    bar = dict(zip(("q1", "median", "q3"), quartiles, strict=True))
    assert pages.verdict({**bar, "target": 1.0, "passed": passed}) == text


def test_what_allocates_is_shown_with_its_memory_kept_beside_it() -> None:
    of = {COPY: candidate(2), LIBMTL: candidate(30, page_faults=164_000), TIGHT: candidate(3), OWN: candidate(2)}
    of[kept(LIBMTL)] = candidate(12)
    facts, roles = {"T": 3, "P": 11_200_000}, {"copy": COPY, "ratio_to": OWN}
    balance = table("balance", of, facts=facts, **roles)
    others = [of for of in RUNS[0].tables if of["kind"] in ("step", "memory")]
    readme = pages.readme([run_of(balance, *others)])
    assert "| T, P      | `balance_`   | LibMTL's expression   | …, memory kept   | tight eager   |" in readme
    assert "| 3, 11.2 M | 2 s          | 15 ×                  | 6.00 ×           | 1.50 ×        |" in readme
    assert "164,000 new" in readme
    lines = pages.page([run_of(balance)]).splitlines()
    (shown,) = [i for i, line in enumerate(lines) if line.startswith("| LibMTL's expression  ")]
    assert lines[shown].split("|")[2:6] == [" 30 s   ", " 15                  ", " 0.07            ", " 164,000       "]
    assert lines[shown + 1].startswith("| LibMTL's expression, memory kept | 12 s   | 6.00 ")
    without = table("balance", {name: of[name] for name in (COPY, LIBMTL, TIGHT, OWN)}, facts=facts, **roles)
    assert "new pages" not in " ".join(pages.readme([run_of(without, *others)]).split())


def test_those_with_memory_kept_stand_behind_their_likes() -> None:
    names = ["a", "b", kept("b"), kept("c"), kept("a")]
    assert results.paired(names) == ["a", kept("a"), "b", kept("b"), kept("c")]


def test_growth_says_whether_memory_was_kept() -> None:
    facts = {"T": 3, "P": 1000, "series": "P"}
    of = {COPY: candidate(1), TIGHT: candidate(2), OWN: candidate(4)}
    roles = {"copy": COPY, "ratio_to": OWN, "bytes_moved": 1}
    default, keeping = (table("growth", of, facts=facts | malloc, **roles) for malloc in ({}, {"malloc": "kept"}))
    assert "the kernel zeroes each" in pages.page([run_of(default)])
    assert "the kernel zeroes each" not in pages.page([run_of(keeping)])
    assert "what is freed is kept, so" in pages.page([run_of(keeping)])
    assert "At P = 1 k `balance_` takes 2.00 times as long as tight eager." in pages.page([run_of(keeping)])


def test_an_older_run_is_shown_as_such() -> None:
    found = RUNS[0].found
    old = Run("cpu_old", "results/cpu_old.json", {**found, "date": "2020-01-01", "commit": "0" * 40}, [], {})
    new = Run("cpu", "results/cpu.json", found, [], {})
    same = Run("cpu_same", "results/cpu_same.json", {**found, "date": "2020-01-01"}, [], {})
    assert pages.page([new, old]).count("An older run; tables that came later are not in it.") == 1
    assert "An older run" not in pages.page([new, same])


def test_ratios_are_formed_within_a_round_and_bars_end_at_the_tables_medians() -> None:
    facts = {"forward": "f", "one": "one", "own": "own"}
    of = {"copy": candidate(9, 9, 9), "f": candidate(1, 1, 1), "one": candidate(2, 2, 2), "floor": candidate(3, 30, 5)}
    of |= {"bare": candidate(4, 31, 7), "own": candidate(4, 32, 6)}
    step = table("step", of, facts=facts, floor="floor", ratio_to="bare", copy="copy", bytes_moved=4)
    (problem,) = figures.steps(run_of(step))["problems"].values()
    assert problem["bars"] == {
        "one": {"forward": 1e3, figures.UNBALANCED: 1e3},
        "floor": {"forward": 1e3, figures.UNBALANCED: 4e3},
        "bare": {"forward": 1e3, figures.UNBALANCED: 6e3},
        "own": {"forward": 1e3, figures.UP_TO: 4e3, figures.BEYOND: 1e3},
    }
    assert sum(problem["bars"]["own"].values()) == pytest.approx(1e3 * step.seconds("own"))
    assert step.ratio("own", "bare") == pytest.approx(1.0)


def test_what_was_not_measured_is_not_in_the_figure() -> None:
    of = {"floor": candidate(3), "bare": candidate(5), "own": candidate(4)}
    step = table("step", of, facts={"own": "own"}, floor="floor", ratio_to="bare", copy="copy", bytes_moved=4)
    (problem,) = figures.steps(run_of(step))["problems"].values()
    assert {phase for parts in problem["bars"].values() for phase in parts} == set(figures.PHASES) - {figures.FORWARD}


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


def test_a_bench_on_a_gpu_has_a_part_of_its_own(tmp_path: Path) -> None:
    content = json.loads((RESULTS / "cpu.json").read_text())
    (tmp_path / "cuda.json").write_text(json.dumps(content | {"device": "NVIDIA something"}))
    page = pages.page(results.load(tmp_path))
    assert "## NVIDIA something" in page
    assert "No GPU figures" not in page


def of_make_gpu(folder: Path, *arguments: str) -> list[Run]:
    """What is read back after a run of ``make gpu`` with figures that are made up, beside the CPU's."""
    shutil.copy(RESULTS / "cpu.json", folder)
    content = json.loads((RESULTS / "cpu.json").read_text())
    (folder / "gpu").mkdir()
    written = gpu.Report(gpu._parse([*arguments, "--out", str(folder / "gpu"), "--stages", ",".join(gpu.STAGES)]))
    stages = written.results
    stages["info"].data = {key: content[key] for key in ("date", "machine", "versions", "backend", "backends")}
    stages["info"].data |= {key: content[key] for key in ("commit", "dirty", "environment")}
    stages["info"].data |= {"device": {"name": "NVIDIA nothing", "l2_bytes": 1}}
    stages["suite"].status = "passed"
    stages["suite"].data = {"counts": {"passed": 7, "failed": 0, "skipped": 2}}

    def operator(title: str, kind: str = "") -> dict[str, Any]:
        samples = {"cudaMemcpyAsync": [Sample(0.9)], LIBMTL: [Sample(3.0)], "dbmtl_fused cuda": [Sample(1.0)]}
        bars = [Bar(f"{title}: dbmtl_fused cuda", 0.95, True, [0.9], "of copy")]
        errors = {"rtol": 1.0, "errors": {LIBMTL: 0.0, "dbmtl_fused cuda": 0.0}}
        roles: dict[str, Any] = {"copy": "cudaMemcpyAsync", "ratio_to": "dbmtl_fused cuda", "checks": errors}
        return Section(title, samples, bars, 1000, kind=kind, **roles).to_json()

    titles = [f"balance_ {of}, P=11.2M" for of in ("fp32, T=3", "fp32, T=31", "bf16 state and gradients, T=3")]
    titles.append("ema_update_ fp32, ResNet-50, 161 tensors, P=25.56M")
    host = Section("the host's time for a call", {"gram, cuda": [Sample(1e-6)]}, []).to_json()
    settings = {"failures": [], "left_out": ["combine, 16"]}
    sections = [*map(operator, titles), host, operator("grid: balance_ fp32, T=64, P=0.01M", "grid")]
    stages["operators"].data = {"sections": sections, "settings": settings}
    steps = [section for section in content["sections"] if section["kind"] == "step"]
    stages["steps"].data = content | {"sections": steps, "left_out": {"step: ViT": "too large"}}
    counted = counters.Report(3, 1_000_000)
    metrics: dict[str, float | None] = {counters.READ: 36e6, counters.WRITTEN: 12e6, counters.SECONDS: 2e-5}
    counted.add("cuda", [counters.Launch("balance_kernel", metrics), counters.Launch("other", {counters.READ: None})])
    stages["counters"].data = counted.to_json()
    stages["train"].text = "| method | s/epoch |\n|--------|---------|\n| DB-MTL | 12.3    |\n"
    written.write(finished=True)
    return results.load(folder)


def test_all_that_make_gpu_measured_is_shown(tmp_path: Path) -> None:
    cpu, on_gpu = of_make_gpu(tmp_path)
    assert (cpu.on_gpu, on_gpu.on_gpu) == (False, True)
    page, readme = pages.page([cpu, on_gpu]), pages.readme([cpu, on_gpu])
    for text in (page, readme):
        assert "No GPU figures" not in text
    part = page[page.index("## NVIDIA nothing") :]
    for heading in ("Bars", "Whole steps", "Operators", "Memory traffic", "Training", "Stages of `make gpu`"):
        assert f"### {heading}\n" in part
    assert "| cuda balance_ | 36.0   | 36.0    | 12.0      | 16.0    | 0.92            |           | 20 µs  |" in part
    assert "| cuda other    |        |         |           |         |                 |           |        |" in part
    assert "| DB-MTL | 12.3    |" in part
    assert "| suite     | passed  | 7 passed; 0 failed; 2 skipped |" in part
    assert "| combine, 16 | no time left |" in part
    assert "| step: ViT   | too large    |" in part
    assert "**the host's time for a call**" in part
    assert "| balance_ fp32, T=3, P=11.2M                        | 0.90               | 3.00 ×  " in readme
    assert "| balance_ fp32, T=64, P=0.01M | 0.90               | 3.00 ×" in part
    assert "T=31" not in readme
    assert "T=64" not in readme
    assert "bf16" not in readme
    (row,) = [line for line in readme.splitlines() if line.startswith("| 8x1024 MLP")]
    columns = ["", "step", "/ bare loop", *on_gpu.of_kind("step")[0]["checks"]["errors"]]  # but ours
    assert len(row.strip("| ").split("|")) == len(columns) - 1


def test_figures_of_a_gpu_are_of_few_operators(tmp_path: Path) -> None:
    shown = figures.of_run(of_make_gpu(tmp_path)[1])
    assert set(shown) == {"gpu-steps", "gpu-roofline"}
    assert [title[:14] for title in shown["gpu-roofline"]["problems"]] == ["balance_ fp32,", "ema_update_ fp"]
    assert {data["hardware"] for data in shown.values()} == {"NVIDIA nothing"}
    assert len(figures.draw(shown, tmp_path / "figures")) == 2


@pytest.mark.parametrize("arguments", [("--device", "cpu"), ("--device", "cpu", "--quick"), ("--quick",)])
def test_a_dry_run_of_make_gpu_is_no_measurement(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    (cpu,) = of_make_gpu(tmp_path, *arguments)
    assert "No GPU figures yet" in pages.page([cpu])


def test_a_run_of_make_gpu_that_does_not_say_where_is_not_shown(tmp_path: Path) -> None:
    of_make_gpu(tmp_path)
    path = tmp_path / "gpu" / "gpu.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"stages": [of for of in content["stages"] if of["name"] != "info"]}))
    assert [run.name for run in results.load(tmp_path)] == ["cpu"]


@pytest.mark.parametrize("text", ["nothing", f"{BEGIN}", f"{BEGIN} {END} {BEGIN} {END}"])
def test_a_readme_without_its_markers_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"^expected one '<!-- begin"):
        pages.between_markers(text, "content")


def test_what_stands_outside_the_markers_stays() -> None:
    once = pages.between_markers(f"before\n{BEGIN}\nold\n{END}\nafter\n", "new")
    assert once == f"before\n{BEGIN}\n\nnew\n\n{END}\nafter\n"
    assert pages.between_markers(once, "new") == once


def test_a_study_stands_between_its_own_markers() -> None:
    begin, end = (marker.format("studies/b") for marker in (pages.BEGIN, pages.END))
    of = [results.Study("b", "| found |\n", {})]
    page = pages.results_page(f"1\n{begin}\nold\n{end}\n2", of)
    assert page == f"1\n{begin}\n\n| found |\n\n{end}\n2"


def test_readme_says_what_the_studies_found() -> None:
    """Points of Δp, seeds averaged."""
    found = {study.name: study.content["results"] for study in STUDIES}

    def points(study: str, method: str) -> float:
        return statistics.fmean(of["delta_p"] for of in found[study][method])

    problems = ["digits", "qm9_slice"]
    ahead, behind = (
        [round(abs(points(study, "DB-MTL") - points(study, other))) for study in problems]
        for other in ("EW", "log only")
    )
    readme = (ROOT / "README.md").read_text().replace("\n", " ")
    assert f"ahead of equal weighting ({ahead[0]} and {ahead[1]} points of Δp)" in readme
    assert f"behind the log alone ({behind[0]} and {behind[1]} points)" in readme
    assert all(points(study, "DB-MTL") < points(study, "log only") for study in problems)
    assert max(abs(points("adult", method)) for method in found["adult"] if method != "EW") < 0.05
    leads = f"({points('qm9', 'DB-MTL'):.0f} points of Δp, the log alone {points('qm9', 'log only'):.0f})"
    assert f"on all of QM9 it leads {leads}" in readme


def test_training_curves_are_means_over_tasks() -> None:
    curves = {"EW": {"a": [4.0, 1.0], "b": [1.0, 0.01]}}
    shown = figures.training({"curves": curves, "steps_per_point": 5})
    assert shown["lines"] == {"EW": [2.0, 0.1]}
    assert shown["steps_per_point"] == 5


@pytest.mark.parametrize(
    ("value", "text"),
    [(2.5, "2.5 s"), (0.0123, "12.3 ms"), (4.56e-5, "45.6 µs"), (7e-9, "7 ns"), (-2e-3, "-2 ms"), (0.0, "0 ns")],
)
def test_seconds(value: float, text: str) -> None:
    assert pages.seconds(value) == text


def test_numbers() -> None:
    assert [pages.numbers(x) for x in (5, 100_000, 11_200_000, 10**9)] == ["5", "100 k", "11.2 M", "1 G"]


def test_drawing_writes_only_what_has_changed(tmp_path: Path) -> None:
    problem = {"own": "a", "bars": {"a": 1.0, "b": 0.5}}
    data = {"cpu-roofline": {"hardware": "a machine", "problems": {"title": problem}}}
    assert figures.draw(data, tmp_path) == [tmp_path / "cpu-roofline.png"]
    assert figures.draw(data, tmp_path) == []
    problem["bars"] = {"a": 1.0, "b": 0.6}
    assert figures.draw(data, tmp_path) == [tmp_path / "cpu-roofline.png"]
