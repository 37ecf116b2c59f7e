"""Build the CUDA extension for GPUs that need not be there: warnings are errors; registers, spills, shared memory, MMA.

    python tests/aot_cuda.py 8.0 9.0a
    python tests/aot_cuda.py "8.0+PTX 9.0a+PTX" --readable-ptx --wheels wheels  # one build

Exits with 1 where a kernel spills, where ptxas serialises wgmma (C7510) or ignores setmaxnreg (C7508), where a
convolution has no tensor core instruction (HGMMA on sm_90a, HMMA elsewhere and in the stem), or where fewer of its
blocks share a multiprocessor than planner.h says, or more on sm_80 and sm_90a, from which the planner's table is.
"""

import argparse
import ctypes
import os
import re
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import conv_planner
from triton import knobs

ROOT = Path(__file__).parents[1]
PTXAS_NOTES = {"C7508": "setmaxnreg is ignored", "C7510": "wgmma is serialised"}
MOST_MIB = 30
KINDS = ("ConvUniversal", "GemmUniversal", "ImplicitGemmConvolution")
MATRIX_INSTRUCTIONS = {
    "ConvUniversal": "HGMMA.",
    "GemmUniversal": "HGMMA.",
    "ImplicitGemmConvolution": "HMMA.",
    "stem_kernel": "HMMA.",
}


def cuobjdump(*args: str | Path) -> str:
    tools = Path(knobs.nvidia.cuobjdump.path).parent  # it looks for nvdisasm on PATH
    environ = os.environ | {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run([tools / "cuobjdump", *args], env=environ, capture_output=True, text=True, check=True).stdout


def complaints(log: str) -> list[str]:
    """What ptxas notes without calling it a warning."""
    return [f"{note}: {meaning}" for note, meaning in PTXAS_NOTES.items() if f"({note})" in log]


def by_arch(dump: str) -> dict[str, str]:
    """What cuobjdump says of each target ("sm_90a")."""
    _, *parts = re.split(r"^arch = (\S+)$", dump, flags=re.MULTILINE)
    found: dict[str, str] = {}
    for arch, part in zip(parts[::2], parts[1::2], strict=True):
        found[arch] = found.get(arch, "") + part
    return found


def usage(dump: str) -> dict[str, dict[str, int]]:
    """REG, STACK, SHARED (static, in bytes) and LOCAL of every kernel in `cuobjdump --dump-resource-usage`."""
    found = re.findall(r"Function (\S+):\s*\n(.*)", dump)
    return {name: {k: int(v) for k, v in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", line)} for name, line in found}


def tensor_cores(sass: str) -> dict[str, set[str]]:
    """The matrix instructions in every kernel of `cuobjdump -sass`."""
    _, *parts = re.split(r"Function : (\S+)", sass)
    return {
        name: set(re.findall(r"\bH(?:G)?MMA\.\S+", body)) for name, body in zip(parts[::2], parts[1::2], strict=True)
    }


def kind(name: str) -> str | None:
    """The convolution's kernel class, or None for another kernel."""
    return next((k for k in KINDS if k in name), None)


def tile(name: str) -> tuple[int, int]:
    """Rows and columns of a convolution's tile, from its mangled name: in CuTe's the second may refer to the first."""
    tuples = r"TmaWarpSpecialized\w*?IJNS\w+?_ILi(\d+)EEE(?:NS\w+?_ILi(\d+)EEE|S\w+?_)"
    rows, columns = (re.search(r"GemmShapeILi(\d+)ELi(\d+)E", name) or re.search(tuples, name)).groups()
    return int(rows), int(columns or rows)


def label(name: str) -> str:
    """A mangled kernel's class and, of a convolution, its tile."""
    if kind(name) is None:
        return re.search(r"\d+([a-z_]+_kernel)", name)[1]
    return "{} of {}x{}".format(kind(name), *tile(name))


def residency(planner: ctypes.CDLL, arch: str, name: str, registers: int, mma: set[str]) -> tuple[int, int]:
    """Blocks that share a multiprocessor: by the built kernel's registers, and by the planner's table."""
    major, minor = re.match(r"sm_(\d+)(\d)", arch).groups()
    itemsize = 4 if any("TF32" in m for m in mma) else 2
    kernel = (kind(name) == "ConvUniversal", itemsize, *tile(name))
    built, planned = (planner.host_conv_resident(*kernel, r, int(major), int(minor)) for r in (registers, 0))
    return built, planned


def check(library: Path, log: str) -> int:
    """Print every kernel of a built `_C`; how many things are wrong."""
    wrong = complaints(log)
    planner = conv_planner.load(library.parent)
    sass = by_arch(cuobjdump("-sass", library))
    for arch, dump in by_arch(cuobjdump("--dump-resource-usage", library)).items():
        cores = tensor_cores(sass[arch])
        print(arch)
        for name, used in usage(dump).items():
            spilled = used["STACK"] + used["LOCAL"]
            mma = cores.get(name, set())
            line = f"{label(name):40} {used['REG']:3} registers, {spilled} B spilled, {used['SHARED']} B static shared"
            print(line, *sorted(mma), sep=", ")
            expected = MATRIX_INSTRUCTIONS.get(kind(name) or label(name))
            if expected is not None and not any(m.startswith(expected) for m in mma):
                wrong.append(f"{arch}: {label(name)} has no {expected[:-1]}")
            if kind(name) in ("ConvUniversal", "ImplicitGemmConvolution"):
                built, planned = residency(planner, arch, name, used["REG"], mma)
                if built < planned or (built > planned and arch in ("sm_80", "sm_90a")):
                    wrong.append(
                        f"{arch}: {built} blocks of {label(name)} share a multiprocessor, planned are {planned}"
                    )
            if spilled:
                wrong.append(f"{arch}: {label(name)} spills {spilled} bytes")
    for message in wrong:
        print(f"<- {message}")
    return len(wrong)


def build(archs: str, folder: Path, readable_ptx: bool) -> tuple[Path, str]:
    """The built library and the log."""
    asked = {"RESNET_FUSED_FORCE_CUDA": "1", "RESNET_FUSED_WERROR": "1", "TORCH_CUDA_ARCH_LIST": archs}
    if readable_ptx:
        asked["NVCC_APPEND_FLAGS"] = "-Xfatbin --compress=false"
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps", "-w", folder, ROOT]
    run = subprocess.run(command, env=os.environ | asked, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if run.returncode:
        sys.exit(run.stdout)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.startswith("resnet_fused/_C."))
        return Path(archive.extract(name, folder)), run.stdout


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("archs", nargs="+", help="builds, one after the other; each is a TORCH_CUDA_ARCH_LIST")
    parser.add_argument("--readable-ptx", action="store_true", help="leave the fat binaries uncompressed")
    parser.add_argument("--wheels", type=Path, help="a folder that keeps a wheel of each build")
    args = parser.parse_args(argv)
    failures = 0
    for archs in args.archs:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) if args.wheels is None else args.wheels / archs.replace(" ", "_")
            start = time.perf_counter()
            library, log = build(archs, folder, args.readable_ptx)
            seconds, size = time.perf_counter() - start, library.stat().st_size / 2**20
            print(f"{archs}: built in {seconds:.0f} s, {size:.1f} MiB")
            if size > MOST_MIB * len(archs.split()):
                failures += 1
                print(f"<- an architecture takes {MOST_MIB} MiB at most")
            failures += check(library, log)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
