"""Which nodes of a graph are BN with what stands around it, and which of them one call may replace.

A chain is a BN, the convolution in front of it, an add and a ReLU behind it, as far as they are there. Its nodes are
taken together at the place of the last one, so nothing else may use what passes between them, and nothing that runs in
between may write what the chain reads.
"""

import operator
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import fx, nn

from ..layers import norms
from ..layers.calls import called_plainly
from ..layers.steps import Step, unfusable

_RELU = (F.relu, F.relu_, torch.relu, torch.relu_)
_ADD = (operator.add, operator.iadd, torch.add)
_FRESH = (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.Linear, nn.modules.pooling._AdaptiveAvgPoolNd)
FUNCTIONAL = True  # a ReLU without a module


@dataclass
class Chain:
    """conv, bn and act are targets in the graph's module; act may be `FUNCTIONAL`."""

    bn: str
    nodes: list[fx.Node]  # in the graph's order; the last one's value is the chain's
    input: fx.Node
    conv: str | None = None
    act: str | bool | None = None
    residual: fx.Node | None = None
    shortcut: "Chain | None" = None  # what the residual goes through, a convolution or BN alone
    in_place: bool = False  # the add writes to the main branch
    passed: tuple[str, ...] = ()  # nn.Identity modules in between
    apart: bool = False  # other nodes run between its BN and the last node


def is_bn(module: nn.Module) -> bool:
    return isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)) or norms.kind(module) is not None


def find(
    graph: fx.Graph, modules: Callable[[str], nn.Module], shared: set[nn.Module], pure: Callable[[nn.Module], bool]
) -> tuple[list[Chain], dict[str, str]]:
    """The chains, and for every other BN in the graph why it is left.

    modules: a node's target to the module.
    shared: convolutions and BNs that are there under several names.
    pure: whether a module is known not to write its inputs.
    """
    return _Finder(graph, modules, shared, pure).find()


class _Finder:
    def __init__(self, graph: fx.Graph, modules: Any, shared: set[nn.Module], pure: Any) -> None:
        self.nodes = list(graph.nodes)
        self.place = {node: i for i, node in enumerate(self.nodes)}
        self.modules, self.shared, self.pure = modules, shared, pure
        self.calls = Counter(m for n in self.nodes if (m := self.module(n)) is not None)
        self.taken: dict[fx.Node, Chain] = {}

    def find(self) -> tuple[list[Chain], dict[str, str]]:
        left: dict[str, str] = {}
        chains: list[Chain] = []
        bns = [n for n in self.nodes if (m := self.module(n)) is not None and is_bn(m)]
        for node in bns:
            if reason := self.unfit(node):
                left[str(node.target)] = reason
        for node in bns:
            if node not in self.taken and str(node.target) not in left:
                chain = self.chain(node)
                for n in (*chain.nodes, *(chain.shortcut.nodes if chain.shortcut else ())):
                    self.taken[n] = chain
                chains.append(chain)
        joined = [c.shortcut for c in chains if c.shortcut]  # found on their own before
        chains = [c for c in chains if not any(c.bn == j.bn for j in joined)]
        for chain in list(chains):
            if not self.undisturbed(chain):
                chains.remove(chain)
                left[chain.bn] = "something between its modules may write its input"
                if chain.shortcut:
                    left[chain.shortcut.bn] = left[chain.bn]
        return chains, left

    def module(self, node: fx.Node) -> nn.Module | None:
        return self.modules(str(node.target)) if node.op == "call_module" else None

    def unfit(self, node: fx.Node) -> str | None:
        """Why a BN or convolution may not be part of any chain, or None."""
        module = self.module(node)
        if len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], fx.Node):
            return "is called with more than one tensor"
        assert module is not None
        if self.calls[module] > 1:
            return "is called more than once"
        if module in self.shared:
            return "is there under several names"
        return unfusable(Step(module) if isinstance(module, nn.Conv2d) else Step(None, module))

    def chain(self, bn: fx.Node) -> Chain:
        chain = self.front(bn)
        if norms.inner(self.module(bn)) != (False, ()):  # ends in an activation of its own
            return chain
        node = self.passing(chain, bn)
        user = self.only_user(node)
        residual = None if user is None else self.added(user, node)
        if user is not None and residual is not None:
            chain.in_place = user.args[0] is node and user.target in (operator.iadd, "add_")
            chain.residual = residual
            chain.shortcut = self.shortcut(residual, bn)
            chain.nodes.append(user)
            node, user = user, self.only_user(user)
        if user is not None and (act := self.relu(user)) is not None:
            chain.act = act
            chain.nodes.append(user)
        return chain

    def front(self, bn: fx.Node) -> Chain:
        """The convolution, where it may join, and the BN."""
        before = _first(bn)
        chain = Chain(str(bn.target), [bn], before)
        conv = self.module(before)
        if type(conv) is nn.Conv2d and self.only_user(before) is bn and self.unfit(before) is None:
            chain.conv, chain.input = str(before.target), _first(before)
            chain.nodes.insert(0, before)
        return chain

    def passing(self, chain: Chain, node: fx.Node) -> fx.Node:
        """The node behind the nn.Identity modules that follow."""
        while (user := self.only_user(node)) is not None:
            module = self.module(user)
            if not isinstance(module, nn.Identity) or type(module) is not nn.Identity or called_plainly(module):
                break
            chain.passed = (*chain.passed, str(user.target))
            chain.nodes.append(user)
            node = user
        return node

    def shortcut(self, residual: fx.Node, main: fx.Node) -> Chain | None:
        """The convolution and BN whose output the residual is, if nothing else uses it."""
        passed: list[fx.Node] = []
        node = residual
        module = self.module(node)
        while isinstance(module, nn.Identity) and len(node.users) == 1 and isinstance(node.args[0], fx.Node):
            if type(module) is not nn.Identity or called_plainly(module) is not None:
                return None
            passed.insert(0, node)
            node = _first(node)
            module = self.module(node)
        if module is None or not is_bn(module) or node is main or len(node.users) != 1 or self.unfit(node) is not None:
            return None
        if norms.inner(module) != (False, ()) or self.taken.get(node, None) not in (None, self.own(node)):
            return None
        chain = self.front(node)
        chain.nodes += passed
        chain.passed = tuple(str(n.target) for n in passed)
        return chain

    def own(self, bn: fx.Node) -> Chain | None:
        """The chain that was found for this BN alone: it gives way to a join."""
        chain = self.taken.get(bn)
        return chain if chain is not None and chain.residual is None and chain.act is None else None

    def added(self, user: fx.Node, node: fx.Node) -> fx.Node | None:
        """The other addend, if `user` adds it to `node` and writes to nothing else."""
        if user.target not in (_ADD if user.op == "call_function" else ("add", "add_") * (user.op == "call_method")):
            return None
        if len(user.args) != 2 or user.kwargs:
            return None
        first, second = user.args
        if not isinstance(first, fx.Node) or not isinstance(second, fx.Node) or first is second:
            return None
        if user.target in (operator.iadd, "add_") and first is not node:
            return None  # the other addend is written to: it is that one's add, if any BN's
        return second if first is node else first

    def relu(self, user: fx.Node) -> str | bool | None:
        module = self.module(user)
        if module is not None:
            plain = type(module) is nn.ReLU and called_plainly(module) is None
            return str(user.target) if plain and len(user.args) == 1 else None
        functional = user.op == "call_function" and user.target in _RELU
        functional = functional or user.op == "call_method" and user.target in ("relu", "relu_")
        settings = [*user.args[1:], *user.kwargs.values()]
        return FUNCTIONAL if functional and all(isinstance(s, bool) for s in settings) else None

    def only_user(self, node: fx.Node) -> fx.Node | None:
        return next(iter(node.users)) if len(node.users) == 1 else None

    def undisturbed(self, chain: Chain) -> bool:
        """Whether nothing between the chain's nodes may write what it reads; convolutions that have to stay leave."""
        shortcut = chain.shortcut
        own = {*chain.nodes, *(shortcut.nodes if shortcut else ())}
        last = self.place[chain.nodes[-1]]
        add = max(self.place[n] for n in own if n.target in _ADD + ("add", "add_")) if chain.residual else last
        if any(self.writes(n, own) for n in self.nodes[add:last]):
            return False
        for part in (chain, shortcut) if shortcut else (chain,):
            first = self.place[part.nodes[0]]
            part.apart = any(n not in own and n.op != "get_attr" for n in self.nodes[first:last])
            if any(self.writes(n, own) for n in self.nodes[first:last]):
                if part.conv is None:
                    return False  # BN's input is another's
                conv = part.nodes.pop(0)
                part.conv, part.input = None, conv
        return True

    def writes(self, node: fx.Node, own: set[fx.Node]) -> bool:
        """Whether a node may write to tensors that others see."""
        return node not in own and node not in self.taken and writes(node, self.module, self.pure)


