"""A model as a graph of few operators that hold their own copies: BN folded, ReLU and add in a convolution's epilogue.

The model is exported as plain PyTorch with a batch of any size and rewritten node by node; what has no counterpart
stays as it is.
"""

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..dispatch import registry
from .export import program

aten = torch.ops.aten
_BN = aten._native_batch_norm_legit_no_training.default


class Conv(NamedTuple):
    """act(conv(x) + shift + addend)."""

    x: fx.Node
    weight: Tensor  # [K, C / groups, R, S], BN's scale in it
    shift: Tensor | None  # [K]
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int
    relu: bool = False
    addend: fx.Node | None = None
    shape: torch.Size = torch.Size()  # of x in the example


Emit = Callable[["Writer", Conv], fx.Node]
Linear = Callable[["Writer", fx.Node, Tensor, Tensor | None], fx.Node]


class Writer:
    """The new graph, and a module for the tensors that it holds."""

    def __init__(self) -> None:
        self.graph, self.module = fx.Graph(), nn.Module()

    def held(self, t: Tensor | None) -> fx.Node | None:
        """A copy."""
        return None if t is None else self.keep(t.detach().clone())

    def keep(self, t: Tensor) -> fx.Node:
        """The tensor itself."""
        name = f"held{len(self.module._buffers)}"
        self.module.register_buffer(name, t)
        return self.graph.get_attr(name)

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        return self.graph.call_function(function, args, kwargs)


def lower(model: nn.Module, example: Tensor, emit: Emit, linear: Linear) -> fx.GraphModule:
    """A GraphModule without parameters.

    Args:
        model: in eval mode.
        example: [N, C, H, W].
        emit: writes a convolution.
        linear: writes a fully connected layer x @ weight.T + bias.
    """
    with registry.backend("auto"), torch.no_grad():  # a forced backend's operators would be exported as such
        source = program(model, example).run_decompositions({})  # without in-place operators
        signature = source.graph_signature
        if written := [*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()]:
            raise ValueError(f"model writes {', '.join(written)} in eval mode, which a snapshot can't")
        found = _Lowering(source, example, emit, linear).run()
        same(found(example), model(example), computed_in(model, example))
    return found


def computed_in(model: nn.Module, example: Tensor) -> torch.dtype:
    """The dtype of the model's numbers: its parameters', for images may be of bytes."""
    own = example.dtype if example.is_floating_point() else torch.float32
    return next((p.dtype for p in model.parameters()), own)


def same(found: Any, expected: Any, dtype: torch.dtype) -> None:
    """What the snapshot gives is what the model gives, within the folding's rounding."""
    ours, form = tree_flatten(found)
    theirs, wanted = tree_flatten(expected)
    if form != wanted:
        raise ValueError(f"model returns {wanted}, of which the snapshot made {form}: such a model can't be deployed")
    for a, b in zip(ours, theirs, strict=True):
        same = a == b
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            size = b.double().abs().max().item() if b.numel() else 0.0
            error = (a.double() - b.double()).abs().max().item() if a.shape == b.shape and b.numel() else 0.0
            same = a.shape == b.shape and a.dtype == b.dtype and error <= 64 * torch.finfo(dtype).eps ** 0.75 * size
        if not same:
            raise ValueError("the snapshot does not give the model's numbers on the example: it can't be deployed")


