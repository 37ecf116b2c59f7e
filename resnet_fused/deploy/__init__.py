"""A snapshot of a model for serving: it holds its own folded, packed copies; later edits of the model don't reach it.

On the CPU every convolution is oneDNN's on a packed weight, with add and ReLU in its epilogue: its ReLU makes 0 of
NaN, which eager's does not. On a GPU every convolution is one `conv_bn_act` by the fastest backend there, and each
kind of input a CUDA graph.
"""

from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn

from .. import ops
from ..graphs import Graphed
from .export import check, export
from .lower import Conv, Writer, lower

__all__ = ["Deployed", "deploy", "export"]


class Deployed:
    """A callable snapshot: [N, C, H, W] -> what the model returned, without gradients.

    N may vary; H and W as in the example, where the model's own code depends on them.
    """

    def __init__(self, graph: fx.GraphModule, example: Tensor) -> None:
        self._takes = example.dim(), example.dtype, example.device
        self._run: Any = graph.eval()
        with torch.inference_mode():
            graphs = example.is_cuda and isinstance(graph(example), Tensor)
        if graphs:
            self._run = Graphed(graph)
            self._run.capture(example)

    def __call__(self, x: Tensor) -> Any:
        if not isinstance(x, Tensor) or (x.dim(), x.dtype, x.device) != self._takes:
            given = f"{tuple(x.shape)}, {x.dtype}, {x.device}" if isinstance(x, Tensor) else type(x).__name__
            dims, dtype, device = self._takes
            raise ValueError(
                f"x must be a tensor of {dims} dimensions, {dtype}, on {device} as the example; got {given}"
            )
        with torch.inference_mode():
            return self._run(x)

    def __reduce__(self) -> NoReturn:
        raise TypeError("a deployed model is packed for this machine and can't be saved or copied; export the model")

    def capture(self, example: Tensor) -> None:
        """On a GPU, and where the model returns one tensor: a CUDA graph for inputs like this one too."""
        if isinstance(self._run, Graphed):
            self._run.capture(example)


def deploy(model: nn.Module, example: Tensor) -> Deployed:
    """A snapshot of `model` that is as fast as this package can make it on the example's device.

    Args:
        model: in eval mode, of this package, torchvision, timm or your own; anything that torch.export takes.
        example: [N, C, H, W] as it will be served, on the model's device and of its dtype.

    Returns:
        A callable that gives the model's results within rounding; BN is folded in float64.

    Raises:
        ValueError: the model is in train mode, on the meta device, on another device than the example or of another
            dtype, compiled or scripted, or its weights are not finite.
    """
    _check(model, example)
    on_gpu = example.is_cuda
    graph = lower(model, example, _fused if on_gpu else _packed, _linear if on_gpu else _packed_linear)
    return Deployed(graph, example)


def _check(model: nn.Module, example: Tensor) -> None:
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError("model is scripted; deploy the nn.Module that it was made from")
    if hasattr(model, "_orig_mod"):
        raise ValueError("model is compiled; deploy the nn.Module that it was made from, its `_orig_mod`")
    if hasattr(model, "module") and isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise ValueError(f"model is wrapped in {type(model).__name__}; deploy its `module`")
    check(model, example, "deployed")
    tensors = [*model.parameters(), *model.buffers()]
    devices = {t.device for t in tensors} | {example.device}
    if len(devices) > 1 or example.device.type not in ("cpu", "cuda"):
        found = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"model and example must be on one device, the CPU or a CUDA device; got {found}")
    dtypes = {t.dtype for t in model.parameters()}
    if dtypes - {example.dtype}:
        raise ValueError(f"example must have the model's dtype {next(iter(dtypes))}, got {example.dtype}")


def _packed(writer: Writer, conv: Conv) -> fx.Node:
    geometry = list(conv.padding), list(conv.stride), list(conv.dilation), conv.groups
    if not _packs(conv.weight.dtype):
        return _plain(writer, conv)
    weight = torch.ops.mkldnn._reorder_convolution_weight(conv.weight.detach(), *geometry, list(conv.shape))
    held = writer.keep(weight), writer.held(conv.shift)
    if conv.addend is None:
        pointwise = torch.ops.mkldnn._convolution_pointwise.default
        return writer.call(pointwise, conv.x, *held, *geometry, "relu" if conv.relu else "none", [], "")
    binary = torch.ops.mkldnn._convolution_pointwise.binary
    activation = "relu" if conv.relu else None
    return writer.call(binary, conv.x, conv.addend, *held, *geometry, "add", 1.0, activation, [], None)


def _packs(dtype: torch.dtype) -> bool:
    """Whether oneDNN convolves in this dtype on this CPU."""
    checks = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return dtype == torch.float32 or dtype in checks and checks[dtype]()


def _plain(writer: Writer, conv: Conv) -> fx.Node:
    geometry = list(conv.stride), list(conv.padding), list(conv.dilation), conv.groups
    y = writer.call(torch.ops.aten.conv2d.default, conv.x, writer.held(conv.weight), writer.held(conv.shift), *geometry)
    y = y if conv.addend is None else writer.call(torch.ops.aten.add.Tensor, y, conv.addend)
    return writer.call(torch.ops.aten.relu.default, y) if conv.relu else y


def _packed_linear(writer: Writer, x: fx.Node, weight: Tensor, bias: Tensor | None) -> fx.Node:
    if not _packs(weight.dtype):
        return _linear(writer, x, weight, bias)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())
    held = writer.keep(packed), writer.held(bias)
    return writer.call(torch.ops.mkldnn._linear_pointwise.default, x, *held, "none", [], "")


def _linear(writer: Writer, x: fx.Node, weight: Tensor, bias: Tensor | None) -> fx.Node:
    return writer.call(torch.ops.aten.linear.default, x, writer.held(weight), writer.held(bias))


def _fused(writer: Writer, conv: Conv) -> fx.Node:
    weight = writer.held(conv.weight.detach().contiguous(memory_format=torch.channels_last))
    geometry = {"stride": tuple(conv.stride), "padding": tuple(conv.padding), "dilation": tuple(conv.dilation)}
    epilogue = {"bias": writer.held(conv.shift), "residual": conv.addend, "act": "relu" if conv.relu else "none"}
    none = (None,) * 4
    return writer.call(ops.conv_bn_act, conv.x, weight, *none, groups=conv.groups, **geometry, **epilogue)
