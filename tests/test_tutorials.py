"""The networks of docs/tutorials.md against listings of them in plain torch.nn: the page's own code, the same bits."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import resnet_fused
from resnet_fused import BasicBlock, explain
from resnet_fused.dispatch import trust

PAGE = (Path(__file__).parents[1] / "docs/tutorials.md").read_text()
IMAGES = (2, 3, 32, 32)


class Residual(nn.Module):
    """The block of the blogs and of pytorch-cifar; `shortcut` is empty where it is the identity."""

    expansion = 1

    def __init__(self, c, k, stride=1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c, k, 3, stride, 1, bias=False), nn.BatchNorm2d(k)
        self.conv2, self.bn2 = nn.Conv2d(k, k, 3, 1, 1, bias=False), nn.BatchNorm2d(k)
        project = (nn.Conv2d(c, k, 1, stride, bias=False), nn.BatchNorm2d(k))
        self.shortcut = nn.Sequential(*(project if stride != 1 or c != k else ()))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class Narrowing(nn.Module):
    """pytorch-cifar's block of three convolutions."""

    expansion = 4

    def __init__(self, c, k, stride=1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c, k, 1, bias=False), nn.BatchNorm2d(k)
        self.conv2, self.bn2 = nn.Conv2d(k, k, 3, stride, 1, bias=False), nn.BatchNorm2d(k)
        self.conv3, self.bn3 = nn.Conv2d(k, 4 * k, 1, bias=False), nn.BatchNorm2d(4 * k)
        project = (nn.Conv2d(c, 4 * k, 1, stride, bias=False), nn.BatchNorm2d(4 * k))
        self.shortcut = nn.Sequential(*(project if stride != 1 or c != 4 * k else ()))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + self.shortcut(x))


class Cifar(nn.Module):
    """pytorch-cifar's ResNet."""

    def __init__(self, block, blocks):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64)
        c = 64
        for i, n in enumerate(blocks):
            k, stage = 64 * 2**i, []
            for j in range(n):
                stage.append(block(c, k, 2 if i and not j else 1))
                c = k * block.expansion
            self.add_module(f"layer{i + 1}", nn.Sequential(*stage))
        self.linear = nn.Linear(c, 10)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.linear(torch.flatten(F.avg_pool2d(x, 4), 1))


class Keras(nn.Module):
    """keras.applications.ResNet50 up to the logits; modules have its layers' names."""

    BLOCKS = {2: 3, 3: 4, 4: 6, 5: 3}

    def __init__(self):
        super().__init__()
        self._add("conv1", 3, 64, 7, 2)
        c = 64
        for stage, n in self.BLOCKS.items():
            k = 64 * 2 ** (stage - 2)
            for block in range(1, n + 1):
                name, stride = f"conv{stage}_block{block}", 2 if stage > 2 and block == 1 else 1
                if block == 1:
                    self._add(f"{name}_0", c, 4 * k, 1, stride)
                self._add(f"{name}_1", c, k, 1, stride)
                self._add(f"{name}_2", k, k, 3, 1, 1)
                self._add(f"{name}_3", k, 4 * k, 1)
                c = 4 * k
        self.predictions = nn.Linear(c, 1000)

    def _add(self, name, c, k, size, stride=1, padding=0):
        self.add_module(f"{name}_conv", nn.Conv2d(c, k, size, stride, padding))
        self.add_module(f"{name}_bn", nn.BatchNorm2d(k, eps=1.001e-5, momentum=0.01))

    def _normed(self, name, x):
        return getattr(self, f"{name}_bn")(getattr(self, f"{name}_conv")(x))

    def forward(self, x):
        x = F.relu(self._normed("conv1", F.pad(x, (3, 3, 3, 3))))
        x = F.max_pool2d(F.pad(x, (1, 1, 1, 1)), 3, 2)
        for stage, n in self.BLOCKS.items():
            for block in range(1, n + 1):
                name = f"conv{stage}_block{block}"
                y = F.relu(self._normed(f"{name}_1", x))
                y = F.relu(self._normed(f"{name}_2", y))
                y = self._normed(f"{name}_3", y)
                x = F.relu(y + (self._normed(f"{name}_0", x) if block == 1 else x))
        return self.predictions(x.mean((2, 3)))


class Small(nn.Module):
    """pytorch-tutorial's ResNet, whose shortcuts have 3x3 convolutions."""

    class Block(nn.Module):
        def __init__(self, c, k, stride=1):
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(c, k, 3, stride, 1, bias=False), nn.BatchNorm2d(k)
            self.conv2, self.bn2 = nn.Conv2d(k, k, 3, 1, 1, bias=False), nn.BatchNorm2d(k)
            if stride != 1 or c != k:
                self.downsample = nn.Sequential(nn.Conv2d(c, k, 3, stride, 1, bias=False), nn.BatchNorm2d(k))

        def forward(self, x):
            y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
            return F.relu(y + (self.downsample(x) if hasattr(self, "downsample") else x))

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(self.Block(16, 16), self.Block(16, 16))
        self.layer2 = nn.Sequential(self.Block(16, 32, 2), self.Block(32, 32))
        self.layer3 = nn.Sequential(self.Block(32, 64, 2), self.Block(64, 64))
        self.avg_pool, self.fc = nn.AvgPool2d(8), nn.Linear(64, 10)

    def forward(self, x):
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn(self.conv(x))))))
        return self.fc(torch.flatten(self.avg_pool(x), 1))