class _Lowering:
    def __init__(self, source: torch.export.ExportedProgram, example: Tensor, emit: Emit, linear: Linear) -> None:
        signature = source.graph_signature
        state = {**source.state_dict, **source.constants}
        names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        names |= signature.inputs_to_lifted_tensor_constants
        self.tensors = {name: state[of] for name, of in names.items()}
        self.form = source.call_spec.out_spec
        self.source, self.example, self.emit, self.linear = source.graph, example, emit, linear
        self.writer = Writer()
        self.written: dict[fx.Node, fx.Node] = {}
        self.pending: dict[fx.Node, Conv] = {}  # convolutions whose add and ReLU may follow
        self.done: set[fx.Node] = set()

    def run(self) -> fx.GraphModule:
        for node in self.source.nodes:
            if node not in self.done:
                self._node(node)
        self.writer.graph.eliminate_dead_code()
        return fx.GraphModule(self.writer.module, self.writer.graph)

    def _node(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            if node.name not in self.tensors:
                self.written[node] = self.writer.graph.placeholder(node.name)
        elif node.op == "output":
            results = [self._value(r) for r in _args(node)[0]]
            self.writer.graph.output(tree_unflatten(results, self.form))
        elif node.target is aten.conv2d.default and self._has(*_args(node)[1:3]):
            self._convolution(node)
        elif node.target is aten.linear.default and self._has(*_args(node)[1:3]):
            x, weight, bias = (*_args(node), None)[:3]
            self.written[node] = self.linear(self.writer, self._value(x), self._tensor(weight), self._tensor(bias))
        elif node.target is aten.add.Tensor and self._add(node):
            pass
        else:
            self._copy(node)

    def _convolution(self, node: fx.Node) -> None:
        defaults: tuple[Any, ...] = (None, None, None, [1, 1], [0, 0], [1, 1], 1)
        x, weight, bias, stride, padding, dilation, groups = _args(node) + defaults[len(_args(node)) :]
        weight, bias, last = self._tensor(weight), self._tensor(bias), node
        bn = _only_user(node)
        if bn is not None and bn.target is _BN and all(map(_is_first, bn.users)) and self._has(*_args(bn)[1:5]):
            scale, offset, mean, var, _, eps = _args(bn)[1:7]
            vectors = self._tensor(scale), self._tensor(offset), self._tensor(mean), self._tensor(var)
            weight, bias = folded(weight, bias, *vectors, eps)
            self.done |= {bn, *bn.users}
            last = next(iter(bn.users))
        conv = Conv(x, weight, bias, stride, padding, dilation, groups, shape=x.meta["val"].shape)
        user = _only_user(last)
        if user is not None and user.target is aten.relu.default:
            self.done.add(user)
            self.written[user] = self._emit(conv._replace(relu=True))
        elif user is not None and user.target is aten.add.Tensor and _same_shape(*_args(user)[:2]):
            self.pending[last] = conv  # written where the add is, or before what else reads it
        else:
            self.written[last] = self._emit(conv)

    def _add(self, node: fx.Node) -> bool:
        """The convolution that comes last takes the other addend and the ReLU."""
        addends = [a for a in _args(node) if isinstance(a, fx.Node)]
        found = [a for a in addends if a in self.pending]
        if not found or len(addends) < 2 or node.kwargs:
            return False
        order = {n: i for i, n in enumerate(self.source.nodes)}
        last = max(found, key=lambda n: order[n])
        other = next(a for a in addends if a is not last)
        conv = self.pending.pop(last)._replace(addend=other)
        user, result = _only_user(node), node
        if user is not None and user.target is aten.relu.default:
            self.done.add(user)
            conv, result = conv._replace(relu=True), user
        self.written[result] = self._emit(conv)
        return True

    def _emit(self, conv: Conv) -> fx.Node:
        x = self._value(conv.x)
        addend = None if conv.addend is None else self._value(conv.addend)
        shape = torch.Size((len(self.example), *conv.shape[1:]))
        return self.emit(self.writer, conv._replace(x=x, addend=addend, shape=shape))

    def _copy(self, node: fx.Node) -> None:
        copy = self.written[node] = self.writer.graph.node_copy(node, self._value)
        if node.target is aten.view.default:  # layouts are not those of the export
            copy.target = aten.reshape.default
        elif node.target is aten.as_strided.default:
            raise ValueError("model reads memory by strides (as_strided), which deploy lays out otherwise")

    def _value(self, node: Any) -> Any:
        if not isinstance(node, fx.Node):
            return node
        if node not in self.written:
            if node in self.pending:
                self.written[node] = self._emit(self.pending.pop(node))
            else:
                self.written[node] = self.writer.keep(self.tensors[node.name].detach().clone())
        return self.written[node]

    def _has(self, *nodes: fx.Node | None) -> bool:
        """The model's own tensors, nothing computed."""
        return all(node is None or node.name in self.tensors for node in nodes)

    def _tensor(self, node: fx.Node | None) -> Any:
        """A tensor of the model, or None."""
        return None if node is None else self.tensors[node.name]


def _args(node: fx.Node) -> tuple[Any, ...]:
    return node.args


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _is_first(user: fx.Node) -> bool:
    return user.target is operator.getitem and bool(_args(user)[1] == 0)


def _same_shape(a: Any, b: Any) -> bool:
    if not (isinstance(a, fx.Node) and isinstance(b, fx.Node)) or a is b:
        return False
    one: Tensor = a.meta["val"]
    other: Tensor = b.meta["val"]
    shapes = [tuple(t.shape) for t in (one, other)]
    return shapes[0] == shapes[1] and one.dtype is other.dtype


def folded(
    weight: Tensor, bias: Tensor | None, bn_weight: Tensor | None, bn_bias: Tensor | None, mean: Tensor, var: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """BN's scale in the weight and what it adds, computed in float64 and rounded once to the weight's dtype."""
    scale = (var.double() + eps).rsqrt() * (1 if bn_weight is None else bn_weight.double())
    shift = scale * ((0 if bias is None else bias.double()) - mean.double())
    shift = shift if bn_bias is None else shift + bn_bias.double()
    return (weight.double() * scale[:, None, None, None]).to(weight.dtype), shift.to(weight.dtype)
