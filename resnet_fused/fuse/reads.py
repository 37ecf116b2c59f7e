"""What a graph depends on in the modules that it was made from."""

import enum
from types import BuiltinFunctionType, FunctionType
from typing import Any, NamedTuple

from torch import fx, nn

_SIMPLE = (bool, int, float, complex, str, bytes, type(None), enum.Enum, type, FunctionType, BuiltinFunctionType)
MISSING = "missing"


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

    def __hash__(self) -> int:
        return id(self.of)


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
    return frozen(d[name]) if name in d else MISSING


def children_of(container: nn.Module) -> Any:
    """Of a module whose forward walks through them, or a list of modules."""
    return [(name, m is None) for name, m in container.__dict__["_modules"].items()]
