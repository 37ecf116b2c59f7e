"""PyTorch's own CUDA operators, computed on the CPU in the very same memory.

Its kernels are SASS, which nothing here can run. Every operator of `aten` that has a CUDA kernel gets one in Python
instead, under the same dispatch key: autograd, autocast, views and allocation stay PyTorch's. cuDNN is switched off;
`cudnn` has its operators.
"""

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from . import cudnn

# composites that reach a CUDA kernel of their own
_COMPOSITES = ("copy_",)
# allocation and bookkeeping, which need no kernel
_NATIVE = ("empty.memory_format", "empty_strided", "resize_", "set_", "record_stream", "_pin_memory", "is_pinned")

_library: ctypes.CDLL
_registration = torch.library.Library("aten", "IMPL")
_recorded: list[Any] = []  # callbacks of captured graphs: they have to outlive them


def install(library: ctypes.CDLL) -> None:
    global _library
    _library = library
    torch.backends.cudnn.enabled = False
    for name in torch._C._dispatch_get_all_op_names():
        namespace, _, operator = name.partition("::")
        if namespace != "aten" or operator in cudnn.OPERATORS or not _needs_a_kernel(name, operator):
            continue
        packet, _, overload = operator.partition(".")
        function = getattr(getattr(torch.ops.aten, packet), overload or "default")
        if function.is_view:
            continue
        _registration.impl(operator, _on_host(_taking_numbers(function, packet)), "CUDA", allow_override=True)
    for operator, function in cudnn.OPERATORS.items():
        _registration.impl(operator, _on_host(function), "CUDA", allow_override=True)


def _needs_a_kernel(name: str, operator: str) -> bool:
    packet = operator.partition(".")[0]
    if operator in _NATIVE or packet in _NATIVE:
        return False
    return packet in _COMPOSITES or torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")


def _taking_numbers(function: Callable, packet: str) -> Callable:
    """PyTorch hands a number that stands for a tensor to a kernel in Python as a number: another overload takes it."""
    tensors = [i for i, a in enumerate(function._schema.arguments) if str(a.type) == "Tensor" and not a.kwarg_only]
    overloads = getattr(torch.ops.aten, packet)

    @functools.wraps(function)
    def call(*args, **kwargs):
        given = any(i < len(args) and isinstance(args[i], (bool, int, float, complex)) for i in tensors)
        return (overloads if given else function)(*args, **kwargs)

    return call


def host_tensor(t: Tensor) -> Tensor:
    """A CPU tensor over the memory of a CUDA tensor."""
    storage = t.untyped_storage()
    if storage.nbytes() == 0:
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype)
    buffer = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    memory = torch.frombuffer(buffer, dtype=torch.uint8).untyped_storage()
    return torch.empty(0, dtype=t.dtype).set_(memory, t.storage_offset(), t.shape, t.stride())


def _device_tensor(t: Tensor, device: torch.device) -> Tensor:
    result = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device)
    if t.numel():
        host_tensor(result).copy_(t)
    return result


def _resized(host: Tensor, owner: Tensor) -> Tensor:
    """The CUDA tensor, where an `out=` of another size took new memory on the host."""
    if host.shape != owner.shape:
        owner.resize_(host.shape).as_strided_(host.shape, host.stride())
        host_tensor(owner).copy_(host)
    return owner


def _host_generator(generator: torch.Generator) -> torch.Generator:
    """One for this call, by the seed and the place in its sequence, which moves on."""
    offset = generator.get_offset()
    generator.set_offset(offset + 4)
    return torch.Generator().manual_seed((generator.initial_seed() + 0x9E3779B9 * offset) % 2**63)


def _on_host(function: Callable) -> Callable:
    name = function.__name__

    def call(*args, **kwargs):
        device = _device_of(args, kwargs)
        to_host = kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cpu"
        owners: dict[int, tuple[Tensor, Tensor]] = {}  # a host tensor's id -> itself and the CUDA tensor

        def down(value: Any) -> Any:
            if isinstance(value, Tensor) and value.is_cuda:
                host = host_tensor(value)
                owners[id(host)] = (host, value)
                return host
            if isinstance(value, torch.device) and value.type == "cuda":
                return torch.device("cpu")
            if isinstance(value, torch.Generator) and value.device.type == "cuda":
                return _host_generator(value)
            return value

        def up(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if id(value) in owners:
                return _resized(value, owners[id(value)][1])
            return value if to_host else _device_tensor(value, device)

        stream = ctypes.c_void_p(torch._C._cuda_getCurrentRawStream(device.index))
        with torch.cuda.device(device):
            capturing = _library.vgpu_host_turn(stream)
            if capturing < 0:
                raise torch.AcceleratorError(f"a kernel before {name} failed: {_library.vgpu_message().decode()}")
            host_args, host_kwargs = tree_map(down, (args, kwargs))
            if not capturing:
                return tree_map(up, function(*host_args, **host_kwargs))
            return _record(function, host_args, host_kwargs, stream, up)

    return call


def _device_of(args: tuple, kwargs: dict[str, Any]) -> torch.device:
    for leaf in tree_leaves((args, kwargs)):
        if isinstance(leaf, Tensor) and leaf.is_cuda:
            return leaf.device
        if isinstance(leaf, torch.device) and leaf.type == "cuda" and leaf.index is not None:
            return leaf
    return torch.device("cuda", torch.cuda.current_device())


def _record(function: Callable, args: tuple, kwargs: dict, stream: ctypes.c_void_p, up: Callable) -> Any:
    """Inside a capture: results of the right kind now, the computation at every replay."""
    if function.__name__.startswith("_local_scalar_dense"):
        raise RuntimeError("operation not permitted when stream is capturing: a value is read back")
    copies = tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, (args, kwargs))
    originals = {id(c): o for c, o in zip(*map(tree_leaves, (copies, (args, kwargs))), strict=True)}
    shapes = function(*copies[0], **copies[1])  # on copies: what is written in place must not change yet
    results = tree_map(lambda r: up(originals.get(id(r), r)) if isinstance(r, Tensor) else r, shapes)
    targets = [host_tensor(r) if isinstance(r, Tensor) and r.is_cuda else None for r in tree_leaves(results)]

    @ctypes.CFUNCTYPE(ctypes.c_int)
    def replay() -> int:
        fresh = tree_leaves(function(*args, **kwargs))
        for target, value in zip(targets, fresh, strict=True):
            if target is not None and target.data_ptr() != value.data_ptr():
                target.copy_(value)
        return 0

    _recorded.append(replay)
    _library.vgpu_record(stream, replay)
    return results
