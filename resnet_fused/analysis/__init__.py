"""Analysis: what the layers answer, the gradients that reach them, and what each block is worth."""

from .command import add_arguments, main
from .measures import ShortcutOnly, gradient_norms, lesions, responses

__all__ = ["ShortcutOnly", "add_arguments", "gradient_norms", "lesions", "main", "responses"]
