"""What a forward pass and a train step cost the host, beside torchvision's eager model in the same run.

Networks have their real depth and 8 channels everywhere, images are small: what is computed is next to nothing, so
what is left is the time of Python, PyTorch's dispatcher and the launches. On a GPU the launches are real and the clock
is the wall's, without waiting for the device. Without one, PyTorch's operators run on the CPU on these tiny tensors,
for both models alike, and Triton's kernels are compiled but never launched: its driver is a stand-in whose launches do
nothing, as PyTorch's own launches cost nothing on the CPU. There the clock is the thread's CPU time. Rounds are
interleaved, the least of each is taken: only ratios of one run say anything.
"""

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import models, ops
from ..dispatch import registry
from ..dispatch.stub import stubbed
from ..layers import PadShortcut
from . import host_stages
from .conditions import conditions

SUITE, ROUNDS = "host", 30
CHANNELS = 8
MODELS = ("resnet50", "resnet18", "cifar_resnet20", "cifar_resnet56")
_TWINS = ("resnet1", "resnet3", "resnet5", "cifar_resnet")  # those that `torchvisions` makes
KNOWN = tuple(name for name in models.list_models() if name.startswith(_TWINS))
Call = Callable[[], Any]


def narrowed(model: nn.Module) -> nn.Module:
    """The model with every layer CHANNELS wide."""
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            weight = torch.randn(CHANNELS, CHANNELS, *m.kernel_size) / 10
            m.weight = nn.Parameter(weight.contiguous(memory_format=torch.channels_last))
            m.in_channels = m.out_channels = CHANNELS
        elif isinstance(m, nn.BatchNorm2d):
            nn.BatchNorm2d.__init__(m, CHANNELS)
        elif isinstance(m, nn.Linear):
            nn.Linear.__init__(m, CHANNELS, 10)
        elif isinstance(m, PadShortcut):
            m.channels = CHANNELS
    return model


def images(size: int, device: torch.device) -> Tensor:
    return torch.randn(1, CHANNELS, size, size, device=device).contiguous(memory_format=torch.channels_last)


