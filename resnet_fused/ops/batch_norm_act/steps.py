"""The four registered operators behind `batch_norm_act`: statistics, apply, backward sums, dx.

Collectives stand between them. Each has its formula in plain PyTorch (`eager_*`), which serves SyncBatchNorm under the
eager backend and is what the kernels are checked against before their first use. z is x + pre_add, or x.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import _cuda, _registry, _triton, _trust
from .. import _checks, _numerics
from .._library import register

if _triton.IMPORT_ERROR is None:
    from ..._triton import batch_norm_act as _triton_apply
    from ..._triton import batch_norm_train as _triton_train

_BN2 = "Tensor? residual, Tensor? residual_weight, Tensor? residual_bias, Tensor? residual_mean, Tensor? residual_var"
STATISTICS = "batch_norm_act_statistics(Tensor x, Tensor? pre_add) -> (Tensor, Tensor, Tensor)"
APPLY = (
    "batch_norm_act_apply(Tensor x, Tensor? weight, Tensor? bias, Tensor? mean, Tensor? var, float eps, "
    f"{_BN2}, Tensor? pre_add, bool relu, bool save_mask) -> (Tensor, Tensor, Tensor)"
)
SUMS = (
    "batch_norm_act_backward_sums(Tensor dy, Tensor z, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, "
    f"float eps, {_BN2}, Tensor? relu_mask, bool relu) -> (Tensor, Tensor, Tensor)"
)
DX = (
    "batch_norm_act_backward_dx(Tensor dy, Tensor z, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, float eps, "
    f"{_BN2}, Tensor? relu_mask, bool relu, Tensor? sum_dz, Tensor? sum_dz_xhat, Tensor? sum_dz_rhat, Tensor? count, "
    "Tensor? dtotal, bool need_dx, bool need_dresidual) -> (Tensor, Tensor)"
)


def supported(backend: str, x: Tensor, vectors: tuple[Tensor | None, ...]) -> str | None:
    """Why a backend can't serve a call, or None; from metadata alone."""
    if backend not in ("cuda", "triton"):
        return (
            f"{backend} serves convolutions, and BN behind them, in eval mode without gradients only: call it under "
            "torch.no_grad(), and pre-activation networks, whose BN comes first, with another backend"
        )
    return _checks.kernel_dtypes(x, vectors, uniform=False)


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


def _column(v: Tensor) -> Tensor:
    return _wide(v)[:, None, None]


