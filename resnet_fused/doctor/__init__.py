"""`resnet-fused doctor`: what this machine makes of the package, for a user, a bug report and a GPU's first minute."""

from .command import add_arguments, main

__all__ = ["add_arguments", "main"]
