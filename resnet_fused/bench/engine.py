"""Prepares a model's variants, checks each against torchvision and has the right ones timed."""

import contextlib
import importlib
import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from types import ModuleType

import torch

from ..models.weights import TORCHVISION_ENUMS
from . import nvml
from .cases import SUITES
from .conditions import conditions
from .others import TIMM, Originals
from .report import Report
from .timing import ROUNDS, SECONDS, SHORT_MS, Track, latency, paired_ratios, silent, time_rounds
from .variants import FUSED, VARIANTS, default_variants

BASELINE = "torchvision-nhwc"  # the layout in which PyTorch itself is fast
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def run(
    model: str = "resnet50",
    batch: int | None = None,
    dtype: str | None = None,
    device: str | None = None,
    variants: Sequence[str] | None = None,
    *,
    suite: str = "inference",
    fuse: bool = False,
    baseline: str | None = None,
    rounds: int | None = None,
    image_size: int = 224,
    of_bytes: bool = False,
    track: Track = silent,
) -> Report:
    """Check and time one model's inference, or its train step, in several variants.

    A variant is right when its logits, or its loss and its gradients, differ from a float64 run of torchvision's model
    by at most twice what torchvision's own channels_last run in that dtype differs, plus one rounding; eager on the CPU
    must give torchvision's channels_last bits.

    Args:
        model: a name that torchvision knows too, e.g. "resnet50"; with `fuse` any classification model of torchvision,
            or of timm with timm/ in front.
        batch: images a call; by default 8 on the CPU and 128 on a GPU.
        dtype: "float32", "float16" or "bfloat16"; by default float32 on the CPU and float16 on a GPU. Training in
            half precision is autocast over float32 weights, in float16 on a GPU with a GradScaler.
        device: "cpu", "cuda" or "cuda:N"; by default a GPU where there is one.
        variants: names out of `VARIANTS`, with `fuse` out of the values of `FUSED`; by default
            `default_variants(device, suite)`.
        suite: "inference", a forward pass; "training", forward, cross-entropy, backward and SGD with momentum.
        fuse: measure the model as it is beside itself fused, in place of torchvision's beside this package's.
        baseline: the variant that ratios are taken against; by default "torchvision-nhwc" (with `fuse`
            "original-nhwc"), without it the first.
        rounds: how often every variant is timed; by default 10, or 3 to 9 where 10 would take longer than 40 s.
        image_size: height and width of the images.
        of_bytes: they are uint8 on the device, normalised by the model where it can, else in front of it; inference
            without `fuse`.
        track: wraps the loops, for instance `progress`.

    Raises:
        ValueError: an argument is none of these.
        ImportError: torchvision is not there or does not load.
    """
    _one_of("suite", [suite], SUITES)
    target = resolve_device(device)
    on_gpu = target.type == "cuda"
    batch = batch if batch is not None else (128 if on_gpu else 8)
    dtype = dtype if dtype is not None else ("float16" if on_gpu else "float32")
    shown = FUSED if fuse else {name: name for name in VARIANTS}
    names = tuple(variants) if variants is not None else tuple(shown[n] for n in default_variants(target, suite))
    if not names:
        raise ValueError("variants must name at least one")
    if baseline is None:
        baseline = shown[BASELINE] if shown[BASELINE] in names else names[0]
    if not fuse and model.startswith(TIMM):
        raise ValueError(f"model: {model!r} is timm's, which are measured with --fuse (fuse=True)")
    check(None if fuse else model, dtype, batch, image_size, rounds)
    _one_of("variants", names, shown.values())
    _one_of("baseline", [baseline], names)
    if of_bytes and (fuse or suite != "inference"):
        raise ValueError(f"of_bytes goes with the suite inference and without fuse, got suite {suite!r}, fuse {fuse}")
    report = Report(model, batch, image_size, dtype, target.type, baseline, conditions(target), task=suite)
    report.reference, report.rounds, report.asked = shown[BASELINE], rounds or ROUNDS, variants is not None
    report.of_bytes = of_bytes
    with torch.cuda.device(target) if on_gpu else contextlib.nullcontext(), _cudnn_benchmark():
        library = Originals(torchvision()) if fuse else torchvision()
        if fuse:
            library.check(model)
        case = SUITES[suite](library, model, batch, image_size, DTYPES[dtype], target, of_bytes)
        calls = {}
        for name in track(list(dict.fromkeys(names)), "checking"):
            result, call = case.prepare(next(own for own, given in shown.items() if given == name))
            result.variant = name
            report.results.append(result)
            if call is not None and result.status == "measured":
                calls[name] = call
        with case.grad_mode():
            limit, energy = math.inf if rounds else SECONDS, dict[str, float]()
            samples = time_rounds(calls, report.rounds, target, seconds=limit, track=track, energy=energy)
            brief = {n: call for n, call in calls.items() if statistics.median(samples[n]) <= SHORT_MS}
            latencies = {n: latency(call, target) for n, call in brief.items()}
    report.after = nvml.state(target)
    for result in report.results:
        result.samples_ms = samples.get(result.variant, [])
        result.ratios = paired_ratios(samples.get(baseline, []), result.samples_ms)
        result.latency_ms = latencies.get(result.variant, [])
        joules = energy.get(result.variant)
        result.joules_per_image = None if joules is None else joules / batch
    return report


def check(model: str | None, dtype: str, batch: int, image_size: int, rounds: int | None = None) -> None:
    """ValueError for what is none; without a model its name is not looked at."""
    if model is not None:
        _one_of("model", [model], list(TORCHVISION_ENUMS))
    _one_of("dtype", [dtype], DTYPES)
    for argument, value, least in (("batch", batch, 1), ("rounds", rounds, 1), ("image_size", image_size, 32)):
        if value is not None and value < least:
            raise ValueError(f"{argument} must be at least {least}, got {value}")


@contextlib.contextmanager
def _cudnn_benchmark() -> Iterator[None]:
    """cuDNN picks its fastest algorithms, torchvision's included."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def resolve_device(name: str | None) -> torch.device:
    """The device of that name, by default a GPU where there is one; ValueError where it is not there."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f'device must be "cpu", "cuda" or "cuda:N", got {name!r}')
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(f"device {name!r} is not there: PyTorch sees {count} CUDA devices")
    return device


def _one_of(argument: str, values: Iterable[str | None], accepted: Iterable[str]) -> None:
    accepted = list(accepted)
    for value in values:
        if value not in accepted:
            raise ValueError(f"{argument}: unknown {value!r}; there are: {', '.join(accepted)}")


def torchvision() -> ModuleType:
    try:
        return importlib.import_module("torchvision")
    except ModuleNotFoundError:
        raise ImportError(
            'torchvision is what bench compares with, and it is not installed: pip install "resnet_fused[bench]"'
        ) from None
    except Exception as error:  # built for another torch
        raise ImportError(f"torchvision does not load beside torch {torch.__version__}: {error}") from None
