"""The parameter shapes of well-known encoders, for benchmarks that need real lists of gradients and no model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise

Shape = tuple[int, ...]


def numbers(shapes: list[Shape]) -> int:
    """``P`` of a list of parameters."""
    return sum(math.prod(shape) for shape in shapes)


def resnet18() -> list[Shape]:
    """torchvision's ResNet-18 in the order of its parameters: 62 tensors, 11,689,512 numbers."""
    return [*_convolution(64, 3, 7), *_resnet18_blocks(), (1000, 512), (1000,)]


def _resnet18_blocks() -> Iterator[Shape]:
    channels = 64
    for width in (64, 128, 256, 512):
        for block in range(2):
            yield from _convolution(width, channels, 3)
            yield from _convolution(width, width, 3)
            if block == 0 and width != channels:  # the shortcut changes shape
                yield from _convolution(width, channels, 1)
            channels = width


def resnet50() -> list[Shape]:
    """torchvision's ResNet-50 in the order of its parameters: 161 tensors, 25,557,032 numbers."""
    return [*_convolution(64, 3, 7), *_resnet50_blocks(), (1000, 2048), (1000,)]


def _resnet50_blocks() -> Iterator[Shape]:
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            yield from _convolution(width, channels, 1)
            yield from _convolution(width, width, 3)
            yield from _convolution(4 * width, width, 1)
            if block == 0:  # the shortcut changes shape
                yield from _convolution(4 * width, channels, 1)
            channels = 4 * width


def _convolution(outputs: int, inputs: int, size: int) -> list[Shape]:
    """A convolution without bias, and its batch normalisation."""
    return [(outputs, inputs, size, size), (outputs,), (outputs,)]


def segnet() -> list[Shape]:
    """SegNet: the 13 convolutions of VGG-16 with bias and batch normalisation, then their mirror images but that of the
    first, which would be a task's head: 100 tensors, 29,443,008 numbers."""
    widths = [3, 64, 64, 128, 128, *[256] * 3, *[512] * 6]
    pairs = list(pairwise(widths))
    mirrored = [(outputs, inputs) for inputs, outputs in reversed(pairs[1:])]
    return [
        shape
        for inputs, outputs in [*pairs, *mirrored]
        for shape in ((outputs, inputs, 3, 3), (outputs,), (outputs,), (outputs,))
    ]


def vit_large() -> list[Shape]:
    """torchvision's ViT-L/16 in the order of its parameters: 296 tensors, 304,326,632 numbers."""
    width, hidden, layers, patches = 1024, 4096, 24, 14 * 14
    layer = [
        *((width,), (width,)),
        *((3 * width, width), (3 * width,), (width, width), (width,)),
        *((width,), (width,)),
        *((hidden, width), (hidden,), (width, hidden), (width,)),
    ]
    embedding = [(1, 1, width), (width, 3, 16, 16), (width,), (1, patches + 1, width)]
    return [*embedding, *(layer * layers), (width,), (width,), (1000, width), (1000,)]


def swin_base() -> list[Shape]:
    """torchvision's Swin-B, windows of 7 x 7: 329 tensors, 87,768,224 numbers."""
    found: list[Shape] = [(128, 3, 4, 4), *[(128,)] * 3]
    for stage, layers in enumerate((2, 2, 18, 2)):
        width, heads = 128 << stage, 4 << stage
        if stage:  # four patches become one
            found += [(width, 2 * width), (2 * width,), (2 * width,)]
        layer = [
            *((width,), (width,)),
            *((13 * 13, heads), (3 * width, width), (3 * width,), (width, width), (width,)),
            *((width,), (width,)),
            *((4 * width, width), (4 * width,), (width, 4 * width), (width,)),
        ]
        found += layer * layers
    return [*found, (1024,), (1024,), (1000, 1024), (1000,)]


def llama_1b() -> list[Shape]:
    """A decoder of Llama 3.2's 1B class, its output tied to its embedding: 146 tensors, 1,235,814,400 numbers."""
    width, hidden, keys, vocabulary = 2048, 8192, 512, 128_256
    attention = [(width, width), (keys, width), (keys, width), (width, width)]
    layer = [*attention, (hidden, width), (hidden, width), (width, hidden), (width,), (width,)]
    return [(vocabulary, width), *(layer * 16), (width,)]


ENCODERS: dict[str, Callable[[], list[Shape]]] = {
    "ResNet-18": resnet18,
    "ResNet-50": resnet50,
    "SegNet": segnet,
    "Swin-B": swin_base,
    "ViT-L": vit_large,
    "Llama-1B": llama_1b,
}
