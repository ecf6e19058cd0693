"""What a launch would not survive raises instead, naming the parameter, the rule and what was found.

Users meet the checks of ``dbmtl_fused.functional`` and ``dbmtl_fused.layout`` first; these are the last line.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dbmtl_fused._ops import ALPHA_MODES, GRAD_DTYPES, STATE_DTYPES, compute_dtype


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _columns_adjacent(name: str, tensor: Tensor) -> None:
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise RuntimeError(f"{name} must have adjacent columns, got stride {tensor.stride(-1)}")


def _on(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise RuntimeError(f"{name} must be on {device}, got {tensor.device}")


def dtype(name: str, tensor: Tensor, expected: torch.dtype) -> None:
    if tensor.dtype != expected:
        raise RuntimeError(f"{name} must be {_name(expected)}, got {_name(tensor.dtype)}")


def state(name: str, tensor: Tensor) -> torch.dtype:
    """Check the dtype of a state and return what is computed in."""
    if tensor.dtype not in STATE_DTYPES:
        raise RuntimeError(f"{name} must be float32, float64 or bfloat16, got {_name(tensor.dtype)}")
    return compute_dtype(tensor.dtype)


def real(name: str, tensor: Tensor) -> torch.dtype:
    """Check the dtype of what is never rounded stochastically, and return it."""
    if tensor.dtype not in (torch.float32, torch.float64):
        raise RuntimeError(f"{name} must be float32 or float64, got {_name(tensor.dtype)}")
    return tensor.dtype


def seed(name: str, tensor: Tensor, seed: Tensor | None) -> None:
    """Check that there is a seed if and only if the state in ``tensor`` is rounded stochastically."""
    if (seed is not None) != (tensor.dtype is torch.bfloat16):
        found = "one" if seed is not None else "none"
        raise RuntimeError(
            f"seed must be given if and only if {name} is bfloat16, got {found} for {_name(tensor.dtype)}"
        )
    if seed is not None:
        scalar("seed", seed, torch.int64, tensor.device)


def matrix(name: str, tensor: Tensor) -> tuple[int, int]:
    """Check a ``(T, P)`` matrix and return its shape."""
    if tensor.dim() != 2 or tensor.shape[0] < 1:
        raise RuntimeError(f"{name} must have shape (T, P) with T >= 1, got {tuple(tensor.shape)}")
    _columns_adjacent(name, tensor)
    return tensor.shape[0], tensor.shape[1]


def tasks(name: str, tensor: Tensor) -> int:
    """Check a vector with an element for each task and return how many there are."""
    if tensor.dim() != 1 or tensor.shape[0] < 1:
        raise RuntimeError(f"{name} must have shape (T,) with T >= 1, got {tuple(tensor.shape)}")
    _columns_adjacent(name, tensor)
    return tensor.shape[0]


def shape(name: str, tensor: Tensor, size: int) -> None:
    if tensor.shape != (size,):
        raise RuntimeError(f"{name} must have shape ({size},), got {tuple(tensor.shape)}")
    _columns_adjacent(name, tensor)


def row(name: str, tensor: Tensor, device: torch.device) -> None:
    """Check a vector whose length is its own business."""
    _on(name, tensor, device)
    if tensor.dim() != 1:
        raise RuntimeError(f"{name} must have shape ({'P' if name == 'row' else 'C'},), got {tuple(tensor.shape)}")
    _columns_adjacent(name, tensor)


def segments(tensor: Tensor) -> None:
    _on("segments", tensor, torch.device("cpu"))
    dtype("segments", tensor, torch.int64)
    if tensor.dim() != 2 or tensor.shape[1] != 3 or not tensor.is_contiguous():
        raise RuntimeError(f"segments must be contiguous, of shape (S, 3), got {tuple(tensor.shape)}")


def chunks(tensor: Tensor, C: int, device: torch.device) -> None:
    _on("chunks", tensor, device)
    dtype("chunks", tensor, torch.int64)
    if tensor.shape != (C, 3) or not tensor.is_contiguous():
        raise RuntimeError(f"chunks must be contiguous, of shape ({C}, 3), got {tuple(tensor.shape)}")


def vector(name: str, tensor: Tensor, size: int, expected: torch.dtype, device: torch.device) -> None:
    shape(name, tensor, size)
    _on(name, tensor, device)
    dtype(name, tensor, expected)


def square(name: str, tensor: Tensor, size: int, expected: torch.dtype, device: torch.device) -> None:
    if tensor.shape != (size, size) or not tensor.is_contiguous():
        found = tuple(tensor.shape)
        raise RuntimeError(f"{name} must have shape ({size}, {size}) and be contiguous, got {found}")
    _on(name, tensor, device)
    dtype(name, tensor, expected)


def scalar(name: str, tensor: Tensor, expected: torch.dtype, device: torch.device) -> None:
    if tensor.numel() != 1:
        raise RuntimeError(f"{name} must have one element, got shape {tuple(tensor.shape)}")
    _on(name, tensor, device)
    dtype(name, tensor, expected)


def gradient(name: str, tensor: Tensor, device: torch.device) -> None:
    """Check the dtype and device of gradients, or of ``out``."""
    _on(name, tensor, device)
    if tensor.dtype not in GRAD_DTYPES:
        raise RuntimeError(f"{name} must be float32, bfloat16, float16 or float64, got {_name(tensor.dtype)}")


def dense_gradient(grad: Tensor, numel: int, device: torch.device) -> None:
    """Check a gradient that is read as its first ``numel`` elements in memory."""
    if grad.numel() != numel:
        raise RuntimeError(f"grads must have as many elements as their segments, got {grad.numel()} for {numel}")
    gradient("grads", grad, device)
    if not grad.is_contiguous():
        last = (grad.storage_offset() + numel) * grad.itemsize
        if last > grad.untyped_storage().nbytes():
            raise RuntimeError(f"grads must be dense, got a view of shape {tuple(grad.shape)} that repeats elements")


def gradient_matrix(grads: Tensor, ema: Tensor) -> None:
    matrix("grads", grads)
    if grads.shape != ema.shape:
        raise RuntimeError(f"grads must have ema's shape {tuple(ema.shape)}, got {tuple(grads.shape)}")
    gradient("grads", grads, ema.device)


def out(tensor: Tensor, P: int, device: torch.device) -> None:
    shape("out", tensor, P)
    gradient("out", tensor, device)


def at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise RuntimeError(f"{name} must be >= 1, got {value}")


def alpha_mode(mode: str) -> None:
    if mode not in ALPHA_MODES:
        raise RuntimeError(f"alpha must be max, min, mean, median, constant or none, got {mode}")