def torchvisions(name: str) -> nn.Module:
    """torchvision's model of that name, or one for CIFAR made of its blocks."""
    import torchvision

    if not name.startswith("cifar_"):
        return torchvision.models.get_model(name)
    block, n = torchvision.models.resnet.BasicBlock, (int(name.removeprefix("cifar_resnet")) - 2) // 6

    def stage(stride: int) -> nn.Sequential:
        shortcut = nn.Sequential(nn.Conv2d(8, 8, 1, stride, bias=False), nn.BatchNorm2d(8)) if stride > 1 else None
        return nn.Sequential(block(8, 8, stride, shortcut), *(block(8, 8) for _ in range(n - 1)))

    stem = (nn.Conv2d(8, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(True))
    return nn.Sequential(*stem, stage(1), stage(2), stage(2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))


def forward(model: nn.Module, x: Tensor) -> Call:
    model.eval()

    def call() -> None:
        with torch.no_grad():
            model(x)

    return call


def train_step(model: nn.Module, x: Tensor) -> Call:
    """Forward, loss and backward; the optimizer's step is the same for every model and left out."""
    model.train()
    target = torch.zeros(x.shape[0], dtype=torch.long, device=x.device)

    def call() -> None:
        model.zero_grad()
        F.cross_entropy(model(x), target).backward()

    return call


def least(calls: dict[str, Call], rounds: int, device: torch.device) -> dict[str, float]:
    """The least microseconds of every call, in interleaved rounds."""
    on_gpu = device.type == "cuda"
    clock = time.perf_counter if on_gpu else time.thread_time
    found = dict.fromkeys(calls, float("inf"))
    for i in range(rounds + 3):
        for name, call in calls.items():
            if on_gpu:
                torch.cuda.synchronize(device)
            before = clock()
            call()
            if i > 2:
                found[name] = min(found[name], (clock() - before) * 1e6)
    return found


def layers(model: nn.Module) -> int:
    return sum(isinstance(m, nn.Conv2d) for m in model.modules())


def operators(x: Tensor) -> dict[str, tuple[Call, int]]:
    """Single calls, and how many are timed at once."""
    weight = torch.randn(CHANNELS, CHANNELS, 1, 1, device=x.device)
    bn = [torch.ones(CHANNELS, device=x.device) for _ in range(4)]
    leaf = x.clone().requires_grad_()
    affine = [v.clone().requires_grad_() for v in bn[:2]]
    grad = torch.ones_like(x)

    def conv() -> None:
        with torch.no_grad():
            for _ in range(100):
                ops.conv_bn_act(x, weight, *bn)

    def bn_step() -> None:
        y: Any = leaf  # a tensor; with a pre_add, which there is none of, a pair
        for _ in range(100):
            y = ops.batch_norm_act(y, *affine, *bn[2:])
        y.backward(grad)

    return {"one conv_bn_act": (conv, 100), "one batch_norm_act, forward and backward": (bn_step, 100)}


@contextlib.contextmanager
def _quiet(device: torch.device) -> Iterator[None]:
    """One thread, stubbed launches where there is no GPU, and nothing denormal in what they leave unwritten."""
    torch.manual_seed(0)
    torch.set_flush_denormal(True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with contextlib.nullcontext() if device.type == "cuda" else stubbed():
            yield
    finally:
        torch.set_num_threads(threads)
        torch.set_flush_denormal(False)


def figures(name: str, rounds: int = ROUNDS) -> dict[str, tuple[float, float]]:
    """Microseconds of torchvision's and of this package's "eval" forward pass and "train" step.

    Raises:
        ImportError: torchvision is missing.
        RuntimeError: launches can't be stubbed here, as `stubbed` says.
    """
    device = _device()
    with _quiet(device):
        return {label: found for label, found, _ in _figures(name, rounds, device)}


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _twins(name: str, device: torch.device) -> tuple[nn.Module, nn.Module, Tensor]:
    """torchvision's model, this package's, and images."""
    x = images(16 if name.startswith("cifar_") else 64, device)
    return narrowed(torchvisions(name)).to(device), narrowed(models.get_model(name)).to(device), x


def _figures(
    name: str, rounds: int, device: torch.device, compiled: bool = False
) -> Iterator[tuple[str, tuple[float, float], int]]:
    """With the number of layers."""
    theirs, ours, x = _twins(name, device)
    if compiled:
        theirs.compile()
        ours.compile()
    for label, make in (("eval", forward), ("train", train_step)):
        found = least({"torchvision": make(theirs, x), "resnet_fused": make(ours, x)}, rounds, device)
        yield label, (found["torchvision"], found["resnet_fused"]), layers(ours)


def run(names: Sequence[str], rounds: int, compiled: bool = False) -> tuple[dict[str, Any], int]:
    """Print the table and its summary; the figures, and 0. It raises what `figures` does.

    Args:
        compiled: both models by torch.compile, and no more than that.

    Raises:
        ValueError: a model that has no twin made of torchvision's blocks.
    """
    for name in names:
        if name not in KNOWN:
            raise ValueError(f"model: the suite {SUITE} has no {name!r}; there are: {', '.join(KNOWN)}")
    device = _device()
    found: dict[str, Any] = {"task": SUITE, "conditions": conditions(device)}
    found |= {"models": [], "operators": {}, "stages": {}}
    with _quiet(device):
        print(f"host microseconds, least of {rounds}, {'real' if device.type == 'cuda' else 'stubbed'} launches")
        for name in names:
            for label, (theirs, ours), count in _figures(name, rounds, device, compiled):
                row = {"model": name, "pass": label, "torchvision_us": theirs, "resnet_fused_us": ours}
                found["models"].append(row | {"ratio": ours / theirs, "layers": count})
                print(
                    f"{name:16} {label:6} torchvision {theirs:8.0f}  resnet_fused {ours:8.0f}  "
                    f"{ours / theirs:5.2f}x  {ours / count:6.1f} a layer"
                )
        if not compiled:
            _parts(names[0], rounds, device, found)
    ratios = {row["pass"]: row["ratio"] for row in found["models"] if row["model"] == names[0]}
    mode = "compiled" if compiled else registry.PLAIN
    print(f"host: eval {ratios['eval']:.2f}x, train {ratios['train']:.2f}x of torchvision {mode}")
    return found, 0


def _parts(name: str, rounds: int, device: torch.device, found: dict[str, Any]) -> None:
    """Single operators, and the stages of a model's train step."""
    for operator, (call, n) in operators(images(8, device)).items():
        found["operators"][operator] = least({operator: call}, rounds, device)[operator] / n
        print(f"{operator}: {found['operators'][operator]:.1f}")
    if device.type == "cpu":
        print(f"\n{name}'s train step, microseconds")
        stages = host_stages.rows(*_twins(name, device), train_step, lambda calls: least(calls, rounds, device))
        for what, us in stages:
            found["stages"][what] = us
            print(f"{us:8.0f}  {what}")
        print()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--compiled", action="store_true", help="both models by torch.compile; default: eager")
    args = parser.parse_args(argv)
    return run(args.models, args.rounds, args.compiled)[1]
