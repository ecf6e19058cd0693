"""``make gpu`` without a GPU: its dry run, its reports when stages fail, and the arithmetic behind its figures."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import shutil
import subprocess
import sys
import textwrap
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks import (
    bandwidth,
    bench_gpu_ops,
    comparators,
    cuda_tools,
    gpu,
    gpu_info,
    gpu_lists,
    gpu_problems,
    gpu_tables,
    graph_timing,
    sanitize,
    sanitize_driver,
    shapes,
)
from benchmarks.gpu import CUT_OFF, FAILED, PASSED, SKIPPED, Context, Stage
from benchmarks.gpu_problems import BF16_GRADS, BF16_STATE, FP32, Exact, Matrices
from benchmarks.graph_timing import GraphTimer, SlopeTimer
from benchmarks.timing import Sample

ROOT = Path(__file__).resolve().parent.parent


def numbers(of: Sequence[shapes.Shape]) -> int:
    return sum(torch.Size(shape).numel() for shape in of)


def read(out: Path) -> dict[str, Any]:
    return json.loads((out / "gpu.json").read_text())


def stages(out: Path) -> dict[str, dict[str, Any]]:
    return {stage["name"]: stage for stage in read(out)["stages"]}


# --- The whole command


def test_a_dry_run_goes_through_all_stages_and_reports(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tests = "tests/test_layout.py -k 'not sparse'"
    arguments = ["--device", "cpu", "--quick", "--stages", "info,parity,suite,operators", "--tests", tests]
    code = gpu.main([*arguments, "--out", str(tmp_path)])
    assert code == 0, capfd.readouterr().out

    written, found = read(tmp_path), stages(tmp_path)
    assert written["finished"]
    assert written["settings"]["quick"]
    assert [stage["status"] for stage in found.values()] == [PASSED] * 4
    assert list(found) == ["info", "parity", "suite", "operators"]
    assert {"commit", "dirty", "versions", "why_not", "packages"} <= found["info"]["data"].keys()
    assert "all right" in found["parity"]["log"]
    counts = found["suite"]["data"]["counts"]
    assert counts["passed"] > 0
    assert counts["failed"] == 0

    operators = found["operators"]["data"]
    assert operators["settings"]["failures"] == []
    titles = [section["title"].split(" ")[0] for section in operators["sections"]]
    assert {"balance_", "begin_step", "combine", "ema_update_", "gram", "grid:", "lists", "the"} == set(titles)
    balance = operators["sections"][0]
    others = {"LibMTL's expression", "torch._foreach", "tight eager"}
    assert {gpu_problems.MEMCPY, "dbmtl_fused reference", *others} <= set(balance["candidates"])
    assert all(len(of["samples"]) == operators["settings"]["rounds"] for of in balance["candidates"].values())
    assert any("skipped, as they need a GPU" in note for note in balance["notes"])

    text = (tmp_path / "gpu.txt").read_text()
    assert all(name in text for name in (*found, "skipped, as they need a GPU", balance["title"]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu.json", "gpu.txt"]


def test_stages_that_need_a_gpu_are_skipped_aloud_in_a_dry_run(tmp_path: Path) -> None:
    assert gpu.main(["--device", "cpu", "--stages", "soak,sanitizer", "--out", str(tmp_path)]) == 0
    found = stages(tmp_path)
    assert [stage["status"] for stage in found.values()] == [SKIPPED, SKIPPED]
    assert "DBMTL_FUSED_TEST_DEVICE is not cuda" in found["soak"]["reason"]
    assert found["soak"]["data"]["counts"]["skipped"] > 5
    assert found["sanitizer"]["reason"] == "needs a GPU"
    assert found["sanitizer"]["data"]["counts"] == {"passed": 0, "failed": 0, "skipped": len(sanitize.CHECKS)}
    text = (tmp_path / "gpu.txt").read_text()
    assert "skipped, needs a GPU: 5, such as compute-sanitizer::memcheck, cuda" in text


def test_the_suite_of_a_dry_run_tests_operators_emulated_kernels_among_them(tmp_path: Path) -> None:
    environment = gpu.STAGES["suite"].environment
    dry = options(tmp_path, "--device", "cpu", "--quick")
    assert all("/tests/test_" in test and Path(test).exists() for test in gpu.suite_tests(dry))
    assert ("DBMTL_FUSED_TEST_CUDA_EMU" in environment(dry)) == (shutil.which("g++") is not None)
    for arguments in (["--device", "cpu"], ["--quick"], ["--device", "cpu", "--quick", "--tests", "some"]):
        assert "DBMTL_FUSED_TEST_CUDA_EMU" not in environment(options(tmp_path, *arguments))


@pytest.mark.parametrize("dry", [["--device", "cpu"], ["--quick"]])
def test_a_dry_run_leaves_nothing_among_the_results(
    dry: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("OUT", raising=False)
    assert gpu._parse([]).out == gpu.DEFAULT_OUT == ROOT / "benchmarks" / "results" / "gpu"
    assert gpu._parse(dry).out == ROOT / "build" / "gpu-dry"
    with pytest.raises(SystemExit):
        gpu._parse([*dry, "--out", str(gpu.DEFAULT_OUT)])
    assert "--out must not be benchmarks/results/gpu in a dry run" in capsys.readouterr().err
    monkeypatch.setenv("OUT", "/elsewhere")
    assert gpu._parse([]).out == gpu._parse(dry).out == Path("/elsewhere")


def test_all_stages_in_their_order(tmp_path: Path) -> None:
    assert options(tmp_path, "--stages", "all").stages == tuple(gpu.STAGES)


@pytest.mark.parametrize(("processors", "workers"), [(16, 14), (2, 1), (None, 1)])
def test_the_suite_leaves_two_processors(
    processors: int | None, workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: processors)
    assert options(tmp_path).workers == workers


@pytest.fixture
def stage_table(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Stages that run a line of Python each; a test fills it before it calls ``run``."""
    programs: dict[str, str] = {}

    def command(name: str) -> Any:
        return lambda context: [sys.executable, "-c", programs[name].format(out=context.options.out)]

    table = {name: Stage(name, f"the {name} one", command(name), limit=30, reserve=1) for name in ("a", "b", "c")}
    monkeypatch.setattr(gpu, "STAGES", table)
    monkeypatch.setattr(gpu, "_INTERRUPTED_SECONDS", 0.5)
    return programs


