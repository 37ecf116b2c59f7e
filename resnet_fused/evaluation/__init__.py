"""Evaluation: top-1 and top-5 error of one network or several, by the papers' ways of looking at an image."""

from .command import add_arguments, main
from .networks import Network
from .scores import Result, Samples, batches, evaluate
from .views import CENTER, SCALES, SINGLE, TEN_CROPS, Views, fully_convolutional, multi_scale

__all__ = [
    "CENTER",
    "SCALES",
    "SINGLE",
    "TEN_CROPS",
    "Network",
    "Result",
    "Samples",
    "Views",
    "add_arguments",
    "batches",
    "evaluate",
    "fully_convolutional",
    "main",
    "multi_scale",
]
