"""A snapshot of a model for serving: it holds its own folded, packed copies; later edits of the model don't reach it.

On the CPU every convolution is oneDNN's on a packed weight, with add and ReLU in its epilogue: its ReLU makes 0 of
NaN, which eager's does not. Where ONNX Runtime or OpenVINO are installed they are timed beside it on the example, and
one that is 3 % faster serves. On a GPU every convolution is one `conv_bn_act` by the fastest backend there, and each
kind of input a CUDA graph.
"""

import ctypes
import gc
import platform
import time
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn

from .. import ops
from ..graphs import Graphed
from .engines import ENGINES, Run
from .export import check, export
from .lower import Conv, Writer, computed_in, lower, same

__all__ = ["Deployed", "deploy", "export"]

ROUNDS, SECONDS = 8, 2.0  # of timing: at least so many, and as many more as fit
CLOSE = 0.97  # of PyTorch's time: no other engine is worth less of a gain


class Deployed:
    """A callable snapshot: [N, C, H, W] -> what the model returned, without gradients.

    N may vary; H and W are the example's where another engine than PyTorch serves, or where the model's own code
    depends on them.

    Attributes:
        engine: what serves: "pytorch", "onnxruntime" or "openvino".
        candidates: engine -> milliseconds of the example where several were timed, or why it was out.
    """

    def __init__(self, run: Any, example: Tensor, engine: str, candidates: dict[str, float | str]) -> None:
        self._takes, self._shape = (example.dim(), example.dtype, example.device), example.shape
        self._run, self.engine, self.candidates = run, engine, candidates
        with torch.inference_mode():
            graphs = example.is_cuda and isinstance(run(example), Tensor)
        if graphs:
            self._run = Graphed(run)
            self._run.capture(example)

    def __repr__(self) -> str:
        found = (f"{k} {v:.2f} ms" if isinstance(v, float) else f"{k}: {v}" for k, v in self.candidates.items())
        return f"Deployed(engine={self.engine!r}; {', '.join(found)})" if self.candidates else "Deployed()"

    def __call__(self, x: Tensor) -> Any:
        if not isinstance(x, Tensor) or (x.dim(), x.dtype, x.device) != self._takes:
            given = f"{tuple(x.shape)}, {x.dtype}, {x.device}" if isinstance(x, Tensor) else type(x).__name__
            dims, dtype, device = self._takes
            raise ValueError(
                f"x must be a tensor of {dims} dimensions, {dtype}, on {device} as the example; got {given}"
            )
        if x.shape[1:2] != self._shape[1:2]:
            raise ValueError(f"x must have the example's {self._shape[1]} channels, got {tuple(x.shape)}")
        if self.engine != "pytorch" and x.shape[1:] != self._shape[1:]:
            raise ValueError(
                f"x must be of the example's size {tuple(self._shape[1:])}, got {tuple(x.shape[1:])}: "
                f'{self.engine} serves one size, deploy(..., engine="pytorch") any'
            )
        with torch.inference_mode():
            return self._run(x)

    def __reduce__(self) -> NoReturn:
        raise TypeError("a deployed model is packed for this machine and can't be saved or copied; export the model")

    def capture(self, example: Tensor) -> None:
        """On a GPU, and where the model returns one tensor: a CUDA graph for inputs like this one too."""
        if isinstance(self._run, Graphed):
            self._run.capture(example)


def deploy(model: nn.Module, example: Tensor, *, engine: str = "auto") -> Deployed:
    """A snapshot of `model` that is as fast as this package can make it on the example's device.

    Args:
        model: in eval mode, of this package, torchvision, timm or your own; anything that torch.export takes.
        example: [N, C, H, W] as it will be served, on the model's device and of its dtype; uint8 where the model
            normalises bytes itself (`set_input_normalization`).
        engine: on the CPU "pytorch", "onnxruntime", "openvino", or "auto": the fastest on the example of those that are
            installed and give the model's numbers. On a GPU "pytorch" serves.

    On the CPU timing several engines takes two seconds or more; from then on the process keeps memory that it frees.

    Returns:
        A callable that gives the model's results within rounding; BN is folded in float64.

    Raises:
        ValueError: the model is in train mode, on the meta device, on another device than the example or of another
            dtype, compiled or scripted, or its weights are not finite; there is no such engine.
        BackendUnavailable: the engine that was asked for can't serve this.
    """
    if engine not in ("auto", "pytorch", *ENGINES):
        raise ValueError(f"engine must be one of auto, pytorch, {', '.join(ENGINES)}; got {engine!r}")
    _check(model, example)
    try:
        return _made(engine, model, example)
    finally:
        _give_back()