def run(out: Path, *arguments: str) -> int:
    return gpu.main(["--device", "cpu", "--stages", "a,b,c", "--out", str(out), *arguments])


STATUS_OF_A = "import json; a = json.load(open('{out}/gpu.json'))['stages'][0]; print(a['status'], *a['log'].split())"


@pytest.mark.parametrize(
    ("program", "reason"),
    [("raise SystemExit(3)", "exit code 3"), ("import os; os.abort()", "killed by SIGABRT")],
)
def test_a_stage_that_fails_is_reported_at_once_and_the_rest_runs(
    stage_table: dict[str, str], tmp_path: Path, program: str, reason: str
) -> None:
    stage_table.update(a=f"print('so far', flush=True); {program}", b=STATUS_OF_A, c="pass")
    assert run(tmp_path) == 1
    found = stages(tmp_path)
    assert (found["a"]["status"], found["a"]["reason"]) == (FAILED, reason)
    assert "so far" in found["a"]["log"]
    assert found["b"]["log"].startswith("failed so far")  # the report that lay there when the second stage ran
    assert [found[name]["status"] for name in "bc"] == [PASSED, PASSED]


def test_a_stage_that_hangs_is_cut_off_with_all_it_started(
    stage_table: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "_REWRITE_SECONDS", 0.1)
    monkeypatch.setattr(gpu, "_LEAST_SECONDS", 0.0)
    stage_table.update(
        a="import signal, subprocess, time; signal.signal(signal.SIGINT, signal.SIG_IGN); "
        "child = subprocess.Popen(['sleep', '60']); print(child.pid, flush=True); time.sleep(60)",
        b=STATUS_OF_A,
        c="pass",
    )
    monkeypatch.setitem(gpu.STAGES, "a", Stage("a", "hangs", gpu.STAGES["a"].command, limit=2, reserve=1))
    assert run(tmp_path) == 1
    found = stages(tmp_path)
    assert (found["a"]["status"], found["a"]["reason"]) == (CUT_OFF, "reached its limit of 2 s")
    assert found["b"]["log"].startswith("cut off")
    state = Path(f"/proc/{int(found['a']['log'])}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"
    assert found["c"]["status"] == PASSED


def test_a_running_stage_is_in_the_report(
    stage_table: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "_REWRITE_SECONDS", 0.1)
    stage_table.update(a=f"import time; print('begun', flush=True); time.sleep(1); {STATUS_OF_A}", b="pass", c="pass")
    assert run(tmp_path) == 0
    assert stages(tmp_path)["a"]["log"] == "begun\nrunning begun\n"


def test_stages_without_time_are_skipped_aloud(stage_table: dict[str, str], tmp_path: Path) -> None:
    stage_table.update(a="pass", b="pass", c="pass")
    assert run(tmp_path, "--minutes", "0.1") == 1
    found = stages(tmp_path)
    assert [stage["status"] for stage in found.values()] == [SKIPPED, SKIPPED, PASSED]
    assert found["a"]["reason"] == "no time left: give more --minutes, or fewer --stages"
    assert "no time left" in (tmp_path / "gpu.txt").read_text()


def test_the_first_stage_has_its_time_where_there_is_not_enough_for_all(
    stage_table: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage_table.update(a="pass", b="pass", c="pass")
    for name in stage_table:
        monkeypatch.setitem(gpu.STAGES, name, dataclasses.replace(gpu.STAGES[name], reserve=30))
    run(tmp_path, "--minutes", "0.3")
    found = stages(tmp_path)
    assert found["a"]["status"] == PASSED
    assert found["a"]["limit"] == pytest.approx(18, abs=2)


def test_a_build_that_setup_py_gave_up_is_a_failure(
    stage_table: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage_table.update(a="pass", b="pass", c="pass")
    build = Stage("a", "builds", gpu.STAGES["a"].command, 30, 1, complaint=lambda options: "no compiler")
    monkeypatch.setitem(gpu.STAGES, "a", build)
    assert run(tmp_path) == 1
    assert stages(tmp_path)["a"]["reason"] == "no compiler"


def test_an_unknown_stage_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path), "--stages", "info,sute"])
    names = "build, info, parity, suite, soak, operators, sanitizer, counters, steps, train, sweep"
    assert f"--stages must be among {names}, got sute" in capsys.readouterr().err


def test_make_gpu_runs_the_command_with_the_active_python() -> None:
    command = ["make", "--dry-run", "gpu", "OUT=some/folder", "ARGS=--quick"]
    # The tests may have been started by make, which tells those below it about itself.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    shown = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    assert shown == "python3 -m benchmarks.gpu --out some/folder --quick\n"
    environment.pop("OUT", None)
    command.remove("OUT=some/folder")  # the program knows better where a dry run belongs
    shown = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    assert shown.split() == ["python3", "-m", "benchmarks.gpu", "--quick"]


