"""Whole models measured beside torchvision's: parity first, then throughput in interleaved rounds.

Every variant gets the same weights and the same images. One whose numbers are wrong is refused and not timed.
"""

from .cases import SUITES
from .command import add_arguments, main, progress
from .conditions import conditions, result_name
from .engine import DTYPES, run
from .report import Report, Result, write_json
from .timing import paired_ratios, time_rounds
from .variants import VARIANTS, default_variants

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
