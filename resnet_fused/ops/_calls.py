"""What the operators' records of a call have in common."""

from collections.abc import Hashable, Iterable
from typing import Any, NamedTuple

from torch import Tensor
from torch.autograd.graph import increment_version


class BN(NamedTuple):
    """The four vectors [C] of a BN, each of which may be None."""

    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor | None
    var: Tensor | None


NO_BN = BN(None, None, None, None)


def power_of_two(rows: int) -> int:
    """Rounded up: images of many sizes are few classes of layers."""
    return 1 << max(0, rows - 1).bit_length()


def metadata(call: Iterable[Any]) -> Hashable:
    """All of the fields but the tensors' values and addresses, of which the alignment to 16 bytes counts."""
    return tuple(
        (a.shape, a.stride(), a.dtype, a.device, a.data_ptr() & 15)
        if isinstance(a, Tensor)
        else (tuple(a) if isinstance(a, list) else a)
        for a in call
    )


def named(call: Any) -> dict[str, Any]:
    """The fields of a NamedTuple."""
    return call._asdict()


def wrote(tensors: Iterable[Tensor | None]) -> None:
    """Tell autograd, which counts the writes to a tensor, but for those of inference mode."""
    if written := [t for t in tensors if t is not None and not t.is_inference()]:
        increment_version(written)
