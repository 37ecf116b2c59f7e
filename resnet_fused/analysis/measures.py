"""The measures, each of one network: (layer or block, value) in the network's order."""

import copy
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.blocks import Block
from ..models.preact import PreActBasicBlock, PreActBottleneck
from ..train.batches import Batch
from ..train.loop import evaluate

Values = list[tuple[str, float]]


def responses(model: nn.Module, batches: Iterable[Batch]) -> Values:
    """Standard deviation of every layer's response: after its BN, before the add and the nonlinearity.

    He et al., https://arxiv.org/abs/1512.03385, figure 7. The BNs of projection shortcuts are left out. Layers are run
    one by one while they are watched.

    Args:
        model: in eval mode.
        batches: images [N, 3, H, W] and labels.
    """
    names = [name for name, m in _main_path(model) if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    sums = {name: torch.zeros(3, dtype=torch.float64) for name in names}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple, y: Tensor) -> None:
            y = y.detach().double()
            count = y.new_tensor(float(y.numel()))
            sums[name] = sums[name].to(y.device) + torch.stack((count, y.sum(), y.square().sum()))

        return hook

    handles = [model.get_submodule(name).register_forward_hook(watch(name)) for name in names]
    try:
        with torch.inference_mode():
            for x, _ in batches:
                model(x)
    finally:
        for handle in handles:
            handle.remove()
    rows = torch.stack([sums[name].cpu() for name in names])
    mean = rows[:, 1] / rows[:, 0]
    std = (rows[:, 2] / rows[:, 0] - mean.square()).clamp(min=0).sqrt()
    return list(zip(names, std.tolist(), strict=True))


def gradient_norms(model: nn.Module, x: Tensor, labels: Tensor) -> Values:
    """Euclidean norm of the loss's gradient by the weight of every convolution and linear layer, in train mode.

    Layers of projection shortcuts are left out. The model stays as it was.

    Args:
        x: [N, 3, H, W].
        labels: int64 [N].
    """
    model = copy.deepcopy(model).train()
    F.cross_entropy(model(x), labels).backward()
    layers = [(name, m.weight) for name, m in _main_path(model) if isinstance(m, (nn.Conv2d, nn.Linear))]
    norms = torch.stack([w.grad.norm() for _, w in layers if w.grad is not None]).tolist()
    return [(name, norm) for (name, _), norm in zip(layers, norms, strict=True)]


def lesions(model: nn.Module, batches: Callable[[], Iterable[Batch]]) -> tuple[float, Values]:
    """Top-1 error in percent of the whole model, and of the model without each block in turn.

    Args:
        model: put back as it was.
        batches: called anew for every pass over the data.

    Raises:
        ValueError: a network without shortcuts, of which nothing would be left.
    """
    blocks = [(name, block) for name, block in model.named_modules() if isinstance(block, Block)]
    if not all(block.residual for _, block in blocks):
        raise ValueError("lesions need shortcuts: of a plain network's block nothing would be left")
    whole, values = evaluate(model, batches()).error, []
    for name, block in blocks:
        model.set_submodule(name, ShortcutOnly(block))
        try:
            values.append((name, evaluate(model, batches()).error))
        finally:
            model.set_submodule(name, block)
    return whole, values


class ShortcutOnly(nn.Module):
    """A residual block whose branch is removed: the block's output where the branch gives zeros.

    Shape: that of the block.
    """

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        block = self.block
        if not isinstance(block, (PreActBasicBlock, PreActBottleneck)):
            return torch.relu(x if block.downsample is None else block.downsample(x))
        if block.downsample is None:
            return x
        return block.downsample(x if block.bn1 is None else block.relu(block.bn1(x)))


def _main_path(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, m) for name, m in model.named_modules() if "downsample" not in name]
