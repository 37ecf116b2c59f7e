"""Builds the emulator and the runtime, once for each version of their sources."""

import fcntl
import hashlib
import os
import subprocess
import tempfile
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent


def build_folder() -> Path:
    """VIRTUAL_GPU_BUILD, or a folder of the temporary ones named after the sources' digest."""
    if given := os.environ.get("VIRTUAL_GPU_BUILD"):
        return Path(given)
    digest = hashlib.sha256()
    for folder in ("emulator", "runtime"):
        for path in sorted((HERE / folder).glob("*")):
            if path.suffix in (".cpp", ".h") or path.name == "Makefile":
                digest.update(path.read_bytes())
    return Path(tempfile.gettempdir()) / f"virtual-gpu-{os.getuid()}-{digest.hexdigest()[:16]}"


def cuda_include() -> Path:
    """CUDA's headers, which Triton's wheel carries."""
    return Path(find_spec("triton").origin).parent / "backends/nvidia/include"


def build() -> Path:
    """The folder with libptxemulator.so and libcuda.so.1; workers that come at the same time wait for the first.

    Raises:
        RuntimeError: the compiler's message.
    """
    folder = build_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for part in ("emulator", "runtime"):
            command = ["make", "-s", f"-j{os.cpu_count()}", "-C", HERE / part]
            command += [f"OUT={folder}", f"CUDA_INCLUDE={cuda_include()}"]
            run = subprocess.run(command, capture_output=True, text=True)
            if run.returncode:
                raise RuntimeError(f"the virtual GPU's {part} does not build:\n{run.stderr}")
    return folder
