"""What nvcc makes of the CUDA kernels, without a GPU: no spills, 16-byte accesses, enough of them in flight."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import runpy
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
CUDA = ROOT / "csrc" / "cuda"
NVCC = shutil.which("nvcc")
ARCHITECTURES = ("80", "90", "100")
# As in setup.py; the last one is torch's.
FLAGS = ["-std=c++17", "-O3", "-fmad=false", "-Xptxas=-v", "-Werror=all-warnings", "--expt-relaxed-constexpr"]

LOAD = re.compile(r"\bLDG\.E\.(?:\w+\.)*128\b")
STORE = re.compile(r"\bSTG\.E\b")
MULTIPLY = re.compile(r"\bF(?:FMA|MUL)\b")
WIDE_STORE = re.compile(r"\bSTG\.E\.(?:\w+\.)*128\b")

pytestmark = pytest.mark.skipif(NVCC is None, reason="needs nvcc")


def cuobjdump() -> str | None:
    """From the toolkit, or the one that triton brings."""
    spec = importlib.util.find_spec("triton")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
    bundled = [folder / "backends" / "nvidia" / "bin" / "cuobjdump" for folder in folders]
    return shutil.which("cuobjdump") or next((str(path) for path in bundled if path.exists()), None)


class Compiled(NamedTuple):
    cubin: Path
    report: str  # what ptxas said


def compile_for(architecture: str, source: Path) -> Compiled:
    assert NVCC is not None
    command = [NVCC, *FLAGS, f"-arch=sm_{architecture}", "-cubin", str(source)]
    key = hashlib.sha256(repr(command).encode())
    for path in [source, *sorted((ROOT / "csrc").glob("*.h")), *sorted(CUDA.glob("*.h")), *sorted(CUDA.glob("*.cuh"))]:
        key.update(path.read_bytes())
    folder = ROOT / "build" / "cuda_sass" / key.hexdigest()[:24]
    cubin, report = folder / f"{source.stem}.cubin", folder / "report.txt"
    if not report.exists():
        folder.mkdir(parents=True, exist_ok=True)
        result = subprocess.run([*command, "-o", str(cubin)], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        report.write_text(result.stderr)
    return Compiled(cubin, report.read_text())


@pytest.fixture(scope="session")
def compiled() -> dict[tuple[str, str], Compiled]:
    """By architecture and name of the source."""
    sources = sorted(CUDA.glob("*.cu"))  # the one that takes longest comes first, so that no core waits for it
    jobs = [(architecture, source) for source in sources for architecture in ARCHITECTURES]
    with ThreadPoolExecutor(2) as pool:
        results = pool.map(lambda job: compile_for(*job), jobs)
    return {(arch, source.stem): result for (arch, source), result in zip(jobs, results, strict=True)}


KERNELS = {"balance": 3 * 4, "begin_step": 2 * 2, "combine": 9 + 2, "ema_update": 3 * 3, "gram": 5 + 4 + 4}
"""How many each source has: states times sizes; begin_step's losses times betas."""


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", KERNELS)
def test_no_spills(compiled: dict[tuple[str, str], Compiled], architecture: str, source: str) -> None:
    """Nor any other use of local memory: no dynamically indexed registers. Functions that are called count as well."""
    report = compiled[architecture, source].report
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert report.count("Compiling entry function") == KERNELS[source]
    assert len(frames) >= KERNELS[source]
    assert set(frames) == {("0", "0", "0")}


def kernels_of(compiled: Compiled, pattern: str) -> dict[int, list[str]]:
    """Machine instructions of the kernels whose mangled name is like ``pattern``, by the number that it finds there."""
    if (tool := cuobjdump()) is None:
        pytest.skip("needs cuobjdump")
    entries = re.findall(r"Compiling entry function '(\S+)'", compiled.report)
    names = {name: int(found[1]) for name in entries if (found := re.search(pattern, name))}
    command = [tool, "--dump-sass", "--function", ",".join(names), str(compiled.cubin)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {names[part.split()[0]]: part.splitlines() for part in listing.split("Function : ")[1:]}


def most_in_flight(instructions: list[str], end: re.Pattern[str] = STORE) -> int:
    """The longest run of 16-byte loads without an ``end`` between them."""
    most = run = 0
    for line in instructions:
        if LOAD.search(line):
            run += 1
        elif end.search(line):
            run = 0
        most = max(most, run)
    return most


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", ["balance", "combine", "ema_update"])
def test_words_of_16_bytes(compiled: dict[tuple[str, str], Compiled], architecture: str, source: str) -> None:
    """With float32 throughout: at least min(2 T, 8) loads are on their way before a store waits for the first."""
    of_float32 = kernels_of(compiled[architecture, source], rf"{source}_kernelIfLi(\d+)E")
    assert len(of_float32) == {"balance": 4, "combine": 9, "ema_update": 3}[source]
    for size, lines in of_float32.items():
        wanted = {"balance": min(2 * size, 8), "combine": min(2 * size, 8) if size < 5 else size, "ema_update": 8}
        found = most_in_flight(lines)
        assert found >= (wanted[source] or 4), f"{source} {size}: {found} loads in flight"
        assert any(WIDE_STORE.search(line) for line in lines), f"{source} {size}: no 16-byte store"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gram_loads_before_it_multiplies(compiled: dict[tuple[str, str], Compiled], architecture: str) -> None:
    """Words of all rows of a block, and of several spans of few rows."""
    kernels = kernels_of(compiled[architecture, "gram"], r"gram_kernelIfLi(\d+)E")
    found = {rows: most_in_flight(lines, MULTIPLY) for rows, lines in kernels.items()}
    assert found.keys() == {1, 2, 3, 4, 8}
    assert all(found[rows] >= wanted for rows, wanted in {1: 4, 2: 8, 3: 6, 4: 8, 8: 8}.items()), found


def test_setup_compiles_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The flags above that matter are those of the build; none gives up rounding, or numbers below the normal ones."""
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    flags = runpy.run_path(str(ROOT / "setup.py"))["cuda_module"]().extra_compile_args["nvcc"]
    assert {"-std=c++17", "-O3", "-fmad=false"} <= set(flags)
    assert not [flag for flag in flags if re.search("fast|ftz|prec-", flag)]
