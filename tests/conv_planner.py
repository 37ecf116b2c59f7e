"""csrc/conv_bn_act/planner.h, compiled for the CPU."""

import ctypes
import subprocess
from pathlib import Path

SOURCE = Path(__file__).parent / "host_cuda/conv_planner.cpp"


def load(folder: Path) -> ctypes.CDLL:
    """The library, built in this folder."""
    path = folder / "planner.so"
    subprocess.run(["g++", "-shared", "-fPIC", "-O1", "-std=c++17", "-Wall", "-Werror", SOURCE, "-o", path], check=True)
    library = ctypes.CDLL(str(path))
    library.host_conv_plans.restype = library.host_why_not_plan.restype = ctypes.c_char_p
    return library