def test_stages_are_told_the_commit(
    stage_table: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage_table.update(a="import os; print(os.environ.get('DBMTL_FUSED_COMMIT'))", b="pass", c="pass")
    monkeypatch.delenv(gpu.COMMIT, raising=False)
    for arguments, said in (([], "None\n"), (["--commit", "abc"], "abc\n")):
        assert run(tmp_path, *arguments) == 0
        assert stages(tmp_path)["a"]["log"] == said
    monkeypatch.setenv(gpu.COMMIT, "def")
    assert options(tmp_path, "--stages", "a").commit == "def"


def test_the_commit_is_git_s_or_what_was_told(monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, Any] = {"commit": "of git", "dirty": True}
    devices = []
    monkeypatch.setattr(gpu_info.report, "environment", lambda threads, device: devices.append(device) or dict(found))
    monkeypatch.setenv(gpu.COMMIT, "told")
    device = torch.device("meta")
    assert gpu_info.environment(device) == found
    found |= {"commit": None, "dirty": False}
    assert gpu_info.environment(device) == {"commit": "told", "dirty": None}
    assert devices == [device, device]


def test_clocks_are_read_under_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_info, "nvidia_smi", lambda device: {"on": str(device)})
    with gpu_info.sampled(torch.device("cuda"), seconds=0.01) as found:
        deadline = time.monotonic() + 10
        while len(found) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert found[:2] == [{"on": "cuda"}] * 2
    count = len(found)
    time.sleep(0.05)
    assert len(found) == count
    with gpu_info.sampled(torch.device("cpu"), seconds=0.0) as found:
        time.sleep(0.05)
    assert found == []


def test_programs_of_cuda_are_found_beside_the_path(
    system: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_HOME", raising=False)
    assert cuda_tools.find("ncu") is None
    for version in ("2024.1", "2025.3"):
        (tmp_path / "nsight" / version).mkdir(parents=True)
        program(tmp_path / "nsight" / version, "ncu", "")
    monkeypatch.setattr(cuda_tools, "FOLDERS", (str(tmp_path / "nsight" / "*"),))
    assert cuda_tools.find("ncu") == str(tmp_path / "nsight" / "2025.3" / "ncu")
    (tmp_path / "cuda" / "bin").mkdir(parents=True)
    program(tmp_path / "cuda" / "bin", "ncu", "")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    assert cuda_tools.find("ncu") == str(tmp_path / "cuda" / "bin" / "ncu")
    program(system, "ncu", "")
    assert cuda_tools.find("ncu") == str(system / "ncu")


# --- What stages are made of


def options(tmp_path: Path, *arguments: str) -> gpu.Options:
    return gpu._parse(["--out", str(tmp_path), *arguments])


def test_the_tree_holds_the_package_as_it_would_be_installed(tmp_path: Path) -> None:
    tree = gpu.importable_tree(tmp_path)
    assert gpu.importable_tree(tmp_path) == tree  # again, for the next stage
    names = {
        "dbmtl_fused": "dbmtl_fused/__init__.py",
        "dbmtl_fused.triton_kernels": "dbmtl_fused/triton_kernels/__init__.py",
        "benchmarks.gpu": "benchmarks/gpu.py",
    }
    code = f"import importlib.util as u; print(*(u.find_spec(name).origin for name in {[*names]}), sep='\\n')"
    environment = gpu._environment(tree, options(tmp_path, "--device", "cpu"))
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=True).stdout
    assert found.splitlines() == [str(tree / path) for path in names.values()]


def test_the_suite_has_the_tests_of_operators_and_balancer_the_most_telling_first(tmp_path: Path) -> None:
    names = [Path(test).name for test in gpu.suite_tests(options(tmp_path))]
    assert names[:3] == ["test_ops_values.py", "test_ops_streaming.py", "test_balance_function.py"]
    assert len(names) == len(set(names))
    assert {"test_balancer_contract.py", "test_ops_isa.py", "test_layout.py"} <= set(names)
    assert not {"test_demo.py", "test_gpu_entry.py", "test_benchmarks.py"} & set(names)
    assert {f"{name}.py" for name in gpu.SUITE} <= set(names)
    assert not set(gpu.SUITE_ELSEWHERE) & set(names)
    assert all((ROOT / "tests" / name).exists() for name in gpu.SUITE_ELSEWHERE)


# --- The build


def program(folder: Path, name: str, code: str) -> None:
    """A program of Python that stands in for one of the system's."""
    path = folder / name
    path.write_text(f"#!{sys.executable}\n{textwrap.dedent(code)}")
    path.chmod(0o755)


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the whole PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(cuda_tools, "FOLDERS", ())
    monkeypatch.delenv("CUDA_HOME", raising=False)
    return folder


