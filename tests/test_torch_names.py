"""Every name that the package takes from PyTorch is there, those included that only a CUDA device makes it look up."""

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import resnet_fused

PACKAGE = Path(resnet_fused.__file__).parent
OWN = "torch.ops.resnet_fused"  # the package's own operators


def names(source: str) -> set[str]:
    """`torch.cuda.is_available`, from its uses and from imports."""
    return {name for name in _names(ast.parse(source)) if name.startswith("torch.") and not name.startswith(OWN)}


def _names(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Attribute):
        parts = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if isinstance(node, ast.Name):
            yield ".".join([node.id, *reversed(parts)])
            return
    if isinstance(node, ast.ImportFrom) and node.level == 0:
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
    for child in ast.iter_child_nodes(node):
        yield from _names(child)


def missing(name: str) -> str | None:
    """The first part of a name that is not there."""
    found, path = torch, "torch"
    for part in name.split(".")[1:]:
        path += f".{part}"
        if not hasattr(found, part):
            try:
                importlib.import_module(path)
            except ImportError:
                return path
        found = getattr(found, part)
    return None


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_every_name_is_there(path):
    assert [m for name in sorted(names(path.read_text())) if (m := missing(name))] == []


def test_a_missing_name_is_found():
    source = "from torch.nn import Conv5d\ndef f(x):\n    return g(torch._C._cuda_gone(x)).h, torch.cuda.Stream"
    found = names(source)
    assert found == {"torch.nn.Conv5d", "torch._C._cuda_gone", "torch.cuda.Stream"}
    assert {m for name in found if (m := missing(name))} == {"torch.nn.Conv5d", "torch._C._cuda_gone"}
