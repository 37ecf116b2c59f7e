"""Loss and error of a network on a split."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .batches import Batch
from .distributed import World

ALONE = World()


class Evaluation(NamedTuple):
    loss: float
    error: float  # top-1, percent


def evaluate(model: nn.Module, batches: Iterable[Batch], world: World = ALONE) -> Evaluation:
    """Mean cross-entropy and top-1 error in eval mode, over the batches of all processes; every mode is put back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    total = torch.zeros(3, dtype=torch.float64, device=next(model.parameters()).device)
    with torch.inference_mode():
        for x, labels in batches:
            logits = model(x).float()
            loss = F.cross_entropy(logits, labels, reduction="sum")
            total += torch.stack((loss, (logits.argmax(1) != labels).sum(), loss.new_tensor(len(labels))))
    for module, mode in modes:
        module.training = mode
    loss, wrong, count = world.sum(total).tolist()
    return Evaluation(loss / count, 100 * wrong / count)
