"""The processes of a run: one, or those that torchrun started."""

import contextlib
import os
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class World(NamedTuple):
    rank: int = 0
    size: int = 1

    def sum(self, tensor: Tensor) -> Tensor:
        """The tensor summed over the processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def largest(self, number: int, device: torch.device) -> int:
        """The largest of the processes' numbers."""
        found = torch.tensor(number, device=device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model whose backward averages the gradients, or the model where `average` has to do it."""
        if self.size == 1 or _by_hand(model):
            return model
        device = next(model.parameters()).device
        return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)

    def average(self, model: nn.Module) -> None:
        """Average the gradients where `wrap` could not."""
        if self.size > 1 and _by_hand(model):
            for p in filter(lambda p: p.requires_grad, model.parameters()):
                assert p.grad is not None  # every one takes part in the loss
                self.sum(p.grad).div_(self.size)

    def share_statistics(self, model: nn.Module) -> None:
        """Give every process the first one's running statistics."""
        if self.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)


def _by_hand(model: nn.Module) -> bool:
    """DistributedDataParallel refuses SyncBatchNorm on the CPU."""
    on_cpu = next(model.parameters()).device.type == "cpu"
    return on_cpu and any(isinstance(m, nn.SyncBatchNorm) for m in model.modules())


@contextlib.contextmanager
def join(device: torch.device) -> Iterator[tuple[World, torch.device]]:
    """This process's place among torchrun's, and its device."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        if device.index is not None:
            torch.cuda.set_device(device)
        yield World(), device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    yield World(dist.get_rank(), size), device
    dist.destroy_process_group()  # not after an error: it might wait for the others
