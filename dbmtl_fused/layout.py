"""``FlatLayout``: shared parameters <-> columns of the ``T x P`` buffer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dbmtl_fused._ops import CHUNK, GRAD_DTYPES

ALIGN = 256
"""Every parameter starts at a multiple of this many columns, so that a quantisation block never straddles two."""


class Slot(NamedTuple):
    """One parameter's place in the buffer."""

    name: str
    shape: torch.Size
    strides: tuple[int, ...]  # of the parameter if it is dense, else contiguous
    dtype: torch.dtype  # of the parameter's ``.grad``
    start: int  # first column
    numel: int

    def view(self, columns: Tensor, first_column: int = 0) -> Tensor:
        """This parameter's part of a tensor of columns from ``first_column`` on, viewed as ``(..., *shape)``."""
        return columns.as_strided(
            (*columns.shape[:-1], *self.shape),
            (*columns.stride()[:-1], *self.strides),
            columns.storage_offset() + self.start - first_column,
        )

    @property
    def is_small(self) -> bool:
        """Whether a copy of the gradient costs no more than an operator's call."""
        return self.numel <= CHUNK


class Block(NamedTuple):
    """Adjacent columns whose ``.grad`` has one dtype."""

    dtype: torch.dtype
    start: int
    stop: int
    slots: list[Slot]


