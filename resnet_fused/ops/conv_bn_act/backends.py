"""How each backend serves `conv_bn_act`: what it refuses, how it is launched, how it is checked, what `tune` tries."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import _cuda, _cudnn, _onednn, _registry, _triton, _trust, _tuned
from .. import _checks, _numerics
from ..batch_norm_act import launch as launch_bn

if _triton.IMPORT_ERROR is None:
    from ..._triton import conv_bn_act as _triton_kernels

Config = dict[str, Any] | None
PLANS = 4096  # kept at most


def supported(backend: str, args: tuple) -> str | None:
    """Why a backend can't serve the call, or None; from metadata alone. Arguments as in the schema."""
    x, weight, _, *vectors, _, _, _, _, _, _, relu = args
    if weight.dtype != x.dtype:
        return f"x is {x.dtype} and weight {weight.dtype}; the kernels take one dtype"
    reason = _checks.kernel_dtypes(x, tuple(vectors), uniform=backend == "cuda")
    forced = _registry.get_backend() == backend
    if reason is None and backend == "onednn":
        return _onednn.unsupported(x.dtype)
    if reason is None and backend == "cudnn" and not relu and not forced:
        return _cudnn.WITHOUT_RELU
    if reason is None and backend == "cuda" and not forced and not torch.compiler.is_compiling():  # it decides later
        return _cuda_unsupported(args)
    return reason


def _cuda_unsupported(args: tuple) -> str | None:
    x, weight, *_, stride, padding, dilation, groups, _, _ = args
    return _cuda.conv_unsupported(x, weight, stride, padding, dilation, groups, _allow_tf32(x))


def serve(reference: Callable[..., Tensor], args: tuple) -> Tensor:
    """The registered operator: choose, launch, and answer with eager where every check failed."""
    call = _metadata(args)
    plan = _plans.get(call)
    if plan is None:
        plan = _plan(reference, args)
        if not _trust.capturing(args[0].device):  # a capture puts checks off
            if len(_plans) >= PLANS:
                _plans.clear()
            _plans[call] = plan
    choice, config = plan
    _registry.record("conv_bn_act", choice, args)
    if choice.backend == "eager":
        positional, kwargs = reference_arguments(args)
        return reference(*positional, **kwargs).contiguous(memory_format=torch.channels_last)
    return launch(choice.backend, args, config)


_plans: dict[tuple, tuple[_registry.Choice, Config]] = {}  # what was chosen for calls of this metadata


def _metadata(args: tuple) -> tuple:
    """All that a choice depends on; cheaper than choosing again."""
    x, weight, *vectors, eps, stride, padding, dilation, groups, residual, relu = args
    return (
        *(None if t is None else t.dtype for t in (x, *vectors)),
        *(x.device, x.shape, weight.shape, weight.dtype, *stride, *padding, *dilation, groups),
        _misaligned(args),
        *(residual is None, relu, _allow_tf32(x), torch.backends.cudnn.enabled, _registry.get_backend()),
        *(_tuned.generation, _trust.generation),
    )


def _plan(reference: Callable[..., Tensor], args: tuple) -> tuple[_registry.Choice, Config]:
    x, weight, *_ = args
    config = None

    def serves(name: str) -> str | None:
        nonlocal config
        reason = supported(name, args)
        if name == "cuda" and _registry.get_backend() != "cuda":
            reason = reason or _misaligned(args)
        if reason is None:
            config = default_config(name, args)
            if tuned is not None and tuned["backend"] == name and tuned["config"] in configs(name, args):
                config = tuned["config"]  # no other: the file may hold anything
        return reason or refused(name, args, config, reference)

    tuned = _tuned.lookup(x.device, key(args))
    first = None if tuned is None else tuned["backend"]
    choice = _registry.choose("conv_bn_act", x.device, serves, shape_class(weight), first)
    split = None if choice.backend == "eager" or config is not None else split_reason(choice.backend, args)
    if split is not None:
        choice = choice._replace(rejected=(*choice.rejected, (f"{choice.backend} in one kernel", split)))
    return choice, config


def _misaligned(args: tuple) -> str | None:
    """Why the CUDA kernels can't read or write these tensors 16 bytes at a time, or None."""
    x, weight, *_, residual, _ = args
    for name, t in (("x", x), ("weight", weight), ("residual", residual)):
        if t is not None and t.data_ptr() % 16:
            return f"{name} does not start at a multiple of 16 bytes, which the CUDA convolutions need"
    return None


def shape_class(weight: Tensor) -> str:
    """What the registry orders backends by."""
    return "conv 1x1" if weight.shape[2] == weight.shape[3] == 1 else "conv"


def key(args: tuple) -> str:
    """One layer's problem, for `tune`: everything that the fastest choice depends on."""
    x, weight, *_, stride, padding, dilation, groups, residual, relu = args
    numbers = (*x.shape, *weight.shape, *stride, *padding, *dilation, groups)
    flags = f"{'+add' if residual is not None else ''}{'+relu' if relu else ''}"
    return f"{str(x.dtype).removeprefix('torch.')} {'x'.join(map(str, numbers))}{flags}"


