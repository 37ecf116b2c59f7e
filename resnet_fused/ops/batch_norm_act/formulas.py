"""The steps of `batch_norm_act` in plain PyTorch: what serves without a fused backend and what kernels are held to.

z is x + pre_add, or x. Images come in any layout; vectors are [C]; sums and statistics are float32, or float64.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


def _column(v: Tensor) -> Tensor:
    return _wide(v)[:, None, None]


def statistics(x: Tensor, pre_add: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """mean [C] and M2 [C], the sum of squares around it, in float32; x + pre_add, of no elements without a pre_add."""
    total = x.new_empty(0) if pre_add is None else x + pre_add
    z = _wide(x if pre_add is None else total)
    mean = z.mean((0, 2, 3)) if z.numel() else z.new_zeros(z.shape[1])
    return mean, (z - _column(mean)).square().sum((0, 2, 3)), total


def split_ranks(ranks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Every rank's means [ranks, C], M2 [ranks, C] and count [ranks, 1], of [ranks, 2 C + 1]."""
    C = ranks.shape[1] // 2
    means, m2s, counts = ranks.split([C, C, 1], 1)
    return means, m2s, counts


def merge_ranks(ranks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """mean [C], var [C] and count [] of the whole batch, by Chan's formula; a rank may have counted nothing."""
    means, m2s, counts = split_ranks(ranks)
    count = counts.sum()
    pivot = means[0]
    mean = pivot + ((means - pivot) * counts).sum(0) / count
    return mean, (m2s + (means - mean).square() * counts).sum(0) / count, count


def _normalize(z: Tensor, weight, bias, mean, var, eps: float) -> Tensor:
    if mean is None:
        return _wide(z)
    scale = (_wide(var) + eps).rsqrt()
    y = (_wide(z) - _column(mean)) * _column(scale if weight is None else scale * _wide(weight))
    return y if bias is None else y + _column(bias)


def apply(
    x, weight, bias, mean, var, eps, residual, weight2, bias2, mean2, var2, pre_add, relu, save_mask
) -> tuple[Tensor, Tensor, Tensor]:
    """y; where the ReLU's gradient passes: [N * H * W, ceil(C / 8)] uint8, channel 8 * i + j bit j; x + pre_add."""
    total = x.new_empty(0) if pre_add is None else x + pre_add
    z = x if pre_add is None else total
    y = pre_activation(z, weight, bias, mean, var, eps, residual, weight2, bias2, mean2, var2)
    passes = ~(y <= 0)
    y = y.relu() if relu else y
    return y.to(x.dtype), _pack(passes) if save_mask else x.new_empty(0, dtype=torch.uint8), total


def plain_apply(
    x, weight, bias, mean, var, eps, residual, weight2, bias2, mean2, var2, pre_add, relu, save_mask
) -> tuple[Tensor, Tensor, Tensor]:
    """`apply` with PyTorch's own batch norm, to its bits; it has no mask."""

    def through(z, *bn):
        return z if mean is None else F.batch_norm(z, bn[2], bn[3], bn[0], bn[1], False, 0.0, eps)

    total = x.new_empty(0) if pre_add is None else x + pre_add
    y = through(x if pre_add is None else total, weight, bias, mean, var)
    if residual is not None:
        y = y + (residual if mean2 is None else through(residual, weight2, bias2, mean2, var2))
    return F.relu(y) if relu else y, x.new_empty(0, dtype=torch.uint8), total


def _pack(passes: Tensor) -> Tensor:
    bits = passes.permute(0, 2, 3, 1).flatten(0, 2).to(torch.uint8)
    bits = F.pad(bits, (0, -bits.shape[1] % 8)).unflatten(1, (-1, 8))
    return (bits << torch.arange(8, device=bits.device)).sum(2).to(torch.uint8)


def _unpack(mask: Tensor, shape: torch.Size) -> Tensor:
    N, C, H, W = shape
    bits = (mask[:, :, None] >> torch.arange(8, device=mask.device)) & 1
    return bits.flatten(1)[:, :C].reshape(N, H, W, C).permute(0, 3, 1, 2).bool()


def pre_activation(z, weight, bias, mean, var, eps, residual, weight2, bias2, mean2, var2) -> Tensor:
    y = _normalize(z, weight, bias, mean, var, eps)
    return y if residual is None else y + _normalize(residual, weight2, bias2, mean2, var2, eps)


def masked(dy, z, weight, bias, mean, var, eps, residual, weight2, bias2, mean2, var2, relu_mask, relu) -> Tensor:
    """dz: dy where the ReLU's gradient passes, in float32."""
    dz = _wide(dy)
    if not relu:
        return dz
    if relu_mask is not None:
        return torch.where(_unpack(relu_mask, dy.shape), dz, 0)
    y = pre_activation(z, weight, bias, mean, var, eps, residual, weight2, bias2, mean2, var2)
    return torch.where(y <= 0, 0, dz)


def backward_sums(
    dy, z, weight, bias, mean, var, eps, residual, weight2, bias2, mean2, var2, relu_mask, relu
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums [C] over N, H and W of dz, dz * xhat and dz * rhat (of no elements where the residual has no BN)."""
    dz = masked(dy, z, weight, bias, mean, var, eps, residual, weight2, bias2, mean2, var2, relu_mask, relu)
    xhat = _normalize(z, None, None, mean, var, eps)
    sum_rhat = mean.new_empty(0)
    if mean2 is not None:
        sum_rhat = (dz * _normalize(residual, None, None, mean2, var2, eps)).sum((0, 2, 3))
    return dz.sum((0, 2, 3)), (dz * xhat).sum((0, 2, 3)), sum_rhat


def backward_dx(
    dy, z, weight, bias, mean, var, eps, residual, weight2, bias2, mean2, var2, relu_mask, relu,
    sum_dz, sum_dz_xhat, sum_dz_rhat, count, dtotal, need_dx, need_dresidual,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The images' gradients; `sum_dz_xhat` is None where the statistics were given, `sum_dz_rhat` likewise.

    count: the elements a channel behind the statistics, where they are not dy's alone.
    """
    dz = masked(dy, z, weight, bias, mean, var, eps, residual, weight2, bias2, mean2, var2, relu_mask, relu)
    count = dy.numel() // dy.shape[1] if count is None else count

    def through(x, w, m, v, sum_hat):
        if m is None:
            return dz
        scale = (_wide(v) + eps).rsqrt()
        g = dz
        if sum_hat is not None:
            xhat = _normalize(x, None, None, m, v, eps)
            g = dz - _column(sum_dz / count) - xhat * _column(sum_hat / count)
        return g * _column(scale if w is None else scale * _wide(w))

    dx = dresidual = dy.new_empty(0)
    if need_dx:
        dx = through(z, weight, mean, var, sum_dz_xhat)
        dx = (dx if dtotal is None else dx + dtotal).to(dy.dtype)
    if need_dresidual:
        dresidual = through(residual, weight2, mean2, var2, sum_dz_rhat).to(dy.dtype)
    return dx, dresidual


def differentiable_backward(
    dy, z, weight, bias, mean, var, eps, residual, weight2, bias2, mean2, var2, relu_mask, relu, dtotal, needs, batch
) -> tuple[Tensor | None, ...]:
    """Gradients of z, weight, bias, residual, weight2 and bias2, as `needs` asks, with a graph of their own.

    batch: the statistics are z's and the residual's, not given.
    """

    def through(t, w, b, m, v):
        return F.batch_norm(t, None if batch else m, None if batch else v, w, b, batch, 0.0, eps)

    inputs = (z, weight, bias, residual, weight2, bias2)
    # aliases, so that no path from y leads to one of them through another: z may come from the same weight
    z, weight, bias, residual, weight2, bias2 = (t if t is None else t.view_as(t) for t in inputs)
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        if not create_graph:  # saved tensors come without their need of gradients where no graph is asked for
            given = (z, weight, bias, residual, weight2, bias2)
            z, weight, bias, residual, weight2, bias2 = (
                None if t is None else t.detach().requires_grad_() for t in given
            )
        y = through(z, weight, bias, mean, var)
        y2 = residual if mean2 is None else through(residual, weight2, bias2, mean2, var2)
    dz = dy
    if relu and relu_mask is not None:
        dz = torch.where(_unpack(relu_mask, dy.shape), dy, 0)
    elif relu:
        dz = torch.where((y if y2 is None else y + y2) <= 0, 0, dy)

    def gradients(y, inputs, needs):
        asked = [t for t, needed in zip(inputs, needs, strict=True) if needed]
        found = iter(torch.autograd.grad(y, asked, dz, retain_graph=True, create_graph=create_graph) if asked else ())
        return [next(found) if needed else None for needed in needs]

    dx, *vectors = gradients(y, (z, weight, bias), needs[:3])
    dx = dx if dx is None or dtotal is None else dx + dtotal
    if mean2 is None:
        return dx, *vectors, dz if needs[3] else None, None, None
    return dx, *vectors, *gradients(y2, (residual, weight2, bias2), needs[3:])


def update_running(running_mean, running_var, mean, var, count, momentum: float) -> None:
    """nn.BatchNorm2d's: the unbiased variance enters the running one."""
    if running_mean is None:
        return
    correction = count / (count - 1)
    with torch.no_grad():
        for running, new in ((running_mean, mean), (running_var, var * correction)):
            if running.dtype == new.dtype:
                running.lerp_(new, momentum)
            else:  # half-precision statistics are rounded once
                running.copy_(running.to(new.dtype).lerp(new, momentum))
