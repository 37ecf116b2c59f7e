"""A module's own forward as a graph of calls of its children, and everything else that the graph depends on.

What torch.fx gets wrong in silence is refused here: in-place arithmetic is recorded as such, and a forward that makes
tensors, draws random numbers, changes the grad mode or autocast or writes to modules is not traced at all. What the
forward read while it was traced (modes, numbers, which children there are) is kept: the graph stands for the forward
as long as it reads the same.
"""

import builtins
import operator
import random
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from inspect import Parameter, signature
from types import FrameType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from ..layers.calls import called_plainly
from .reads import MISSING, Read, children_of, frozen, look

_LOCK = threading.RLock()  # torch.fx patches nn.Module while it traces
_INTERNAL = {*vars(nn.Module())} - {"training"}


class Untraceable(Exception):
    """Why a forward can't be written as a graph."""


class Traced(NamedTuple):
    graph: fx.Graph
    kind: type  # of the arguments: Tensor or list
    arguments: int
    reads: dict[str, list[Read]]  # by the path of the module that was read
    lists: dict[str, Any]  # containers that were walked through: their children
    modes: bool  # whether `training` was read


class _Proxy(fx.Proxy):
    pretended: type | None = None  # what the user's code is told that it is


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
        self.state: tuple = ()
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
        if type(a) is OrderedDict:
            return self.create_node(
                "call_function", OrderedDict, ([[k, self.create_arg(v)] for k, v in a.items()],), {}
            )
        if isinstance(a, (dict, list)) and type(a) not in (dict, list):
            raise Untraceable(f"makes a {type(a).__name__}")  # torch.fx would make a dict or list of it
        self.listening, listening = False, self.listening
        try:
            return super().create_arg(a)
        finally:
            self.listening = listening

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _contexts() != self.state:
            raise Untraceable(_CONTEXTS)
        return super().create_node(*args, **kwargs)


_CONTEXTS = "changes or asks for the grad mode or autocast, recomputes or has a backward of its own"
_ASKED = ("is_grad_enabled", "is_inference_mode_enabled", "is_autocast_enabled", "get_autocast_dtype")
_GRAD_ENABLED = torch.is_grad_enabled


def _contexts() -> tuple:
    """What operators depend on beside their arguments, and a graph does not say."""
    return (
        _GRAD_ENABLED(),  # off in the forward of an autograd.Function, too
        torch._C._autograd._top_saved_tensors_default_hooks(True) is None,  # set by checkpoint
        torch._C._len_torch_function_stack(),
        torch._C._len_torch_dispatch_stack(),
    )


@contextmanager
def _asking() -> Iterator[None]:
    """Refuse a forward that asks for the grad mode or autocast, as those that change it do first."""

    def refuse(*args, **kwargs):
        raise Untraceable(_CONTEXTS)

    functions = {name: getattr(torch, name) for name in _ASKED}
    for name in functions:
        setattr(torch, name, refuse)
    try:
        yield
    finally:
        for name, function in functions.items():
            setattr(torch, name, function)


@contextmanager
def _pretending(tracer: _Tracer) -> Iterator[None]:
    """isinstance in the user's code sees the arguments that will come; PyTorch's own code has to see proxies."""

    def told(instance, cls):
        if not issubclass(type(instance), _Proxy) or _from_torch(sys._getframe(1)):
            return own(instance, cls)
        if type(instance).pretended is None:
            raise Untraceable("asks for the type of what its modules return")
        tracer.asked = True
        classes = cls if type(cls) is tuple else (cls,)
        return any(issubclass(type(instance).pretended, c) for c in classes)

    own = builtins.isinstance
    builtins.isinstance = told
    try:
        yield
    finally:
        builtins.isinstance = own


def _from_torch(frame: FrameType) -> bool:
    return frame.f_globals.get("__name__", "").startswith("torch.")


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
        random.setstate(python)
        torch.set_rng_state(own)
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
            elif name == "forward":
                if not _from_torch(sys._getframe(1)):
                    raise Untraceable("calls a module's forward by itself")
            elif not name.startswith("__") and name not in _INTERNAL:
                if name in module.__dict__ or not hasattr(type(module), name):
                    tracer.reads.setdefault(paths[module], {}).setdefault(name, look(module, name))
        return object.__getattribute__(module, name)

    module_class: Any = nn.Module
    module_class.__getattribute__ = get
    try:
        yield
    finally:
        del module_class.__getattribute__


def trace(module: nn.Module, kind: type, inside: Iterable[nn.Module]) -> tuple[Traced, bool]:
    """The graph of the module's forward, `inside` looked into; and whether the forward asked for its inputs' type.

    Raises:
        Untraceable: with the reason.
    """
    if not isinstance(getattr(type(module), "forward", None), FunctionType):
        raise Untraceable("has no forward of its own")
    inside = set(inside)
    for m in (module, *inside):
        if "type" in getattr(type(m).forward, "__code__", trace.__code__).co_names:
            raise Untraceable("asks for the type of something")
    for m in inside:
        if called_plainly(m) is not None:
            raise Untraceable(f"looks into a {type(m).__name__} that {called_plainly(m)}")
    paths = {m: name for name, m in module.named_modules()}
    with _LOCK:
        tracer, generators = _Tracer(kind, inside), _generators()
        before = {m: {k: frozen(v) for k, v in vars(m).items()} for m in (module, *inside)}
        values = {m: dict(vars(m)) for m in before}
        try:
            with torch.enable_grad(), _reading(tracer, paths), _asking(), _pretending(tracer):
                tracer.state = _contexts()
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
            if was.get(name, MISSING) != now.get(name, MISSING):
                written = f"self.{name}"
                m.__dict__.pop(name, None)
                if name in values[m]:
                    m.__dict__[name] = values[m][name]
    return written


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
