"""This package's models in timm's registry, under `fused_` and their names.

import resnet_fused.timm_models
model = timm.create_model("fused_resnet50", pretrained=True, num_classes=10)
"""

from collections.abc import Callable
from typing import Any

from timm.models import register_model  # with the extra [bench]; an ImportError names it

from . import models

__all__: list[str] = []


def _entry(name: str) -> Callable[..., models.ResNet]:
    def build(
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: Any = None,
        cache_dir: Any = None,
        num_classes: int | None = None,
        **kwargs: Any,
    ) -> models.ResNet:
        """pretrained: torchvision's default weights, with a new head where num_classes is given.

        Raises:
            ValueError: an argument of timm's that these models don't have, or there are no weights.
        """
        if pretrained_cfg is not None or pretrained_cfg_overlay is not None or cache_dir is not None:
            raise ValueError(f"fused_{name} takes no pretrained_cfg, pretrained_cfg_overlay or cache_dir of timm's")
        kwargs |= {} if pretrained or num_classes is None else {"num_classes": num_classes}
        model = models.get_model(name, weights="DEFAULT" if pretrained else None, **kwargs)
        if pretrained and num_classes is not None:
            model.reset_classifier(num_classes)
        return model

    build.__name__ = build.__qualname__ = f"fused_{name}"
    return build


for _name in models.list_models():
    register_model(_entry(_name))
