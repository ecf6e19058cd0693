"""Getting one task's shared gradients out of a backward pass without touching what is in ``.grad``.

Both captures are context managers around the ``T`` backward passes of a step and hand gradients to a ``sink``. Within
one task, a slot reaches the sink once with ``accumulate=False`` (a gradient, or None if the task did not reach it)
and, should autograd deliver a leaf's gradient in parts, again with ``accumulate=True``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.utils.hooks import RemovableHandle

from dbmtl_fused.layout import FlatLayout


class Sink(Protocol):
    """Takes gradients of the current task, in the memory order of their slots."""

    def __call__(self, slots: Sequence[int], grads: Sequence[Tensor | None], accumulate: bool) -> None: ...


class GradCapture:
    """Gathers from ``.grad`` after each backward pass; what was there before is put back on exit, also on errors.

    One call of the sink per task, at the price of holding all gradients of a task at once.
    """

    def __init__(self, layout: FlatLayout, params: Sequence[Tensor], sink: Sink) -> None:
        self._layout, self._params, self._sink = layout, params, sink

    def __enter__(self) -> GradCapture:
        self._saved = [p.grad for p in self._params]
        self._clear()
        return self

    def __exit__(self, *exception: object) -> None:
        for p, grad in zip(self._params, self._saved, strict=True):
            p.grad = grad

    def _clear(self) -> None:
        for p in self._params:
            p.grad = None

    def finish_task(self) -> set[int]:
        """End the current task: hand over what is pending and return the slots it reached."""
        grads = [None if p.grad is None else self._layout.as_columns(i, p.grad) for i, p in enumerate(self._params)]
        reached = {i for i, grad in enumerate(grads) if grad is not None}
        if reached:
            self._sink(range(len(grads)), grads, accumulate=False)
        self._clear()
        return reached


class BucketCapture:
    """Takes gradients on their way into ``.grad``, bucket by bucket: at most one bucket of them is alive.

    A prehook on each leaf's AccumulateGrad node returns None in the gradient's place, so that ``.grad`` stays as it
    is. The hooks live as long as the context. On a GPU they run on the stream of their node; calls of the sink share
    scratch memory, so that within a task there must be one.

    :param bucket_bytes: The sink is called as soon as this many bytes of gradients are pending.
    :raises RuntimeError: In a backward pass, if gradients come on several streams.
    """

    def __init__(self, layout: FlatLayout, params: Sequence[Tensor], sink: Sink, bucket_bytes: int) -> None:
        self._layout, self._params, self._sink, self._bucket_bytes = layout, params, sink, bucket_bytes
        self._on_gpu = layout.device.type != "cpu"
        self._stream: torch.Stream | None = None  # of the current task
        self._reached: set[int] = set()
        self._reset_bucket()

    def __enter__(self) -> BucketCapture:
        # Nodes are kept: a leaf's node dies with its last reference, and its hook with it.
        self._nodes = {i: get_gradient_edge(p).node for i, p in enumerate(self._params) if p.requires_grad}
        self._handles: list[RemovableHandle] = [
            node.register_prehook(partial(self._on_grad, i)) for i, node in self._nodes.items()
        ]
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._reset_bucket()

    def _reset_bucket(self) -> None:
        self._slots: list[int] = []
        self._grads: list[Tensor | None] = []
        self._bytes = 0

    def _on_grad(self, index: int, grads: tuple[Tensor | None, ...]) -> tuple[None]:
        (grad,) = grads
        if grad is not None:
            if self._on_gpu:
                self._check_stream(index)
            grad = self._layout.as_columns(index, grad)
            if index in self._reached:
                self._flush()
                self._sink([index], [grad], accumulate=True)
            else:
                self._reached.add(index)
                self._slots.append(index)
                self._grads.append(grad)
                self._bytes += grad.nbytes
                if self._bytes >= self._bucket_bytes:
                    self._flush()
        return (None,)

    def _check_stream(self, index: int) -> None:
        stream = torch.accelerator.current_stream()
        if self._stream is None:
            self._stream = stream
        if stream != self._stream:
            raise RuntimeError(
                f"bucket_bytes must be None where parameters were used on several streams: the gradient of "
                f"{self._layout.slots[index].name!r} came on {stream}, others of its task on {self._stream}"
            )

    def _flush(self) -> None:
        if self._slots:
            self._sink(self._slots, self._grads, accumulate=False)
            self._reset_bucket()

    def finish_task(self) -> set[int]:
        """End the current task: hand over what is pending and return the slots it reached."""
        reached, self._reached, self._stream = self._reached, set(), None
        if reached:
            missing = [i for i in range(len(self._params)) if i not in reached]
            self._slots += missing
            self._grads += [None] * len(missing)
            self._flush()
        return reached


Capture = GradCapture | BucketCapture
