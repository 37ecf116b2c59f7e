"""The CUDA module and the record of why it isn't there; everything else stands in pyproject.toml."""

import os
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
sys.path.insert(0, str(ROOT / "_build"))
import backend  # noqa: E402

TORCH_TARGET = "0x020b000000000000"  # 2.11: the module runs on every later torch
DEFINES = ["-DUSE_CUDA", f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]


def cuda_extension(toolkit: Path) -> dict:
    os.environ["CUDA_HOME"] = str(toolkit)  # before torch looks for it
    import torch
    from torch.utils.cpp_extension import BuildExtension, CUDAExtension, include_paths

    if torch.version.cuda is None:
        raise RuntimeError(f"torch {torch.__version__} has no CUDA: build beside a CUDA build of torch")
    known = backend.toolkit_archs(toolkit)
    targets = backend.gencode(backend.arch_list(os.environ, backend.visible_capabilities(), known))
    families = backend.conv_targets(targets)
    defines = [*DEFINES, *(f"-DRESNET_FUSED_{family.upper()}" for family in families)]
    cutlass = [flag for path in backend.cutlass_includes() for flag in ("-isystem", path)]
    cxx = [*defines, "-O2", "-fvisibility=hidden", f'-DRESNET_FUSED_ARCHS="{",".join(targets)}"']
    # NDEBUG: without it ptxas serialises CUTLASS's wgmma
    nvcc = [*defines, "-O3", "-DNDEBUG", "--expt-relaxed-constexpr", *cutlass]
    if os.environ.get("RESNET_FUSED_WERROR") == "1":
        system = [flag for path in include_paths() for flag in ("-isystem", path)]
        cxx += [*system, "-Wall", "-Wextra", "-Werror"]
        nvcc += [*system, "-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra,-Werror"]
        nvcc += ["-Xptxas=--warn-on-spills,--warning-as-error"]

    class BuildExt(BuildExtension):
        """Compiles a family's convolutions for its own targets only."""

        def build_extension(self, ext):
            flags = ext.extra_compile_args
            options = {"output_dir": self.build_temp, "include_dirs": ext.include_dirs, "depends": ext.depends}
            for family, names in families.items():
                own = flags | {"nvcc": [*flags["nvcc"], *(targets[name] for name in names)]}
                files = sources(f"conv_bn_act/{family}_*.cu")
                ext.extra_objects += self.compiler.compile(files, extra_postargs=own, **options)
            ext.extra_compile_args = flags | {"nvcc": [*flags["nvcc"], *targets.values()]}
            super().build_extension(ext)

    extension = CUDAExtension(
        "resnet_fused._C",
        ["csrc/module.cpp", *sources("*.cu")],
        depends=sources("**/*.[ch]*"),
        extra_compile_args={"cxx": cxx, "nvcc": nvcc},
    )
    return {"ext_modules": [extension], "cmdclass": {"build_py": BuildPy, "build_ext": BuildExt}}


def sources(pattern: str) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").glob(pattern))]


class BuildPy(build_py):
    """Records why `_C` was not compiled, and clears away one that an earlier build left in the tree."""

    def run(self):
        super().run()
        package = (ROOT if self.editable_mode else Path(self.build_lib)) / "resnet_fused"
        reason = package / "_build_reason.txt"
        if backend.not_compiled is None:
            reason.unlink(missing_ok=True)
            return
        reason.write_text(backend.not_compiled + "\n")
        for stale in package.glob(f"_C*.{sys.implementation.cache_tag}-*.so"):
            stale.unlink()


setup(**(cuda_extension(backend.toolkit) if backend.toolkit else {"cmdclass": {"build_py": BuildPy}}))
