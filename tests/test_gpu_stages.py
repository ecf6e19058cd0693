"""What the later stages of ``make gpu`` are made of: counters read from ncu, and the training runs on QM9."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tqdm import tqdm

sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks import (
    bench_step,
    counters,
    counters_driver,
    cuda_tools,
    gpu,
    gpu_merge,
    qm9_folder,
    report,
    run,
    steps,
    train,
)
from benchmarks.counters import HIT_RATE, READ, SECONDS, WRITTEN, Launch
from benchmarks.models import Size
from benchmarks.molecule_model import ELEMENTS, GEOMETRY, TARGETS, Molecules
from benchmarks.plan import LeftOut, Options, Table

ROOT = Path(__file__).resolve().parent.parent


def options(tmp_path: Path, *arguments: str) -> gpu.Options:
    return gpu._parse(["--out", str(tmp_path), *arguments])


# --- Counters

HEAD = (
    '"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device",'
    '"CC","Section Name","Metric Name","Metric Unit","Metric Value"'
)


def line(number: int, kernel: str, metric: str, unit: str, value: str) -> str:
    """As ncu prints it."""
    launch = f'"{number}","4711","python3.12","127.0.0.1","{kernel}","1","7","(512, 1, 1)","(132, 1, 1)","0","9.0"'
    return f'{launch},"Command line profiler metrics","{metric}","{unit}","{value}"'


OUTPUT = "\n".join(
    [
        "==PROF== Connected to process 4711 (/usr/bin/python3.12)",
        '==PROF== Profiling "combine_kernel" - 0: 0%....50%....100% - 2 passes',
        '==PROF== Profiling "vectorized_elementwise_kernel" - 1: 0%....50%....100% - 2 passes',
        "==PROF== Disconnected from process 4711",
        HEAD,
        line(0, "combine_kernel", READ, "byte", "134,118,144"),
        line(0, "combine_kernel", WRITTEN, "Mbyte", "44.7"),
        line(0, "combine_kernel", HIT_RATE, "%", "12.5"),
        line(0, "combine_kernel", SECONDS, "nsecond", "1,234"),
        line(1, "vectorized_elementwise_kernel", READ, "byte", "n/a"),
        line(1, "vectorized_elementwise_kernel", SECONDS, "us", "2.5"),
        "==WARNING== Something else.",
    ]
)
"""Of two launches, in two kinds of units."""


def test_counters_are_read_from_what_ncu_prints() -> None:
    combine, other = counters.launches(OUTPUT)
    assert (combine.kernel, combine.operator) == ("combine_kernel", "combine")
    assert combine.metrics[SECONDS] == pytest.approx(1.234e-6)
    assert [combine.metrics[name] for name in (READ, WRITTEN, HIT_RATE)] == [134_118_144, 44.7e6, 12.5]
    assert other.operator == ""
    assert other.metrics == {READ: None, SECONDS: pytest.approx(2.5e-6)}


def test_what_is_no_table_holds_no_counters() -> None:
    assert counters.launches("==WARNING== No kernels were profiled.\n") == []


def test_an_unknown_unit_is_no_number() -> None:
    with pytest.raises(ValueError, match=r"ncu's unit must be one of %, byte, .*, got 'furlong'"):
        counters.launches(f"{HEAD}\n{line(0, 'combine_kernel', READ, 'furlong', '1')}")


@pytest.mark.parametrize(
    ("kernel", "operator"),
    [
        ("void dbmtl_fused::begin_step_kernel<float, float>(BeginStep<float, float>)", "begin_step"),
        ("balance_kernel", "balance_"),
        ("void dbmtl_fused::ema_update_kernel<float>(Parameters<float>)", "ema_update_"),
        ("combine_kernel", "combine"),
        ("gram_kernel", "gram"),
        ("vectorized_elementwise_kernel", ""),
    ],
)
def test_kernels_belong_to_operators(kernel: str, operator: str) -> None:
    assert Launch(kernel).operator == operator


def test_the_driver_calls_every_operator(capsys: pytest.CaptureFixture[str]) -> None:
    assert counters_driver.main(["--backend", "reference", "--device", "cpu", "--quick"]) == 0
    operators = ["begin_step", "balance_", "ema_update_", "combine", "gram"]
    assert capsys.readouterr().out.split("\n")[:6] == [*operators, counters.DONE]
    found = counters.Report(3, 1000)
    kernels = [f"{operator.removesuffix('_')}_kernel" for operator in operators]
    found.add("cuda", [Launch(kernel, {READ: 1.0, WRITTEN: 1.0}) for kernel in kernels])
    assert [row["operator"] for row in found.rows] == operators
    assert [row["model_read"] for row in found.rows] == [24, 36_000, 8_000, 12_000, 12_000]
    assert counters_driver.main(["--backend", "cuda", "--device", "cpu", "--quick"]) == 0
    assert capsys.readouterr().out.startswith(counters.NOT_HERE)
    assert counters_driver.T * 4 * counters_driver.shapes.numbers(counters_driver.PARAMS) > 100_000_000


PERMISSION = "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission to access NVIDIA GPU Performance Counters"
NOT_LOADED = "==ERROR== Failed to initialize the profiler: LibraryNotLoaded"


@pytest.mark.parametrize("said", [PERMISSION, NOT_LOADED])
def test_what_keeps_ncu_from_the_counters_is_named(said: str) -> None:
    assert counters.refusal(f"balance_\n{said}\n") == f"ncu: {said.strip('= ')}"
    assert counters.refusal(OUTPUT) == ""
    assert counters.refusal(f"{counters.NOT_HERE}no _C_cuda\n") == "no _C_cuda"


@pytest.fixture
def ncu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program in place of ncu, the only one on the PATH; a test fills it."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(cuda_tools, "FOLDERS", ())
    monkeypatch.delenv("CUDA_HOME", raising=False)
    return folder / "ncu"


def fill(ncu: Path, code: str) -> None:
    ncu.write_text(f"#!{sys.executable} -S\nimport sys\narguments = sys.argv\n{code}\n")
    ncu.chmod(0o755)


WATCH = f"""
open(arguments[arguments.index("--log-file") + 1], "w").write({OUTPUT!r})
print({counters.DONE!r})
"""


def report_counters(out: Path) -> tuple[int, dict[str, Any], str]:
    """Exit code, and what is left for ``make gpu``."""
    code = counters.main(["--device", "cuda", "--out", str(out / "counters.json")])
    return code, json.loads((out / "counters.json").read_text()), (out / "counters.txt").read_text()


def test_counters_stand_beside_the_byte_model(ncu: Path, tmp_path: Path) -> None:
    fill(ncu, WATCH)
    code, data, text = report_counters(tmp_path)
    assert code == 0
    assert [(row["backend"], row["operator"]) for row in data["launches"]] == [
        (backend, operator) for backend in ("cuda", "triton") for operator in ("combine", "")
    ]
    combine = data["launches"][0]
    assert (combine["model_read"], combine["model_written"]) == (12 * data["P"], 4 * data["P"])
    assert f"{(134_118_144 + 44.7e6) / (16 * data['P']):.2f}" in text
    assert gpu._not_shown(data) == (False, "")
    command = counters.OPTIONS
    assert command[command.index("--cache-control") + 1] == command[command.index("--clock-control") + 1] == "none"


def test_where_ncu_may_not_watch_nothing_fails(ncu: Path, tmp_path: Path) -> None:
    fill(ncu, f"print({PERMISSION!r}); raise SystemExit(1)")
    code, data, text = report_counters(tmp_path)
    assert code == 0
    assert gpu._not_shown(data) == (True, f"ncu: {PERMISSION.strip('= ')}")
    assert "ERR_NVGPUCTRPERM" in text


def test_where_ncu_is_missing_nothing_fails(ncu: Path, tmp_path: Path) -> None:
    code, data, _ = report_counters(tmp_path)
    assert code == 0
    assert gpu._not_shown(data) == (True, "ncu is neither on the PATH nor in CUDA's folders")


def test_one_backend_that_is_missing_is_named_beside_the_other(ncu: Path, tmp_path: Path) -> None:
    fill(ncu, f"if 'triton' in arguments: print('{counters.NOT_HERE}no Triton'); raise SystemExit\n{WATCH}")
    code, data, text = report_counters(tmp_path)
    assert code == 0
    assert {row["backend"] for row in data["launches"]} == {"cuda"}
    assert "left out, triton: no Triton" in text
    assert gpu._not_shown(data) == (False, "left out: triton, no Triton")


@pytest.mark.parametrize(
    "code", ["print('out of memory'); raise SystemExit(3)", f"print({counters.DONE!r})", WATCH.replace("print", "str")]
)
def test_what_ends_early_or_counts_nothing_has_failed(ncu: Path, tmp_path: Path, code: str) -> None:
    fill(ncu, code)
    status, data, text = report_counters(tmp_path)
    assert status == 1
    assert len(data["failures"]) == 2
    assert "FAILED cuda: exit code" in text


# --- Training


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    """The command sets their number."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def qm9() -> ModuleType:
    """``examples/qm9.py`` as a module."""
    spec = importlib.util.spec_from_file_location("qm9", ROOT / "examples" / "qm9.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["qm9"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """78 made-up molecules of 2 to 6 atoms."""
    random = np.random.default_rng(0)
    sizes = random.integers(2, 7, 78, dtype=np.uint8)
    elements = random.choice(np.array(ELEMENTS, dtype=np.uint8), sizes.sum())
    positions = random.integers(-2000, 2000, (sizes.sum(), 3), dtype=np.int16)
    scales = 10.0 ** np.arange(-5, 6)
    y = (scales * (3 + random.standard_normal((len(sizes), 11)))).astype(np.float32)
    folder = tmp_path / "molecules"
    folder.mkdir()
    np.savez(folder / GEOMETRY, n_atoms=sizes, Z=elements, pos_milliA=positions)
    np.savez(folder / TARGETS, y=y)
    return folder


def molecules(qm9: ModuleType, data: Path, epochs: int = 2) -> Any:
    settings = qm9.Settings(epochs, 11, 1e-3, 0, torch.device("cpu"), record_every=0)
    return qm9.load_molecules(data, 78, 4, settings)


def test_molecules_are_split_and_standardised_by_those_to_train_on(qm9: ModuleType, data: Path) -> None:
    of = molecules(qm9, data)
    train, validation, test = of.problem.train, of.validation, of.problem.test
    assert (len(train), len(validation), len(test)) == (66, 6, 6)
    assert of.steps == 12
    for target in train.targets.values():
        assert abs(target.mean().item()) < 1e-5
        assert target.std().item() == pytest.approx(1, rel=1e-5)
    everything = torch.cat([split.inputs for split in (train, validation, test)])
    assert len(everything.unique(dim=0)) == 78
    assert qm9.MOLECULES - 2 * (qm9.MOLECULES // qm9.HELD_OUT) == 110_000


def test_errors_are_in_the_targets_unit_and_of_all_molecules(
    qm9: ModuleType, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qm9, "PIECE", 4)
    of = molecules(qm9, data)
    model = qm9.initial_model(of.problem, of.problem.tasks, of.settings)
    found = qm9.errors(model, of.problem.tasks, of.validation)
    _, _, y = qm9.shuffled(data, 78, 0)
    with torch.no_grad():
        predictions = model(of.validation.inputs)
    for column, (name, error) in enumerate(found.items()):
        raw = y[:66, column].mean() + y[:66, column].std(ddof=1) * predictions[name].numpy()
        assert error == pytest.approx(np.abs(raw - y[66:72, column]).mean(), rel=1e-4)


def test_differences_are_those_of_the_worst_task_and_step(qm9: ModuleType) -> None:
    first = torch.ones(120, 2)
    second = first.clone()
    second[5, 1], second[50, 0], second[110, 1] = 2.0, 4.0, 8.0
    found = qm9.differences(first, second, per_epoch=60)
    assert list(found) == ["first 10 steps", "first 100 steps", "all 120 steps", "means of an epoch"]
    assert list(found.values()) == pytest.approx([1 / 2, 3 / 4, 7 / 8, 1 - 60 / 67])


def test_a_tiny_comparison(qm9: ModuleType, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    size = ["--molecules", "78", "--epochs", "3", "--batch-size", "11", "--width", "4"]
    assert qm9.main(["--data", str(data), *size, "--out", str(out)]) == 0
    text = (out / "results.md").read_text(encoding="utf-8")
    assert text.strip() in capsys.readouterr().out
    assert text.startswith("`python examples/qm9.py --data molecules --molecules 78")
    assert "balancing's share" not in text
    assert sorted(path.name for path in out.iterdir()) == ["results.json", "results.md"]
    found = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert str(tmp_path) not in json.dumps(found)
    names = ["EW", "log only", "magnitude only", "DB-MTL", qm9.THROUGH_LIBMTL]
    assert list(found["results"]) == list(found["curves"]) == list(found["validation"]) == names
    assert found["results"]["EW"][0]["delta_p"] == 0
    assert (found["steps"], found["steps_per_epoch"], found["seed"]) == (18, 6, 0)
    assert {"versions", "commit", "backend"} <= found["environment"].keys()
    assert all(len(curve) == 18 for of in found["curves"].values() for curve in of.values())
    # Equal up to roundings, which other methods are not.
    apart = found["differences"]["DB-MTL and LibMTL"]
    assert 0 <= max(apart.values()) < 1e-4
    assert max(found["differences"]["DB-MTL twice"].values()) == 0
    curves = [torch.tensor(list(found["curves"][name].values())) for name in ("magnitude only", "DB-MTL")]
    assert ((curves[0] - curves[1]) / curves[1]).abs().max() > 1e-4


@pytest.mark.parametrize("budget", [500.0, 20_000.0])
def test_time_limits_the_steps_of_all(
    qm9: ModuleType, data: Path, monkeypatch: pytest.MonkeyPatch, budget: float
) -> None:
    of = molecules(qm9, data, epochs=1000)
    seconds = {name: 1.0 + index for index, name in enumerate(qm9.BALANCERS)}

    def timed(_: Any, name: str, steps: int, *rest: Any) -> Any:
        return qm9.Trained(torch.nn.Module(), torch.empty(0), steps * seconds[name], "")

    monkeypatch.setattr(qm9, "train", timed)
    monkeypatch.setattr(qm9, "time", SimpleNamespace(monotonic=lambda: 100.0))
    with tqdm(disable=True) as bar:
        steps = qm9.steps_that_fit(of, 100.0 + budget, bar)
        assert qm9.steps_that_fit(of, 1e9, bar) == of.steps
        assert qm9.steps_that_fit(of, 0.0, bar) == 1
    # The fourth trains again, its first 100 steps.
    needed, next_step = steps * 15 + min(steps, 100) * 4, 15 + 4
    assert needed <= qm9.PILOT_SHARE * budget < needed + next_step


def test_a_folder_without_qm9_is_refused(qm9: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        qm9.main(["--data", str(tmp_path)])
    assert f"--data must be a folder with {GEOMETRY} and {TARGETS}" in capsys.readouterr().err


# --- The stages


def test_training_without_qm9_is_skipped_aloud(tmp_path: Path) -> None:
    arguments = ["--device", "cpu", "--quick", "--stages", "train", "--data", str(tmp_path / "nowhere")]
    assert gpu.main([*arguments, "--out", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "gpu.json").read_text())
    (stage,) = content["stages"]
    assert stage["status"] == gpu.SKIPPED
    assert stage["reason"].startswith(f"needs QM9: {GEOMETRY} and {TARGETS} in data/qm9")
    assert "needs QM9" in (tmp_path / "gpu.txt").read_text()
    assert "data" not in content["settings"]


def test_training_leaves_its_report_where_it_is_looked_for(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = ("--molecules", "78", "--epochs", "1", "--batch-size", "33", "--width", "2")
    monkeypatch.setattr(train, "QUICK", size)
    result = gpu.Result("train", "trains")
    arguments = ["--data", str(data), "--device", "cpu", "--quick", "--out", str(tmp_path / "train.json")]
    assert train.main(arguments) == 0
    gpu._read(result, tmp_path)
    assert result.data["steps"] == 2
    assert "Δp" in result.text


def test_stages_are_given_the_data_and_their_time(tmp_path: Path) -> None:
    given = options(tmp_path, "--device", "cpu", "--data", str(tmp_path))
    for name in ("steps", "train"):
        command = gpu.STAGES[name].command(gpu.Context(given, tmp_path, 100.0))
        assert command[command.index("--data") + 1] == str(tmp_path)
        assert command[command.index("--seconds") + 1] == "70"
    command = gpu.STAGES["counters"].command(gpu.Context(given, tmp_path, 100.0))
    assert command[command.index("--seconds") + 1] == "85"


def test_data_are_looked_for_in_the_checkout_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = tmp_path / "data", tmp_path / "shared"
    monkeypatch.setattr(qm9_folder, "FOLDERS", folders)
    assert options(tmp_path).data == folders[0]
    folders[1].mkdir()
    assert options(tmp_path).data == folders[1]
    folders[0].mkdir()
    assert options(tmp_path).data == folders[0]
    (molecules,) = [case.problem for case in bench_step.cases(STEPS) if isinstance(case.problem, Molecules)]
    assert molecules.data == folders[0]
    assert gpu._without_paths(f"--data {folders[1]}", tmp_path / "scratch") == "--data ../shared/data/qm9"


def test_whole_steps_in_graphs_are_part_of_the_soak(tmp_path: Path) -> None:
    command = gpu.STAGES["soak"].command(gpu.Context(options(tmp_path), tmp_path, 100.0))
    assert str(ROOT / "tests" / "test_gpu_graph.py") in command


# --- Whole steps

STEPS = Options(torch.device("cpu"), rounds=1, quick=False, threads=1, compiled=False, data=None)


def test_a_table_that_fails_takes_no_other_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails() -> report.Section:
        raise torch.cuda.OutOfMemoryError("out of memory")

    def left_out() -> report.Section:
        raise LeftOut("needs QM9")

    right = report.Section("third", {}, [])
    todo = [Table("first", fails), Table("second", left_out), Table("third", lambda: right)]
    out = tmp_path / "steps.json"
    arguments = ["step", "--device", "cpu", "--threads", "1", "--out", str(out)]
    for tables, status in ((todo, 1), (todo[1:], 0)):
        monkeypatch.setattr(run, "tables", lambda what, options, tables=tables: iter(tables))
        assert run.main(arguments) == status
        content = json.loads(out.read_text())
        assert [section["title"] for section in content["sections"]] == ["third"]
        failed = {"first": "failed: OutOfMemoryError: out of memory"} if status else {}
        assert content["left_out"] == {**failed, "second": "needs QM9"}
    assert "OutOfMemoryError: out of memory" in capsys.readouterr().out


def test_the_greediest_steps_give_way_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = ["forward alone", steps.OURS, steps.LIBMTL, "TorchJD, vmap", "TorchJD UPGrad", "torch ops, flatten"]
    problem = Size(depth=2, width=64, tasks=5, batch=8)
    few = ["forward alone", steps.OURS, "torch ops, flatten"]
    sizes = bench_step._bytes(kinds, problem), bench_step._bytes([*few, *kinds[3:5]], problem)
    for free, left_out in (
        (sizes[0], []),
        (sizes[0] - 1, kinds[2:3]),
        (sizes[1], kinds[2:3]),
        (sizes[1] - 1, kinds[2:5]),
        (0, kinds[2:5]),
    ):
        monkeypatch.setattr(bench_step, "free_bytes", lambda device, free=free: free)
        assert bench_step._too_large(kinds, problem, torch.device("cpu")) == left_out


def test_a_step_beyond_the_memory_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Size(depth=1, width=8, tasks=2, batch=2)
    case = bench_step.Case(problem, problem, rounds=1)
    monkeypatch.setattr("benchmarks.plan.free_bytes", lambda device: 0.0)
    with pytest.raises(LeftOut, match=r"^needs .* GB of memory"):
        bench_step._case(case, STEPS)


# --- Several reports


def report_of(folder: Path, commit: str | None, **logs: str) -> str:
    """Write a report as ``make gpu`` does."""
    info = {"commit": commit, "dirty": False, "device": {"name": "a GPU"}}
    stages = [{"name": "info", "command": "python3 -m benchmarks.gpu_info", "data": info, "log": ""}]
    stages += [
        {"name": name, "command": "" if log == "" else name, "data": None, "log": log} for name, log in logs.items()
    ]
    folder.mkdir()
    content = {"started": folder.name, "written": folder.name, "finished": True, "stages": stages}
    (folder / "gpu.json").write_text(json.dumps(content))
    (folder / "gpu.txt").write_text(f"text of {folder.name}\n")
    return str(folder)


def test_reports_of_several_calls_become_one(tmp_path: Path) -> None:
    first = report_of(tmp_path / "1", "abc", build="first", operators="first", steps="")
    second = report_of(tmp_path / "2", "abc", build="second", counters="second", operators="")
    assert gpu_merge.main([first, second, "--out", str(tmp_path / "out")]) == 0
    content = json.loads((tmp_path / "out" / "gpu.json").read_text())
    found = {stage["name"]: stage["log"] for stage in content["stages"]}
    assert found == {"build": "second", "info": "", "operators": "first", "counters": "second"}
    assert list(found) == [name for name in gpu.STAGES if name in found]
    assert (content["started"], content["written"]) == ("1", "2")
    assert (tmp_path / "out" / "gpu.txt").read_text() == "text of 1\n\ntext of 2\n"


@pytest.mark.parametrize("commits", [["abc", "def"], [None, None], ["abc", None]])
def test_reports_of_two_commits_or_of_an_unknown_one_stay_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], commits: list[str | None]
) -> None:
    folders = [report_of(tmp_path / str(i), commit, build="ran") for i, commit in enumerate(commits)]
    with pytest.raises(SystemExit):
        gpu_merge.main([*folders, "--out", str(tmp_path / "out")])
    assert "reports must all be of one commit and GPU" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
