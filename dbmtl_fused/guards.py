"""``Guard``: raises before a step that would be wrong, while nothing has changed yet."""

from __future__ import annotations

import gc
import itertools
import operator
import sys
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dbmtl_fused.layout import FlatLayout, Slot, clean_name, grad_dtype

_BUILT = operator.attrgetter("device", "grad_dtype", "dtype", "shape")
ANEW = "build it anew (its state loads with load_state_dict(strict=False))"
SCAN_EVERY = 32
"""Steps that do not reach a parameter, of which one looks for its module among all objects: that takes a tenth of a
second."""
_HOOKS = operator.attrgetter("_post_accumulate_grad_hooks")


class Guard:
    """Watches the shared parameters of a balancer.

    :param params: In the layout's order.
    :param left_out: Names and parameters that did not require grad when the balancer was built.
    """

    def __init__(self, layout: FlatLayout, params: Sequence[Tensor], left_out: Sequence[tuple[str, Tensor]]) -> None:
        self._layout, self._params, self.left_out = layout, params, list(left_out)
        self.module: torch.nn.Module | None = None
        self._built, self._strides = list(map(_BUILT, params)), list(map(Tensor.stride, params))
        self._references = 0  # to all parameters, at the last step
        self._holders: dict[int, int] = {}  # references to a parameter when a step first reached it
        self._unreached = Counter[int]()  # steps that did not reach a parameter

    def watch(self, module: torch.nn.Module | None) -> None:
        """Have :meth:`check` compare the parameters of ``module``, which may be incomplete until then."""
        self.module = module
        self._members: list[dict] = []
        self._noted: list[object] = []

    def check(self, overwrite: bool = False) -> None:
        """Raise if a step now would be wrong.

        :param overwrite: Whether the step replaces what ``.grad`` holds.
        :raises TypeError: If a ``.grad`` holds something that gradients cannot be added to.
        :raises RuntimeError: If a parameter was moved, converted, replaced or unfrozen, or new ones were added, all are
            frozen, one has an optimizer in its backward pass, or belongs to a live DistributedDataParallel module.
        """
        if torch.is_inference_mode_enabled():
            raise RuntimeError(
                "the balancer must not run under torch.inference_mode(), which records no gradients; leave it, or use "
                "torch.no_grad() where only the loss's value is wanted"
            )
        if (
            list(map(_BUILT, self._params)) != self._built
            or list(map(Tensor.stride, self._params)) != self._strides
            or any(map(_HOOKS, self._params))
        ):
            self._check_parameters()
        if self.module is not None and not self._has_same_members():
            self._check_members(self.module)
        if not any(p.requires_grad for p in self._params):
            raise RuntimeError(
                "no shared parameter requires grad: all were frozen after the balancer was built; unfreeze one, or "
                "train the heads without the balancer"
            )
        for name, p in self.left_out:
            if p.requires_grad:
                raise RuntimeError(
                    f"the balancer is stale: shared parameter {name!r} was frozen when it was built and requires grad "
                    f"now; {ANEW}, or unfreeze before building"
                )
        if not overwrite:
            for slot, p in zip(self._layout.slots, self._params, strict=True):
                if p.grad is not None:
                    _check_existing(slot, p)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            self._check_no_ddp()

    def check_reached(self, reached: Collection[int], ever: Sequence[bool]) -> None:
        """Raise if a parameter that a step has reached before is gone from the model.

        A module tells by itself, in :meth:`check`. For a list of tensors, a parameter that no task reaches any more was
        either replaced or is not used this time, as in stochastic depth: then it is still in the same model as others.

        :param reached: Slots that the step has reached, with all tasks there.
        :param ever: For each slot, whether any step before has.
        :raises RuntimeError: If it was replaced.
        """
        if self.module is not None:
            return
        for i in reached:
            if i not in self._holders:
                self._holders[i] = sys.getrefcount(self._params[i])
        unreached = [i for i, p in enumerate(self._params) if ever[i] and i not in reached and p.requires_grad]
        let_go = {i for i in unreached if sys.getrefcount(self._params[i]) < self._holders.get(i, 0)}
        self._unreached.update(unreached)
        if not any(i in let_go or self._unreached[i] % SCAN_EVERY == 1 for i in unreached):
            return
        roots = _roots_of(self._params)
        in_use = set().union(*(roots.get(id(self._params[i]), ()) for i in reached))
        for i in unreached:
            own = roots.get(id(self._params[i]), set())
            if not in_use & own if in_use else i in let_go:  # tensors in no module can only be let go of
                raise RuntimeError(
                    f"the balancer is stale: shared parameter {self._layout.slots[i].name!r} was reached before and no "
                    "task reaches it now; if it was replaced, build the balancer anew; if it is only not used at "
                    "times, build it on the module instead of a list of tensors"
                )

    def _check_parameters(self) -> None:
        for slot, p, strides in zip(self._layout.slots, self._params, self._strides, strict=True):
            if p._post_accumulate_grad_hooks:
                raise RuntimeError(
                    f"shared parameter {slot.name!r} has a post-accumulate-grad hook (an optimizer in the backward "
                    "pass?), which would not run on the balanced gradient; remove it"
                )
            now, built = (p.device, grad_dtype(p), p.shape), (self._layout.device, slot.dtype, slot.shape)
            if now != built:
                raise RuntimeError(
                    f"the balancer is stale: shared parameter {slot.name!r} was {_describe(*built)} when it was built "
                    f"and is {_describe(*now)} now; build it after moving or converting the model"
                )
            if any(size > 1 and a != b for size, a, b in zip(p.shape, p.stride(), strides, strict=True)):
                raise RuntimeError(
                    f"the balancer is stale: shared parameter {slot.name!r} had strides {strides} when it was built "
                    f"and has {p.stride()} now; build it after changing the model's memory format"
                )

    def _note_members(self, module: torch.nn.Module) -> None:
        members = [(child._parameters, child._modules) for child in module.modules()]
        self._members = [held for held in itertools.chain.from_iterable(members) if isinstance(held, dict)]
        self._noted = list(self._held())

    def _held(self) -> Iterator[object]:
        return itertools.chain.from_iterable(map(dict.values, self._members))

    def _has_same_members(self) -> bool:
        """Return whether every submodule holds the same parameters and submodules as when they were noted."""
        return (
            bool(self._members)
            and sum(map(len, self._members)) == len(self._noted)
            and all(map(operator.is_, self._held(), self._noted))
        )

    def _check_members(self, module: torch.nn.Module) -> None:
        now = {id(p): (clean_name(name), p) for name, p in module.named_parameters()}
        mine = {id(p): slot.name for slot, p in zip(self._layout.slots, self._params, strict=True)}
        known = mine.keys() | {id(p) for _, p in self.left_out}
        for key, (name, p) in now.items():
            if key not in known and p.requires_grad:
                raise RuntimeError(
                    f"the balancer is stale: shared parameter {name!r} was added or replaced after it was built; {ANEW}"
                )
        for key, name in mine.items():
            if key not in now:
                raise RuntimeError(
                    f"the balancer is stale: shared parameter {name!r} is no longer in the module it was built on; "
                    f"{ANEW}"
                )
        self.left_out += [named for key, named in now.items() if key not in known]
        self._note_members(module)

    def _check_no_ddp(self) -> None:
        """Look for DistributedDataParallel modules, which hold references to their parameters, when there are more
        references than before."""
        references, before = sum(map(sys.getrefcount, self._params)), self._references
        self._references = references
        if references <= before:
            return
        mine = {id(p) for p in self._params}
        for module in _live_modules(torch.nn.parallel.DistributedDataParallel):
            for name, p in module.module.named_parameters():
                if id(p) in mine:
                    self._references = before
                    raise RuntimeError(
                        f"shared parameter {name!r} belongs to a DistributedDataParallel module: several backward "
                        "passes over one DDP forward desynchronise the ranks; use the module without DDP"
                    )


