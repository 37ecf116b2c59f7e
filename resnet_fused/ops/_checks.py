"""Predicates on the operators' arguments; every message names the argument, what was given and what is accepted."""

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..dispatch import registry

ACTS = ("relu", "none")


def image(name: str, x: Tensor) -> None:
    if x.dim() != 4:
        raise ValueError(f"{name} must have 4 dimensions [N, C, H, W], got shape {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"{name} must be of a floating-point dtype, got {x.dtype}")


def like(name: str, t: Tensor, shape: torch.Size | tuple[int, ...], x: Tensor) -> None:
    if t.shape != shape or t.dtype != x.dtype or t.device != x.device:
        raise ValueError(
            f"{name} must have shape {tuple(shape)}, dtype {x.dtype} and device {x.device}, "
            f"got {tuple(t.shape)}, {t.dtype} and {t.device}"
        )


def vector(name: str, v: Tensor | None, channels: int, x: Tensor) -> None:
    if v is not None and (v.dim() != 1 or v.shape[0] != channels or v.device != x.device):
        raise ValueError(
            f"{name} must have shape ({channels},), one value per channel, on {x.device}, "
            f"got {tuple(v.shape)} on {v.device}"
        )


def statistics(mean_name: str, mean: Tensor | None, var_name: str, var: Tensor | None) -> None:
    if (mean is None) != (var is None):
        given, missing = (var_name, mean_name) if mean is None else (mean_name, var_name)
        raise ValueError(f"{mean_name} and {var_name} must be given together, got {given} and {missing}=None")


def act(value: str) -> None:
    if value not in ACTS:
        raise ValueError(f'act must be "relu" or "none", got {value!r}')


def transformed(trains: bool = False) -> str | None:
    """Why no kernel may serve where PyTorch looks into operators, or None where it does not.

    What `auto` traces or exports is plain PyTorch, so that it runs without this package.

    Args:
        trains: of what needs gradients. Inductor fuses it too, and operators that are closed to it cost the host more.
    """
    if torch.compiler.is_compiling():
        if registry.get_backend() != "auto":
            return None
        if torch.compiler._is_exporting_flag:  # is_exporting() is True under any compiler in torch 2.11
            return "torch.export gets plain PyTorch; a forced backend's operators are exported as such"
        return "torch.compile fuses it; a forced backend's operators are compiled as such" if trains else None
    if torch._C._are_functorch_transforms_active():
        return "torch.func transforms PyTorch's own operators only"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation knows PyTorch's own operators only"
    if torch._C._get_tracing_state() is not None and registry.get_backend() == "auto":
        return "torch.jit.trace gets plain PyTorch; a forced backend's operators are traced as such"
    return None


def needs_grad(args: tuple[object, ...]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)
