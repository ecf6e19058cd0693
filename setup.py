"""Build of the native module ``dbmtl_fused._C``; metadata is in pyproject.toml.

The module is optional: where it cannot be built, the package installs without it, and ``python -m dbmtl_fused info``
prints why. It keeps to torch's stable ABI of ``TORCH_TARGET``, so that it loads in that release and every later one,
whichever it was built with.

Environment: ``CXX`` the compiler, ``MAX_JOBS`` parallel jobs, ``DBMTL_FUSED_WERROR=1`` makes warnings errors.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
MODULE = "dbmtl_fused._C"
TORCH_TARGET = (2, 11)

BuildExtension: Any = build_ext
missing: ImportError | None = None
try:
    import pybind11
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths
except ImportError as error:
    missing = error


def native_module() -> Extension:
    if missing is not None:
        return Extension(MODULE, sources=[])  # keeps its place, so that OptionalBuild runs and records why
    warnings = ["-Wall", "-Wextra", *(["-Werror"] if os.environ.get("DBMTL_FUSED_WERROR") == "1" else [])]
    major, minor = TORCH_TARGET
    # As system headers: their warnings are not ours. pybind11's own come first: torch's copy refuses
    # TORCH_TARGET_VERSION.
    headers = [pybind11.get_include(), *include_paths()]
    extension = CppExtension(
        MODULE,
        sources=sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.cpp")),
        depends=sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.h")),
        extra_compile_args=[
            "-std=c++17",
            "-O3",
            # Bitwise equality with the reference, and between instruction sets, forbids fused multiply-adds.
            "-ffp-contract=off",
            "-fvisibility=hidden",
            "-g0",
            f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}000000000000",
            *warnings,
            *(f"-isystem{path}" for path in headers),
        ],
    )
    extension.libraries = ["torch_cpu"]  # the stable ABI is all in there; Python's symbols come from the process
    return extension


class OptionalBuild(BuildExtension):
    """Builds the module, or records why it could not."""

    def run(self) -> None:
        package = Path(self.get_ext_fullpath(MODULE)).parent
        record = package / "_build_error.txt"
        try:
            check_requirements()
            super().run()
            record.unlink(missing_ok=True)
        except Exception as error:  # whatever compilers and build tools come up with
            reason = f"the native module could not be built: {error}"
            for stale in package.glob("_C*.so"):
                stale.unlink()
            package.mkdir(parents=True, exist_ok=True)
            record.write_text(reason + "\n")
            self.extensions: list[Extension] = []  # nothing to copy or to install
            print(f"\n*** dbmtl_fused is installed without its native backends:\n*** {reason}\n", file=sys.stderr)


def check_requirements() -> None:
    if missing is not None:
        raise RuntimeError(
            f"torch and pybind11 are needed at build time ({missing}): "
            "install them, then this with --no-build-isolation"
        )
    if tuple(map(int, torch.__version__.split(".")[:2])) < TORCH_TARGET:
        raise RuntimeError(f"torch >= {'.'.join(map(str, TORCH_TARGET))} is needed, found {torch.__version__}")


setup(
    packages=[*find_packages(include=["dbmtl_fused", "dbmtl_fused.*"]), "dbmtl_fused.triton_kernels"],
    # The folder stands at the top, but the import name `triton_kernels` belongs to another project.
    package_dir={"dbmtl_fused": "dbmtl_fused", "dbmtl_fused.triton_kernels": "triton_kernels"},
    ext_modules=[native_module()],
    cmdclass={"build_ext": OptionalBuild},
)
