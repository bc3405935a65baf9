"""What a model reads of a row, and batches of such examples that are of one length, so that nothing is padded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from superpose.inference.rows import Row

IGNORED = -100
"""A target that asks for nothing, as in torch's cross entropy."""


@dataclass(frozen=True)
class Example:
    """One row as tensors, without a batch dimension.

    Args:
        inputs: by the name of the model's argument.
        target: class for each position that the model answers at (one for a classifier), `IGNORED` where none is asked
            for; None where the data has no answers.
        tokens: number of positions that were read, for the record.
    """

    inputs: Mapping[str, Tensor]
    target: Int[Tensor, " positions"] | None = None
    tokens: int = 1


@dataclass(frozen=True)
class Batch:
    """Examples of one shape, stacked.

    Args:
        inputs: by the name of the model's argument, examples first.
        targets: as in `Example`, stacked.
        numbers: which examples they are.
        tokens: positions read, over all of them.
    """

    inputs: Mapping[str, Tensor]
    targets: Int[Tensor, "examples positions"] | None
    numbers: tuple[int, ...]
    tokens: int

    def __len__(self) -> int:
        return len(self.numbers)

    def part(self, start: int, stop: int) -> Batch:
        """Return the examples start..stop; what the whole batch's tokens are shared evenly."""
        inputs = {name: tensor[start:stop] for name, tensor in self.inputs.items()}
        targets = None if self.targets is None else self.targets[start:stop]
        return Batch(inputs, targets, self.numbers[start:stop], self.tokens * (stop - start) // len(self))

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device."""
        inputs = {name: tensor.to(device) for name, tensor in self.inputs.items()}
        targets = None if self.targets is None else self.targets.to(device)
        return Batch(inputs, targets, self.numbers, self.tokens)


@dataclass(frozen=True)
class LiveModel:
    """A model in memory that reads rows of data.

    What `module:function` has to return, given the model's folder as a `Path` and the task's settings (`TaskData`).

    Args:
        module: in evaluation mode; its parameters are in float32 or wider.
        encode: row -> example. A row whose label is none of the model's is an error.
        forward: named inputs, stacked -> scores before the softmax, (examples, classes) or (examples, positions,
            classes).
        answers: "classes" for one answer per example, "tokens" for a language model, "features" for a body without a
            head, whose forward pass can be watched and nothing more.
        names: tensor of the checkpoint -> name of the module's parameter or buffer; alike where not listed.
        classes: names of the classes, as far as they have any.
        in_x_out: checkpoint tensors of linear maps that are stored in x out.
        tokenizer: of a language model: what reads other texts than rows, and writes out what it generates.
    """

    module: nn.Module
    encode: Callable[[Row], Example]
    forward: Callable[[Mapping[str, Tensor]], Tensor]
    answers: str = "classes"
    names: Mapping[str, str] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    in_x_out: frozenset[str] = frozenset()
    tokenizer: Any = None

    def scores(self, batch: Batch) -> Tensor:
        """Return scores before the softmax in float32, (examples, positions, classes)."""
        scores = self.forward(batch.inputs).float()
        return scores[:, None] if scores.ndim == 2 else scores

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters by the checkpoint's names; a tied one once."""
        own = dict(self.module.named_parameters(remove_duplicate=False))
        told = {parameter: tensor for tensor, parameter in self.names.items() if parameter in own}
        found: dict[str, nn.Parameter] = {}
        seen: set[int] = set()
        # What the checkpoint lists comes first: of a tied tensor it keeps one name.
        for name in sorted(own, key=lambda name: (name not in told, name)):
            if id(own[name]) not in seen:
                seen.add(id(own[name]))
                found[told.get(name, name)] = own[name]
        return found


def batches(examples: Iterable[Example], size: int) -> list[Batch]:
    """Return batches of examples whose inputs have one shape; longer ones first, so that memory shows at once.

    Args:
        examples: the examples.
        size: most examples of a batch.

    Returns:
        The batches; the order depends on the examples alone.
    """
    alike: dict[tuple, list[tuple[int, Example]]] = {}
    for number, example in enumerate(examples):
        shapes = tuple((name, tuple(tensor.shape)) for name, tensor in sorted(example.inputs.items()))
        places = None if example.target is None else len(example.target)
        alike.setdefault((shapes, places), []).append((number, example))
    # Positions can be None: their texts are compared, and nothing hangs on their order.
    ordered = sorted(alike.items(), key=lambda item: (-sum(e.tokens for _, e in item[1][:1]), repr(item[0])))
    return [_stack(members[start : start + size]) for _, members in ordered for start in range(0, len(members), size)]


def _stack(members: Sequence[tuple[int, Example]]) -> Batch:
    examples = [example for _, example in members]
    inputs = {name: torch.stack([example.inputs[name] for example in examples]) for name in examples[0].inputs}
    found = [example.target for example in examples if example.target is not None]
    targets = torch.stack(found) if found else None
    return Batch(inputs, targets, tuple(number for number, _ in members), sum(example.tokens for example in examples))