def test_the_build_is_for_the_gpus_that_are_here(system: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCH_CUDA_ARCH_LIST", "MAX_JOBS"):
        monkeypatch.delenv(name, raising=False)
    environment = gpu.STAGES["build"].environment
    assert "TORCH_CUDA_ARCH_LIST" not in environment(options(tmp_path))  # no nvidia-smi
    program(system, "nvidia-smi", "print('10.0\\n9.0\\n9.0\\n[N/A]')")
    assert environment(options(tmp_path)) == {"TORCH_CUDA_ARCH_LIST": "9.0 10.0", "MAX_JOBS": str(os.cpu_count())}
    assert "TORCH_CUDA_ARCH_LIST" not in environment(options(tmp_path, "--device", "cpu"))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6")
    assert "TORCH_CUDA_ARCH_LIST" not in environment(options(tmp_path))  # the user's stays
    program(system, "nvidia-smi", "raise SystemExit('no devices were found')")
    assert gpu.compute_capabilities() == ""


def test_a_gpu_needs_both_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    package = tmp_path / gpu.PACKAGE
    package.mkdir()
    build, on_gpu, on_cpu = gpu.STAGES["build"], options(tmp_path), options(tmp_path, "--device", "cpu")
    assert build.complaint(on_cpu) == "no _C, and no word why"
    (package / "_C.cpython-312.so").touch()
    (package / "_build_error_cuda.txt").write_text("no toolkit\n")
    assert (build.complaint(on_cpu), build.remark(on_cpu)) == ("", "no _C_cuda: no toolkit")
    assert build.complaint(on_gpu) == "no _C_cuda: no toolkit"
    (package / "_build_error.txt").write_text("no compiler\n")
    assert build.complaint(on_gpu) == "no _C: no compiler; no _C_cuda: no toolkit"
    for record in package.glob("*.txt"):
        record.unlink()
    assert build.complaint(on_gpu) == "no _C_cuda, and no word why"
    monkeypatch.delenv("DBMTL_FUSED_CUDA", raising=False)
    assert build.environment(on_cpu)["DBMTL_FUSED_CUDA"] == "0"
    (package / "_C_cuda.cpython-312.so").touch()
    assert (build.complaint(on_gpu), build.remark(on_gpu)) == ("", "")
    assert "DBMTL_FUSED_CUDA" not in build.environment(on_cpu)  # which would remove it


def test_what_a_build_left_out_is_said_although_it_passed(stage_table: dict[str, str], tmp_path: Path) -> None:
    stage_table.update(a="pass", b="pass", c="pass")
    gpu.STAGES["a"] = Stage("a", "builds", gpu.STAGES["a"].command, 30, 1, remark=lambda options: "no _C_cuda")
    assert run(tmp_path) == 0
    found = stages(tmp_path)["a"]
    assert (found["status"], found["reason"]) == (PASSED, "no _C_cuda")


def test_a_stage_has_its_own_environment(stage_table: dict[str, str], tmp_path: Path) -> None:
    stage_table.update(a="import os; print(os.environ['FROM'])", b="pass", c="pass")
    command = gpu.STAGES["a"].command
    gpu.STAGES["a"] = Stage("a", "prints", command, 30, 1, environment=lambda options: {"FROM": options.device})
    assert run(tmp_path) == 0
    assert stages(tmp_path)["a"]["log"] == "cpu\n"


# --- compute-sanitizer

BANNER = "========= COMPUTE-SANITIZER\n"
CLEAN = "========= ERROR SUMMARY: 0 errors\n"
FINDING = "========= Invalid __global__ read of size 16 bytes\n=========     at balance_kernel\n"


@pytest.mark.parametrize(
    ("code", "output", "outcome", "why"),
    [
        (0, f"{BANNER}{sanitize.READY}\ncase\n{sanitize.DONE}\n{CLEAN}", PASSED, ""),
        (
            0,
            f"{sanitize.READY}\n{sanitize.DONE}\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors)",
            PASSED,
            "",
        ),
        (0, BANNER + CLEAN, FAILED, "exit code 0"),  # the driver did not run
        (0, f"{BANNER}{sanitize.READY}\n{sanitize.DONE}\n", FAILED, "exit code 0"),  # the tool did not
        (0, f"{BANNER}{sanitize.DONE}\n========= RACECHECK SUMMARY: 1 hazard displayed", FAILED, "1 hazard"),
        (9, f"{BANNER}{sanitize.READY}\n{FINDING}========= ERROR SUMMARY: 1 error", FAILED, "Invalid __global__ read"),
        (1, f"{BANNER}{sanitize.READY}\nAssertionError: balance_\n{CLEAN}", FAILED, "AssertionError: balance_"),
        (None, f"{BANNER}{sanitize.READY}\ncase 7 of 9: gram\n", CUT_OFF, "cut off after 7 of 9 of its cases"),
        (None, f"{BANNER}{sanitize.READY}\n", CUT_OFF, "cut off after none of its cases"),
        (None, f"{BANNER}{sanitize.READY}\ncase 7 of 9: gram\n{FINDING}", FAILED, "cut off for want of time"),
        (9, f"{BANNER}========= Error: Device not supported.\n", SKIPPED, "Error: Device not supported."),
        (1, f"{BANNER}RuntimeError: CUDA error: unknown error\n", SKIPPED, "CUDA error: unknown error"),
        (1, f"{BANNER}cudaMalloc failed with error 999\n", SKIPPED, "cudaMalloc failed with error 999"),
        (1, f"{BANNER}{sanitize.READY}\nCUDA error: unknown error\n", FAILED, "exit code 1"),  # a kernel's
        (0, f"{BANNER}{sanitize.NOT_HERE}no such module\n{CLEAN}", SKIPPED, "no such module"),
    ],
)
def test_what_a_sanitizer_says_is_judged(code: int | None, output: str, outcome: str, why: str) -> None:
    found, said = sanitize.judge(code, output)
    assert found == outcome
    assert why in said
    assert bool(why) == bool(said)


def test_the_first_findings_are_in_the_report(system: Path, tmp_path: Path) -> None:
    """Through a stand-in for compute-sanitizer: each tool ends in another way."""
    program(
        system,
        "compute-sanitizer",
        f"""
        import os, sys, time
        tool, backend = (sys.argv[sys.argv.index(of) + 1] for of in ("--tool", "--backend"))
        assert os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
        print("========= COMPUTE-SANITIZER", flush=True)
        if backend == "triton":
            print({sanitize.NOT_HERE!r} + "no Triton")
        elif tool == "racecheck":
            raise SystemExit("========= Error: Device not supported.")
        elif tool == "synccheck":
            print("case 3 of 70: combine", flush=True)
            time.sleep(60)
        else:
            finding = "" if tool == "memcheck" else 100 * {FINDING!r}
            print({sanitize.READY!r}, {sanitize.DONE!r}, finding + "========= ERROR SUMMARY: 0 errors", sep="\\n")
            raise SystemExit(9 if finding else 0)
        """,
    )
    lines = tmp_path / "lines"
    assert sanitize.main(["--seconds", "3", "--lines", str(lines)]) == 1
    found = gpu.read_lines(lines.read_text())
    assert found["counts"] == {"passed": 1, "failed": 1, "skipped": 2}
    failures = {of["test"].split("::")[1]: of["why"] for of in found["failures"]}
    assert failures.keys() == {"initcheck, cuda"}
    assert failures["initcheck, cuda"].startswith(f"exit code 9\n{FINDING}")
    assert "exit code 9" in gpu.lines_to_text(found)
    unfinished = "compute-sanitizer::synccheck, cuda: cut off after 3 of 70 of its cases"
    assert unfinished in gpu.lines_to_text(found)
    result = gpu.Result("sanitizer", "", exit_code=0, data=found)
    gpu._judge(result, False, "", "")
    assert (result.status, result.reason, result.good) == (CUT_OFF, unfinished, False)
    assert found["skips"].keys() == {"no Triton", "compute-sanitizer: Error: Device not supported."}


def test_a_missing_sanitizer_is_a_skip(system: Path, tmp_path: Path) -> None:
    lines = tmp_path / "lines"
    assert sanitize.main(["--lines", str(lines)]) == 0
    found = gpu.read_lines(lines.read_text())
    assert {reason: len(of) for reason, of in found["skips"].items()} == {
        "compute-sanitizer is neither on the PATH nor in CUDA's folders": len(sanitize.CHECKS)
    }


def test_the_sanitizers_driver_runs_every_case(capsys: pytest.CaptureFixture[str]) -> None:
    assert sanitize_driver.main(["--backend", "reference", "--device", "cpu"]) == 0
    ready, *lines, done = capsys.readouterr().out.splitlines()
    assert (ready, done) == (sanitize.READY, sanitize.DONE)
    count = len(lines)
    names = [line.removeprefix(f"case {number} of {count}: ") for number, line in enumerate(lines, 1)]
    assert names == [case.name for case in sanitize_driver.cases()]
    assert len(names) == len(set(names)) > 50
    for *_, every in sanitize.CHECKS:
        for prefix in ("balance_ 17 ", "combine 17 ", "ema_update_ 70 ", "begin_step "):
            assert any(name.startswith(prefix) for name in names[::every])


def test_the_sanitizers_driver_says_where_a_backend_is_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sanitize_driver.backends, "why_not", lambda backend, device: f"no {backend} on {device}")
    assert sanitize_driver.main(["--backend", "triton", "--device", "cpu"]) == 0
    assert capsys.readouterr().out == f"{sanitize.NOT_HERE}no triton on cpu\n"


