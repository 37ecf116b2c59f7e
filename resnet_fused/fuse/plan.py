"""What may run in place of a module's forward, and as long as what holds."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from ..layers.calls import called_plainly
from .reads import Read, children_of


class Set:
    """A forward that `fuse` set on an instance."""


class Plan(NamedTuple):
    """A graph that stands for a module's forward while everything that it depends on is as it was."""

    run: Callable[..., Any]  # of the module and its arguments
    kind: type  # of the arguments
    arguments: int
    reads: tuple[tuple[tuple[str, ...], tuple[Read, ...]], ...]  # of the modules below, by their paths
    lists: tuple[tuple[tuple[str, ...], Any], ...]  # containers and their children
    inside: tuple[tuple[tuple[str, ...], type, Callable[..., Any]], ...]  # what is not called: its type and forward

    def serves(self, module: nn.Module, args: tuple[Any, ...]) -> bool:
        if len(args) != self.arguments or not all(isinstance(a, self.kind) for a in args):
            return False
        for path, cls, forward in self.inside:
            m = below(module, path)
            if m is None or type(m) is not cls or m.__class__.forward is not forward or path and not _plainly(m):
                return False
        for path, reads in self.reads:
            m = below(module, path)
            if m is None:
                return False
            modules = m.__dict__["_modules"]
            for read in reads:  # most are of children that are there
                if (read.value is not False or modules.get(read.name) is None) and not read.holds(m):
                    return False
        return all((m := below(module, p)) is not None and children_of(m) == c for p, c in self.lists)


def _plainly(module: nn.Module) -> bool:
    """Whether calling the module is its forward, a fused one's own included."""
    if isinstance(module.__dict__.get("forward"), Set):
        hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
        return not (hooks or module._backward_pre_hooks or module._compiled_call_impl is not None)
    return called_plainly(module) is None


def below(module: nn.Module | None, path: tuple[str, ...]) -> nn.Module | None:
    for name in path:
        if module is None:
            return None
        module = module._modules.get(name)
    return module