def _made(engine: str, model: nn.Module, example: Tensor) -> Deployed:
    if engine in ENGINES:
        return Deployed(_by(engine, model, example), example, engine, {})
    if example.is_cuda:
        return Deployed(lower(model, example, _fused, _linear).eval(), example, "pytorch", {})
    run = _adding_in_place(lower(model, example, _packed, _packed_linear)).eval()
    _libc("mallopt", -4, 0)  # M_MMAP_MAX: large blocks come from the heap too
    _libc("mallopt", -1, 2**31 - 1)  # M_TRIM_THRESHOLD: whose top is not given back; fresh pages cost a fifth of a pass
    if engine == "pytorch" or not isinstance(model(example), Tensor):
        return Deployed(run, example, "pytorch", {})
    runs, candidates = _candidates(model, example)
    runs["pytorch"] = run
    if len(runs) == 1:
        return Deployed(run, example, "pytorch", candidates)
    times = _milliseconds(runs, example)
    fastest = min(times, key=lambda name: times[name])
    if times[fastest] > CLOSE * times["pytorch"]:
        fastest = "pytorch"  # which takes images of any size
    return Deployed(runs[fastest], example, fastest, {**candidates, **times})


def _by(engine: str, model: nn.Module, example: Tensor) -> Run:
    """An engine's run, which gives the model's numbers on the example."""
    with torch.inference_mode():
        run, expected = ENGINES[engine](model, example), model(example)
        same(run(example), expected, computed_in(model, example))
    return run


def _candidates(model: nn.Module, example: Tensor) -> tuple[dict[str, Any], dict[str, float | str]]:
    """The other engines that serve the model, and why the rest don't."""
    runs: dict[str, Any] = {}
    out: dict[str, float | str] = {}
    for name in ENGINES:
        try:
            runs[name] = _by(name, model, example)
        except Exception as error:  # whatever another package makes of the model: this one serves it
            out[name] = str(error).partition("\n")[0]
    return runs, out


def _milliseconds(runs: dict[str, Any], example: Tensor) -> dict[str, float]:
    """The least of several rounds, in turn."""
    found, rounds, began = dict.fromkeys(runs, float("inf")), 0, time.perf_counter()
    with torch.inference_mode():
        while rounds < ROUNDS or time.perf_counter() - began < SECONDS:
            rounds += 1
            for name, run in runs.items():
                start = time.perf_counter()
                run(example)
                found[name] = min(found[name], 1e3 * (time.perf_counter() - start))
    return found


def _give_back() -> None:
    """What making the snapshot took, the losing engines among it."""
    gc.collect()
    _libc("malloc_trim", 0)


def _libc(function: str, *numbers: int) -> None:
    """A call of glibc's; nothing elsewhere."""
    if platform.libc_ver()[0] == "glibc":
        getattr(ctypes.CDLL(None), function)(*numbers)


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
    if example.dtype == torch.uint8:
        try:
            with torch.inference_mode():
                model(example)
        except (RuntimeError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(f"example is of torch.uint8, which model does not take: {reason}") from None
    elif wrong := sorted(map(str, dtypes - {example.dtype})):
        raise ValueError(f"example must have the model's dtype {wrong[0]}, got {example.dtype}")


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


def _adding_in_place(graph: fx.GraphModule) -> fx.GraphModule:
    """A convolution's addend that nothing reads later takes the sum: fewer bytes, and none of them new to the cache."""
    mkldnn = torch.ops.mkldnn
    binary, in_place = mkldnn._convolution_pointwise.binary, mkldnn._convolution_pointwise_.binary
    makes = {binary, in_place, mkldnn._convolution_pointwise.default}  # a tensor of their own, and no views
    order = {node: i for i, node in enumerate(graph.graph.nodes)}
    for node in graph.graph.nodes:
        if node.target is not binary:
            continue
        x, addend, *rest = node.args
        users = [user for user in addend.users if user is not node]
        own = addend.target in makes and x is not addend
        if own and all(user.target in makes and order[user] < order[node] for user in users):
            node.target, node.args = in_place, (addend, x, *rest)
    graph.recompile()
    return graph


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
