"""Plans: a second call of a kind goes to the kernel directly, and only where nothing could tell the difference."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import resnet_fused
from resnet_fused import ops, testing
from resnet_fused.dispatch import plans, serve
from resnet_fused.ops.conv_bn_act import reference
from resnet_fused.testing import CASES, make_inputs

CONV = next(c for c in CASES if c.id == "conv-3x3-join")


@pytest.fixture(autouse=True)
def _triton():
    plans.forget()
    with resnet_fused.backend("triton"):
        yield
    plans.forget()


@pytest.fixture
def served(monkeypatch):
    """The operators that the dispatcher brought to their implementation."""
    seen = []
    monkeypatch.setattr(resnet_fused.dispatch, "serve", lambda call: seen.append(call.name) or serve(call))
    return seen


class Watching(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def conv(args, kwargs):
    with torch.no_grad():
        y = ops.conv_bn_act(*args, **kwargs)
        testing.assert_within_budget(CONV, (y,), args, kwargs)
    return y


def test_the_second_call_takes_the_short_way_unless_something_watches(served):
    args, kwargs = make_inputs(CONV, dtype=torch.float32)
    first, second = conv(args, kwargs), conv(args, kwargs)
    assert torch.equal(first, second) and served == ["conv_bn_act"]
    with Watching() as mode, torch.no_grad():
        ops.conv_bn_act(*args, **kwargs)
    assert "resnet_fused.conv_bn_act.default" in mode.seen and len(served) == 2
    with torch.profiler.profile() as profile, torch.no_grad():
        ops.conv_bn_act(*args, **kwargs)
    assert any(event.name == "resnet_fused::conv_bn_act" for event in profile.events()) and len(served) == 3
    y = ops.conv_bn_act(args[0].requires_grad_(), *args[1:], **kwargs)
    assert y.requires_grad and len(served) == 4


def shifted(t):
    """t one element off its alignment."""
    return torch.empty(t.numel() + 1).as_strided(t.shape, t.stride(), 1).copy_(t)


CHANGES = {
    "eps": lambda args, kwargs: kwargs.update(eps=0.5),
    "act": lambda args, kwargs: kwargs.update(act="none"),
    "layout of x": lambda args, kwargs: args.__setitem__(0, args[0].contiguous()),
    "layout of the weight": lambda args, kwargs: args.__setitem__(1, args[1].contiguous()),
    "layout of the residual": lambda args, kwargs: kwargs.update(residual=kwargs["residual"].contiguous()),
    "alignment": lambda args, kwargs: args.__setitem__(0, shifted(args[0])),
    "a vector's stride": lambda args, kwargs: args.__setitem__(5, args[5].repeat_interleave(2)[::2]),
    "a vector's dtype": lambda args, kwargs: args.__setitem__(slice(2, 6), [v.half().float() for v in args[2:]]),
    "no affine": lambda args, kwargs: args.__setitem__(slice(2, 4), [None, None]),
    "values": lambda args, kwargs: args[4].add_(3),
    "values by .data": lambda args, kwargs: args[1].data.mul_(2),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_kind_of_call_has_a_plan_of_its_own(change):
    args, kwargs = make_inputs(CONV, dtype=torch.float32)
    before, args = conv(args, kwargs), list(args)
    CHANGES[change](args, kwargs)
    for _ in range(2):
        with torch.no_grad():
            y, expected = ops.conv_bn_act(*args, **kwargs), reference(*args, **kwargs)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    assert change.startswith(("layout", "align", "a vector")) or not torch.equal(y, before)


def test_errors_are_raised_after_a_hit_too():
    args, kwargs = make_inputs(CONV, dtype=torch.float32)
    conv(args, kwargs), conv(args, kwargs)
    with torch.no_grad(), pytest.raises(ValueError, match=r"bn_weight must have shape"):
        ops.conv_bn_act(args[0], args[1], args[2][:3], *args[3:], **kwargs)
    with torch.no_grad(), pytest.raises(ValueError, match="residual must have shape"):
        ops.conv_bn_act(*args, **kwargs | {"residual": kwargs["residual"][:1]})


def test_training_is_one_call_each_way(served):
    x = torch.randn(2, 8, 4, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
    bn = [torch.ones(8, requires_grad=True), torch.zeros(8, requires_grad=True), torch.zeros(8), torch.ones(8)]
    versions = [v._version for v in bn[2:]]
    for _ in range(4):
        ops.batch_norm_act(x, *bn).sum().backward()
    assert served == ["batch_norm_act_training", "batch_norm_act_backward"]
    assert all(v._version > before for v, before in zip(bn[2:], versions, strict=True))
    with Watching() as mode:
        ops.batch_norm_act(x, *bn).sum().backward()
    assert sum("batch_norm_act" in name for name in mode.seen) == 4


def test_a_models_batches_are_counted_together_and_a_blocks_at_once():
    model = resnet_fused.ResNet(resnet_fused.BasicBlock, [1, 1, 1, 1]).train()
    counters = [b for name, b in model.named_buffers() if name.endswith("num_batches_tracked")]
    model(torch.randn(2, 3, 32, 32))
    assert [int(c) for c in counters] == [1] * 12
    model.layer1(torch.randn(2, 64, 8, 8))
    assert [int(c) for c in counters].count(2) == 2


STUBBED = """
import torch, triton
from triton import knobs
from triton.runtime.jit import JITFunction
from resnet_fused import ops
from resnet_fused.dispatch.stub import stubbed

