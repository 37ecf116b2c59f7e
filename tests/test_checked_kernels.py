"""Every kernel that runs has run in a check before, as Triton compiles it; launches are stubbed, compiling is real."""

import json
import os
import subprocess
import sys

import pytest

SCRIPT = """
import importlib, json, sys
import torch
from torch import nn
from triton import knobs
import resnet_fused
from resnet_fused.dispatch import numerics, trust
from resnet_fused.dispatch.stub import stubbed

serve = importlib.import_module("resnet_fused.dispatch.serve")
compare, refused, inside = serve.compare, trust.refused, []
compiled = {True: [], False: []}  # in a check, or for a call that none preceded
verdicts = {}

def check(*args):
    inside.append(args)
    try:
        return compare(*args)
    finally:
        inside.pop()

def misaligned(t):
    return t.new_empty(t.numel() + 1)[1:].copy_(t)

serve.compare = check
numerics.call_limits, numerics.wrong = lambda call: [], lambda *args: None  # nothing is launched
knobs.runtime.jit_cache_hook = lambda *, fn, **kw: compiled[bool(inside)].append(fn.name)
with stubbed():
    trust.refused = refused
    trust._stores[torch.device("cpu")] = type("Memory", (dict,), {"entries": property(lambda self: self)})()
    verdicts = trust._stores[torch.device("cpu")]
    N, size = map(int, sys.argv[1:])
    model = resnet_fused.resnet50().bfloat16()
    x = torch.randn(N, 3, size, size).bfloat16()
    with torch.no_grad():
        model.eval()(x)
    classes = [len(verdicts)]
    model.train()(x).sum().backward()
    classes.append(len(verdicts))
    for bn in (model.bn1, model.layer1[0].bn2):
        for name in ("running_mean", "running_var"):
            setattr(bn, name, misaligned(getattr(bn, name)))
    model(x).sum().backward()
    with torch.no_grad():
        model.eval()(x)
        model(torch.randn(N, 3, size, size + 1).bfloat16()[..., :-1])
print(json.dumps({"classes": classes, "checked": compiled[True], "unchecked": compiled[False]}))
"""


@pytest.mark.parametrize("images, size", [(2, 224), (3, 72)])
def test_no_kernel_of_resnet50_runs_unchecked(images, size):
    pytest.importorskip("triton")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(images), str(size)], env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["unchecked"] == [] and len(found["checked"]) > 30
    forward, both = found["classes"]
    assert forward <= 20 and both <= 45  # each is a check: the first forward pass of a cold machine waits for them
