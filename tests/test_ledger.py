"""The exact ledger: its rules on single operators, ResNet-50's totals, and the largest batch that fits a memory."""

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import resnet_fused
from resnet_fused.bench import fit, floors
from resnet_fused.bench.ledger import Counting, Ledger, met, size

PACKAGE = Path(resnet_fused.__file__).parent


def count(run):
    counting = Counting(Ledger())
    with counting:
        run()
    return counting.ledger


def moved(ledger):
    return ledger.launches, ledger.read, ledger.written


def image(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype).contiguous(memory_format=torch.channels_last)


def test_every_operand_once_and_every_result_once():
    x, y = torch.randn(6, 5), torch.randn(5)
    assert moved(count(lambda: x + y)) == (1, 4 * 35, 4 * 30)
    assert moved(count(lambda: x.add_(y))) == (1, 4 * 35, 4 * 30)
    assert moved(count(lambda: x.mul_(x))) == (1, 4 * 30, 4 * 30)
    assert moved(count(lambda: x.copy_(y))) == (1, 4 * 5, 4 * 30)
    assert moved(count(lambda: x.zero_())) == (1, 0, 4 * 30)
    assert moved(count(lambda: torch._foreach_add_([x, y], 1.0))) == (1, 4 * 35, 4 * 35)


def test_views_and_allocations_are_free():
    x = torch.randn(6, 5)
    run = lambda: (x.t().reshape(5, 3, 2)[1:].detach().expand(4, 4, 3, 2), torch.empty(7), torch.empty_like(x))  # noqa: E731
    assert moved(count(run)) == (0, 0, 0)
    assert size(torch.ones(1).expand(100)) == 4


def test_batch_norm_reads_twice_in_training():
    x, vectors = image(2, 8, 4, 4), [torch.ones(8) for _ in range(4)]
    n, v = x.numel() * 4, 8 * 4
    assert count(lambda: F.batch_norm(x, *vectors, False)).read == n + 4 * v
    assert count(lambda: F.batch_norm(x, *vectors, True)).read == 2 * n + 4 * v
    x.requires_grad_()
    y = F.batch_norm(x, *vectors, True)
    ledger = count(lambda: torch.autograd.grad(y, x, torch.ones_like(y)))
    assert ledger.entries["native_batch_norm_backward"].read >= 4 * n


def test_a_convolutions_backward_reads_the_gradient_for_each_result():
    x, w = image(2, 8, 6, 6).requires_grad_(), torch.randn(4, 8, 3, 3, requires_grad=True)
    y = F.conv2d(x, w, padding=1)
    dy = torch.randn_like(y)
    ledger = count(lambda: torch.autograd.grad(y, (x, w), dy, retain_graph=True))
    results = size(x) + size(w)
    assert moved(ledger) == (2, 2 * size(dy) + results, results)
    assert moved(count(lambda: torch.autograd.grad(y, w, dy))) == (1, size(dy) + size(x), size(w))


def test_a_convolution_meets_the_pixels_of_its_stride():
    x = image(2, 8, 6, 6)
    assert met(x, (1, 1), (2, 2)) == size(x) / 4 and met(x, (3, 3), (2, 2)) == size(x)
    w = torch.randn(4, 8, 1, 1)
    assert count(lambda: F.conv2d(x, w, stride=2)).read == size(x) / 4 + size(w)


def test_the_peak_is_what_is_alive_at_once():
    def run():
        a = torch.ones(1000)
        b = a + 1
        del a
        c = b + 1
        del b
        return c + 1

    assert count(run).peak == 2 * 4000


def test_kept_for_backward_are_neither_weights_nor_their_casts():
    w, x = torch.randn(50, 30, requires_grad=True), torch.randn(7, 30)
    counting = Counting(Ledger())
    counting.set_apart((w, x))
    with counting, torch.autocast("cpu", torch.bfloat16):
        y = F.relu(F.linear(x, w))
        assert counting.kept() == 2 * 7 * 50
    del y
    assert counting.kept() == 0


def test_the_table_of_what_kernels_write_is_their_sources():
    """A kernel that stores through a function or a descriptor has `y` alone."""
    pytest.importorskip("triton")
    from resnet_fused.backends.triton import stub

    found = {}
    for path in (PACKAGE / "backends" / "triton").rglob("*.py"):
        for text in path.read_text().split("@triton.jit")[1:]:
            name = re.search(r"def (\w+)\(", text)[1]
            if name.endswith("_kernel"):
                module = ".".join(path.relative_to(PACKAGE / "backends" / "triton").with_suffix("").parts)
                full = f"{module}.{name}" if f"{module}.{name}" in stub.WRITTEN else name
                found[full] = set(re.findall(r"tl\.store\(\s*(\w+)", text.partition("\n\n\n")[0])) or {"y"}
    assert found == {name: set(written) for name, written in stub.WRITTEN.items()}


