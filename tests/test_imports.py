"""models -> layers -> ops -> _registry -> backends: nothing imports to the left."""

import ast
from pathlib import Path

import pytest

import resnet_fused

PACKAGE = Path(resnet_fused.__file__).parent
RANKS = [
    {"__main__"},
    {"cli"},
    {"analysis"},
    {"evaluation"},
    {"bench", "train", "__init__"},
    {"testing", "explain", "tune"},
    {"graphs"},
    {"models"},
    {"layers"},
    {"ops"},
    {"_registry"},
    {"_trust", "_tuned"},
    {"_cudnn"},  # folds BN with a Triton kernel
    {"_cuda", "_triton", "_onednn"},
]
STANDALONE = {"_version", "_store", "fetch"}  # import nothing of the package but each other


def rank(part: str) -> int:
    return next(i for i, names in enumerate(RANKS) if part in names)


def imported_parts(source: str, depth: int) -> set[str]:
    """First-level parts of the package that a module `depth` folders down imports."""
    parts = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("resnet_fused")):
            if node.level and node.level <= depth:
                continue  # inside its own folder
            path = (node.module or "").removeprefix("resnet_fused").strip(".")
            parts |= {path.split(".")[0]} if path else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            parts |= {a.name.split(".")[1] for a in node.names if a.name.startswith("resnet_fused.")}
    return parts


def violations(part: str, source: str, depth: int) -> set[str]:
    known = set().union(*RANKS)
    parts = imported_parts(source, depth) & known - {part}
    return parts if part in STANDALONE else {p for p in parts if rank(p) <= rank(part)}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_nothing_imports_to_the_left(path):
    relative = path.relative_to(PACKAGE)
    part = relative.parts[0].removesuffix(".py")
    assert part in STANDALONE.union(*RANKS), f"{part} has no place in the order"
    assert not violations(part, path.read_text(), len(relative.parts) - 1)


@pytest.mark.parametrize(
    "part, source, depth",
    [
        ("_registry", "from .ops import conv_bn_act", 0),
        ("ops", "from ..layers import run", 1),
        ("_triton", "from .. import _registry", 1),
        ("layers", "import resnet_fused.models", 0),
        ("fetch", "from . import _registry", 0),
    ],
)
def test_an_arrow_turned_round_is_caught(part, source, depth):
    assert violations(part, source, depth)
