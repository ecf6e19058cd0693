"""The ``.grad`` of the shared parameters: the memory of a balanced gradient, and how it gets into ``.grad``."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from dbmtl_fused.layout import Block


class GradMemory:
    """Memory for the gradients that a step hands out.

    A gradient that is handed out behaves like one of autograd's: a tensor of its own, not a view, with a version
    counter of its own. It also has memory of its own, so that it keeps nothing else alive; on GPUs, where one launch
    writes all blocks, large ones are parts of one allocation.

    On CPUs the memory of the last step's large gradients is used again if nobody else holds it (``zero_grad`` has
    dropped them): fresh pages from the system cost about as much as the weighted sum written into them. On GPUs the
    caching allocator does that.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._kept: dict[int, Tensor] = {}  # by first column

    def take(self, block: Block) -> Tensor:
        """Return uninitialised memory for a block, shape ``(stop - start,)``, that no gradient handed out can see."""
        numel, kept = block.stop - block.start, self._kept.get(block.start)
        if kept is not None and kept.shape == (numel,) and not _is_held_elsewhere(kept):
            return kept
        fresh = torch.empty(numel, dtype=block.dtype, device=self._device)
        if self._device.type == "cpu":
            self._kept[block.start] = fresh
        return fresh

    def hand_out(self, memory: Tensor, block: Block) -> list[Tensor]:
        """Return the gradients of the block's slots, whose memory holds them."""
        grads = [slot.view(memory, block.start).data for slot in block.slots]
        small = [i for i, slot in enumerate(block.slots) if slot.is_small]
        for i in small:
            slot = block.slots[i]
            grads[i] = torch.empty_strided(slot.shape, slot.strides, dtype=block.dtype, device=self._device)
        if small:
            parts = [block.slots[i].view(memory, block.start) for i in small]
            torch._foreach_copy_([grads[i] for i in small], parts)
        return grads


def _storage_holders(tensor: Tensor) -> tuple[int, int]:
    """Return how many hold the tensor's memory: storage objects of Python, and tensors."""
    storage = tensor.untyped_storage()
    return sys.getrefcount(storage), torch._C._storage_Use_Count(storage._cdata)


_SOLE_HOLDER = _storage_holders(torch.empty(1, device="cpu"))


def _is_held_elsewhere(tensor: Tensor) -> bool:
    """Return whether anybody else may see the tensor's memory, another process included."""
    return _storage_holders(tensor) != _SOLE_HOLDER or tensor.is_shared()


def accumulate(params: Sequence[Tensor], grads: Sequence[Tensor | None], overwrite: bool) -> None:
    """Accumulate as autograd does at leaves: take the gradient where there is none, else add.

    Either all or none of it is done: no interrupt comes within the last line, which runs no Python.
    """
    pairs = [(p, grad) for p, grad in zip(params, grads, strict=True) if grad is not None]
    taking = [(p, grad) for p, grad in pairs if overwrite or p.grad is None]
    adding = [(p.grad, grad) for p, grad in pairs if not (overwrite or p.grad is None)]
    taken = map(setattr, [p for p, _ in taking], ["grad"] * len(taking), [grad for _, grad in taking])
    existing, added = [grad for grad, _ in adding], [grad for _, grad in adding]
    list(itertools.chain(taken, map(torch._foreach_add_, [existing] if adding else [], [added])))
