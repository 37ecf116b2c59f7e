"""The fused operators: one file each, which is its whole contract."""

from .batch_norm_act import batch_norm_act
from .conv_bn_act import conv_bn_act
from .stem import stem

__all__ = ["batch_norm_act", "conv_bn_act", "stem"]