def _first(node: fx.Node) -> fx.Node:
    """The one argument of a convolution, BN or identity."""
    return cast(fx.Node, node.args[0])


def writes(node: fx.Node, module_of: Callable[[fx.Node], nn.Module | None], pure: Callable[[nn.Module], bool]) -> bool:
    """Whether a node may write to one of its inputs, other than what a convolution or BN just made for it."""
    if node.op in ("placeholder", "get_attr", "output"):
        return False
    module = module_of(node)
    if module is not None:
        changes = getattr(module, "inplace", False) is not False if own_module(module) else not pure(module)
    elif node.op == "call_method":
        changes = str(node.target).endswith("_") and not str(node.target).endswith("__")
    else:
        changes = not _known(node.target) or getattr(node.target, "__name__", "_").endswith("_")
        changes = changes or node.target in _IN_PLACE
        changes = changes or bool(node.kwargs.get("inplace")) or "out" in node.kwargs
        changes = changes or any(a is True for a in node.args[1:])  # inplace, by its place
    first = node.args[0] if node.args else None
    made = isinstance(first, fx.Node) and len(first.users) == 1 and isinstance(module_of(first), _FRESH)
    return changes and not made


def _known(function: Any) -> bool:
    module = getattr(function, "__module__", None) or "torch"  # torch's own are built in
    return module in _MODULES or module.startswith("resnet_fused.")


_MODULES = ("torch", "torch.functional", "torch.nn.functional", "torch._C._nn", "_operator", "builtins", "math")
_IN_PLACE = {getattr(operator, f"i{n}") for n in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul")}
_IN_PLACE |= {operator.iand, operator.ior, operator.ixor, operator.setitem}


def own_module(module: nn.Module) -> bool:
    """One of PyTorch's layers, called as it is."""
    known = type(module).__module__.startswith("torch.nn.modules.") and not any(True for _ in module.children())
    return known and called_plainly(module) is None
