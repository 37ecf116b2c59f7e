"""Detection and segmentation on this package's backbones, by torchvision's own models: Faster R-CNN and FCN.

    python examples/detection.py --model fpn     # Faster R-CNN on a feature pyramid
    python examples/detection.py --model c4      # its first form: layer4 is the head of every box
    python examples/detection.py --model fcn     # a class for every pixel

Images are made here: a noisy ground with a bright rectangle, wide or tall. Without --weights the backbone is drawn, and
its frozen BN get the statistics of such images. Needs torchvision.
"""

import argparse
import tempfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.segmentation.fcn import FCN, FCNHead
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign, box_iou

from resnet_fused import models  # before: from torchvision import models
from resnet_fused.models.detection import IntermediateLayerGetter, resnet_fpn_backbone

CLASSES = ("ground", "wide", "tall")
FEW = {  # proposals, of torchvision's 2000 and 512: there is one box in an image
    "rpn_pre_nms_top_n_train": 100,
    "rpn_pre_nms_top_n_test": 30,
    "box_batch_size_per_image": 32,
}
Weights = str | Path | None


def fpn(name: str, size: int, weights: Weights = None, trainable_layers: int = 5) -> FasterRCNN:
    """Faster R-CNN on a feature pyramid, images [3, size, size]."""
    backbone = resnet_fpn_backbone(backbone_name=name, weights=weights, trainable_layers=trainable_layers)
    anchors = AnchorGenerator(tuple((size / s,) for s in (16, 8, 4, 2, 1)), ((0.5, 1.0, 2.0),) * 5)
    return FasterRCNN(backbone, len(CLASSES), size, size, rpn_anchor_generator=anchors, **FEW)


def c4(name: str, size: int, weights: Weights = None) -> FasterRCNN:
    """Faster R-CNN as in the ResNet paper: what is pooled of layer3 goes through layer4, box by box."""
    net = models.get_model(name, weights=weights, norm_layer=FrozenBatchNorm2d)
    backbone = IntermediateLayerGetter(net, {"layer3": "0"})
    backbone.out_channels = net.fc.in_features // 2
    head = nn.Sequential(OrderedDict(layer4=net.layer4, avgpool=net.avgpool, flatten=nn.Flatten()))
    return FasterRCNN(
        backbone,
        None,  # the predictor knows how many
        size,
        size,
        rpn_anchor_generator=AnchorGenerator(((size / 8, size / 4, size / 2),), ((0.5, 1.0, 2.0),)),
        box_roi_pool=MultiScaleRoIAlign(["0"], output_size=14, sampling_ratio=2),
        box_head=head,
        box_predictor=FastRCNNPredictor(net.fc.in_features, len(CLASSES)),
        **FEW,
    )


def fcn(name: str, size: int, weights: Weights = None) -> FCN:
    """A fully convolutional network on layer4; in a ResNet of bottlenecks layer3 and layer4 dilate."""
    dilated = {} if name in ("resnet18", "resnet34") else {"replace_stride_with_dilation": [False, True, True]}
    net = models.get_model(name, weights=weights, norm_layer=FrozenBatchNorm2d, **dilated)
    return FCN(IntermediateLayerGetter(net, {"layer4": "out"}), FCNHead(net.fc.in_features, len(CLASSES)))


MODELS: dict[str, Callable[..., nn.Module]] = {"fpn": fpn, "c4": c4, "fcn": fcn}


