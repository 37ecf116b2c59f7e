"""What the documents say exists: names, arguments, commands, options, files, links; and what their examples print."""

import argparse
import ast
import contextlib
import functools
import importlib
import inspect
import io
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import resnet_fused
from resnet_fused import cli

ROOT = Path(__file__).parents[1]
PAGES = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("*.md"))
READMES = ["README.md", "README.zh-CN.md", "CONTRIBUTING.md", "benchmarks/README.md", "tests/virtual_gpu/README.md"]
DOCUMENTS = [name for name in (*READMES, *PAGES) if (ROOT / name).is_file()]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
FOLDERS = ("_build", "benchmarks", "csrc", "docs", "resnet_fused", "tests")
OTHERS = {"--benchmark-compare", "--benchmark-only", "--benchmark-save", "--no-build-isolation", "--no-deps"}


class Block(NamedTuple):
    language: str
    text: str


def blocks(name: str) -> list[Block]:
    return [Block(*found) for found in BLOCK.findall((ROOT / name).read_text())]


def spans(name: str) -> list[str]:
    """The code inside sentences."""
    prose = BLOCK.sub("", (ROOT / name).read_text())
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]


def lines(name: str) -> list[str]:
    """Every command of a document, one by one, as a shell would run it."""
    shell = [line for b in blocks(name) if b.language in ("bash", "") for line in b.text.splitlines()]
    programs = ("make ", "pip ", "pytest", "python ", "resnet-fused", "torchrun ")
    shell += [span for span in spans(name) if span.startswith(programs)]
    return [part.strip() for line in shell for part in line.split("&&")]


# Python


def resolve(path: str) -> Any:
    """The object of a dotted path; AttributeError or ImportError where there is none."""
    first, *rest = path.split(".")
    found, imported = importlib.import_module(first), first
    for part in rest:
        imported = f"{imported}.{part}"
        if not hasattr(found, part) and inspect.ismodule(found):
            importlib.import_module(imported)
        found = getattr(found, part)
    return found


