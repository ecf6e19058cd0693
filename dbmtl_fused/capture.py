"""``Collector``: takes each task's shared gradients on their way into ``.grad``."""

from __future__ import annotations

import functools
import math
import operator
import sys
import weakref
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

from dbmtl_fused.layout import FlatLayout

_KEY = "dbmtl_fused.collector"
"""Thread-local name of the cell that holds the collector whose pass is running. autograd carries thread-local objects
of the thread that calls ``backward`` to the threads that run its nodes. Gradients of other threads' passes are so told
apart."""


class Sink(Protocol):
    """Takes gradients of the current task, in the memory order of their slots.

    Within one task, a slot comes once with ``accumulate=False`` (a gradient, or None if the task did not reach it) and,
    if autograd delivers a leaf's gradient in parts, again with ``accumulate=True``.
    """

    def __call__(self, slots: Sequence[int], grads: Sequence[Tensor | None], accumulate: bool) -> None: ...


class Collector:
    """Hands the shared gradients of one backward pass after the other to a sink, instead of to ``.grad``.

    Prehooks on the AccumulateGrad nodes of the parameters stay for the balancer's life. They act only within
    :meth:`backward_pass`, on the passes of this collector. Any other backward pass, in this thread or another, finds
    them without effect, whatever has interrupted the balancer.

    :param layout, params: The parameters, in the layout's order.
    :param sink: Takes the gradients.
    :param bucket_bytes: The sink is called as soon as this many bytes of gradients are pending; None: once a task.
        On a GPU, prehooks run on the stream of their node and buckets share scratch memory, so that within a task all
        gradients must come on one stream.
    """

    def __init__(self, layout: FlatLayout, params: Sequence[Tensor], sink: Sink, bucket_bytes: int | None) -> None:
        self._layout, self._params, self._sink = layout, params, sink
        self._bucket_bytes = math.inf if bucket_bytes is None else bucket_bytes
        self._check_streams = bucket_bytes is not None and layout.device.type != "cpu"
        self._ids = {id(p) for p in params}
        self.is_running = False
        self._set_aside: list[Tensor | None] | None = None
        # A leaf's node dies with its last reference, and its hooks with it. Held here, every forward pass uses it.
        self.nodes: list[Node] = [self._hooked_node(i) for i in range(len(params))]
        self._start_task()

    def _hooked_node(self, index: int) -> Node:
        p = self._params[index]
        requires_grad = p.requires_grad
        node = get_gradient_edge(p.requires_grad_()).node  # which a copied parameter may not do at present
        p.requires_grad_(requires_grad)
        node.register_prehook(partial(_on_grad, weakref.ref(self), index))
        return node

    def begin(self) -> None:
        """Open the collector and set aside what ``.grad`` holds.

        A parameter that was converted between forward and backward pass has another node than the graph, whose gradient
        lands in ``.grad``; there it must not be added to anything.
        """
        self._start_task()
        self._converted: set[int] = set()  # slots whose graph has another node than the one with the hook
        for p in self._params:
            if p._backward_hooks:
                _keep_out_of_passes(p._backward_hooks)
        grads = [p.grad for p in self._params]
        if any(grad is not None for grad in grads):
            self._set_aside = grads
            assign_grads(self._params, [None] * len(grads))
        self.is_running = True

    def end(self) -> None:
        """Close the collector and put ``.grad`` back; may be called any number of times."""
        self.is_running = False
        self._start_task()
        if self._set_aside is None:
            return
        # A gradient that is there now is another thread's. `_set_aside` changes first: this may be interrupted, and
        # called again.
        self._set_aside = [
            kept if landed is None or landed is kept else landed if kept is None else kept + landed
            for kept, landed in zip(self._set_aside, (p.grad for p in self._params), strict=True)
        ]
        assign_grads(self._params, self._set_aside)
        self._set_aside = None

    @contextmanager
    def backward_pass(self) -> Any:
        """Mark the backward passes that are run within as this collector's."""
        cell = _cell_of_this_thread()
        before = cell.collector
        try:
            cell.collector = self
            yield
        finally:
            cell.collector = before

    def owns(self, param: Tensor) -> bool:
        return id(param) in self._ids

    def finish_task(self) -> set[int]:
        """End the current task: hand over what is pending and return the slots it reached."""
        for index, p in enumerate(self._params):
            if p.grad is not None and (index in self._converted or self._has_new_node(index)):
                self._converted.add(index)
                self.take(index, p.grad)
                p.grad = None
        reached = self._reached
        if reached:
            missing = [i for i in range(len(self._params)) if i not in reached]
            self._slots += missing
            self._grads += [None] * len(missing)
            self._flush()
        self._start_task()
        return reached

    def _has_new_node(self, index: int) -> bool:
        """Whether the parameter has had another node than the one with the hook; that one gets a hook then."""
        p = self._params[index]
        if not p.requires_grad or get_gradient_edge(p).node is self.nodes[index]:
            return False
        self.nodes[index] = self._hooked_node(index)
        return True

    def take(self, index: int, grad: Tensor) -> None:
        """Take a gradient of slot ``index``; it is copied if anybody else holds it and could write to it."""
        if self._check_streams:
            self._check_stream(index)
        ordered = self._layout.as_columns(index, grad)
        if ordered is grad and _is_held_elsewhere(grad):
            ordered = grad.clone()
        if index in self._reached:
            self._flush()
            self._sink([index], [ordered], accumulate=True)
            return
        self._reached.add(index)
        self._slots.append(index)
        self._grads.append(ordered)
        self._bytes += ordered.nbytes
        if self._bytes >= self._bucket_bytes:
            self._flush()

    def _start_task(self) -> None:
        self._stream: torch.Stream | None = None
        self._reached: set[int] = set()
        self._empty_bucket()

    def _empty_bucket(self) -> None:
        self._slots: list[int] = []
        self._grads: list[Tensor | None] = []
        self._bytes = 0

    def _flush(self) -> None:
        if self._slots:
            self._sink(self._slots, self._grads, accumulate=False)
            self._empty_bucket()

    def _check_stream(self, index: int) -> None:
        stream = torch.accelerator.current_stream()
        if self._stream is None:
            self._stream = stream
        if stream != self._stream:
            raise RuntimeError(
                f"bucket_bytes must be None where parameters were used on several streams: the gradient of "
                f"{self._layout.slots[index].name!r} came on {stream}, others of its task on {self._stream}"
            )

    def on_grad(self, owner: Collector, index: int, grad: Tensor) -> tuple[None] | None:
        """Take a gradient that this collector's pass has brought to a parameter of ``owner``."""
        if not self.is_running:
            return None
        if owner is self:
            self.take(index, grad)
            return (None,)
        if self.owns(owner._params[index]):  # its own hook will take it
            return None
        raise RuntimeError(
            f"parameter {owner._layout.slots[index].name!r} belongs to another DBMTL of the same model, and each would "
            "treat the other's parameters as a head's; build one balancer over all shared parameters"
        )


