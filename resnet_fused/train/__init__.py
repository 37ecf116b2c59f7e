"""Training: the papers' recipes on CIFAR-10 and ImageNet's layout, in one process or several."""

from .checkpoint import load_model
from .command import add_arguments, main
from .recipes import RECIPES, Settings

__all__ = ["RECIPES", "Settings", "add_arguments", "load_model", "main"]
