"""``Guard``: looks before each step whether it would be wrong, while nothing has changed yet."""

from __future__ import annotations

import gc
from collections.abc import Sequence

import torch
from torch import Tensor

from dbmtl_fused.layout import FlatLayout, grad_dtype


class Guard:
    """Watches the shared parameters of a balancer.

    :param params: In the layout's order.
    :param left_out: Names and parameters that did not require grad when the balancer was built.
    """

    def __init__(self, layout: FlatLayout, params: Sequence[Tensor], left_out: Sequence[tuple[str, Tensor]]) -> None:
        self._layout, self._params, self._left_out = layout, params, left_out
        self._checked_ddp = False

    def check(self) -> None:
        """Raise if a step now would be wrong.

        :raises RuntimeError: If a parameter was moved, converted or unfrozen, has an optimizer in its backward pass, or
            belongs to a live DistributedDataParallel module.
        """
        for slot, p in zip(self._layout.slots, self._params, strict=True):
            if p._post_accumulate_grad_hooks:
                raise RuntimeError(
                    f"shared parameter {slot.name!r} has a post-accumulate-grad hook (an optimizer in the backward "
                    "pass?), which would see the gradients of single tasks; remove it"
                )
            now, built = (p.device, grad_dtype(p), p.shape), (self._layout.device, slot.dtype, slot.shape)
            if now != built:
                raise RuntimeError(
                    f"the balancer is stale: shared parameter {slot.name!r} was {_describe(*built)} when it was built "
                    f"and is {_describe(*now)} now; build it after moving or converting the model"
                )
        for name, p in self._left_out:
            if p.requires_grad:
                raise RuntimeError(
                    f"the balancer is stale: shared parameter {name!r} was frozen when it was built and requires grad "
                    "now; build it anew, or unfreeze before building"
                )
        if not self._checked_ddp and torch.distributed.is_available() and torch.distributed.is_initialized():
            self._check_no_ddp()
            self._checked_ddp = True

    def _check_no_ddp(self) -> None:
        mine = {id(p) for p in self._params}
        for module in gc.get_objects():
            # type(), since isinstance() asks every object for its __class__ and some answer with a warning
            if issubclass(type(module), torch.nn.parallel.DistributedDataParallel):
                for name, p in module.module.named_parameters():
                    if id(p) in mine:
                        raise RuntimeError(
                            f"shared parameter {name!r} belongs to a DistributedDataParallel module: several backward "
                            "passes over one DDP forward desynchronise the ranks; use the module without DDP"
                        )


def _describe(device: torch.device, dtype: torch.dtype, shape: torch.Size) -> str:
    return f"{tuple(shape)} {dtype} on {device}"
