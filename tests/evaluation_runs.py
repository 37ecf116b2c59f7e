"""Untrained networks of `resnet-fused train`, for the commands that look at them."""

import pytest
import torch

from resnet_fused import models
from resnet_fused.train import checkpoint

CLASSES = tuple(f"pattern {i}" for i in range(10))
NARROW = {"num_classes": 10, "widths": (8, 8, 8, 8)}
SMALL = ("--data", "synthetic:60x16", "--device", "cpu")


@pytest.fixture(name="saved")
def saved_fixture(tmp_path):
    """Writes the checkpoint of an untrained network whose statistics are those of noise, and returns its file."""

    def saved(name, seed=0, recipe="cifar", classes=CLASSES, **kwargs):
        torch.manual_seed(seed)
        model = models.get_model(name, **{"num_classes": len(classes), **kwargs})
        with torch.no_grad():
            model.train()(torch.randn(16, 3, 16 if recipe == "cifar" else 64, 16 if recipe == "cifar" else 64))
        folder = tmp_path / f"{name}-{seed}-{recipe}"
        folder.mkdir()
        mean = torch.full((3, 16, 16), 0.5) if recipe == "cifar" else torch.full((3, 1, 1), 0.4)
        content = {
            "model": name,
            "model_kwargs": {"num_classes": len(classes), **kwargs},
            "state_dict": model.state_dict(),
            "mean": mean,
            "std": torch.full((3, 1, 1), 0.2),
            "crop": None if recipe == "cifar" else 224,
            "classes": list(classes),
            "config": {"recipe": recipe, "data": "synthetic:60x16"},
            "step": 1,
        }
        return checkpoint.save(folder, content)

    return saved
