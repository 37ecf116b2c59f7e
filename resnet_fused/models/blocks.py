"""The residual blocks of v1: convolution, BN, ReLU, the add before the last ReLU."""

from collections.abc import Callable
from typing import Literal

from torch import Tensor, nn

from ..layers import INPUT, Recompute, Step, run
from .layout import LaidOut


def conv3x3(in_planes: int, out_planes: int, stride: int = 1, groups: int = 1, dilation: int = 1) -> nn.Conv2d:
    """3x3 convolution with padding, [N, in_planes, H, W] -> [N, out_planes, H / stride, W / stride]."""
    return nn.Conv2d(
        in_planes,
        out_planes,
        kernel_size=3,
        stride=stride,
        padding=dilation,
        groups=groups,
        bias=False,
        dilation=dilation,
    )


def conv1x1(in_planes: int, out_planes: int, stride: int = 1) -> nn.Conv2d:
    """1x1 convolution, [N, in_planes, H, W] -> [N, out_planes, H / stride, W / stride]."""
    return nn.Conv2d(in_planes, out_planes, kernel_size=1, stride=stride, bias=False)


class Block(LaidOut):
    """What every block has: convolutions of its own, and a shortcut around them."""

    expansion: int
    recompute: Recompute = None
    residual = True  # False in plain networks: no shortcut
    downsample: nn.Module | None  # what the shortcut goes through; None: the identity
    bn1: nn.Module | None  # None in the first pre-activation unit: the stem's BN and ReLU are in front of it
    relu: nn.Module

    @property
    def addend(self) -> nn.Module | Literal["input"] | None:
        """Of the block's last step."""
        if not self.residual:
            return None
        return INPUT if self.downsample is None else self.downsample


class BasicBlock(Block):
    """Two 3x3 convolutions and a shortcut: the block of ResNet-18 and ResNet-34."""

    expansion = 1

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Callable[..., nn.Module] | None = None,
        stride_in_1x1: bool = False,
    ) -> None:
        super().__init__()
        norm_layer = norm_layer or nn.BatchNorm2d
        if groups != 1 or base_width != 64:
            raise ValueError(f"BasicBlock takes groups=1, base_width=64, got groups={groups}, base_width={base_width}")
        if dilation > 1:
            raise NotImplementedError(f"BasicBlock takes dilation=1, got {dilation}")
        if stride_in_1x1:
            raise ValueError("stride_in_1x1=True concerns Bottleneck blocks: a BasicBlock has no 1x1 convolution")
        self.conv1 = conv3x3(inplanes, planes, stride)
        self.bn1 = norm_layer(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = norm_layer(planes)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return run(
            x,
            Step(self.conv1, self.bn1, self.relu),
            Step(self.conv2, self.bn2, self.relu, self.addend),
            recompute=self.recompute,
        )


class Bottleneck(Block):
    """1x1, 3x3, 1x1 convolutions and a shortcut: the block of ResNet-50 and deeper.

    The stride lies on the 3x3, as in torchvision ("v1.5"); `stride_in_1x1` puts it on the first 1x1, as in the paper.
    """

    expansion = 4

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Callable[..., nn.Module] | None = None,
        stride_in_1x1: bool = False,
    ) -> None:
        super().__init__()
        norm_layer = norm_layer or nn.BatchNorm2d
        width = int(planes * (base_width / 64.0)) * groups
        stride1, stride2 = (stride, 1) if stride_in_1x1 else (1, stride)
        self.conv1 = conv1x1(inplanes, width, stride1)
        self.bn1 = norm_layer(width)
        self.conv2 = conv3x3(width, width, stride2, groups, dilation)
        self.bn2 = norm_layer(width)
        self.conv3 = conv1x1(width, planes * self.expansion)
        self.bn3 = norm_layer(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return run(
            x,
            Step(self.conv1, self.bn1, self.relu),
            Step(self.conv2, self.bn2, self.relu),
            Step(self.conv3, self.bn3, self.relu, self.addend),
            recompute=self.recompute,
        )
