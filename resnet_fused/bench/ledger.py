"""An exact ledger of a program: bytes read and written, launches, bytes kept for backward, the peak of what is alive.

Tensors are fake: they have shapes, dtypes and layouts and no memory, so any batch is counted on any machine. PyTorch's
operators are seen by a dispatch mode; this package's kernels tell their launches, by its own dispatch, as on a GPU that
only Triton serves. What counts:

- every operand once, every result once, each of the bytes that it has: values expanded from one are one value;
- of a convolution with a stride over its kernel's size the pixels that it meets;
- batch norm in training reads its input twice, its backward pass the input and the gradient twice, in every library;
- a convolution's backward pass reads the gradient once for each gradient that it computes, and is as many launches;
- views, metadata and allocations are free; every other operator of PyTorch is one launch.
"""

import contextlib
import gc
import warnings
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..dispatch.stub import stubbed
from ..ops import _library, _short

_FREE = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "_local_scalar_dense", "as_strided_")
_WRITES_ONLY = ("copy_", "fill_", "zero_", "uniform_", "normal_")
_BN = ("native_batch_norm", "_native_batch_norm_legit", "cudnn_batch_norm", "batch_norm_with_update")
_BN_BACKWARD = ("native_batch_norm_backward", "cudnn_batch_norm_backward", "batch_norm_backward")


@dataclass
class Entry:
    """Of one operator or kernel."""

    launches: int = 0
    read: int = 0  # bytes, as the next
    written: int = 0


@dataclass
class Ledger:
    """What was counted."""

    entries: dict[str, Entry] = field(default_factory=dict)
    saved: int = 0  # bytes kept for backward at the end of the forward pass, weights and their casts apart
    peak: int = 0  # bytes alive at once, weights and all

    @property
    def launches(self) -> int:
        return sum(e.launches for e in self.entries.values())

    @property
    def read(self) -> int:
        return sum(e.read for e in self.entries.values())

    @property
    def written(self) -> int:
        return sum(e.written for e in self.entries.values())

    @property
    def bytes(self) -> int:
        return self.read + self.written

    def add(self, name: str, launches: int, read: int, written: int) -> None:
        entry = self.entries.setdefault(name, Entry())
        entry.launches += launches
        entry.read += read
        entry.written += written


def size(t: Tensor) -> int:
    """Bytes in memory: a dimension of stride 0 is one value."""
    elements = 1
    for n, stride in zip(t.shape, t.stride(), strict=True):
        elements *= n if stride or not n else 1
    return elements * t.itemsize


def met(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Bytes of an image that a convolution meets."""
    found = size(x)
    for n, k, s in zip(x.shape[2:], kernel, stride, strict=True):
        found = found // n * (-(-n // s) * k) if k < s and n else found
    return found


class Counting(TorchDispatchMode):
    """Counts PyTorch's operators into a ledger, and what is alive of their results."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self.ledger = ledger
        self.alive = 0
        self._held: dict[int, int] = {}  # a storage's address -> bytes
        self._apart: set[int] = set()

    def set_apart(self, tensors: Iterable[Tensor]) -> None:
        """Neither these nor their casts are kept for backward: weights, and the images."""
        self._apart |= {_storage(t) for t in tensors}

    def kept(self) -> int:
        """Bytes alive now that were not set apart."""
        gc.collect()
        return sum(n for storage, n in self._held.items() if storage not in self._apart)

    def _hold(self, t: Tensor) -> None:
        storage = t.untyped_storage()
        if _storage(t) not in self._held:
            self._held[_storage(t)] = storage.nbytes()
            self.alive += storage.nbytes()
            self.ledger.peak = max(self.ledger.peak, self.alive)
            weakref.finalize(storage, self._gone, _storage(t))

    def _gone(self, storage: int) -> None:
        self.alive -= self._held.pop(storage, 0)
        self._apart.discard(storage)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "resnet_fused":
            with self:  # what serves it, down to the launches
                return _library.kernels[func._schema.name.partition("::")[2]](*args)
        result = func(*args, **kwargs)
        given, made = _tensors((args, kwargs)), _tensors(result)
        for t in made:
            self._hold(t)
        name = func._schema.name.partition("::")[2]
        if name == "_to_copy" and _storage(given[0]) in self._apart:
            self._apart.add(_storage(result))
        changed = [
            t
            for argument, value in zip(func._schema.arguments, [*args, *kwargs.values()], strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
            for t in _tensors(value)
        ]
        storages = {_storage(t) for t in given}
        fresh = [t for t in made if _storage(t) not in storages]
        if name in _FREE or not (fresh or changed):
            return result
        self.ledger.add(name, *_cost(name, args, given, fresh, changed))
        return result


def _storage(t: Tensor) -> int:
    return t.untyped_storage()._cdata


def _tensors(values: Any) -> list[Tensor]:
    """Each once."""
    return list({id(t): t for t in tree_leaves(values) if isinstance(t, Tensor)}.values())


def _cost(
    name: str, args: tuple, given: list[Tensor], fresh: list[Tensor], changed: list[Tensor]
) -> tuple[int, int, int]:
    """Launches, bytes read and bytes written."""
    if name in _WRITES_ONLY:
        given = [t for t in given if all(t is not c for c in changed)]
    read, written, launches = sum(map(size, given)), sum(map(size, (*fresh, *changed))), 1
    if name == "convolution":
        x, weight, _, stride = args[:4]
        read += met(x, tuple(weight.shape[2:]), tuple(stride)) - size(x)
    elif name == "convolution_backward":
        dy, x, weight, _, stride = args[:5]
        dx, dweight, dbias = args[-1]
        launches = dx + dweight + dbias
        read = size(dy) * launches + dx * size(weight) + dweight * met(x, tuple(weight.shape[2:]), tuple(stride))
    elif name in _BN and args[5]:
        read += size(args[0])
    elif name in _BN_BACKWARD and args[7]:
        read += size(args[0]) + size(args[1])
    elif name == "max_pool2d_with_indices_backward":
        read -= size(args[1])  # only its shape counts
    return launches, read, written


@contextlib.contextmanager
def counted() -> Iterator[Counting]:
    """Inside the block PyTorch's operators and this package's launches on fake CPU tensors are counted.

    Raises:
        RuntimeError: Triton is missing, or runs its interpreter.
    """
    counting = Counting(Ledger())

    def launched(name: str, uses: dict[str, tuple[Tensor, bool, bool]], constants: dict[str, Any]) -> None:
        read = sum(size(t) for t, reads, _ in uses.values() if reads)
        if "STRIDE_H" in constants:
            sides = tuple((constants[taps], constants[f"STRIDE_{axis}"]) for taps, axis in (("R", "H"), ("S", "W")))
            x = uses["x"][0]
            read += met(x, *zip(*sides, strict=True)) - size(x)
        counting.ledger.add(f"resnet_fused.{name}", 1, read, sum(size(t) for t, _, writes in uses.values() if writes))

    before = _short.modes, _short.PLAIN
    with stubbed(launched), FakeTensorMode(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # 0: as aligned as any
        _short.modes, _short.PLAIN = lambda: 0, (*_short.PLAIN, FakeTensor)
        try:
            with counting:
                yield counting
        finally:
            _short.modes, _short.PLAIN = before