def imports(tree: ast.AST) -> dict[str, str]:
    """Local name -> dotted path, of what is imported."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            found |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.asname or a.name.partition(".")[0]: a.name.partition(".")[0] for a in node.names}
            for alias in node.names:
                resolve(alias.name)
    return found


def dotted(node: ast.AST) -> str:
    """`a.b.c` of such an expression, "" of others."""
    if isinstance(node, ast.Attribute):
        before = dotted(node.value)
        return before and f"{before}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def check(source: str, known: dict[str, str]) -> None:
    """Every attribute of an import exists, and every call of one takes the arguments that it is given."""
    tree = ast.parse(source)
    known = known | imports(tree)
    for path in known.values():
        resolve(path)
    for node in ast.walk(tree):
        first, _, rest = dotted(node).partition(".")
        if rest and first in known:
            resolve(f"{known[first]}.{rest}")
        if isinstance(node, ast.Call) and (path := dotted(node.func)).partition(".")[0] in known:
            first, _, rest = path.partition(".")
            function = resolve(known[first] + (rest and f".{rest}"))
            starred = any(isinstance(a, ast.Starred) for a in node.args) or any(k.arg is None for k in node.keywords)
            if known[first].startswith("resnet_fused") and not starred:
                inspect.signature(function).bind(*node.args, **{k.arg: k.value for k in node.keywords})


@pytest.mark.parametrize("name", DOCUMENTS)
def test_python_blocks_name_what_there_is(name):
    known: dict[str, str] = {}  # a document's blocks follow one another
    for block in blocks(name):
        if block.language == "python":
            known |= imports(ast.parse(block.text))
            check(block.text, known)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_names_in_sentences_are_there(name):
    public = {n: f"resnet_fused.{n}" for n in resnet_fused.__all__} | {"resnet_fused": "resnet_fused"}
    for span in spans(name):
        try:
            tree = ast.parse(span, mode="eval").body
        except SyntaxError:
            continue
        call = tree.func if isinstance(tree, ast.Call) else tree
        if dotted(call).startswith("resnet_fused.") or (isinstance(tree, ast.Call) and dotted(call) in public):
            check(span, public)


def test_what_is_not_there_is_found():
    for source in ("resnet_fused.fuze(model)", "resnet_fused.fuse(model, raport=True)", "resnet_fused.ops.conv"):
        with pytest.raises((AttributeError, ImportError, TypeError)):
            check(source, {"resnet_fused": "resnet_fused"})
    with pytest.raises((AttributeError, ImportError)):
        check("from resnet_fused import ops, absent", {})


def printed(name: str) -> list[tuple[str, str]]:
    """(program, what it prints) of every Python block that a text block follows."""
    found = blocks(name)
    pairs = zip(found, found[1:], strict=False)
    return [(a.text, b.text) for a, b in pairs if (a.language, b.language) == ("python", "text")]


@pytest.mark.parametrize(
    "source, expected",
    [pytest.param(*pair, id=f"{name}-{i}") for name in DOCUMENTS for i, pair in enumerate(printed(name))],
)
def test_examples_print_what_stands_below_them(source, expected):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(source, "example", "exec"), {})
    assert out.getvalue() == expected


# the command line


@functools.cache
def parser() -> argparse.ArgumentParser:
    return cli._parser(list(cli.COMMANDS))


@functools.cache
def options() -> set[str]:
    """Of every command, and of the programs beside the package."""
    (commands,) = (a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    found = {o for command in commands.choices.values() for o in command._option_string_actions} | OTHERS
    programs = [*ROOT.glob("benchmarks/*.py"), *ROOT.glob("tests/*.py"), *ROOT.glob("resnet_fused/bench/*.py")]
    return found.union(*(re.findall(r'add(?:_argument|option)\(\s*"(--[\w-]+)"', p.read_text()) for p in programs))


def targets() -> set[str]:
    return set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def wrong(line: str) -> str | None:
    """What a command names that isn't there, or None."""
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words.pop(0)
    if words[:1] == ["torchrun"] and "resnet_fused" in words:
        words[: words.index("resnet_fused") + 1] = ["resnet-fused"]
    if words[:1] == ["resnet-fused"]:
        command = words[1:2]
        if command and command[0] in cli.COMMANDS and (len(words) == 2 or {"--help", "..."} & set(words)):
            return None  # no more than its name
        try:
            parser().parse_args(words[1:])
        except SystemExit:
            return f"{line}: not parsed"
    elif words[:1] == ["make"]:
        return next((f"{line}: no target {w}" for w in words[1:] if "=" not in w and w not in targets()), None)
    elif words[:1] in (["python"], ["pytest"]):
        files = (w.partition("::")[0] for w in words[1:] if w.startswith(FOLDERS))
        for word in files:
            if not (ROOT / word).exists():
                return f"{line}: no file {word}"
        given = (w.partition("=")[0] for w in words[1:] if w.startswith("--"))
        return next((f"{line}: no option {w}" for w in given if w not in options()), None)
    return None


@pytest.mark.parametrize("name", DOCUMENTS)
def test_commands_are_parsed(name):
    assert not [reason for line in lines(name) if (reason := wrong(line))]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_options_in_sentences_are_there(name):
    given = {re.match(r"--[\w-]+", span)[0] for span in spans(name) if re.match(r"--[a-z]", span)}
    assert not given - options()


@pytest.mark.parametrize(
    "line",
    [
        "resnet-fused bench --sweet traffic",
        "X=1 resnet-fused trane --recipe cifar",
        "torchrun --nproc-per-node 8 -m resnet_fused train --receipt imagenet",
        "make absent",
        "python benchmarks/absent.py",
        "python benchmarks/zoo.py --chart",
    ],
)
def test_a_wrong_command_is_found(line):
    assert wrong(line)


