"""Which backend serves, how one is forced, and what is said when it can't."""

import concurrent.futures
import os
import subprocess
import sys
import threading

import pytest
import torch
from torch import nn

import resnet_fused
from resnet_fused import BackendUnavailable, explain, ops
from resnet_fused.dispatch import registry
from resnet_fused.ops.conv_bn_act import Call

X = torch.randn(2, 3, 64, 64)
V = torch.ones(3)


def python(code, **env):
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "RESNET_FUSED_BACKEND")} | env
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)


def test_auto_is_eager_on_the_cpu():
    rows = explain(resnet_fused.resnet18(), X)
    assert len(rows) == 20 + 3  # convolutions; pooling twice and the classifier
    fused = [r for r in rows if "BatchNorm2d" in r.modules]
    assert len(fused) == 20 and all(r.ran == ["eager"] for r in fused)
    assert "'auto' is eager on cpu" in fused[0].why[0]
    assert [r.layer for r in rows][:3] == ["conv1", "maxpool", "layer1.0.conv1"] and rows[-1].layer == "fc"
    assert str(rows).splitlines()[1].startswith("conv1")


def test_explain_names_op_and_backend_and_leaves_the_model_alone():
    model = resnet_fused.resnet18()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with resnet_fused.backend("eager"):
        assert explain(model, X)[0].why == ["backend 'eager' is forced"]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    model.eval()
    with resnet_fused.backend("triton"), torch.no_grad():
        rows = [r for r in explain(model, X) if "BatchNorm2d" in r.modules]
    assert [r.ran for r in rows] == [["stem: triton"], *[["conv_bn_act: triton"]] * (len(rows) - 1)]
    assert not any(r.why for r in rows)
    assert rows[2].modules == "Conv2d + BatchNorm2d + add + ReLU"


def test_explain_ends_in_a_summary_that_names_what_would_help():
    deploy, fuse = "resnet_fused.deploy(model, x)", "resnet_fused.fuse(model)"
    ours = resnet_fused.ResNet(resnet_fused.BasicBlock, [1, 1, 1, 1])
    theirs = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())

    def summary(model):
        found = explain(model, X)
        assert str(found).splitlines()[-1] == found.summary
        return found.summary

    assert summary(ours) == "0 of 12 steps fused, 3 modules beside them"  # training: nothing would help
    ours.eval(), theirs.eval()
    assert summary(ours) == "0 of 12 steps fused, 3 modules beside them"
    with torch.no_grad():
        assert 'backend("onednn") fuses' in summary(ours) and deploy in summary(ours) and fuse not in summary(ours)
        assert deploy in summary(theirs) and "onednn" not in summary(theirs)
        with resnet_fused.backend("triton"):
            assert summary(ours).startswith("12 of 12 steps fused, 2 modules beside them; ")
            assert "onednn" not in summary(ours) and fuse not in summary(ours)
            assert summary(theirs).startswith("0 of 0 steps fused, 3 modules beside them; ") and fuse in summary(theirs)


def test_a_compiled_model_is_explained_as_the_model():
    model = resnet_fused.ResNet(resnet_fused.BasicBlock, [1, 1, 1, 1]).eval()
    never = {"backend": lambda graph, inputs: pytest.fail("compiled")}
    x = X[:1, :, :32, :32]
    with torch.no_grad():
        rows = explain(model, x)
        assert explain(torch.compile(model, **never), x) == rows
        model.compile(**never)
        assert explain(model, x) == rows


def test_the_context_manager_restores_what_was_set():
    resnet_fused.set_backend("triton")
    with pytest.raises(ZeroDivisionError), resnet_fused.backend("eager"):
        assert registry.get_backend() == "eager"
        raise ZeroDivisionError
    assert registry.get_backend() == "triton"
    names = ", ".join(("auto", *registry.BACKENDS))
    for choose in (resnet_fused.set_backend, lambda n: resnet_fused.backend(n).__enter__()):
        with pytest.raises(ValueError, match=f"one of {names}; got 'cutlass'"):
            choose("cutlass")
    assert registry.get_backend() == "triton"


def test_overlapping_blocks_of_two_threads_leave_nothing_behind():
    entered, left = threading.Event(), threading.Event()

    def other():
        with resnet_fused.backend("eager"):
            entered.set()
            assert left.wait(10)

    resnet_fused.set_backend("onednn")
    with concurrent.futures.ThreadPoolExecutor() as pool:
        with resnet_fused.backend("triton"):
            assert pool.submit(resnet_fused.get_backend).result() == "triton"  # as autograd's threads
            ends = pool.submit(other)
            assert entered.wait(10)
        assert resnet_fused.get_backend() == "eager"  # the other's block is open
        left.set()
        ends.result()
    assert resnet_fused.get_backend() == "onednn"


