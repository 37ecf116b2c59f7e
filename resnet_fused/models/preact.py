"""Pre-activation ResNets (v2): BN and ReLU before every convolution, nothing but the add on the trunk.

He et al., "Identity Mappings in Deep Residual Networks", https://arxiv.org/abs/1603.05027. As there, the first
activation comes right after the stem's convolution and before the first unit splits, and the last one after the last
add. As in the authors' code, a shortcut that changes its input reads the unit's first activation, and has no BN.
"""

from collections.abc import Callable, Iterable
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from ..layers import Step, hands_over, run, run_unit
from .blocks import BasicBlock, Block, Bottleneck, conv1x1
from .network import ResNet, build
from .weights import WeightsArg


class _PreAct(Block):
    def branch(self) -> tuple[Step, ...]:
        raise NotImplementedError

    def steps(self) -> tuple[Step, ...]:
        """The whole unit."""
        return self.branch() if self.bn1 is None else (Step(None, self.bn1, self.relu), *self.branch())

    def forward(self, x: Tensor) -> Tensor:
        return run(x, *self.steps(), recompute=self.recompute)


class PreActBasicBlock(_PreAct, BasicBlock):
    """BN, ReLU, 3x3 convolution, twice, and a shortcut; arguments as `BasicBlock`."""

    def __init__(
        self, inplanes: int, *args: Any, norm_layer: Callable[..., nn.Module] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(inplanes, *args, **kwargs | {"norm_layer": norm_layer})
        self.bn1 = (norm_layer or nn.BatchNorm2d)(inplanes)
        self.relu = nn.ReLU()  # not in place: norm_layer may be nn.Identity, which returns the trunk itself

    def branch(self) -> tuple[Step, ...]:
        return Step(self.conv1, self.bn2, self.relu), Step(self.conv2, addend=self.addend)


class PreActBottleneck(_PreAct, Bottleneck):
    """BN, ReLU, convolution, three times (1x1, 3x3, 1x1), and a shortcut; arguments as `Bottleneck`."""

    def __init__(
        self, inplanes: int, *args: Any, norm_layer: Callable[..., nn.Module] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(inplanes, *args, **kwargs | {"norm_layer": norm_layer})
        norm_layer = norm_layer or nn.BatchNorm2d
        self.bn1 = norm_layer(inplanes)
        self.bn3 = norm_layer(self.conv3.in_channels)
        self.relu = nn.ReLU()  # as in PreActBasicBlock

    def branch(self) -> tuple[Step, ...]:
        return (
            Step(self.conv1, self.bn2, self.relu),
            Step(self.conv2, self.bn3, self.relu),
            Step(self.conv3, addend=self.addend),
        )


class PreActResNet(ResNet):
    """The pre-activation ResNet; in training the add of every unit and the BN + ReLU after it are one fused pass.

    In eval mode, with `recompute`, and where hooks look on, a unit's last convolution adds in its own pass.

    Arguments and shapes as `ResNet`, except: block is `PreActBasicBlock` or `PreActBottleneck`, shortcut None and
    zero_init_residual=True raise ValueError, for a unit needs its shortcut and its branch does not end in a BN.
    """

    def __init__(
        self, block: type[Block], layers: list[int], num_classes: int = 1000, *args: Any, **kwargs: Any
    ) -> None:
        if kwargs.get("shortcut", "B") is None:
            raise ValueError('shortcut must be "A", "B" or "C" in a pre-activation network, got None')
        if kwargs.get("zero_init_residual", bool(args and args[0])):
            raise ValueError("zero_init_residual=True needs a BN at the end of a branch: pre-activation has none there")
        super().__init__(block, layers, num_classes, *args, **kwargs)

    def _add_stages(self, *args: Any) -> None:
        super()._add_stages(*args)
        first = self._stages()[0][0]
        assert isinstance(first, Block)
        first.bn1 = None
        self.norm = self._norm_layer(self.inplanes)
        self.relu = nn.ReLU()

    def _projection(self, in_planes: int, out_planes: int, stride: int) -> nn.Module:
        return conv1x1(in_planes, out_planes, stride)

    def _forward_impl(self, x: Tensor) -> Tensor:
        if self.recompute is None:
            return self.forward_head(self.forward_features(x))
        x, _ = self._trunk(x)
        x = run(x, Step(None, self.norm, self.relu), then=self.avgpool, recompute=self.recompute)
        return self.fc(torch.flatten(x, 1))

    def forward_features(self, x: Tensor) -> Tensor:
        x, pre_add = self._trunk(x)
        return run(x, Step(None, self.norm, self.relu), pre_add=pre_add)

    def _trunk(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Everything in front of the last BN, and what is still to be added to it."""
        x = self._stem(x)

        stages, pre_add = self._stages(), None
        if self.training and self.recompute is None and _units_alone(stages, x):
            for units in stages:
                for unit in units:
                    x, pre_add = run_unit(x, *unit.steps(), pre_add=pre_add)
        else:
            for stage in stages:
                x = stage(x)
        return x, pre_add


def _units_alone(stages: list[nn.Sequential], x: Tensor) -> TypeGuard[list[Iterable[_PreAct]]]:
    """Whether the stages are nothing but units that may leave their adds to each other."""
    if any(type(stage) is not nn.Sequential for stage in stages):
        return False
    units = [unit for stage in stages for unit in stage]
    plain = all(type(unit) in (PreActBasicBlock, PreActBottleneck) for unit in units)
    return plain and hands_over(x, (*stages, *units))


def _preact(
    name: str, block: type[Block], layers: list[int], weights: WeightsArg, progress: bool, kwargs: dict[str, Any]
) -> PreActResNet:
    return build(name, PreActResNet, block, layers, weights, progress, kwargs)


def _cifar(
    name: str,
    block: type[Block],
    n: int,
    weights: WeightsArg,
    progress: bool,
    kwargs: dict[str, Any],
    **defaults: Any,
) -> PreActResNet:
    defaults = {"num_classes": 10} | defaults
    fixed = {"stem": "cifar", "widths": (16, 32, 64)}
    return build(name, PreActResNet, block, [n] * 3, weights, progress, kwargs, defaults, **fixed)


def preact_resnet18(*, weights: WeightsArg = None, progress: bool = True, **kwargs: Any) -> PreActResNet:
    """Pre-activation ResNet-18 of https://arxiv.org/abs/1603.05027.

    Args:
        weights: None, or the path of a `.pth` or `.safetensors` file; none are published.
        progress: takes no effect here.
        **kwargs: of `PreActResNet`.

    Shape: [N, 3, H, W] -> [N, num_classes].
    """
    return _preact("preact_resnet18", PreActBasicBlock, [2, 2, 2, 2], weights, progress, kwargs)


def preact_resnet34(*, weights: WeightsArg = None, progress: bool = True, **kwargs: Any) -> PreActResNet:
    """Pre-activation ResNet-34 of https://arxiv.org/abs/1603.05027; arguments and shapes as `preact_resnet18`."""
    return _preact("preact_resnet34", PreActBasicBlock, [3, 4, 6, 3], weights, progress, kwargs)


def preact_resnet50(*, weights: WeightsArg = None, progress: bool = True, **kwargs: Any) -> PreActResNet:
    """Pre-activation ResNet-50 of https://arxiv.org/abs/1603.05027; arguments and shapes as `preact_resnet18`."""
    return _preact("preact_resnet50", PreActBottleneck, [3, 4, 6, 3], weights, progress, kwargs)


def preact_resnet101(*, weights: WeightsArg = None, progress: bool = True, **kwargs: Any) -> PreActResNet:
    """Pre-activation ResNet-101 of https://arxiv.org/abs/1603.05027; arguments and shapes as `preact_resnet18`."""
    return _preact("preact_resnet101", PreActBottleneck, [3, 4, 23, 3], weights, progress, kwargs)


def preact_resnet152(*, weights: WeightsArg = None, progress: bool = True, **kwargs: Any) -> PreActResNet:
    """Pre-activation ResNet-152 of https://arxiv.org/abs/1603.05027; arguments and shapes as `preact_resnet18`."""
    return _preact("preact_resnet152", PreActBottleneck, [3, 8, 36, 3], weights, progress, kwargs)


def preact_resnet200(*, weights: WeightsArg = None, progress: bool = True, **kwargs: Any) -> PreActResNet:
    """Pre-activation ResNet-200 of https://arxiv.org/abs/1603.05027; arguments and shapes as `preact_resnet18`."""
    return _preact("preact_resnet200", PreActBottleneck, [3, 24, 36, 3], weights, progress, kwargs)


def cifar_preact_resnet110(*, weights: WeightsArg = None, progress: bool = True, **kwargs: Any) -> PreActResNet:
    """Pre-activation ResNet-110 for CIFAR, 1.7 M parameters; num_classes=10 and shortcut="A" by default."""
    return _cifar("cifar_preact_resnet110", PreActBasicBlock, 18, weights, progress, kwargs, shortcut="A")


def cifar_preact_resnet164(*, weights: WeightsArg = None, progress: bool = True, **kwargs: Any) -> PreActResNet:
    """Pre-activation ResNet-164 for CIFAR, of bottlenecks, 1.7 M parameters, as the authors' code has it.

    By default num_classes=10, projections where a stage changes the shape, and stride_in_1x1=True.
    """
    return _cifar("cifar_preact_resnet164", PreActBottleneck, 18, weights, progress, kwargs, stride_in_1x1=True)


def cifar_preact_resnet1001(*, weights: WeightsArg = None, progress: bool = True, **kwargs: Any) -> PreActResNet:
    """Pre-activation ResNet-1001 for CIFAR, 10.3 M parameters; otherwise as `cifar_preact_resnet164`."""
    return _cifar("cifar_preact_resnet1001", PreActBottleneck, 111, weights, progress, kwargs, stride_in_1x1=True)
