"""Whole models measured beside torchvision's: parity first, then throughput in interleaved rounds.

Every variant gets the same weights and the same images. One whose numbers are wrong is refused and not timed.
"""

from .cases import SUITES, VARIANTS
from .command import add_arguments, main, progress
from .engine import DTYPES, default_variants, run
from .report import Report, Result, conditions, result_name, write_json
from .timing import paired_ratios, time_rounds

__all__ = [
    "DTYPES",
    "SUITES",
    "VARIANTS",
    "Report",
    "Result",
    "add_arguments",
    "conditions",
    "default_variants",
    "main",
    "paired_ratios",
    "progress",
    "result_name",
    "run",
    "time_rounds",
    "write_json",
]
