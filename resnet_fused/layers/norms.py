"""The BNs that steps are made of: PyTorch's own, and the frozen and activated ones of torchvision and timm."""

from typing import NamedTuple

from torch import nn

from .calls import called_plainly


class Kind(NamedTuple):
    frozen: bool = False  # four vectors, never the batch's statistics
    acts: bool = False  # a dropout `drop` and an activation `act` follow inside the module


OWN = {nn.BatchNorm2d: Kind(), nn.SyncBatchNorm: Kind()}
_OTHERS = {  # by name: neither library is imported here
    "torchvision.ops.misc.FrozenBatchNorm2d": Kind(frozen=True),
    "timm.layers.norm_act.BatchNormAct2d": Kind(acts=True),
    "timm.layers.norm_act.SyncBatchNormAct": Kind(acts=True),
    "timm.layers.norm_act.FrozenBatchNormAct2d": Kind(frozen=True, acts=True),
}


def kind(bn: nn.Module | None) -> Kind | None:
    """What sort of BN it is, or None where it is none that is known."""
    cls = type(bn)
    return OWN.get(cls) or _OTHERS.get(f"{cls.__module__}.{cls.__qualname__}")


def frozen(bn: nn.Module) -> bool:
    return type(bn) not in OWN and (of := kind(bn)) is not None and of.frozen


def inner(bn: nn.Module | None) -> tuple[bool, tuple[nn.Module, ...]]:
    """Whether the BN ends in ReLU, and the modules that it calls after what may be fused."""
    if bn is None or type(bn) in OWN or not ((of := kind(bn)) and of.acts):
        return False, ()
    drop, act = getattr(bn, "drop", None), getattr(bn, "act", None)
    plain = all(m is None or called_plainly(m) is None for m in (drop, act))
    if plain and type(drop) in _INERT and type(act) in (nn.ReLU, *_INERT):
        return type(act) is nn.ReLU, ()
    return False, tuple(m for m in (drop, act) if m is not None)


_INERT = (nn.Identity, type(None))
