"""Other people's models on the fused operators: convolution + BN (+ add) (+ ReLU) chains are found and run as one.

The model stays what it was: its classes, parameters, keys and hooks. On every module whose forward holds a chain a
forward is set that runs the chains as one call each where a backend serves them; everywhere else (on the CPU, under
torch.compile, torch.export and tracers) it is the module's own forward that runs.
"""

from dataclasses import dataclass
from typing import Any, Literal, TypeVar, cast, overload

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from .analysis import Analysis, Found
from .chains import is_bn
from .forward import FusedForward, Replicate

Model = TypeVar("Model", bound=nn.Module)

__all__ = ["Chain", "Report", "fuse", "unfuse"]


@dataclass
class Chain:
    """A BN of the model and what stands around it."""

    layer: str  # the BN's name in the model
    modules: str  # e.g. "Conv2d + BatchNorm2d + add + ReLU"
    why: str | None = None  # why it is left as it is, or None where it is fused


class Report(list[Chain]):
    """The chains that were found, in the model's order; prints as a summary."""

    @property
    def fused(self) -> list[Chain]:
        return [c for c in self if c.why is None]

    @property
    def left(self) -> list[Chain]:
        return [c for c in self if c.why is not None]

    def __str__(self) -> str:
        lines = [f"{len(self)} chains found, {len(self.fused)} fused, {len(self.left)} left"]
        return "\n".join(lines + [f"  {c.layer}: {c.modules}: {c.why}" for c in self.left])


@overload
def fuse(model: Model, *, report: Literal[False] = False, strict: bool = False) -> Model: ...


@overload
def fuse(model: Model, *, report: Literal[True], strict: bool = False) -> tuple[Model, Report]: ...


def fuse(model: Model, *, report: bool = False, strict: bool = False) -> Model | tuple[Model, Report]:
    """Run the model's convolution + BN (+ add) (+ ReLU) chains on the fused operators, for training and inference.

    The model is changed in place and returned. Parameters, buffers, state_dict keys, hooks and memory layout are left
    as they are, so optimizers and checkpoints stay valid; `unfuse` takes everything back. A chain is left alone where a
    module of it has hooks, parametrizations or a forward of its own, is there twice, or where something else uses or
    may write what passes inside it. Changes after `fuse` (hooks, replaced modules, other modes) are noticed in the next
    call. The kernels run channels_last: a model in NCHW runs as it is, `model.to(memory_format=torch.channels_last)`.

    Args:
        model: of any class; fused already: anew.
        report: return (model, `Report`): the chains found, which are fused and why others are left.
        strict: raise where a chain is left.

    Raises:
        TypeError: it is not an nn.Module.
        ValueError: it is scripted, compiled or not initialised yet, or, with strict, chains are left; nothing is
            changed then.
    """
    _check(model)
    unfuse(model)
    analysis = Analysis(model)
    analysis.of(model)
    summary = _summary(model, analysis.found)
    if strict and summary.left:
        raise ValueError(f"strict: {summary}")
    for module, found in analysis.found.items():
        if found.plans:
            module.__dict__["forward"] = FusedForward(module, found.plans)
            module.__dict__["_replicate_for_data_parallel"] = Replicate(module)
    return (model, summary) if report else model


def unfuse(model: Model) -> Model:
    """The model as it was before `fuse`, with what it has learned since; in place."""
    for module in model.modules():
        for name, kind in (("forward", FusedForward), ("_replicate_for_data_parallel", Replicate)):
            if isinstance(module.__dict__.get(name), kind):
                del module.__dict__[name]
    return model


def _check(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError("model is scripted or traced by torch.jit: fuse takes the model that it was made from")
    for name, m in model.named_modules():
        if m._compiled_call_impl is not None or hasattr(m, "_orig_mod"):
            raise ValueError(f"{name or 'model'} is compiled: fuse first, then torch.compile")
        if isinstance(m, LazyModuleMixin) and cast(Any, m).has_uninitialized_params():
            raise ValueError(f"{name or 'model'} ({type(m).__name__}) is not initialised: run the model once first")


def _summary(model: nn.Module, found: dict[nn.Module, Found]) -> Report:
    names = {m: name for name, m in model.named_modules()}
    report = Report()
    for module, name in names.items():
        if not is_bn(module):
            continue
        owners = [f for f in found.values() if module in f.chains]
        if owners:
            longest = max((d for f in owners for d in f.chains[module]), key=len)
            report.append(Chain(name, longest))
            continue
        reasons = [f.left[module] for f in found.values() if module in f.left]
        reasons += [f"{type(m).__name__} {f.reason}" for m, f in _around(model, name, found) if f.reason]
        report.append(Chain(name, type(module).__name__, (reasons or ["no forward that was traced calls it"])[0]))
    return report


def _around(model: nn.Module, name: str, found: dict[nn.Module, Found]) -> list[tuple[nn.Module, Found]]:
    """What is known of the modules around one, innermost first."""
    parts = name.split(".")
    modules = [model.get_submodule(".".join(parts[:i])) for i in range(len(parts) - 1, -1, -1)]
    return [(m, found[m]) for m in modules if m in found]
