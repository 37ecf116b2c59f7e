"""Other engines for the CPU, as variants: ONNX Runtime and OpenVINO on the exported model, with PyTorch's threads."""

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from ..deploy import export
from ..dispatch import registry

Peer = Callable[[nn.Module, Tensor], Callable[[Tensor], Tensor]]


def onnxruntime(net: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    """Raises BackendUnavailable without the package, off the CPU, or for a dtype that it does not convolve in."""
    _on_cpu(x)
    try:
        import onnxruntime as ort
    except ImportError:
        raise registry.BackendUnavailable('onnxruntime is not installed: pip install "resnet_fused[peers]"') from None
    if x.dtype != torch.float32:
        raise registry.BackendUnavailable(f"ONNX Runtime's CPU convolutions have no {x.dtype}")
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        session = ort.InferenceSession(str(_onnx(net, x, folder)), options)
    (name,) = (given.name for given in session.get_inputs())
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def openvino(net: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    """In half precision the float32 model computed in that. Raises BackendUnavailable as `onnxruntime` does."""
    _on_cpu(x)
    try:
        import openvino as ov
    except ImportError:
        raise registry.BackendUnavailable('openvino is not installed: pip install "resnet_fused[peers]"') from None
    precision = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}[x.dtype]
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": "LATENCY",
    }
    with tempfile.TemporaryDirectory() as folder:
        source = ov.Core().read_model(_onnx(net, x, folder))
        source.reshape(list(x.shape))
        compiled = ov.Core().compile_model(source, "CPU", settings)
    return lambda x: torch.from_numpy(compiled(x.float().numpy())[0])


PEERS: dict[str, Peer] = {"onnxruntime": onnxruntime, "openvino": openvino}


def _onnx(net: nn.Module, x: Tensor, folder: str) -> Path:
    return export(copy.deepcopy(net).float(), x.float().contiguous(), Path(folder) / "model.onnx")


def _on_cpu(x: Tensor) -> None:
    if x.device.type != "cpu":
        raise registry.BackendUnavailable(f"it is measured on the CPU, this is {x.device}")
