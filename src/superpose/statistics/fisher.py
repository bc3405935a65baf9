"""The diagonal of the Fisher information: squared gradients of single examples' log-probabilities.

    F = (1/N) sum_n E_{y ~ p(.|x_n)} [ (d log p(y|x_n) / d theta)^2 ]

Matena and Raffel 2021, arXiv:2111.09832. The expectation is taken exactly over a classifier's classes, or by one answer
drawn from the model's own predictions (for a language model: one token at every position, whose gradients add up to
one example's). "empirical" takes the data's own answers instead: another quantity, and a common one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from superpose.inference import IGNORED, Batch, LiveModel
from superpose.statistics.passes import AddBatch
from superpose.statistics.per_example import NotPerExample, PerExample

Labels = Literal["exact", "sampled", "empirical"]
MOST_EXACT = 16
"""Classes up to which the expectation is exact where nothing is said: it takes a backward pass for each."""
_CHECKED = 3
"""Examples on which the passes over batches are compared with single examples first."""


@dataclass(frozen=True)
class Fisher:
    """How the Fisher information of a model is added up.

    Args:
        live: the model.
        labels: over what answers: "exact", "sampled" or "empirical".
        seed: of sampled answers; an example's own do not depend on the others.
    """

    live: LiveModel
    labels: Labels
    seed: int = 0
    kind: str = "fisher"
    width: int = 12
    """The sums; beside them two more while batches are compared with single examples, or an example's gradients."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each parameter, by the checkpoint's names."""
        return {name: tuple(parameter.shape) for name, parameter in self.live.parameters().items()}

    def sums(self, names: tuple[str, ...], device: torch.device) -> dict[str, Tensor]:
        """Return zeros to add to."""
        shapes = self.shapes()
        return {name: torch.zeros(shapes[name], dtype=torch.float32, device=device) for name in names}

    @contextmanager
    def adding(self, sums: Mapping[str, Tensor], first: Batch) -> Iterator[AddBatch]:
        """Yield what adds a batch's squared gradients to the sums.

        Args:
            sums: by the checkpoint's names; those of some of the parameters, or of all.
            first: a batch on which batches are compared with single examples; nothing of it is added.

        Yields:
            Batch -> None.
        """
        learnt = {name: parameter for name, parameter in self.live.parameters().items() if parameter.requires_grad}
        wanted = {name: parameter for name, parameter in learnt.items() if name in sums}  # the frozen ones stay at zero
        agree = bool(wanted) and self._batches_agree(wanted, first)

        def add(batch: Batch) -> None:
            if agree:
                try:
                    self._add_batch(batch, wanted, sums)
                    return
                except NotPerExample:  # before anything was added: it shows on the way forward
                    pass
            if wanted:
                self._add_singly(batch, wanted, sums)

        yield add

    def mean(self, name: str, sums: Mapping[str, Tensor], examples: int) -> Tensor:
        """Return a parameter's Fisher information."""
        return sums[name] / examples

    def _batches_agree(self, wanted: Mapping[str, nn.Parameter], first: Batch) -> bool:
        """Whether passes over a batch give what single examples give, on a few of them."""
        few = first.part(0, min(len(first), _CHECKED))
        if len(few) < 2:  # a batch of one is a single example: two of it tell as much
            twice = {name: tensor.repeat(2, *[1] * (tensor.ndim - 1)) for name, tensor in few.inputs.items()}
            targets = None if few.targets is None else few.targets.repeat(2, 1)
            few = Batch(twice, targets, few.numbers * 2, few.tokens * 2)
        found, known = ({name: torch.zeros_like(parameter) for name, parameter in wanted.items()} for _ in range(2))
        try:
            self._add_batch(few, wanted, found)
        except (NotPerExample, RuntimeError):  # torch's own, where a module cannot be run again on many at once
            return False
        self._add_singly(few, wanted, known)
        sizes = {name: float(tensor.abs().max()) if tensor.numel() else 0.0 for name, tensor in known.items()}
        # Some gradients are zero but for rounding, such as those of a key's bias: they agree within the others' noise.
        noise = 1e-10 * max(sizes.values(), default=0.0)
        return all(
            float((found[name] - known[name]).abs().max()) <= 1e-3 * sizes[name] + noise
            for name in wanted
            if known[name].numel()
        )

    def _add_batch(self, batch: Batch, wanted: Mapping[str, nn.Parameter], sums: Mapping[str, Tensor]) -> None:
        watcher = PerExample(self.live.module, wanted, sums)
        with watcher.watching(), torch.enable_grad():
            watcher.begin(len(batch))
            log_probabilities = self.live.scores(batch).log_softmax(dim=-1)
            answers = list(self._answers(log_probabilities.detach(), batch))
            for place, (answer, factors) in enumerate(answers):
                values = _log_probability(log_probabilities, answer)
                watcher.backward(values, factors, last=place + 1 == len(answers))

    def _add_singly(self, batch: Batch, wanted: Mapping[str, nn.Parameter], sums: Mapping[str, Tensor]) -> None:
        before = {name: parameter.requires_grad for name, parameter in self.live.module.named_parameters()}
        for parameter in self.live.module.parameters():
            parameter.requires_grad_(False)
        for parameter in wanted.values():
            parameter.requires_grad_(True)
        names, parameters = list(wanted), list(wanted.values())
        try:
            for number in range(len(batch)):
                one = batch.part(number, number + 1)
                with torch.enable_grad():
                    log_probabilities = self.live.scores(one).log_softmax(dim=-1)
                    answers = list(self._answers(log_probabilities.detach(), one))
                    for place, (answer, factors) in enumerate(answers):
                        value = _log_probability(log_probabilities, answer).sum()
                        if not value.requires_grad:
                            continue
                        more = place + 1 < len(answers)
                        gradients = torch.autograd.grad(value, parameters, retain_graph=more, allow_unused=True)
                        for name, gradient in zip(names, gradients, strict=True):
                            if gradient is not None:
                                sums[name].addcmul_(gradient, gradient, value=float(factors))
        finally:
            for place, parameter in self.live.module.named_parameters():
                parameter.requires_grad_(before[place])

    def _answers(
        self, log_probabilities: Float[Tensor, "examples positions classes"], batch: Batch
    ) -> Iterator[tuple[Int[Tensor, "examples positions"], Float[Tensor, " examples"]]]:
        """Yield answers and how much each counts."""
        examples, _, classes = log_probabilities.shape
        ones = log_probabilities.new_ones(examples)
        if self.labels == "exact":
            for number in range(classes):
                chances = log_probabilities[:, 0, number].exp()
                yield torch.full((examples, 1), number, device=ones.device), chances
        elif self.labels == "empirical":
            assert batch.targets is not None, "no answers"
            yield batch.targets, ones
        else:
            drawn = [self._draw(row, number) for row, number in zip(log_probabilities, batch.numbers, strict=True)]
            answer = torch.stack(drawn)
            if batch.targets is not None and self.live.answers == "tokens":
                answer = torch.where(batch.targets == IGNORED, IGNORED, answer)
            yield answer, ones

    def _draw(self, log_probabilities: Float[Tensor, "positions classes"], number: int) -> Int[Tensor, " positions"]:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + number) % 2**63)
        drawn = torch.multinomial(log_probabilities.exp().cpu(), 1, generator=generator)
        return drawn[:, 0].to(log_probabilities.device)


def _log_probability(
    log_probabilities: Float[Tensor, "examples positions classes"], answer: Int[Tensor, "examples positions"]
) -> Float[Tensor, " examples"]:
    """Return the log-probability of each example's answer, added up over the positions that are asked for."""
    asked = answer != IGNORED
    chosen = log_probabilities.gather(-1, answer.clamp_min(0)[..., None])[..., 0]
    return torch.where(asked, chosen, 0.0).sum(dim=1)
