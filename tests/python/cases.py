"""An op of the table with one of its samples, as the functions that the harness differentiates, maps and compiles."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from ops import Arguments, Op


class Case(NamedTuple):
    op: Op
    sample: str

    def __str__(self):
        return f"{self.op.name} {self.sample}".strip()

    def arguments(self, dtype=torch.float64, size=3) -> Arguments:
        """New ones at every call; `dtype` is that of the floating tensors."""

        def cast(value):
            if not isinstance(value, Tensor) or not value.is_floating_point():
                return value
            return value.detach().to(dtype).requires_grad_(value.requires_grad)

        return {name: cast(value) for name, value in self.op.samples[self.sample](size).items()}


def tensors_of(arguments):
    return {name: value for name, value in arguments.items() if isinstance(value, Tensor)}


def leaves_of(arguments):
    return {name: tensor for name, tensor in tensors_of(arguments).items() if tensor.requires_grad}


def constants(arguments):
    return {name: value.detach() if isinstance(value, Tensor) else value for name, value in arguments.items()}


def in_double(arguments):
    def cast(tensor):
        wide = tensor.detach().double() if tensor.is_floating_point() else tensor
        return wide.requires_grad_(tensor.requires_grad)

    return tree_map_only(Tensor, cast, arguments)


def bind(function, arguments, names):
    """`function` of the named arguments alone."""
    return lambda *values: function(**{**arguments, **dict(zip(names, values, strict=True))})


class Problem:
    """A case as a function of what is differentiated, beside its reference."""

    def __init__(self, case, dtype=torch.float64, curved=False):
        arguments = case.arguments(dtype)
        self.leaves = tuple(leaves_of(arguments).values())
        self.function, self.reference = (
            bind(function, constants(arguments), leaves_of(arguments))
            for function in (case.op.function, case.op.reference)
        )
        if curved:  # so that what is linear in an argument has second derivatives too
            self.function, self.reference = curve(self.function), curve(self.reference)
        self.upstream = torch.randn_like(self.function(*self.leaves).detach())
        self.directions = tuple(torch.randn_like(leaf) for leaf in self.leaves)

    def gradients(self, function=None, **options):
        return torch.autograd.grad((function or self.function)(*self.leaves), self.leaves, self.upstream, **options)

    def second_derivatives(self, function):
        """In the directions, from autograd twice."""
        first = self.gradients(function, create_graph=True)
        return torch.autograd.grad(dot(first, self.directions), self.leaves)

    def duals(self):
        return tuple(map(forward_ad.make_dual, self.leaves, self.directions))


def curve(function):
    return lambda *leaves: function(*(leaf * leaf for leaf in leaves))


def dot(tensors, others):
    return sum((a * b).sum() for a, b in zip(tensors, others, strict=True))


def outcome(function, arguments, upstream=None):
    """The value, and the gradients of what requires one."""
    result = function(**arguments)
    leaves = tuple(leaves_of(arguments).values())
    return (result.detach(), *(torch.autograd.grad(result, leaves, upstream) if leaves else ()))


def upstream_of(case, arguments):
    result = case.op.function(**arguments)
    return torch.randn_like(result) if result.is_floating_point() else None


def stacked(case, times=3, **options):
    """The tensors of several samples, with a batch dimension in front, and the rest of the arguments."""
    each = [case.arguments(**options) for _ in range(times)]
    tensors = {name: torch.stack([a[name].detach() for a in each]) for name in tensors_of(each[0])}
    return tensors, constants(each[0])


def ours(op, args, kwargs):
    """The overload of ours that is called, or None."""
    if isinstance(op, torch._ops.OpOverloadPacket) and op._qualified_op_name.startswith("masked_loss::"):
        op = getattr(op, torch._C._jit_resolve_packet(op._qualified_op_name, *args, **kwargs) or "default")
    return op if isinstance(op, torch._ops.OpOverload) and op.namespace == "masked_loss" else None


class PublicCalls(TorchFunctionMode):
    """Calls above autograd, as (overload, arguments, keyword arguments)."""

    def __init__(self, calls):
        super().__init__()
        self.calls = calls

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if op := ours(function, args, kwargs or {}):

            def fresh(tensor):
                leaf = tensor.detach().clone().requires_grad_(tensor.requires_grad)
                return leaf * 1 if leaf.requires_grad and op._schema.is_mutable else leaf

            self.calls.append((op, *tree_map_only(Tensor, fresh, (args, kwargs or {}))))
        return function(*args, **(kwargs or {}))


class InnerCalls(TorchDispatchMode):
    """Calls below autograd."""

    def __init__(self, calls):
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if op := ours(function, args, kwargs or {}):
            self.calls.append((op, *tree_map_only(Tensor, lambda t: t.detach().clone(), (args, kwargs or {}))))
        return function(*args, **(kwargs or {}))


def calls_of(op, arguments):
    """What one forward and backward pass calls, public op and inner ones."""
    calls = []
    with PublicCalls(calls), InnerCalls(calls):
        result = op.function(**arguments)
        if result.requires_grad:
            result.backward(torch.ones_like(result))
    return calls
