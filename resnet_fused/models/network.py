"""The network of v1: a stem, stages of blocks, and a classifier; what a model's name stands for is made of it."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn

from ..dispatch.registry import BackendUnavailable
from ..layers import PadShortcut, Recompute, Step, as_floating, counters, run, run_stem
from .blocks import BasicBlock, Block, Bottleneck, conv1x1, conv3x3
from .features import Backbone, FeatureNet
from .layout import LaidOut
from .weights import TOPOLOGY, WeightsArg, load_state_dict, resolve

Stem = Literal["imagenet", "caffe", "cifar"]
Shortcut = Literal["A", "B", "C"] | None
Network = TypeVar("Network", bound="ResNet")


class ResNet(Backbone):
    """torchvision's `ResNet`, whose blocks run on the fused operators where a backend serves them.

    Args:
        block: `BasicBlock` or `Bottleneck`.
        layers: number of blocks in each stage.
        num_classes: outputs of the last linear layer; 0: there is none, the model gives its pooled features.
        zero_init_residual: start every residual branch at zero (https://arxiv.org/abs/1706.02677).
        groups, width_per_group: cardinality and width of the 3x3 convolutions (ResNeXt, wide ResNet).
        replace_stride_with_dilation: a flag for every stage but the first; where true, it dilates instead of striding.
        norm_layer: constructor of the normalisation, `nn.BatchNorm2d` by default; it and SyncBatchNorm are fused.
        stem: "imagenet", a 7x7 convolution of stride 2 and max pooling; "caffe", the same, but pooling in ceil mode
            without padding, as the paper's Caffe model; "cifar", a 3x3 convolution of stride 1.
        shortcut: where a stage changes the shape, the paper's option "A", subsampling and zeros for the new channels,
            or "B", a projection; "C", projections in every block; None, no shortcuts at all: a plain network.
        widths: of the 3x3 convolutions, stage by stage; the first is the stem's too.
        stride_in_1x1: put a stage's stride on the first 1x1 convolution, as in the paper (v1), not on the 3x3 (v1.5).
        recompute: what the backward pass computes again instead of keeping; see `set_recompute`.
        in_chans: channels of the images; of weights for 3, the first convolution's are adapted as timm does.
        channels_last: lay the convolutions' weights in channels_last where the model comes to a GPU, as the kernels
            read them, and contiguous where it leaves it; False keeps them contiguous there too, for LBFGS, safetensors'
            own `save_file` and FSDP2 of a model on a GPU, which refuse the other layout.

    Shape: [N, in_chans, H, W] in either memory format -> [N, num_classes], or [N, num_features].
    """

    def __init__(
        self,
        block: type[Block],
        layers: list[int],
        num_classes: int = 1000,
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        replace_stride_with_dilation: list[bool] | None = None,
        norm_layer: Callable[..., nn.Module] | None = None,
        *,
        stem: Stem = "imagenet",
        shortcut: Shortcut = "B",
        widths: Sequence[int] = (64, 128, 256, 512),
        stride_in_1x1: bool = False,
        recompute: Recompute = None,
        in_chans: int = 3,
        channels_last: bool = True,
    ) -> None:
        super().__init__()
        if len(layers) != len(widths):
            raise ValueError(f"layers must have {len(widths)} elements, as many as widths, got {layers}")
        dilate = replace_stride_with_dilation or [False] * (len(layers) - 1)
        if len(dilate) != len(layers) - 1:
            raise ValueError(
                f"replace_stride_with_dilation must be None or have {len(layers) - 1} elements, got {dilate}"
            )
        if stem not in ("imagenet", "caffe", "cifar"):
            raise ValueError(f'stem must be "imagenet", "caffe" or "cifar", got {stem!r}')
        if shortcut not in ("A", "B", "C", None):
            raise ValueError(f'shortcut must be "A", "B", "C" or None, got {shortcut!r}')
        if num_classes < 0:
            raise ValueError(f"num_classes must be 0 or more, got {num_classes}")
        if in_chans < 1:
            raise ValueError(f"in_chans must be at least 1, got {in_chans}")
        if zero_init_residual and shortcut is None:
            raise ValueError("zero_init_residual=True needs shortcuts: without them nothing but zeros would be left")
        self._norm_layer = norm_layer or nn.BatchNorm2d
        self.inplanes = widths[0]
        self.dilation = 1
        self.groups = groups
        self.base_width = width_per_group
        self.shortcut = shortcut
        self.stem = stem
        self.stride_in_1x1 = stride_in_1x1
        if stem == "cifar":
            self.conv1 = conv3x3(in_chans, self.inplanes)
        else:
            self.conv1 = nn.Conv2d(in_chans, self.inplanes, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = self._norm_layer(self.inplanes)
        self.relu = nn.ReLU(inplace=True)
        caffe = stem == "caffe"
        self.maxpool = None if stem == "cifar" else nn.MaxPool2d(3, 2, padding=0 if caffe else 1, ceil_mode=caffe)
        self._add_stages(block, layers, widths, dilate)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.num_features = widths[-1] * block.expansion
        self.fc = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(m, (nn.BatchNorm2d, nn.GroupNorm)):
                nn.init.constant_(m.weight, 1)
                nn.init.constant_(m.bias, 0)
        if zero_init_residual:
            for m in self.modules():
                if isinstance(m, Bottleneck) and isinstance(m.bn3.weight, Tensor):
                    nn.init.constant_(m.bn3.weight, 0)
                elif isinstance(m, BasicBlock) and isinstance(m.bn2.weight, Tensor):
                    nn.init.constant_(m.bn2.weight, 0)
        for m in self.modules():
            if isinstance(m, LaidOut):
                m.channels_last = channels_last
        self.lay_out()  # after initialisation: drawing into channels_last gives other bits

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
            if isinstance(m, Block):
                m.recompute = recompute

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """PyTorch's; beside it is noted what the tensors don't tell, so that a file of it is known again."""
        state = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
        if hasattr(state, "_metadata"):
            state._metadata[prefix[:-1]] |= {key: getattr(self, key) for key in TOPOLOGY}
        return state

    def _add_stages(self, block: type[Block], layers: list[int], widths: Sequence[int], dilate: list[bool]) -> None:
        self.stages = len(layers)
        for i, (blocks, width) in enumerate(zip(layers, widths, strict=True)):
            stage = self._make_layer(block, width, blocks, 1 if i == 0 else 2, i > 0 and dilate[i - 1])
            self.add_module(f"layer{i + 1}", stage)

    def _make_layer(
        self, block: type[Block], planes: int, blocks: int, stride: int = 1, dilate: bool = False
    ) -> nn.Sequential:
        previous_dilation = self.dilation
        if dilate:
            self.dilation *= stride
            stride = 1
        out_planes = planes * block.expansion
        downsample = self._make_shortcut(self.inplanes, out_planes, stride)
        shared = dict(groups=self.groups, base_width=self.base_width, norm_layer=self._norm_layer)
        v1 = {"stride_in_1x1": True} if self.stride_in_1x1 else {}  # blocks of the user's own need not know it
        stage = [block(self.inplanes, planes, stride, downsample, dilation=previous_dilation, **v1, **shared)]
        self.inplanes = out_planes
        for _ in range(1, blocks):
            downsample = self._make_shortcut(out_planes, out_planes, 1)
            stage.append(block(out_planes, planes, downsample=downsample, dilation=self.dilation, **shared))
        if self.shortcut is None:
            for m in stage:
                m.residual = False
        return nn.Sequential(*stage)

    def _make_shortcut(self, in_planes: int, out_planes: int, stride: int) -> nn.Module | None:
        """What the shortcut goes through, or None."""
        same = stride == 1 and in_planes == out_planes
        if self.shortcut is None or (same and self.shortcut != "C"):
            return None
        if self.shortcut == "A":
            return PadShortcut(out_planes, stride)
        return self._projection(in_planes, out_planes, stride)

    def _stages(self) -> list[nn.Sequential]:
        return [getattr(self, f"layer{i + 1}") for i in range(self.stages)]

    def _projection(self, in_planes: int, out_planes: int, stride: int) -> nn.Module:
        return nn.Sequential(conv1x1(in_planes, out_planes, stride), self._norm_layer(out_planes))

    def _stem(self, x: Tensor) -> Tensor:
        step, normalization = Step(self.conv1, self.bn1, self.relu), self.input_normalization
        if self.recompute is None or not torch.is_grad_enabled():
            return run_stem(x, step, self.maxpool, normalization)
        x = as_floating(x, self.conv1, normalization)
        return run(x, step, then=self.maxpool, recompute=self.recompute)

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return self._forward_impl(x)
        try:
            if not self.training:
                return self._forward_impl(x)
            with counters.together():
                return self._forward_impl(x)
        except BackendUnavailable as error:
            name = next((n for n, m in self.named_modules() if m is error.module), None)
            error.args = (str(error) if name is None else f"{name}, {error}",)
            raise

    def _forward_impl(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        x = self._stem(x)
        for stage in self._stages():
            x = stage(x)
        return x


def build(
    name: str,
    network: type[Network],
    block: type[Block],
    layers: list[int],
    weights: WeightsArg,
    progress: bool,
    kwargs: dict[str, Any],
    defaults: dict[str, Any] | None = None,
    **fixed: Any,
) -> Network:
    """The model of that name: `network(block, layers)` with what its name and its weights ask for, else `defaults`.

    `features_only=True` among the arguments gives its `FeatureNet`, with the outputs of `out_indices`. With weights,
    num_classes=0 leaves out their classifier, and in_chans other than 3 adapts their first convolution.
    """
    features_only, out_indices = kwargs.pop("features_only", False), kwargs.pop("out_indices", None)
    if out_indices is not None and not features_only:
        raise ValueError(f"out_indices={out_indices} needs features_only=True")
    source = resolve(name, weights)
    expected = fixed | (source.model_kwargs if source else {})
    for key, value in fixed.items():
        if expected[key] != value:
            raise ValueError(
                f"weights={str(weights)!r} are of a model with {key}={expected[key]!r}, {name} has {value!r}"
            )
    headless = kwargs.get("num_classes") == 0
    if headless:
        expected.pop("num_classes", None)
    for key, value in expected.items():
        if kwargs.setdefault(key, value) != value:
            given = f" with weights={str(weights)!r}" if source else ""
            raise ValueError(f"{name}{given} takes {key}={value}, got {key}={kwargs[key]}")
    model = network(block, layers, **(defaults or {}) | kwargs)
    if source:
        state = source.state_dict(progress)
        if headless:
            state = {key: value for key, value in state.items() if not key.startswith("fc.")}
        if "in_chans" in kwargs and "conv1.weight" in state:
            state = state | {"conv1.weight": _adapted(state["conv1.weight"], kwargs["in_chans"])}
        load_state_dict(model, state, source=source.name)
    return cast(Network, FeatureNet(model, out_indices)) if features_only else model


def _adapted(weight: Tensor, in_chans: int) -> Tensor:
    """A first convolution's weight [O, 3, H, W] for another number of channels, as timm's `adapt_input_conv`.

    One channel gets the sum; more get the three over and over, scaled so that equal channels answer as before.
    """
    given = weight.shape[1]
    if in_chans == given or given != 3:  # or one for that number already, or none that can be adapted
        return weight
    wide = weight.float()
    if in_chans == 1:
        return wide.sum(1, keepdim=True).to(weight.dtype)
    return (wide[:, torch.arange(in_chans) % 3] * (3 / in_chans)).to(weight.dtype)