class FromScratch(nn.Module):
    """The ResNet-34 whose convolutions keep their biases."""

    class Block(nn.Module):
        def __init__(self, c, k, stride=1):
            super().__init__()
            self.conv1 = nn.Sequential(nn.Conv2d(c, k, 3, stride, 1), nn.BatchNorm2d(k), nn.ReLU())
            self.conv2 = nn.Sequential(nn.Conv2d(k, k, 3, 1, 1), nn.BatchNorm2d(k))
            project = stride != 1 or c != k
            self.downsample = nn.Sequential(nn.Conv2d(c, k, 1, stride), nn.BatchNorm2d(k)) if project else None

        def forward(self, x):
            return F.relu(self.conv2(self.conv1(x)) + (x if self.downsample is None else self.downsample(x)))

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(3, 64, 7, 2, 3), nn.BatchNorm2d(64), nn.ReLU())
        self.maxpool, c = nn.MaxPool2d(3, 2, 1), 64
        for i, n in enumerate((3, 4, 6, 3)):
            k = 64 * 2**i
            rest = [self.Block(k, k) for _ in range(n - 1)]
            self.add_module(f"layer{i}", nn.Sequential(self.Block(c, k, 1 + (i > 0)), *rest))
            c = k
        self.avgpool, self.fc = nn.AvgPool2d(7, stride=1), nn.Linear(512, 10)

    def forward(self, x):
        x = self.maxpool(self.conv1(x))
        x = self.layer3(self.layer2(self.layer1(self.layer0(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def carried_over(title, theirs, words):
    """`ours`, as the page's code under that title makes it of `theirs`, with other words for these."""
    section = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)[1]
    (code,) = re.findall(r"^```python\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
    for word, other in words.items():
        code = code.replace(word, other)
    scope = {"theirs": theirs}
    exec(code, scope)
    return scope["ours"]


def drawn(model):
    """Weights, biases and statistics of which no two tensors are the same."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, least in ((module.weight, 0.5), (module.running_var, 0.5)):
                nn.init.uniform_(tensor, least, 2 * least)
            for tensor in (module.bias, module.running_mean):
                nn.init.uniform_(tensor, -0.2, 0.2)
    return model


def tensors(model):
    return {key: t for key, t in model.state_dict(keep_vars=True).items() if not key.endswith("num_batches_tracked")}


def every_step_is_fused(model, x, monkeypatch):
    """Nothing that the page's code put in stands in the way; without the checks of trust, which take long."""
    monkeypatch.setattr(trust, "refused", lambda *args: None)
    with torch.no_grad(), resnet_fused.backend("onednn"):
        rows = [row for row in explain(model.eval(), x) if "BatchNorm2d" in row.modules]
    assert len(rows) == sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert all(row.ran == ["conv_bn_act: onednn"] for row in rows)


def step(model, x):
    loss = model.train()(x).flatten(1).logsumexp(1).sum()
    loss.backward()
    return loss


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(
    "title, listing, words, shape",
    [
        ("The residual block", lambda: Residual(64, 128, 2), {}, (2, 64, 9, 10)),
        ("ResNet-18, 34, 50 with CIFAR's stem", lambda: Cifar(Residual, [2, 2, 2, 2]), {}, IMAGES),
        ("ResNet-18, 34, 50 with CIFAR's stem", lambda: Cifar(Residual, [3, 4, 6, 3]), {"18": "34"}, IMAGES),
        ("ResNet-18, 34, 50 with CIFAR's stem", lambda: Cifar(Narrowing, [3, 4, 6, 3]), {"18": "50"}, IMAGES),
        ("Keras' ResNet-50", Keras, {}, (2, 3, 65, 64)),
        ("yunjey's ResNet for CIFAR-10", Small, {}, IMAGES),
        ("ResNet-34 with ImageNet's stem and biases", FromScratch, {}, (2, 3, 193, 193)),
    ],
    ids=["block", "cifar18", "cifar34", "cifar50", "keras50", "small", "scratch34"],
)
def test_the_pages_network_is_the_tutorials(title, listing, words, shape, layout, monkeypatch):
    theirs = drawn(listing())
    ours = carried_over(title, theirs, words)
    ours, theirs = ours.to(memory_format=layout), theirs.to(memory_format=layout)
    own = tensors(ours)
    pairs = [(next(k for k, t in own.items() if torch.equal(t, a)), a) for a in tensors(theirs).values()]
    assert sorted(key for key, _ in pairs) == sorted(own)  # every tensor was carried over, none twice

    x = torch.randn(shape)
    every_step_is_fused(ours, x[:1], monkeypatch)
    with torch.no_grad():
        assert torch.equal(ours.eval()(x), theirs.eval()(x))

    assert torch.equal(step(ours, x), step(theirs, x))
    for key, a in pairs:
        assert torch.equal(own[key], a) and (a.grad is None or torch.equal(own[key].grad, a.grad)), key


@pytest.mark.parametrize(
    "block, shortcut",
    [
        (lambda: BasicBlock(64, 64), nn.Identity()),
        (lambda: BasicBlock(64, 128, 2, downsample=nn.Conv2d(64, 128, 1, stride=2)), nn.Conv2d(64, 128, 1, stride=2)),
    ],
    ids=["identity", "without BN"],
)
def test_blocks_with_other_shortcuts(block, shortcut):
    theirs, ours = Residual(64, 64) if isinstance(shortcut, nn.Identity) else Residual(64, 128, 2), block()
    theirs.shortcut = shortcut
    drawn(theirs)
    ours.load_state_dict({key.replace("shortcut", "downsample"): t for key, t in theirs.state_dict().items()})
    x = torch.randn(2, 64, 9, 10)
    for mode in (False, True):
        assert torch.equal(ours.train(mode)(x), theirs.train(mode)(x))