def eager_statistics(x: Tensor, pre_add: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """mean [C] and M2 [C], the sum of squares around it, in float32; x + pre_add, of no elements without a pre_add."""
    total = x.new_empty(0) if pre_add is None else x + pre_add
    z = _wide(x if pre_add is None else total)
    mean = z.mean((0, 2, 3)) if z.numel() else z.new_zeros(z.shape[1])
    return mean, (z - _column(mean)).square().sum((0, 2, 3)), total


def _normalize(z: Tensor, weight, bias, mean, var, eps: float) -> Tensor:
    if mean is None:
        return _wide(z)
    scale = (_wide(var) + eps).rsqrt()
    y = (_wide(z) - _column(mean)) * _column(scale if weight is None else scale * _wide(weight))
    return y if bias is None else y + _column(bias)


def eager_apply(
    x, weight, bias, mean, var, eps, residual, weight2, bias2, mean2, var2, pre_add, relu, save_mask
) -> tuple[Tensor, Tensor, Tensor]:
    """y; where the ReLU's gradient passes: [N * H * W, ceil(C / 8)] uint8, channel 8 * i + j bit j; x + pre_add."""
    total = x.new_empty(0) if pre_add is None else x + pre_add
    y = _normalize(x if pre_add is None else total, weight, bias, mean, var, eps)
    if residual is not None:
        y = y + _normalize(residual, weight2, bias2, mean2, var2, eps)
    passes = ~(y <= 0)
    y = y.relu() if relu else y
    return y.to(x.dtype), _pack(passes) if save_mask else x.new_empty(0, dtype=torch.uint8), total


def plain_apply(
    x, weight, bias, mean, var, eps, residual, weight2, bias2, mean2, var2, pre_add, relu, save_mask
) -> tuple[Tensor, Tensor, Tensor]:
    """`eager_apply` with PyTorch's own batch norm, to its bits; it has no mask."""

    def through(z, *bn):
        return z if mean is None else F.batch_norm(z, bn[2], bn[3], bn[0], bn[1], False, 0.0, eps)

    total = x.new_empty(0) if pre_add is None else x + pre_add
    y = through(x if pre_add is None else total, weight, bias, mean, var)
    if residual is not None:
        y = y + (residual if mean2 is None else through(residual, weight2, bias2, mean2, var2))
    return F.relu(y) if relu else y, x.new_empty(0, dtype=torch.uint8), total


def _pack(passes: Tensor) -> Tensor:
    bits = passes.permute(0, 2, 3, 1).flatten(0, 2)
    bits = torch.nn.functional.pad(bits, (0, -bits.shape[1] % 8)).unflatten(1, (-1, 8))
    return (bits << torch.arange(8, device=bits.device)).sum(2).to(torch.uint8)


def _unpack(mask: Tensor, shape: torch.Size) -> Tensor:
    N, C, H, W = shape
    bits = (mask[:, :, None] >> torch.arange(8, device=mask.device)) & 1
    return bits.flatten(1)[:, :C].reshape(N, H, W, C).permute(0, 3, 1, 2).bool()


def _dz(dy, z, weight, bias, mean, var, eps, residual, weight2, bias2, mean2, var2, relu_mask, relu) -> Tensor:
    """dy where the ReLU's gradient passes, in float32."""
    dz = _wide(dy)
    if not relu:
        return dz
    if relu_mask is not None:
        return torch.where(_unpack(relu_mask, dy.shape), dz, 0)
    y = _normalize(z, weight, bias, mean, var, eps)
    if residual is not None:
        y = y + _normalize(residual, weight2, bias2, mean2, var2, eps)
    return torch.where(y <= 0, 0, dz)


def eager_sums(
    dy, z, weight, bias, mean, var, eps, residual, weight2, bias2, mean2, var2, relu_mask, relu
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums [C] over N, H and W of dz, dz * xhat and dz * rhat (of no elements where the residual has no BN)."""
    dz = _dz(dy, z, weight, bias, mean, var, eps, residual, weight2, bias2, mean2, var2, relu_mask, relu)
    xhat = _normalize(z, None, None, mean, var, eps)
    sum_rhat = mean.new_empty(0)
    if mean2 is not None:
        sum_rhat = (dz * _normalize(residual, None, None, mean2, var2, eps)).sum((0, 2, 3))
    return dz.sum((0, 2, 3)), (dz * xhat).sum((0, 2, 3)), sum_rhat


def eager_dx(
    dy, z, weight, bias, mean, var, eps, residual, weight2, bias2, mean2, var2, relu_mask, relu,
    sum_dz, sum_dz_xhat, sum_dz_rhat, count, dtotal, need_dx, need_dresidual,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The images' gradients; `sum_dz_xhat` is None where the statistics were given, `sum_dz_rhat` likewise.

    count: the elements a channel behind the statistics, where they are not dy's alone.
    """
    dz = _dz(dy, z, weight, bias, mean, var, eps, residual, weight2, bias2, mean2, var2, relu_mask, relu)
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


def launch(backend: str, x: Tensor, *args) -> tuple[Tensor, Tensor]:
    """The apply pass of one backend, without a mask; arguments as in APPLY, of any layout."""
    x, *args = _dense((x, *args))
    return {"cuda": _cuda.batch_norm_act, "triton": _triton_apply.apply}[backend](x, *args)


def _dense(args: tuple) -> list:
    return [a if not isinstance(a, Tensor) else _numerics.dense(a) for a in args]


def _training(backend: str):
    return _cuda if backend == "cuda" else _triton_train


def _launch_statistics(backend: str, x: Tensor, pre_add: Tensor | None):
    return _training(backend).statistics(*_dense((x, pre_add)))


def _launch_apply(backend: str, *args):
    *args, save_mask = args
    if save_mask:
        x, weight, bias, mean, var, eps, residual, *_, pre_add, _ = _dense(args)
        total = x.new_empty(0) if pre_add is None else x + pre_add
        z = x if pre_add is None else total
        return *_training(backend).apply_with_mask(z, weight, bias, mean, var, eps, residual), total
    y, total = launch(backend, *args)
    return y, args[0].new_empty(0, dtype=torch.uint8), total


def _launch_sums(backend: str, *args):
    return _training(backend).backward_sums(*_dense(args))


def _launch_dx(backend: str, *args):
    return _training(backend).backward_dx(*_dense(args))


def _step(schema: str, launcher: Callable, eager: Callable, fake: Callable) -> Callable:
    """Register one operator: choose a backend, check it before its first use, launch it."""
    name = schema.partition("(")[0]

    def impl(*args):
        x, vectors = args[0], tuple(a for a in args if isinstance(a, Tensor) and a.dim() == 1 and a.numel() > 1)
        vectors = vectors if name == "batch_norm_act_apply" else ()

        def serves(backend: str) -> str | None:
            reason = supported(backend, x, vectors)
            if reason is not None or x.numel() == 0:
                return reason
            return _trust.refused(_class(name, backend, args), x.device, lambda: _compare(backend, args))

        choice = _registry.choose(name, x.device, serves, "batch_norm")
        _registry.record(name, choice, args)
        if choice.backend == "eager":  # a check failed after the caller had settled on this operator
            plain = name == "batch_norm_act_apply" and not args[-1]
            results, shapes = (plain_apply if plain else eager)(*args), fake(*args)
            return tuple(
                r if r.numel() == 0 else r.to(s.dtype).clone(memory_format=_format(s))
                for r, s in zip(results, shapes, strict=True)
            )
        return launcher(choice.backend, *args)

    def _compare(backend: str, args: tuple) -> str | None:
        args = _draw(args)
        results = launcher(backend, *args)
        double = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
        magnitudes = eager(*(a.abs() if isinstance(a, Tensor) else a for a in double))
        for i, (result, oracle, plain, magnitude) in enumerate(
            zip(results, eager(*double), eager(*args), magnitudes, strict=True)
        ):
            if result.shape != oracle.shape:
                return f"result {i} has shape {tuple(result.shape)}, not {tuple(oracle.shape)}"
            if not result.is_floating_point():
                flipped = (result != plain).sum().item()  # pre-activations near 0 may round to either side
                if flipped > 0.01 * result.numel():
                    return f"result {i} differs in {flipped} of {result.numel()} bytes"
                continue
            budget = 2 * _numerics.largest(plain.double() - oracle)
            budget += torch.finfo(result.dtype).eps * _numerics.largest(oracle)
            # coarse, for long sums: a wrong kernel is off by far more
            budget += 1e-5 * max(_numerics.largest(magnitude), _numerics.largest(oracle))
            error = _numerics.largest(result.double() - oracle)
            if not error <= budget:
                return f"result {i} is off by {error:.3g}, the budget is {budget:.3g}"
        return None

    return register(schema, impl, fake)


def _format(t: Tensor) -> torch.memory_format:
    return torch.channels_last if t.dim() == 4 else torch.contiguous_format


def _class(name: str, backend: str, args: tuple) -> str:
    """Calls that run the same compiled kernel share a class."""
    x = args[0]
    given = "".join(
        "-" if a is None else str(a.dtype)[6] if isinstance(a, Tensor) else str(a)[0] if isinstance(a, bool) else ""
        for a in args
    )
    return f"{name}/{backend}/{x.dtype}/C{min(x.shape[1], 256)}/{x.shape[1] % 16}/{given}"


def _draw(args: tuple) -> tuple:
    """Random arguments like these, of at most two images."""
    draw = _numerics.Draw(args[0].device)
    N, C, H, W = args[0].shape
    N = min(N, 2)
    drawn = []
    for a in args:
        if not isinstance(a, Tensor):
            drawn.append(a)
        elif a.dtype == torch.uint8:
            drawn.append(draw.bits((N * H * W, -(-C // 8))))
        elif a.numel() == 1 and a.dim() == 0:
            drawn.append(torch.full_like(a, N * H * W))
        else:
            drawn.append(draw.like(a, positive=a.dim() == 1))  # variances have to be; the others may be
    return tuple(drawn)


def _fake_statistics(x, pre_add):
    mean = x.new_empty(x.shape[1], dtype=torch.float32)
    return mean, torch.empty_like(mean), x.new_empty(0) if pre_add is None else _image(x)


def _fake_apply(x, *args):
    *_, pre_add, _, save_mask = args
    N, C, H, W = x.shape
    mask = x.new_empty((N * H * W, (C + 7) // 8) if save_mask else 0, dtype=torch.uint8)
    return _image(x), mask, x.new_empty(0) if pre_add is None else _image(x)


def _fake_sums(dy, *args):
    sums = dy.new_empty(dy.shape[1], dtype=torch.float32)
    return sums, torch.empty_like(sums), torch.empty_like(sums) if args[9] is not None else sums.new_empty(0)


def _fake_dx(dy, *args):
    need_dx, need_dresidual = args[-2:]
    return _image(dy) if need_dx else dy.new_empty(0), _image(dy) if need_dresidual else dy.new_empty(0)


def _image(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


statistics = _step(STATISTICS, _launch_statistics, eager_statistics, _fake_statistics)
apply = _step(APPLY, _launch_apply, eager_apply, _fake_apply)
backward_sums = _step(SUMS, _launch_sums, eager_sums, _fake_sums)
backward_dx = _step(DX, _launch_dx, eager_dx, _fake_dx)
