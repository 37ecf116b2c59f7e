"""Launching a compiled kernel without Triton's own look-up, which costs more than all else of a launch."""

import hashlib
import inspect
import threading
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.tools.tensor_descriptor import TensorDescriptor

_written_down = threading.local()  # .forms: where launches on tensors without memory go


def compiled_class(run: Callable[[Any], Any], call: Any) -> str:
    """What a plan's launches for a call compile: the kernels' names, and a digest of their forms.

    The plan runs on tensors without memory, of the call's shapes, layouts, dtypes and alignments.
    """
    forms: list[str] = []
    _written_down.forms = forms
    try:
        run(type(call)(*(_without_memory(a) if isinstance(a, Tensor) else a for a in call)))
    finally:
        del _written_down.forms
    names = "+".join(form.partition("(")[0] for form in forms)
    return f"{call[0].dtype}/{names}/{hashlib.sha256(' '.join(forms).encode()).hexdigest()[:16]}"


def _without_memory(t: Tensor) -> Tensor:
    """Its offset stands for its alignment."""
    offset = t.data_ptr() % 16 // t.element_size()
    span = offset + 1 + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
    return torch.empty(max(span, 0), dtype=t.dtype, device="meta").as_strided(t.shape, t.stride(), offset)


@lru_cache
def _not_specialized(kernel: Any) -> tuple[frozenset[str], frozenset[str]]:
    """Names of constants, which are compiled as they are, and of numbers of which only the type is."""
    parameters = inspect.signature(kernel.fn).parameters
    constants = frozenset(n for n, p in parameters.items() if "constexpr" in str(p.annotation))
    options = getattr(kernel, "kwargs", {})  # the interpreter's
    return constants, frozenset(options.get("do_not_specialize") or getattr(kernel, "do_not_specialize", None) or ())


def _form(kernel: Any, arguments: Sequence[Any], names: dict[str, Any]) -> str:
    """A kernel as Triton compiles it: by types, alignments, divisibility by 16, ones, constants and options."""
    constants, unspecialized = _not_specialized(kernel)
    positional = zip(kernel.arg_names, arguments, strict=False)  # the rest go by name
    given = {**names, **dict(positional)}
    parts = [
        f"{name}={value if name in constants or name not in kernel.arg_names else _kind(value, name in unspecialized)}"
        for name, value in sorted(given.items())
    ]
    return f"{kernel.__name__}({', '.join(parts)})"


def _kind(value: Any, unspecialized: bool) -> str:
    if isinstance(value, TensorDescriptor):
        return f"descriptor of {value.base.dtype} {value.block_shape}"
    if isinstance(value, Tensor):
        return f"{value.dtype}{'' if value.storage_offset() * value.element_size() % 16 else ' aligned'}"
    if isinstance(value, int) and not isinstance(value, bool):
        if value == 1 and not unspecialized:
            return "1"
        width = "i32" if -(2**31) <= value < 2**31 else "i64"
        return f"{width}{'' if unspecialized or value % 16 else ' by 16'}"
    return type(value).__name__


class Launch:
    """A kernel on one grid with every argument but its tensors.

    The first launch goes through Triton, which compiles for these numbers and for pointers that are multiples of 16;
    the kernel is kept and later launches are direct. Those of other pointers, and all in the interpreter or under
    launch hooks, go through Triton again. What tensors are given, and their dtypes, must not change from call to call.
    """

    __slots__ = ("_kernel", "_grid", "_names", "_rest", "_device", "_direct")

    def __init__(self, kernel: Any, grid: Sequence[int], rest: dict[str, Any]) -> None:
        """rest: by name, the kernel's last parameters and Triton's num_warps and num_stages."""
        self._kernel, self._names = kernel, rest
        self._grid = (*grid, 1, 1)[:3]
        self._rest = tuple(rest[name] for name in kernel.arg_names if name in rest)
        self._device: int | None = None
        self._direct: tuple[Callable[..., None], Any, Any, CompiledKernel] | None = None

    def __call__(self, *tensors: Tensor | TensorDescriptor | None, numbers: tuple[float, ...] = ()) -> None:
        """numbers: what changes from call to call, behind the tensors."""
        direct = self._direct
        if direct is None or _hooked(knobs.runtime):
            return self._through_triton(tensors, numbers)
        arguments, low = [], 0  # addresses: Triton would ask every tensor for its own, and the driver for each of them
        for t in tensors:
            if t is None or t.__class__ is TensorDescriptor:
                arguments.append(t)
            else:
                arguments.append(address := t.data_ptr())
                low |= address
        if low & 15:
            return self._through_triton(tensors, numbers)
        active = driver.active
        device = active.get_current_device()
        if device != self._device:
            with torch.cuda.device(self._device):
                return self(*tensors, numbers=numbers)
        run, function, packed, _ = direct
        stream = active.get_current_stream(device)
        run(*self._grid, stream, function, packed, None, None, None, *arguments, *numbers, *self._rest)

    def _through_triton(
        self, tensors: tuple[Tensor | TensorDescriptor | None, ...], numbers: tuple[float, ...]
    ) -> None:
        pointers = [t.base if isinstance(t, TensorDescriptor) else t for t in tensors if t is not None]
        if (forms := getattr(_written_down, "forms", None)) is not None:
            forms.append(_form(self._kernel, (*tensors, *numbers), self._names))
            return
        with torch.cuda.device_of(pointers[0]):
            compiled = self._kernel[self._grid](*tensors, *numbers, **self._names)
            if isinstance(compiled, CompiledKernel) and not any(t.data_ptr() % 16 for t in pointers):
                if not self._kernel.pre_run_hooks:
                    self._device = driver.active.get_current_device()
                    self._direct = compiled.run, compiled.function, compiled.packed_metadata, compiled  # kept alive


def _hooked(runtime: Any) -> bool:
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook  # chains of hooks, or None
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


class Described:
    """Tensor descriptors of one form; Triton's constructor checks the form again for every tensor."""

    def __init__(self, example: Tensor, shape: Sequence[int], block_shape: Sequence[int]) -> None:
        self._fields = dict(vars(TensorDescriptor(example, list(shape), [shape[1], 1], list(block_shape))))
        del self._fields["base"]  # not to be kept alive

    def __call__(self, base: Tensor) -> TensorDescriptor:
        """base: at a multiple of 16 bytes."""
        descriptor = object.__new__(TensorDescriptor)
        descriptor.__dict__.update(self._fields, base=base)
        return descriptor
