"""Where a train step's host time goes: the model with parts left out, and parts alone."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..dispatch import registry
from ..dispatch.stub import unlaunched
from ..ops.batch_norm_act.one_call import keyed
from ..ops.batch_norm_act.training import TrainingCall

Row = tuple[str, float]  # what, microseconds of a step
Call = Callable[[], Any]
Least = Callable[[dict[str, Call]], dict[str, float]]  # microseconds of calls
MANY = 20  # times that a short part is called at once


def rows(
    theirs: nn.Module, ours: nn.Module, x: Tensor, step: Callable[[nn.Module, Tensor], Call], least: Least
) -> Iterator[Row]:
    """The stages of torchvision's train step and of this package's, launches stubbed.

    Args:
        step: a train step of a model on the images x.
    """
    ours_step = step(ours, x)

    def without_launches() -> None:
        with unlaunched():
            ours_step()

    launches, norms = _counted(ours_step)
    found = least(
        {
            "both": step(_bare(theirs), x),
            "theirs": step(theirs, x),
            "ours": ours_step,
            "unlaunched": without_launches,
            "nodes": _nodes(x),
            "keys": _keys(x),
        }
    )
    nodes, keys = (found[part] / MANY * norms for part in ("nodes", "keys"))
    launched = found["ours"] - found["unlaunched"]
    rest = found["unlaunched"] - found["both"] - nodes - keys
    yield "both: convolutions, modules, loss", found["both"]
    yield "torchvision: BN, ReLU", found["theirs"] - found["both"]
    yield f"resnet_fused: {launches} launches", launched
    yield f"resnet_fused: {norms} autograd nodes in Python", nodes
    yield f"resnet_fused: {norms} records and their keys", keys
    yield "resnet_fused: layers, outputs, arguments of launches", rest


def _bare(model: nn.Module) -> nn.Module:
    """Without BN and ReLU."""
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, (nn.BatchNorm2d, nn.ReLU)):
                setattr(module, name, nn.Identity())
    return model


def _counted(step: Call) -> tuple[int, int]:
    """Launches, and calls of BN: a join's two are one."""
    step()  # leaves plans
    launches: list[None] = []
    calls: list[bool] = []
    with (
        registry.heard_by(lambda name, choice, call: calls.append(isinstance(call, TrainingCall))),
        unlaunched(lambda: launches.append(None)),
    ):
        step()
    return len(launches), sum(calls)


class _Empty(torch.autograd.Function):
    """What autograd costs a BN: as many inputs, saved tensors and gradients, and nothing computed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, *none: None) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, bias, weight, bias, *(None,) * 6)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        _, weight, bias, *_ = ctx.saved_tensors
        return dy, weight.detach(), bias.detach(), *(None,) * 6


def _nodes(x: Tensor) -> Call:
    """MANY in a chain: a backward pass has its own start."""
    vectors = [[torch.ones(x.shape[1], requires_grad=True) for _ in range(2)] for _ in range(MANY)]
    leaf, dy = x.clone().requires_grad_(), torch.ones_like(x)

    def call() -> None:
        y: Any = leaf
        for pair in vectors:
            for v in pair:
                v.grad = None
            y = _Empty.apply(y, *pair, *(None,) * 6)
        y.backward(dy)

    return call


def _keys(x: Tensor) -> Call:
    weight, bias, mean, var = (torch.ones(x.shape[1]) for _ in range(4))
    none = (None,) * 5

    def call() -> None:
        for _ in range(MANY):
            hash(keyed(TrainingCall(x, weight, bias, mean, var, 0.1, 1e-5, *none, False, None, True, False)))

    return call
