"""What a suite measures: the variants' models, one call of each, and how far it is from float64 torchvision."""

import abc
import contextlib
import functools
import math
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import models
from ..deploy import Deployed
from ..dispatch import registry
from ..explain import explain
from ..models.features import IMAGENET_MEAN, IMAGENET_STD, ImageInput
from ..ops.stem import normalized
from .others import Fused, Originals
from .report import Result
from .timing import peak_mib
from .variants import COMPILED, DEPLOY, GRAPHED, INFERENCE_ONLY, TORCHVISION, TRAINING_ONLY, is_ours, made


class _Normalising(nn.Module):
    """Another's model behind the normalisation of its images of bytes."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.values = [torch.tensor(v, device=next(net.parameters()).device) for v in (IMAGENET_MEAN, IMAGENET_STD)]

    def forward(self, x: Tensor) -> Tensor:
        mean, std = self.values
        return self.net(normalized(x, mean, std, next(self.net.parameters()).dtype))


class Case(abc.ABC):
    """One model with its weights and images, and what torchvision makes of them; subclasses say what a call is."""

    what: str  # is compared
    trains: bool

    @property
    @abc.abstractmethod
    def stored(self) -> torch.dtype:
        """Of weights and images."""

    @abc.abstractmethod
    def grad_mode(self) -> AbstractContextManager: ...

    @abc.abstractmethod
    def autocast(self) -> AbstractContextManager: ...

    @abc.abstractmethod
    def _exact(self) -> list[Tensor]:
        """The results of float64 torchvision."""

    @abc.abstractmethod
    def _error(self, found: list[Tensor]) -> float: ...

    @abc.abstractmethod
    def _size(self) -> float:
        """Of the results, for the rounding that is allowed."""

    @abc.abstractmethod
    def _call(self, net: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor, backend: str) -> Callable[[], Tensor]:
        """One call of `run`, which is net or what it was compiled or captured to."""

    @abc.abstractmethod
    def _results(self, net: nn.Module, y: Tensor) -> list[Tensor]:
        """What is compared, after a call that returned y."""

    def __init__(
        self,
        torchvision: ModuleType | Originals,
        model: str,
        batch: int,
        image_size: int,
        dtype: torch.dtype,
        device: torch.device,
        of_bytes: bool = False,
    ) -> None:
        self.of_bytes = of_bytes
        self.torchvision, self.model, self.dtype, self.device = torchvision, model, dtype, device
        self.compiles = False
        self.ours = Fused(torchvision) if isinstance(torchvision, Originals) else models
        self.state = _realistic_state(torchvision, model, image_size)
        shape, generator = (batch, 3, image_size, image_size), torch.Generator().manual_seed(0)
        if of_bytes:
            images = torch.randint(256, shape, dtype=torch.uint8, generator=generator).to(device)
        else:
            images = torch.randn(shape, generator=generator).to(device, self.stored)
        self.inputs = {"nchw": images, "nhwc": images.contiguous(memory_format=torch.channels_last)}
        with self.grad_mode():
            self.expected = self._exact()
            net = self._build("torchvision-nhwc")
            self.nhwc = self._results(net, self._call(net, net, self.inputs["nhwc"], "auto")())
        own_error = self._error(self.nhwc)
        if not math.isfinite(own_error):
            raise ValueError(f"torchvision's own {model} has no finite {self.what} in {dtype}: nothing to compare with")
        self.limit = 2 * own_error + torch.finfo(dtype).eps / 2 * self._size()

    def prepare(self, name: str) -> tuple[Result, Callable[[], Tensor] | None]:
        """The variant's parity and memory, and its call."""
        result = Result(name, "nchw" if name == "torchvision-nchw" else "nhwc", limit=self.limit)
        backend = name.partition("-")[2] if name.startswith("resnet_fused-") else "auto"
        held = torch.cuda.memory_allocated() if self.device.type == "cuda" else 0
        try:
            net, x = self._build(name), self.inputs[result.layout]
            if name in (INFERENCE_ONLY if self.trains else TRAINING_ONLY):
                raise registry.BackendUnavailable(f"the suite {'training' if self.trains else 'inference'} has none")
            if name in COMPILED and not self.compiles:
                torch.compiler.reset()  # what other cases compiled; this one's others stay
                self.compiles = True
            run = made(name, net, x)
            call = self._call(net, run, x, backend)
            with self.grad_mode():
                found = self._results(net, call())
                result.error = self._error(found)
                result.bit_identical = all(map(torch.equal, found, self.nhwc))
                del found  # gradients
                result.peak_mib = peak_mib(call, held, self.device)
                if isinstance(run, Deployed):
                    result.ran = {f"engine {run.engine}": 1}
                elif name not in GRAPHED and is_ours(name):
                    with registry.backend(backend), self.autocast():
                        result.ran = dict(Counter(entry for row in explain(net, x) for entry in row.ran))
        except Exception as error:  # whatever stops one variant, the others are still measured
            absent = isinstance(error, (registry.BackendUnavailable, ImportError)) or name in COMPILED
            result.status = "unavailable" if absent else "failed"
            result.reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            return result, None
        if not result.error <= self.limit:  # NaN is refused too
            result.status, result.reason = "refused", f"error {result.error:.1e}, allowed {self.limit:.1e}"
        elif self.device.type == "cpu" and name in ("resnet_fused", "resnet_fused-eager") and not result.bit_identical:
            result.status, result.reason = "refused", f"not torchvision-nhwc's bits, error {result.error:.1e}"
        return result, call

    def _build(self, name: str) -> nn.Module:
        library = self.ours if is_ours(name) else self.torchvision.models
        if name == DEPLOY and isinstance(self.ours, Fused):
            library = self.torchvision.models  # it finds the chains by itself
        options = {"recompute": name.partition("+")[2]} if name in TRAINING_ONLY else {}
        net = library.get_model(self.model, weights=None, **options)
        net.load_state_dict(self.state)
        net = net.train(self.trains).to(self.device, self.stored)
        net = net if name == TORCHVISION[0] else net.to(memory_format=torch.channels_last)
        if not self.of_bytes:
            return net
        if not isinstance(net, ImageInput):
            return _Normalising(net).train(self.trains)
        net.set_input_normalization(IMAGENET_MEAN, IMAGENET_STD)
        return net