def _on_grad(owner: weakref.ref[Collector], index: int, grads: tuple[Tensor | None, ...]) -> tuple[None] | None:
    (grad,) = grads
    if grad is None:
        return None
    collector, alive = _current(), owner()
    return None if collector is None or alive is None else collector.on_grad(alive, index, grad)


class _Cell:
    """Holds the collector whose pass a thread runs."""

    collector: Collector | None = None


_cells: list[_Cell] = []
"""Of all threads, each twice: torch 2.11 gives back a reference that it has not taken."""


def _cell_of_this_thread() -> _Cell:
    if not torch._C._is_key_in_tls(_KEY):
        cell = _Cell()
        _cells.extend((cell, cell))
        torch._C._stash_obj_in_tls(_KEY, cell)
    return torch._C._get_obj_in_tls(_KEY)


def _current() -> Collector | None:
    return torch._C._get_obj_in_tls(_KEY).collector if torch._C._is_key_in_tls(_KEY) else None


class _OutsidePasses:
    """A hook of a shared parameter that does not see the gradients of single tasks, nor that there is none."""

    def __init__(self, hook: Callable[[Tensor], Tensor | None]) -> None:
        self._hook = hook

    def __call__(self, grad: Tensor | None) -> Tensor | None:
        collector = _current()
        return None if grad is None or (collector is not None and collector.is_running) else self._hook(grad)


def _keep_out_of_passes(hooks: dict[int, Callable[[Tensor], Tensor | None]]) -> None:
    for key, hook in list(hooks.items()):
        if not isinstance(hook, _OutsidePasses):
            hooks[key] = _OutsidePasses(hook)


def with_hooks(param: Tensor, grad: Tensor | None) -> Tensor | None:
    """Return the gradient as the hooks of its parameter leave it, as autograd calls them."""
    if grad is not None and param._backward_hooks:
        for hook in list(param._backward_hooks.values()):
            changed = hook(grad)
            grad = grad if changed is None else changed
    return grad


def assign_grads(params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
    """Assign every ``.grad``. No interrupt comes between two of them: the loop runs no Python."""
    list(map(setattr, params, ["grad"] * len(params), grads))


_sole_holder: tuple[int, ...] | None = None
"""References that autograd's engine and the hook hold to a gradient that nobody else holds. Versions of Python and
torch differ, so that :func:`count_sole_holder` finds them."""


def _is_held_elsewhere(grad: Tensor) -> bool:
    """Return whether anybody but autograd's engine holds the gradient or its memory, as AccumulateGrad asks before it
    takes one for ``.grad``. Only :meth:`Collector.take` may call this: references are counted."""
    global _sole_holder
    storage, views = grad.untyped_storage(), grad._is_view()
    found = (
        sys.getrefcount(grad),
        grad._use_count(),  # type: ignore[attr-defined]
        sys.getrefcount(storage),
        torch._C._storage_Use_Count(storage._cdata) - views,  # a view holds its base
    )
    if _sole_holder is None:
        _sole_holder = found
    return any(map(operator.gt, found, _sole_holder)) or (views and _base_holders(grad) > _SOLE_BASE_HOLDERS)


def _base_holders(view: Tensor) -> int:
    base = view._base
    return base._use_count() + sys.getrefcount(base)  # type: ignore[union-attr]


with torch.no_grad():
    _SOLE_BASE_HOLDERS = _base_holders(torch.empty(1, 1, device="cpu").t())


@functools.cache
def count_sole_holder() -> None:
    """Collect a gradient that nobody else holds, for :func:`_is_held_elsewhere` to compare with."""
    p = torch.zeros(2, device="cpu", requires_grad=True)
    collector = Collector(FlatLayout([("p", p)]), [p], lambda slots, grads, accumulate: None, None)
    with torch.enable_grad(), torch.autocast("cpu", enabled=False):
        loss = (2 * p).sum()
    collector.begin()
    tracer = sys.gettrace()
    sys.settrace(None)  # a debugger that reads local variables holds references, too
    try:
        with collector.backward_pass():
            loss.backward()
    finally:
        sys.settrace(tracer)
