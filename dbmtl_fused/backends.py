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
"""Replaces ``backend="auto"`` if set when the package is imported; an explicit argument beats it."""

DEFAULT = os.environ.get(ENVIRONMENT_VARIABLE, "auto")

_AUTO = {"cpu": ("cpu", "reference")}
_AUTO_ACCELERATOR = ("cuda", "triton", "reference")
_MODULES = {"cuda": "dbmtl_fused._C_cuda", "cpu": "dbmtl_fused._C", "triton": "dbmtl_fused.triton_kernels"}
# What setup.py writes where it cannot build a module, and what that means.
_BUILD_ERRORS = {
    "dbmtl_fused._C": (
        "_build_error.txt",
        "the C++ extension is not there ({}); install a C++ compiler and reinstall dbmtl_fused",
    ),
    "dbmtl_fused._C_cuda": ("_build_error_cuda.txt", "the C++ extension was built without CUDA ({})"),
}


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
    """Why ``module``, which registers kernels when imported, cannot be; None if it can."""
    try:
        importlib.import_module(module)
    except ImportError as error:
        if module in _BUILD_ERRORS and isinstance(error, ModuleNotFoundError):
            file, message = _BUILD_ERRORS[module]
            record = Path(__file__).with_name(file)
            return message.format(record.read_text().strip() if record.exists() else "its build did not run")
        return f"{module} cannot be imported: {error}"
    return None


def native_modules() -> list[str]:
    """The modules of the C++ extension that are there."""
    return [module for module in _BUILD_ERRORS if _import_error(module) is None]


@functools.cache
def why_not(backend: str, device_type: str) -> str | None:
    """Why ``backend`` cannot run on tensors of ``device_type`` here, or None if it can."""
    if backend in _MODULES and (error := _import_error(_MODULES[backend])):
        return error
    key = torch._C._dispatch_key_for_device(device_type)
    for op in operators(backend):
        if not torch._C._dispatch_has_computed_kernel_for_dispatch_key(op.name(), key):
            return f"it has no {op.name()} kernel for {device_type} tensors"
    return None


def available(device_type: str) -> list[str]:
    """The backends that can run on tensors of ``device_type`` here, fastest first."""
    return [backend for backend in BACKENDS if why_not(backend, device_type) is None]


def resolve(backend: str, device: torch.device) -> str:
    """The backend to use: ``backend`` itself, or the best one there is if it is ``"auto"``.

    :raises ValueError: If ``backend`` is not a backend's name.
    :raises RuntimeError: If an explicitly requested backend cannot run here; the message says why.
    """
    wanted, source = (DEFAULT, ENVIRONMENT_VARIABLE) if backend == "auto" else (backend, "backend")
    if wanted == "auto":
        return _auto(device.type)
    if wanted not in BACKENDS:
        raise ValueError(f"{source} must be one of {('auto', *BACKENDS)}, got {wanted!r}")
    if reason := why_not(wanted, device.type):
        raise RuntimeError(f"{source}={wanted!r} cannot run on {device.type} tensors here: {reason}")
    return wanted


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