def test_the_sanitizers_driver_sees_kernels_that_do_nothing() -> None:
    def balance_(backend: str, device: torch.device) -> dict[str, torch.Tensor]:
        return {"out": torch.full((3,), float(backend == "reference"))}

    with pytest.raises(AssertionError, match=r"^doing nothing: out: "):
        sanitize_driver.run(sanitize_driver.Case("doing nothing", balance_), "cpu", torch.device("cpu"))


def test_inputs_of_the_sanitizers_driver_end_where_their_memory_ends() -> None:
    values = torch.arange(6.0).view(2, 3)
    placed = sanitize_driver.Inputs(torch.device("cpu"), 0).placed(values, sanitize_driver.CROOKED)
    assert torch.equal(placed, values)
    assert placed.storage_offset() == 1
    assert placed.stride() == (6, 1)
    assert placed.untyped_storage().nbytes() == 4 * (1 + 3 + 3 + 3)


def test_the_operators_stage_stops_by_itself_before_it_is_cut_off(tmp_path: Path) -> None:
    command = gpu.STAGES["operators"].command(Context(options(tmp_path), tmp_path, 200.0))
    assert float(command[command.index("--seconds") + 1]) < 200


@pytest.mark.parametrize(
    ("stages_", "minutes"),
    [
        ("build,info,parity,suite,soak", 9),
        ("build,info,operators,sanitizer,counters", 9),
        ("build,info,steps,train", 6),
    ],
)
def test_the_documented_calls_fit_their_time(tmp_path: Path, stages_: str, minutes: int) -> None:
    log = (ROOT / "docs" / "gpu-log.md").read_text()
    assert f"--minutes {minutes} --stages {stages_}'" in log.replace(" --compile", "")
    chosen = options(tmp_path, "--stages", stages_)
    reserves = {name: gpu.STAGES[name].reserve for name in chosen.stages}
    assert sum(reserves.values()) <= 60 * minutes
    if "suite" in reserves:  # the first builds all of it, and nothing can be shown without
        assert 60 * minutes - sum(reserves.values()) + reserves["build"] >= gpu.STAGES["build"].limit


def test_one_command_has_time_for_all_stages(tmp_path: Path) -> None:
    chosen = options(tmp_path)
    assert chosen.stages == tuple(gpu.STAGES)
    assert 60 * chosen.minutes >= sum(stage.limit for stage in gpu.STAGES.values())


def test_a_soak_that_hangs_has_time_to_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)  # as if there were pytest-timeout
    for seconds, limit in ((40.0, 25), (900.0, gpu.SECONDS_PER_TEST)):
        assert f"--timeout={limit}" in gpu.STAGES["soak"].command(Context(options(tmp_path), tmp_path, seconds))


def test_a_failure_without_a_failed_test_shows_how_the_log_ends() -> None:
    result = gpu.Result("soak", "", FAILED, command="pytest", log="stack of the thread that hangs", text="3 passed")
    assert "3 passed\nits log ends:\nstack of the thread that hangs" in result.to_text()
    result.status = PASSED
    assert "its log ends" not in result.to_text()


def test_every_test_that_fails_or_is_skipped_is_in_the_report(tmp_path: Path) -> None:
    test = tmp_path / "test_few.py"
    test.write_text(
        textwrap.dedent("""
            import pytest
            def test_right(): pass
            def test_wrong(): assert 1 + 1 == 3, "bad sum"
            def test_left_out(): pytest.skip("no such thing")
            @pytest.fixture
            def broken(): raise OSError("no fixture")
            def test_broken(broken): pass
        """)
    )
    out = tmp_path / "out"
    arguments = ["--device", "cpu", "--quick", "--stages", "suite", "--out", str(out)]
    assert gpu.main([*arguments, "--tests", str(test)]) == 1
    suite = stages(out)["suite"]
    assert suite["data"]["counts"] == {"passed": 1, "failed": 2, "skipped": 1}
    assert [of["test"].split("::")[1] for of in suite["data"]["failures"]] == ["test_wrong", "test_broken"]
    assert "bad sum" in suite["data"]["failures"][0]["why"]
    (reason,) = suite["data"]["skips"]
    assert reason == "no such thing"
    assert "bad sum" in (out / "gpu.txt").read_text()


