"""The shortcut without parameters."""

import torch.nn.functional as F
from torch import Tensor, nn


class PadShortcut(nn.Module):
    """The shortcut without parameters (option A): every stride-th pixel, and zeros for the new channels.

    Shape: [N, C, H, W] -> [N, channels, ceil(H / stride), ceil(W / stride)], in x's layout.
    """

    def __init__(self, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.channels = channels
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        if self.stride > 1:
            x = F.avg_pool2d(x, 1, self.stride)  # pooling's gradient keeps channels_last, slicing's does not
        return F.pad(x, (0, 0, 0, 0, 0, self.channels - x.shape[1]))

    def extra_repr(self) -> str:
        return f"{self.channels}, stride={self.stride}"
