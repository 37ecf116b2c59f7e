"""Other engines for the CPU on the exported model, with PyTorch's threads: ONNX Runtime and OpenVINO."""

import copy
import functools
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..dispatch.registry import BackendUnavailable
from .export import export
from .lower import computed_in

_CORE_LOCK = threading.Lock()
SHAPES = 4  # compiled for each, each with weights of its own
Run = Callable[[Tensor], Tensor]
Engine = Callable[[nn.Module, Tensor], Run]


def onnxruntime(model: nn.Module, example: Tensor) -> Run:
    """The model in eval mode for any N; float32.

    Raises:
        BackendUnavailable: a package is missing, or the device or the dtype is not served.
    """
    ort = _module("onnxruntime", example)
    if (dtype := computed_in(model, example)) != torch.float32:
        raise BackendUnavailable(f"ONNX Runtime's CPU convolutions have no {dtype}")
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        session = ort.InferenceSession(str(_onnx(model, example, folder)), options)
    (name,) = (given.name for given in session.get_inputs())
    return lambda x: torch.from_numpy(session.run(None, {name: x.contiguous().numpy()})[0])


def openvino(model: nn.Module, example: Tensor) -> Run:
    """The model in eval mode, compiled anew for a new shape of x; in half precision the float32 model computed in that.

    Raises:
        BackendUnavailable: as `onnxruntime`.
    """
    ov = _module("openvino", example)
    precisions = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
    if (dtype := computed_in(model, example)) not in precisions:
        raise BackendUnavailable(f"OpenVINO has no {dtype}")
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": precisions[dtype],
        "PERFORMANCE_HINT": "LATENCY",
    }
    with _CORE_LOCK:
        core = _core(ov)
    with tempfile.TemporaryDirectory() as folder:
        path = _onnx(model, example, folder)
        read = core.read_model(path.read_bytes())
    kept: dict[torch.Size, Callable] = {}

    def run(x: Tensor) -> Tensor:
        if len(x) == 0:  # OpenVINO's pooling refuses it
            return run(x.new_zeros(1, *x.shape[1:]))[:0]
        if x.shape not in kept:
            while len(kept) >= SHAPES:
                del kept[next(iter(kept))]
            read.reshape(list(x.shape))
            kept[x.shape] = core.compile_model(read, "CPU", settings)
        return torch.from_numpy(kept[x.shape](_wide(x).contiguous().numpy())[0]).to(dtype)

    return run


ENGINES: dict[str, Engine] = {"onnxruntime": onnxruntime, "openvino": openvino}


def _module(name: str, example: Tensor) -> Any:
    if example.device.type != "cpu":
        raise BackendUnavailable(f"{name} serves the CPU here, the example is on {example.device}")
    try:
        for needed in ("onnx", "onnxscript", name):
            module = __import__(needed)
    except ImportError as error:
        raise BackendUnavailable(f'{needed} does not load ({error}): pip install "resnet_fused[peers]"') from None
    return module


@functools.cache
def _core(ov: Any) -> Any:
    """One for the process: each gives the thread a stack for signals, and of two the last to go leaves a freed one."""
    return ov.Core()


def _onnx(model: nn.Module, example: Tensor, folder: str) -> Path:
    model = copy.deepcopy(model).float()
    return export(model, _wide(example).contiguous(), Path(folder) / "model.onnx")


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.is_floating_point() else x  # bytes are normalised in the model
