"""The one way from an operator's call to a kernel: which backends there are, which is right, which is fastest."""

from .serve import compare, fastest, refused, serve

__all__ = ["compare", "fastest", "refused", "serve"]
