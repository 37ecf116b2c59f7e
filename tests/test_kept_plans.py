"""A plan that was kept serves the next call of its kind, and no other: each of these once took a wrong one."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, stack_module_state, vmap

import resnet_fused
from resnet_fused import ops
from resnet_fused.dispatch import registry

pytestmark = pytest.mark.any_device
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def image(*shape, dtype=torch.float32, seed=0):
    t = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)
    return t.contiguous(memory_format=torch.channels_last)


def bn(C, dtype=torch.float32):
    return [v.to(DEVICE, dtype) for v in (torch.ones(C), torch.zeros(C), torch.zeros(C), torch.ones(C))]


def misaligned(t):
    flat = t.new_empty(t.numel() + 4)[4:]
    return flat.as_strided(t.shape, t.stride(), flat.storage_offset()).copy_(t)


def both(call):
    """Under triton and under eager."""
    results = []
    for backend in ("triton", "eager"):
        with resnet_fused.backend(backend):
            results.append(call())
    return results


@pytest.mark.parametrize("momenta", [(1, 0.1), (0, 0.1), (0.1, 1)])
def test_a_momentum_that_is_an_integer(momenta):
    def running():
        weight, bias, mean, var = bn(16)
        for i, momentum in enumerate(momenta):
            x = image(4, 16, 5, 5, seed=i)
            ops.batch_norm_act(x, weight, bias, mean, var, momentum=momentum)
        return mean, var

    for ours, eager in zip(*both(running), strict=True):
        torch.testing.assert_close(ours, eager)


def test_running_statistics_that_are_not_contiguous():
    def running():
        weight, bias, *_ = bn(16)
        mean, var = torch.zeros(32, device=DEVICE)[::2], torch.ones(32, device=DEVICE)[::2]
        ops.batch_norm_act(image(4, 16, 5, 5) + 1, weight, bias, mean, var)
        return mean, var

    for ours, eager in zip(*both(running), strict=True):
        torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize("order", [(False, True), (True, False)])
def test_the_operator_itself_under_autocast_and_outside(order):
    x, weight = image(2, 32, 6, 6), image(32, 8, 3, 3, seed=1) / 9
    args = (x, weight, None, *bn(32), 1e-5, [1, 1], [1, 1], [1, 1], 4, None, True)
    with resnet_fused.backend("triton"), torch.no_grad():
        for autocast in order:
            with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
                y = torch.ops.resnet_fused.conv_bn_act(*args)
            expected = nn.functional.conv2d(x, weight, None, 1, 1, 1, 4).relu()
            assert y.dtype == torch.float32
            torch.testing.assert_close(y, expected, rtol=2e-3, atol=2e-3)


def test_which_image_is_misaligned():
    x, weight, residual = (
        image(2, 64, 6, 6, dtype=torch.float16),
        image(64, 64, 1, 1, seed=1).half() / 8,
        image(2, 64, 6, 6),
    )
    residual = residual.half()
    with resnet_fused.backend("triton"), torch.no_grad():
        expected = ops.conv_bn_act(x, weight, *bn(64), residual=residual)
        for images in ((x, misaligned(residual)), (misaligned(x), residual)):
            for _ in range(2):
                y = ops.conv_bn_act(images[0], weight, *bn(64), residual=images[1])
                torch.testing.assert_close(y, expected, rtol=1e-2, atol=1e-2)


def test_lists_are_pairs_too():
    x, weight = image(2, 16, 6, 6), image(16, 16, 3, 3, seed=1)
    with torch.no_grad():
        ours, eager = both(lambda: ops.conv_bn_act(x, weight, *bn(16), stride=[1, 1], padding=[1, 1], dilation=[1, 1]))
    torch.testing.assert_close(ours, eager, rtol=1e-3, atol=1e-3)


def test_a_negative_view_after_a_plain_tensor():
    x, weight = image(2, 16, 6, 6), image(16, 16, 1, 1, seed=1)
    for view in (x, torch._neg_view(x)):
        ours, eager = both(lambda view=view: ops.batch_norm_act(view, *bn(16)))
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            ours, eager = both(lambda view=view: ops.conv_bn_act(view, weight, *bn(16)))
        torch.testing.assert_close(ours, eager, rtol=1e-3, atol=1e-3)


def test_an_ensemble_in_train_mode_under_vmap(monkeypatch):
    monkeypatch.setattr(registry, "_AUTO_DEVICES", ("cpu", "cuda"))
    models = [resnet_fused.ResNet(resnet_fused.BasicBlock, [1, 1, 1, 1], num_classes=3) for _ in range(2)]
    models = [m.to(DEVICE).train() for m in models]
    parameters, buffers = stack_module_state(models)
    skeleton, x = copy.deepcopy(models[0]).to("meta"), image(2, 3, 33, 33)

    def forward(p, b):
        return functional_call(skeleton, (p, b), (x,))

    y = vmap(forward, randomness="different")(parameters, buffers)
    expected = torch.stack([model(x) for model in models])
    torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-3)
