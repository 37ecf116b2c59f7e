"""Defects planted along the path of a CUDA tensor: the tests have to turn red on the virtual GPU.

Each one changes a text of the package's source, or of the compiled PTX, and runs the tests that should notice.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import VIRTUAL

import resnet_fused
from resnet_fused.backends.cuda import extension

TESTS = Path(__file__).parent
PACKAGE = Path(resnet_fused.__file__).parent


class Defect(NamedTuple):
    name: str
    file: str  # of the package, or "PTX"
    original: str
    defect: str
    tests: str  # for pytest's -k
    capability: str = "90"  # where it is planted


DEFECTS = [
    Defect(
        "a name that torch does not have",
        "dispatch/store.py",
        "driver, cudnn = _driver_version(),",
        "driver, cudnn = torch._C._cuda_getDriverVersion(),",
        "within_budget and auto-bn-relu-torch.float16-channels_last",
    ),
    Defect(
        "no device guard",
        "backends/triton/launch.py",
        "with torch.cuda.device_of(pointers[0]):",
        "if True:",
        "second_device and conv-3x3-join",
    ),
    Defect(
        "the default stream",
        "backends/triton/launch.py",
        "stream = active.get_current_stream(device)",
        "stream = 0",
        "two_streams and triton",
    ),
    Defect(
        "a workspace in x's dtype",
        "backends/triton/batch_norm_train/gradients.py",
        "partial = torch.empty((splits, 2 + two, C), dtype=torch.float32,",
        "partial = torch.empty((splits, 2 + two, C), dtype=dy.dtype,",
        "training_within_budget and triton-bn-join",
    ),
    Defect(
        "a mask narrower than its rows",
        "backends/triton/batch_norm_train/backward.py",
        "width = tl.cdiv(C, 8)",
        "width = C // 8",
        "training_within_budget and triton-bn-10-channels",
    ),
    Defect(
        "one row too many",
        "backends/triton/batch_norm_apply.py",
        "mask = (row < M - first_row)[:, None]",
        "mask = (row <= M - first_row)[:, None]",
        "within_budget and triton-bn-none and channels_last",
    ),
    Defect(
        "an output that is not written to its last channel",
        "backends/triton/batch_norm_apply.py",
        "in_range = c < C",
        "in_range = c < C - 1",
        "within_budget and triton-bn-none and channels_last",
    ),
    Defect(
        "a pixel's row offset without the dilation",
        "backends/triton/conv/kernels.py",
        "step_h = tl.cast(stride_h, tl.int64) * DILATION_H",
        "step_h = tl.cast(stride_h, tl.int64)",
        "within_budget and triton-conv-3x3-d2 and channels_last",
    ),
    Defect(
        "a residual in any layout for cuDNN",
        "backends/cudnn/conv_bn_act.py",
        "dense(call.residual)",
        "call.residual",
        "within_budget and cudnn-conv-3x3-join and contiguous",
    ),
    Defect(
        "a check inside a capture",
        "dispatch/trust.py",
        "return _on_gpu(device) and torch.cuda.is_current_stream_capturing()",
        "return False",
        "unchecked_kernel_is_eager_inside_a_capture",
    ),
    Defect("no barrier", "PTX", "bar.sync", "// bar.sync", "training_within_budget and cuda-bn-two-bn-join"),
    Defect(
        "too few stages waited for",
        "PTX",
        "cp.async.wait_group 2",
        "cp.async.wait_group 3",
        "every_tile and float16 and shape1",
        "80",
    ),
    Defect(
        "no fence before the bulk store",
        "PTX",
        "fence.proxy.async.shared::cta;",
        " ",
        "every_tile and float16 and shape1",
    ),
    Defect(
        "wgmma not waited for",
        "PTX",
        "wgmma.wait_group.sync.aligned 0",
        "wgmma.wait_group.sync.aligned 1",
        "every_tile and float16 and shape1",
    ),
]


def run(tests, folder, planted=""):
    """The tests on the virtual GPU, with the package that lies in the folder."""
    environment = os.environ | {"PYTHONPATH": str(folder), "VIRTUAL_GPU_PLANT": planted}
    command = [sys.executable, "-m", "pytest", f"--virtual-gpu={VIRTUAL}", "-o", "addopts=", "-p", "no:cacheprovider"]
    command += ["-x", "-q", str(TESTS / "test_gpu.py"), "-k", tests]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=400)


def copy_package(folder):
    return Path(shutil.copytree(PACKAGE, folder / "resnet_fused", ignore=shutil.ignore_patterns("__pycache__")))


def met(defect):
    compiled = "cuda" in defect.tests or "every_tile" in defect.tests
    return defect.capability == VIRTUAL and not (compiled and extension.build_info().get("reason"))


@pytest.mark.parametrize("defect", [d for d in DEFECTS if d.file != "PTX"], ids=lambda d: d.name)
def test_its_text_is_there(defect):
    text = (PACKAGE / defect.file).read_text()
    assert text.count(defect.original) == 1, f"{defect.file} has no such text any more"


@pytest.mark.virtual_gpu
def test_without_a_defect_they_pass(tmp_path):
    tests = [f"({d.tests})" for d in DEFECTS if met(d)]
    if not tests:
        pytest.skip(f"none is planted at {VIRTUAL}, or none but in compiled kernels without the extension")
    copy_package(tmp_path)
    done = run(" or ".join(tests), tmp_path)
    assert done.returncode == 0, done.stdout[-2000:]


@pytest.mark.virtual_gpu
@pytest.mark.parametrize("defect", DEFECTS, ids=lambda d: d.name)
def test_it_is_caught(defect, tmp_path):
    if not met(defect):
        pytest.skip(f"it is planted at {defect.capability}, in compiled kernels where the extension is installed")
    copy, planted = copy_package(tmp_path), ""
    if defect.file == "PTX":
        planted = f"{defect.original}=>{defect.defect}"
    else:
        path = copy / defect.file
        path.write_text(path.read_text().replace(defect.original, defect.defect))
    done = run(defect.tests, tmp_path, planted)
    assert done.returncode == 1, f"{defect.name} was not caught:\n{done.stdout[-2000:]}{done.stderr[-500:]}"
    assert " failed" in done.stdout.splitlines()[-1] or " error" in done.stdout.splitlines()[-1]
