"""What a backbone is asked for: features, the head by itself, another classifier; under timm's names."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import Normalization, Step, as_floating, counters, run, run_stem
from .layout import LaidOut

Values = float | Sequence[float] | Tensor
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # torchvision's, of pixels between 0 and 1


class ImageInput(LaidOut):
    """A network whose first convolution is `conv1`, and that normalises images of bytes itself."""

    conv1: Any
    input_mean: Tensor | None
    input_std: Tensor | None
    _input_values: tuple[list[float], list[float]] | None = None  # what the buffers hold, on whatever device

    def __init__(self) -> None:
        super().__init__()
        for name in ("input_mean", "input_std"):  # no keys of the state_dict, which stay torchvision's
            self.register_buffer(name, None, persistent=False)

    def set_input_normalization(self, mean: Values, std: Values) -> None:
        """From now on images may be uint8, as decoders give them, and are (x / 255 - mean) / std inside the model.

        Where the stem's kernel serves, in inference on a GPU, that happens while it reads them. Floating-point images
        are taken as normalised already, as before. `deploy` and `export` take either, as their example is. It is no
        part of the state_dict, nor of what torch.fx records.

        Args:
            mean, std: of pixels between 0 and 1, one value for every channel or one for all, e.g. (0.485, 0.456, 0.406)
                and (0.229, 0.224, 0.225).

        Raises:
            ValueError: they are not that: not finite, a mean outside 0 to 1, a std that is not positive; or conv1 is no
                convolution.
        """
        means, stds = (self._channel_values(name, given) for name, given in (("mean", mean), ("std", std)))
        if not all(0 <= v <= 1 for v in means):
            raise ValueError(f"mean must be of pixels between 0 and 1, got {mean!r}")
        if not all(v > 0 for v in stds):
            raise ValueError(f"std must be positive, got {std!r}")
        self._input_values = means, stds
        self._hold_input_values(next(self.parameters()).device)

    def _channel_values(self, name: str, given: Values) -> list[float]:
        channels = getattr(self.conv1, "in_channels", None)
        if channels is None:
            raise ValueError(f"conv1 must be a convolution, got {type(self.conv1).__name__}")
        try:
            values = torch.as_tensor(given, dtype=torch.float32, device="cpu").detach()
        except (TypeError, ValueError, RuntimeError):
            values = torch.empty(0, device="cpu")
        if values.dim() > 1 or values.numel() not in (1, channels) or not bool(values.isfinite().all()):
            raise ValueError(f"{name} must be a finite number, or {channels} of them, one a channel; got {given!r}")
        return values.expand(channels).tolist()

    def _hold_input_values(self, device: torch.device) -> None:
        assert self._input_values is not None
        self.input_mean, self.input_std = (
            torch.tensor(v, dtype=torch.float32, device=device) for v in self._input_values
        )

    @property
    def input_normalization(self) -> Normalization | None:
        mean, std = self._buffers.get("input_mean"), self._buffers.get("input_std")
        return None if mean is None or std is None else Normalization(mean, std)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """The numbers come along to every device, float32 when the model becomes half, and through `to_empty`."""
        super()._apply(fn, recurse)
        if self._input_values is not None and self.input_mean is not None:
            self._hold_input_values(self.input_mean.device)
        return self


class Backbone(ImageInput):
    """timm's methods of a model with a pooling layer `avgpool` and a linear layer `fc`."""

    avgpool: nn.Module
    fc: Any
    num_features: int  # channels of `forward_features`

    def forward_features(self, x: Tensor) -> Tensor:
        """Everything in front of pooling: [N, 3, H, W] -> [N, num_features, H', W']."""
        raise NotImplementedError

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pooling and classifier: [N, num_features, H', W'] -> [N, num_classes], or [N, num_features] before it."""
        x = torch.flatten(self.avgpool(x), 1)
        return x if pre_logits else self.fc(x)

    def get_classifier(self) -> nn.Module:
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new linear layer on the old one's device and in its dtype; num_classes=0: none, the model gives features.

        Raises:
            ValueError: another pooling than "avg" is asked for, or num_classes is negative.
        """
        if global_pool not in (None, "avg"):
            raise ValueError(f'global_pool must be "avg" or None, got {global_pool!r}')
        if num_classes < 0:
            raise ValueError(f"num_classes must be 0 or more, got {num_classes}")
        like = next(self.parameters())
        self.fc = nn.Identity()
        if num_classes:
            self.fc = nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype)


class FeatureNet(ImageInput):
    """A model without its head that returns the outputs of its stem and stages as a list, as timm's `features_only`.

    Args:
        net: a `ResNet`; its modules are taken, and those behind the last output left out.
        out_indices: 0 is the stem's BN + ReLU, 1 and up the stages; by default all.

    Shape: [N, 3, H, W] -> one [N, C, H', W'] for every index, smallest index first.
    """

    def __init__(self, net: Any, out_indices: Sequence[int] | None = None) -> None:
        super().__init__()
        indices = range(net.stages + 1) if out_indices is None else out_indices
        if not indices or any(i not in range(net.stages + 1) for i in indices):
            raise ValueError(f"out_indices must be out of 0 to {net.stages}, got {out_indices}")
        self.channels_last = net.channels_last
        self.out_indices = tuple(sorted(set(indices)))
        self.conv1, self.bn1, self.relu, self.maxpool = net.conv1, net.bn1, net.relu, net.maxpool
        self.input_mean, self.input_std, self._input_values = net.input_mean, net.input_std, net._input_values
        self.feature_info = FeatureInfo()
        channels, reduction = net.conv1.out_channels, net.conv1.stride[0]
        for i in range(self.out_indices[-1] + 1):
            if i:
                stage = getattr(net, f"layer{i}")
                self.add_module(f"layer{i}", stage)
                channels = _last(stage[0]).out_channels
                reduction *= max(m.stride[0] for m in stage[0].modules() if isinstance(m, nn.Conv2d))
                reduction *= net.maxpool.stride if i == 1 and net.maxpool is not None else 1
            if i in self.out_indices:
                module = f"layer{i}" if i else "relu"
                self.feature_info.append({"num_chs": channels, "reduction": reduction, "module": module})

    def forward(self, x: Tensor) -> list[Tensor]:
        if not self.training or torch.compiler.is_compiling():
            return self._features(x)
        with counters.together():
            return self._features(x)

    def _features(self, x: Tensor) -> list[Tensor]:
        step, normalization, found = Step(self.conv1, self.bn1, self.relu), self.input_normalization, []
        if self.out_indices[0] > 0:
            x = run_stem(x, step, self.maxpool, normalization)
        else:
            x = run(as_floating(x, self.conv1, normalization), step)
            found.append(x)
            if self.out_indices[-1] > 0 and self.maxpool is not None:
                x = self.maxpool(x)
        for i in range(1, self.out_indices[-1] + 1):
            x = getattr(self, f"layer{i}")(x)
            if i in self.out_indices:
                found.append(x)
        return found


class FeatureInfo(list[dict[str, Any]]):
    """Of every output: `num_chs`, `reduction` of the image's sides, `module`."""

    def channels(self) -> list[int]:
        return [info["num_chs"] for info in self]

    def reduction(self) -> list[int]:
        return [info["reduction"] for info in self]

    def module_name(self) -> list[str]:
        return [info["module"] for info in self]


def _last(block: Any) -> nn.Conv2d:
    """The convolution whose output the block returns."""
    return block.conv3 if hasattr(block, "conv3") else block.conv2