def split_reason(backend: str, args: tuple) -> str | None:
    """Why PyTorch's convolution and one fused pass serve, instead of one kernel; None where one kernel does."""
    if backend == "cudnn" and not args[-1]:
        return f"{_cudnn.WITHOUT_RELU}: PyTorch's convolution with folded weights, then the add"
    if backend not in ("cuda", "triton"):
        return None
    x, weight, *_, stride, padding, dilation, groups, _, _ = args
    if backend == "cuda":
        reason = _cuda_unsupported(args) or _misaligned(args)
    else:
        reason = _triton_kernels.supported(x.shape, weight.shape, stride, padding, dilation, groups, x.dtype)
    return reason and f"{reason}: PyTorch's convolution, then BN, add and ReLU in one pass"


def default_config(backend: str, args: tuple) -> Config:
    """What our own kernels take by default for this problem, a tile; None where there is nothing to choose."""
    if args[0].numel() == 0 or backend not in ("cuda", "triton") or split_reason(backend, args) is not None:
        return None
    return configs(backend, args)[0] if backend == "cuda" else _triton_kernels.config(_problem(args))


def configs(backend: str, args: tuple) -> list[Config]:
    """What `tune` tries, the default first."""
    if backend not in ("cuda", "triton") or split_reason(backend, args) is not None:
        return [None]
    if backend == "cuda":
        x, weight, *_, stride, padding, dilation, groups, _, _ = args
        return _cuda.conv_configs(x, weight, stride, padding, dilation, groups)
    return _triton_kernels.candidates(_problem(args))


def _problem(args: tuple):
    x, weight, *_, stride, padding, dilation, groups, _, _ = args
    return _triton_kernels.problem_on(x, weight, stride, padding, dilation, groups, _allow_tf32(x))


def _allow_tf32(x: Tensor) -> bool:
    return x.dtype == torch.float32 and torch.backends.cudnn.conv.fp32_precision == "tf32"


def launch(backend: str, args: tuple, config: Config = None) -> Tensor:
    """Run one backend; arguments as in the schema, of any layout."""
    x, weight, bias, *bn, eps, stride, padding, dilation, groups, residual, relu = args
    bias, *bn = (None if v is None else v.contiguous() for v in (bias, *bn))
    conv_args = (stride, padding, dilation, groups)
    args = (x, weight, bias, *bn, eps, *conv_args, residual, relu)
    if backend == "triton" and config is not None:
        return _triton_kernels.conv_bn_act(*args, allow_tf32=_allow_tf32(x), config=config)
    x = x.contiguous(memory_format=torch.channels_last)
    if backend == "onednn":
        return _onednn.conv_bn_act(x, *args[1:])
    if backend == "cudnn":
        return _cudnn.conv_bn_act(x, *args[1:])
    if backend == "cuda" and config is not None:
        weight, residual = (None if t is None else _numerics.dense(t) for t in (weight, residual))
        return _cuda.conv_bn_act(x, weight, bias, *bn, eps, *conv_args, residual, relu, config)
    y = F.conv2d(x, weight, bias, *conv_args)
    return launch_bn(backend, y, *bn, eps, residual, None, None, None, None, None, relu)[0]


def refused(backend: str, args: tuple, config: Config, reference: Callable[..., Tensor]) -> str | None:
    """Why the kernel class failed its check on this device, or None."""
    x, weight, *_ = args
    if backend == "onednn" or x.numel() == 0:  # PyTorch's own operators on the CPU
        return None
    given = "".join("-" if a is None else str(a.dtype)[6] if isinstance(a, Tensor) else "" for a in args)
    tile = "/".join(f"{k.lower()}={v}" for k, v in (config or {}).items())
    kernel = f"{'x'.join(map(str, weight.shape[2:]))}/s{args[8][0]}/g{min(args[11], 2)}/c{weight.shape[1] % 16}"
    kind = f"conv_bn_act/{backend}/{x.dtype}/{kernel}/{given}/{args[-1]}/tf32={_allow_tf32(x)}/{tile}"
    return _trust.refused(kind, x.device, lambda: compare(backend, args, config, reference))


def compare(backend: str, args: tuple, config: Config, reference: Callable[..., Tensor]) -> str | None:
    """What is wrong with a backend's numbers on random inputs like these, or None."""
    draw = _numerics.Draw(args[0].device)
    args = list(args)
    for i, a in enumerate(args):
        if isinstance(a, Tensor):
            fan_in = a[0].numel() if i == 1 else 1
            args[i] = draw.like(a, positive=i == 6, images=i != 1, scale=fan_in**-0.5)
    positional, kwargs = reference_arguments(args)
    return _numerics.mismatch((launch(backend, tuple(args), config),), reference, positional, kwargs)


def reference_arguments(args: tuple) -> tuple[tuple, dict]:
    """The registered operator's arguments as those of `reference`."""
    x, weight, bias, *bn, eps, stride, padding, dilation, groups, residual, relu = args
    kwargs = dict(bias=bias, eps=eps, stride=stride, padding=padding, dilation=dilation, groups=groups)
    return (x, weight, *bn), kwargs | {"residual": residual, "act": "relu" if relu else "none"}
