"""Prepares a model's variants, checks each against torchvision and has the right ones timed."""

import contextlib
import functools
import importlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import ModuleType

import torch
from torch import Tensor, nn

from .. import _registry, models
from ..explain import explain
from .report import Report, Result, conditions
from .timing import Track, paired_ratios, peak_mib, silent, time_rounds

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
TORCHVISION = ("torchvision-nchw", "torchvision-nhwc", "torchvision-compile")
VARIANTS = (*TORCHVISION, "resnet_fused", *(f"resnet_fused-{name}" for name in _registry.BACKENDS))


def default_variants(device: torch.device) -> tuple[str, ...]:
    """torchvision's three, resnet_fused as it comes, and every further backend that is there."""
    backends = [name for name in _registry.BACKENDS if _registry.unavailable(name, device) is None]
    if device.type == "cpu":  # auto is eager already, and triton would be its interpreter
        backends = [name for name in backends if name not in ("eager", "triton")]
    return (*TORCHVISION, "resnet_fused", *(f"resnet_fused-{name}" for name in backends))


def run(
    model: str = "resnet50",
    batch: int | None = None,
    dtype: str | None = None,
    device: str | None = None,
    variants: Sequence[str] | None = None,
    *,
    baseline: str | None = None,
    rounds: int | None = None,
    image_size: int = 224,
    track: Track = silent,
) -> Report:
    """Check and time one model's inference in several variants.

    A variant is right when its logits differ from a float64 run of torchvision's model by at most twice what
    torchvision's own channels_last run in that dtype differs, plus one rounding; eager on the CPU must give
    torchvision's channels_last bits.

    Args:
        model: a name of `resnet_fused.models.list_models()`.
        batch: images a forward pass; by default 8 on the CPU and 128 on a GPU.
        dtype: "float32", "float16" or "bfloat16"; by default float32 on the CPU and float16 on a GPU.
        device: "cpu", "cuda" or "cuda:N"; by default a GPU where there is one.
        variants: names out of `VARIANTS`; by default `default_variants(device)`.
        baseline: the variant that ratios are taken against; by default the first.
        rounds: how often every variant is timed; by default 10, or 3 to 9 where 10 would take longer than 40 s.
        image_size: height and width of the images.
        track: wraps the loops, for instance `progress`.

    Raises:
        ValueError: an argument is none of these.
        ImportError: torchvision is not there or does not load.
    """
    target = _device(device)
    on_gpu = target.type == "cuda"
    batch = batch if batch is not None else (128 if on_gpu else 8)
    dtype = dtype if dtype is not None else ("float16" if on_gpu else "float32")
    names = tuple(variants) if variants is not None else default_variants(target)
    if not names:
        raise ValueError("variants must name at least one")
    baseline = baseline if baseline is not None else names[0]
    _one_of("model", [model], models.list_models())
    _one_of("dtype", [dtype], DTYPES)
    _one_of("variants", names, VARIANTS)
    _one_of("baseline", [baseline], names)
    for argument, value, least in (
        ("batch", batch, 1),
        ("rounds", 10 if rounds is None else rounds, 1),
        ("image_size", image_size, 32),
    ):
        if value < least:
            raise ValueError(f"{argument} must be at least {least}, got {value}")

    report = Report(model, batch, image_size, dtype, target.type, baseline, conditions(target))
    with torch.cuda.device(target) if on_gpu else contextlib.nullcontext(), _cudnn_benchmark():
        case = _Case(_torchvision(), model, batch, image_size, DTYPES[dtype], target)
        calls = {}
        for name in track(list(dict.fromkeys(names)), "checking"):
            result, call = case.prepare(name)
            report.results.append(result)
            if result.status == "measured":
                calls[name] = call
        with torch.inference_mode():
            samples = time_rounds(calls, rounds or 10, target, seconds=math.inf if rounds else 40, track=track)
    for result in report.results:
        result.samples_ms = samples.get(result.variant, [])
        result.ratios = paired_ratios(samples.get(baseline, []), result.samples_ms)
    return report


