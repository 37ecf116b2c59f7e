"""The options of `resnet-fused export`."""

import argparse

import torch

from ..deploy import export
from ..evaluation.networks import Network
from ..models import list_models
from .options import positive_int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="ends in .onnx, .pt2, .aoti.pt2 or .safetensors")
    parser.add_argument(
        "--model",
        choices=list_models(),
        metavar="NAME",
        help="of `resnet-fused info --models`; default: the run's, or what a file's weights look like, or resnet50",
    )
    parser.add_argument(
        "--weights",
        required=True,
        help="DEFAULT, IMAGENET1K_V2, MSRA, a checkpoint's path, or a run of train: its folder or checkpoint",
    )
    parser.add_argument(
        "--size", type=positive_int, metavar="PIXELS", help="of an image; default: 224, or as the run's whole images"
    )
    parser.add_argument(
        "--device", default="cpu", help="that .aoti.pt2 is compiled for: cpu, cuda or cuda:N; default: %(default)s"
    )


def main(args: argparse.Namespace, device: torch.device) -> int:
    network = Network.from_weights(args.model, args.weights)
    size = args.size or network.size or 224
    print(export(network.model.to(device), torch.zeros(2, 3, size, size, device=device), args.path))
    return 0
