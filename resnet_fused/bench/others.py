"""Other people's models for `bench --fuse`: what they are, beside the same ones fused."""

import importlib
from types import ModuleType

from torch import nn

from ..fuse import fuse

TIMM = "timm/"  # in front of timm's names; torchvision's have nothing in front


class Originals:
    """Stands where torchvision does: `get_model` of any classification model of torchvision or timm."""

    def __init__(self, torchvision: ModuleType) -> None:
        self.torchvision = torchvision
        self.models = self

    def check(self, name: str) -> None:
        """Raises ValueError for an unknown name, ImportError where timm is missing."""
        known = _timm().list_models() if name.startswith(TIMM) else self._classification()
        if name.removeprefix(TIMM) not in known:
            raise ValueError(
                f"model: unknown {name!r}; there are torchvision's, e.g. regnet_y_400mf, and timm/resnet50d"
            )

    def get_model(self, name: str, weights: None = None) -> nn.Module:
        if name.startswith(TIMM):
            model = _timm().create_model(name.removeprefix(TIMM), pretrained=False)
        else:
            options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
            model = self.torchvision.models.get_model(name, weights=None, **options)
        for m in model.modules():  # two runs are compared
            if isinstance(m, (nn.modules.dropout._DropoutNd, self.torchvision.ops.StochasticDepth)):
                m.p = 0.0
        return model

    def _classification(self) -> list[str]:
        return self.torchvision.models.list_models(module=self.torchvision.models)


class Fused:
    """Stands where this package's models do: the same ones, fused."""

    def __init__(self, originals: Originals) -> None:
        self.originals = originals

    def get_model(self, name: str, weights: None = None) -> nn.Module:
        return fuse(self.originals.get_model(name))


def _timm() -> ModuleType:
    try:
        return importlib.import_module("timm")
    except ModuleNotFoundError:
        raise ImportError('timm is not installed: pip install "resnet_fused[bench]"') from None
