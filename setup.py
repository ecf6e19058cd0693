"""Build of the native modules ``dbmtl_fused._C`` (CPU) and ``dbmtl_fused._C_cuda``; metadata is in pyproject.toml.

Both are optional: where one cannot be built, the package installs without it, and ``python -m dbmtl_fused info`` prints
why. They keep to torch's stable ABI of ``TORCH_TARGET``, so that they load in that release and every later one,
whichever they were built with. CUDA is a module of its own, as it needs libtorch_cuda: the other loads without.

Environment: ``CXX`` the compiler, ``MAX_JOBS`` parallel jobs, ``DBMTL_FUSED_WERROR=1`` makes warnings errors.
``DBMTL_FUSED_CUDA=0`` builds no CUDA, ``=1`` makes it an error if that cannot be built; by default it is built where
there is a CUDA toolkit (``CUDA_HOME``, or ``nvcc`` on the path) and torch has CUDA. ``TORCH_CUDA_ARCH_LIST`` replaces
``CUDA_ARCHITECTURES``.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
MODULE = "dbmtl_fused._C"
CUDA_MODULE = "dbmtl_fused._C_cuda"
RECORDS = {MODULE: "_build_error.txt", CUDA_MODULE: "_build_error_cuda.txt"}
TORCH_TARGET = (2, 11)
CUDA_ARCHITECTURES = "8.0 8.6 8.9 9.0 10.0 12.0+PTX"


def switch(name: str) -> str:
    """Read an environment variable that is 0, 1 or unset, which is the same as empty."""
    if (value := os.environ.get(name, "")) not in ("", "0", "1"):
        raise SystemExit(f"{name} must be 0, 1 or unset, got {value!r}")
    return value


WERROR = switch("DBMTL_FUSED_WERROR") == "1"
CUDA = switch("DBMTL_FUSED_CUDA")


def find_toolkit() -> str | None:
    """The root of the CUDA toolkit. ``nvcc`` itself is asked, as what is on the path may be a script."""
    if home := os.environ.get("CUDA_HOME"):
        return home
    if (nvcc := shutil.which("nvcc")) is None:
        return None
    result = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False)
    found = re.search(r"^#\$ TOP=(.+)$", result.stderr, re.MULTILINE)
    return str(Path(found[1].strip()).resolve()) if found else None


TOOLKIT = find_toolkit()
os.environ["TORCH_CUDA_ARCH_LIST"] = os.environ.get("TORCH_CUDA_ARCH_LIST") or CUDA_ARCHITECTURES
if TOOLKIT is not None:
    os.environ["CUDA_HOME"] = TOOLKIT  # torch.utils.cpp_extension reads it when it is imported

BuildExtension: Any = build_ext
missing: ImportError | None = None
try:
    import pybind11
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths
except ImportError as error:
    missing = error


def files(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in (ROOT / "csrc").glob(pattern))


def cxx_flags(headers: list[str]) -> list[str]:
    """Of every C++ file. Other people's headers come as system headers: their warnings are not ours."""
    major, minor = TORCH_TARGET
    return [
        "-std=c++17",
        "-O3",
        # Bitwise equality with the reference, and between instruction sets, forbids fused multiply-adds.
        "-ffp-contract=off",
        "-fvisibility=hidden",
        "-g0",
        f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}000000000000",
        *["-Wall", "-Wextra", *(["-Werror"] if WERROR else [])],
        *(f"-isystem{path}" for path in headers),
    ]


def cpu_module() -> Extension:
    if missing is not None:
        return Extension(MODULE, sources=[])  # keeps its place, so that OptionalBuild runs and records why
    extension = CppExtension(
        MODULE,
        sources=files("*.cpp", "cpu/*.cpp"),
        depends=files("*.h", "cpu/*.h"),
        # pybind11's own headers come first: torch's copy refuses TORCH_TARGET_VERSION.
        extra_compile_args=cxx_flags([pybind11.get_include(), *include_paths()]),
    )
    extension.libraries = ["torch_cpu"]  # the stable ABI is all in there; Python's symbols come from the process
    return extension


