"""What ran in every layer of a model, and why not something faster.

The reasons are told where they are found: what a backend can't serve in its `<op>.py` (`unsupported`, `split`), what is
wrong or slower on this device in `dispatch/serve.py` (`decide`), which modules are left alone in `layers/steps.py`.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from . import layers
from .dispatch import registry
from .layers.steps import Fusable

_OUTSIDE = "PyTorch"  # what runs a module that is in no step
_BY_OTHERS = {"stem": "conv_bn_act + pooling"}  # operators that are others where no kernel of their own serves


@dataclass
class Row:
    """One step of a block, or one module outside the steps."""

    layer: str  # the convolution's name in the model; the BN's in a step without one
    modules: str  # what the step is made of, e.g. "Conv2d + BatchNorm2d + add + ReLU"
    ran: list[str] = field(default_factory=list)  # e.g. ["conv_bn_act: triton (1.80x eager)"], where it was timed
    why: list[str] = field(default_factory=list)  # why not something faster


class Explanation(list[Row]):
    """Rows in the model's order; prints as a table that ends in `summary`."""

    summary = ""  # how many steps were fused, and what would help

    def __str__(self) -> str:
        cells = [(r.layer, r.modules, ", ".join(r.ran), "; ".join(dict.fromkeys(r.why))) for r in self]
        table = [("layer", "modules", "ran", "why not faster"), *cells]
        widths = [max(len(row[i]) for row in table) for i in range(3)]
        lines = ["  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[3]]) for row in table]
        return "\n".join([*lines, self.summary])


class _Explainer:
    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.names = {module: name for name, module in model.named_modules()}
        self.device = device
        self.rows: dict[nn.Module, Row] = {}  # by convolution or BN, or the module that stands in its place
        self.seen: set[nn.Module] = set()
        self.open: list[Row] = []
        self.pool: nn.Module | None = None  # of the stem that is open, and not yet served with it
        self.pools: set[nn.Module] = set()  # that a stem asked for

    def begin(
        self, step: layers.Step, unfusable: str | None, takes_over: bool = False, pool: nn.Module | None = None
    ) -> None:
        row = self._row(step, add=step.addend is not None, takes_over=takes_over)
        self.open.append(row)
        self.pool = pool
        if pool is not None:
            self.pools.add(pool)
        if not registry.fuses(self.device):
            row.ran = [registry.PLAIN]
            row.why.append(
                f"backend {registry.PLAIN!r} is forced"
                if registry.get_backend() == registry.PLAIN
                else f"backend 'auto' is eager on {self.device.type}; it fuses on CUDA devices"
            )
        elif unfusable is not None:
            row.ran = [registry.PLAIN]
            row.why.append(unfusable)

    def end(self) -> None:
        self.open.pop()

    def joined(self, inner: Fusable) -> None:
        """The shortcut's BN runs in the pass of the step that is open."""
        self._row(inner).ran = [f"in {self.open[-1].layer}'s pass"]

    def served(self, op: str, choice: registry.Choice, call: object) -> None:
        if not self.open:  # an operator that a module calls by itself
            return
        row, rival = self.open[-1], _BY_OTHERS.get(op, registry.PLAIN)
        row.why += [f"{op} on {name}: {reason}" for name, reason in choice.rejected]
        if choice.backend == registry.PLAIN != rival:  # who serves it tells for himself
            return
        ran = f"{'batch_norm_act' if op.startswith('batch_norm_act') else op}: {choice.backend}"  # in several operators
        if choice.gain is not None and choice.backend != registry.PLAIN:
            ran += f" ({choice.gain:.2f}x {rival})"
        if op in _BY_OTHERS and self.pool is not None:
            row.modules += f" + {type(self.pool).__name__}"
            self.seen.add(self.pool)
            self.pool = None
        row.ran += [ran] if ran not in row.ran else []

    def outside(self, module: nn.Module) -> None:
        kind = type(module).__name__
        why = "the stem's row says why" if module in self.pools else f"no fused kernel replaces {kind}"
        self.rows[module] = Row(self.names[module], kind, [_OUTSIDE], [why])

    def _row(self, step: layers.Step | Fusable, add: bool = False, takes_over: bool = False) -> Row:
        """takes_over: the BN adds what the block before it left unadded."""
        of = {m: type(m).__name__ for m in (step.conv, step.bn, step.act) if m is not None}
        parts = ["add"] * takes_over + [of[m] for m in (step.conv, step.bn) if m in of] + ["add"] * add
        parts += [of[step.act]] if step.act is not None else []
        key = step.bn if step.conv is None else step.conv
        assert key is not None  # a step has one of them
        row = Row(self.names.get(key, "?"), " + ".join(parts))
        self.rows[key] = row
        for module in of:
            self.seen.update(module.modules())
        return row


def explain(model: nn.Module, x: Any) -> Explanation:
    """Run the model once on x and say, layer by layer, which backend served it and why none faster did.

    The model's mode and the caller's grad mode decide the path, as in a plain call; buffers (running statistics) are
    put back afterwards. A step that can't be fused is explained under a forced backend too, where a plain call raises.

    Args:
        model: any model of this package, or a fused one.
        x: [N, 3, H, W], on the model's device, or what else the model takes as its one argument.
    """
    compiled = hasattr(model, "_orig_mod") or model._compiled_call_impl is not None
    model = getattr(model, "_orig_mod", model)  # a compiled one makes its choices while it is traced
    buffers = [(b, b.clone()) for b in model.buffers()]
    images = [t for t in tree_leaves(x) if isinstance(t, Tensor)]
    explainer = _Explainer(model, images[0].device)
    previous, layers.block.explainer = layers.block.explainer, explainer
    try:
        with registry.heard_by(explainer.served):
            model._call_impl(x)  # hooks too, without what model.compile() made
    finally:
        layers.block.explainer = previous
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
    for module in model.modules():
        if module not in explainer.seen and not any(True for _ in module.children()):
            explainer.outside(module)
    order = {module: i for i, module in enumerate(model.modules())}
    found = Explanation(row for _, row in sorted(explainer.rows.items(), key=lambda item: order[item[0]]))
    found.summary = _summary(found, model, explainer.device)
    trains = torch.is_grad_enabled() and any(p.requires_grad for p in model.parameters())
    if compiled and trains and registry.get_backend() == "auto" and registry.fuses(explainer.device):
        found.summary += (
            "\nCompiled, what needs gradients is left to torch.compile, which fuses it too; SyncBatchNorm's steps over "
            "several processes are not."
        )
    return found


def _summary(rows: list[Row], model: nn.Module, device: torch.device) -> str:
    steps = [row for row in rows if row.ran != [_OUTSIDE]]
    fused = sum(not any(registry.PLAIN == ran.rpartition(": ")[2] for ran in row.ran) for row in steps)
    parts = [f"{fused} of {len(steps)} steps fused, {len(rows) - len(steps)} modules beside them"]
    serving = not model.training and not torch.is_grad_enabled()
    if serving and registry.get_backend() == "auto" and not registry.fuses(device):
        others = registry.apart_from_auto(device) if steps else []
        parts += [f'resnet_fused.backend("{name}") fuses steps here, faster or not' for name in others]
    if registry.fuses(device) and any("BatchNorm" in row.modules for row in rows if row.ran == [_OUTSIDE]):
        parts.append("resnet_fused.fuse(model) fuses the convolution + BN chains among these modules")
    if serving:
        parts.append("resnet_fused.deploy(model, x) folds BN into the weights, once, for serving")
    return "; ".join(parts)