def test_lines_of_a_suite_that_was_killed_are_read_as_far_as_they_go() -> None:
    whole = json.dumps({"test": "f.py::t", "outcome": PASSED, "seconds": 1.0, "why": ""})
    found = gpu.read_lines(f"{whole}\n{whole[:20]}")
    assert found["counts"] == {"passed": 1, "failed": 0, "skipped": 0}
    assert found["cut_off"] == []
    assert found["files"] == {"f.py": {"tests": 1, "seconds": 1.0}}


# --- Timers


class FakeGPU:
    """What :mod:`benchmarks.graph_timing` takes of ``torch.cuda``; a replay takes 10 s, and 1 s for each call in it."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.clock = 0.0
        self.Stream = self.current_stream = lambda: mock.Mock()
        self.stream = lambda stream: contextlib.nullcontext()

    def call(self, name: str) -> Callable[[], None]:
        return lambda: self.calls.append(name)

    def CUDAGraph(self) -> Any:
        graph = mock.Mock(captured=[])

        def replay() -> None:
            self.clock += 10 + len(graph.captured)

        graph.replay = replay
        return graph

    @contextlib.contextmanager
    def graph(self, graph: Any, stream: Any) -> Iterator[None]:
        before = len(self.calls)
        yield
        graph.captured = self.calls[before:]

    def Event(self, enable_timing: bool) -> Any:
        event = mock.Mock()
        event.record = lambda: setattr(event, "time", self.clock)
        event.elapsed_time = lambda stop: 1e3 * (stop.time - event.time)
        return event


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGPU:
    fake = FakeGPU()
    monkeypatch.setattr(graph_timing, "torch", SimpleNamespace(cuda=fake))
    monkeypatch.setattr(graph_timing, "_side_stream", fake.Stream)
    return fake


def test_a_graph_goes_through_all_buffer_sets_equally_often(fake_gpu: FakeGPU) -> None:
    timer = GraphTimer([fake_gpu.call(name) for name in "abc"], calls=20)
    assert timer.calls == 21
    assert fake_gpu.calls == [*"abc"] * 2 + [*"abc"] * 7  # in the open, then captured
    assert timer().seconds == pytest.approx((10 + 21) / 21)


class Rebinding:
    """A candidate that puts a new object in place of what it reads, as LibMTL's does its EMA."""

    class State:
        pass

    def __init__(self) -> None:
        self.state = self.State()
        self.read: list[weakref.ref[Rebinding.State]] = []

    def __call__(self) -> None:
        self.read.append(weakref.ref(self.state))
        self.state = self.State()


@pytest.mark.parametrize(
    "call",
    [
        lambda of: of,
        lambda of: of.__call__,
        lambda of: functools.partial(lambda function, times: function(), of, times=1),
        lambda of: functools.partial(functools.partial(of)),
    ],
    ids=["object", "method", "argument", "partial"],
)
def test_what_the_first_captured_call_reads_lives_as_long_as_the_graph(
    fake_gpu: FakeGPU, call: Callable[[Rebinding], Callable[[], object]]
) -> None:
    candidate = Rebinding()
    timer = GraphTimer([call(candidate)], calls=3)
    before_it, first, *_ = candidate.read[1:]  # two in the open, three captured
    assert len(candidate.read) == 5
    assert before_it() is None
    assert first() is not None
    del timer
    assert first() is None


def test_the_slope_of_a_graph_leaves_out_what_a_replay_costs(fake_gpu: FakeGPU) -> None:
    timer = SlopeTimer([fake_gpu.call(name) for name in "ab"], calls=5)
    assert timer().seconds == pytest.approx(1)
    assert len(fake_gpu.calls) == 4 + 6 + 4 + 12


def test_buffer_sets_together_are_four_times_the_cache(fake_gpu: FakeGPU) -> None:
    fake_gpu.get_device_properties = lambda device: SimpleNamespace(L2_cache_size=60)  # type: ignore[attr-defined]
    device = SimpleNamespace(type="cuda")
    assert [graph_timing.buffer_sets(size, device) for size in (1, 100, 240, 1000)] == [240, 3, 1, 1]


# --- Sizes and bytes


def test_parameters_of_resnet50() -> None:
    params = shapes.resnet50()
    assert len(params) == 161
    assert numbers(params) == 25_557_032
    assert params[:2] == [(64, 3, 7, 7), (64,)]
    assert params[-2:] == [(1000, 2048), (1000,)]
    assert params.count((512, 512, 3, 3)) == 3


def test_parameters_of_vit_large() -> None:
    params = shapes.vit_large()
    assert len(params) == 296
    assert numbers(params) == 304_326_632
    assert params.count((4096, 1024)) == params.count((1024, 4096)) == 24


def test_byte_models() -> None:
    T, P = 3, 1000
    assert FP32.bytes("balance_", T, P) == bandwidth.fused_bytes(T, P) == (4 * T + 1) * P * 4
    assert FP32.bytes("combine", T, P) == (T + 1) * P * 4
    assert FP32.bytes("gram", T, P) == T * P * 4
    assert FP32.bytes("ema_update_", 1, P) == 3 * P * 4
    assert FP32.bytes("begin_step", T, P) == (3 * T + 3) * 4 + 8
    assert BF16_GRADS.bytes("balance_", T, P) == (3 * T * 4 + T * 2 + 2) * P
    assert BF16_GRADS.bytes("combine", T, P) == (T * 4 + 2) * P
    assert BF16_GRADS.bytes("ema_update_", 1, P) == (4 + 4 + 2) * P
    assert BF16_STATE.bytes("balance_", T, P) == (4 * T + 1) * P * 2
    assert BF16_STATE.bytes("combine", T, P) == (T + 1) * P * 2
    assert BF16_STATE.bytes("ema_update_", 1, P) == 3 * P * 2


