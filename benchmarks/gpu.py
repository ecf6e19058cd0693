"""Everything that a machine with a GPU can show, by one command that installs nothing: ``python3 -m benchmarks.gpu``.

It takes the active Python with the PyTorch and Triton that are there, builds the native modules in place, for the GPU
that is there, and runs from the checkout, in stages. Each stage is a process with a time limit, so that one that
crashes or hangs takes none of the others along. ``gpu.json`` and ``gpu.txt`` in the folder given are written anew after
every stage, and every few seconds during one: a machine that is switched off leaves what it has shown.

``--device cpu --quick`` is a dry run of the same without a GPU; it measures nothing, and leaves nothing where results
are. Only the standard library is imported here.

Steps and training use QM9: its two files in ``data/qm9`` of the checkout, which git ignores, beside it in
``../shared/data/qm9``, or in a folder named by ``--data``. A machine to which only the checkout is copied needs them in
``data/qm9``. Where they are missing, that is said and the run goes on. A machine to which git's records are not copied
cannot know the commit: ``--commit`` says it.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import qm9_folder

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_OUT = ROOT / "benchmarks" / "results" / "gpu"
DRY_OUT = ROOT / "build" / "gpu-dry"
COMMIT = "DBMTL_FUSED_COMMIT"
"""A variable that says which commit this is, for :mod:`benchmarks.gpu_info` where git does not."""
PACKAGE = "dbmtl_fused"
ALL = "all"
BUILD_RECORDS = {"_C": "_build_error.txt", "_C_cuda": "_build_error_cuda.txt"}
"""The native modules, and what setup.py leaves instead of one that it could not build."""

SUITE = (
    # The most telling first: parity, bits, whole steps.
    *("test_ops_values", "test_ops_streaming", "test_balance_function", "test_ops_begin"),
    *("test_ops_rounding", "test_ops_bits"),
    *("test_balancer_trajectory", "test_balancer_contract", "test_balancer_capture", "test_ops_compile"),
    *("test_balancer_state", "test_balancer_errors", "test_ops_properties", "test_ops_large"),
)
SUITE_PATTERNS = ("test_ops_*.py", "test_balance*.py", "test_layout.py", "test_triton_*.py", "test_cuda_*.py")
QUICK_SUITE = tuple(f"tests/test_ops_{of}.py" for of in ("begin", "streaming", "rounding", "properties"))
SUITE_ELSEWHERE = (
    # What needs no GPU and is slow.
    *("test_triton_aot.py", "test_triton_interpreter.py"),
    *("test_cuda_compile.py", "test_cuda_emulated.py", "test_cuda_sanitizers.py"),
    "test_cuda_gpu.py",  # a stage of its own
)
SOAK = ("tests/test_cuda_gpu.py", "tests/test_gpu_graph.py")
MAX_FAILURES = 500
SECONDS_PER_TEST = 120

# A process group for each stage, to end also what it has started.
_OWN_GROUP: dict[str, Any] = {"process_group": 0} if sys.version_info >= (3, 11) else {"preexec_fn": os.setpgrp}
_LOG_CHARACTERS = 60_000
_SHOWN_CHARACTERS = 8_000
_SHOWN_LOG_CHARACTERS = 2_000
_SHOWN_FAILURES = 20
_REWRITE_SECONDS = 10.0
_INTERRUPTED_SECONDS = 15.0
_LEAST_SECONDS = 5.0

PASSED, FAILED, CUT_OFF, SKIPPED, RUNNING, WAITING = "passed", "failed", "cut off", "skipped", "running", "waiting"


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    out: Path
    stages: tuple[str, ...]
    device: str
    minutes: float
    quick: bool
    compile: bool
    tests: str
    workers: int
    only: str
    data: Path
    commit: str


@dataclass(frozen=True)
class Context:
    """What a stage's command is made from."""

    options: Options
    scratch: Path  # where it leaves <name>.json, <name>.txt, <name>.lines
    seconds: float  # until it is cut off

    def module(self, name: str, *arguments: str) -> list[str]:
        """``python -m name arguments``."""
        return [sys.executable, "-u", "-m", name, *arguments]

    def common(self) -> list[str]:
        """Arguments that all of the benchmarks' own programs take."""
        return ["--device", self.options.device, *(["--quick"] if self.options.quick else [])]


