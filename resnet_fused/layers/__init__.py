"""One call per block: which of the model's steps are fused, and how.

A step is a convolution, its BN, an activation and what is added before it. Pre-activation blocks begin with a step
without a convolution and end in one without a BN, whose add the next block's first BN may take over. A step is fused
only if its modules are exactly PyTorch's own, without hooks, parametrizations or forwards set on an instance; otherwise
they are called as torchvision calls them.
"""

from collections.abc import Callable, Iterable
from typing import Literal

from torch import Tensor, nn
from torch.fx import Proxy

from ..dispatch import registry
from . import block
from .block import Sum, as_modules, run_block
from .pad_shortcut import PadShortcut
from .recompute import REPEATABLE, keeping_convolutions, recomputed, recomputes
from .stem import Normalization, as_floating, run_stem
from .steps import INPUT, Step, called_plainly, counters

__all__ = [
    "INPUT",
    "Normalization",
    "PadShortcut",
    "Recompute",
    "Step",
    "as_floating",
    "block",
    "counters",
    "hands_over",
    "run",
    "run_stem",
    "run_unit",
]

Recompute = Literal["activations", "blocks"] | None


def run(
    x: Tensor,
    *steps: Step,
    pre_add: Tensor | None = None,
    then: nn.Module | None = None,
    recompute: Recompute = None,
) -> Tensor:
    """The block of these steps on x [N, C, H, W], then the module `then`; torch.fx sees every module called.

    pre_add: what `run_unit` left to be added to x; not together with recompute.
    recompute: what backward computes again instead of keeping: "activations", the outputs of all BN + ReLU but the
        block's own output; "blocks", everything but x.
    """
    if isinstance(x, Proxy):
        return _then(then)(as_modules(x, steps))
    if recompute is None or not recomputes(steps):
        x = run_block(x, steps, pre_add)
        return x if then is None else then(x)
    repeats = then is not None and type(then) in REPEATABLE and called_plainly(then) is None
    inner, outer = (then, None) if repeats else (None, then)
    if recompute == "blocks":
        return _then(outer)(recomputed(lambda x: _then(inner)(run_block(x, steps)), x))
    return _then(outer)(keeping_convolutions(x, steps, inner))


def run_unit(x: Tensor, *steps: Step, pre_add: Tensor | None = None) -> Sum:
    """The block of these steps on x + pre_add; its last step's add is the next call's where that step has no BN."""
    return run_block(x, steps, pre_add, True)


def _then(module: nn.Module | None) -> Callable[[Tensor], Tensor]:
    return (lambda x: x) if module is None else module


def hands_over(x: Tensor, modules: Iterable[nn.Module]) -> bool:
    """Whether sums may pass unadded between the modules: something is fused, and no hook looks on."""
    return isinstance(x, Tensor) and registry.fuses(x.device) and all(called_plainly(m) is None for m in modules)