through = []
run = JITFunction.run
JITFunction.run = lambda self, *args, **kwargs: through.append(self.__name__) or run(self, *args, **kwargs)
x = torch.randn(2, 16, 4, 4).contiguous(memory_format=torch.channels_last)
shifted = torch.empty(x.numel() + 1).as_strided(x.shape, x.stride(), 1)
weight, bn = torch.randn(16, 16, 1, 1), [torch.ones(16) for _ in range(4)]

def launches(x):
    through.clear()
    with torch.no_grad():
        y = ops.conv_bn_act(x, weight, *bn)
    assert y.shape == x.shape
    return len(through)

with stubbed():
    print(launches(x), launches(x), launches(shifted), launches(shifted), launches(x))
    hook = lambda metadata: None
    knobs.runtime.launch_enter_hook.add(hook)
    print(launches(x))
    knobs.runtime.launch_enter_hook.remove(hook)
    print(launches(x))
"""


def without_interpreter(*command):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_compiled_kernels_are_launched_directly():
    """But not for pointers that they were not compiled for, nor past a hook."""
    pytest.importorskip("triton")
    assert without_interpreter("-c", STUBBED) == ["1 0 1 1 0", "1", "0"]


def test_the_host_benchmark_ends_in_its_figures():
    pytest.importorskip("triton")
    script = Path(__file__).parents[1] / "benchmarks/host.py"
    *_, empty, last = lines = without_interpreter(str(script), "--models", "resnet18", "--rounds", "1")
    stages = {what: int(us) for us, what in re.findall(r"^ *(-?\d+)  (\w+: .*)$", "\n".join(lines), re.M)}
    # 17 BN, 6 launches each, 2 more for each of the 3 residuals that have one of their own
    assert list(stages)[2:4] == ["resnet_fused: 108 launches", "resnet_fused: 17 autograd nodes in Python"]
    assert len(stages) == 6 and empty == ""
    assert re.fullmatch(r"host: eval \d+\.\d\dx, train \d+\.\d\dx of torchvision eager", last)


def test_the_host_benchmark_of_compiled_models_ends_in_its_figures(monkeypatch):
    """With the compiler off: what it makes is not what is tested."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    script = Path(__file__).parents[1] / "benchmarks/host.py"
    lines = without_interpreter(str(script), "--models", "resnet18", "--rounds", "1", "--compiled")
    assert len(lines) == 4 and re.fullmatch(r"host: eval \S+x, train \S+x of torchvision compiled", lines[-1])