@dataclass(frozen=True)
class Stage:
    """One process.

    :param limit: Seconds after which it is cut off, at most.
    :param reserve: Seconds that earlier stages leave to it.
    :param in_checkout: Run in the checkout itself rather than in the importable tree.
    :param complaint: Why it has failed although its exit code is 0, or nothing.
    :param remark: What there is to say when it has passed, or nothing.
    :param environment: Variables of its own.
    """

    name: str
    purpose: str
    command: Callable[[Context], list[str]]
    limit: float
    reserve: float
    in_checkout: bool = False
    complaint: Callable[[Options], str] = lambda options: ""
    remark: Callable[[Options], str] = lambda options: ""
    environment: Callable[[Options], Mapping[str, str]] = lambda options: {}


@dataclass
class Result:
    """What came of a stage."""

    name: str
    purpose: str
    status: str = WAITING
    reason: str = ""
    command: str = ""
    seconds: float = 0.0
    limit: float = 0.0
    exit_code: int | None = None
    log: str = ""
    text: str = ""  # what the stage wants shown; the end of its log if empty
    data: Any = None

    @property
    def good(self) -> bool:
        """Whether it passed, or ran and said that it can show nothing here; one without time has shown nothing."""
        return self.status == PASSED or (self.status == SKIPPED and self.exit_code == 0)

    def to_text(self) -> str:
        """What it has to show, under its name; if something went wrong, how its log ends too."""
        parts = [f"\n{f' {self.name} ':=^100}\n$ {self.command}", (self.text or self.log).rstrip()]
        if self.text and self.status in (FAILED, CUT_OFF):
            parts.append(f"its log ends:\n{self.log[-_SHOWN_LOG_CHARACTERS:].rstrip()}")
        return "\n".join(parts)


def _build(context: Context) -> list[str]:
    return [sys.executable, "-u", "setup.py", "build_ext", "--inplace"]


def _build_environment(options: Options) -> dict[str, str]:
    """As many compilers as there are processors, for the GPU that is here; what the user has set stands."""
    settings = {"MAX_JOBS": str(os.cpu_count() or 1)}
    if options.device == "cuda":
        if architectures := compute_capabilities():
            settings["TORCH_CUDA_ARCH_LIST"] = architectures
    elif not _has("_C_cuda"):  # for every architecture it takes minutes; setup.py would remove one that is there
        settings["DBMTL_FUSED_CUDA"] = "0"
    return {name: value for name, value in settings.items() if name not in os.environ}


def compute_capabilities() -> str:
    """Those of the GPUs here, such as ``9.0``, each once; empty if the driver does not say."""
    if shutil.which("nvidia-smi") is None:
        return ""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return " ".join(sorted(set(re.findall(r"^\d+\.\d+$", output, re.MULTILINE)), key=float))


def _not_built(modules: Sequence[str]) -> str:
    """setup.py goes on without a module that cannot be built, and records why."""
    found = []
    for module in modules:
        if error := _text_of(ROOT / PACKAGE / BUILD_RECORDS[module]).strip():
            found.append(f"no {module}: {error[:500]}")
        elif not _has(module):
            found.append(f"no {module}, and no word why")
    return "; ".join(found)


def _has(module: str) -> bool:
    return any((ROOT / PACKAGE).glob(f"{module}.*.so"))


def _build_complaint(options: Options) -> str:
    return _not_built(list(BUILD_RECORDS) if options.device == "cuda" else ["_C"])


def _build_remark(options: Options) -> str:
    return _not_built(list(BUILD_RECORDS))


def _info(context: Context) -> list[str]:
    out = str(context.scratch / "info.json")
    return context.module("benchmarks.gpu_info", "--device", context.options.device, "--out", out)


def _parity(context: Context) -> list[str]:
    return context.module(PACKAGE, "check", "--device", context.options.device)