def cuda_module() -> Extension:
    if missing is not None or TOOLKIT is None:
        return Extension(CUDA_MODULE, sources=[])
    architectures = os.environ["TORCH_CUDA_ARCH_LIST"]
    headers = [pybind11.get_include(), *include_paths(), str(Path(TOOLKIT) / "include")]
    facts = ["-DUSE_CUDA", f'-DDBMTL_CUDA_ARCHITECTURES="{architectures}"']
    extension = CppExtension(
        CUDA_MODULE,
        sources=files("cuda/*.cu", "cuda/*.cpp", "checks.cpp"),
        depends=files("*.h", "cuda/*.h", "cuda/*.cuh"),
        extra_compile_args={
            "cxx": [*cxx_flags(headers), *facts],
            "nvcc": [
                "-std=c++17",
                "-O3",
                "-fmad=false",  # see -ffp-contract above
                "-lineinfo",
                "-Xptxas=-v",
                "-Xcompiler=-fvisibility=hidden,-Wall,-Wextra",
                *(["-Werror=all-warnings"] if WERROR else []),
            ],
        },
    )
    # The runtime is linked in: nothing but the driver has to be there, nor to be of one version with torch's.
    extension.libraries = ["torch_cpu", "torch_cuda", "cudart_static", "rt", "dl", "pthread"]
    extension.library_dirs += [str(Path(TOOLKIT) / folder) for folder in ("lib64", "lib")]
    return extension


class OptionalBuild(BuildExtension):
    """Builds each module, or records why it could not."""

    def run(self) -> None:
        package = Path(self.get_ext_fullpath(MODULE)).parent
        package.mkdir(parents=True, exist_ok=True)
        built: list[Extension] = []
        for module in self.distribution.ext_modules or []:
            record = package / RECORDS[module.name]
            self.extensions: list[Extension] = [module]
            self.compiler = None  # what it was before the first run
            try:
                check_requirements(module.name)
                self._build(module.name)
                record.unlink(missing_ok=True)
                built.append(module)
            except Exception as error:  # whatever compilers and build tools come up with
                if module.name == CUDA_MODULE and CUDA == "1":
                    raise
                for stale in package.glob(f"{module.name.split('.')[-1]}.*.so"):
                    stale.unlink()
                record.write_text(f"{error}\n")
                print(f"\n*** dbmtl_fused is installed without {module.name}:\n*** {error}\n", file=sys.stderr)
        self.extensions = built  # nothing else to copy or to install

    def _build(self, module: str) -> None:
        try:
            super().run()
        except Exception as error:  # which names neither what it needs nor what was set
            architectures = f", TORCH_CUDA_ARCH_LIST={os.environ['TORCH_CUDA_ARCH_LIST']!r}"
            needs = f"a C++17 compiler{architectures if module == CUDA_MODULE else ''}"
            raise RuntimeError(f"{error} (the build needs {needs}; its output says more)") from error


def check_requirements(module: str) -> None:
    if missing is not None:
        raise RuntimeError(
            f"torch and pybind11 are needed at build time ({missing}): "
            "install them, then this with --no-build-isolation"
        )
    if tuple(map(int, torch.__version__.split(".")[:2])) < TORCH_TARGET:
        raise RuntimeError(f"torch >= {'.'.join(map(str, TORCH_TARGET))} is needed, found {torch.__version__}")
    if module == CUDA_MODULE:
        if CUDA == "0":
            raise RuntimeError("DBMTL_FUSED_CUDA=0 when it was built")
        if torch.version.cuda is None:
            raise RuntimeError(f"torch {torch.__version__}, with which it was built, has no CUDA")
        if TOOLKIT is None:
            raise RuntimeError("no CUDA toolkit when it was built: CUDA_HOME is not set and nvcc not on the path")


setup(
    packages=[*find_packages(include=["dbmtl_fused", "dbmtl_fused.*"]), "dbmtl_fused.triton_kernels"],
    # The folder stands at the top, but the import name `triton_kernels` belongs to another project.
    package_dir={"dbmtl_fused": "dbmtl_fused", "dbmtl_fused.triton_kernels": "triton_kernels"},
    ext_modules=[cpu_module(), cuda_module()],
    cmdclass={"build_ext": OptionalBuild},
)