def test_many_threads_leave_nothing_behind(monkeypatch):
    def switch(seed):
        for i in range(300):
            with resnet_fused.backend(registry.BACKENDS[(seed + i) % 5]), resnet_fused.backend("auto"):
                pass

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            list(pool.map(switch, range(4)))
    finally:
        sys.setswitchinterval(interval)
    assert resnet_fused.get_backend() == "auto" and registry._asked == {None: "auto"}


@pytest.mark.parametrize(
    "backend, reason",
    [("cuda", "built|CUDA"), ("cudnn", "cuDNN|CUDA"), ("onednn", "serves eval mode without gradients only")],
)
def test_a_forced_backend_never_falls_back(backend, reason):
    message = f"batch_norm_act: .*'{backend}'.*({reason})"
    with resnet_fused.backend(backend), pytest.raises(BackendUnavailable, match=message):
        ops.batch_norm_act(X, V, V, V, V, training=False)


@pytest.mark.parametrize("dtype", [torch.float64])
def test_a_forced_backend_says_which_dtypes_it_serves(dtype):
    with resnet_fused.backend("triton"), pytest.raises(BackendUnavailable, match="x is torch.float64; the kernels"):
        ops.batch_norm_act(X.to(dtype), V, V, V, V, training=False)


def test_triton_without_the_interpreter_names_the_remedy():
    code = (
        "import torch, resnet_fused\n"
        "resnet_fused.set_backend('triton')\n"
        "v = torch.ones(3)\n"
        "resnet_fused.ops.batch_norm_act(torch.ones(2, 3, 4, 4), v, v, v, v, training=False)"
    )
    message = python(code).stderr.splitlines()[-1]
    assert "BackendUnavailable: batch_norm_act" in message and "TRITON_INTERPRET=1" in message


def test_the_environment_variable_chooses():
    code = "import resnet_fused; print(resnet_fused.dispatch.registry.get_backend())"
    assert python(code, RESNET_FUSED_BACKEND="eager").stdout == "eager\n"
    assert python(code).stdout == "auto\n"
    use = "import resnet_fused, torch; resnet_fused.resnet18()(torch.randn(2, 3, 64, 64))"
    message = python(use, RESNET_FUSED_BACKEND="x").stderr.splitlines()[-1]
    assert "BackendUnavailable" in message and "RESNET_FUSED_BACKEND must be one of auto, cuda, triton" in message


def test_without_triton_and_torchvision_the_package_works():
    code = (
        "import sys; sys.modules['triton'] = sys.modules['torchvision'] = None\n"
        "import torch, resnet_fused\n"
        "print(resnet_fused.resnet18(num_classes=3)(torch.randn(2, 3, 64, 64)).shape)\n"
        "print(resnet_fused.dispatch.registry.unavailable('triton', torch.device('cpu')))\n"
        "resnet_fused.ResNet18_Weights"
    )
    done = python(code)
    assert "torch.Size([2, 3])\nTriton can't be imported" in done.stdout, done.stderr
    assert "torchvision" in done.stderr.splitlines()[-1]


def test_auto_tries_the_next_and_ends_in_eager(monkeypatch):
    monkeypatch.setattr(registry, "_AUTO_DEVICES", ("cpu",))
    choice = registry.choose("op", X.device, lambda name: None, "batch_norm")
    assert choice.backend == "triton" and choice.rejected[0][0] == "cuda"
    choice = registry.choose("op", X.device, lambda name: "no kernel", "batch_norm")
    assert choice.backend == "eager" and choice.rejected[1] == ("triton", "no kernel")


@pytest.mark.parametrize(
    "weight, groups, order",
    [
        ((64, 3, 7, 7), 1, "conv stem"),
        ((16, 3, 3, 3), 1, "conv stem"),
        ((64, 64, 1, 1), 1, "conv 1x1"),
        ((64, 64, 3, 3), 1, "conv"),
        ((64, 4, 3, 3), 16, "conv"),
    ],
)
def test_the_stem_has_an_order_of_its_own(weight, groups, order, monkeypatch):
    x, weight = torch.empty(1, weight[1] * groups, 9, 9), torch.empty(weight)
    call = Call(x, weight, *[None] * 5, 1e-5, [1, 1], [3, 3], [1, 1], groups, None, True)
    assert call.order() == order
    monkeypatch.setattr(registry, "_AUTO_DEVICES", ("cpu",))
    assert registry.candidates(x.device, order)[0] == ("cudnn" if order == "conv" else "triton")