def _suite(context: Context) -> list[str]:
    parallel = importlib.util.find_spec("xdist") is not None and not context.options.quick
    arguments = ["-p", "xdist", "-n", str(context.options.workers)] if parallel else []
    # A kernel that hangs blocks its process in the driver, where signals wait. A thread ends the worker.
    arguments += _time_limit(SECONDS_PER_TEST, "thread" if parallel else "signal")
    return _pytest(context, "suite", *arguments, *suite_tests(context.options))


def _soak(context: Context) -> list[str]:
    """In one process, alone on the GPU. A test that hangs ends it, while there still is time to say which."""
    seconds = min(SECONDS_PER_TEST, max(_LEAST_SECONDS, context.seconds - _INTERRUPTED_SECONDS))
    return _pytest(context, "soak", *_time_limit(seconds, "thread"), *(str(ROOT / test) for test in SOAK))


def _pytest(context: Context, name: str, *arguments: str) -> list[str]:
    """pytest of the checkout, which leaves a line for each test."""
    settings = ["-p", "benchmarks.pytest_lines", "--lines", str(context.scratch / f"{name}.lines")]
    settings += ["-p", "no:cacheprovider", f"--maxfail={MAX_FAILURES}", "--rootdir", str(ROOT)]
    return context.module("pytest", *settings, *arguments)


def _time_limit(seconds: float, method: str) -> list[str]:
    """For each test, where there is pytest-timeout."""
    if importlib.util.find_spec("pytest_timeout") is None:
        return []
    return ["-p", "pytest_timeout", f"--timeout={seconds:.0f}", f"--timeout-method={method}"]


def suite_tests(options: Options) -> list[str]:
    """Arguments that tell pytest which tests to run: those given, or the operators' and the balancer's."""
    if options.tests:
        return [
            str(ROOT / word) if (ROOT / word.split("::")[0]).exists() else word for word in shlex.split(options.tests)
        ]
    if options.quick:
        return [str(ROOT / test) for test in QUICK_SUITE]
    found = {path for pattern in SUITE_PATTERNS for path in (ROOT / "tests").glob(pattern)}
    found = {path for path in found if path.name not in SUITE_ELSEWHERE}
    order = {name: index for index, name in enumerate(SUITE)}
    return [str(path) for path in sorted(found, key=lambda path: (order.get(path.stem, len(order)), path.name))]


def _sanitizer(context: Context) -> list[str]:
    budget = max(1.0, context.seconds - _INTERRUPTED_SECONDS)
    arguments = ["--device", context.options.device, "--seconds", f"{budget:.0f}"]
    return context.module("benchmarks.sanitize", *arguments, "--lines", str(context.scratch / "sanitizer.lines"))


def _operators(context: Context) -> list[str]:
    budget = max(1.0, context.seconds - 2 * _INTERRUPTED_SECONDS)
    arguments = [*context.common(), *(["--compile"] if context.options.compile else [])]
    out = str(context.scratch / "operators.json")
    return context.module("benchmarks.bench_gpu_ops", *arguments, "--seconds", f"{budget:.0f}", "--out", out)


def _counters(context: Context) -> list[str]:
    budget = max(1.0, context.seconds - _INTERRUPTED_SECONDS)
    arguments = ["--device", context.options.device, "--seconds", f"{budget:.0f}"]
    return context.module("benchmarks.counters", *arguments, "--out", str(context.scratch / "counters.json"))


def _steps(context: Context) -> list[str]:
    arguments = [*context.common(), "--data", str(context.options.data)]
    budget = max(1.0, context.seconds - 2 * _INTERRUPTED_SECONDS)
    out = str(context.scratch / "steps.json")
    return context.module("benchmarks.run", "step", *arguments, "--seconds", f"{budget:.0f}", "--out", out)


def _train(context: Context) -> list[str]:
    arguments = [*context.common(), "--data", str(context.options.data)]
    budget = max(1.0, context.seconds - 2 * _INTERRUPTED_SECONDS)
    out = str(context.scratch / "train.json")
    return context.module("benchmarks.train", *arguments, "--seconds", f"{budget:.0f}", "--out", out)


