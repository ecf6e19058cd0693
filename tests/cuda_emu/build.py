"""Builds the CUDA sources as plain C++ against the emulation in ``include/``: as ``dbmtl_fused._C_cuda`` with operators
for CPU tensors, or as a program.

What is built is kept under ``build/cuda_emu``, keyed by the sources, the compiler and the flags.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import torch

ROOT = Path(__file__).parents[2]
EMULATION = ROOT / "tests" / "cuda_emu"
CUDA = ROOT / "csrc" / "cuda"
CACHE = ROOT / "build" / "cuda_emu"
MODULE = "dbmtl_fused._C_cuda"

KERNELS = [
    *(CUDA / f"{name}.cu" for name in ("balance", "begin_step", "combine", "ema_update", "gram")),
    CUDA / "plan.cpp",
]
HOST = [CUDA / "host.cpp", CUDA / "bindings.cpp", ROOT / "csrc" / "checks.cpp", EMULATION / "stream.cpp"]

# -ffp-contract=off is nvcc's -fmad=false; words of memory are read as other types than they were written.
FLAGS = ["-std=c++17", "-ffp-contract=off", "-fno-strict-aliasing", "-fPIC", "-pthread", "-w"]

HEADERS = (".h", ".cuh")

COMPILER = shutil.which("g++")
"""None if there is none."""

COMPILER_VERSION = COMPILER and subprocess.run([COMPILER, "--version"], capture_output=True, text=True).stdout


def build(name: str, sources: Sequence[Path], flags: Sequence[str], link: Sequence[str]) -> Path:
    """Compile and link ``sources``, or find what that gave before.

    :raises RuntimeError: With what the compiler said.
    """
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda source: _compile(source, flags), sources))
    return _cached(name, [*map(str, objects), *link], [])


def _compile(source: Path, flags: Sequence[str]) -> Path:
    # A changed copy of a source still finds its neighbours.
    include = [f"-I{EMULATION / 'include'}", f"-I{CUDA}"]
    headers = [path for folder in (ROOT / "csrc", EMULATION) for path in folder.rglob("*") if path.suffix in HEADERS]
    arguments = [*FLAGS, *include, *flags, "-x", "c++", "-c", str(source)]
    return _cached(f"{source.stem}.o", arguments, [source, *sorted(headers)])


def _cached(name: str, arguments: Sequence[str], inputs: Sequence[Path]) -> Path:
    """What the compiler makes of ``arguments``, which do not say where to put it."""
    assert COMPILER is not None
    key = hashlib.sha256(repr((COMPILER_VERSION, arguments)).encode())
    for path in inputs:
        key.update(path.read_bytes())
    target = CACHE / key.hexdigest()[:24] / name
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}")
        _run([COMPILER, *arguments, "-o", str(partial)])
        partial.rename(target)
    return target


def _run(command: Sequence[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{result.stdout}{result.stderr}")


def load_module(dispatch_key: str = "CPU") -> ModuleType:
    """The emulated ``dbmtl_fused._C_cuda``, with the operators registered for ``dispatch_key``."""
    import pybind11
    from torch.utils.cpp_extension import include_paths

    headers = [pybind11.get_include(), *include_paths(), sysconfig.get_paths()["include"]]
    flags = [
        "-O2",
        "-fvisibility=hidden",
        f"-DDBMTL_DISPATCH_KEY={dispatch_key}",
        "-DTORCH_TARGET_VERSION=0x020b000000000000",
        *(f"-isystem{path}" for path in headers),
    ]
    link = ["-shared", "-pthread", f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu"]
    spec = importlib.util.spec_from_file_location(MODULE, build("_C_cuda.so", [*KERNELS, *HOST], flags, link))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def install() -> None:
    """Put the emulated module in the place of the real one: ``backend="cuda"`` then takes CPU tensors."""
    os.environ.setdefault("CUDA_EMU_SMS", "3")
    sys.modules[MODULE] = load_module()