def stubbed(program, *arguments):
    """Outside Triton's interpreter, which the tests run in."""
    if not importlib.util.find_spec("triton"):
        pytest.skip("launches are counted where Triton is installed")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join([str(PACKAGE.parent), *sys.path])}
    command = [sys.executable, "-W", "ignore", *program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_resnet50s_bytes_and_launches_beside_torchvisions(tmp_path):
    """Batch 256, 16-bit: a forward pass moves 0.33 of eager's bytes in 55 launches, a train step 0.80, at most."""
    pytest.importorskip("torchvision")
    path = tmp_path / "traffic.json"
    shown = stubbed(["-m", "resnet_fused", "bench", "--suite", "traffic", "--json", path])
    report = json.loads(path.read_text())
    rows = {(row["pass"], row["variant"]): row for row in report["rows"]}
    assert (report["task"], report["batch"], report["dtype"]) == ("traffic", 256, "float16")

    def ratio(step, variant, *keys):
        ours, theirs = (sum(rows[step, v][k] for k in keys) for v in (variant, "torchvision-nhwc"))
        return ours / theirs

    assert ratio("forward", "resnet_fused", "read", "written") <= 0.33
    assert rows["forward", "resnet_fused"]["launches"] <= 55
    assert ratio("train step", "resnet_fused", "read", "written") <= 0.80
    modes = ("resnet_fused", "resnet_fused+activations", "resnet_fused+blocks")
    for variant, share in zip(modes, (1.03, 0.83, 0.35), strict=True):
        assert ratio("train step", variant, "saved") <= share
    assert 41 < rows["train step", "torchvision-nhwc"]["saved"] / 256 / 2**20 < 43
    for row in rows.values():
        assert sum(e["read"] for e in row["operators"].values()) == row["read"]
    convolutions = {n: e["launches"] for n, e in rows["forward", "resnet_fused"]["operators"].items() if "kernel" in n}
    assert sum(convolutions.values()) == 53 and convolutions["resnet_fused.conv_pool_kernel"] == 1
    assert "forward" in shown and " 0.32 " in shown


FIT = """
import functools, json, torch
from resnet_fused import models
from resnet_fused.bench import fit
budget = 400 * 2**20
step = fit.train_step = functools.cache(fit.train_step)
few = fit.measure("resnet18", budget, "bfloat16", 2, 64, torch.device("cpu"))
many = fit.measure("resnet18", budget, "bfloat16", few["chosen"]["largest_batch"] + 1, 64, torch.device("cpu"))
for chosen in (few["chosen"], many["chosen"]):
    peaks = [step(models, "resnet18", n, torch.bfloat16, 64, chosen["recompute"]).peak
             for n in (chosen["largest_batch"], chosen["largest_batch"] + 1)]
    assert peaks[0] == chosen["peak"] <= budget < peaks[1], (peaks, chosen)
print(json.dumps([few, many]))
"""


def test_the_cheapest_mode_that_fits():
    few, many = json.loads(stubbed(["-c", FIT]).splitlines()[-1])
    largest = [mode["largest_batch"] for mode in few["modes"]]
    assert largest == sorted(largest) and largest[0] < largest[1] and few["chosen"]["recompute"] is None
    assert many["fits"] and many["chosen"]["recompute"] == "activations"


def test_memory_is_read_with_its_unit():
    assert fit.memory("24GiB") == 24 * 2**30 and fit.memory("1.5 MB") == 1_500_000
    for text in ("24", "GiB", "-1GiB", "1.2.3GiB", "0MB"):
        with pytest.raises(argparse.ArgumentTypeError, match="24GiB"):
            fit.memory(text)


@pytest.mark.parametrize(
    ("scheme", "mb", "images"),
    [("unfused", 157.6, 27.7), ("epilogue apart", None, 44.8), ("fused", 52.7, 70.6), ("unfused training", 465, 9.4)],
)
def test_floors_of_resnet50_on_an_h200(scheme, mb, images):
    """Figures that were worked out by hand: batch 256, 16 bits, 4.8 TB/s and 989 TFLOP/s; thousands of images."""
    found = floors.totals("resnet50", 256, floors.DEVICES["h200"], scheme)
    assert found["gflop"] == pytest.approx(8.17, abs=0.005)
    assert mb is None or found["mb"] == pytest.approx(mb, abs=0.05 if mb < 200 else 0.5)
    assert found["images_per_s"] / 1e3 == pytest.approx(images, abs=0.05)


def test_floors_of_other_models_are_layer_by_layer():
    layers = floors.layers("resnet18", 32)
    assert len(layers) == 20 and sum(layer.joins for layer in layers) == 8
    assert sum(layer.shortcut for layer in layers) == 3 and [layer.first for layer in layers].count(True) == 1


SYNCHRONISED = """
import torch, torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from resnet_fused import resnet50
from resnet_fused.bench.ledger import Ledger, counted

dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
with counted() as counting:
    model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(resnet50()).train()
    x = torch.empty(8, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    for _ in range(2):
        model.zero_grad()
        counting.ledger = Ledger()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(x).float().square().mean()
        loss.backward()
entries = counting.ledger.entries
print(counting.ledger.launches, entries["resnet_fused.merge_ranks_kernel"].launches)
"""


def test_sync_batch_norms_launches():
    """PyTorch's own has 8 a layer over torchvision's BN: 1,000 of ResNet-50's step, with 106 collectives."""
    launches, merges = map(int, stubbed(["-c", SYNCHRONISED]).split())
    assert merges == 53 and launches <= 840  # and 102 collectives
