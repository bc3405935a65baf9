"""Squared gradients of single examples out of a pass over a batch of them.

A linear map's gradient for example n is delta_n^T a_n, of what it was given and what flows back to it; both are there
after one backward pass over the batch. Other modules without parts of their own are differentiated again, example by
example, alone. So a batch costs one forward pass and one backward pass through the activations, and no gradient of a
batch's sum is ever formed. Where a model uses its parameters in another way, examples are taken one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

Add = Callable[[str, Tensor], None]


class NotPerExample(Exception):
    """A module's use of its parameters does not tell examples apart."""


@dataclass
class _Call:
    """One use of a module in a forward pass: what it was given, and, later, what flows back to it."""

    module: nn.Module
    given: Tensor
    flows: Tensor | None = None


@dataclass
class _Uses:
    """The calls in which a parameter took part in one forward pass; those of tied parameters come together."""

    calls: list[tuple[_Call, str]] = field(default_factory=list)
    arrived: int = 0


class PerExample:
    """Watches modules through passes over batches, and adds up the squares of their parameters' gradients.

    Args:
        module: the model; its parameters are frozen while it is watched, so that no other gradients are computed.
        wanted: name -> parameter.
        sums: name -> where squares are added, in the parameter's shape.
    """

    def __init__(self, module: nn.Module, wanted: Mapping[str, nn.Parameter], sums: Mapping[str, Tensor]) -> None:
        self._module, self._sums = module, sums
        self._names = {id(parameter): name for name, parameter in wanted.items()}
        self._uses: dict[str, _Uses] = {}
        self._examples = 0
        self._buffers: dict[tuple, Tensor] = {}
        self._again = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch every module that owns a wanted parameter, until the block ends."""
        handles = []
        frozen = [parameter for parameter in self._module.parameters() if parameter.requires_grad]
        for parameter in frozen:
            parameter.requires_grad_(False)
        for part in self._module.modules():
            if any(id(parameter) in self._names for parameter in part.parameters(recurse=False)):
                handles.append(part.register_forward_pre_hook(self._expand, with_kwargs=True))
                handles.append(part.register_forward_hook(self._forward, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for parameter in frozen:
                parameter.requires_grad_(True)

    def begin(self, examples: int) -> None:
        """Say that a forward pass over so many examples begins."""
        self._examples, self._uses = examples, {}

    def backward(self, values: Float[Tensor, " examples"], factors: Float[Tensor, " examples"], *, last: bool) -> None:
        """Add factor_n * gradient(value_n)^2 over the examples.

        Args:
            values: one per example, of the forward pass that was begun last.
            factors: not negative.
            last: whether no other backward pass follows this forward pass.
        """
        for uses in self._uses.values():
            uses.arrived = 0
        total = (values * factors.sqrt().detach()).sum()
        if total.requires_grad:
            total.backward(retain_graph=not last)

    def _expand(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Give every example its own row where all share one, as positions do: a sum over examples would come back."""
        if (
            not self._again
            and isinstance(module, nn.Embedding)
            and len(args) == 1
            and args[0].shape[0] == 1
            and self._examples > 1
        ):
            return (args[0].expand(self._examples, *args[0].shape[1:]),), kwargs
        return None

    def _forward(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        if self._again:  # a module run by itself, to be differentiated again
            return output
        single = len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and isinstance(output, Tensor)
        if not single or next(module.children(), None) is not None:
            raise NotPerExample(f"{type(module).__name__} is given more than one tensor, or has parts")
        if not args[0].ndim or args[0].shape[0] != self._examples or output.shape[0] != self._examples:
            raise NotPerExample(f"{type(module).__name__} is given examples in another way than one after another")
        call = _Call(module, args[0].detach())
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in self._names:
                self._uses.setdefault(self._names[id(parameter)], _Uses()).calls.append((call, parameter_name))
        # A copy where gradients begin: what comes after may write into it, as an in-place ReLU does.
        watched = output if output.requires_grad else output.detach().requires_grad_().clone()
        watched.register_hook(lambda flows: self._backward(call, flows))
        return watched

    def _backward(self, call: _Call, flows: Tensor) -> None:
        call.flows = flows.detach()
        for parameter in call.module.parameters(recurse=False):
            name = self._names.get(id(parameter))
            if name is None:
                continue
            uses = self._uses[name]
            uses.arrived += 1
            if uses.arrived == len(uses.calls):
                self._again = True
                try:
                    self._add(name, uses)
                finally:
                    self._again = False

    def _add(self, name: str, uses: _Uses) -> None:
        if len(uses.calls) == 1:
            call, parameter_name = uses.calls[0]
            _add_squares(call, parameter_name, self._sums[name], self._buffers)
            return
        for number in range(self._examples):  # tied: an example's gradients are added up before they are squared
            total = torch.zeros_like(self._sums[name])
            for call, parameter_name in uses.calls:
                total += _gradient_of_one(call, parameter_name, number)
            self._sums[name].addcmul_(total, total)


def _add_squares(call: _Call, parameter: str, sums: Tensor, buffers: dict[tuple, Tensor]) -> None:
    """Add the squares of one parameter's gradients over the examples of a call."""
    given, flows, module = call.given, call.flows, call.module
    assert flows is not None, "nothing has flowed back"
    if parameter == "weight" and _is_linear(module):
        left, right = (given, flows) if _in_x_out(module) else (flows, given)
        left, right = _rows(left), _rows(right)
        if left.shape[1] == 1:  # one row each: the square of an outer product is that of the squares
            sums.addmm_(left[:, 0].square().T, right[:, 0].square())
            return
        product = buffers.setdefault(tuple(sums.shape), torch.empty_like(sums))
        for one, other in zip(left, right, strict=True):
            torch.mm(one.T, other, out=product)
            sums.addcmul_(product, product)
    elif parameter == "weight" and isinstance(module, nn.Embedding):
        for ids, flow in zip(given, flows, strict=True):
            distinct, places = ids.reshape(-1).unique(return_inverse=True)
            rows = flow.new_zeros(len(distinct), flow.shape[-1])
            rows.index_add_(0, places, flow.reshape(-1, flow.shape[-1]))
            sums.index_add_(0, distinct, rows.square_())
            if module.padding_idx is not None:  # torch gives that row no gradient
                sums[module.padding_idx] = 0
    elif parameter == "bias" and (_is_linear(module) or isinstance(module, nn.LayerNorm)):
        sums += _rows(flows).sum(dim=1).square().sum(dim=0)
    else:
        sums += _again(module, parameter, given, flows).square().sum(dim=0)


def _rows(tensor: Tensor) -> Tensor:
    """Return the rows of each example, shape (examples, rows, last)."""
    return tensor.reshape(len(tensor), -1, tensor.shape[-1])


def _gradient_of_one(call: _Call, parameter: str, number: int) -> Tensor:
    """Return one parameter's gradient for one example of a call."""
    assert call.flows is not None, "nothing has flowed back"
    given, flows, module = call.given[number], call.flows[number], call.module
    if parameter == "weight" and _is_linear(module):
        left, right = (given, flows) if _in_x_out(module) else (flows, given)
        return left.reshape(-1, left.shape[-1]).T @ right.reshape(-1, right.shape[-1])
    if parameter == "weight" and isinstance(module, nn.Embedding):
        total = torch.zeros_like(module.weight)
        total.index_add_(0, given.reshape(-1), flows.reshape(-1, flows.shape[-1]))
        if module.padding_idx is not None:
            total[module.padding_idx] = 0
        return total
    return _again(module, parameter, given[None], flows[None])[0]


def _again(module: nn.Module, parameter: str, given: Tensor, flows: Tensor) -> Tensor:
    """Return one parameter's gradient for each example, by running the module again on each alone."""
    parameters = {name: tensor.detach() for name, tensor in module.named_parameters(recurse=False)}

    def one(example: Tensor, flow: Tensor) -> Tensor:
        def run(value: Tensor) -> Tensor:
            return functional_call(module, {**parameters, parameter: value}, (example[None],))

        return vjp(run, parameters[parameter])[1](flow[None])[0]

    return vmap(one)(given, flows)


def _is_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear or _in_x_out(module)


def _in_x_out(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and isinstance(getattr(module, "nf", None), int)