def scenes(count: int, size: int, seed: int) -> tuple[Tensor, list[dict[str, Tensor]], Tensor]:
    """Images [count, 3, size, size] in 0..1, each one's box and label, and the class of every pixel."""
    draw = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 3, size, size, generator=draw) * 0.5
    targets, pixels = [], torch.zeros(count, size, size, dtype=torch.long)
    for image, classes in zip(images, pixels, strict=True):
        label = int(torch.randint(1, 3, (), generator=draw))
        long, short = (int(torch.randint(size // a, size // b, (), generator=draw)) for a, b in ((3, 2), (6, 4)))
        width, height = (long, short) if label == 1 else (short, long)
        x, y = (int(torch.randint(0, size - side, (), generator=draw)) for side in (width, height))
        image[:, y : y + height, x : x + width] += 0.5
        classes[y : y + height, x : x + width] = label
        box = torch.tensor([[x, y, x + width, y + height]], dtype=torch.float32)
        targets.append({"boxes": box, "labels": torch.tensor([label])})
    return images, targets, pixels


def normalised(images: Tensor) -> Tensor:
    """As ImageNet's; Faster R-CNN does it by itself."""
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], device=images.device)[..., None, None]
    return (images - mean) / std


def drawn_weights(name: str, images: Tensor, path: Path) -> Path:
    """A file of a drawn model whose statistics are those of the images."""
    net = models.get_model(name, norm_layer=lambda channels: nn.BatchNorm2d(channels, momentum=None))
    with torch.no_grad():
        net.train()(normalised(images))
    torch.save(net.state_dict(), path)
    return path


def loss(model: nn.Module, images: Tensor, targets: list[dict[str, Tensor]], pixels: Tensor) -> Tensor:
    """torchvision's own: the sum of Faster R-CNN's four, or the mean cross-entropy of the pixels."""
    if isinstance(model, FasterRCNN):
        return torch.stack([*model([*images], targets).values()]).sum()
    return F.cross_entropy(model(normalised(images))["out"], pixels)


@torch.no_grad()
def score(model: nn.Module, images: Tensor, targets: list[dict[str, Tensor]], pixels: Tensor) -> float:
    """The share of images whose best box has the right class and an IoU of 0.5, or the mean IoU of the classes."""
    if isinstance(model, FasterRCNN):
        found = 0
        for seen, target in zip(model.eval()([*images]), targets, strict=True):
            if len(seen["boxes"]) and seen["labels"][0] == target["labels"][0]:  # sorted by score
                found += bool(box_iou(seen["boxes"][:1], target["boxes"]) >= 0.5)
        return found / len(images)
    classes = model.eval()(normalised(images))["out"].argmax(1)
    ious = [((classes == c) & (pixels == c)).sum() / ((classes == c) | (pixels == c)).sum() for c in range(3)]
    return torch.stack(ious).mean().item()


def main(argv: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="fpn", help="default: %(default)s")
    parser.add_argument("--backbone", default="resnet18", help="a ResNet's name; default: %(default)s")
    parser.add_argument("--weights", help="as of resnet_fused.resnet50; default: drawn")
    parser.add_argument("--steps", type=int, default=40, help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=4, help="images a step; default: %(default)s")
    parser.add_argument("--size", type=int, default=64, help="of the images' sides; default: %(default)s")
    parser.add_argument("--lr", type=float, default=3e-4, help="default: %(default)s")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        weights = args.weights or drawn_weights(args.backbone, scenes(8, args.size, 1)[0], Path(folder) / "drawn.pth")
        model = MODELS[args.model](args.backbone, args.size, weights).to(args.device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], args.lr)

    def batch(count: int, seed: int) -> tuple[Tensor, list[dict[str, Tensor]], Tensor]:
        images, targets, pixels = scenes(count, args.size, seed)
        targets = [{k: t.to(args.device) for k, t in target.items()} for target in targets]
        return images.to(args.device), targets, pixels.to(args.device)

    for step in range(args.steps):
        found = loss(model.train(), *batch(args.batch, 2 + step))
        optimizer.zero_grad()
        found.backward()
        optimizer.step()
        if step % 10 == 0 or step == args.steps - 1:
            print(f"step {step:4}  loss {found.item():.4f}")
    reached = score(model, *batch(16, 0))
    print(f"{'mean IoU' if args.model == 'fcn' else 'found'} on 16 new images: {reached:.2f}")
    return reached


if __name__ == "__main__":
    main()
