"""From a module to the graphs that replace its forward."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..layers import norms
from ..layers.calls import called_plainly
from .chains import FUNCTIONAL, Chain, find, is_bn, own_module, writes
from .plan import Plan
from .run import ahead, chain
from .trace import Traced, Untraceable, trace


@dataclass
class Found:
    """What is known of a module's forward."""

    plans: list[Plan] = field(default_factory=list)
    chains: dict[nn.Module, list[str]] = field(default_factory=dict)  # BN -> the chain's modules, of each plan it is in
    joined: dict[nn.Module, nn.Module] = field(default_factory=dict)  # a shortcut's BN -> the main one
    left: dict[nn.Module, str] = field(default_factory=dict)  # BN -> why
    reason: str | None = None  # why there is no graph
    graphs: list[Traced] = field(default_factory=list)
    open: bool = False  # ends in a BN or convolution, which what follows may join


class Analysis:
    """The plans of a model's modules, innermost first."""

    def __init__(self, model: nn.Module) -> None:
        names = Counter(m for parent in model.modules() for m in parent._modules.values() if m is not None)
        self.shared = {m for m, n in names.items() if n > 1 and (is_bn(m) or isinstance(m, nn.Conv2d))}
        self.found: dict[nn.Module, Found] = {}
        self._pure: dict[nn.Module, bool] = {}
        self.model = model

    def of(self, module: nn.Module) -> Found:
        if module not in self.found:
            self.found[module] = Found(reason=refused(module))  # until it is known: a cycle finds nothing
            if is_own(module):
                return self.found[module]
            for child in module.children():
                if any(map(is_bn, child.modules())) and not is_bn(child):
                    self.of(child)
            self.found[module] = self._look_into(module)
        return self.found[module]

    def pure(self, module: nn.Module) -> bool:
        """Whether a module is known not to write its inputs."""
        if module not in self._pure:
            self._pure[module] = False
            self._pure[module] = self._is_pure(module)
        return self._pure[module]

    def _is_pure(self, module: nn.Module) -> bool:
        if own_module(module):
            return getattr(module, "inplace", False) is False
        if norms.kind(module) is not None:
            return called_plainly(module) is None
        if called_plainly(module) is not None:
            return False
        graphs = self.found[module].graphs if module in self.found else []
        if not graphs:
            try:
                graphs = _variants(module, ())
            except Untraceable:
                return False
        of = module.get_submodule
        return bool(graphs) and not any(
            writes(n, lambda n: of(str(n.target)) if n.op == "call_module" else None, self.pure)
            for t in graphs
            for n in t.graph.nodes
        )

    def _look_into(self, module: nn.Module) -> Found:
        if reason := refused(module):
            return Found(reason=reason)
        inside = set(self._opened(module))
        try:
            found = self._build(module, inside)
            crossed = found.crossed & inside
            if crossed != inside:
                found = self._build(module, crossed)
        except Untraceable as error:
            if not inside:
                return Found(reason=str(error))
            try:
                found = self._build(module, set())
            except Untraceable as error:
                return Found(reason=str(error))
        return found

    def _opened(self, module: nn.Module) -> Iterator[nn.Module]:
        """The modules below that end in a BN or convolution, as do all around them."""
        for child in module.children():
            if child in self.found and self.found[child].open:
                yield child
                yield from self._opened(child)
            elif type(child) in (nn.ModuleList, nn.ModuleDict):
                yield from self._opened(child)

    def _build(self, module: nn.Module, inside: set[nn.Module]) -> "_Built":
        found = _Built()
        for traced in _variants(module, inside):
            of = module.get_submodule
            chains, left = find(traced.graph, of, self.shared, self.pure)
            found.graphs.append(traced)
            found.open = found.open or _is_open(traced.graph, of)
            found.left.update({of(target): why for target, why in left.items()})
            for c in chains:
                found.add(c, of)
            for c in chains:
                found.crossed |= _crossed(c, module, inside)
            if chains:
                found.plans.append(_plan(module, traced, chains, inside))
        return found


class _Built(Found):
    def __init__(self) -> None:
        super().__init__()
        self.crossed: set[nn.Module] = set()  # modules that were looked into for a chain's sake

    def add(self, c: Chain, of: Any) -> None:
        bn = of(c.bn)
        self.chains.setdefault(bn, []).append(described(c, of))
        if c.shortcut is not None:
            self.chains.setdefault(of(c.shortcut.bn), []).append(described(c.shortcut, of))
            self.joined[of(c.shortcut.bn)] = bn


def described(c: Chain, of: Any) -> str:
    parts = [type(of(t)).__name__ for t in (c.conv, c.bn) if t is not None]
    parts += ["add"] * (c.residual is not None)
    parts += [] if c.act is None else ["relu" if c.act is FUNCTIONAL else type(of(c.act)).__name__]
    return " + ".join(parts)