def _sweep(context: Context) -> list[str]:
    arguments = [*context.common(), *(["--only", context.options.only] if context.options.only else [])]
    budget = max(1.0, context.seconds - 2 * _INTERRUPTED_SECONDS)
    out = str(context.scratch / "sweep.json")
    return context.module("benchmarks.sweep_triton", *arguments, "--seconds", f"{budget:.0f}", "--out", out)


def _pytest_environment(options: Options) -> dict[str, str]:
    """Plugins that happen to be installed may warn, which is an error to the suite."""
    return {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}


def _suite_environment(options: Options) -> dict[str, str]:
    """The same; the tests of a dry run have the CUDA kernels emulated, where there is a compiler."""
    emulated = options.device == "cpu" and options.quick and not options.tests and shutil.which("g++")
    return _pytest_environment(options) | ({"DBMTL_FUSED_TEST_CUDA_EMU": "1"} if emulated else {})


def _sweep_environment(options: Options) -> dict[str, str]:
    """Without a GPU there is no Triton but its interpreter."""
    return {"TRITON_INTERPRET": "1"} if options.device == "cpu" else {}


STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage(
            *("build", "the native modules, in place", _build),
            limit=240,
            reserve=90,
            in_checkout=True,
            complaint=_build_complaint,
            remark=_build_remark,
            environment=_build_environment,
        ),
        Stage("info", "machine, versions, backends", _info, limit=60, reserve=15),
        Stage("parity", "every backend against the float64 oracle", _parity, limit=150, reserve=30),
        Stage(
            *("suite", "tests of operators and balancer on the device", _suite),
            limit=420,
            reserve=65,
            environment=_suite_environment,
        ),
        Stage(
            *("soak", "barriers, streams and graphs of the CUDA kernels, often", _soak),
            limit=240,
            reserve=40,
            environment=_pytest_environment,
        ),
        Stage("operators", "bandwidth of every operator and backend", _operators, limit=480, reserve=100),
        Stage("sanitizer", "compute-sanitizer over every operator", _sanitizer, limit=180, reserve=100),
        Stage("counters", "memory traffic of every operator as the GPU counts it", _counters, limit=150, reserve=60),
        Stage("steps", "whole training steps beside what people would use instead", _steps, limit=540, reserve=120),
        Stage("train", "QM9: five trainings, and DB-MTL's losses beside LibMTL's", _train, limit=540, reserve=100),
        Stage(
            *("sweep", "launch parameters of the Triton kernels", _sweep),
            limit=540,
            reserve=240,
            environment=_sweep_environment,
        ),
    )
}
"""Every stage, in the order in which they run. What earlier ones leave of their time, later ones have."""

MINUTES = 60.0
"""About the limits of all stages together; docs/gpu-log.md says how to go about it with less."""