def _live_modules(kind: type) -> list[Any]:
    # type(), since isinstance() asks every object for its __class__ and some answer with a warning
    return [found for found in gc.get_objects() if issubclass(type(found), kind)]


def _roots_of(params: Sequence[Tensor]) -> dict[int, set[int]]:
    """Return the outermost live modules that hold each parameter, by id of the parameter."""
    modules, mine = _live_modules(torch.nn.Module), {id(p) for p in params}
    children = {id(child) for module in modules for child in module.children()}
    roots: dict[int, set[int]] = {}
    for module in modules:
        if id(module) not in children:
            for p in module.parameters():
                if id(p) in mine:
                    roots.setdefault(id(p), set()).add(id(module))
    return roots


def _check_existing(slot: Slot, p: Tensor) -> None:
    grad = p.grad
    assert grad is not None
    if grad.layout is not torch.strided:
        found = f"a {str(grad.layout).removeprefix('torch.')} tensor"
    elif type(grad) not in (Tensor, torch.nn.Parameter, type(p.data)):
        found = f"a {type(grad).__name__}"
    elif grad.is_inference():
        found = "an inference tensor"
    elif any(size > 1 and stride == 0 for size, stride in zip(grad.shape, grad.stride(), strict=True)):
        found = "an expanded tensor, whose elements share memory"
    else:
        return
    raise TypeError(
        f".grad of shared parameter {slot.name!r} must be a dense tensor that gradients can be added to, got {found}; "
        "zero_grad() it before, or use overwrite=True"
    )


def _describe(device: torch.device, dtype: torch.dtype, shape: torch.Size) -> str:
    return f"{tuple(shape)} {dtype} on {device}"
