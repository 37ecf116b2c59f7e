"""The exponential moving average of a network's weights and statistics."""

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

Tensors = tuple[Tensor, ...] | list[Tensor]


class Average:
    """A copy of the model that follows it.

    Args:
        decay: what stays of the average in an update; at first less, (1 + n) / (10 + n) after n updates.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._decay = decay
        self._averaged = AveragedModel(model, multi_avg_fn=self._mean, use_buffers=True)

    @property
    def model(self) -> nn.Module:
        return self._averaged.module

    @property
    def count(self) -> int:
        return int(self._averaged.n_averaged)

    def update(self, model: nn.Module) -> None:
        """After an iteration."""
        self._averaged.update_parameters(model)

    def load_state_dict(self, state_dict: dict[str, Tensor], count: int) -> None:
        self.model.load_state_dict(state_dict)
        self._averaged.n_averaged.fill_(count)

    def _mean(self, averages: Tensors, values: Tensors, count: Tensor | int) -> None:
        n = self.count  # on the host: `count` is on the device
        get_ema_multi_avg_fn(min(self._decay, (1 + n) / (10 + n)))(averages, values, count)
