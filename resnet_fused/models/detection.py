"""Backbones for torchvision's detection and segmentation models, under torchvision's names.

from resnet_fused.models.detection import resnet_fpn_backbone  # before: torchvision.models.detection.backbone_utils
model = FasterRCNN(resnet_fpn_backbone(backbone_name="resnet50", weights="IMAGENET1K_V2"), num_classes=91)
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn
from torchvision.models.detection.backbone_utils import BackboneWithFPN, _resnet_fpn_extractor  # an extra
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock

from . import get_model
from .features import FeatureNet
from .network import ResNet
from .weights import WeightsArg

__all__ = ["IntermediateLayerGetter", "resnet_fpn_backbone"]


class IntermediateLayerGetter(FeatureNet):
    """torchvision's, with the same keys, for this package's models: their stem is one step as the blocks' are.

    Args:
        model: a `ResNet`; its modules are taken, and those behind the last output left out.
        return_layers: of its stages, from a name, "layer1" to "layer4", to the output's name.

    Shape: [N, 3, H, W] -> the outputs by name.

    Raises:
        ValueError: the model has no stage of such a name.
    """

    def __init__(self, model: ResNet, return_layers: Mapping[str, str]) -> None:
        stages = [f"layer{i + 1}" for i in range(model.stages)]
        if not return_layers or any(name not in stages for name in return_layers):
            raise ValueError(f"return_layers must name some of {', '.join(stages)}, got {dict(return_layers)}")
        super().__init__(model, [stages.index(name) + 1 for name in return_layers])
        self.return_layers = dict(return_layers)

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:  # type: ignore[override]
        names = (self.return_layers[f"layer{i}"] for i in self.out_indices)
        return OrderedDict(zip(names, super().forward(x), strict=True))


def resnet_fpn_backbone(
    *,
    backbone_name: str,
    weights: WeightsArg,
    norm_layer: Callable[..., nn.Module] = FrozenBatchNorm2d,
    trainable_layers: int = 3,
    returned_layers: Sequence[int] | None = None,
    extra_blocks: ExtraFPNBlock | None = None,
) -> BackboneWithFPN:
    """torchvision's `resnet_fpn_backbone` of this package's model: torchvision's class, arguments, keys and freezing.

    Args:
        backbone_name: a name that `get_model` takes, of a model with four stages.
        weights: as the model of that name takes them; None: drawn.
        norm_layer: of the backbone; `FrozenBatchNorm2d` is fused as given statistics, in training too.
        trainable_layers: how many of layer4, layer3, layer2, layer1 and the stem, in this order, are trained; 5 is all.
        returned_layers: the stages, 1 to 4, whose features the pyramid takes; by default all.
        extra_blocks: on top of the pyramid; by default torchvision's `LastLevelMaxPool`.

    Shape: [N, 3, H, W] -> maps of 256 channels by name, largest first: "0", ..., "pool".

    Raises:
        ValueError: an unknown name, or trainable_layers or returned_layers out of range.
    """
    net = get_model(backbone_name, weights=weights, norm_layer=norm_layer)
    layers = None if returned_layers is None else list(returned_layers)
    backbone = _resnet_fpn_extractor(net, trainable_layers, layers, extra_blocks)
    backbone.body = IntermediateLayerGetter(net, backbone.body.return_layers)
    return backbone
