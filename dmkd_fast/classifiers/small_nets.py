"""Small networks from the distillation literature that timm does not have.

Names:
    `lenet5`, `lenet5_half`
    `cifar_resnetD`, D = 6 n + 2, such as 20, 56, 110; also with `x4`, such as 8x4, 32x4 (wider)
    `cifar_wrnD_K`, D = 6 n + 4, such as 16_1, 16_2, 40_1, 40_2
    `cifar_vgg8`, `cifar_vgg11`, `cifar_vgg13`

The `cifar_` networks are for images of 32 pixels.

Sources: LeCun et al. 1998; He et al. (arXiv 1512.03385), section 4.2; Zagoruyko & Komodakis, wide
residual networks (arXiv 1605.07146); Simonyan & Zisserman (arXiv 1409.1556); the widths of the x4
and VGG variants: Tian et al., contrastive representation distillation (arXiv 1910.10699).
"""

from __future__ import annotations

import re

import torch.nn.functional as F
from torch import Tensor, nn

from dmkd_fast.runtime.errors import invalid

PREFIXES = ("lenet5", "cifar_")
"""All names in this module start with one of these, and no timm name does."""

EXAMPLES = ("lenet5", "lenet5_half", "cifar_resnet20", "cifar_wrn16_2", "cifar_vgg8")
"""Names of common networks, for messages."""

_VGG = {
    "8": ((64,), (128,), (256,), (512,), (512,)),
    "11": ((64,), (128,), (256, 256), (512, 512), (512, 512)),
    "13": ((64, 64), (128, 128), (256, 256), (512, 512), (512, 512)),
}


def build(name: str, *, num_classes: int, in_chans: int) -> nn.Module | None:
    """Build a network with random weights, or return None for a name outside this module.

    Raises:
        UserError: The name starts with `cifar_`, but there is no such network.
    """
    if name in ("lenet5", "lenet5_half"):
        width = 0.5 if name == "lenet5_half" else 1.0
        return LeNet5(num_classes=num_classes, in_chans=in_chans, width=width)
    if not name.startswith("cifar_"):
        return None
    kind = name.removeprefix("cifar_")
    if (match := re.fullmatch(r"resnet(\d{1,4})(x4)?", kind)) and _fits(int(match[1]), 2):
        widths = (32, 64, 128, 256) if match[2] else (16, 16, 32, 64)
        return CifarResNet(int(match[1]), widths, num_classes=num_classes, in_chans=in_chans)
    if (match := re.fullmatch(r"wrn(\d{1,4})_([1-9]\d?)", kind)) and _fits(int(match[1]), 4):
        depth, width = int(match[1]), int(match[2])
        return WideResNet(depth, width, num_classes=num_classes, in_chans=in_chans)
    if (match := re.fullmatch(r"vgg(\d+)", kind)) and match[1] in _VGG:
        return CifarVGG(_VGG[match[1]], num_classes=num_classes, in_chans=in_chans)
    raise invalid(
        "arch",
        repr(name),
        "cifar_resnetD or cifar_resnetDx4 (D = 8, 14, 20, ...), cifar_wrnD_K (D = 10, 16, ...), "
        "cifar_vgg8, cifar_vgg11 or cifar_vgg13",
    )