@pytest.mark.parametrize("T", gpu_problems.TASKS)
def test_the_large_size_is_just_large_enough(T: int) -> None:
    P = gpu_problems.columns_of(T, 2**30)
    assert P % 256 == 0
    assert 2**30 <= 4 * T * P < 2**30 + 4 * T * 256


@pytest.mark.parametrize("times", [1, 3])
def test_the_yardstick_copies_as_many_bytes(times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    total = FP32.bytes("balance_", 3, 3 * 1024)
    monkeypatch.setattr(gpu_problems, "COPY_BYTES", total // times)
    ((copy, *_),) = gpu_problems.copies(total, torch.device("cpu")).values()
    once, repeated = copy.args
    assert repeated == times
    assert 2 * once.args[0].nbytes * times == total
    copy()
    assert torch.equal(once.func.__self__, once.args[0])
    assert once.args[0].count_nonzero() > 0
    assert bandwidth.Copy(total).source.count_nonzero() > 0


def test_every_size_of_the_plan_is_measured_once() -> None:
    names = [name for name, _ in bench_gpu_ops.plan(quick=False)]
    assert len(names) == len(set(names))
    for P in (6_700_000, 11_200_000, 25_600_000):
        assert f"balance, 3, {P}, fp32" in names
    for T in (2, 3, 5, 11, 16):
        assert f"balance, {T}, {gpu_problems.columns_of(T, 2**30)}, fp32" in names
        assert f"combine, {T}, 11200000, fp32" in names
    grid = [name for name in names if name.startswith("grid, ")]
    for T in (1, 2, 3, 5, 8, 11, 16, 32, 64):
        assert {f"grid, {T}, {10**power}, fp32" for power in range(4, 9)} <= set(grid)
    for T in (1, 2, 3):
        assert f"grid, {T}, {10**9}, fp32" in grid
    for dtypes in (BF16_GRADS, BF16_STATE):
        assert sum(name.endswith(str(dtypes)) for name in grid) >= 4
    assert names[-len(grid) :] == grid  # after all that has a bar


def found_by_tables(**settings: Any) -> gpu_tables.Run:
    arguments = {"rounds": 2, "quick": True, "compiled": False, "deadline": 0.0}
    return gpu_tables.Run(torch.device("cpu"), **arguments | settings)


def test_a_wrong_candidate_is_reported_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    found = found_by_tables()
    monkeypatch.setattr(comparators.TightEager, "__call__", lambda self: self.out.fill_(torch.nan))
    gpu_tables.measure_balance(found, 2, 100, FP32)
    (section,) = found.sections
    assert "tight eager" not in section.samples
    assert "LibMTL's expression" in section.samples
    (failure,) = found.failures
    assert failure.startswith("balance_ fp32, T=2, P=0.0001M: tight eager: AssertionError: differs from float64 by inf")


def test_results_are_checked_a_few_columns_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_problems, "_CHECKED_BYTES", 8 * 3 * 7)
    matrices = Matrices(3, 100, FP32, torch.device("cpu"))
    exact = Exact(matrices)
    op = gpu_problems.comparators.backends.operators("reference").balance_
    assert 0 < exact.error_of(op) < 1e-6
    rows, total = comparators.exact(exact._before, matrices.grads, 0.9)
    assert comparators.relative_error(matrices.ema, rows) < 1e-6
    assert comparators.relative_error(matrices.out, total) < 1e-6
    for name in ("ema", "out"):
        for wrong in (3.0, torch.nan):

            def last_is_wrong(*arguments: Any, name: str = name, wrong: float = wrong) -> None:
                op(*arguments)
                getattr(matrices, name).view(-1)[-1] = wrong

            assert exact.error_of(last_is_wrong) > 1e-3


def test_the_greediest_comparators_give_way_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    found, bytes_each = found_by_tables(), 4 * (3 + 1) * 1024
    free = gpu_tables.COPY_BYTES
    monkeypatch.setattr(gpu_tables.Run, "_free", lambda self: free)
    names = list(gpu_tables._expressions(FP32))
    for matrices, left in ((18, 3), (17, 2), (10, 2), (9, 1), (6, 1), (5, 0), (4, 0)):
        free = gpu_tables.COPY_BYTES + matrices * bytes_each
        assert found.fitting(3, 1024, names) == names[3 - left :]
        assert found.largest(3, 1024) == 1024
    free -= bytes_each // 2
    assert found.largest(3, 1024) == 768
    gpu_tables.measure_grid(found, 3, 1024, FP32)
    (section,) = found.sections
    assert (section.kind, section.bars) == ("grid", [])
    assert f"left out for want of memory: {comparators.LIBMTL}" in section.notes
    assert {*names}.isdisjoint(section.samples)


def test_the_reference_is_left_out_of_tables_of_gigabytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_tables.backends, "available", lambda device: ["cuda", "triton", "reference"])
    found = found_by_tables()
    found.device = torch.device("cuda")
    assert found.backends_for(3, 1000) == (["reference", "triton", "cuda"], [])
    chosen, notes = found.backends_for(4, 2**26)
    assert chosen == ["triton", "cuda"]
    assert notes == ["left out, as it takes long: dbmtl_fused reference"]


