"""The build: when CUDA is compiled, for what, what the package says without it, and what sdist and wheel carry."""

import importlib
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import aot_cuda
import backend
import pytest
import torch

from resnet_fused.backends.cuda import extension

ROOT = Path(__file__).parents[1]
TOOLKIT = Path("/cuda")


@pytest.mark.parametrize(
    "environ, toolkit, capabilities, reason",
    [
        ({}, TOOLKIT, [(9, 0)], None),
        ({"TORCH_CUDA_ARCH_LIST": "8.0"}, TOOLKIT, [], None),
        ({"RESNET_FUSED_FORCE_CUDA": "1"}, TOOLKIT, [], None),
        ({}, TOOLKIT, [], "no GPU"),
        ({}, None, [(9, 0)], "no CUDA toolkit"),
        ({"RESNET_FUSED_FORCE_CUDA": "1"}, None, [(9, 0)], "no CUDA toolkit"),
        ({"RESNET_FUSED_FORCE_CUDA": "0", "TORCH_CUDA_ARCH_LIST": "8.0"}, TOOLKIT, [(9, 0)], "FORCE_CUDA=0"),
    ],
)
def test_when_cuda_is_compiled(environ, toolkit, capabilities, reason):
    why_not = backend.why_not_cuda(environ, toolkit, capabilities)
    assert why_not is None if reason is None else reason in why_not


@pytest.fixture
def toolkit(tmp_path):
    """A toolkit whose nvcc names its root as the real one does."""
    root = tmp_path / "cuda-13.0"
    for folder in ("bin", "include"):
        (root / folder).mkdir(parents=True)
    (root / "include/cuda_runtime.h").touch()
    script(root / "bin/nvcc", f'echo "#\\$ TOP={root}/bin/.." >&2')
    return root