def _variants(module: nn.Module, inside: Iterable[nn.Module]) -> list[Traced]:
    """The graphs of a module's forward, in train and eval mode where it asks, for lists where it asks for tensors.

    Raises:
        Untraceable: there is none.
    """
    modules = [module, *inside]
    modes = [m.training for m in modules]
    reasons: list[str] = []
    found: list[Traced] = []
    try:
        for kind in (Tensor, list):
            for flipped in (False, True):
                for m, mode in zip(modules, modes, strict=True):
                    m.__dict__["training"] = mode != flipped
                try:
                    traced, asked = trace(module, kind, inside)
                except Untraceable as error:
                    reasons.append(str(error))
                    asked = True  # perhaps it takes no tensor
                    continue
                found.append(traced)
                if not traced.modes:
                    break
            if not asked:
                break
    finally:
        for m, mode in zip(modules, modes, strict=True):
            m.__dict__["training"] = mode
    if not found:
        raise Untraceable(reasons[0])
    return found


def _is_open(graph: fx.Graph, of: Any) -> bool:
    """Whether the graph returns what a BN or a convolution returns."""
    node = next(n for n in graph.nodes if n.op == "output").args[0]
    while isinstance(node, fx.Node) and node.op == "call_module":
        module = of(node.target)
        if is_bn(module) or type(module) is nn.Conv2d:
            return True
        if type(module) is not nn.Identity or not node.args:
            return False
        node = node.args[0]
    return False


def _crossed(c: Chain, module: nn.Module, inside: set[nn.Module]) -> set[nn.Module]:
    """The modules that were looked into around some of a chain's nodes but not all."""
    targets = [t for t in (c.conv, c.bn, c.shortcut and c.shortcut.bn) if isinstance(t, str)]
    crossed = set()
    whole = c.residual is None and c.act is None
    for target in targets:
        parts = target.split(".")[:-1]
        for i in range(1, len(parts) + 1):
            around = module.get_submodule(".".join(parts[:i]))
            prefix = ".".join(parts[:i]) + "."
            if around in inside and not (whole and all(t.startswith(prefix) for t in targets)):
                crossed.add(around)
    return crossed


def _plan(module: nn.Module, traced: Traced, chains: list[Chain], inside: set[nn.Module]) -> Plan:
    graph = traced.graph
    replaced: dict[fx.Node, fx.Node] = {}
    for c in chains:
        replaced[c.nodes[-1]] = _replace(graph, c, replaced)
    code = graph.python_code("self")
    names: dict[str, Any] = dict(code.globals)
    exec(compile(code.src, f"<fused {type(module).__name__}>", "exec"), names)
    of = module.get_submodule
    paths = {m: name for name, m in module.named_modules()}
    passed = [t for c in chains for part in (c, c.shortcut) if part for t in part.passed]
    within = [paths[m] for m in inside] + passed
    return Plan(
        names["forward"],
        traced.kind,
        traced.arguments,
        tuple((_path(p), tuple(reads)) for p, reads in traced.reads.items()),
        tuple((_path(p), children) for p, children in traced.lists.items()),
        tuple((_path(p), cls, cls.forward) for p in dict.fromkeys(["", *within]) for cls in [type(of(p))]),
    )


def _path(name: str) -> tuple[str, ...]:
    return tuple(name.split(".")) if name else ()


def _replace(graph: fx.Graph, c: Chain, replaced: dict[fx.Node, fx.Node]) -> fx.Node:
    """The chain's nodes by one, at the place of the last; replaced: what stands for the last nodes of others."""
    last, shortcut = c.nodes[-1], c.shortcut

    def module(target: str | bool | None) -> Any:
        return graph.get_attr(target) if isinstance(target, str) else target

    def begun(part: Chain | None) -> fx.Node | None:
        if part is None or not part.apart:
            return None
        with graph.inserting_before(next(n for n in part.nodes if n.target == part.bn)):
            return graph.call_function(
                ahead, (module(part.conv), module(part.bn), replaced.get(part.input, part.input))
            )

    done = begun(c), begun(shortcut)
    with graph.inserting_before(last):
        residual = c.residual if shortcut is None else shortcut.input
        conv2, bn2 = (None, None) if shortcut is None else (module(shortcut.conv), module(shortcut.bn))
        images = [n if n is None else replaced.get(n, n) for n in (c.input, residual)]
        args = (module(c.conv), module(c.bn), module(c.act), *images, conv2, bn2, c.in_place, *done)
        new = graph.call_function(chain, args)
    last.replace_all_uses_with(new)
    for node in sorted([*c.nodes, *(shortcut.nodes if shortcut else ())], reverse=True):
        graph.erase_node(node)
    return new


def plans_of(module: nn.Module) -> list[Plan]:
    """The plans of one module, made anew."""
    own = module.__dict__.pop("forward", None)
    try:
        return Analysis(module).of(module).plans
    finally:
        if own is not None:
            module.__dict__["forward"] = own


def is_own(module: nn.Module) -> bool:
    return type(module).__module__.startswith("resnet_fused.")


def refused(module: nn.Module) -> str | None:
    """Why nothing may be set on this module, or None."""
    if is_own(module):
        return "is resnet_fused's own, and fuses its steps itself"
    if isinstance(module, torch.jit.ScriptModule):
        return "is scripted"
    if "forward" in module.__dict__:
        return "has a forward set on the instance"
    return None