@pytest.mark.parametrize(
    "kind",
    [
        gpu_lists.LibMTL,
        gpu_lists.LibMTLShipped,
        gpu_lists.TightFlatten,
        gpu_lists.Foreach,
        functools.partial(gpu_lists.Operators, backend="reference"),
        functools.partial(gpu_lists.Operators, backend="cpu"),
    ],
)
def test_all_that_goes_from_lists_to_a_list_computes_the_same(
    kind: Callable[[gpu_lists.Lists], gpu_lists.Candidate],
) -> None:
    lists = gpu_lists.Lists([(20, 17), (3,), (300,)], 3, torch.device("cpu"))
    candidate = kind(lists)
    assert lists.error(candidate()) < 1e-6
    assert lists.error(candidate()) > 1e-2  # of the second step, which the first is not


def test_a_device_that_has_failed_keeps_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    on_cpu = found_by_tables(deadline=math.inf)
    monkeypatch.setattr(
        bench_gpu_ops, "plan", lambda quick: [("first", lambda run: gpu_tables.measure_small(run, 3, 9))]
    )
    for name, answer in (("device_facts", {}), ("nvidia_smi", {}), ("environment", {})):
        monkeypatch.setattr(bench_gpu_ops, name, lambda *_, answer=answer: dict(answer))
    monkeypatch.setattr(torch.cuda, "empty_cache", fails)
    monkeypatch.setattr(bench_gpu_ops, "Run", lambda *_: on_cpu)
    out = tmp_path / "operators.json"
    assert bench_gpu_ops.main(["--device", "cuda", "--quick", "--out", str(out)]) == 1
    content = json.loads(out.read_text())
    assert len(content["sections"]) == 2
    assert content["settings"]["failures"] == ["after first: RuntimeError: an illegal memory access was encountered"]


def test_the_cuda_backend_is_held_against_triton_where_both_are() -> None:
    samples = {f"dbmtl_fused {name}": [Sample(seconds)] * 3 for name, seconds in (("cuda", 1.02), ("triton", 1.0))}
    (bar,) = gpu_tables._beside_triton("combine", samples)
    assert (bar.name, bar.target, bar.passed) == ("combine: dbmtl_fused cuda / dbmtl_fused triton", 1.03, True)
    assert bar.measured.median == pytest.approx(1.02)
    slower = {**samples, "dbmtl_fused cuda": [Sample(1.04)] * 3}
    assert not gpu_tables._beside_triton("combine", slower)[0].passed
    del slower["dbmtl_fused triton"]
    assert gpu_tables._beside_triton("combine", slower) == []
    host = {f"combine, {name}": [Sample(1.0)] for name in ("triton", "cuda", "reference")}
    found = [bar.name for name in host for bar in gpu_tables._beside_triton("host", host, name)]
    assert found == ["host: combine, cuda / combine, triton"]


def test_what_time_does_not_allow_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "operators.json"
    assert bench_gpu_ops.main(["--device", "cpu", "--quick", "--seconds", "-1", "--out", str(out)]) == 0
    assert len(json.loads(out.read_text())["settings"]["left_out"]) == len(bench_gpu_ops.plan(quick=True))
    assert "left out for want of time:\n  balance, 3, 5000, fp32" in capsys.readouterr().out


# --- What takes Triton


def interpret(code: str) -> None:
    """Run ``code`` in a process whose Triton kernels are interpreted."""
    pytest.importorskip("triton", reason="Triton is not installed")
    paths = os.pathsep.join([str(ROOT / "tests"), *sys.path, str(ROOT)])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    command = [sys.executable, "-c", f"import triton_interpreter\n{textwrap.dedent(code)}"]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_stream_kernels_compute_what_they_say() -> None:
    interpret("""
        import torch
        from benchmarks import stream_kernels
        rows, other, out = torch.randn(3, 5000), torch.randn(3, 5000), torch.full((5000,), torch.nan)
        stream_kernels.add_rows(rows, out)
        torch.testing.assert_close(out, rows.sum(0))
        expected = (rows + other) / 2
        stream_kernels.update(rows, other)
        torch.testing.assert_close(rows, expected)
        stream_kernels.copy(rows, other)
        assert torch.equal(rows, other)
        stream_kernels.empty(out)
    """)


def test_the_sweep_runs_under_the_interpreter(tmp_path: Path) -> None:
    out = tmp_path / "sweep.json"
    arguments = ["--device", "cpu", "--quick", "--out", str(out)]
    interpret(f"from benchmarks import sweep_triton; raise SystemExit(sweep_triton.main({arguments}))")
    written = json.loads(out.read_text())
    entries = [line.split(" = ")[0] for line in written["chosen"]]
    assert entries == ["EMA_UPDATE", "COMBINE[4]", "GRAM_LARGE", "BALANCE[4]"]
    outcomes = [outcome for of in written["outcomes"].values() for outcome in of]
    assert len(outcomes) >= 6
    assert all(outcome["shares"] and not outcome["reason"] for outcome in outcomes)


def test_the_sweep_changes_tables_only_while_it_measures() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from benchmarks.sweep_triton import Choice, Outcome, around, chosen, neighbours, together
    from benchmarks.timing import Quartiles
    from dbmtl_fused.triton_kernels import tuning

    before, entry = tuning.combine(4), tuning.COMBINE[4]
    current = Choice("COMBINE", 4, entry)
    fields = {"block": around(entry.block), "num_warps": (entry.num_warps, 2 * entry.num_warps)}
    choices = neighbours(current, fields)
    assert [choice.entry.block for choice in choices] == [entry.block, entry.block // 2, 2 * entry.block, entry.block]
    with chosen(choices[1]):
        assert tuning.combine(4).block == entry.block // 2
    assert tuning.combine(4) == before

    speeds = (0.8, 0.7, 0.9, 0.85)
    outcomes = [Outcome(choice, {"p": Quartiles(*[speed] * 3)}) for choice, speed in zip(choices, speeds, strict=True)]
    best = together(outcomes, fields).entry
    assert (best.block, best.num_warps) == (2 * entry.block, 2 * entry.num_warps)