class Inference(Case):
    """The forward pass in eval mode, weights and images in the dtype; the logits are compared as they are."""

    what, trains = "logits", False

    @property
    def stored(self) -> torch.dtype:
        return self.dtype

    def grad_mode(self) -> AbstractContextManager:
        return torch.inference_mode()

    def autocast(self) -> AbstractContextManager:
        return contextlib.nullcontext()

    def _exact(self) -> list[Tensor]:
        oracle = self._build("torchvision-nchw").double()
        # float64 activations are large: 16 images at a time
        chunks = (x if self.of_bytes else x.double() for x in self.inputs["nchw"].split(16))
        return [torch.cat([oracle(chunk) for chunk in chunks])]

    def _error(self, found: list[Tensor]) -> float:
        return _max_abs(found[0].double() - self.expected[0])

    def _size(self) -> float:
        return _max_abs(self.expected[0])

    def _call(self, net: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor, backend: str) -> Callable[[], Tensor]:
        return functools.partial(_forward, run, x, backend)

    def _results(self, net: nn.Module, y: Tensor) -> list[Tensor]:
        return [y]


class Training(Case):
    """A train step with float32 weights, under autocast in half precision.

    Compared are the loss and the gradients of the first step: the root mean square of every tensor's relative error,
    as single elements behind a ReLU near zero are far off in any rounding.
    """

    what, trains, stored = "loss and gradients", True, torch.float32

    def grad_mode(self) -> AbstractContextManager:
        return torch.enable_grad()

    def autocast(self) -> AbstractContextManager:
        low = self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype) if low else contextlib.nullcontext()

    def _exact(self) -> list[Tensor]:
        oracle = self._build("torchvision-nchw").double()
        x = self.inputs["nchw"].double()
        loss = F.cross_entropy(oracle(x), _labels(x))
        loss.backward()
        return self._results(oracle, loss.detach())

    def _error(self, found: list[Tensor]) -> float:
        least = 1e-6 * max(
            e.norm() for e in self.expected
        )  # a bias in front of a BN has no gradient but rounding errors
        errors = [
            (f.double() - e).norm() / e.norm().clamp_min(least) for f, e in zip(found, self.expected, strict=True)
        ]
        return torch.stack(errors).square().mean().sqrt().item()

    def _size(self) -> float:
        return 1.0

    def _call(self, net: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor, backend: str) -> Callable[[], Tensor]:
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-4, momentum=0.9)
        # a scale at which no float16 gradient of these weights overflows, or the first step would be skipped
        scales = self.dtype == torch.float16 and self.device.type == "cuda"
        scaler = torch.amp.GradScaler(self.device.type, init_scale=1024.0, enabled=scales)
        return functools.partial(self._step, run, x, _labels(x), backend, optimizer, scaler)

    def _step(
        self,
        run: Callable[[Tensor], Tensor],
        x: Tensor,
        labels: Tensor,
        backend: str,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
    ) -> Tensor:
        optimizer.zero_grad()
        with registry.backend(backend):
            with self.autocast():
                loss = F.cross_entropy(run(x), labels)
            scaler.scale(loss).backward()
        scaler.step(optimizer)  # leaves the gradients unscaled
        scaler.update()
        return loss.detach()

    def _results(self, net: nn.Module, y: Tensor) -> list[Tensor]:
        return [y, *(p.grad for p in net.parameters() if p.grad is not None)]


SUITES: dict[str, type[Case]] = {"inference": Inference, "training": Training}


def _labels(x: Tensor) -> Tensor:
    return torch.arange(len(x), device=x.device) % 1000


def _forward(run: Callable[[Tensor], Tensor], x: Tensor, backend: str) -> Tensor:
    with registry.backend(backend):
        return run(x)


def _realistic_state(torchvision: ModuleType | Originals, model: str, image_size: int) -> dict[str, Tensor]:
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
            if hasattr(module, "downsample") and hasattr(module, "bn2"):
                # weak residual branches, or random weights amplify rounding errors a hundredfold
                last: Any = getattr(module, "bn3", module.bn2)
                last.weight.data.mul_(0.25)
        with torch.no_grad():
            net(torch.randn(4, 3, image_size, image_size))
    return net.state_dict()


def _max_abs(x: Tensor) -> float:
    return x.abs().max().item()
