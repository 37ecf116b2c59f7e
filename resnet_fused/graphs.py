"""A model's forward pass as CUDA graphs, one for each kind of input, behind a plain call."""

import threading
from collections.abc import Callable, Hashable
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .dispatch import registry

_SETTINGS = {  # numbers that a graph holds fast
    nn.Conv2d: attrgetter("stride", "padding", "dilation", "groups"),
    nn.BatchNorm2d: attrgetter("eps"),
    nn.SyncBatchNorm: attrgetter("eps"),
}


Capture = Callable[[Callable[[Tensor], Tensor], Tensor], tuple[Tensor, Tensor, Callable[[], None]]]


class Captured(NamedTuple):
    """A graph: copy the input in, replay, read the output."""

    input: Tensor
    output: Tensor
    replay: Callable[[], None]
    alive: list[Tensor]  # what the graph reads; a replay of a stale graph must not touch freed memory
    state: Hashable  # of the model, at capture


def capture_cuda_graph(
    forward: Callable[[Tensor], Tensor], example: Tensor
) -> tuple[Tensor, Tensor, Callable[[], None]]:
    """(input, output, replay) of a CUDA graph of `forward`; warm-up runs have its kernels compiled and checked."""
    device = example.device
    with torch.cuda.device(device), _without_cached_casts(device.type):
        static = example.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                forward(static)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            output = forward(static)
    return static, output, graph.replay


def _without_cached_casts(device: str) -> torch.autocast:
    """The autocast that holds, casting weights inside the graph: its cache dies with the caller's block."""
    dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
    return torch.autocast(device, dtype, enabled, cache_enabled=False)


class Graphed:
    """Calls `model` without gradients, by graph replay where an input like this one was captured.

    Replays see every in-place edit of the weights and statistics. A change that a replay would not see (moved or
    replaced tensors, replaced modules, their geometry or eps, train() or eval(), hooks) leads to a new capture. An
    input of a shape, dtype or layout that was not captured, or under another autocast, `set_backend` or
    `torch.backends.cudnn.conv.fp32_precision`, runs as a plain call, as every input does in train mode; `capture` adds
    it. Threads take turns, and a replay on another stream than the last one waits for it.
    """

    def __init__(self, model: nn.Module, capture: Capture = capture_cuda_graph) -> None:
        self.model = model
        self._capture = capture
        self._captured: dict[Hashable, Captured] = {}
        self._turn = threading.RLock()
        self._last: dict[torch.device, torch.cuda.Stream] = {}  # on which a replay ran

    def capture(self, example: Tensor) -> None:
        """Capture a graph for inputs like `example`."""
        with self._turn:
            self._captured[_kind(example)] = self._new(example)

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """model(x), [N, 3, H, W] -> [N, num_classes]; the result is the caller's own."""
        kind = _kind(x)
        if kind not in self._captured:
            return self.model(x)
        with self._turn:
            if x.is_cuda:
                self._wait(x.device)
            return self._replay(kind, x)

    def _wait(self, device: torch.device) -> None:
        """For the replay before, where it ran on another stream: input and output are one for all."""
        stream = torch.cuda.current_stream(device)
        last = self._last.get(device)
        if last != stream:
            if last is not None:
                stream.wait_stream(last)
            self._last[device] = stream

    def _replay(self, kind: Hashable, x: Tensor) -> Tensor:
        captured = self._captured[kind]
        captured.input.copy_(x)
        captured.replay()
        if captured.state != _state(self.model):  # looked at while the replay runs
            if trains(self.model):
                return self.model(x)
            captured = self._captured[kind] = self._new(x)
            captured.replay()
        return captured.output.clone()

    def _new(self, example: Tensor) -> Captured:
        state = _state(self.model)
        alive = [t.detach() for t in (*self.model.parameters(), *self.model.buffers())]
        if trains(self.model):
            raise ValueError("model must be in eval mode to be captured: warm-up runs would count as batches")
        with torch.inference_mode(False), torch.no_grad():  # the graph's tensors are written in later calls
            input, output, replay = self._capture(self.model, example)
            return Captured(input, output, replay, alive, state)


def graphed(model: nn.Module, example: Tensor) -> Graphed:
    """Capture the eval-mode forward pass of `model` on `example` as a CUDA graph.

    Equivalent to: `lambda x: model(x)` under `torch.no_grad()`, without the cost of launching kernels one by one.

    Args:
        model: in eval mode, on a CUDA device.
        example: [N, 3, H, W] on the same device.

    Raises:
        ValueError: the example is not on a CUDA device, or the model is in train mode.
    """
    if not example.is_cuda:
        raise ValueError(f"example must be on a CUDA device, got {example.device}")
    result = Graphed(model)
    result.capture(example)
    return result


def trains(model: nn.Module) -> bool:
    """Whether a call would count as a batch: the model, one of its BNs or a dropout is in train mode."""
    stateful = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
    return any(m.training for m in model.modules() if m is model or isinstance(m, stateful))


def _kind(x: Tensor) -> Hashable:
    device = x.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    precision = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]  # made at import
    return x.shape, x.stride(), x.dtype, x.device, autocast, precision, registry.get_backend()


def _state(model: nn.Module) -> Hashable:
    """What a replay would not see: modules, modes, settings, hooks, and where the tensors lie; looked at every call."""
    modules = list(model.modules())
    return (
        tuple(modules),
        tuple(m.training for m in modules),
        tuple(_SETTINGS[type(m)](m) for m in modules if type(m) in _SETTINGS),
        tuple((*m._forward_hooks, *m._forward_pre_hooks) for m in modules),  # ids that are never given twice
        tuple(m.__dict__.get("forward") for m in modules),
        tuple(
            (t.data_ptr(), t.dtype)
            for m in modules
            for d in (m._parameters, m._buffers)
            for t in d.values()
            if t is not None
        ),
    )
