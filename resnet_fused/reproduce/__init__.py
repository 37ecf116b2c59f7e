"""The papers' figures and tables redrawn from runs of one's own, with the papers' numbers beside them."""

from .command import add_arguments, main
from .experiments import EXPERIMENTS

__all__ = ["EXPERIMENTS", "add_arguments", "main"]
