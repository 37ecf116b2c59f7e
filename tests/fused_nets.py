"""Small networks to fuse, and how they are held against themselves."""

import copy
import operator

import torch
import torch.nn.functional as F
import zoo
from timm.layers import FrozenBatchNormAct2d
from torch import nn
from torch.nn.utils import parametrizations
from torchvision.ops import FrozenBatchNorm2d

import resnet_fused

X = torch.randn(2, 8, 6, 5, generator=torch.Generator().manual_seed(0))


def trained(model):
    """Statistics and affine parameters unlike a fresh BN's."""
    generator = torch.Generator().manual_seed(1)
    for m in model.modules():
        if isinstance(m, (nn.BatchNorm2d, FrozenBatchNorm2d, FrozenBatchNormAct2d)):
            for t, low in ((m.weight, 0.5), (m.bias, -0.5), (m.running_mean, -0.5), (m.running_var, 0.5)):
                t.data.copy_(low + torch.rand(t.shape, generator=generator))
    return model


def steps(model, *inputs):
    """Outputs, gradients of everything and statistics of a train step, then outputs in eval mode."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    model.train()
    outputs = zoo.tensors(model(*[x * 1 for x in inputs]))
    sum(((i + 1) * y * y).sum() for i, y in enumerate(outputs)).backward()
    found = {f"train {i}": y.detach() for i, y in enumerate(outputs)} | {
        f"dx {i}": x.grad for i, x in enumerate(inputs)
    }
    found |= {n: p.grad for n, p in model.named_parameters()} | {n: b.clone() for n, b in model.named_buffers()}
    model.eval()
    with torch.no_grad():
        found |= {f"eval {i}": y for i, y in enumerate(zoo.tensors(model(*[x.detach().clone() for x in inputs])))}
    return found


def report_of(model):
    return resnet_fused.fuse(model, report=True)[1]


def same(model, *inputs):
    """Fuse it and hold it against itself, to the bit; the report."""
    model = trained(model)
    fused = copy.deepcopy(model)
    report = report_of(fused)
    expected = steps(model, *(inputs or (X,)))
    with zoo.rewritten():
        found = steps(fused, *(inputs or (X,)))
    assert found.keys() == expected.keys()
    for name, e in expected.items():
        assert (found[name] is None and e is None) or torch.equal(found[name], e), name
    return report


def ran(model, *inputs):
    """The chains that ran as one call, by the rewritten graphs."""
    rows = resnet_fused.explain(model, *inputs)
    return {r.layer: r.modules for r in rows if " + " in r.modules}


class Net(nn.Module):
    """conv1, bn1, conv2, bn2 and relu, and a forward."""

    def __init__(self, run, norm=nn.BatchNorm2d, **conv):
        super().__init__()
        torch.manual_seed(0)
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1, **conv)
        self.bn1 = norm(8)
        self.conv2 = nn.Conv2d(8, 8, 1, bias=False)
        self.bn2 = norm(8)
        self.relu = nn.ReLU()
        self.inplace = nn.ReLU(inplace=True)
        self.run = run

    def forward(self, x):
        return self.run(self, x)


def iadd(a, b):
    a += b
    return a


CHAINS = {  # the forward, and what its last chain is made of
    "relu module": (lambda m, x: m.relu(m.bn1(m.conv1(x))), "Conv2d + BatchNorm2d + ReLU"),
    "inplace module": (lambda m, x: m.inplace(m.bn1(m.conv1(x))), "Conv2d + BatchNorm2d + ReLU"),
    "F.relu": (lambda m, x: F.relu(m.bn1(m.conv1(x))), "Conv2d + BatchNorm2d + relu"),
    "F.relu inplace": (lambda m, x: F.relu(m.bn1(m.conv1(x)), inplace=True), "Conv2d + BatchNorm2d + relu"),
    "torch.relu": (lambda m, x: torch.relu(m.bn1(m.conv1(x))), "Conv2d + BatchNorm2d + relu"),
    "torch.relu_": (lambda m, x: torch.relu_(m.bn1(m.conv1(x))), "Conv2d + BatchNorm2d + relu"),
    "method": (lambda m, x: m.bn1(m.conv1(x)).relu(), "Conv2d + BatchNorm2d + relu"),
    "method_": (lambda m, x: m.bn1(m.conv1(x)).relu_(), "Conv2d + BatchNorm2d + relu"),
    "no relu": (lambda m, x: m.bn1(m.conv1(x)), "Conv2d + BatchNorm2d"),
    "add": (lambda m, x: m.relu(m.bn1(m.conv1(x)) + x), "Conv2d + BatchNorm2d + add + ReLU"),
    "add, other order": (lambda m, x: m.relu(x + m.bn1(m.conv1(x))), "Conv2d + BatchNorm2d + add + ReLU"),
    "operator.add": (lambda m, x: F.relu(operator.add(m.bn1(m.conv1(x)), x)), "Conv2d + BatchNorm2d + add + relu"),
    "torch.add": (lambda m, x: F.relu(torch.add(m.bn1(m.conv1(x)), x)), "Conv2d + BatchNorm2d + add + relu"),
    "method add": (lambda m, x: F.relu(m.bn1(m.conv1(x)).add(x)), "Conv2d + BatchNorm2d + add + relu"),
    "method add_": (lambda m, x: F.relu(m.bn1(m.conv1(x)).add_(x)), "Conv2d + BatchNorm2d + add + relu"),
    "+=": (lambda m, x: m.inplace(iadd(m.bn1(m.conv1(x)), x)), "Conv2d + BatchNorm2d + add + ReLU"),
    "add without relu": (lambda m, x: m.bn1(m.conv1(x)) + x, "Conv2d + BatchNorm2d + add"),
    "sum used twice": (lambda m, x: (lambda y: y + m.relu(y))(m.bn1(m.conv1(x)) + x), "Conv2d + BatchNorm2d + add"),
    "bn and relu": (lambda m, x: m.relu(m.bn1(x)), "BatchNorm2d + ReLU"),
    "bn, relu, conv": (lambda m, x: m.conv1(m.inplace(m.bn1(x))), "BatchNorm2d + ReLU"),
    "bn alone": (lambda m, x: m.bn1(x), "BatchNorm2d"),
}


def shared(m, x):
    return m.relu(m.bn1(m.conv1(x))) + m.bn2(m.conv1(x))


def normed(m):
    parametrizations.weight_norm(m.conv1)


def normed_as_of_old(m):
    nn.utils.weight_norm(m.conv1)
