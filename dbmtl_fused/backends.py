"""Which backends this machine has, why the others are missing, and which one to use."""

from __future__ import annotations

import functools
import importlib
import logging
import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch._ops import OpOverload

from dbmtl_fused import reference  # noqa: F401  (registers the reference overloads)
from dbmtl_fused._ops import BACKENDS, NAMESPACE

logger = logging.getLogger("dbmtl_fused")

ENVIRONMENT_VARIABLE = "DBMTL_FUSED_BACKEND"
"""Replaces ``backend="auto"`` if set and not empty when the package is imported; an explicit argument beats it."""

DEFAULT = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"

_AUTO = {"cpu": ("cpu", "reference")}
_AUTO_ACCELERATOR = ("cuda", "triton", "reference")
_MODULES = {"cuda": "dbmtl_fused._C_cuda", "cpu": "dbmtl_fused._C", "triton": "dbmtl_fused.triton_kernels"}
_DEVICES = {"cuda": ("cuda",), "cpu": ("cpu",), "triton": ("cuda", "xpu")}
# What setup.py writes where it cannot build a module, and what builds it.
_BUILD_ERRORS = {"dbmtl_fused._C": "_build_error.txt", "dbmtl_fused._C_cuda": "_build_error_cuda.txt"}
_BUILD = "run `pip install --no-build-isolation .` in a checkout of dbmtl_fused"


class Operators(NamedTuple):
    """The operators of one backend; contracts in :mod:`dbmtl_fused._ops`."""

    begin_step: OpOverload
    ema_update_: OpOverload
    combine: OpOverload
    gram: OpOverload
    balance_: OpOverload


@functools.cache
def operators(backend: str) -> Operators:
    """The operators of ``backend``, one of :data:`BACKENDS`; calling them fails where :func:`why_not` says so."""
    if backend in _MODULES:
        _import_error(_MODULES[backend])  # importing registers the kernels
    namespace = getattr(torch.ops, NAMESPACE)
    return Operators(*(getattr(getattr(namespace, name), backend) for name in Operators._fields))


@functools.cache
def _import_error(module: str) -> str | None:
    """Why ``module``, which registers kernels when imported, cannot be, and the cure; None if it can."""
    try:
        importlib.import_module(module)
    except Exception as error:  # whatever a compiled module, or another version of Triton, comes up with
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing == "triton":
            return "Triton is not installed; run `pip install triton`"
        if missing == module:
            record = Path(__file__).parent / _BUILD_ERRORS.get(module, "")
            found = record.read_text().strip() if record.is_file() else "its build did not run"
            return f"{module} is not there: {found}; put that right and {_BUILD}"
        cure = "install another version of Triton" if module == _MODULES["triton"] else _BUILD
        return f"{module} cannot be imported beside torch {torch.__version__}: {error}; {cure}"
    return None


def native_modules() -> list[str]:
    """The modules of the C++ extension that are there."""
    return [module for module in _BUILD_ERRORS if _import_error(module) is None]


@functools.cache
def why_not(backend: str, device_type: str) -> str | None:
    """Why ``backend`` cannot run on tensors of ``device_type`` here, and the cure; None if it can."""
    error = _import_error(_MODULES[backend]) if backend in _MODULES else None
    if error is None and _has_kernels(backend, device_type):
        return None
    if device_type not in _DEVICES[backend]:
        return _other_device(backend, device_type)
    return error or "its interpreter (TRITON_INTERPRET=1) works on CPU tensors; unset TRITON_INTERPRET"


def _has_kernels(backend: str, device_type: str) -> bool:
    key = torch._C._dispatch_key_for_device(device_type)
    return all(torch._C._dispatch_has_computed_kernel_for_dispatch_key(op.name(), key) for op in operators(backend))


def _other_device(backend: str, device_type: str) -> str:
    if backend == "cpu":
        return "it works on CPU tensors; move the model to the CPU before its balancer is built"
    if any(torch.get_device_module(name).is_available() for name in _DEVICES[backend]):
        return "it works on GPU tensors; move the model to the GPU before its balancer is built"
    return f"it needs a GPU; {no_gpu()}"


def no_gpu() -> str:
    """Why there is no GPU, as far as torch knows."""
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is a build without CUDA, install one with CUDA"
    return "none is visible to torch (torch.cuda.is_available() is False)"


def available(device_type: str) -> list[str]:
    """The backends that can run on tensors of ``device_type`` here, fastest first."""
    return [backend for backend in BACKENDS if why_not(backend, device_type) is None]


def resolve(backend: str, device: torch.device) -> str:
    """The backend to use: ``backend`` itself, or the best one there is if it is ``"auto"``.

    :raises ValueError: If ``backend`` is not a backend's name.
    :raises RuntimeError: If an explicitly requested backend cannot run here; the message says why.
    """
    wanted, source = (DEFAULT, ENVIRONMENT_VARIABLE) if backend == "auto" else (backend, "backend")
    _check_name(wanted, source)
    if wanted == "auto":
        return _auto(device.type)
    if reason := why_not(wanted, device.type):
        cure = "use backend='auto'" if source == "backend" else f"unset {source}"
        raise RuntimeError(
            f"{source}={wanted!r} cannot run on {device.type} tensors here: {reason}; "
            f"or {cure} for the fastest that can"
        )
    return wanted


def check_environment() -> None:
    """Raise where an environment variable that the package reads has none of its values.

    :raises ValueError: It names the variable, its values and the value found.
    """
    _check_name(DEFAULT, ENVIRONMENT_VARIABLE)
    if _import_error(_MODULES["cpu"]) is None:
        importlib.import_module(_MODULES["cpu"]).build_info()  # reads DBMTL_FUSED_CPU_ISA


def _check_name(name: str, source: str) -> None:
    if name not in ("auto", *BACKENDS):
        raise ValueError(f"{source} must be one of {('auto', *BACKENDS)}, got {name!r}")


# A constant for torch.compile, which cannot trace imports. What torch.compiler.assume_constant_result does, without its
# import of the whole compiler.
resolve._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _auto(device_type: str) -> str:
    """The best backend for ``device_type``; cached, so that the choice is logged once."""
    candidates = _AUTO.get(device_type, _AUTO_ACCELERATOR)
    missing = {}
    for backend in candidates:
        if (reason := why_not(backend, device_type)) is None:
            break
        missing[backend] = reason
    level = logging.WARNING if missing and backend == "reference" else logging.INFO
    notes = "".join(f"; no {name}: {reason}" for name, reason in missing.items())
    logger.log(level, "backend %r for %s tensors%s", backend, device_type, notes)
    return backend