class _Case:
    """One model with its weights and images, and what torchvision makes of them."""

    def __init__(
        self, torchvision: ModuleType, model: str, batch: int, image_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.torchvision, self.model, self.dtype, self.device = torchvision, model, dtype, device
        self.state = _realistic_state(torchvision, model, image_size)
        images = torch.randn(batch, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
        images = images.to(device, dtype)
        self.inputs = {"nchw": images, "nhwc": images.contiguous(memory_format=torch.channels_last)}
        oracle = self._build("torchvision-nchw").double()
        with torch.inference_mode():
            # float64 activations are large: 16 images at a time
            self.expected = torch.cat([oracle(chunk.double()) for chunk in images.split(16)])
            self.nhwc_logits = self._build("torchvision-nhwc")(self.inputs["nhwc"])
        own_error = _max_abs(self.nhwc_logits.double() - self.expected)
        if not math.isfinite(own_error):
            raise ValueError(f"torchvision's own {model} has no finite logits in {dtype}: nothing to compare with")
        self.limit = 2 * own_error + torch.finfo(dtype).eps / 2 * _max_abs(self.expected)

    def prepare(self, name: str) -> tuple[Result, Callable[[], Tensor] | None]:
        """The variant's parity and memory, and its forward pass."""
        result = Result(name, "nchw" if name == "torchvision-nchw" else "nhwc", limit=self.limit)
        backend = name.partition("-")[2] if name.startswith("resnet_fused-") else "auto"
        held = torch.cuda.memory_allocated() if self.device.type == "cuda" else 0
        try:
            net, x = self._build(name), self.inputs[result.layout]
            if name == "torchvision-compile":
                torch.compiler.reset()  # a size seen before would make the graph dynamic
                net = torch.compile(net, dynamic=False)
            call = functools.partial(_forward, net, x, backend)
            with torch.inference_mode():
                logits = call()
                result.peak_mib = peak_mib(call, held, self.device)
                if name.startswith("resnet_fused"):
                    with _registry.backend(backend):
                        result.ran = dict(Counter(entry for row in explain(net, x) for entry in row.ran))
        except Exception as error:  # whatever stops one variant, the others are still measured
            absent = isinstance(error, _registry.BackendUnavailable) or name == "torchvision-compile"
            result.status = "unavailable" if absent else "failed"
            result.reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            return result, None
        result.error = _max_abs(logits.double() - self.expected)
        result.bit_identical = torch.equal(logits, self.nhwc_logits)
        if not result.error <= self.limit:  # NaN is refused too
            result.status, result.reason = "refused", f"error {result.error:.1e}, allowed {self.limit:.1e}"
        elif self.device.type == "cpu" and name in ("resnet_fused", "resnet_fused-eager") and not result.bit_identical:
            result.status, result.reason = "refused", f"not torchvision-nhwc's bits, error {result.error:.1e}"
        return result, call

    def _build(self, name: str) -> nn.Module:
        library = models if name.startswith("resnet_fused") else self.torchvision.models
        net = library.get_model(self.model, weights=None)
        net.load_state_dict(self.state)
        net = net.eval().to(self.device, self.dtype)
        return net.to(memory_format=torch.channels_last) if name in TORCHVISION[1:] else net


def _forward(net: nn.Module, x: Tensor, backend: str) -> Tensor:
    with _registry.backend(backend):
        return net(x)


def _realistic_state(torchvision: ModuleType, model: str, image_size: int) -> dict[str, Tensor]:
    """Weights whose every BN vector matters and whose activations stay near one, as in a trained model."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(0)
        net = torchvision.models.get_model(model, weights=None)
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.2)
                module.momentum = 1.0  # running statistics: those of the one batch below
        for module in net.modules():
            if isinstance(module, (torchvision.models.resnet.BasicBlock, torchvision.models.resnet.Bottleneck)):
                # weak residual branches, or random weights amplify rounding errors a hundredfold
                getattr(module, "bn3", module.bn2).weight.data.mul_(0.25)
        with torch.no_grad():
            net(torch.randn(4, 3, image_size, image_size))
    return net.state_dict()


def _max_abs(x: Tensor) -> float:
    return x.abs().max().item()


@contextlib.contextmanager
def _cudnn_benchmark() -> Iterator[None]:
    """cuDNN picks its fastest algorithms, torchvision's included."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _device(name: str | None) -> torch.device:
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


def _torchvision() -> ModuleType:
    try:
        return importlib.import_module("torchvision")
    except ModuleNotFoundError:
        raise ImportError(
            'torchvision is what bench compares with, and it is not installed: pip install "resnet_fused[bench]"'
        ) from None
    except Exception as error:  # built for another torch
        raise ImportError(f"torchvision does not load beside torch {torch.__version__}: {error}") from None
