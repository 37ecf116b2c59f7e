"""ResNet v1, ResNeXt and wide ResNet with torchvision's names, parameters and state_dict keys.

He et al., "Deep Residual Learning for Image Recognition", https://arxiv.org/abs/1512.03385;
Xie et al., "Aggregated Residual Transformations for Deep Neural Networks", https://arxiv.org/abs/1611.05431;
Zagoruyko and Komodakis, "Wide Residual Networks", https://arxiv.org/abs/1605.07146.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import INPUT, Recompute, Step, run
from .weights import WeightsArg, load_state_dict, resolve

torch.fx.wrap("run")


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


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: the block of ResNet-18 and ResNet-34."""

    expansion = 1
    recompute: Recompute = None

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
            Step(self.conv2, self.bn2, self.relu, INPUT if self.downsample is None else self.downsample),
            recompute=self.recompute,
        )


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions and a shortcut: the block of ResNet-50 and deeper.

    The stride lies on the 3x3, as in torchvision ("v1.5"); `stride_in_1x1` puts it on the first 1x1, as in the paper.
    """

    expansion = 4
    recompute: Recompute = None

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
            Step(self.conv3, self.bn3, self.relu, INPUT if self.downsample is None else self.downsample),
            recompute=self.recompute,
        )


class ResNet(nn.Module):
    """torchvision's `ResNet`, whose blocks run on the fused operators where a backend serves them.

    Args:
        block: `BasicBlock` or `Bottleneck`.
        layers: number of blocks in each of the four stages.
        num_classes: outputs of the last linear layer.
        zero_init_residual: start every residual branch at zero (https://arxiv.org/abs/1706.02677).
        groups, width_per_group: cardinality and width of the 3x3 convolutions (ResNeXt, wide ResNet).
        replace_stride_with_dilation: three flags; where true, a stage dilates instead of striding.
        norm_layer: constructor of the normalisation, `nn.BatchNorm2d` by default; it and SyncBatchNorm are fused.
        stride_in_1x1: put a stage's stride on the first 1x1 convolution, as in the paper (v1), not on the 3x3 (v1.5).
        recompute: what the backward pass computes again instead of keeping; see `set_recompute`.
        channels_last: keep the convolutions' weights in channels_last; False leaves them contiguous, for FSDP2, LBFGS
            and safetensors' own `save_file`, which refuse the other layout.

    Shape: [N, 3, H, W] in either memory format -> [N, num_classes].
    """

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        layers: list[int],
        num_classes: int = 1000,
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        replace_stride_with_dilation: list[bool] | None = None,
        norm_layer: Callable[..., nn.Module] | None = None,
        *,
        stride_in_1x1: bool = False,
        recompute: Recompute = None,
        channels_last: bool = True,
    ) -> None:
        super().__init__()
        self._norm_layer = norm_layer or nn.BatchNorm2d
        self.inplanes = 64
        self.dilation = 1
        dilate = [False, False, False] if replace_stride_with_dilation is None else replace_stride_with_dilation
        if len(dilate) != 3:
            raise ValueError(f"replace_stride_with_dilation must be None or have 3 elements, got {dilate}")
        self.groups = groups
        self.base_width = width_per_group
        self.stride_in_1x1 = stride_in_1x1
        self.conv1 = nn.Conv2d(3, self.inplanes, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = self._norm_layer(self.inplanes)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = self._make_layer(block, 64, layers[0])
        self.layer2 = self._make_layer(block, 128, layers[1], stride=2, dilate=dilate[0])
        self.layer3 = self._make_layer(block, 256, layers[2], stride=2, dilate=dilate[1])
        self.layer4 = self._make_layer(block, 512, layers[3], stride=2, dilate=dilate[2])
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(512 * block.expansion, num_classes)

        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(m, (nn.BatchNorm2d, nn.GroupNorm)):
                nn.init.constant_(m.weight, 1)
                nn.init.constant_(m.bias, 0)
        if zero_init_residual:
            for m in self.modules():
                if isinstance(m, Bottleneck) and m.bn3.weight is not None:
                    nn.init.constant_(m.bn3.weight, 0)
                elif isinstance(m, BasicBlock) and m.bn2.weight is not None:
                    nn.init.constant_(m.bn2.weight, 0)
        if channels_last:  # after initialisation: drawing into channels_last gives other bits
            for m in self.modules():
                if isinstance(m, nn.Conv2d):
                    m.weight.data = m.weight.data.contiguous(memory_format=torch.channels_last)

        self.set_recompute(recompute)

    def set_recompute(self, recompute: Recompute) -> None:
        """What the backward pass computes again instead of keeping it in memory.

        None: nothing. "activations": the outputs of BN + ReLU inside the blocks and in the stem, from the convolutions'
        outputs. "blocks": everything but the blocks' inputs. Gradients are the same to rounding; running statistics,
        `num_batches_tracked` and collectives are those of None. Compiled models decide for themselves what they keep.
        A block with a module that is not fused (see `explain`) keeps what torchvision's would.

        Raises:
            ValueError: another value.
        """
        if recompute not in (None, "activations", "blocks"):
            raise ValueError(f'recompute must be None, "activations" or "blocks", got {recompute!r}')
        self.recompute = recompute
        for m in self.modules():
            if isinstance(m, (BasicBlock, Bottleneck)):
                m.recompute = recompute

    def _make_layer(
        self, block: type[BasicBlock | Bottleneck], planes: int, blocks: int, stride: int = 1, dilate: bool = False
    ) -> nn.Sequential:
        previous_dilation = self.dilation
        if dilate:
            self.dilation *= stride
            stride = 1
        out_planes = planes * block.expansion
        downsample = None
        if stride != 1 or self.inplanes != out_planes:
            downsample = nn.Sequential(conv1x1(self.inplanes, out_planes, stride), self._norm_layer(out_planes))
        shared = dict(groups=self.groups, base_width=self.base_width, norm_layer=self._norm_layer)
        v1 = {"stride_in_1x1": True} if self.stride_in_1x1 else {}  # blocks of the user's own need not know it
        first = block(self.inplanes, planes, stride, downsample, dilation=previous_dilation, **v1, **shared)
        self.inplanes = out_planes
        rest = [block(out_planes, planes, dilation=self.dilation, **shared) for _ in range(1, blocks)]
        return nn.Sequential(first, *rest)

    def forward(self, x: Tensor) -> Tensor:
        if self.recompute is None:
            x = run(x, Step(self.conv1, self.bn1, self.relu))
            x = self.maxpool(x)
        else:
            x = run(x, Step(self.conv1, self.bn1, self.relu), then=self.maxpool, recompute=self.recompute)

        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        x = self.layer4(x)

        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        return self.fc(x)


def _resnet(
    name: str,
    block: type[BasicBlock | Bottleneck],
    layers: list[int],
    weights: WeightsArg,
    progress: bool,
    kwargs: dict[str, Any],
    **fixed: Any,
) -> ResNet:
    source = resolve(name, weights)
    for key, value in (fixed | (source.model_kwargs if source else {})).items():
        if kwargs.setdefault(key, value) != value:
            raise ValueError(f"{name} with weights={weights!r} takes {key}={value}, got {key}={kwargs[key]}")
    model = ResNet(block, layers, **kwargs)
    if source:
        load_state_dict(model, source.state_dict(progress), source=source.name)
    return model


def resnet18(*, weights: WeightsArg = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-18 of https://arxiv.org/abs/1512.03385.

    Args:
        weights: None, a torchvision weights enum or its name, or the path of a `.pth` or `.safetensors` file.
        progress: show a progress bar while weights are downloaded.
        **kwargs: of `ResNet`.

    Shape: [N, 3, H, W] -> [N, num_classes].
    """
    return _resnet("resnet18", BasicBlock, [2, 2, 2, 2], weights, progress, kwargs)


def resnet34(*, weights: WeightsArg = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-34 of https://arxiv.org/abs/1512.03385; arguments and shapes as `resnet18`."""
    return _resnet("resnet34", BasicBlock, [3, 4, 6, 3], weights, progress, kwargs)


def resnet50(*, weights: WeightsArg = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-50 (v1.5) of https://arxiv.org/abs/1512.03385; arguments and shapes as `resnet18`.

    `weights="MSRA"` is the paper's own model, converted from its Caffe release; it implies `stride_in_1x1=True`.
    """
    return _resnet("resnet50", Bottleneck, [3, 4, 6, 3], weights, progress, kwargs)


def resnet101(*, weights: WeightsArg = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-101 (v1.5) of https://arxiv.org/abs/1512.03385; arguments and shapes as `resnet18`."""
    return _resnet("resnet101", Bottleneck, [3, 4, 23, 3], weights, progress, kwargs)


def resnet152(*, weights: WeightsArg = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-152 (v1.5) of https://arxiv.org/abs/1512.03385; arguments and shapes as `resnet18`."""
    return _resnet("resnet152", Bottleneck, [3, 8, 36, 3], weights, progress, kwargs)


def resnext50_32x4d(*, weights: WeightsArg = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNeXt-50 32x4d of https://arxiv.org/abs/1611.05431; arguments and shapes as `resnet18`."""
    return _resnet("resnext50_32x4d", Bottleneck, [3, 4, 6, 3], weights, progress, kwargs, groups=32, width_per_group=4)


def resnext101_32x8d(*, weights: WeightsArg = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNeXt-101 32x8d of https://arxiv.org/abs/1611.05431; arguments and shapes as `resnet18`."""
    return _resnet(
        "resnext101_32x8d", Bottleneck, [3, 4, 23, 3], weights, progress, kwargs, groups=32, width_per_group=8
    )


def resnext101_64x4d(*, weights: WeightsArg = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNeXt-101 64x4d of https://arxiv.org/abs/1611.05431; arguments and shapes as `resnet18`."""
    return _resnet(
        "resnext101_64x4d", Bottleneck, [3, 4, 23, 3], weights, progress, kwargs, groups=64, width_per_group=4
    )


def wide_resnet50_2(*, weights: WeightsArg = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """Wide ResNet-50-2 of https://arxiv.org/abs/1605.07146; arguments and shapes as `resnet18`."""
    return _resnet("wide_resnet50_2", Bottleneck, [3, 4, 6, 3], weights, progress, kwargs, width_per_group=128)


def wide_resnet101_2(*, weights: WeightsArg = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """Wide ResNet-101-2 of https://arxiv.org/abs/1605.07146; arguments and shapes as `resnet18`."""
    return _resnet("wide_resnet101_2", Bottleneck, [3, 4, 23, 3], weights, progress, kwargs, width_per_group=128)