class Report:
    """All results so far, as JSON and as text in one folder."""

    def __init__(self, options: Options) -> None:
        self._options, self._started = options, _now()
        self.results = {name: Result(name, STAGES[name].purpose) for name in options.stages}

    def write(self, finished: bool = False) -> None:
        """Both files, each replaced in one go."""
        content = {
            "started": self._started,
            "written": _now(),
            "finished": finished,
            "settings": {name: value for name, value in asdict(self._options).items() if name not in ("out", "data")},
            "stages": [asdict(result) for result in self.results.values()],
        }
        _replace(self._options.out / "gpu.json", json.dumps(content, indent=1) + "\n")
        _replace(self._options.out / "gpu.txt", self.to_text() + "\n")

    def to_text(self) -> str:
        """A line for each stage, then what each has to show."""
        parts = [self.summary()]
        parts += [result.to_text() for result in self.results.values() if result.command]
        return "\n".join(parts)

    def summary(self) -> str:
        """A line for each stage."""
        lines = [f"{'stage':12}{'':10}{'seconds':>8}  "]
        for result in self.results.values():
            seconds = f"{result.seconds:.1f}" if result.command else ""
            lines.append(f"{result.name:12}{result.status:10}{seconds:>8}  {result.reason or result.purpose}")
        return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages.

    :returns: 0, or 1 if a stage failed, was cut off or had no time left. What this machine cannot show is no failure.
    """
    options = _parse(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    report = Report(options)
    report.write()
    deadline = time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory(prefix="dbmtl_fused_gpu_") as scratch, _terminated_by_exception():
        for name, result in report.results.items():
            later = options.stages[options.stages.index(name) + 1 :]
            left = deadline - time.monotonic()
            # What comes first matters most: it has its own part, also where there is not enough for all.
            free = max(left - sum(STAGES[other].reserve for other in later), min(left, STAGES[name].reserve))
            _run(STAGES[name], result, Context(options, Path(scratch), min(STAGES[name].limit, free)), report)
            report.write()
    report.write(finished=True)
    _say(f"wrote {options.out}/gpu.json and gpu.txt")
    print(report.summary(), flush=True)
    return int(not all(result.good for result in report.results.values()))


def _run(stage: Stage, result: Result, context: Context, report: Report) -> None:
    """Run one stage to its end or its limit."""
    result.limit = round(context.seconds, 1)
    if context.seconds < _LEAST_SECONDS:
        result.status, result.reason = SKIPPED, "no time left: give more --minutes, or fewer --stages"
        _say(f"{stage.name}: {result.status}, {result.reason}")
        return
    command = stage.command(context)
    result.status, result.command = RUNNING, _without_paths(shlex.join(command), context.scratch)
    _say(f"{stage.name}: {stage.purpose}, at most {context.seconds:.0f} s\n$ {result.command}")
    tree = importable_tree(context.scratch / "tree")
    started = time.monotonic()
    log = context.scratch / f"{stage.name}.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT if stage.in_checkout else tree,
            env={**_environment(tree, context.options), **stage.environment(context.options)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            **_OWN_GROUP,
        )
        try:
            cut_off = not _wait(process, started + context.seconds, lambda: _collect(result, context, started, report))
        finally:
            _end_group(process)
    result.exit_code = process.returncode
    _read(result, context.scratch)
    result.seconds = round(time.monotonic() - started, 1)
    _judge(result, cut_off, stage.complaint(context.options), stage.remark(context.options))
    _say(f"{stage.name}: {result.status} after {result.seconds:.1f} s {result.reason}")
    print((result.text or result.log)[-_SHOWN_CHARACTERS:], flush=True)


def _wait(process: subprocess.Popen[bytes], deadline: float, each_time: Callable[[], None]) -> bool:
    """Wait until the process ends, calling ``each_time`` now and then; False if it had to be interrupted."""
    while (left := deadline - time.monotonic()) > 0:
        if _ended(process, min(_REWRITE_SECONDS, left)):
            return True
        each_time()
    process.send_signal(signal.SIGINT)  # pytest then says what it has
    _ended(process, _INTERRUPTED_SECONDS)
    return False


def _ended(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Whether the process ends within ``seconds``."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of the process and of those it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _collect(result: Result, context: Context, started: float, report: Report) -> None:
    """Write what a running stage has shown so far."""
    _read(result, context.scratch)
    result.seconds = round(time.monotonic() - started, 1)
    report.write()


def _read(result: Result, scratch: Path) -> None:
    """Take over what a stage has written."""
    result.log = _without_paths(_text_of(scratch / f"{result.name}.log"), scratch)[-_LOG_CHARACTERS:]
    result.text = _text_of(scratch / f"{result.name}.txt")
    with contextlib.suppress(json.JSONDecodeError):  # being written just now: what was read before stays
        if content := _text_of(scratch / f"{result.name}.json"):
            result.data = json.loads(content)
    if lines := _text_of(scratch / f"{result.name}.lines"):
        result.data = read_lines(lines)
        result.text = lines_to_text(result.data)


def _judge(result: Result, cut_off: bool, complaint: str, remark: str) -> None:
    if cut_off:
        result.status, result.reason = CUT_OFF, f"reached its limit of {result.limit:.0f} s"
    elif complaint:
        result.status, result.reason = FAILED, complaint
    elif result.exit_code == 0 and (unfinished := _unfinished(result.data)):
        result.status, result.reason = CUT_OFF, unfinished
    elif result.exit_code == 0:
        nothing, missing = _not_shown(result.data)
        result.status, result.reason = SKIPPED if nothing else PASSED, remark or missing
    else:
        result.status, result.reason = FAILED, f"exit code {result.exit_code}"
        if result.exit_code is not None and result.exit_code < 0:
            result.reason = f"killed by {signal.Signals(-result.exit_code).name}"


def _unfinished(data: Any) -> str:
    """What a stage that ended well had to leave before its end, and how far it was."""
    tests = data.get("cut_off", []) if isinstance(data, dict) else []
    return "; ".join(f"{test['test']}: {test['why']}" for test in tests)


def _not_shown(data: Any) -> tuple[bool, str]:
    """Whether a stage that ended well has shown nothing at all, and what it has left out."""
    if not isinstance(data, dict):
        return False, ""
    if reason := data.get("skipped"):
        return True, reason
    if reasons := data.get("left_out"):  # by what was left out
        return False, "left out: " + "; ".join(f"{what}, {reason}" for what, reason in reasons.items())
    if left_out := data.get("settings", {}).get("left_out"):
        return False, f"{len(left_out)} tables left out for want of time"
    skips = data.get("skips", {})
    if skips and not data["counts"][PASSED]:
        return True, "; ".join(skips)
    return False, f"{data['counts'][SKIPPED]} skipped" if skips else ""


def read_lines(lines: str) -> dict[str, Any]:
    """What :mod:`benchmarks.pytest_lines` wrote: counts, failures, skips by reason, the slowest tests."""
    tests = []
    for line in lines.splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # the last may be half a line
            tests.append(json.loads(line))
    counts = {outcome: sum(test["outcome"] == outcome for test in tests) for outcome in (PASSED, FAILED, SKIPPED)}
    skips: dict[str, list[str]] = {}
    for test in tests:
        if test["outcome"] == SKIPPED:
            skips.setdefault(test["why"], []).append(test["test"])
    files: dict[str, dict[str, float]] = {}
    for test in tests:
        of_file = files.setdefault(test["test"].split("::")[0], {"tests": 0, "seconds": 0.0})
        of_file["tests"] += 1
        of_file["seconds"] = round(of_file["seconds"] + test["seconds"], 3)
    return {
        "counts": counts,
        "failures": [test for test in tests if test["outcome"] == FAILED],
        "cut_off": [test for test in tests if test["outcome"] == CUT_OFF],
        "skips": skips,
        "files": files,
        "slowest": sorted(tests, key=lambda test: -test["seconds"])[:20],
    }


def lines_to_text(found: Mapping[str, Any]) -> str:
    """Counts first, then what failed, then what was not shown and why."""
    parts = [", ".join(f"{count} {outcome}" for outcome, count in found["counts"].items())]
    parts += [f"  {name}: {of['tests']:.0f} tests, {of['seconds']:.1f} s" for name, of in found["files"].items()]
    for index, test in enumerate(found["failures"]):
        parts.append(f"FAILED {test['test']}")
        if index < _SHOWN_FAILURES:
            parts.append(test["why"][-2000:])
    parts += [f"{test['test']}: {test['why']}" for test in found["cut_off"]]
    for reason, tests in found["skips"].items():
        parts.append(f"skipped, {reason}: {len(tests)}, such as {tests[0]}")
    return "\n".join(parts)


def importable_tree(tree: Path) -> Path:
    """A folder from which the package can be imported without being installed.

    ``triton_kernels`` stands beside the package in the checkout but is imported as part of it, which an installation
    sees to. Here, links do. Made anew for each stage: the build adds files.
    """
    package = tree / PACKAGE
    package.mkdir(parents=True, exist_ok=True)
    sources = [path for path in (ROOT / PACKAGE).iterdir() if path.name != "__pycache__"]
    for link, source in [
        *((package / path.name, path) for path in sources),
        (package / "triton_kernels", ROOT / "triton_kernels"),
        (tree / "benchmarks", ROOT / "benchmarks"),
    ]:
        if not link.is_symlink():
            link.symlink_to(source)
    return tree


def _environment(tree: Path, options: Options) -> dict[str, str]:
    """That of a stage: it imports from ``tree``, which is also where it runs, and before all that is installed."""
    paths = [str(tree), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {
        **os.environ,
        "TRITON_INTERPRET": "0",  # kernels are compiled
        "PYTHONPATH": os.pathsep.join(paths),
        "DBMTL_FUSED_TEST_DEVICE": options.device,
        "TQDM_DISABLE": "1",
        **({COMMIT: options.commit} if options.commit else {}),
    }


@contextlib.contextmanager
def _terminated_by_exception() -> Iterator[None]:
    """Let SIGTERM end the running stage on the way out."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _replace(path: Path, content: str) -> None:
    new = path.with_name(path.name + ".new")
    new.write_text(content)
    new.replace(path)


