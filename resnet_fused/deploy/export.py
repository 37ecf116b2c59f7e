"""A model as a file that runs without this package."""

import contextlib
import copy
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..dispatch import registry
from ..dispatch.store import atomic_write
from ..graphs import trains


def export(model: nn.Module, example: Tensor, path: str | os.PathLike) -> Path:
    """Write the eval-mode model as plain PyTorch's graph, or its weights, in the format that the suffix names.

    `.onnx`         ONNX, by torch.onnx (needs onnx and onnxscript): plain Conv, Relu and Add nodes, BN folded
    `.aoti.pt2`     compiled by AOTInductor for the example's device: `torch._inductor.aoti_load_package(path)`
    `.pt2`          torch.export's program: `torch.export.load(path).module()`
    `.safetensors`  the state_dict alone, contiguous

    Args:
        model: in eval mode, of this package or another.
        example: [N, C, H, W] on the model's device; in the file N may be any number, H and W are the example's.
        path: is replaced as a whole, or not at all.

    Returns:
        The path.

    Raises:
        ValueError: another suffix, a model in train mode, or weights that are not finite.
        ImportError: what the format needs is missing; the message names it.
    """
    path = Path(path)
    write = next((write for suffix, write in FORMATS.items() if path.name.endswith(suffix)), None)
    if write is None:
        raise ValueError(f"path must end in one of {', '.join(FORMATS)}, got {path.name!r}")
    check(model, example, "exported")
    if not path.parent.is_dir():
        raise ValueError(f"path's folder {str(path.parent)!r} is not there")
    with registry.backend("auto"), torch.no_grad():  # a forced backend's operators would need this package
        write(model, example, path)
    return path


def check(model: nn.Module, example: Tensor, done: str) -> None:
    """What `deploy` and `export` refuse; done: "deployed" or "exported"."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be an nn.Module, got {type(model).__name__}")
    if not isinstance(example, Tensor):
        raise ValueError(f"example must be a tensor [N, C, H, W], got {type(example).__name__}")
    if trains(model):
        raise ValueError(f"model is in train mode; call model.eval() before it is {done}")
    state = (*model.named_parameters(), *model.named_buffers())
    broken = [name for name, t in state if not t.is_meta and t.is_floating_point() and not t.isfinite().all()]
    if broken:
        more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        raise ValueError(f"model's {broken[0]}{more} is not finite: such a model is not {done}")


def program(model: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    """torch.export's, for any N."""
    from torch.fx.experimental.symbolic_shapes import is_concrete_int  # it imports sympy

    found = torch.export.export(model, (_twice(example),), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    given = next(n for n in found.graph.nodes if n.name in found.graph_signature.user_inputs)
    if is_concrete_int(given.meta["val"].shape[0]):
        raise ValueError("model fixes the number of images (it makes an int of it): its graph serves no other")
    return found


def _onnx(model: nn.Module, example: Tensor, path: Path) -> None:
    for package in ("onnx", "onnxscript"):
        _need(package)
    found = torch.onnx.export(model, (_twice(example),), dynamo=True, dynamic_shapes=({0: "N"},), verbose=False)
    assert found is not None
    with atomic_write(path, "wb") as file:
        file.write(found.model_proto.SerializeToString())


def _twice(example: Tensor) -> Tensor:
    """N of at least two: torch.export takes one for a constant."""
    return torch.cat([example, example]) if len(example) == 1 else example


def _pt2(model: nn.Module, example: Tensor, path: Path) -> None:
    model = copy.deepcopy(model)
    for t in (*model.parameters(), *model.buffers()):
        t.data = t.data.contiguous()  # torch.export.save warns of others
    found = program(model, example)
    with _beside(path) as partial:
        torch.export.save(found, partial)


def _aoti(model: nn.Module, example: Tensor, path: Path) -> None:
    found = program(model, example)
    with _beside(path) as partial:
        torch._inductor.aoti_compile_and_package(found, package_path=str(partial))


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A file of the same suffix, which takes the path's place when the block ends well."""
    partial = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _safetensors(model: nn.Module, example: Tensor, path: Path) -> None:
    _need("safetensors")
    from safetensors.torch import save

    state = {name: t.detach().contiguous().clone() for name, t in model.state_dict().items()}
    with atomic_write(path, "wb") as file:
        file.write(save(state))


def _need(package: str) -> None:
    try:
        __import__(package)
    except ImportError as error:
        raise ImportError(
            f'this format needs {package}, which does not load ({error}): pip install "resnet_fused[export]"'
        ) from None


FORMATS: dict[str, Callable[[nn.Module, Tensor, Path], Any]] = {
    ".onnx": _onnx,
    ".aoti.pt2": _aoti,
    ".pt2": _pt2,
    ".safetensors": _safetensors,
}
