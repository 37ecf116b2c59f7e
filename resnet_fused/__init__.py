"""ResNets whose blocks run as a few fused GPU kernels, with torchvision's names, parameters and numbers."""

from typing import Any

from . import _numpy, models, ops  # noqa: F401  _numpy first
from ._version import __version__
from .deploy import deploy, export
from .dispatch.registry import BackendUnavailable, backend, get_backend, set_backend
from .explain import explain
from .fuse import fuse, unfuse
from .graphs import graphed
from .models import *  # noqa: F403
from .tune import tune

__all__ = [
    "BackendUnavailable",
    "__version__",
    "backend",
    "deploy",
    "explain",
    "export",
    "fuse",
    "get_backend",
    "graphed",
    "models",
    "ops",
    "set_backend",
    "tune",
    "unfuse",
    *models.__all__,
]


def __getattr__(name: str) -> Any:
    if name.endswith("_Weights"):
        return getattr(models, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
