"""One page of results that people look at: every figure with its conditions, and two runs compared."""

from .command import add_arguments, main

__all__ = ["add_arguments", "main"]
