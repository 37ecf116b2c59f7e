"""What a fused module's forward runs: the class's own, or a graph of it with the chains as one call each."""

import threading
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from ..dispatch import registry
from ..layers import block
from .analysis import plans_of
from .plan import Plan, Set

always = False  # run the graphs where nothing is fused, too: for tests
_LOCK = threading.Lock()


class FusedForward(Set):
    """A module's forward, set on the instance; `type(module).forward` is what it stands for.

    The graphs run where something is fused: elsewhere, while a compiler or tracer looks on, and where anything that
    they depend on has changed, the module's own forward runs.
    """

    def __init__(self, module: nn.Module, plans: list[Plan] | None) -> None:
        self.module, self.plans = module, plans

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        return type(self.module).forward.__get__(self.module)

    @property
    def __code__(self) -> Any:  # torch.export looks there for the arguments' names
        return self.__wrapped__.__code__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self.module
        if not (torch.compiler.is_compiling() or kwargs) and args and _active(args[0]):
            plan = self.plan(args)
            if plan is not None:
                return plan.run(module, *args)
        return type(module).forward(module, *args, **kwargs)

    def plan(self, args: tuple[Any, ...]) -> Plan | None:
        """The graph that serves these arguments as the module is now, or None."""
        if self.plans is None:  # unpickled
            with _LOCK:
                self.plans = self.plans if self.plans is not None else plans_of(self.module)
        return next((plan for plan in self.plans if plan.serves(self.module, args)), None)

    def __getstate__(self) -> dict[str, Any]:
        return {"module": self.module, "plans": None}  # functions that were generated are made again

    def __deepcopy__(self, memo: dict[int, Any]) -> "FusedForward":
        new = memo[id(self)] = FusedForward.__new__(FusedForward)
        new.module, new.plans = deepcopy(self.module, memo), deepcopy(self.plans, memo)
        return new


class Replicate:
    """DataParallel copies a module's attributes: its replica's forward is the replica's."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self) -> nn.Module:
        replica = type(self.module)._replicate_for_data_parallel(self.module)
        replica.__dict__["forward"] = FusedForward(replica, self.module.__dict__["forward"].plans)
        del replica.__dict__["_replicate_for_data_parallel"]
        return replica


def _active(x: Any) -> bool:
    """Whether something may be fused, and nothing looks at the module's own operators."""
    if isinstance(x, list):
        x = x[0] if x else None
    if not isinstance(x, Tensor) or torch._C._get_tracing_state() is not None:
        return False
    return registry.fuses(x.device) or always or block.explainer is not None
