"""A module's own forward as a graph of calls of its children, and everything else that the graph depends on.

What torch.fx gets wrong in silence is refused here: in-place arithmetic is recorded as such, and a forward that makes
tensors, draws random numbers, changes the grad mode or autocast or writes to modules is not traced at all. What the
forward read while it was traced (modes, numbers, which children there are) is kept: the graph stands for the forward
as long as it reads the same.
"""

import enum
import operator
import random
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from inspect import Parameter, signature
from types import BuiltinFunctionType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from ..layers.calls import called_plainly

_LOCK = threading.RLock()  # torch.fx patches nn.Module while it traces
_INTERNAL = {*vars(nn.Module())} - {"training"}
_SIMPLE = (bool, int, float, complex, str, bytes, type(None), enum.Enum, type, FunctionType, BuiltinFunctionType)
_MISSING = "missing"


class Untraceable(Exception):
    """Why a forward can't be written as a graph."""


class Read(NamedTuple):
    """One value that a forward read: of an attribute, or of a child whether it is there."""

    name: str
    value: Any

    def holds(self, module: nn.Module) -> bool:
        return look(module, self.name) == self.value


class Same:
    """An object that is compared by identity."""

    def __init__(self, of: object) -> None:
        self.of = of

    def __eq__(self, other: object) -> bool:
        return type(other) is Same and other.of is self.of

    __hash__ = None


def frozen(value: Any) -> Any:
    """The value as it is now, to compare with."""
    if issubclass(type(value), fx.Proxy):
        return Same(value)
    if isinstance(value, _SIMPLE):
        return type(value), value
    if isinstance(value, (list, tuple)):
        return type(value), [frozen(v) for v in value]
    if isinstance(value, dict):
        return type(value), [(frozen(k), frozen(v)) for k, v in value.items()]
    return Same(value)


def look(module: nn.Module, name: str) -> Any:
    """What the module has by that name, as far as a graph depends on it."""
    d = module.__dict__
    if name in d["_modules"]:
        return d["_modules"][name] is None
    for tensors in (d["_parameters"], d["_buffers"]):
        if name in tensors:
            return tensors[name] is None
    return frozen(d[name]) if name in d else _MISSING


def children_of(container: nn.Module) -> Any:
    """Of a module whose forward walks through them, or a list of modules."""
    return [(name, m is None) for name, m in container.__dict__["_modules"].items()]


class Traced(NamedTuple):
    graph: fx.Graph
    kind: type  # of the arguments: Tensor or list
    count: int  # of the arguments
    reads: dict[str, list[Read]]  # by the path of the module that was read
    lists: dict[str, Any]  # containers that were walked through: their children
    modes: bool  # whether `training` was read


def _proxy_class(frame: Any, pretended: type | None, itself: type) -> type:
    """What isinstance sees: torch.fx the proxy, the user's code what the argument will be."""
    if frame.f_globals.get("__name__", "").startswith("torch."):
        return itself
    if pretended is None:
        raise Untraceable("asks for the type of what its modules return")
    return pretended


class _Proxy(fx.Proxy):
    pretended: type | None = None

    @property
    def __class__(self):
        if type(self).pretended is not None:
            self.tracer.asked = True
        return _proxy_class(sys._getframe(1), type(self).pretended, type(self))


class _TensorProxy(_Proxy):
    pretended = Tensor


class _ListProxy(_Proxy):
    pretended = list


def _in_place(name: str) -> Callable:
    def method(self, other):
        return self.tracer.create_proxy("call_function", getattr(operator, name), (self, other), {})

    return method


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "imatmul"):
    setattr(_Proxy, f"__{_name}__", _in_place(_name))


