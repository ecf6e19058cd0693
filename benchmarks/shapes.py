"""The parameter shapes of two well-known encoders, for benchmarks that need real lists of gradients and no model."""

from __future__ import annotations

from collections.abc import Iterator

Shape = tuple[int, ...]


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