class LeNet5(nn.Module):
    """LeNet-5 as in the zero-shot distillation literature: ReLU, max-pooling, 32x32 input.

    Smaller images are padded with zeros. `width=0.5` gives LeNet-5-half.
    Source: LeCun et al. 1998; Nayak et al. 2019 (arXiv 1905.08114).
    """

    def __init__(self, *, num_classes: int, in_chans: int, width: float = 1.0) -> None:
        super().__init__()
        c1, c2, c3, hidden = (int(n * width) for n in (6, 16, 120, 84))
        self.features = nn.Sequential(
            nn.Conv2d(in_chans, c1, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(c1, c2, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(c2, c3, 5),
            nn.ReLU(),
        )
        self.classifier = nn.Sequential(
            nn.Linear(c3, hidden), nn.ReLU(), nn.Linear(hidden, num_classes)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, num_classes) for images (B, in_chans, H, W) with H, W <= 32."""
        rows, columns = 32 - images.shape[-2], 32 - images.shape[-1]
        if min(rows, columns) < 0:  # Padding by a negative number would crop.
            size = " x ".join(map(str, images.shape[-2:]))
            raise ValueError(f"images: got {size} pixels, expected at most 32 x 32")
        padding = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
        logits: Tensor = self.classifier(self.features(F.pad(images, padding)).flatten(1))
        return logits


class CifarResNet(nn.Module):
    """ResNet for CIFAR: three stages of basic blocks at full, half and quarter resolution.

    He et al. pad the shortcut with zeros where the width changes. Distillation papers use a
    projection, as this network does, and publish the parameter counts of that form.
    """

    def __init__(
        self, depth: int, widths: tuple[int, int, int, int], *, num_classes: int, in_chans: int
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(_conv(in_chans, widths[0]), nn.BatchNorm2d(widths[0]), nn.ReLU())
        blocks: list[nn.Module] = []
        before = widths[0]
        for stage, width in enumerate(widths[1:]):
            for place in range((depth - 2) // 6):
                stride = 2 if stage > 0 and place == 0 else 1
                blocks.append(_BasicBlock(before, width, stride))
                before = width
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(before, num_classes)
        _initialize(self)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, num_classes) for images (B, in_chans, H, W)."""
        logits: Tensor = self.classifier(self.blocks(self.stem(images)).mean((2, 3)))
        return logits


class WideResNet(nn.Module):
    """Wide residual network with pre-activation; `width` multiplies the channels of each stage."""

    def __init__(self, depth: int, width: int, *, num_classes: int, in_chans: int) -> None:
        super().__init__()
        self.stem = _conv(in_chans, 16)
        blocks: list[nn.Module] = []
        before = 16
        for stage, channels in enumerate((16 * width, 32 * width, 64 * width)):
            for place in range((depth - 4) // 6):
                stride = 2 if stage > 0 and place == 0 else 1
                blocks.append(_PreActivationBlock(before, channels, stride))
                before = channels
        self.blocks = nn.Sequential(*blocks, nn.BatchNorm2d(before), nn.ReLU())
        self.classifier = nn.Linear(before, num_classes)
        _initialize(self)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, num_classes) for images (B, in_chans, H, W)."""
        logits: Tensor = self.classifier(self.blocks(self.stem(images)).mean((2, 3)))
        return logits


class CifarVGG(nn.Module):
    """VGG with batch norm, one linear layer, and max-pooling after each stage but the last."""

    def __init__(
        self, stages: tuple[tuple[int, ...], ...], *, num_classes: int, in_chans: int
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = in_chans
        for number, widths in enumerate(stages):
            if number:
                layers.append(nn.MaxPool2d(2))
            for width in widths:
                layers += [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
                before = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(before, num_classes)
        _initialize(self)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, num_classes) for images (B, in_chans, H, W) with H, W >= 16."""
        logits: Tensor = self.classifier(self.features(images).mean((2, 3)))
        return logits


class _BasicBlock(nn.Module):
    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = _conv(before, width, stride), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = _conv(width, width), nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or before != width:
            project = nn.Conv2d(before, width, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(project, nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


class _PreActivationBlock(nn.Module):
    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(before), _conv(before, width, stride)
        self.norm2, self.conv2 = nn.BatchNorm2d(width), _conv(width, width)
        self.project: nn.Module | None = None
        if stride != 1 or before != width:
            self.project = nn.Conv2d(before, width, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.norm1(x))
        shortcut = x if self.project is None else self.project(active)
        residual: Tensor = self.conv2(F.relu(self.norm2(self.conv1(active))))
        return shortcut + residual


def _fits(depth: int, offset: int) -> bool:
    """Return whether three equal stages of two-layer blocks plus `offset` layers have this depth.

    1202, the upper limit, is the deepest published network.
    """
    return offset < depth <= 1202 and (depth - offset) % 6 == 0


def _conv(before: int, width: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(before, width, 3, stride=stride, padding=1, bias=False)


def _initialize(model: nn.Module) -> None:
    """Initialize convolutions as He et al. (arXiv 1502.01852), fan-out; other layers as PyTorch."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