class _Tracer(fx.Tracer):
    """Children are called, but for those to look into."""

    def __init__(self, kind: type, inside: set[nn.Module]) -> None:
        super().__init__()
        self.proxy_buffer_attributes = True  # or their arithmetic would be done once and for all
        self.kind, self.inside, self.asked = kind, inside, False
        self.state = _contexts()
        self.arguments = 0
        self.reads: dict[str, dict[str, Any]] = {}
        self.lists: dict[str, Any] = {}
        self.listening = False  # while the forward itself runs

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m not in self.inside

    def proxy(self, node: fx.Node) -> fx.Proxy:
        cls = _Proxy
        if node.op == "placeholder":
            cls = _TensorProxy if self.kind is Tensor else _ListProxy
        return cls(node, self)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        names = []
        for p in list(signature(root_fn).parameters.values())[1:]:
            if p.kind not in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD):
                if p.default is Parameter.empty:
                    raise Untraceable(f"takes {p}")
            elif p.default is Parameter.empty:
                names.append(p.name)
        self.arguments = len(names)
        args = [self.root, *(self.create_proxy("placeholder", name, (), {}) for name in names)]
        self.listening = True
        return root_fn, args

    def create_arg(self, a: Any) -> Any:
        if issubclass(type(a), fx.Proxy):
            return a.node
        if isinstance(a, Tensor) and not isinstance(a, nn.Parameter):
            raise Untraceable("makes a tensor of its own")
        self.listening, listening = False, self.listening
        try:
            return super().create_arg(a)
        finally:
            self.listening = listening

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _contexts() != self.state:
            raise Untraceable("changes the grad mode or autocast")
        return super().create_node(*args, **kwargs)


def _contexts() -> tuple:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *((torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")),
    )


def _generators() -> tuple:
    numpy = sys.modules.get("numpy")
    return random.getstate(), torch.get_rng_state(), None if numpy is None else numpy.random.get_state()


def _put_back(generators: tuple) -> bool:
    """Whether random numbers were drawn; the generators are set back."""
    python, own, numpy = generators
    now = _generators()
    drawn = now[0] != python or not torch.equal(now[1], own)
    drawn = drawn or numpy is not None and any(str(a) != str(b) for a, b in zip(now[2], numpy, strict=True))
    if drawn:
        random.setstate(python), torch.set_rng_state(own)
        if numpy is not None:
            sys.modules["numpy"].random.set_state(numpy)
    return drawn


@contextmanager
def _reading(tracer: _Tracer, paths: dict[nn.Module, str]) -> Iterator[None]:
    """Record what the forward reads of these modules."""

    def get(module, name):
        if tracer.listening and module in paths:
            if name == "_modules":
                tracer.lists.setdefault(paths[module], children_of(module))
            elif not name.startswith("__") and name not in _INTERNAL and name != "forward":
                if name in module.__dict__ or not hasattr(type(module), name):
                    tracer.reads.setdefault(paths[module], {}).setdefault(name, look(module, name))
        return object.__getattribute__(module, name)

    nn.Module.__getattribute__ = get
    try:
        yield
    finally:
        del nn.Module.__getattribute__


def trace(module: nn.Module, kind: type, inside: Iterable[nn.Module]) -> tuple[Traced, bool]:
    """The graph of the module's forward, `inside` looked into; and whether the forward asked for its inputs' type.

    Raises:
        Untraceable: with the reason.
    """
    if not isinstance(getattr(type(module), "forward", None), FunctionType):
        raise Untraceable("has no forward of its own")
    inside = set(inside)
    for m in inside:
        if called_plainly(m) is not None:
            raise Untraceable(f"looks into a {type(m).__name__} that {called_plainly(m)}")
    paths = {m: name for name, m in module.named_modules()}
    with _LOCK:
        tracer, generators = _Tracer(kind, inside), _generators()
        before = {m: {k: frozen(v) for k, v in vars(m).items()} for m in (module, *inside)}
        values = {m: dict(vars(m)) for m in before}
        try:
            with _reading(tracer, paths):
                graph = tracer.trace(module)
        except Untraceable:
            raise
        except Exception as error:  # whatever a forward may do with a proxy
            raise Untraceable(f"can't be traced: {_first_line(error)}") from None
        finally:
            written = _restore(before, values)
            drawn = _put_back(generators)
    if written:
        raise Untraceable(f"writes to {written}")
    if drawn:
        raise Untraceable("draws random numbers")
    kept = {path: [Read(n, v) for n, v in found.items()] for path, found in tracer.reads.items()}
    modes = any("training" in found for found in tracer.reads.values())
    return Traced(graph, kind, tracer.arguments, kept, tracer.lists, modes), tracer.asked


def _restore(before: dict[nn.Module, dict[str, Any]], values: dict[nn.Module, dict[str, Any]]) -> str | None:
    """Which attribute the forward wrote while it was traced, or None; it is put back."""
    written = None
    for m, was in before.items():
        now = {k: frozen(v) for k, v in vars(m).items()}
        for name in was.keys() | now.keys():
            if was.get(name, _MISSING) != now.get(name, _MISSING):
                written = f"self.{name}"
                m.__dict__.pop(name, None)
                if name in values[m]:
                    m.__dict__[name] = values[m][name]
    return written


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
