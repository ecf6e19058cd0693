"""What every test runs under: poisoned memory, two threads, reproducible randomness, no silent skip.

* **Poison.** ``torch.use_deterministic_algorithms`` together with
  ``torch.utils.deterministic.fill_uninitialized_memory`` makes torch fill what ``empty`` and its kin return with NaN
  (integers: the largest one). Unlike patching the Python functions it also reaches memory that C++ code gets from the
  dispatcher, and ``resize_``. It misses what native code allocates by itself and buffers of code that Inductor
  generates. ``test_ops_harness.py`` shows that it works.
* **Randomness.** Every run draws new inputs. The seed is printed in the header and with each failure;
  ``DBMTL_FUSED_TEST_SEED`` brings it back. Hypothesis runs the same examples each time (profile ``ci``), or new ones
  with ``HYPOTHESIS_PROFILE=explore``.
* **Backends.** A test that takes ``backend`` runs for every backend of ``DBMTL_FUSED_TEST_DEVICE`` (default ``cpu``),
  one that takes ``native_backend`` for each but the reference. Without a GPU: with ``TRITON_INTERPRET=1`` only tests of
  the Triton backend run, in Triton's interpreter; with ``DBMTL_FUSED_TEST_CUDA_EMU=1`` the CUDA backend is among the
  others, its sources built for CPUs with the emulation in ``cuda_emu``.
"""

from __future__ import annotations

import os
import random
import sys
import zlib
from collections.abc import Iterator
from typing import Any

# cuBLAS refuses to run under deterministic algorithms without it, and reads it once.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# Threads that spin while compilers or pytest-xdist's other workers want their core make tests several times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import hypothesis
import numpy as np
import pytest
import torch
from op_inputs import BACKENDS, DEVICE, NATIVE_BACKENDS
from stand_ins import EMULATED, INTERPRETED

THREADS = 2
SEED_VARIABLE = "DBMTL_FUSED_TEST_SEED"

EXAMPLES = 10 if INTERPRETED else 40

hypothesis.settings.register_profile("ci", derandomize=True, deadline=None, max_examples=EXAMPLES)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=1000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_configure(config: pytest.Config) -> None:
    # In the environment, so that the workers of pytest-xdist share it.
    os.environ.setdefault(SEED_VARIABLE, str(random.SystemRandom().randrange(2**32)))


def pytest_report_header() -> str:
    return f"device: {DEVICE}, backends: {', '.join(BACKENDS)}, {SEED_VARIABLE}={os.environ[SEED_VARIABLE]}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for name, values in (("backend", BACKENDS), ("native_backend", NATIVE_BACKENDS)):
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, values)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if (EMULATED or INTERPRETED) and item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="too large for Triton's interpreter and the CUDA emulation"))
    if not INTERPRETED:
        return
    chosen, others = [], []
    for item in items:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        wanted = "triton" in (parameters.get("backend"), parameters.get("native_backend"))
        (chosen if wanted or item.path.name == "test_triton_interpreter.py" else others).append(item)
    config.hook.pytest_deselected(items=others)
    items[:] = chosen


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if INTERPRETED and exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
        session.exitstatus = pytest.ExitCode.OK  # what was asked for does not concern Triton


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    """Poisoned memory, a fixed number of threads and whole float32 products, whatever the test before left behind."""
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.use_deterministic_algorithms(False)
    if DEVICE.type == "cuda":
        _end_worker_if_device_failed()


def _end_worker_if_device_failed() -> None:
    """A process whose kernel has failed can do nothing more on the GPU; pytest-xdist replaces it by a new one."""
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        if "PYTEST_XDIST_WORKER" not in os.environ:
            raise
        print(error, file=sys.stderr, flush=True)
        os._exit(1)


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Random numbers of this test in this run; does not depend on which other tests ran."""
    return np.random.default_rng([int(os.environ[SEED_VARIABLE]), zlib.crc32(request.node.nodeid.encode())])


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> Any:
    """See ``triton_launches.recording``."""
    from triton_launches import recording

    return recording(monkeypatch)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report: Any = yield
    if report.failed and "rng" in getattr(item, "fixturenames", ()):
        again = f"{SEED_VARIABLE}={os.environ[SEED_VARIABLE]} python -m pytest '{item.nodeid}'"
        report.sections.append(("same random inputs again", again))
    return report


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """List every skipped test by its reason, so that a green run says what it did not show."""
    skipped: dict[str, list[str]] = {}
    for report in terminalreporter.stats.get("skipped", ()):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        skipped.setdefault(reason.removeprefix("Skipped: "), []).append(report.nodeid)
    if skipped:
        terminalreporter.section("not shown by this run")
    for reason, nodeids in skipped.items():
        terminalreporter.line(f"{reason}:")
        for nodeid in nodeids:
            terminalreporter.line(f"    {nodeid}")
