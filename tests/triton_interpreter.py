"""Triton's interpreter, made to round and compute as a GPU does. Import before any kernel runs.

It computes with NumPy, and differs from compiled code in ways that would hide mistakes or invent some:

* float32 to bfloat16 is cut off instead of rounded, and subnormal bfloat16 values become others;
* bfloat16 values are integers to NumPy, so that arithmetic on them is silently nonsense: it raises instead;
* Python floats become float32, although our kernels declare theirs as float64;
* NumPy warns where integers wrap or floats overflow, which here is an error and on a GPU what is meant to happen;
* with NumPy 2.4, up to Triton 3.7, a scalar of one element cannot be the bound of a loop;
* it replaces Triton's language by its own at every call of a function: once a module and launch saves half of the time.

All this is private to Triton; ``test_triton_interpreter.py`` notices if it moves.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_cast = interpreter.InterpreterBuilder.cast_impl
_binary_op = interpreter.InterpreterBuilder.binary_op
_patch_language = interpreter._patch_lang
_patch_tensor = interpreter._patch_lang_tensor
_run = interpreter.GridExecutor.__call__
_convert_argument = interpreter._implicit_cvt


def _rounding_cast(self: Any, src: Any, dst_type: Any) -> Any:
    source, target = src.dtype.scalar, dst_type.scalar
    if source == tl.float32 and target == tl.bfloat16:
        bits = np.ascontiguousarray(src.data).view(np.uint32)
        rounded = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return interpreter.TensorHandle(np.where(np.isnan(src.data), np.uint16(0x7FFF), rounded), target)
    if source == tl.bfloat16 and target == tl.float32:
        return interpreter.TensorHandle((src.data.astype(np.uint32) << 16).view(np.float32), target)
    if tl.bfloat16 in (source, target) and source != target and tl.float32 not in (source, target):
        raise NotImplementedError(f"interpreted cast from {source} to {target}; go by way of float32")
    return _cast(self, src, dst_type)


def _checked_binary_op(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
    if tl.bfloat16 in (lhs.dtype.scalar, rhs.dtype.scalar):
        raise NotImplementedError("interpreted arithmetic on bfloat16; convert to float32 first")
    return _binary_op(self, lhs, rhs, op)


_patched_modules: set[int] = set()


def _patch_language_once(function: Any) -> Any:
    module = id(function.__globals__)
    if module in _patched_modules:
        return interpreter._LangPatchScope()
    _patched_modules.add(module)
    return _patch_language(function)


def _run_without_warnings(self: Any, *args: Any, **kwargs: Any) -> None:
    _patched_modules.clear()
    with np.errstate(all="ignore"):
        _run(self, *args, **kwargs)


def _convert_declared_argument(value: Any) -> Any:
    if isinstance(value, float):
        return tl.tensor(interpreter.TensorHandle(np.array([value]), tl.float64), tl.float64)
    return _convert_argument(value)


def _patch_tensor_index(tensor: Any, scope: Any) -> None:
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


interpreter.InterpreterBuilder.cast_impl = _rounding_cast
interpreter.InterpreterBuilder.binary_op = _checked_binary_op
interpreter._patch_lang = _patch_language_once
interpreter._patch_lang_tensor = _patch_tensor_index
interpreter._implicit_cvt = _convert_declared_argument
interpreter.GridExecutor.__call__ = _run_without_warnings