def script(path: Path, body: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def test_the_toolkit_behind_a_wrapper(toolkit, tmp_path):
    script(tmp_path / "wrapper/nvcc", f'exec {toolkit}/bin/nvcc "$@"')
    assert backend.find_toolkit({"PATH": str(tmp_path / "wrapper")}) == toolkit


def test_the_toolkit_behind_a_link(toolkit, tmp_path):
    (tmp_path / "links").mkdir()
    (tmp_path / "links/nvcc").symlink_to(toolkit / "bin/nvcc")
    assert backend.find_toolkit({"PATH": str(tmp_path / "links")}) == toolkit


def test_cuda_home_is_obeyed(toolkit, tmp_path):
    assert backend.find_toolkit({"CUDA_HOME": str(toolkit), "PATH": ""}) == toolkit
    assert backend.find_toolkit({"CUDA_HOME": str(tmp_path), "PATH": str(toolkit / "bin")}) is None


@pytest.mark.parametrize(
    "environ, capabilities, known, archs",
    [
        ({}, [], "80 86 90 100 120 121", ["8.0+PTX", "9.0a", "10.0", "12.0"]),
        ({}, [], "75 80 90", ["8.0+PTX", "9.0a"]),
        ({}, [(9, 0), (8, 6), (9, 0)], "80 86 90", ["8.6", "9.0a"]),
        ({"TORCH_CUDA_ARCH_LIST": "8.0;9.0a 10.0+PTX"}, [(9, 0)], "80 90", ["8.0", "9.0a", "10.0+PTX"]),
    ],
)
def test_what_is_compiled_for(environ, capabilities, known, archs):
    assert backend.arch_list(environ, capabilities, [f"compute_{number}" for number in known.split()]) == archs


def test_the_toolkit_says_what_it_compiles_for(toolkit):
    script(toolkit / "bin/nvcc", "echo compute_80; echo compute_90")
    assert backend.toolkit_archs(toolkit) == ["compute_80", "compute_90"]


def test_nvcc_flags(capsys):
    assert backend.gencode(["8.0+PTX", "9.0a+PTX"]) == {
        "sm_80": "-gencode=arch=compute_80,code=sm_80",
        "compute_80": "-gencode=arch=compute_80,code=compute_80",
        "sm_90a": "-gencode=arch=compute_90a,code=sm_90a",
        "compute_90a": "-gencode=arch=compute_90a,code=compute_90a",
    }
    with pytest.raises(ValueError, match="TORCH_CUDA_ARCH_LIST.*'Hopper'"):
        backend.gencode(["Hopper"])
    assert set(backend.gencode(["7.5+PTX", "8.6"])) == {"sm_86"}
    assert "7.5+PTX is left out, the kernels need 8.0 or later" in capsys.readouterr().out
    with pytest.raises(ValueError, match="a capability of 8.0 or later, got '7.0 7.5'"):
        backend.gencode(["7.0", "7.5"])


def test_which_convolutions_are_compiled_for_what():
    targets = ["sm_80", "compute_80", "sm_90a", "compute_90a", "sm_90", "sm_100f"]
    assert backend.conv_targets(targets) == {
        "sm80": ["sm_80", "compute_80", "sm_90", "sm_100f"],
        "sm90a": ["sm_90a", "compute_90a"],
    }
    assert backend.conv_targets(["sm_90a"]) == {"sm90a": ["sm_90a"]}


def test_what_ptxas_and_cuobjdump_say_is_read():
    note = "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized"
    assert aot_cuda.complaints(note) == ["C7510: wgmma is serialised"] and not aot_cuda.complaints("C7510")
    dump = " Function f:\n  REG:80 STACK:8 SHARED:1024 LOCAL:0 CONSTANT[0]:2304\n Function g:\n  REG:9 STACK:0\n"
    assert aot_cuda.usage(dump) == {"f": dict(REG=80, STACK=8, SHARED=1024, LOCAL=0), "g": dict(REG=9, STACK=0)}
    sass = "Function : f\n HGMMA.64x64x16.F32.BF16 R24\n Function : g\n FFMA R1\n"
    assert aot_cuda.tensor_cores(sass) == {"f": {"HGMMA.64x64x16.F32.BF16"}, "g": set()}
    parts = aot_cuda.by_arch("Fatbin elf code:\narch = sm_80\nf\narch = sm_90a\ng\narch = sm_80\nh\n")
    assert {arch: part.split() for arch, part in parts.items()} == {"sm_80": ["f", "h"], "sm_90a": ["g"]}


@pytest.mark.parametrize(
    "name, tile",
    [
        (
            "23ImplicitGemmConvolutionI22ImplicitGemmMultistageINS_4gemm9GemmShapeILi128ELi64ELi32EEENS4",
            (128, 64),
        ),
        ("13ConvUniversalI36KernelImplicitTmaWarpSpecializedSm90ELi1EEENSB_IJNSC_ILi64EEESH_NSB_IJSH_EEEE", (64, 64)),
        ("13ConvUniversalI36KernelImplicitTmaWarpSpecializedSm90ELi1EEENSB_IJNSC_ILi128EEENSC_ILi64EEENSB", (128, 64)),
        ("13GemmUniversalI35KernelTmaWarpSpecializedCooperativeEEENS5_IJNSA_ILi128EEESF_NSA_ILi64EEEEEE", (128, 128)),
    ],
)
def test_a_kernels_name_tells_its_tile(name, tile):
    assert aot_cuda.tile(name) == tile


@pytest.mark.parametrize(
    "archs, capability, runs",
    [
        (["sm_80"], (8, 0), True),
        (["sm_80"], (8, 9), True),
        (["sm_86"], (8, 0), False),
        (["sm_80"], (9, 0), False),
        (["sm_90a"], (9, 0), True),
        (["sm_90a"], (10, 0), False),
        (["sm_100f"], (10, 3), True),
        (["sm_90"], (10, 0), False),
        (["compute_80"], (12, 0), True),
        (["compute_80"], (7, 5), False),
        (["compute_90a"], (10, 0), False),
        (["sm_80", "compute_80", "sm_90a"], (10, 0), True),
    ],
)
def test_which_devices_run_it(archs, capability, runs):
    reason = extension.device_mismatch(archs, capability)
    assert (reason is None) == runs
    if not runs:
        assert f"TORCH_CUDA_ARCH_LIST={capability[0]}.{capability[1]} " in reason


def test_which_pytorch_runs_it():
    assert extension.cuda_mismatch("13.0", "13.2") is None
    assert "compiled for CUDA 13.0, PyTorch is built for CUDA 12.8" in extension.cuda_mismatch("13.0", "12.8")
    assert extension.torch_mismatch("2.11.0", "13.0", None) is None
    assert "without CUDA" in extension.torch_mismatch("2.11.0+cpu", None, None)
    assert "ROCm" in extension.torch_mismatch("2.11.0", None, "7.1")


def test_another_cuda_runtime_is_named():
    message = "libcudart.so.13: cannot open shared object file: No such file or directory"
    assert "compiled for CUDA 13, PyTorch is built for CUDA 12.8" in extension.load_failure(message, "12.8")
    assert "failed to load (undefined symbol: f)" in extension.load_failure("undefined symbol: f", "12.8")


def test_off_the_gpu_there_is_a_reason():
    assert "the tensor is on cpu" in extension.unavailable("cpu")
    if not torch.cuda.is_available():
        assert extension.unavailable("cuda", 0)
    info = extension.build_info()
    assert set(info) in ({"reason"}, {"cuda", "torch", "torch_target", "archs", "compiler"})


@pytest.mark.skipif(torch.version.cuda is None, reason="a PyTorch without CUDA does not look for the module")
def test_a_module_that_does_not_load_is_a_reason(tmp_path, monkeypatch):
    for name in ("broken_module", "recorded", "tree"):
        (tmp_path / name).mkdir()
        shutil.copy(ROOT / "resnet_fused/backends/cuda/extension.py", tmp_path / name)
    (tmp_path / f"broken_module/_C{importlib.machinery.EXTENSION_SUFFIXES[0]}").write_bytes(b"not a library")
    (tmp_path / "recorded/_build_reason.txt").write_text("the compiler was on strike\n")
    monkeypatch.syspath_prepend(tmp_path)
    broken, recorded, tree = (importlib.import_module(f"{n}.extension") for n in ("broken_module", "recorded", "tree"))
    assert "failed to load" in broken.unavailable("cuda", 0)
    assert "failed to load" in broken.build_info()["reason"]
    assert "the compiler was on strike" in recorded.unavailable("cuda", 0)
    assert "never built" in tree.unavailable("cuda", 0)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the project to build in."""
    ignored = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info", "*.so", "results")
    return Path(shutil.copytree(ROOT, tmp_path_factory.mktemp("checkout") / "project", ignore=ignored))


def build(checkout: Path, hook: str, out: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    code = f"import sys; sys.path.insert(0, '_build'); import backend; backend.{hook}(sys.argv[1])"
    environ = {k: v for k, v in os.environ.items() if k not in ("TORCH_CUDA_ARCH_LIST", "CUDA_HOME")} | environ
    return subprocess.run(
        [sys.executable, "-c", code, str(out)], cwd=checkout, env=environ, capture_output=True, text=True
    )


def read_wheel(folder: Path) -> tuple[str, list[str], str]:
    """Its file name, the names in it, and the reason it records."""
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        return path.name, wheel.namelist(), wheel.read("resnet_fused/_build_reason.txt").decode()


def test_the_sdist_carries_the_sources_and_builds_elsewhere(checkout, tmp_path):
    assert build(checkout, "build_sdist", tmp_path).returncode == 0
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
        sdist.extractall(tmp_path / "elsewhere", filter="data")
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert sources | {"_build/backend.py", "setup.py", "pyproject.toml"} <= names
    assert not [name for name in names if name.endswith((".so", "_build_reason.txt"))]

    (unpacked,) = (tmp_path / "elsewhere").iterdir()
    result = build(unpacked, "build_wheel", tmp_path, RESNET_FUSED_FORCE_CUDA="0")
    assert result.returncode == 0, result.stderr
    assert "installing without its CUDA kernels: RESNET_FUSED_FORCE_CUDA=0 was set" in result.stdout
    name, names, reason = read_wheel(tmp_path)
    assert name.endswith("-py3-none-any.whl")
    assert {"resnet_fused/backends/cuda/extension.py", "resnet_fused/models/resnet.py"} <= set(names)
    assert not [name for name in names if not name.startswith("resnet_fused")]
    assert reason == "RESNET_FUSED_FORCE_CUDA=0 was set\n"


def test_a_failed_compile_installs_without_cuda(checkout, toolkit, tmp_path):
    environ = {"CUDA_HOME": str(toolkit), "TORCH_CUDA_ARCH_LIST": "nonsense"}
    result = build(checkout, "build_wheel", tmp_path, **environ)
    assert result.returncode == 0, result.stderr
    name, _, reason = read_wheel(tmp_path)
    assert name.endswith("-py3-none-any.whl")
    assert reason.startswith("compiling them failed (")

    forced = build(checkout, "build_wheel", tmp_path, RESNET_FUSED_FORCE_CUDA="1", **environ)
    assert forced.returncode != 0


def test_forced_without_a_toolkit_says_so(checkout, tmp_path):
    result = build(checkout, "build_wheel", tmp_path, RESNET_FUSED_FORCE_CUDA="1", CUDA_HOME=str(tmp_path))
    assert result.returncode == 1
    assert result.stderr.strip().startswith("RESNET_FUSED_FORCE_CUDA=1, but no CUDA toolkit was found")


def test_torch_is_asked_for_only_to_compile(checkout, toolkit, monkeypatch):
    monkeypatch.chdir(checkout)
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    for forced, asked in (("0", False), ("1", True)):
        monkeypatch.setenv("RESNET_FUSED_FORCE_CUDA", forced)
        for hook in (backend.get_requires_for_build_wheel, backend.get_requires_for_build_editable):
            for name in ("torch", "nvidia-cutlass"):
                assert any(r.startswith(name) for r in hook()) == asked
    assert not any(r.startswith("torch") for r in backend.get_requires_for_build_sdist())
