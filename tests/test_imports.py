"""models -> layers -> ops -> dispatch -> backends: nothing imports to the left; backends have names below ops."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import resnet_fused
from resnet_fused.dispatch import registry

PACKAGE = Path(resnet_fused.__file__).parent
RANKS = [
    {"__main__"},
    {"cli"},
    {"reproduce"},
    {"analysis"},
    {"evaluation", "doctor"},
    {"bench", "report", "train", "__init__"},
    {"testing", "explain", "tune", "info", "deploy", "fuse", "timm_models"},
    {"graphs"},
    {"models"},
    {"layers", "fetch", "tables"},
    {"ops"},
    {"dispatch"},
    {"backends"},
]
STANDALONE = {"_numpy", "_version"}  # imports nothing of the package
NAMES = {*registry.BACKENDS} - {"cuda"}  # "cuda" is PyTorch's name of a device, too
VERSIONS = {"info.py", "bench/conditions.py"}  # say which version of triton and cudnn there is


def rank(part: str) -> int:
    return next(i for i, names in enumerate(RANKS) if part in names)


def at_run_time(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those that only a type checker sees."""
    yield tree
    if not (isinstance(tree, ast.If) and getattr(tree.test, "id", None) == "TYPE_CHECKING"):
        for child in ast.iter_child_nodes(tree):
            yield from at_run_time(child)


def backends_named(source: str) -> set[str]:
    """The backends that code, not documentation, names."""
    nodes = list(ast.walk(ast.parse(source)))
    found = {n.value for n in nodes if isinstance(n, ast.Constant) and n.value in NAMES}
    modules = [n.module or "" for n in nodes if isinstance(n, ast.ImportFrom)]
    modules += [alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names]
    return found | {part for m in modules for part in m.split(".") if part in NAMES or "backends" in m.split(".")}


def imported_parts(source: str, depth: int) -> set[str]:
    """First-level parts of the package that a module `depth` folders down imports."""
    parts = set()
    for node in at_run_time(ast.parse(source)):
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


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_backends_have_names_in_dispatch_and_backends_alone(path):
    relative = path.relative_to(PACKAGE)
    if relative.parts[0] not in ("dispatch", "backends") and str(relative) not in VERSIONS:
        assert not backends_named(path.read_text())


@pytest.mark.parametrize(
    "source", ['if name == "triton":\n    pass', "from ..backends import cuda", "from .backends.cuda import kernels"]
)
def test_a_backend_by_name_is_caught(source):
    assert backends_named(source)


@pytest.mark.parametrize(
    "part, source, depth",
    [
        ("dispatch", "from ..ops import conv_bn_act", 1),
        ("ops", "from ..layers import run", 1),
        ("backends", "from ...dispatch import registry", 2),
        ("layers", "import resnet_fused.models", 0),
        ("fetch", "from . import models", 0),
    ],
)
def test_an_arrow_turned_round_is_caught(part, source, depth):
    assert violations(part, source, depth)