class FlatLayout:
    """Where each parameter lives in a row of ``P`` columns.

    Parameters keep their own memory order (a ``channels_last`` weight stays ``channels_last``), start at multiples of
    :data:`ALIGN` columns and are grouped by the dtype of their ``.grad``, in order of first appearance. Padding
    columns are zero and stay zero.

    :param named_params: ``(name, parameter)`` pairs: leaves of floating dtype, on one device, each once.
    :raises TypeError: If a parameter is not a strided real floating-point leaf tensor.
    :raises ValueError: If there are none, two share a name, or they are on several devices.

    Attributes: ``slots`` in column order, ``P`` (columns, padding included), ``numel`` (without padding),
    ``num_chunks``, ``device``, ``state_dtype`` (float32, or float64 if any parameter is), ``segments`` and
    ``chunks`` (see ``ema_update_``).
    """

    def __init__(self, named_params: Sequence[tuple[str, Tensor]]) -> None:
        check_params(named_params)
        self.device = named_params[0][1].device
        dtypes = list(dict.fromkeys(grad_dtype(p) for _, p in named_params))
        self.order = sorted(range(len(named_params)), key=lambda i: dtypes.index(grad_dtype(named_params[i][1])))
        self.slots: list[Slot] = []
        segments, column, chunk = [], 0, 0
        for name, p in (named_params[i] for i in self.order):
            strides = p.stride() if is_dense(p) else torch.empty(p.shape, device="meta").stride()
            self.slots.append(Slot(name, p.shape, strides, grad_dtype(p), column, p.numel()))
            segments.append((column, p.numel(), chunk))
            column += -(-p.numel() // ALIGN) * ALIGN
            chunk += -(-p.numel() // CHUNK)
        self.P, self.num_chunks = column, chunk
        self.numel = sum(slot.numel for slot in self.slots)
        self.state_dtype = torch.float64 if torch.float64 in dtypes else torch.float32
        self.segments = torch.tensor(segments, dtype=torch.int64, device="cpu")
        self.chunks = chunk_table(segments).to(self.device)

    def blocks(self, slots: Sequence[int]) -> list[Block]:
        """Return the columns of ``slots``, in order, as blocks that get memory of their own.

        On a CPU that is each large slot, and all small ones of a dtype, which must be side by side
        (:func:`large_first`); elsewhere all of a dtype.
        """
        kinds: dict[object, list[Slot]] = {}
        for slot in (self.slots[i] for i in slots):
            is_apart = self.device.type == "cpu" and not slot.is_small
            kinds.setdefault((slot.dtype, slot.start if is_apart else None), []).append(slot)
        return [Block(kind[0].dtype, kind[0].start, kind[-1].start + kind[-1].numel, kind) for kind in kinds.values()]

    def as_columns(self, index: int, grad: Tensor) -> Tensor:
        """``grad`` of slot ``index``, in the slot's memory order: itself, or a copy if autograd chose another order.

        :raises TypeError: If ``grad`` is sparse, complex, or otherwise not a plain strided tensor.
        """
        slot = self.slots[index]
        if grad.layout is not torch.strided or grad.is_complex():
            kind = "complex" if grad.is_complex() else str(grad.layout).removeprefix("torch.")
            raise TypeError(f"gradient of {slot.name!r} must be dense and real, got a {kind} one")
        grad = grad.resolve_neg()
        strides = grad.stride()
        if strides == slot.strides or _same_order(strides, slot):
            return grad
        ordered = torch.empty_strided(slot.shape, slot.strides, dtype=grad.dtype, device=grad.device)
        return ordered.copy_(grad)


def large_first(named_params: Iterable[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """Return the parameters in an order in which small ones are side by side in the layout."""
    return sorted(named_params, key=lambda named: named[1].numel() <= CHUNK)


def chunk_table(segments: Iterable[Sequence[int]]) -> Tensor:
    """``(slot, start, numel)`` of every chunk of up to :data:`CHUNK` columns, shape ``(C, 3)``, int64, on the CPU.

    :param segments: ``(start, numel, first_chunk)`` of every slot, as in ``ema_update_``.
    """
    chunks = [
        (slot, start + offset, min(CHUNK, numel - offset))
        for slot, (start, numel, _) in enumerate(segments)
        for offset in range(0, numel, CHUNK)
    ]
    return torch.tensor(chunks, dtype=torch.int64, device="cpu").view(-1, 3)


def _same_order(strides: Sequence[int], slot: Slot) -> bool:
    """Whether ``strides`` differ from the slot's only where they mean nothing: dimensions of size 1."""
    return all(size == 1 or a == b for size, a, b in zip(slot.shape, strides, slot.strides, strict=True))


def grad_dtype(param: Tensor) -> torch.dtype:
    """The dtype autograd gives ``param.grad``."""
    return param.grad_dtype or param.dtype


def is_dense(param: Tensor) -> bool:
    """Whether the elements fill one stretch of memory without gap or overlap, in whatever order."""
    extent = 1
    for stride, size in sorted(zip(param.stride(), param.shape, strict=True)):
        if size != 1:
            if stride != extent:
                return False
            extent *= size
    return True


def clean_name(name: str) -> str:
    """Return the name of a parameter without the prefix of a module that ``torch.compile`` has wrapped."""
    return name.replace("_orig_mod.", "")


def named_shared_parameters(shared: torch.nn.Module | Iterable) -> list[tuple[str, Tensor]]:
    """``(name, parameter)`` of every shared parameter, tied ones once.

    :param shared: A module, ``(name, tensor)`` pairs, or tensors (then named ``"0"``, ``"1"``, ...).
    :raises TypeError: If it is none of these.
    """
    if isinstance(shared, torch.nn.Module):
        pairs: list = list(shared.named_parameters())
    elif isinstance(shared, Tensor):
        raise TypeError("shared parameters must be a Module, (name, tensor) pairs or tensors, got a single Tensor")
    else:
        pairs = [item if isinstance(item, tuple) else (str(i), item) for i, item in enumerate(shared)]
    for i, pair in enumerate(pairs):
        if len(pair) != 2 or not isinstance(pair[0], str) or not isinstance(pair[1], Tensor):
            kinds = " of ".join([type(pair).__name__, str(tuple(type(part).__name__ for part in pair))])
            raise TypeError(f"shared parameter {i} must be a tensor or a (name, tensor) pair, got a {kinds}")
    unique: dict[int, tuple[str, Tensor]] = {}
    for name, p in pairs:
        unique.setdefault(id(p), (clean_name(name), p))
    return list(unique.values())


def check_params(named_params: Sequence[tuple[str, Tensor]]) -> None:
    """Raise the errors that :class:`FlatLayout` documents, naming the parameter."""
    if not named_params:
        raise ValueError("shared parameters must hold at least one that requires grad, got none")
    names: set[str] = set()
    first_name, first = named_params[0]
    for name, p in named_params:
        if name in names:
            raise ValueError(f"names of shared parameters must be unique, got {name!r} twice")
        names.add(name)
        if not p.is_leaf:
            raise TypeError(f"shared parameter {name!r} must be a leaf tensor, got the result of {p.grad_fn}")
        if hasattr(p, "ds_id"):
            raise TypeError(f"shared parameter {name!r} is partitioned by DeepSpeed ZeRO, which is not supported")
        if getattr(p, "_is_flat_param", False) or type(p).__name__ == "FlatParameter":
            raise TypeError(f"shared parameter {name!r} is an FSDP1 FlatParameter, which is not supported")
        if getattr(p, "_fsdp_flattened", False):  # with use_orig_params
            raise TypeError(f"shared parameter {name!r} is a part of an FSDP1 FlatParameter, which is not supported")
        if type(p).__name__ == "DTensor" or hasattr(p, "device_mesh"):
            raise TypeError(
                f"shared parameter {name!r} is a DTensor (FSDP2, tensor parallel), which is not supported yet"
            )
        if p.is_inference():
            raise TypeError(
                f"shared parameter {name!r} is an inference tensor, which cannot be trained; create it outside "
                "torch.inference_mode()"
            )
        if p.layout is not torch.strided:
            raise TypeError(f"shared parameter {name!r} must be dense, got layout {p.layout}")
        if grad_dtype(p) not in GRAD_DTYPES:
            raise TypeError(f"shared parameter {name!r} must have one of the dtypes {GRAD_DTYPES}, got {grad_dtype(p)}")
        if p.device != first.device:
            raise ValueError(
                f"shared parameters must be on one device, got {first_name!r} on {first.device} "
                f"and {name!r} on {p.device}"
            )
