"""The one way from an operator's call to a kernel: which backends there are, which is right, which is fastest."""

from .serve import compare, fastest, first, measured, serve, slower, timed, trial, untrusted

__all__ = ["compare", "fastest", "first", "measured", "serve", "slower", "timed", "trial", "untrusted"]