def _text_of(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def _without_paths(text: str, scratch: Path) -> str:
    """``text`` without what differs between machines: reports are compared."""
    text = text.replace(sys.executable, "python3").replace(str(qm9_folder.FOLDERS[1]), "../shared/data/qm9")
    for folder in (scratch / "tree", scratch, ROOT):
        text = text.replace(f"{folder}/", "")
    return text.replace(str(ROOT), ".")


def _shown(path: Path) -> str:
    return os.path.relpath(path, ROOT)


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def _say(line: str) -> None:
    print(f"[{datetime.datetime.now():%H:%M:%S}] {line}", flush=True)


def _parse(argv: Sequence[str] | None) -> Options:
    parser = argparse.ArgumentParser(
        prog="python3 -m benchmarks.gpu",
        description=__doc__,
        epilog="\n".join(["stages:", *(f"  {stage.name:12}{stage.purpose}" for stage in STAGES.values())]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    help_ = f"folder for gpu.json and gpu.txt (default: $OUT; {_shown(DEFAULT_OUT)}; of a dry run {_shown(DRY_OUT)})"
    parser.add_argument("--out", type=Path, default=os.environ.get("OUT"), help=help_)
    parser.add_argument("--stages", default=ALL, help="comma-separated (default: %(default)s)")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: a dry run")
    help_ = "for all stages together (default: %(default)s)"
    parser.add_argument("--minutes", type=float, default=MINUTES, help=help_)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that everything runs")
    parser.add_argument("--compile", action="store_true", help="operators: time torch.compile(reference) too")
    parser.add_argument("--tests", default="", help="suite: pytest's arguments instead of the default selection")
    workers = max(1, (os.cpu_count() or 1) - 2)
    help_ = "suite: processes of pytest-xdist (default: two fewer than there are processors, %(default)s)"
    parser.add_argument("--workers", type=int, default=workers, help=help_)
    parser.add_argument("--only", default="", help="sweep: comma-separated kernels")
    parser.add_argument("--data", type=Path, default=qm9_folder.folder(), help="steps, train: folder of QM9")
    help_ = f"which this is, where the checkout came without git's records (default: ${COMMIT})"
    parser.add_argument("--commit", default=os.environ.get(COMMIT, ""), help=help_)
    parsed = vars(parser.parse_args(argv))
    dry = parsed["device"] == "cpu" or parsed["quick"]
    parsed["out"] = Path(parsed["out"] or (DRY_OUT if dry else DEFAULT_OUT))
    if dry and parsed["out"].resolve() == DEFAULT_OUT:
        parser.error(f"--out must not be {_shown(DEFAULT_OUT)} in a dry run, which measures nothing")
    wanted = list(STAGES) if parsed["stages"] == ALL else parsed["stages"].split(",")
    if unknown := [name for name in wanted if name not in STAGES]:
        parser.error(f"--stages must be among {', '.join(STAGES)}, got {', '.join(unknown)}")
    parsed |= {name: parsed[name].resolve() for name in ("out", "data")}
    parsed["stages"] = tuple(name for name in STAGES if name in wanted)
    return Options(**parsed)


if __name__ == "__main__":
    sys.exit(main())