# files


@pytest.mark.parametrize("name", DOCUMENTS)
def test_files_and_variables_are_there(name):
    paths = [s for s in spans(name) if re.fullmatch(rf"(?:{'|'.join(FOLDERS)})/[\w./-]*", s)]
    assert not [p for p in paths if Path(p).stem != "x" and not (ROOT / p).exists()]
    files = [*(ROOT / "resnet_fused").rglob("*.py"), ROOT / "_build/backend.py", ROOT / "setup.py"]
    sources = "".join(path.read_text() for path in files)
    used = set(re.findall(r"RESNET_FUSED_[A-Z_]+", (ROOT / name).read_text()))
    assert not {v for v in used if f'"{v}"' not in sources}


@pytest.mark.parametrize("name", [n for n in DOCUMENTS if n not in PAGES])
def test_links_lead_to_files(name):
    prose = BLOCK.sub("", (ROOT / name).read_text())
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", prose) if not link.startswith("http")]
    assert not [link for link in links if not ((ROOT / name).parent / link.partition("#")[0]).exists()]


def test_the_chinese_readme_is_the_readmes():
    """Its examples and figures stand in README.md, letter by letter, and each leads to the other."""
    chinese, english = ((ROOT / name).read_text() for name in ("README.zh-CN.md", "README.md"))
    assert len(blocks("README.zh-CN.md")) > 10
    assert not [block for block in blocks("README.zh-CN.md") if block not in blocks("README.md")]
    figures = r"\d+(?:[.,]\d+)*"
    assert not set(re.findall(figures, chinese)) - set(re.findall(figures, english))
    assert not [s for s in spans("README.zh-CN.md") if s not in english and s not in resnet_fused.list_models()]
    assert "](README.zh-CN.md)" in english.partition("\n## ")[0] and "](README.md)" in chinese.partition("\n## ")[0]


# the site


def build(folder: Path, site: Path) -> subprocess.CompletedProcess:
    command = (sys.executable, "-m", "mkdocs", "build", "--strict", "-f", folder / "mkdocs.yml", "-d", site)
    return subprocess.run(command, capture_output=True, text=True)


def test_the_pages_are_built_and_load_nothing_from_elsewhere(tmp_path):
    pytest.importorskip("material", reason='pip install ".[docs]"')
    result = build(ROOT, tmp_path)
    assert result.returncode == 0, result.stderr
    pages = {str(p.relative_to(tmp_path)): p.read_text() for p in tmp_path.rglob("*.html")}
    assert {"index.html", "backends.html", "benchmarks/ZOO.html", "tests/virtual_gpu/index.html"} <= set(pages)
    for name, page in pages.items():
        assert not re.findall(r"<(?:script|img)[^>]+src=\"?(?:https?:)?//", page), name
        assert not [tag for tag in re.findall(r"<link[^>]+>", page) if "//" in tag], name
        assert "mermaid" not in page.partition("<article")[2], f"{name}: its pictures would come from elsewhere"
    assert "<table>" in pages["training.html"] and (tmp_path / "architecture.svg").is_file()


@pytest.mark.parametrize("text", ["[x](absent.md)", '--8<-- "README.md:absent"', "[x](backends.md#absent)"])
def test_a_page_that_leads_nowhere_is_not_built(text, tmp_path):
    pytest.importorskip("material", reason='pip install ".[docs]"')
    ignore = shutil.ignore_patterns("__pycache__", "*.py", "*.json")
    for folder in ("docs", "benchmarks", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=None if folder == "docs" else ignore)
    for path in (*ROOT.glob("*.md"), ROOT / "mkdocs.yml"):
        shutil.copy(path, tmp_path)
    with (tmp_path / "docs/fuse.md").open("a") as page:
        page.write(f"\n{text}\n")
    result = build(tmp_path, tmp_path / "site")
    assert result.returncode == 1 and "absent" in result.stderr
