"""Vision problems in minimal definitions of their own, with the parameter shapes of torchvision's; random images."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.models import MultiTaskModel

CLASSES = 31
SEGMENTS = 13


class Vision(NamedTuple):
    """A problem: ``"office"`` (ResNet-18, a batch for each task), ``"scene"`` (dilated ResNet-50 with an ASPP head for
    segmentation, depth and normals) or ``"vit"`` (ViT-L/16 with linear heads)."""

    kind: str
    tasks: int
    batch: int
    height: int = 224
    width: int = 224

    @property
    def P(self) -> int:
        return _numbers(self.kind, self.height)

    def build(self) -> MultiTaskModel:
        torch.manual_seed(0)
        return {"office": Office, "scene": Scene, "vit": Classes}[self.kind](self)

    def __str__(self) -> str:
        name = {"office": "ResNet-18", "scene": "dilated ResNet-50 + ASPP", "vit": "ViT-L/16"}[self.kind]
        of = f"{self.tasks} x {self.batch}" if self.kind == "office" else str(self.batch)
        return f"{name} {self.height}x{self.width}, T={self.tasks}, P={self.P / 1e6:.3g}M, batch {of}"


@functools.cache
def _numbers(kind: str, height: int) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in _encoder(kind, height).parameters())


def _encoder(kind: str, height: int) -> nn.Module:
    if kind == "office":
        return nn.Sequential(*resnet18(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(*dilated_resnet50()) if kind == "scene" else VisionTransformer(height)


class Office(MultiTaskModel):
    """One classification per domain, each with images of its own."""

    inputs: Tensor
    labels: Tensor

    def __init__(self, size: Vision) -> None:
        heads = [nn.Linear(512, CLASSES) for _ in range(size.tasks)]
        super().__init__(_encoder("office", size.height), heads, own_batches=True)
        images = torch.randn(size.tasks, size.batch, 3, size.height, size.width)
        self.keep(inputs=images, labels=torch.randint(CLASSES, (size.tasks, size.batch)))

    def features(self) -> list[Tensor]:
        return [self.encoder(images) for images in self.inputs]

    def losses_of(self, features: list[Tensor]) -> list[Tensor]:
        of_tasks = zip(self.heads, features, self.labels, strict=True)
        return [nn.functional.cross_entropy(head(x), labels) for head, x, labels in of_tasks]


class Scene(MultiTaskModel):
    """Semantic segmentation, depth, surface normals of one image."""

    inputs: Tensor
    labels: Tensor
    depth: Tensor
    normals: Tensor

    def __init__(self, size: Vision) -> None:
        super().__init__(_encoder("scene", size.height), [aspp_head(outputs) for outputs in (SEGMENTS, 1, 3)])
        area = (size.batch, size.height, size.width)
        self.keep(inputs=torch.randn(size.batch, 3, *area[1:]), labels=torch.randint(SEGMENTS, area))
        self.keep(depth=torch.rand(size.batch, 1, *area[1:]))
        self.keep(normals=nn.functional.normalize(torch.randn(size.batch, 3, *area[1:]), dim=1))

    def losses_of(self, features: list[Tensor]) -> list[Tensor]:
        segments, depth, normals = (
            nn.functional.interpolate(head(features[0]), self.inputs.shape[-2:], mode="bilinear", align_corners=True)
            for head in self.heads
        )
        return [
            nn.functional.cross_entropy(segments, self.labels),
            nn.functional.l1_loss(depth, self.depth),
            1 - nn.functional.cosine_similarity(normals, self.normals, dim=1).mean(),
        ]


class Classes(MultiTaskModel):
    """Several classifications of one image."""

    labels: Tensor

    def __init__(self, size: Vision) -> None:
        heads = [nn.Linear(1024, CLASSES) for _ in range(size.tasks)]
        super().__init__(_encoder("vit", size.height), heads)
        images = torch.randn(size.batch, 3, size.height, size.width)
        self.keep(inputs=images, labels=torch.randint(CLASSES, (size.tasks, size.batch)))

    def losses_of(self, features: list[Tensor]) -> list[Tensor]:
        of_tasks = zip(self.heads, self.labels, strict=True)
        return [nn.functional.cross_entropy(head(features[0]), labels) for head, labels in of_tasks]


# --- Residual networks


def convolution(inputs: int, outputs: int, size: int, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    """A convolution without bias that keeps the area, and its batch normalisation."""
    padding = dilation * (size - 1) // 2
    layer = nn.Conv2d(inputs, outputs, size, stride, padding, dilation=dilation, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs))


class Residual(nn.Module):
    """``relu(body(x) + shortcut(x))``."""

    def __init__(self, body: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.body, self.shortcut = body, shortcut

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def _stem() -> list[nn.Module]:
    return [convolution(3, 64, 7, stride=2), nn.ReLU(), nn.MaxPool2d(3, stride=2, padding=1)]


def resnet18() -> list[nn.Module]:
    """All but pooling and classifier: 512 channels at 1/32."""
    layers, channels = _stem(), 64
    for width in (64, 128, 256, 512):
        for block in range(2):
            changes = block == 0 and width != channels
            stride = 2 if changes else 1
            body = [convolution(channels, width, 3, stride), nn.ReLU(), convolution(width, width, 3)]
            shortcut = convolution(channels, width, 1, stride) if changes else nn.Identity()
            layers.append(Residual(nn.Sequential(*body), shortcut))
            channels = width
    return layers


def dilated_resnet50() -> list[nn.Module]:
    """The same with bottlenecks; the last two stages dilated instead of strided: 2048 channels at 1/8."""
    layers, channels = _stem(), 64
    for width, blocks, first_stride, dilation in ((64, 3, 1, 1), (128, 4, 2, 1), (256, 6, 1, 2), (512, 3, 1, 4)):
        for block in range(blocks):
            stride = first_stride if block == 0 else 1
            body = [
                *(convolution(channels, width, 1), nn.ReLU()),
                *(convolution(width, width, 3, stride, dilation), nn.ReLU()),
                convolution(width, 4 * width, 1),
            ]
            shortcut = convolution(channels, 4 * width, 1, stride) if block == 0 else nn.Identity()
            layers.append(Residual(nn.Sequential(*body), shortcut))
            channels = 4 * width
    return layers


class Pyramid(nn.Module):
    """Atrous spatial pyramid pooling: dilated views of ``x`` and its mean, side by side, then mixed."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        views = [convolution(inputs, width, 1), *(convolution(inputs, width, 3, dilation=d) for d in (12, 24, 36))]
        self.views = nn.ModuleList(nn.Sequential(view, nn.ReLU()) for view in views)
        self.mean = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(inputs, width, 1), nn.ReLU())
        self.mix = nn.Sequential(convolution(5 * width, width, 1), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        mean = self.mean(x).expand(-1, -1, *x.shape[-2:])
        return self.mix(torch.cat([*(view(x) for view in self.views), mean], 1))


def aspp_head(outputs: int) -> nn.Sequential:
    """What DeepLab v3 puts on its backbone."""
    return nn.Sequential(Pyramid(2048, 256), convolution(256, 256, 3), nn.ReLU(), nn.Conv2d(256, outputs, 1))


# --- Vision transformer


class Block(nn.Module):
    """Attention and a two-layer perceptron, each behind a layer normalisation and added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.queries_keys_values, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        parts = self.queries_keys_values(self.before_attention(x)).unflatten(-1, (3, self.heads, -1))
        attended = nn.functional.scaled_dot_product_attention(*parts.permute(2, 0, 3, 1, 4))
        x = x + self.project(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.before_mlp(x))


class VisionTransformer(nn.Module):
    """ViT-L/16 up to the class token's features."""

    def __init__(self, image: int, width: int = 1024, layers: int = 24, heads: int = 16, patch: int = 16) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.patches = nn.Conv2d(3, width, patch, stride=patch)
        self.positions = nn.Parameter(0.02 * torch.randn(1, (image // patch) ** 2 + 1, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(images), -1, -1), patches], 1) + self.positions
        return self.norm(self.blocks(x))[:, 0]
